"""Kernels over the devices of a mesh: XLA spreads arrays by itself, but cannot cut a kernel, so
each device runs it for its own rows of the batch and its own heads."""

import math
from collections.abc import Callable
from typing import Any

import jax

from lsg_flax.kernels.spec import Axes


def axes_that_divide(axes: Axes, rows: int, heads: int, group: int = 1) -> Axes:
    """Of the axes that rows and heads may lie along those of the ambient mesh that XLA spreads
    arrays over; none where rows, or groups of so many heads, do not divide among their devices."""
    mesh = jax.sharding.get_abstract_mesh()
    used = {name for name in mesh.auto_axes if mesh.shape[name] > 1}
    of_rows, of_heads = (tuple(name for name in names if name in used) for names in axes)
    fits = rows % devices_along(of_rows) == 0, heads % (devices_along(of_heads) * group) == 0
    return of_rows if fits[0] else (), of_heads if fits[1] else ()


def devices_along(names: tuple[str, ...]) -> int:
    """Of the ambient mesh, along these axes of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in names)


def on_devices(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function of each device's part of its arguments, of all of them where there is no mesh
    that XLA spreads arrays over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or not mesh.auto_axes:
        return function
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )
