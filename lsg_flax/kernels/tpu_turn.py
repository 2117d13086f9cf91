"""Rotary positions inside the fused kernels: queries and keys are rotated on the chip, so that
rotated ones are never written to main memory.

Positions are those in the whole call, since scores depend only on the distance of query and key.
The rotation of a position is that of its block times that within the block, as complex numbers.

Axes: Q queries of a block, H head width.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lsg_flax.kernels.tpu_plan import LANES, FusedPlan


class Tables(NamedTuple):
    """Cosines and sines times the scale, [2, _, 128], of the positions in a block and of the blocks
    on the chip; the sines of a head's first half are negative."""

    places: Any
    blocks: Any


def tables(plan: FusedPlan) -> tuple[Tables, Tables] | None:
    """Returns the tables of queries and of keys."""
    turn = plan.spec.turn
    if turn is None:
        return None
    place = np.arange(plan.block)
    first = (np.arange(plan.scratch_blocks) - plan.before) * plan.block
    angles, growth = np.asarray(turn.angles), np.asarray(turn.growth)
    middle = plan.blocks * plan.block // 2  # the position where xpos scales by 1

    def table(places, sizes):
        exact = np.exp(sizes[:, None] * growth + 1j * places[:, None] * angles)
        half = np.stack([exact.real, exact.imag])  # [2, _, H / 2]
        sign = np.array([1.0, -1.0])[:, None, None]
        pairs = np.concatenate([sign * half, half], axis=-1)
        return jnp.asarray(np.tile(pairs, LANES // pairs.shape[-1]), jnp.float32)

    ahead = place + turn.ahead
    queries = Tables(table(ahead, ahead), table(first, first - middle))
    return queries, Tables(table(place, -place), table(first, middle - first))


def turn(
    plan: FusedPlan, x: Float[Array, "Q 128"], table: Tables, block, back: bool = False
) -> Float[Array, "Q 128"]:
    """Rotates the features of a block, or rotates their gradients back.

    Args:
        block: number of the block on the chip.
    """
    x, sign = x.astype(jnp.float32), -1.0 if back else 1.0
    of_block = [table.blocks[i, pl.ds(block, 1), :] for i in range(2)]
    cosine = table.places[0] * of_block[0] - table.places[1] * of_block[1]
    sine = table.places[0] * of_block[1] + table.places[1] * of_block[0]
    half = plan.width // 2
    first = (lax.broadcasted_iota(jnp.int32, x.shape, 1) & half) == 0
    other = jnp.where(first, pltpu.roll(x, LANES - half, 1), pltpu.roll(x, half, 1))
    return x * cosine + other * (sign * sine)
