"""The operations of a pattern: attention, prefill of a cache, one decoding step. Arrays have
features first: a model that projects straight to this layout needs no transposes, which are slow on
CPU. Shapes are not checked here.

Axes: B batch, N heads, H head width, T tokens, S keys, Q queries of a block, W keys of a block's
windows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsg_flax.kernels import Source, pad
from lsg_flax.patterns.cache import (
    Cache,
    LayerCache,
    attend_token,
    cut,
    keep_blocks,
    step_in_blocks,
    step_locally,
    write,
)
from lsg_flax.patterns.full import attend_fully
from lsg_flax.patterns.local import attend_locally
from lsg_flax.patterns.lsg import attend_by_blocks
from lsg_flax.patterns.lsh import attend_by_buckets
from lsg_flax.patterns.pattern import LSG, LSH, Full, Local, Pattern, Runtime

NO_CACHE = "LSH attention has no cache of this kind: decode without a cache."


def attention(
    pattern: Pattern,
    query: Float[Array, "B N H T"],
    source: Source,
    run: Runtime,
    bias: Float[Array, "N Q W"] | None = None,
) -> Float[Array, "B N H T"]:
    """Returns the context of every query; `bias` is added to the scores of every local window."""
    match pattern:
        case Full():
            return attend_fully(query, source, run, causal=pattern.causal)
        case LSG():
            return attend_by_blocks(pattern, query, source, run)
        case Local():
            return attend_locally(pattern, query, source, run, bias)
        case LSH():
            return attend_by_buckets(pattern, query, source, run)


def prefill(
    pattern: Pattern, query: Float[Array, "B N H T"], source: Source, run: Runtime, slots: int
) -> LayerCache:
    """Returns the cache of a layer after the prompt.

    Args:
        source: keys and values; the mask is False for padding. Slots after the prompt are free,
            whatever they hold.
        slots: number of slots, from `slots_for`.

    Raises:
        ValueError: for LSH attention, which has no such cache.
    """
    match pattern:
        case Full() | Local():
            return LayerCache(jax.tree.map(lambda x: pad(x, 0, slots - x.shape[-1]), source))
        case LSG():
            return keep_blocks(pattern, query, source, run, slots)
        case LSH():
            raise ValueError(NO_CACHE)


def step(
    pattern: Pattern,
    query: Float[Array, "B N H 1"],
    token: Source,
    run: Runtime,
    cache: Cache,
    layer: Int[Array, ""],
    *,
    bias: Float[Array, "N Q W"] | None = None,
) -> tuple[Float[Array, "B N H 1"], LayerCache]:
    """Computes the next token's causal attention, and what `extend` writes to the cache.

    Args:
        query: the token's query.
        token: the token's key and value, and a mask that says whether it is real. A token that is
            not real is seen neither by itself nor by others.
        cache: the cache of all layers.
        layer: the number of this layer.

    Returns:
        The context, as `attention` gives it for the last of `cache.length + 1` tokens (NaN if no
        slot is free), and the new entries of the cache.

    Raises:
        ValueError: for LSH attention, which has no such cache.
    """
    tokens, split = cache.layers.tokens, _split(pattern)
    slots = tokens.mask.shape[-1] - split
    match pattern:
        case Full():
            new = LayerCache(token)
            context = attend_token(query, [cut(tokens, layer, 0, slots), token])
        case LSG():
            context, new = step_in_blocks(pattern, query, token, run, cache, layer)
        case Local():
            new = LayerCache(token)
            context = step_locally(pattern, query, token, cache, layer, bias)
        case LSH():
            raise ValueError(NO_CACHE)
    return jnp.where(cache.length < slots, context, jnp.nan), new


def extend(pattern: Pattern, cache: Cache, new: LayerCache, position: Int[Array, "B"]) -> Cache:
    """Returns the cache with one more token: `new` is what `step` returned, stacked over layers,
    `position` the token's position."""
    layers = cache.layers
    layers = layers._replace(
        tokens=write(layers.tokens, new.tokens, _split(pattern) + cache.length)
    )
    if layers.chosen is not None and new.chosen is not None:
        assert isinstance(pattern, LSG)
        start = cache.length // pattern.config.block_size * pattern.config.sparse_step
        layers = layers._replace(chosen=write(layers.chosen, new.chosen, start))
    return Cache(layers, cache.length + 1, position + 1)


def _split(pattern: Pattern) -> int:
    return pattern.split if isinstance(pattern, LSG) else 0
