"""The only use of Pallas' Triton backend, which compiles the kernels for GPUs.

JAX will remove this backend (announced in 0.12) in favour of Mosaic GPU, which supports only Hopper
and later GPUs, not A100 and L4. Everything that the kernels need from a backend is here, so that
only this file will have to change.

Axes: Q queries of a block, S keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, Shaped

backend: Any
try:
    from jax.experimental.pallas import triton as backend
except ImportError:
    backend = None


class Launch(NamedTuple):
    """The launch parameters of a kernel.

    Attributes:
        name: name in the compiled program.
        grid: number of programs along each axis; neighbours along the first axis are adjacent.
        warps: number of warps (32 threads) per program.
        stages: pipeline stages of loops: keys are loaded while earlier ones are in use.
        flops, bytes: the kernel's work, for readers of the compiled program.
    """

    name: str
    grid: tuple[int, int, int]
    warps: int
    stages: int
    flops: int
    bytes: int


def is_there() -> bool:
    """Whether this version of JAX has the backend."""
    return backend is not None


def call(
    launch: Launch,
    kernel: Callable[..., None],
    inputs: tuple[Any, Any],
    outputs: tuple[Any, Any],
    interpret: bool,
) -> Any:
    """Runs `kernel`, which gets references to inputs and outputs in the same trees.

    Args:
        inputs, outputs: arrays, or shapes, and the parts of them that a program gets.
    """
    trees = tuple(jax.tree.structure(x[0]) for x in (inputs, outputs))

    def with_trees(*references):
        count = trees[0].num_leaves
        kernel(
            jax.tree.unflatten(trees[0], references[:count]),
            jax.tree.unflatten(trees[1], references[count:]),
        )

    results = pl.pallas_call(
        with_trees,
        out_shape=jax.tree.leaves(outputs[0]),
        grid=launch.grid,
        in_specs=jax.tree.leaves(inputs[1]),
        out_specs=jax.tree.leaves(outputs[1]),
        compiler_params=backend.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=interpret,
        name=launch.name,
        metadata={"flops": str(launch.flops), "bytes_accessed": str(launch.bytes)},
    )(*jax.tree.leaves(inputs[0]))
    return jax.tree.unflatten(trees[1], results)


def part(shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> Any:
    """Returns the part of an array that a program gets: its size per axis, None to drop the axis;
    `index` computes which part from the program's position in the grid."""
    return pl.BlockSpec(shape, index)


def program_id(axis: int) -> Int[Array, ""]:
    """Returns the program's position in the grid."""
    return pl.program_id(axis)


def read(reference: Any, places: Int[Array, "S"], exists: Bool[Array, "S"]) -> Shaped[Array, "..."]:
    """Reads [S] or [S, H] at these indices of the first axis; zeros for indices out of range."""
    where, mask = _where(reference, places, exists)
    return backend.load(reference.at[where], mask=mask, other=0)


def write(reference: Any, x: Array, places: Int[Array, "S"], exists: Bool[Array, "S"]) -> None:
    """Writes at these indices of the first axis, except out of range."""
    where, mask = _where(reference, places, exists)
    backend.store(reference.at[where], x.astype(reference.dtype), mask=mask)


def _where(reference: Any, places: Int[Array, "S"], exists: Bool[Array, "S"]):
    """Returns indices, and which of them are in range."""
    if len(reference.shape) == 1:
        return (places,), exists
    width = reference.shape[1]
    feature = lax.broadcasted_iota(jnp.int32, (width,), 0)[None, :]
    mask = jnp.broadcast_to(exists[:, None], (places.shape[0], width))
    return (places[:, None], feature), mask


def product(
    x: Shaped[Array, "_ _"], y: Shaped[Array, "_ _"], contract: tuple[int, int]
) -> Float[Array, "_ _"]:
    """Returns a matrix product over one axis of each operand, accumulated in float32. JAX's default
    precision applies to float32 operands, as in XLA's products."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
