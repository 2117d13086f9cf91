"""The backward kernel of fused LSG attention on a TPU: all gradients in one pass.

Scores are transposed here, [keys, queries], so that log-normalisers are along the lanes. No mask is
needed: keys that no query sees are zeros on the chip, so they add nothing to the gradients of
queries, and their own gradients are dropped at the end.

Axes: B batch, N heads, T tokens, Q queries of a block, W keys of a block's windows, G global
tokens, R representatives.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lsg_flax.kernels import tpu_forward, tpu_globals, tpu_step, tpu_turn
from lsg_flax.kernels import tpu_select as select
from lsg_flax.kernels.tpu_plan import GROUP, FusedArrays, FusedPlan, OnChip


class Results(NamedTuple):
    """References to the results of the forward pass, and to the gradient of its context."""

    context: Any  # [B, T, D]
    gradient: Any  # [B, T, D]
    normaliser: Any  # [B, N, T / Q, Q]


class Gradients(NamedTuple):
    """The gradients; inside the kernel they are references."""

    query: Any
    key: Any
    value: Any
    shared: tuple[Any, Any] | None
    given: tuple[Any, Any] | None


class Scratch(NamedTuple):
    """References to arrays that stay on the chip: the operands, their gradients, and the results of
    `select.choice`."""

    memory: OnChip
    sums: OnChip
    choices: Any


def _kernel(plan: FusedPlan, trees, *refs) -> None:
    parts, first = [], 0
    for tree in trees:
        parts.append(jax.tree.unflatten(tree, refs[first : first + tree.num_leaves]))
        first += tree.num_leaves
    inputs, results, gradients, scratch = parts
    step = tpu_step.this_step(plan, inputs)

    @pl.when(step.first == 0)
    def _():
        select.fill(plan, step.numbers, inputs, scratch.memory, scratch.choices)
        for array in jax.tree.leaves(scratch.sums):
            array[...] = jnp.zeros(array.shape, jnp.float32)

    def one_block(place, _):
        _one_block(plan, step, place, inputs, results, gradients, scratch)
        return 0

    lax.fori_loop(0, tpu_step.blocks_here(plan, step), one_block, 0)
    tpu_globals.backward(plan, step, inputs, results, gradients.query, scratch)

    @pl.when(step.first == (plan.steps - 1) * GROUP)
    def _():
        _finish(plan, inputs, gradients, scratch)


def _one_block(plan, step, place, inputs, results, gradients, scratch) -> None:
    """Computes the gradients of one block of this step, and adds those of its keys."""
    block = step.first + place
    key, value = select.gather(plan, block, scratch.memory)
    rows = select.part_of(plan.block, place)
    query = tpu_step.turned(plan, inputs, inputs.query[0, rows, :], block)
    gradient = results.gradient[0, rows, :]
    both = gradient.astype(jnp.float32) * results.context[0, rows, :].astype(jnp.float32)
    of_queries: list[Array] = []
    of_keys: list[Array] = []  # of keys and values, [W, 128]
    for head in range(plan.group_heads):
        mine = select.of_head(plan, head)
        own_query = tpu_step.scaled(plan, query, head)
        own_gradient = jnp.where(mine, gradient, 0).astype(plan.dtype)
        delta = select.to_row(jnp.where(mine, both, 0.0).sum(axis=1, keepdims=True))  # [1, Q]
        scores = select.product(key, own_query, (1, 1))  # [W, Q]
        normaliser = results.normaliser[0, head, pl.ds(place, 1), :]
        weights = jnp.exp(jnp.minimum(scores - normaliser, 0.0))
        if plan.has_rule:
            weights = jnp.where(tpu_step.allowed(plan, block, transposed=True), weights, 0.0)
        of_weights = select.product(value, own_gradient, (1, 1))
        kept = weights
        if plan.spec.dropout_rate:
            factor = tpu_step.dropped(plan, step, inputs.seeds, block, head, transposed=True)
            kept, of_weights = weights * factor, of_weights * factor
        of_scores = (weights * (of_weights - delta)).astype(plan.dtype)
        parts = (
            select.product(of_scores, own_query, (1, 0)),  # [W, 128]
            select.product(kept.astype(plan.dtype), own_gradient, (1, 0)),
        )
        of_queries.append(select.product(of_scores, key, (0, 0)))  # [Q, 128]
        of_keys = [x + y for x, y in zip(of_keys, parts, strict=True)] if head else list(parts)
    of_query = select.join_heads(plan, of_queries) * plan.scale
    if inputs.turns is not None:
        of_query = tpu_turn.turn(plan, of_query, inputs.turns[0], block + plan.before, back=True)
    gradients.query[0, rows, :] = of_query.astype(plan.dtype)
    _add(plan, block, of_keys, scratch)


def _add(plan: FusedPlan, block, parts: list[Array], scratch: Scratch) -> None:
    """Adds gradients of a block's keys to the rows that they were read from."""
    first = 0
    for which, start, count in select.seen(plan, block):
        for i, part in enumerate(parts):
            scratch.sums[2 * which + i][pl.ds(start, count), :] += part[first : first + count]
        first += count


