"""A model as one program of fixed length that runs with JAX alone: StableHLO, by `jax.export`.

docs/inference.md shows the lines that run it where lsg_flax is not installed.

Axes: B batch, T tokens.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import flax.traverse_util
import jax
import numpy as np
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from lsg_flax.files import file_aside, save_tensors
from lsg_flax.inference.program import outputs_of
from lsg_flax.locks import locked_file
from lsg_flax.models import Model, Params

Platform = Literal["cpu", "cuda", "rocm", "tpu"]
Input = Literal["input_ids", "attention_mask", "token_type_ids"]
ParametersPlace = Literal["inside", "beside"]
# A program must stay under 2 GiB (flatbuffers), and constants cost: a base model's 430 MiB, inside
# instead of beside, took 3.4 instead of 0.8 GiB of memory to export and 12 s instead of 4 s to
# start on CPU. One file is worth that up to about this size.
INSIDE_BYTES = 512 * 2**20
_MOST_INSIDE = 2**31 - 2**26


def export_model(
    model: Model,
    params: Params,
    path: str | os.PathLike,
    *,
    length: int,
    batch_size: int | None = None,
    inputs: Sequence[Input] = ("input_ids", "attention_mask"),
    fields: Sequence[str] = ("logits",),
    platforms: Sequence[Platform] = ("cpu",),
    parameters: ParametersPlace | None = None,
) -> tuple[pathlib.Path, ...]:
    """Writes a program from `inputs`, int32 arrays [B, T] in this order, to a dict of `fields`.

    With the parameters beside it, the program's first argument is a dict of them, which
    `safetensors.flax.load_file` reads from `path` + ".safetensors". Files get their names when all
    are complete.

    Args:
        model, params: of any task but multiple_choice.
        path: the file to write, such as "classifier.stablehlo".
        length: tokens T of each row; shorter documents are padded and masked.
        batch_size: rows B; None for any number, one compilation each where it runs.
        platforms: devices that it shall run on; none of them needs to be here. Attention works on
            one block at a time for "cpu" and for any batch size, else on as many as fit.
        parameters: inside the program or beside it; by default inside up to 512 MiB.

    Returns:
        The files.

    Raises:
        ImportError: without flatbuffers, which JAX writes the file with.
        ValueError: for settings that the model or the file does not allow.
        OSError: if the files cannot be written; old ones stay as they were.
    """
    check_flatbuffers()
    shapes = input_shapes(model, length, batch_size, inputs, fields, platforms)
    build = Build(platforms, batch_size, placed(params, parameters))
    program = build.serialized(_program(model, inputs, fields), params, shapes)
    path = pathlib.Path(path)
    return write_programs(
        {path: program}, build, params, path.with_name(f"{path.name}.safetensors")
    )


@dataclasses.dataclass(frozen=True)
class Build:
    """How programs are made.

    Attributes:
        parameters: where they are.
    """

    platforms: Sequence[Platform]
    batch_size: int | None
    parameters: ParametersPlace

    def serialized(self, run: Callable, params: Params, shapes: Sequence[Any]) -> bytearray:
        """A program of the function of parameters by their paths and of arrays of these shapes."""
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        if self.parameters == "inside":
            constants = jax.tree.map(jax.numpy.asarray, flat)
            program, arguments = functools.partial(run, constants), shapes
        else:
            weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), flat)
            program, arguments = run, [weights, *shapes]
        with jax.sharding.use_abstract_mesh(self.target):
            jitted = jax.jit(program)
            return export.export(jitted, platforms=tuple(self.platforms))(*arguments).serialize()

    @property
    def target(self) -> AbstractMesh:
        """A mesh without axes that says for which device to trace; without it, it would be the one
        that is here. How many blocks fit cannot be asked of a batch size that is not known."""
        any_size = self.batch_size is None
        kind = "cpu" if any_size or "cpu" in self.platforms else self.platforms[0]
        device = AbstractDevice(device_kind=kind, num_cores=None, platform=kind)
        return AbstractMesh((), (), abstract_device=device)


def placed(params: Params, parameters: ParametersPlace | None) -> ParametersPlace:
    """Where parameters go; raises ValueError for such as do not fit there."""
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if parameters not in (None, *get_args(ParametersPlace)):
        raise ValueError(f"parameters={parameters!r} must be inside, beside or None.")
    if parameters == "inside" and size > _MOST_INSIDE:
        raise ValueError(
            f"parameters of {size / 2**30:.1f} GiB do not fit in a program, which must stay under "
            '2 GiB; pass parameters="beside".'
        )
    return parameters or ("inside" if size <= INSIDE_BYTES else "beside")


def write_programs(
    programs: Mapping[pathlib.Path, bytearray], build: Build, params: Params, beside: pathlib.Path
) -> tuple[pathlib.Path, ...]:
    """Writes the programs, and parameters that are not in them; files get their names when all are
    complete. Returns the files."""
    first, *_ = programs
    with locked_file(first), contextlib.ExitStack() as stack:
        for path, program in programs.items():
            stack.enter_context(file_aside(path)).write_bytes(program)
        if build.parameters == "inside":
            return tuple(programs)
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        save_tensors(stack.enter_context(file_aside(beside)), jax.tree.map(np.asarray, flat))
    return (*programs, beside)


def _program(model: Model, inputs: Sequence[Input], fields: Sequence[str]) -> Callable:
    def run(flat: dict[str, jax.Array], *arrays: jax.Array) -> dict[str, jax.Array]:
        params = flax.traverse_util.unflatten_dict(flat, sep="/")
        return outputs_of(model, params, dict(zip(inputs, arrays, strict=True)), tuple(fields))

    return run


def input_shapes(
    model: Model,
    length: int,
    batch_size: int | None,
    inputs: Sequence[Input],
    fields: Sequence[str],
    platforms: Sequence[Platform],
) -> list[jax.ShapeDtypeStruct]:
    """Of the program's inputs, checked."""
    if model.task_record.input_rank != 2:
        raise ValueError(f"{model.task} has inputs of another shape and cannot be exported.")
    if not 1 <= length <= model.max_length:
        raise ValueError(
            f"length={length} must lie in 1..{model.max_length}, what this model reads."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1, or None for any.")
    for name, given, allowed in (
        ("inputs", inputs, get_args(Input)),
        ("platforms", platforms, get_args(Platform)),
    ):
        if not given or len(set(given)) < len(given) or not {*given} <= {*allowed}:
            raise ValueError(f"{name}={tuple(given)} must be some of {', '.join(allowed)}.")
    if "input_ids" not in inputs:
        raise ValueError(f"inputs={tuple(inputs)} must have input_ids.")
    if not fields:
        raise ValueError("fields=() leaves nothing to export; name outputs, such as logits.")
    batch = export.symbolic_shape("batch")[0] if batch_size is None else batch_size
    return [jax.ShapeDtypeStruct((batch, length), np.int32) for _ in inputs]


def check_flatbuffers() -> None:
    """Raises ImportError without flatbuffers."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "exporting needs flatbuffers, here and where the file is run: pip install "
            "'lsg-flax[export]' here, pip install jax flatbuffers there."
        )
