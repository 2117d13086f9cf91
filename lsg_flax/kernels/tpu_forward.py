"""The forward kernel of fused LSG attention on a TPU.

A step of the grid computes eight blocks of queries of one group of heads. The first step of a group
loads its keys, values and representatives into on-chip memory (`tpu_select.fill`), where they stay.

Axes: B batch, N heads, T tokens, Q queries of a block, W keys of a block's windows, G global
tokens, R representatives.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lsg_flax.kernels import tpu_globals
from lsg_flax.kernels import tpu_select as select
from lsg_flax.kernels.tpu_plan import GROUP, LANES, MIB, FusedArrays, FusedPlan, OnChip
from lsg_flax.kernels.tpu_step import (
    HIDDEN,
    LEAST,
    NOTHING,
    Step,
    allowed,
    blocks_here,
    dropped,
    scaled,
    this_step,
    turned,
)

SPILLS = 4 * MIB  # of vector memory, for spilled registers


def block_specs(plan: FusedPlan, arrays: FusedArrays) -> FusedArrays:
    """Returns which part of each array a step of the grid reads."""
    several, last = arrays.hidden.shape[1] > 1, -(-plan.blocks // GROUP) - 1
    heads = plan.group_heads if several else 1

    def all_rows(x, count: int | None = None):
        return pl.BlockSpec((1, count or x.shape[1], LANES), lambda b, g, i: (b, 0, g))

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    return FusedArrays(
        seeds=scalars,
        numbers=scalars,
        query=pl.BlockSpec((1, GROUP * plan.block, LANES), lambda b, g, i: (b, i, g)),
        key=all_rows(arrays.key, plan.key_rows),
        value=all_rows(arrays.value, plan.key_rows),
        real=pl.BlockSpec((1, *arrays.real.shape[1:]), lambda b, g, i: (b, 0, 0)),
        hidden=pl.BlockSpec(
            (1, heads, GROUP, plan.window),
            lambda b, g, i: (b, g if several else 0, jnp.minimum(i, last), 0),
        ),
        shared=jax.tree.map(all_rows, arrays.shared),
        given=jax.tree.map(all_rows, arrays.given),
        turns=jax.tree.map(lambda _: whole, arrays.turns),
    )


def normaliser_spec(plan: FusedPlan) -> pl.BlockSpec:
    """Returns which part of the log-normalisers belongs to a step of the grid."""
    shape = (1, plan.group_heads, GROUP, plan.block)
    return pl.BlockSpec(shape, lambda b, g, i: (b, g, i, 0))


def on_chip(plan: FusedPlan, dtype) -> OnChip:
    """The arrays that stay on the chip."""
    rows = plan.scratch_blocks * plan.block, plan.scratch_blocks * plan.selecting.step
    rows = rows[0] + plan.shared, rows[1]
    tokens, chosen = (pltpu.VMEM((n, LANES), dtype) if n else None for n in rows)
    return OnChip(tokens, tokens, chosen, chosen)


def parameters(plan: FusedPlan, backward: bool) -> pltpu.CompilerParams:
    """Returns the compiler parameters: steps of one group of heads run one after the other."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=plan.memory(backward) + SPILLS,
    )


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

    lax.fori_loop(0, blocks_here(plan, step), one_block, 0)
    tpu_globals.forward(plan, step, inputs, memory, outputs)


def _one_block(plan: FusedPlan, step: Step, place, inputs: FusedArrays, memory, outputs) -> None:
    """Computes context and log-normalisers of one block of this step."""
    block = step.first + place
    key, value = select.gather(plan, block, memory)
    rows = select.part_of(plan.block, place)
    query = turned(plan, inputs, inputs.query[0, rows, :], block)
    contexts: list[Array] = []
    per_head = inputs.hidden.shape[1] > 1
    for head in range(plan.group_heads):
        scores = select.product(scaled(plan, query, head), key, (1, 1))  # [Q, W]
        scores = scores + inputs.hidden[0, head if per_head else 0, pl.ds(place, 1), :]
        if plan.has_rule:
            scores = jnp.where(allowed(plan, block, transposed=False), scores, HIDDEN)
        # Half of it: exp(HIDDEN - top) is then 0 in a row that sees nothing too.
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


def forward(
    plan: FusedPlan, arrays: FusedArrays
) -> tuple[Float[Array, "B T D"], Float[Array, "B N _ Q"]]:
    """Returns the context, and the log-normaliser of each query by blocks."""
    batch, length, width = arrays.query.shape
    leaves, tree = jax.tree.flatten(arrays)
    normalisers = (batch, plan.heads, plan.blocks + plan.blocks_behind, plan.block)
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
