"""Searches for settings that fit: the nearest ones to a plan that does not, and the largest
batch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from lsg_flax.planning.settings import Plan, PlanSettings

Planner = Callable[[PlanSettings], Plan]


def batch_shards(settings: PlanSettings) -> int:
    """Returns the number of chips with different rows; the mesh of the settings must be
    complete."""
    return settings.mesh["data"] * settings.mesh["fsdp"]


def nearest_that_fits(
    refused: Plan, planner: Planner, *, max_compiles: int = 8
) -> tuple[Plan | None, list[Plan]]:
    """Changes the settings of a plan step by step until one fits.

    The steps, in this order: recompute more (remat dots, then full); shard the parameters (data
    becomes fsdp); fewer rows at once (more microbatches of the same batch, in inference a smaller
    batch); more chips along the sequence.

    Args:
        refused: a plan with `fits=False`.
        planner: makes a plan of settings, for example `plan.plan`.
        max_compiles: the largest number of plans to make.

    Returns:
        The plan that fits, or None; and all plans that were made, in order.
    """
    tried: list[Plan] = []
    last = refused
    while len(tried) < max_compiles and (settings := _one_farther(last)) is not None:
        last = planner(settings)
        tried.append(last)
        if last.fits:
            return last, tried
    return None, tried


def _one_farther(refused: Plan) -> PlanSettings | None:
    settings, mesh = refused.settings, refused.settings.mesh
    if settings.mode == "train":
        if settings.remat != "full":
            remat = "dots" if settings.remat == "none" else "full"
            return dataclasses.replace(settings, remat=remat)
        if mesh["data"] > 1:
            whole = mesh | {"data": 1, "fsdp": mesh["fsdp"] * mesh["data"]}
            return dataclasses.replace(settings, mesh=whole)
    return _fewer_rows(refused) or _longer_sequence(settings)


def _fewer_rows(refused: Plan) -> PlanSettings | None:
    """Reduces the rows at once by a power of two: by as much as the refusal says is needed, if the
    rows divide. None if a chip has a single row."""
    settings = refused.settings
    rows = settings.batch_size // settings.accumulate // batch_shards(settings)
    fixed = refused.memory.parameters + refused.memory.optimizer
    room = max((refused.capacity or 0) - fixed, 1)
    wanted = max(math.ceil(math.log2(max((refused.needed - fixed) / room, 1))), 1)
    factor = next((2**n for n in range(wanted, 0, -1) if rows % 2**n == 0), None)
    if factor is None:
        return None
    if settings.mode == "train":
        return dataclasses.replace(settings, accumulate=settings.accumulate * factor)
    return dataclasses.replace(settings, batch_size=settings.batch_size // factor)


def _longer_sequence(settings: PlanSettings) -> PlanSettings | None:
    """Doubles the chips along the sequence, and halves those along the batch."""
    mesh = settings.mesh
    axis = next((a for a in ("data", "fsdp") if mesh[a] % 2 == 0), None)
    if axis is None:
        return None
    mesh = mesh | {axis: mesh[axis] // 2, "sequence": 2 * mesh["sequence"]}
    return dataclasses.replace(settings, mesh=mesh)


def largest_batch(
    first: Plan, planner: Planner, *, max_compiles: int = 8
) -> tuple[Plan | None, list[Plan]]:
    """Finds the largest number of rows per chip that fits.

    Starting from a first plan, it finds a batch that fits and one that does not, and narrows the
    interval by linear interpolation of the memory that they need. That memory grows with the batch,
    except for choices of the compiler, so the limit holds for this compiler.

    Args:
        first: a plan of the settings.
        planner: makes a plan of settings, for example `plan.plan`.
        max_compiles: the largest number of plans to make.

    Returns:
        The plan of the largest batch that fits, None if none did; and all plans that were made, in
        order.

    Raises:
        ValueError: for a topology of unknown memory.
    """
    settings = first.settings
    if first.capacity is None:
        raise ValueError(
            f"the memory of {settings.topology} is unknown; give a topology of TPUs or GPUs."
        )
    tried: list[Plan] = []
    unit = batch_shards(settings) * settings.accumulate

    def at(rows: int) -> Plan:
        found = planner(dataclasses.replace(settings, batch_size=rows * unit))
        tried.append(found)
        return found

    low, high = (first, None) if first.fits else (None, first)

    def rows_of(p: Plan | None) -> int:
        return p.settings.batch_size // unit if p else 0

    while len(tried) < max_compiles and (high is None or rows_of(high) - rows_of(low) > 1):
        found = at(_guess(rows_of(low), low, rows_of(high), high))
        low, high = (found, high) if found.fits else (low, found)
    return low, tried


def _guess(low_rows: int, low: Plan | None, high_rows: int, high: Plan | None) -> int:
    """Returns the rows at which a line through the memory of two plans, or of one plan and of no
    rows, reaches the capacity."""
    known: Any = low or high
    fixed = known.memory.parameters + known.memory.optimizer
    ends = [(0, fixed)] + [
        (rows, p.needed) for rows, p in ((low_rows, low), (high_rows, high)) if p
    ]
    (start, first), (end, last) = ends[-2:]
    slope = max((last - first) / (end - start), 1.0)
    rows = int(start + (known.capacity - first) / slope)
    upper = high_rows - 1 if high else 4 * max(low_rows, 1)
    return min(max(rows, low_rows + 1), upper)