def _finish(plan: FusedPlan, inputs, gradients: Gradients, scratch: Scratch) -> None:
    """Writes the gradients of keys and values, including those of their representatives."""
    sums, step = scratch.sums, plan.selecting.step
    shared = slice(plan.shared_row, plan.shared_row + plan.shared)
    if gradients.shared is not None:
        for ref, total in zip(gradients.shared, sums[:2], strict=True):
            ref[0] = total[shared, :].astype(plan.dtype)
    for block, first, count in select.blocks_behind(plan):
        real = select.to_column(inputs.real[0, block : block + 1, :])[:count]
        there = plan.shared_row + first - plan.blocks * plan.block
        for ref, total in zip((gradients.key, gradients.value), sums[:2], strict=True):
            own = jnp.where(real > 0, total[there : there + count, :], 0.0)
            ref[0, first : first + count, :] = own.astype(plan.dtype)

    def one_block(block, _):
        row = inputs.real[0, pl.ds(block, 1), :]
        real, here = select.to_column(row), select.part_of(plan.block, block)
        there = select.part_of(plan.block, block, plan.first_key_block)
        totals, chosen = [sums.keys[there, :], sums.values[there, :]], []
        if inputs.turns is not None:
            place = block + plan.first_key_block
            totals[0] = tpu_turn.turn(plan, totals[0], inputs.turns[1], place, back=True)
        if step:
            there = select.part_of(step, block, plan.first_key_block)
            chosen = [sums.chosen_keys[there, :], sums.chosen_values[there, :]]
        if gradients.given is not None:
            for ref, x in zip(gradients.given, chosen, strict=True):
                ref[0, select.part_of(step, block), :] = x.astype(plan.dtype)
        elif step:
            for head in range(plan.group_heads):
                place = block * plan.group_heads + head
                matrix = select.one_hot(plan, scratch.choices[pl.ds(place, 1), :], plan.dtype)
                weight = select.per_representative(plan, matrix, row)
                for i, x in enumerate(chosen):
                    part = select.exact_product(matrix, (x * weight).astype(plan.dtype), (0, 0))
                    totals[i] += jnp.where(select.of_head(plan, head), part, 0.0)
        for ref, total in zip((gradients.key, gradients.value), totals, strict=True):
            ref[0, here, :] = jnp.where(real > 0, total, 0.0).astype(plan.dtype)
        return 0

    lax.fori_loop(0, plan.key_blocks, one_block, 0)


def backward(
    plan: FusedPlan,
    arrays: FusedArrays,
    results: tuple[Float[Array, "B T D"], Float[Array, "B N _ Q"]],
    gradient: Float[Array, "B T D"],
) -> Gradients:
    """Returns the gradients of queries, keys and values."""
    context, normaliser = results
    specs = tpu_forward.block_specs(plan, arrays)
    given = Results(context, gradient, normaliser)
    given_specs = Results(specs.query, specs.query, tpu_forward.normaliser_spec(plan))
    wanted = Gradients(arrays.query, arrays.key, arrays.value, arrays.shared, arrays.given)
    wanted_specs = Gradients(specs.query, specs.key, specs.value, specs.shared, specs.given)
    scratch = _scratch(plan)
    trees = tuple(jax.tree.structure(x) for x in (arrays, given, wanted, scratch))
    outputs = pl.pallas_call(
        partial(_kernel, plan, trees),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(wanted)],
        grid=(context.shape[0], plan.heads // plan.group_heads, plan.steps),
        in_specs=jax.tree.leaves((specs, given_specs)),
        out_specs=jax.tree.leaves(wanted_specs),
        scratch_shapes=jax.tree.leaves(scratch),
        compiler_params=tpu_forward.parameters(plan, backward=True),
        interpret=plan.interpret,
        name="lsg_backward",
    )(*jax.tree.leaves((arrays, given)))
    return jax.tree.unflatten(trees[2], outputs)


def _scratch(plan: FusedPlan) -> Scratch:
    inside = plan.selecting.step and plan.selecting.kind != "given"
    rows = plan.key_blocks * plan.group_heads
    return Scratch(
        tpu_forward.on_chip(plan, plan.dtype),
        tpu_forward.on_chip(plan, jnp.float32),
        pltpu.VMEM((rows, plan.block), jnp.int32) if inside else None,
    )
