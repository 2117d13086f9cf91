"""The cache of decoding: what it keeps between calls, and how one more token attends to it.

What a causal query sees does not depend on later tokens, so nothing in the cache is ever
recomputed: keys and values are written once, and the representatives of a block once it is full.
Globals come before the token slots; they see no token and never change. All shapes are fixed: a
cache has slots for whole blocks, and slots without a token are masked.

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
    """The cache of one layer; in `Cache` all arrays have a leading axis L.

    Attributes:
        tokens: keys and values of the globals, then of the slots; masks are [B, 1, S].
        chosen: the representatives of the slots, valid for full blocks only; None without a sparse
            part.
        bos_query: the query whose scores are the weights of "bos_pooling".
        memory: keys and values of the encoder's states, for cross-attention.
        buckets, first: only for Reformer (see `cache_rows.py`).
    """

    tokens: Source
    chosen: Source | None = None
    bos_query: Float[Array, "*L B N H"] | None = None
    memory: Source | None = None
    buckets: Int[Array, "*L B N _ S"] | None = None
    first: Int[Array, "*L B"] | None = None


class Cache(NamedTuple):
    """The cache of a causal model: a pytree of arrays with fixed shapes.

    Attributes:
        layers: keys and values of all layers.
        length: number of slots in use, the same for every row (rows are padded on the left).
        position: the position id of each row's next token.
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
        """Makes the cache of a prompt. The next position is that of the prompt's last token plus
        one. Columns after the last real token of all rows are padding to a bucket; their slots are
        free."""
        ends = jnp.where(mask, jnp.arange(1, mask.shape[1] + 1)[None], 1)
        length = jnp.max(ends).astype(jnp.int32)
        position = length[None] if position_ids is None else position_ids[:, length - 1] + 1
        return cls(layers, length, jnp.broadcast_to(position, mask.shape[:1]).astype(jnp.int32))

    def take(self, rows: Int[Array, "*B _"]) -> "Cache":
        """Selects rows of the batch, or the beams that a beam search continues.

        Args:
            rows: [rows], the rows to take, in this order; a row may occur more than once. Or
                [B, beams]: for each beam of a text the beam to continue from, counted from 0 within
                the text. The beams of a text are adjacent rows. Rows then never move between texts,
                so that no device needs data of another, and the keys and values of cross-attention
                are not changed: they are kept once per text.

        Raises:
            ValueError: if rows are not integers of one of these shapes.
        """
        rows = jnp.asarray(rows)
        if rows.ndim not in (1, 2) or not jnp.issubdtype(rows.dtype, jnp.integer):
            raise ValueError(
                f"rows must be integers, [rows] or [texts, beams], got {rows.dtype} {rows.shape}."
            )
        if rows.ndim == 1:
            layers = jax.tree.map(lambda x: jnp.take(x, rows, axis=1), self.layers)
            return self._replace(layers=layers, position=jnp.take(self.position, rows))
        own = self.layers._replace(memory=None)
        layers = jax.tree.map(lambda x: _of_beams(x, rows, 1), own)
        layers = layers._replace(memory=self.layers.memory)
        return self._replace(layers=layers, position=_of_beams(self.position, rows, 0))


def _of_beams(x: Array, parents: Int[Array, "B _"], axis: int) -> Array:
    """Selects, along an axis of texts and their beams, each beam's parent within its own text."""
    texts = x.reshape(*x.shape[:axis], len(parents), -1, *x.shape[axis + 1 :])
    pick = jax.vmap(partial(jnp.take, axis=axis, mode="clip"), in_axes=(axis, 0), out_axes=axis)
    return pick(texts, parents).reshape(*x.shape[:axis], parents.size, *x.shape[axis + 1 :])


def cut(source: Source, layer: Int[Array, ""], start: Int[Array, ""] | int, width: int) -> Source:
    """Slices a run of one layer's keys. Slicing the run first, from all layers, avoids a copy of
    the whole layer."""

    def run(x):
        run = lax.dynamic_slice_in_dim(x, start, width, axis=-1)
        return lax.dynamic_index_in_dim(run, layer, keepdims=False)

    return jax.tree.map(run, source)


def write(old: Source, new: Source, start: Int[Array, ""]) -> Source:
    """Writes new keys into the old ones from slot `start` on."""

    def write(old, new):
        return lax.dynamic_update_slice_in_dim(old, new, start, axis=-1)

    return jax.tree.map(write, old, new)


def attend_token(
    query: Float[Array, "B N H 1"],
    seen: list[Source],
    scale: float | None = None,
    biases: list[Float[Array, "N _"]] | None = None,
) -> Float[Array, "B N H 1"]:
    """Attends with one softmax over all sources that a token sees, without concatenating them,
    which would copy them. `biases` are added to the scores of each source."""
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
    """Returns the number of slots of a cache for `length` tokens: with LSG attention whole blocks,
    at least two; with local attention whole windows, at least as many as a token sees.

    Raises:
        ValueError: for settings under which the uncached model does not run at every length.
    """
    if config is None:
        return length
    if isinstance(config, Local):
        require(
            config.causal,
            "a cache needs a causal model, but this one has causal=False: its tokens see later "
            "ones, so nothing computed for them can be kept. Call it without a cache.",
        )
        return max(-(-length // config.window_size), config.windows_seen) * config.window_size
    block = config.block_size
    if length > 2 * block and not config.adaptive:
        raise ValueError(
            f"a cache of {length} tokens is over two blocks of {block}, and with adaptive=False "
            "longer sequences must be whole blocks, which a growing one is not: set adaptive=True."
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
    """Makes the cache of a layer from a prompt whose globals come after it; see
    `patterns.prefill`."""
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
    """Returns the next token's context, and what to write: its key and value, and the
    representatives of its block."""
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
    """The representatives of the token's block. They are chosen with the last token of the block;
    before that the old values stay, which no query sees."""
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
    """Returns the next token's context. Only the windows that the token sees are read from the
    cache. Keys are kept unrotated, so that each step rotates them by their positions in these
    windows."""
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
