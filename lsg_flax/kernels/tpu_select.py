"""Selection inside the fused kernels: loads the keys of a group of heads into on-chip memory, and
computes their representatives, chosen by counting and taken by one-hot products.

A register has sublanes and lanes, and a "row" here is one number per token along the lanes, a
"column" one along the sublanes.

Axes: Q queries of a block (or as many tokens), R representatives.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from lsg_flax.kernels import tpu_turn
from lsg_flax.kernels.tpu_plan import LANES, FusedArrays, FusedPlan, OnChip, tile

EXACT = lax.Precision.HIGHEST


def places(shape: tuple[int, ...], axis: int) -> Int[Array, "..."]:
    """Returns 0, 1, 2, ... along an axis."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def to_row(column: Float[Array, "Q 1"]) -> Float[Array, "1 Q"]:
    """Turns a column into a row along the lanes; exact, since only zeros are added."""
    size = column.shape[0]
    diagonal = places((size, size), 0) == places((size, size), 1)
    return jnp.where(diagonal, column, 0.0).sum(axis=0, keepdims=True)


def to_column(row: Float[Array, "1 Q"]) -> Float[Array, "Q 1"]:
    """Turns a row into a column along the sublanes."""
    size = row.shape[1]
    diagonal = places((size, size), 0) == places((size, size), 1)
    return jnp.where(diagonal, row, 0.0).sum(axis=1, keepdims=True)


def of_head(plan: FusedPlan, head: int):
    """Returns which lanes belong to one head of a group, [1, 128]."""
    lane = places((1, LANES), 1)
    return (lane >= head * plan.width) & (lane < (head + 1) * plan.width)


def join_heads(plan: FusedPlan, parts: list[Float[Array, "_ 128"]]) -> Float[Array, "_ 128"]:
    """Joins arrays of heads: takes from each its own lanes."""
    total = parts[0]
    for head in range(1, plan.group_heads):
        total = jnp.where(of_head(plan, head), parts[head], total)
    return total


def choice(
    plan: FusedPlan, key: Float[Array, "Q 128"], real: Float[Array, "Q 1"], head: int, number
) -> Int[Array, "1 Q"]:
    """Returns the number of the representative in its block that a token is, or is part of; -1 for
    none.

    Args:
        number: the head's number among all heads.
    """
    sparse, size = plan.selecting, plan.block
    token = places((1, size), 1)
    factor = size // sparse.step
    match sparse.kind:
        case "pooling":
            return _over(token, factor)
        case "stride":
            mine = _modulo(token, factor) == number % factor
            return jnp.where(mine, _over(token, factor), -1)
        case "block_stride":
            place = token - (number % factor) * sparse.step
            return jnp.where((place >= 0) & (place < sparse.step), place, -1)
    exact = key.astype(jnp.float32)
    squares = jnp.where(of_head(plan, head), exact * exact, 0.0).sum(axis=1, keepdims=True)
    column = jnp.where(real > 0, squares, -1.0)  # padding comes last
    row = to_row(column)
    other = places((size, size), 0)
    before = (column > row) | ((column == row) & (other < token))
    if sparse.chunk < size:
        before &= _over(other, sparse.chunk) == _over(token, sparse.chunk)
    rank = jnp.where(before, 1.0, 0.0).sum(axis=0, keepdims=True).astype(jnp.int32)
    kept = sparse.chunk // factor
    place = _over(token, sparse.chunk) * kept + kept - 1 - rank  # rising, as in the reference
    return jnp.where(rank < kept, place, -1)


def one_hot(plan: FusedPlan, chosen: Int[Array, "1 Q"], dtype) -> Float[Array, "R Q"]:
    """Returns 1 where a token is (a part of) a representative, else 0."""
    step = plan.selecting.step
    return jnp.where(places((step, plan.block), 0) == chosen, 1.0, 0.0).astype(dtype)


def per_representative(
    plan: FusedPlan, matrix: Float[Array, "R Q"], real: Float[Array, "1 Q"]
) -> Float[Array, "R 1"] | float:
    """Returns the factor of each sum: 1 over its number of real tokens if they are pooled."""
    if plan.selecting.kind != "pooling":
        return 1.0
    count = (matrix.astype(jnp.float32) * real).sum(axis=1, keepdims=True)
    return 1.0 / (count + 1e-6)


def product(x, y, contract: tuple[int, int], precision=None):
    """Returns a matrix product over one axis of each operand, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def exact_product(x, y, contract: tuple[int, int]):
    """Returns a product with a one-hot matrix, which is exact."""
    return product(x, y, contract, EXACT if x.dtype == jnp.float32 else None)


def clear(plan: FusedPlan, memory: OnChip) -> None:
    """Writes zeros to the rows in front of the tokens and behind them, where there are none."""
    for array, rows in zip(memory, _rows(plan), strict=True):
        for first, count in ((0, plan.before), (plan.before + plan.blocks, plan.after)):
            if count and not plan.extended and array is not None:
                zeros = jnp.zeros((count * rows, LANES), array.dtype)
                array[first * rows : (first + count) * rows, :] = zeros


def _rows(plan: FusedPlan) -> tuple[int, int, int, int]:
    return (plan.block, plan.block, plan.selecting.step, plan.selecting.step)


def part_of(rows: int, block, before: int = 0):
    """Returns the slice of a block's rows, `before` blocks further on."""
    return pl.ds(pl.multiple_of((block + before) * rows, rows), rows)


