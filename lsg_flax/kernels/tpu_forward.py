"""The forward kernel of fused LSG attention on a TPU.

A step of the grid computes eight blocks of queries of one group of heads. In its first step a
group's keys, values and representatives are brought into the chip's memory (`tpu_select.fill`),
where all of them stay.

Axes: B batch, N heads, T tokens, Q queries of a block, W keys of a block's windows, G global
tokens, R representatives.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lsg_flax.kernels import tpu_select as select
from lsg_flax.kernels.dropout import kept_at
from lsg_flax.kernels.tpu_plan import GROUP, LANES, MIB, FusedArrays, FusedPlan, OnChip

HIDDEN = -1e30  # added to scores of keys that must not be seen; far from overflow
NOTHING = 1e30  # log-normaliser of a query that sees nothing: exp(score - it) is 0
LEAST = 1e-30
SPILLS = 4 * MIB  # of vector memory, for registers


class Step(NamedTuple):
    """A step of the grid: its row of the batch and the numbers of its heads, among those of all
    shards, and its first block of queries. (Inside of loops interpreters do not know it.)"""

    row: Array
    first: Array
    numbers: list[Array]


def this_step(plan: FusedPlan, inputs: FusedArrays) -> Step:
    """The step that is running."""
    head = pl.program_id(1) * plan.group_heads
    numbers = [inputs.numbers[head + i] for i in range(plan.group_heads)]
    row = pl.program_id(0) + inputs.seeds[2].astype(jnp.int32)
    return Step(row, pl.program_id(2) * GROUP, numbers)


def blocks_here(plan: FusedPlan, step: Step) -> Array:
    """Blocks of queries in a step."""
    return jnp.minimum(GROUP, plan.blocks - step.first)


def block_specs(plan: FusedPlan, arrays: FusedArrays) -> FusedArrays:
    """What of each array a step of the grid reads."""
    several = arrays.hidden.shape[1] > 1
    heads = plan.group_heads if several else 1

    def all_rows(x):
        return pl.BlockSpec((1, x.shape[1], LANES), lambda b, g, i: (b, 0, g))

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    return FusedArrays(
        seeds=scalars,
        numbers=scalars,
        query=pl.BlockSpec((1, GROUP * plan.block, LANES), lambda b, g, i: (b, i, g)),
        key=all_rows(arrays.key),
        value=all_rows(arrays.value),
        real=pl.BlockSpec((1, *arrays.real.shape[1:]), lambda b, g, i: (b, 0, 0)),
        hidden=pl.BlockSpec(
            (1, heads, GROUP, plan.window), lambda b, g, i: (b, g if several else 0, i, 0)
        ),
        shared=jax.tree.map(all_rows, arrays.shared),
        given=jax.tree.map(all_rows, arrays.given),
    )


def normaliser_spec(plan: FusedPlan) -> pl.BlockSpec:
    """What of the log-normalisers belongs to a step of the grid."""
    shape = (1, plan.group_heads, GROUP, plan.block)
    return pl.BlockSpec(shape, lambda b, g, i: (b, g, i, 0))


def on_chip(plan: FusedPlan, dtype) -> OnChip:
    """The arrays that stay on the chip."""
    rows = plan.scratch_blocks * plan.block, plan.scratch_blocks * plan.selecting.step
    tokens, chosen = (pltpu.VMEM((n, LANES), dtype) if n else None for n in rows)
    return OnChip(tokens, tokens, chosen, chosen)


def parameters(plan: FusedPlan, backward: bool) -> pltpu.CompilerParams:
    """What the compiler is told: steps of one group of heads follow each other."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=plan.memory(backward) + SPILLS,
    )


def scaled(plan: FusedPlan, query: Float[Array, "Q 128"], head: int) -> Float[Array, "Q 128"]:
    """A head's queries as scores take them, zeros in the lanes of other heads."""
    factor = jnp.where(select.of_head(plan, head), plan.width**-0.5, 0.0)
    return (query.astype(jnp.float32) * factor).astype(plan.dtype)


