"""LSH attention over all pairs of tokens. Its cost is quadratic: it is for tests and for reading.

Axes: B batch, N heads, H head width, T tokens, S keys.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsg_flax.kernels import Source, masked_softmax
from lsg_flax.patterns.pattern import LSH


def attend_by_buckets_reference(
    pattern: LSH, query_key: Float[Array, "B N H T"], source: Source, buckets: Int[Array, "B N _ T"]
) -> Float[Array, "B N H T"]:
    """Returns the context of LSH attention (arXiv 2001.04451, section 2) without dropout, for
    tokens in these buckets.

    Merging rounds by their normalisers equals one softmax over the keys of all rounds, in which a
    key counts as often as it is seen.
    """
    length = query_key.shape[-1]
    times = jnp.ones((1, 1, length, length), jnp.int32)
    if length > pattern.chunk_length:
        times = times_seen(pattern, buckets)
    query, value = query_key.astype(jnp.float32), source.value.astype(jnp.float32)
    size = jnp.sqrt((query**2).mean(axis=2, keepdims=True) + 1e-6)
    key = query / size / query.shape[2] ** 0.5
    scores = jnp.einsum("bnht,bnhs->bnts", query, key) + jnp.log(jnp.maximum(times, 1))
    place = jnp.arange(length)
    past = (place[None] <= place[:, None]) | (not pattern.causal)
    others = ((place[None] != place[:, None]) & past)[None, None]
    seen = (times > 0) & source.mask[:, :, None] & others
    itself = jnp.eye(length, dtype=bool)[None, None] & source.mask[:, :, None]
    seen |= itself & ~seen.any(axis=-1, keepdims=True)
    context = jnp.einsum("bnts,bnhs->bnht", masked_softmax(scores, seen), value)
    return context.astype(query_key.dtype)


def times_seen(pattern: LSH, buckets: Int[Array, "B N _ T"]) -> Int[Array, "B N T S"]:
    """Returns how often each token sees each other token in all rounds together."""
    length, chunk = buckets.shape[-1], pattern.chunk_length
    last = buckets.max() + 1
    filled = jnp.pad(buckets, [(0, 0)] * 3 + [(0, -length % chunk)], constant_values=0)
    filled = jnp.where(jnp.arange(filled.shape[-1]) < length, filled, last)
    place = jnp.argsort(jnp.argsort(filled, axis=-1, stable=True), axis=-1)  # in its round
    chunks = filled.shape[-1] // chunk
    first = chunks * jnp.arange(pattern.num_hashes)[None, None, :, None]
    of = (place // chunk + first)[..., :length]  # the chunk of the ring, [B, N, rounds, T]
    ring = chunks * pattern.num_hashes
    apart = (of[:, :, None, None] - of[..., None, None]) % ring  # [B, N, rounds, T, rounds, T]
    times = jnp.zeros(apart.shape, jnp.int32)
    for step in range(-pattern.chunks_before, pattern.chunks_after + 1):
        times += apart == (step % ring if abs(step) < ring else 0)
    return times.sum(axis=(2, 4))
