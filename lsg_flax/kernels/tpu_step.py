"""The current step of the grid, for both fused kernels: its blocks and heads, the inputs of its
scores, and dropout of its weights.

Axes: Q queries of a block, W keys of a block's windows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from lsg_flax.kernels import tpu_select as select
from lsg_flax.kernels import tpu_turn
from lsg_flax.kernels.dropout import kept_at
from lsg_flax.kernels.tpu_plan import GROUP, FusedArrays, FusedPlan

HIDDEN = -1e30  # added to scores of keys that must not be seen; far from overflow
NOTHING = 1e30  # log-normaliser of a query that sees nothing: exp(score - it) is 0
LEAST = 1e-30


class Step(NamedTuple):
    """A step of the grid: its row of the batch and the numbers of its heads, among those of all
    shards, and its first block of queries. (It is read outside loops, because interpreters do
    not know it inside them.)"""

    row: Array
    first: Array
    numbers: list[Array]


def this_step(plan: FusedPlan, inputs: FusedArrays) -> Step:
    """Returns the current step."""
    head = pl.program_id(1) * plan.group_heads
    numbers = [inputs.numbers[head + i] for i in range(plan.group_heads)]
    row = pl.program_id(0) + inputs.seeds[2].astype(jnp.int32)
    return Step(row, pl.program_id(2) * GROUP, numbers)


def blocks_here(plan: FusedPlan, step: Step) -> Array:
    """Returns the number of blocks of token queries in this step."""
    return jnp.minimum(GROUP, plan.blocks - step.first)


def scaled(plan: FusedPlan, query: Float[Array, "Q 128"], head: int) -> Float[Array, "Q 128"]:
    """Returns a head's scaled queries, with zeros in the lanes of other heads."""
    factor = jnp.where(select.of_head(plan, head), plan.scale, 0.0)
    return (query.astype(jnp.float32) * factor).astype(plan.dtype)


def turned(plan: FusedPlan, inputs: FusedArrays, query, block) -> Float[Array, "Q 128"]:
    """Returns a block's queries, rotated if there are rotary positions."""
    if inputs.turns is None:
        return query
    return tpu_turn.turn(plan, query, inputs.turns[0], block + plan.before)


def dropped(
    plan: FusedPlan, step: Step, seeds, block, head: int, transposed: bool
) -> Float[Array, "..."]:
    """Returns dropout's factors for a block of queries of a head. They depend on the position in
    the whole call, so that both passes get the same."""
    shape = (plan.block, plan.window)
    shape, query, key = (shape[::-1], 1, 0) if transposed else (shape, 0, 1)
    first = (step.row * plan.all_heads + step.numbers[head]) * plan.blocks + block
    place = (first * plan.block + select.places(shape, query)) * plan.window
    place += select.places(shape, key)
    return kept_at(place.astype(jnp.uint32), seeds, plan.spec.dropout_rate)


def allowed(plan: FusedPlan, block, transposed: bool):
    """Returns which keys a block's queries may see by position."""
    shape = (plan.block, plan.window)
    shape, query, key = (shape[::-1], 1, 0) if transposed else (shape, 0, 1)
    query, key = select.places(shape, query), select.places(shape, key)
    near, rule = plan.spec.near, plan.spec.rule
    seen = rule.allows(query + plan.near_before * plan.block, key)
    if near.window > 1:
        start = near.window - 1 - lax.rem(block, near.window)
        end = start + (near.before + 1 + near.after) * near.window
        seen &= (key >= start * plan.block) & (key < end * plan.block)
    return seen | (key >= plan.near)
