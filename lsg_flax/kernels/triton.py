"""The one door to Pallas' Triton backend, which compiles the kernels for GPUs.

JAX is going to remove this backend (0.12 says so) for Mosaic GPU, which knows Hopper and later
GPUs alone, and not what the others have: A100 and L4. All that the kernels need of a backend is
here, so that only this file has to change then.

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
    """How a kernel is started.

    Attributes:
        name: in the program.
        grid: programs along each axis, the first one's neighbours beside each other.
        warps: of 32 threads, that a program has.
        stages: of loops: keys are loaded while earlier ones are worked on.
        flops, bytes: what the kernel does, for who reads the compiled program.
    """

    name: str
    grid: tuple[int, int, int]
    warps: int
    stages: int
    flops: int
    bytes: int


def is_there() -> bool:
    """Whether this JAX has the backend."""
    return backend is not None


def call(
    launch: Launch,
    kernel: Callable[..., None],
    inputs: tuple[Any, Any],
    outputs: tuple[Any, Any],
    interpret: bool,
) -> Any:
    """Runs `kernel`, which is given references to inputs and outputs, as trees like these.

    Args:
        inputs, outputs: arrays, or shapes, and the parts of them that a program is given.
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
    """What of an array a program is given: so much along each axis, None for one without the
    axis; `index` says which from the program's place in the grid."""
    return pl.BlockSpec(shape, index)


def program_id(axis: int) -> Int[Array, ""]:
    """A program's place in the grid."""
    return pl.program_id(axis)


def read(reference: Any, places: Int[Array, "S"], exists: Bool[Array, "S"]) -> Shaped[Array, "..."]:
    """[S] or [S, H] at these places of the first axis; zeros where there is nothing."""
    where, mask = _where(reference, places, exists)
    return backend.load(reference.at[where], mask=mask, other=0)


def write(reference: Any, x: Array, places: Int[Array, "S"], exists: Bool[Array, "S"]) -> None:
    """Undoes `read`, except where there is nothing."""
    where, mask = _where(reference, places, exists)
    backend.store(reference.at[where], x.astype(reference.dtype), mask=mask)


def _where(reference: Any, places: Int[Array, "S"], exists: Bool[Array, "S"]):
    """Indices, and which of them exist."""
    if len(reference.shape) == 1:
        return (places,), exists
    width = reference.shape[1]
    feature = lax.broadcasted_iota(jnp.int32, (width,), 0)[None, :]
    mask = jnp.broadcast_to(exists[:, None], (places.shape[0], width))
    return (places[:, None], feature), mask


def product(
    x: Shaped[Array, "_ _"], y: Shaped[Array, "_ _"], contract: tuple[int, int]
) -> Float[Array, "_ _"]:
    """A matrix product over one axis of each with float32 accumulation; float32 operands as JAX's
    default precision says, as in XLA's products."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