def dropped(
    plan: FusedPlan, step: Step, seeds, block, head: int, transposed: bool
) -> Float[Array, "..."]:
    """Dropout's factors of a block of queries of a head: by the place in the whole call, so that
    both passes draw the same."""
    shape = (plan.block, plan.window)
    shape, query, key = (shape[::-1], 1, 0) if transposed else (shape, 0, 1)
    first = (step.row * plan.all_heads + step.numbers[head]) * plan.blocks + block
    place = (first * plan.block + select.places(shape, query)) * plan.window
    place += select.places(shape, key)
    return kept_at(place.astype(jnp.uint32), seeds, plan.spec.dropout_rate)


def _kernel(plan: FusedPlan, tree, *refs) -> None:
    count = tree.num_leaves
    inputs: FusedArrays = jax.tree.unflatten(tree, refs[:count])
    outputs, memory = refs[count : count + 2], OnChip(*refs[count + 2 :])
    step = this_step(plan, inputs)

    @pl.when(step.first == 0)
    def _():
        select.fill(plan, step.numbers, inputs, memory)

    def one_block(place, _):
        _one_block(plan, step, place, inputs, memory, outputs)
        return 0

    jax.lax.fori_loop(0, blocks_here(plan, step), one_block, 0)


def _one_block(plan: FusedPlan, step: Step, place, inputs: FusedArrays, memory, outputs) -> None:
    """The context and log-normalisers of the block in that place of this step."""
    block = step.first + place
    key, value = select.gather(plan, block, inputs, memory)
    rows = select.part_of(plan.block, place)
    query = inputs.query[0, rows, :]
    contexts: list[Array] = []
    per_head = inputs.hidden.shape[1] > 1
    for head in range(plan.group_heads):
        scores = select.product(scaled(plan, query, head), key, (1, 1))  # [Q, W]
        scores = scores + inputs.hidden[0, head if per_head else 0, pl.ds(place, 1), :]
        if plan.spec.causal:
            scores = jnp.where(allowed(plan, transposed=False), scores, HIDDEN)
        # Half of it: exp(HIDDEN - top) is then 0 in a row that sees nothing, too.
        top = jnp.maximum(scores.max(axis=1, keepdims=True), HIDDEN / 2)
        weights = jnp.exp(scores - top)
        whole = weights.sum(axis=1, keepdims=True)  # [Q, 1]
        if plan.spec.dropout_rate:
            weights *= dropped(plan, step, inputs.seeds, block, head, transposed=False)
        context = select.product(weights.astype(plan.dtype), value, (1, 0))
        contexts.append(context / jnp.maximum(whole, LEAST))
        normaliser = jnp.where(whole > 0, top + jnp.log(jnp.maximum(whole, LEAST)), NOTHING)
        outputs[1][0, head, pl.ds(place, 1), :] = select.to_row(normaliser)
    outputs[0][0, rows, :] = select.join_heads(plan, contexts).astype(plan.dtype)


def allowed(plan: FusedPlan, transposed: bool):
    """Which keys a query may see by their places if it is causal: not those of its own block behind
    it."""
    shape = (plan.block, plan.window)
    shape, query, key = (shape[::-1], 1, 0) if transposed else (shape, 0, 1)
    query, key = select.places(shape, query), select.places(shape, key)
    return (key <= query + plan.block) | (key >= 2 * plan.block)


def forward(
    plan: FusedPlan, arrays: FusedArrays
) -> tuple[Float[Array, "B T D"], Float[Array, "B N _ Q"]]:
    """The context, and the log-normaliser of each query by blocks."""
    batch, length, width = arrays.query.shape
    leaves, tree = jax.tree.flatten(arrays)
    normalisers = (batch, plan.heads, plan.blocks, plan.block)
    specs = block_specs(plan, arrays)
    return pl.pallas_call(
        partial(_kernel, plan, tree),
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, width), plan.dtype),
            jax.ShapeDtypeStruct(normalisers, jnp.float32),
        ),
        grid=(batch, plan.heads // plan.group_heads, plan.steps),
        in_specs=jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
        out_specs=(specs.query, normaliser_spec(plan)),
        scratch_shapes=[x for x in on_chip(plan, plan.dtype) if x is not None],
        compiler_params=parameters(plan, backward=False),
        interpret=plan.interpret,
        name="lsg_forward",
    )(*leaves)
