"""Causal decoding with a cache: one more token's attention, from keys and values kept by earlier
calls.

What a causal query sees does not depend on later tokens, so nothing kept is ever computed anew:
keys and values are written once, and the representatives of a block once it is full. Globals stand
in front of the token slots; they see no token and never change. All shapes are fixed: a cache has
slots for whole blocks, and slots without a token are masked.

Axes: L layers, B batch, N heads, H head width, T tokens, S keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax.kernels import Source, pad
from lsg_flax.patterns import sparsity
from lsg_flax.patterns.config import LSGConfig
from lsg_flax.patterns.lsg import first_query, rotations_of


class LayerCache(NamedTuple):
    """What one layer keeps; in `Cache` all arrays have a leading axis L.

    Attributes:
        tokens: the globals, then the slots; masks are [B, 1, S].
        chosen: the representatives of the slots, of full blocks right ones; None without a sparse
            part.
        bos_query: [B, N, H], what "bos_pooling" weighs with.
        memory: keys and values of the encoder's states, for cross-attention.
    """

    tokens: Source
    chosen: Source | None = None
    bos_query: Array | None = None
    memory: Source | None = None


class Cache(NamedTuple):
    """What a causal model keeps between calls: a pytree of arrays with fixed shapes.

    Attributes:
        layers: keys and values.
        length: slots in use, the same for every row (rows are padded on the left).
        position: [B], the position id of the next token.
    """

    layers: LayerCache
    length: Int[Array, ""]
    position: Int[Array, "B"]


def slots_for(length: int, config: LSGConfig | None) -> int:
    """Slots of a cache for `length` tokens: with LSG attention whole blocks, two at least.

    Raises:
        ValueError: for settings under which the uncached model does not run at every length.
    """
    if config is None:
        return length
    block = config.block_size
    if length > 2 * block and not config.adaptive:
        raise ValueError(
            f"a cache of {length} tokens is over two blocks of {block}, and with adaptive=False "
            "longer sequences must be whole blocks, which growing ones are not: set adaptive=True."
        )
    chunked = config.sparsity_factor > 1 and sparsity.effective_type(config) in ("norm", "lsh")
    if config.is_sparse and chunked and block % config.selection_chunk:
        raise ValueError(
            f"sparsity_type={config.sparsity_type!r} with a cache picks from one block at a time: "
            f"choose a sparse_block_size that divides block_size={block}, not "
            f"{config.sparse_block_size}."
        )
    return max(-(-length // block), 2) * block


def first_layer_cache(
    query: Float[Array, "B N H T"],
    key: Float[Array, "B N H T"],
    value: Float[Array, "B N H T"],
    mask: Bool[Array, "B T"],
    *,
    config: LSGConfig | None,
    slots: int,
    lsh_key: PRNGKeyArray | None = None,
) -> LayerCache:
    """What a layer keeps of the prompt, globals in front.

    Args:
        mask: False for padding; slots behind the prompt are free whatever they hold.
        slots: from `slots_for`.
    """
    split = config.num_global_tokens if config else 0
    arrays = (query, key, value, mask[:, None])
    query, *kept = (pad(x, 0, split + slots - x.shape[-1]) for x in arrays)
    tokens = Source(*kept)
    if config is None or not config.is_sparse:
        return LayerCache(tokens)
    own = Source(*(x[..., split:] for x in tokens))
    bos_query = first_query(query[..., split:], own.mask[:, 0], config)
    return LayerCache(tokens, _choose(own, bos_query, config, lsh_key), bos_query)


def attend_step(
    query: Float[Array, "B N H 1"],
    key: Float[Array, "B N H 1"],
    value: Float[Array, "B N H 1"],
    mask: Bool[Array, "B 1"],
    cache: Cache,
    layer: Int[Array, ""],
    *,
    config: LSGConfig | None,
    lsh_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B N H 1"], LayerCache]:
    """The next token's causal attention, and what `extend` shall write.

    Args:
        mask: whether the token is real; one that is not sees itself as little as others see it.
        cache: of earlier calls, of all layers: cutting from it what one layer's token sees saves
            a copy of that layer.
        layer: the number of this one.

    Returns:
        The context (NaN if no slot is free), as `lsg_attention(..., causal=True)` gives it for the
        last of `cache.length + 1` tokens; and the token's key and value, with the representatives
        of the block that it is in.
    """
    token, kept, length = Source(key, value, mask[:, None]), cache.layers, cache.length
    split = config.num_global_tokens if config else 0
    slots = kept.tokens.key.shape[-1] - split
    new = LayerCache(token)
    if config is None:
        seen = [_cut(kept.tokens, layer, 0, slots), token]
    else:
        before = jnp.maximum(length // config.block_size - 1, 0) * config.block_size
        local = _cut(kept.tokens, layer, split + before, 2 * config.block_size)
        seen = [_cut(kept.tokens, layer, 0, split), local, token]
        if config.is_sparse:
            seen.append(_left_window(cache, layer, config))
            chosen = _of_current_block(token, cache, layer, config, lsh_key)
            new = LayerCache(token, chosen)
    return jnp.where(length < slots, _attend(query, seen), jnp.nan).astype(query.dtype), new


def extend(
    cache: Cache, new: LayerCache, position: Int[Array, "B"], config: LSGConfig | None
) -> Cache:
    """The cache with one more token: `new` is `attend_step`'s, stacked over layers, `position` the
    token's."""

    def write(old: Source, new: Source, start) -> Source:
        pairs = zip(old, new, strict=True)
        return Source(*(lax.dynamic_update_slice_in_dim(o, n, start, axis=-1) for o, n in pairs))

    old, split = cache.layers, config.num_global_tokens if config else 0
    layers = old._replace(tokens=write(old.tokens, new.tokens, split + cache.length))
    if config is not None and old.chosen is not None and new.chosen is not None:
        start = cache.length // config.block_size * config.sparse_step
        layers = layers._replace(chosen=write(old.chosen, new.chosen, start))
    return Cache(layers, cache.length + 1, position + 1)


