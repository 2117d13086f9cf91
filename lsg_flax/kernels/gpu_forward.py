"""The forward kernel for GPUs: a program computes a tile of a block's queries of one head, tile by
tile over the keys that the block sees (online softmax). Also has the functions that all GPU kernels
share.

Axes: B batch, N heads, H head width, T tokens (queries), S keys.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsg_flax.kernels import triton
from lsg_flax.kernels.dropout import kept_at
from lsg_flax.kernels.gpu_plan import TiledArrays, TiledPlan, TiledWindow
from lsg_flax.kernels.spec import EVERYTHING, NEGATIVE, Source


class Pair(NamedTuple):
    """A tile of queries and one of keys.

    Attributes:
        block: the block of the queries.
        queries, keys: their indices in the arrays.
        real: which of the keys may be seen at all.
        query_axis: 0 if an array of the pair is [queries, keys], 1 if [keys, queries].
    """

    seen: TiledWindow
    block: Int[Array, ""]
    queries: Int[Array, "T"]
    keys: Int[Array, "S"]
    real: Bool[Array, "S"]
    query_axis: int

    @property
    def first_key(self) -> Int[Array, ""]:
        """The index of the window's first key."""
        return self.seen.window.offset + self.block * self.seen.window.stride

    def along_queries(self, x: Array) -> Array:
        return jnp.expand_dims(x, 1 - self.query_axis)

    def along_keys(self, x: Array) -> Array:
        return jnp.expand_dims(x, self.query_axis)

    def hide(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the scores, with NEGATIVE where a query does not see a key."""
        window = self.seen.window
        inside = self.keys - self.first_key
        visible = self.along_keys(self.real & (inside >= 0) & (inside < window.width))
        if window.rule != EVERYTHING:
            keys = self.along_keys(self.keys - window.lead)
            visible &= window.rule.allows(self.along_queries(self.queries), keys)
        return jnp.where(visible, scores, NEGATIVE)

    def kept(self, plan: TiledPlan, inputs: TiledArrays) -> Float[Array, "..."]:
        """Returns dropout's factors, those of the XLA implementation: they depend on the index
        among the scores of a step and part of the softmax."""
        spec, view = plan.spec, self.seen.view
        step, block = _divide(self.block, spec.blocks_per_step)
        head = inputs.rows[...] * plan.heads + inputs.heads[...]
        row = (head * spec.blocks_per_step + block) * spec.block
        query = (row + self.queries - self.block * spec.block) * self.seen.keys
        key = self.keys - self.first_key + self.seen.first
        place = (self.along_queries(query) + self.along_keys(key)).astype(jnp.uint32)
        seeds = [inputs.seeds[step, 2 * view + i] for i in range(2)]
        return kept_at(place, seeds, spec.dropout_rate)


def _divide(x: Int[Array, ""], number: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Returns quotient and remainder of non-negative numbers."""
    divisor = jnp.int32(number)
    return lax.div(x, divisor), lax.rem(x, divisor)


def count_from(first: Int[Array, ""] | int, size: int) -> Int[Array, "_"]:
    """Returns `size` consecutive numbers, from `first` on."""
    return first + lax.broadcasted_iota(jnp.int32, (size,), 0)


def query_tile(plan: TiledPlan, number: Int[Array, ""]) -> tuple[Array, Array, Array]:
    """Returns the block of a tile of queries, its indices, and which of them exist."""
    block, part = _divide(number, plan.tiles_of_block)
    inside = count_from(part * plan.tiles.queries, plan.tiles.queries)
    places = block * plan.spec.block + inside
    return block, places, (inside < plan.spec.block) & (places < plan.length)


def key_tile(source: Source, places: Int[Array, "S"]) -> tuple[Array, Array, Array]:
    """Returns keys [S, H], values, and which of them may be seen (none outside the source)."""
    exists = (places >= 0) & (places < source.mask.shape[-1])
    key, value, mask = (triton.read(x, places, exists) for x in source[:3])
    return key, value, mask != 0


def over_keys(plan: TiledPlan, inputs: TiledArrays, queries, function, total):
    """Applies `total = function(total, pair, key, value)` to each tile of keys that a tile of
    queries sees."""
    block, places, _ = queries
    for seen in plan.windows:
        window, size = seen.window, plan.keys_of(seen.window.width)

        def one_tile(number, total, seen=seen, window=window, size=size):
            first = window.offset + block * window.stride + number * size
            keys = count_from(first, size)
            key, value, real = key_tile(inputs.sources[window.source], keys)
            return function(total, Pair(seen, block, places, keys, real, 0), key, value)

        total = lax.fori_loop(0, -(-window.width // size), one_tile, total)
    return total


def input_parts(inputs: TiledArrays) -> TiledArrays:
    """Returns the parts of the inputs that a program gets: all tokens of its row and head."""

    def of_source(source: Source) -> Source:
        several = source.mask.shape[1] > 1
        mask = triton.part(
            (None, None, source.mask.shape[-1]), lambda i, n, b: (b, n if several else 0, 0)
        )
        return Source(of_head(source.key), of_head(source.value), mask)

    seeds = inputs.seeds
    return TiledArrays(
        rows=triton.part((None,), lambda i, n, b: (b,)),
        heads=triton.part((None,), lambda i, n, b: (n,)),
        seeds=None if seeds is None else triton.part(seeds.shape, lambda i, n, b: (0, 0)),
        query=of_head(inputs.query),
        sources=tuple(of_source(source) for source in inputs.sources),
    )


def of_head(x: Array | jax.ShapeDtypeStruct):
    """Returns the part of an array, [B, T, N, H] or [B, N, T], for a program's row and head."""
    if len(x.shape) == 3:
        return triton.part((None, None, x.shape[2]), lambda i, n, b: (b, n, 0))
    return triton.part((None, x.shape[1], None, x.shape[3]), lambda i, n, b: (b, 0, n, 0))


def _kernel(plan: TiledPlan, inputs: TiledArrays, outputs) -> None:
    queries = query_tile(plan, triton.program_id(0))
    _, places, exists = queries
    query = triton.read(inputs.query, places, exists)  # [T, H]

    def add(total, pair: Pair, key, value):
        top, whole, context = total
        scores = pair.hide(triton.product(query, key, (1, 1)))  # [T, S]
        new = jnp.maximum(top, scores.max(axis=1))
        weights, shrink = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
        whole = whole * shrink + weights.sum(axis=1)
        if plan.spec.dropout_rate:
            weights *= pair.kept(plan, inputs)
        part = triton.product(weights.astype(value.dtype), value, (1, 0))  # [T, H]
        return new, whole, context * shrink[:, None] + part

    size = places.shape[0]
    # Half the minimum: exp(NEGATIVE - top) is then 0 in a row that sees nothing too.
    start = (
        jnp.full((size,), NEGATIVE / 2, jnp.float32),
        jnp.zeros((size,), jnp.float32),
        jnp.zeros((size, plan.width), jnp.float32),
    )
    top, whole, context = over_keys(plan, inputs, queries, add, start)
    whole = jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
    triton.write(outputs[0], context / whole[:, None], places, exists)
    triton.write(outputs[1], top + jnp.log(whole), places, exists)


def forward(
    plan: TiledPlan, inputs: TiledArrays
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns the context, and the log-normaliser of each query."""
    batch, length, heads, _ = inputs.query.shape
    outputs = (
        jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    )
    parts = tuple(of_head(x) for x in outputs)
    grid = (plan.query_tiles, heads, batch)
    launch = launch_of(plan, "lsg_gpu_forward", grid, (2, plan.windows), (inputs, outputs))
    pair = (inputs, input_parts(inputs)), (outputs, parts)
    return triton.call(launch, partial(_kernel, plan), *pair, plan.interpret)


def launch_of(
    plan: TiledPlan,
    name: str,
    grid: tuple[int, int, int],
    work: tuple[int, list[TiledWindow] | tuple[TiledWindow, ...]],
    arrays,
) -> triton.Launch:
    """Returns the launch parameters of a kernel.

    Args:
        work: number of matrix products over the scores of these windows.
        arrays: the arrays that it reads or writes, each counted once.
    """
    products, windows = work
    scores = plan.length * sum(seen.window.width for seen in windows)
    flops = 2 * products * grid[1] * grid[2] * scores * plan.width
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    return triton.Launch(name, grid, plan.tiles.warps, 2, flops, moved)
