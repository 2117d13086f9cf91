"""Exports a model as a StableHLO program of fixed length, by `jax.export`, which needs only JAX to
run.

docs/inference.md shows how to run it where lsg_flax is not installed.

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
# A program must stay under 2 GiB (flatbuffers), and constants are expensive: with the 430 MiB of a
# base model inside instead of beside, export took 3.4 instead of 0.8 GiB of memory, and starting on
# CPU 12 s instead of 4 s. Up to about this size the convenience of one file is worth that.
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
    """Writes a program that takes the `inputs`, int32 arrays [B, T] in this order, and returns a
    dict of `fields`.

    With `parameters="beside"`, the program's first argument is a dict of the parameters, which
    `safetensors.flax.load_file` reads from `path` + ".safetensors". Temporary files are renamed
    when all are complete.

    Args:
        model, params: a model of any task but multiple_choice, and its parameters.
        path: the file to write, such as "classifier.stablehlo".
        length: number of tokens T of each row; shorter documents must be padded and masked.
        batch_size: number of rows B; None for any number, with one compilation for each where it
            runs.
        inputs: the arrays that the program takes.
        fields: the outputs that it returns.
        platforms: platforms that the program can run on; none of them needs to be present.
            Attention computes one block at a time for "cpu" and for any batch size, else as many as
            fit.
        parameters: "inside" the program or "beside" it; by default inside up to 512 MiB.

    Returns:
        The paths of the files.

    Raises:
        ImportError: if flatbuffers, which JAX needs for export, is not installed.
        ValueError: for settings that the model or the file does not allow.
        OSError: if the files cannot be written; old files are unchanged.
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
    """The settings with which programs are exported.

    Attributes:
        parameters: whether parameters are inside or beside the program.
    """

    platforms: Sequence[Platform]
    batch_size: int | None
    parameters: ParametersPlace

    def serialized(self, run: Callable, params: Params, shapes: Sequence[Any]) -> bytearray:
        """Exports a function of parameters, by their paths, and of arrays of these shapes."""
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
        """A mesh without axes that sets the device to trace for, which would otherwise be the local
        one. For an unknown batch size it is "cpu", since the blocks that fit cannot be computed."""
        any_size = self.batch_size is None
        kind = "cpu" if any_size or "cpu" in self.platforms else self.platforms[0]
        device = AbstractDevice(device_kind=kind, num_cores=None, platform=kind)
        return AbstractMesh((), (), abstract_device=device)


def placed(params: Params, parameters: ParametersPlace | None) -> ParametersPlace:
    """Returns where parameters go; raises ValueError if they do not fit there."""
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
    """Writes the programs, and parameters that are not inside; temporary files are renamed when all
    are complete. Returns the paths."""
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
    """Checks the settings and returns the shapes of the program's inputs."""
    if model.task_record.input_rank != 2:
        raise ValueError(
            f"task={model.task!r} has inputs of another shape than [batch, tokens] and cannot be "
            "exported."
        )
    if not 1 <= length <= model.max_length:
        raise ValueError(
            f"length={length} must be in 1..{model.max_length}, the tokens that this model reads."
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
    """Raises ImportError if flatbuffers is not installed."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "exporting needs flatbuffers, here and where the file is run: pip install "
            "'lsg-flax[export]' here, pip install jax flatbuffers there."
        )