def prompt_length(mask: Bool[Array, "B T"]) -> Int[Array, ""]:
    """Up to the last real token of any row: what lies behind fills a bucket, and its slots are
    free."""
    return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1)[None], 1)).astype(jnp.int32)


def _cut(source: Source, layer: Int[Array, ""], start, width: int) -> Source:
    """A run of one layer's keys."""

    def cut(x):
        run = lax.dynamic_slice_in_dim(x, start, width, axis=-1)
        return lax.dynamic_index_in_dim(run, layer, keepdims=False)

    return Source(*map(cut, source))


def _left_window(cache: Cache, layer: Int[Array, ""], config: LSGConfig) -> Source:
    """The last representatives of the blocks before the previous one."""
    chosen = cache.layers.chosen
    assert chosen is not None
    width = min(config.sparse_block_size, chosen.key.shape[-1])
    end = (cache.length // config.block_size - 1) * config.sparse_step
    start = jnp.maximum(end - width, 0)
    window = _cut(chosen, layer, start, width)
    return window._replace(mask=window.mask & (start + jnp.arange(width) < end)[None, None])


def _of_current_block(
    token: Source, cache: Cache, layer: Int[Array, ""], config: LSGConfig, lsh_key
) -> Source:
    """Representatives of the block that the token is in: chosen with its last token, before that
    whatever is there, which no query sees."""
    kept, block, step = cache.layers, config.block_size, config.sparse_step
    old, number = kept.chosen, cache.length // block
    assert old is not None and kept.bos_query is not None
    bos_query = kept.bos_query[layer]

    def choose() -> Source:
        current = _cut(kept.tokens, layer, config.num_global_tokens + number * block, block)
        pairs = zip(current, token, strict=True)
        full = Source(*(jnp.concatenate([x[..., :-1], y], axis=-1) for x, y in pairs))
        return _choose(full, bos_query, config, lsh_key)

    is_last = (cache.length + 1) % block == 0
    return lax.cond(is_last, choose, lambda: _cut(old, layer, number * step, step))


def _choose(tokens: Source, bos_query, config: LSGConfig, lsh_key) -> Source:
    """Representatives of whole blocks."""
    key, value, mask = sparsity.select(
        tokens.key.swapaxes(2, 3),
        tokens.value.swapaxes(2, 3),
        tokens.mask[:, 0],
        config=config,
        bos_query=bos_query,
        rotations=rotations_of(config, tokens.key, lsh_key),
    )
    return Source(key.swapaxes(2, 3), value.swapaxes(2, 3), mask)


def _attend(query: Float[Array, "B N H 1"], seen: list[Source]) -> Float[Array, "B N H 1"]:
    """One softmax over all that the token sees; joining the sources would copy them."""
    query = query * query.shape[2] ** -0.5
    product = {"preferred_element_type": jnp.float32}
    scores = [jnp.einsum("bnhq,bnhs->bnqs", query, s.key, **product) for s in seen]
    masks = [
        jnp.broadcast_to(s.mask[:, :, None], x.shape) for s, x in zip(seen, scores, strict=True)
    ]
    weights = sparsity.masked_softmax(
        jnp.concatenate(scores, axis=-1), jnp.concatenate(masks, axis=-1)
    )  # [B, N, 1, S]
    ends = np.cumsum([s.key.shape[-1] for s in seen])[:-1].tolist()
    contexts = [
        jnp.einsum("bnqs,bnhs->bnhq", w.astype(s.value.dtype), s.value, **product)
        for w, s in zip(jnp.split(weights, ends, axis=-1), seen, strict=True)
    ]
    return sum(contexts[1:], contexts[0])
