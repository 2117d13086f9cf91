"""Kernels on a mesh: XLA shards arrays automatically, but cannot split a kernel, so each device
runs it for its own rows of the batch and its own heads."""

import math
from collections.abc import Callable
from typing import Any

import jax

from lsg_flax.kernels.spec import Axes


def axes_that_divide(axes: Axes, rows: int, heads: int, group: int = 1) -> Axes:
    """Returns the axes of the ambient mesh over which XLA shards rows and heads, among the allowed
    ones; empty if they do not divide the rows, or the groups of `group` heads."""
    mesh = jax.sharding.get_abstract_mesh()
    used = {name for name in mesh.auto_axes if mesh.shape[name] > 1}
    of_rows, of_heads = (tuple(name for name in names if name in used) for names in axes)
    fits = rows % devices_along(of_rows) == 0, heads % (devices_along(of_heads) * group) == 0
    return of_rows if fits[0] else (), of_heads if fits[1] else ()


def devices_along(names: tuple[str, ...]) -> int:
    """Returns the number of devices of the ambient mesh along these axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in names)


def on_devices(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Wraps a function so that each device runs it on its part of the arguments; without a mesh
    over which XLA shards arrays, returns it unchanged."""
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
