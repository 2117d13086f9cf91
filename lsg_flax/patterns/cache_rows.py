"""The cache of Reformer, in which each row's tokens start at slot 0, because chunks are counted
from a row's first token; and how one more token attends to it.

`Cache.position` is the number of tokens of a row; the slots after them are free.

Axes: L layers, B batch, N heads, H head width, S keys, W keys of a block's windows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsg_flax.kernels import Source, pad
from lsg_flax.patterns.cache import Cache, LayerCache, attend_token
from lsg_flax.patterns.lsh import bucket_of, sort_by_bucket, unit_keys
from lsg_flax.patterns.pattern import LSH, Local, Runtime


def keep_rows(
    source: Source, slots: int, buckets: Int[Array, "B N rounds T"], first: Int[Array, "B"]
) -> LayerCache:
    """Makes the cache of a layer from a prompt whose mask is False after each row's tokens.

    Args:
        slots: number of slots, from `slots_for`.
        buckets: the buckets of the tokens; ignored for local attention, which has none.
        first: the number of tokens of a row from which on a new token sees only its window.
    """
    source, buckets = jax.tree.map(
        lambda x: pad(x[..., :slots], 0, max(slots - x.shape[-1], 0)), (source, buckets)
    )  # a prompt may be padded beyond the slots
    return LayerCache(source, buckets=buckets, first=first)


def windows_from(pattern: LSH, length: Int[Array, "B"], padded: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns the number of tokens of a row from which on a new token sees only its window instead
    of all tokens. As in transformers' LSHSelfAttention: after a prompt of `length` tokens that was
    hashed, which is one `padded` to more than a chunk, this is so at once; the first step after
    exactly one chunk hashes it."""
    chunk = pattern.chunk_length
    return jnp.where(padded > chunk, 0, chunk + (length == chunk)).astype(jnp.int32)


def write_rows(cache: Cache, new: LayerCache) -> Cache:
    """Returns the cache with one more token of each row."""

    def write(old, one):
        at = jax.vmap(lambda x, y, i: lax.dynamic_update_slice_in_dim(x, y, i, -1), (1, 1, 0), 1)
        return at(old, one, cache.position)

    layers = cache.layers
    layers = layers._replace(
        tokens=jax.tree.map(write, layers.tokens, new.tokens),
        buckets=write(layers.buckets, new.buckets),
    )
    return Cache(layers, cache.length + 1, cache.position + 1)


def _pick(cache: Cache, layer: Int[Array, ""], slots: Int[Array, "B N W"]) -> Source:
    """The cached keys of one layer in these slots of each row and head."""

    def of_head(x, slots):
        return x.at[layer, ..., slots].get(mode="clip")

    def pick(x):
        heads = jnp.broadcast_to(x, (*x.shape[:2], slots.shape[1], *x.shape[3:]))
        return jax.vmap(jax.vmap(of_head, (1, 0)), (1, 0))(heads, slots)

    key, value, mask = (pick(x) for x in cache.layers.tokens[:3])  # [B, N, W, H]
    return Source(key.swapaxes(2, 3), value.swapaxes(2, 3), mask)


def step_in_ring(
    pattern: Local,
    query: Float[Array, "B N H 1"],
    token: Source,
    cache: Cache,
    layer: Int[Array, ""],
) -> Float[Array, "B N H 1"]:
    """Returns the next token's context over its own window and the windows before it, as
    transformers' LocalSelfAttention of Reformer."""
    size, before = pattern.window_size, pattern.look_backward
    begin = jnp.maximum(cache.position // size - before, 0) * size
    slots = begin[:, None] + jnp.arange((before + 1) * size)[None]  # [B, W]
    slots = jnp.broadcast_to(slots[:, None], (*query.shape[:2], slots.shape[-1]))
    kept = _pick(cache, layer, slots)
    kept = kept._replace(mask=kept.mask & (slots < cache.position[:, None, None]))
    return attend_token(query, [kept, token], pattern.scale)


def step_by_buckets(
    pattern: LSH,
    query_key: Float[Array, "B N H 1"],
    token: Source,
    run: Runtime,
    cache: Cache,
    layer: Int[Array, ""],
) -> tuple[Float[Array, "B N H 1"], Int[Array, "B N rounds 1"]]:
    """Returns the next token's context and its buckets, as transformers' LSHSelfAttention: the
    token is sorted in among the row's tokens, and sees the chunks around its position in this
    order, which form a ring."""
    assert cache.layers.buckets is not None and cache.layers.first is not None
    chunk, before, rounds = pattern.chunk_length, pattern.chunks_before, pattern.num_hashes
    own = bucket_of(pattern, query_key, token.mask, run)  # [B, N, rounds, 1]
    kept = lax.dynamic_index_in_dim(cache.layers.buckets, layer, keepdims=False)
    slot = lax.broadcasted_iota(jnp.int32, (1, 1, 1, kept.shape[-1]), 3)
    last = cache.position[:, None, None, None]
    buckets = jnp.where(slot == last, own, kept)
    buckets = jnp.where(slot > last, jnp.int32(pattern.all_buckets), buckets)  # free: at the end
    place = ((buckets <= own) & (slot < last)).sum(axis=-1, keepdims=True, dtype=jnp.int32)
    width = (before + 1 + pattern.chunks_after) * chunk
    index = (place // chunk - before) * chunk + jnp.arange(width)[None, None, None]
    order, _ = sort_by_bucket(pattern, buckets)
    slots = jnp.take_along_axis(order, index % (last + 1), axis=-1)
    slots = slots.reshape(*slots.shape[:2], rounds * width)
    sorts = (cache.position >= cache.layers.first[layer])[:, None, None]
    few = jnp.arange(min(chunk + 1, kept.shape[-1]))
    few = jnp.broadcast_to(few[None, None], (*slots.shape[:2], len(few)))
    seen = []
    for places, used in ((slots, sorts), (few, ~sorts)):
        source = _pick(cache, layer, places)
        mask = source.mask & (places < last[..., 0]) & used
        seen.append(source._replace(key=unit_keys(source.key), mask=mask))
    context = attend_token(query_key, seen, 1.0)
    alone = ~jnp.concatenate([s.mask for s in seen], axis=-1).any(axis=-1)[..., None, None]
    return jnp.where(alone, token.value, context), own