def fill(plan: FusedPlan, numbers, inputs: FusedArrays, memory: OnChip, choices=None) -> None:
    """Loads keys and values into the chip's memory, and computes their representatives there.
    Hidden keys become zeros, and so do the rows in front of the tokens and behind them.

    Args:
        numbers: numbers of the heads of this group.
        choices: where to store the results of `choice` for the backward pass, if at all.
    """
    clear(plan, memory)
    _fill_shared(plan, inputs, memory)
    step = plan.selecting.step

    def one_block(block, _):
        row = inputs.real[0, pl.ds(block, 1), :]
        real, here = to_column(row), part_of(plan.block, block)
        key, value = (
            jnp.where(real > 0, ref[0, here, :], 0).astype(plan.dtype)
            for ref in (inputs.key, inputs.value)
        )
        if inputs.turns is not None:
            place = block + plan.first_key_block
            key = tpu_turn.turn(plan, key, inputs.turns[1], place).astype(plan.dtype)
        there = part_of(plan.block, block, plan.first_key_block)
        memory.keys[there, :], memory.values[there, :] = key, value
        pairs = ((memory.chosen_keys, key), (memory.chosen_values, value))
        if inputs.given is not None:
            here, there = part_of(step, block), part_of(step, block, plan.first_key_block)
            for (array, _x), given in zip(pairs, inputs.given, strict=True):
                array[there, :] = given[0, here, :]
        elif step:
            _choose(plan, block, (row, real), numbers, pairs, choices)
        return 0

    lax.fori_loop(0, plan.key_blocks, one_block, 0)


def _fill_shared(plan: FusedPlan, inputs: FusedArrays, memory: OnChip) -> None:
    """Writes the shared keys and values behind those of tokens."""
    for array, ref, i in ((memory.keys, inputs.key, 0), (memory.values, inputs.value, 1)):
        if inputs.shared is not None:
            array[plan.shared_row : plan.shared_row + plan.shared, :] = inputs.shared[i][0]
        for block, first, count in blocks_behind(plan):
            rows = ref[0, first : first + count, :]
            real = to_column(inputs.real[0, block : block + 1, :])[:count]
            there = plan.shared_row + first - plan.blocks * plan.block
            # Rows behind the last key may contain anything; they are not real.
            array[there : there + count, :] = jnp.where(real > 0, rows, 0).astype(plan.dtype)


def blocks_behind(plan: FusedPlan) -> list[tuple[int, int, int]]:
    """Returns the blocks of globals behind the tokens: their numbers, their first rows among the
    keys that a step reads, and their numbers of rows."""
    if not plan.behind:
        return []
    numbers = range(plan.blocks, plan.blocks + plan.blocks_behind)
    return [(n, n * plan.block, min(plan.block, plan.key_rows - n * plan.block)) for n in numbers]


def _choose(plan: FusedPlan, block, real, numbers, pairs, choices) -> None:
    """Writes the representatives of a block."""
    there = part_of(plan.selecting.step, block, plan.first_key_block)
    taken: tuple[list[Array], list[Array]] = ([], [])
    for head, number in enumerate(numbers):
        chosen = choice(plan, pairs[0][1], real[1], head, number)
        if choices is not None:
            choices[pl.ds(block * plan.group_heads + head, 1), :] = chosen
        matrix = one_hot(plan, chosen, plan.dtype)
        weight = per_representative(plan, matrix, real[0])
        for parts, (_, x) in zip(taken, pairs, strict=True):
            parts.append(exact_product(matrix, x, (1, 0)) * weight)
    for parts, (array, _) in zip(taken, pairs, strict=True):
        array[there, :] = join_heads(plan, parts).astype(plan.dtype)


def seen(plan: FusedPlan, block) -> list[tuple[int, Array | int, int]]:
    """Returns where the keys of a block of queries are stored on the chip: among the tokens (0) or
    the representatives (1), from which row on, and in how many rows."""
    size, sparse = plan.block, plan.selecting
    nearest = pl.multiple_of((block + plan.before - plan.near_before) * size, size)
    parts: list[tuple[int, Array | int, int]] = [(0, nearest, plan.near)]
    if sparse.step:
        first = (block + plan.before) * sparse.step
        rows = tile(plan.dtype)
        left = pl.multiple_of(first - sparse.step - sparse.width, rows)
        parts.append((1, left, sparse.width))
        if not plan.spec.causal:
            parts.append((1, pl.multiple_of(first + sparse.right, rows), sparse.width))
    if plan.shared:
        parts.append((0, plan.shared_row, plan.shared))
    return parts


def gather(plan: FusedPlan, block, memory: OnChip):
    """Returns all keys and all values that a block of queries sees, [W, 128] each."""
    gathered = []
    for i in range(2):
        parts = [memory[2 * which + i][pl.ds(a, n), :] for which, a, n in seen(plan, block)]
        gathered.append(jnp.concatenate(parts, axis=0))
    return gathered


def _over(x, number: int):
    """Returns x // number for a power of two (Q is one, and so are its divisors)."""
    return lax.shift_right_logical(x, jnp.int32(number.bit_length() - 1))


def _modulo(x, number: int):
    return x & (number - 1)
