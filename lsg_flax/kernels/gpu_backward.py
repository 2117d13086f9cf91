"""The backward kernels for GPUs: one computes gradients of queries by tiles of queries, the other
those of keys and values by tiles of keys, over the queries that see them.

Axes: B batch, N heads, H head width, T tokens (queries), S keys.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsg_flax.kernels import triton
from lsg_flax.kernels.gpu_forward import (
    Pair,
    count_from,
    input_parts,
    key_tile,
    launch_of,
    of_head,
    over_keys,
    query_tile,
)
from lsg_flax.kernels.gpu_plan import PROGRAMS, TiledArrays, TiledPlan, TiledWindow
from lsg_flax.kernels.spec import Source


class Saved(NamedTuple):
    """Inputs of the backward pass; inside a kernel, references to the parts of one row and head.

    Attributes:
        gradient: gradient of the context.
        normaliser: logarithm of the normaliser.
        delta: the sum of context and gradient over the features, without the gradient of the
            normaliser.
    """

    gradient: Any  # [B, T, N, H]
    normaliser: Any  # [B, N, T]
    delta: Any  # [B, N, T]


class Gradient(NamedTuple):
    """The gradient of the scores, and the weights of the values."""

    scores: Array
    weights: Array


def _score_gradient(plan: TiledPlan, inputs, pair: Pair, operands, rows) -> Gradient:
    """Computes the gradient of the scores of a pair of tiles.

    Args:
        operands: two pairs of arrays [_, H], each in the order of the pair's axes: their products
            are the scores and the gradient of the weights.
        rows: normalisers and deltas of the queries.
    """
    normaliser, delta = (pair.along_queries(x) for x in rows)
    scores, of_weights = (triton.product(x, y, (1, 1)) for x, y in operands)
    weights = jnp.exp(pair.hide(scores) - normaliser)
    kept = weights
    if plan.spec.dropout_rate:
        factor = pair.kept(plan, inputs)
        kept, of_weights = weights * factor, of_weights * factor
    dtype = plan.dtype
    return Gradient((weights * (of_weights - delta)).astype(dtype), kept.astype(dtype))


def _read_queries(inputs: TiledArrays, saved: Saved, places, exists):
    """Reads queries and gradients of contexts, [T, H], and normalisers and deltas, [T]."""
    columns = (triton.read(x, places, exists) for x in (inputs.query, saved.gradient))
    return tuple(columns), tuple(triton.read(x, places, exists) for x in saved[1:])


def _query_kernel(plan: TiledPlan, arrays: tuple[TiledArrays, Saved], output) -> None:
    inputs, saved = arrays
    queries = query_tile(plan, triton.program_id(0))
    (query, gradient), rows = _read_queries(inputs, saved, *queries[1:])

    def add(total, pair: Pair, key, value):
        operands = (query, key), (gradient, value)
        found = _score_gradient(plan, inputs, pair, operands, rows)  # [T, S]
        return total + triton.product(found.scores, key, (1, 0))  # [T, H]

    start = jnp.zeros((plan.tiles.queries, plan.width), jnp.float32)
    triton.write(output, over_keys(plan, inputs, queries, add, start), *queries[1:])


def _blocks_that_see(
    plan: TiledPlan, seen: TiledWindow, first: Int[Array, ""], size: int
) -> tuple[Array | int, Array | int]:
    """Returns the first block of queries whose window has any of `size` keys from `first` on, and
    the block after the last one."""
    window = seen.window
    if not window.stride:
        return 0, plan.blocks
    # Shifted by whole strides, so that no quotient is negative.
    shift = -(-(window.width + max(window.offset, 0)) // window.stride) + 1
    past = first - window.offset + shift * window.stride
    low = lax.div(past - window.width, jnp.int32(window.stride)) + 1 - shift
    high = lax.div(past + size - 1, jnp.int32(window.stride)) + 1 - shift
    return jnp.clip(low, 0, plan.blocks), jnp.clip(high, 0, plan.blocks)


def _key_kernel(
    plan: TiledPlan, source: int, parts: int, arrays: tuple[TiledArrays, Saved], outputs
) -> None:
    inputs, saved = arrays
    (keys_of,) = inputs.sources
    size = plan.keys_of(keys_of.mask.shape[-1])
    program = triton.program_id(0)
    tile, part = lax.div(program, jnp.int32(parts)), lax.rem(program, jnp.int32(parts))
    keys = count_from(tile * size, size)
    key, value, real = key_tile(keys_of, keys)
    total = tuple(jnp.zeros((size, plan.width), jnp.float32) for _ in range(2))
    per_part = -(-plan.query_tiles // parts)
    for seen in plan.windows_of(source):

        def one_tile(number, total, seen=seen):
            block, places, exists = query_tile(plan, number)
            (query, gradient), rows = _read_queries(inputs, saved, places, exists)
            pair = Pair(seen, block, places, keys, real, 1)
            operands = (key, query), (value, gradient)
            found = _score_gradient(plan, inputs, pair, operands, rows)  # [S, T]
            both = (found.scores, query), (found.weights, gradient)
            return tuple(
                x + triton.product(y, z, (1, 0)) for x, (y, z) in zip(total, both, strict=True)
            )  # [S, H]

        low, high = (
            x * plan.tiles_of_block for x in _blocks_that_see(plan, seen, tile * size, size)
        )
        low = jnp.maximum(low, part * per_part)
        high = jnp.minimum(high, (part + 1) * per_part)
        total = lax.fori_loop(low, high, one_tile, total)
    for output, x in zip(outputs, total, strict=True):
        triton.write(output, x, keys, keys < keys_of.mask.shape[-1])


def _key_gradients(plan: TiledPlan, number: int, inputs: TiledArrays, saved: Saved) -> Source:
    """Computes the gradients of a source. If few keys are seen by all queries, the queries are
    split over several programs, whose results are summed afterwards."""
    source = inputs.sources[number]
    inputs = inputs._replace(sources=(source,))
    batch, count, heads, width = source.key.shape
    tiles, parts = -(-count // plan.keys_of(count)), 1
    if any(not seen.window.stride for seen in plan.windows_of(number)):
        parts = max(1, min(plan.query_tiles, PROGRAMS // (batch * heads * tiles)))
    dtype = source.key.dtype if parts == 1 else jnp.float32
    output = jax.ShapeDtypeStruct((parts, batch, count, heads, width), dtype)
    given = triton.part((None, None, count, None, width), lambda i, n, b: (i % parts, b, 0, n, 0))
    arrays = inputs, saved
    outputs = output, output
    work = 4, plan.windows_of(number)
    grid = (tiles * parts, heads, batch)
    launch = launch_of(plan, "lsg_gpu_keys", grid, work, (arrays, outputs))
    gradients = triton.call(
        launch,
        partial(_key_kernel, plan, number, parts),
        (arrays, (input_parts(inputs), _saved_parts(saved))),
        (outputs, (given, given)),
        plan.interpret,
    )
    of_key, of_value = (x.sum(axis=0).astype(source.key.dtype) for x in gradients)
    none: Any = None
    return Source(of_key, of_value, none)


def _saved_parts(saved: Saved) -> Saved:
    return Saved(*(of_head(x) for x in saved))


def backward(
    plan: TiledPlan, inputs: TiledArrays, saved: Saved
) -> tuple[Float[Array, "B T N H"], tuple[Source, ...]]:
    """Returns the gradients of queries, keys and values."""
    batch, _, heads, _ = inputs.query.shape
    output = jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype)
    arrays, grid = (inputs, saved), (plan.query_tiles, heads, batch)
    of_query = triton.call(
        launch_of(plan, "lsg_gpu_queries", grid, (3, plan.windows), (arrays, output)),
        partial(_query_kernel, plan),
        (arrays, (input_parts(inputs), _saved_parts(saved))),
        (output, of_head(output)),
        plan.interpret,
    )
    sources = range(len(inputs.sources))
    return of_query, tuple(_key_gradients(plan, i, inputs, saved) for i in sources)
