"""What decoding keeps between calls, and one more token's attention to it.

What a causal query sees does not depend on later tokens, so nothing kept is ever computed anew:
keys and values are written once, and the representatives of a block once it is full. Globals stand
in front of the token slots; they see no token and never change. All shapes are fixed: a cache has
slots for whole blocks, and slots without a token are masked.

Axes: L layers, B batch, N heads, H head width, T tokens, S keys, Q queries of a
block, W keys of a block's windows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsg_flax.checks import require
from lsg_flax.kernels import Source, masked_softmax, pad
from lsg_flax.patterns import sparsity
from lsg_flax.patterns.config import LSGConfig
from lsg_flax.patterns.local import unit
from lsg_flax.patterns.pattern import LSG, Local, Runtime
from lsg_flax.patterns.representatives import choose, first_query


class LayerCache(NamedTuple):
    """What one layer keeps; in `Cache` all arrays have a leading axis L.

    Attributes:
        tokens: the globals, then the slots; masks are [B, 1, S].
        chosen: the representatives of the slots, of full blocks right ones; None without a sparse
            part.
        bos_query: what "bos_pooling" weighs with.
        memory: keys and values of the encoder's states, for cross-attention.
        buckets, first: of Reformer (see `cache_rows.py`).
    """

    tokens: Source
    chosen: Source | None = None
    bos_query: Float[Array, "*L B N H"] | None = None
    memory: Source | None = None
    buckets: Int[Array, "*L B N _ S"] | None = None
    first: Int[Array, "*L B"] | None = None


class Cache(NamedTuple):
    """What a causal model keeps between calls: a pytree of arrays with fixed shapes.

    Attributes:
        layers: keys and values.
        length: slots in use, the same for every row (rows are padded on the left).
        position: the position id of the next token.
    """

    layers: LayerCache
    length: Int[Array, ""]
    position: Int[Array, "B"]

    @classmethod
    def of_prompt(
        cls,
        layers: LayerCache,
        mask: Bool[Array, "B T"],
        position_ids: Int[Array, "#B T"] | None = None,
    ) -> "Cache":
        """The first one; positions are counted on from that of the prompt's last token. What lies
        behind the last real token of all rows fills a bucket, and its slots are free."""
        ends = jnp.where(mask, jnp.arange(1, mask.shape[1] + 1)[None], 1)
        length = jnp.max(ends).astype(jnp.int32)
        position = length[None] if position_ids is None else position_ids[:, length - 1] + 1
        return cls(layers, length, jnp.broadcast_to(position, mask.shape[:1]).astype(jnp.int32))

    def take(self, rows: Int[Array, "*B _"]) -> "Cache":
        """The cache of these rows of the batch, in this order, some of them more than once
        perhaps; or of beams.

        Args:
            rows: [rows]; or [B, beams], for the beams of each text, which lie together, the ones
                that they go on from, counted from 0 in each text. Texts then do not meet, so that
                no device needs another's, and cross-attention's keys and values stay as they are,
                once per text.

        Raises:
            ValueError: for anything but whole numbers of these shapes.
        """
        rows = jnp.asarray(rows)
        if rows.ndim not in (1, 2) or not jnp.issubdtype(rows.dtype, jnp.integer):
            raise ValueError(
                f"rows must be whole numbers, [rows] or [texts, beams], got {rows.dtype} "
                f"{rows.shape}."
            )
        if rows.ndim == 1:
            layers = jax.tree.map(lambda x: jnp.take(x, rows, axis=1), self.layers)
            return self._replace(layers=layers, position=jnp.take(self.position, rows))
        own = self.layers._replace(memory=None)
        layers = jax.tree.map(lambda x: _of_beams(x, rows, 1), own)
        layers = layers._replace(memory=self.layers.memory)
        return self._replace(layers=layers, position=_of_beams(self.position, rows, 0))


def _of_beams(x: Array, parents: Int[Array, "B _"], axis: int) -> Array:
    """The axis of texts and their beams, each beam taken from one of its own text."""
    texts = x.reshape(*x.shape[:axis], len(parents), -1, *x.shape[axis + 1 :])
    pick = jax.vmap(partial(jnp.take, axis=axis, mode="clip"), in_axes=(axis, 0), out_axes=axis)
    return pick(texts, parents).reshape(*x.shape[:axis], parents.size, *x.shape[axis + 1 :])


def cut(source: Source, layer: Int[Array, ""], start: Int[Array, ""] | int, width: int) -> Source:
    """A run of one layer's keys: cutting it from all layers' saves a copy of that layer."""

    def run(x):
        run = lax.dynamic_slice_in_dim(x, start, width, axis=-1)
        return lax.dynamic_index_in_dim(run, layer, keepdims=False)

    return jax.tree.map(run, source)


def write(old: Source, new: Source, start: Int[Array, ""]) -> Source:
    """The keys with new ones from a place on."""

    def write(old, new):
        return lax.dynamic_update_slice_in_dim(old, new, start, axis=-1)

    return jax.tree.map(write, old, new)


def attend_token(
    query: Float[Array, "B N H 1"],
    seen: list[Source],
    scale: float | None = None,
    biases: list[Float[Array, "N _"]] | None = None,
) -> Float[Array, "B N H 1"]:
    """One softmax over all that a token sees; joining the sources would copy them. `biases` are
    added to the scores of each source."""
    query = query * (query.shape[2] ** -0.5 if scale is None else scale)
    product = {"preferred_element_type": jnp.float32}
    scores = [jnp.einsum("bnhq,bnhs->bnqs", query, s.key, **product) for s in seen]
    if biases is not None:
        scores = [x + bias[None, :, None] for x, bias in zip(scores, biases, strict=True)]
    masks = [
        jnp.broadcast_to(s.mask[:, :, None], x.shape) for s, x in zip(seen, scores, strict=True)
    ]
    weights = masked_softmax(
        jnp.concatenate(scores, axis=-1), jnp.concatenate(masks, axis=-1)
    )  # [B, N, 1, S]
    ends = np.cumsum([s.key.shape[-1] for s in seen])[:-1].tolist()
    contexts = [
        jnp.einsum("bnqs,bnhs->bnhq", w.astype(s.value.dtype), s.value, **product)
        for w, s in zip(jnp.split(weights, ends, axis=-1), seen, strict=True)
    ]
    return sum(contexts[1:], contexts[0]).astype(query.dtype)


def slots_for(length: int, config: LSGConfig | Local | None) -> int:
    """Slots of a cache for `length` tokens: with LSG attention whole blocks, two at least; with
    local attention whole windows, as many as a token sees at least.

    Raises:
        ValueError: for settings under which the uncached model does not run at every length.
    """
    if config is None:
        return length
    if isinstance(config, Local):
        require(
            config.causal,
            "a cache is for a causal model, and this one has causal=False: its tokens see later "
            "ones, so that nothing can be kept of them.",
        )
        return max(-(-length // config.window_size), config.windows_seen) * config.window_size
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


def keep_blocks(
    pattern: LSG, query: Float[Array, "B N H T"], source: Source, run: Runtime, slots: int
) -> LayerCache:
    """What a layer keeps of the prompt, globals behind it; see `patterns.prefill`."""
    config, split = pattern.config, pattern.split
    query, source = jax.tree.map(lambda x: jnp.roll(x, split, axis=-1), (query, source))
    fill = split + slots - query.shape[-1]
    query, tokens = jax.tree.map(lambda x: pad(x, 0, fill), (query, source))
    if not config.is_sparse:
        return LayerCache(tokens)
    query, own = jax.tree.map(lambda x: x[..., split:], (query, tokens))
    bos_query = first_query(config, query, own.mask)
    return LayerCache(tokens, choose(config, own, bos_query, run), bos_query)


def step_in_blocks(
    pattern: LSG,
    query: Float[Array, "B N H 1"],
    token: Source,
    run: Runtime,
    cache: Cache,
    layer: Int[Array, ""],
) -> tuple[Float[Array, "B N H 1"], LayerCache]:
    """The next token's context, and its key and value with the representatives of its block."""
    config, split, kept = pattern.config, pattern.split, cache.layers.tokens
    before = jnp.maximum(cache.length // config.block_size - 1, 0) * config.block_size
    local = cut(kept, layer, split + before, 2 * config.block_size)
    seen, new = [cut(kept, layer, 0, split), local, token], LayerCache(token)
    if config.is_sparse:
        seen.append(_left_window(config, cache, layer))
        new = LayerCache(token, _of_current_block(pattern, token, run, cache, layer))
    return attend_token(query, seen), new


def _left_window(config: LSGConfig, cache: Cache, layer: Int[Array, ""]) -> Source:
    """The last representatives of the blocks before the previous one."""
    chosen = cache.layers.chosen
    assert chosen is not None
    width = min(config.sparse_block_size, chosen.mask.shape[-1])
    end = (cache.length // config.block_size - 1) * config.sparse_step
    start = jnp.maximum(end - width, 0)
    window = cut(chosen, layer, start, width)
    return window._replace(mask=window.mask & (start + jnp.arange(width) < end)[None, None])


def _of_current_block(
    pattern: LSG, token: Source, run: Runtime, cache: Cache, layer: Int[Array, ""]
) -> Source:
    """Representatives of the block that the token is in: chosen with its last token, before that
    whatever is there, which no query sees."""
    kept, block, step = cache.layers, pattern.config.block_size, pattern.config.sparse_step
    old, number = kept.chosen, cache.length // block
    assert old is not None and kept.bos_query is not None
    bos_query = kept.bos_query[layer]

    def choose_anew() -> Source:
        current = cut(kept.tokens, layer, pattern.split + number * block, block)
        full = jax.tree.map(lambda x, y: jnp.concatenate([x[..., :-1], y], -1), current, token)
        return choose(pattern.config, full, bos_query, run)

    is_last = (cache.length + 1) % block == 0
    return lax.cond(is_last, choose_anew, lambda: cut(old, layer, number * step, step))


def step_locally(
    pattern: Local,
    query: Float[Array, "B N H 1"],
    token: Source,
    cache: Cache,
    layer: Int[Array, ""],
    bias: Float[Array, "N Q W"] | None,
) -> Float[Array, "B N H 1"]:
    """The next token's context: of all that is kept only the windows that it sees are read. Keys
    are kept as they were before they were rotated, so that each step turns them by their places
    among these windows."""
    size, before = pattern.window_size, pattern.look_backward * pattern.window_size
    begin = cache.length // size * size - before
    start = jnp.maximum(begin, 0)
    places, place = jnp.arange(before + size), cache.length - start
    kept = cut(cache.layers.tokens, layer, start, before + size)
    there = places < place
    if pattern.exact_windowsize:
        there &= places >= place - before
    kept = kept._replace(mask=kept.mask & there[None, None])
    if pattern.shared_qk:
        kept, token = (s._replace(key=unit(s.key, 2)) for s in (kept, token))
        alone = ~kept.mask.any(axis=-1, keepdims=True)
        token = token._replace(mask=token.mask & alone)
    if pattern.rotary is not None:
        turn = partial(pattern.rotary.rotate, centre=before)
        query = turn(query, 1, place, sign=1)
        kept = kept._replace(key=turn(kept.key, before + size, 0, sign=-1))
        token = token._replace(key=turn(token.key, 1, place, sign=-1))
    biases = None
    if bias is not None:
        row = lax.dynamic_index_in_dim(bias, cache.length % size, axis=1, keepdims=False)
        at = partial(lax.dynamic_slice_in_dim, pad(row, 0, before), axis=-1)
        biases = [at(start - begin, before + size), at(cache.length - begin, 1)]
    return attend_token(query, [kept, token], pattern.scale, biases)
