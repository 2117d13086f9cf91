"""A plan before the TPU is rented: the real training step or inference program, compiled for a
described topology, and what it needs of memory, arithmetic and communication.

No weights are read and nothing runs. TPU settings must stand in the environment before jax is
imported, so `plan` compiles in a process of its own (`python -m lsg_flax.planning`), which also
keeps a crash of the compiler apart; `compile_plan` does it in this one.

Axes: B batch, C choices, T tokens, M microbatches.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsg_flax import hub, inference, sharding, training
from lsg_flax.chips import Topology, check_libtpu, devices_of, environment_for, parse_topology
from lsg_flax.convert_from_torch import example_ids
from lsg_flax.models import Model, Remat, family_of
from lsg_flax.patterns import LSGConfig
from lsg_flax.planning.hlo import Collective, ProgramReport, read_program
from lsg_flax.training import losses

Mode = Literal["train", "inference"]
Attention = Literal["lsg", "full"]
Precision = Literal["float32", "bfloat16"]

DEFAULT_LENGTH = 4096  # of a checkpoint with full attention, as `convert` makes it
_CHOICES = 4  # of a multiple choice


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """What would be run, and where.

    Attributes:
        source: a checkpoint's folder or hub id, or a config.json; weights are not read.
        topology: such as "v5e:2x4", or "cpu:8".
        task: which head; None takes that of the checkpoint.
        mode: a training step (forward, backward, AdamW), or batched inference.
        max_length: tokens per row; None is what an LSG checkpoint reads, else 4,096.
        batch_size: rows per step over all chips, all microbatches together.
        mesh: devices along "data", "fsdp", "tensor", "sequence"; one may be -1, and "data" takes
            what is left.
        attention: "lsg" plans the checkpoint as `lsg-flax convert` makes it, "full" the dense one.
        lsg: fields of `LSGConfig` to change.
        remat: what the backward pass recomputes.
        accumulate: microbatches per step.
        dtype, param_dtype: of the computation, and of parameters and optimizer state.
    """

    source: str
    topology: str
    task: str | None = None
    mode: Mode = "train"
    max_length: int | None = None
    batch_size: int = 8
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    attention: Attention = "lsg"
    lsg: dict[str, Any] = dataclasses.field(default_factory=dict)
    remat: Remat = "none"
    accumulate: int = 1
    dtype: Precision = "bfloat16"
    param_dtype: Precision = "float32"

    def __post_init__(self):
        for name, kind in (("mode", Mode), ("attention", Attention), ("remat", Remat)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of "
                    f"{', '.join(get_args(kind))}."
                )
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} must be positive and divisible by "
                f"accumulate={self.accumulate}: it counts the rows of all microbatches."
            )
        if self.mode == "inference" and (self.remat != "none" or self.accumulate != 1):
            raise ValueError(
                f"remat={self.remat!r} and accumulate={self.accumulate} are for mode='train'; "
                "inference has no backward pass."
            )
        unknown = sorted(self.mesh.keys() - set(sharding.AXES))
        if unknown:
            raise ValueError(f"unknown mesh axes {unknown}; known are {sharding.AXES}.")
        if self.attention == "full" and self.lsg:
            raise ValueError(f"{sorted(self.lsg)} are LSG settings, and attention='full'.")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip. A donated argument and the output in its place count once."""

    parameters: int
    optimizer: int
    batch: int
    outputs: int = 0  # that no argument makes room for
    temporaries: int = 0  # at the peak
    code: int = 0
    padding: int = 0  # of arguments, by the chip's memory layout

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler said.

    Attributes:
        settings: what was planned, with task, length and mesh as they came out.
        notes: what a reader must know about them.
        memory: per chip; only of the arguments where the program was refused.
        capacity: bytes a program can use on a chip, None for a CPU.
        needed: bytes per chip, by the compiler's own refusal where it refused.
        fits: whether the compiler accepted it.
        refusal: the compiler's words.
        program: the work of one chip in a step; None where the program was refused.
        compile_seconds: on this machine.
        times: seconds of a step at the chip's peak, by "compute", "memory", "communication"; the
            largest is the least that a step can take. "compiler" is the sum of XLA's own cycle
            estimates, one kernel after the other.
    """

    settings: PlanSettings
    notes: tuple[str, ...]
    memory: Memory
    capacity: int | None
    needed: int
    fits: bool
    refusal: str | None
    program: ProgramReport | None
    compile_seconds: float
    times: dict[str, float]

    @property
    def roofline(self) -> float | None:
        """The least seconds that a step can take, None where the chip is not known."""
        bounds = [self.times[k] for k in ("compute", "memory", "communication") if k in self.times]
        return max(bounds, default=None)

    def to_json(self) -> str:
        """All of it as JSON, for `from_json`."""
        values = dataclasses.asdict(self)
        if self.program:
            values["program"] = self.program._asdict()
            values["program"]["collectives"] = [c._asdict() for c in self.program.collectives]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`."""
        values = json.loads(text)
        program = values.pop("program")
        if program:
            program["collectives"] = tuple(Collective(**c) for c in program["collectives"])
        return cls(
            **values
            | {
                "settings": PlanSettings(**values["settings"]),
                "memory": Memory(**values["memory"]),
                "notes": tuple(values["notes"]),
                "program": ProgramReport(**program) if program else None,
            }
        )


def plan(settings: PlanSettings) -> Plan:
    """Compiles in a process of its own.

    Raises:
        ValueError: for settings that do not fit the model, the mesh or the topology.
        FileNotFoundError: if there is no checkpoint.
        ImportError: if the topology needs libtpu and it is missing.
        RuntimeError: if the compiler crashed; its last words are given.
    """
    topology = parse_topology(settings.topology)
    if topology.chip:
        check_libtpu()
    package = str(pathlib.Path(__file__).parents[2])
    environment = environment_for(topology)
    environment["PYTHONPATH"] = os.pathsep.join(
        [package, *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-m", "lsg_flax.planning"],
        input=json.dumps(dataclasses.asdict(settings)),
        capture_output=True,
        text=True,
        env=environment,
    )
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    if done.returncode == 0:
        return Plan.from_json(last)
    try:
        error = json.loads(last)
    except ValueError:
        raise RuntimeError(
            f"compiling for {settings.topology} ended with exit code {done.returncode}: "
            f"{done.stderr.strip()[-2000:]}"
        ) from None
    kinds = {"FileNotFoundError": FileNotFoundError, "ImportError": ImportError}
    raise kinds.get(error["kind"], ValueError)(error["message"])


def main() -> int:
    """The process of its own: settings as JSON on stdin, the plan or the error as the last line of
    stdout."""
    try:
        print(compile_plan(PlanSettings(**json.load(sys.stdin))).to_json())
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(json.dumps({"kind": type(error).__name__, "message": str(error)}))
        return 1
    return 0


def compile_plan(settings: PlanSettings) -> Plan:
    """Compiles in this process, whose environment must be that of `chips.environment_for`.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `plan`.
    """
    topology = parse_topology(settings.topology)
    mesh = sharding.make_mesh(
        **{"data": None} | settings.mesh,  # pyright: ignore[reportArgumentType]
        devices=devices_of(topology),
    )
    model, settings, notes = planned_model(settings)
    settings = dataclasses.replace(settings, mesh=dict(mesh.shape))
    function, arguments, memory = _program(model, settings, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
    try:
        with jax.set_mesh(mesh):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(settings, notes, topology, memory, str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = _measured(memory, compiled.memory_analysis())
    program = read_program(compiled.as_text() or "")
    chip = topology.chip
    return Plan(
        settings,
        tuple(notes),
        memory,
        chip.memory if chip else None,
        memory.total,
        True,
        None,
        program,
        seconds,
        _times(topology, program),
    )


# The model


def planned_model(settings: PlanSettings) -> tuple[Model, PlanSettings, list[str]]:
    """The model that would run, the settings with task and length filled in, and notes on both.

    Raises:
        ValueError, FileNotFoundError: for a source or settings that cannot be.
    """
    checkpoint = hub.open_checkpoint(settings.source, hub.CONFIG_FILES)
    task = settings.task or checkpoint.task
    config = checkpoint.config_for(task)
    reads = Model(config, task).max_length
    length = settings.max_length
    if length is None:
        length = reads if config.lsg else DEFAULT_LENGTH
    if length < 1:
        raise ValueError(f"max_length={length} must be at least 1.")
    notes = []
    if settings.attention == "full":
        config = dataclasses.replace(config, lsg=None)
    else:
        if config.lsg is None:
            notes.append("LSG attention, as `lsg-flax convert` makes it of this checkpoint")
        pattern = config.lsg or LSGConfig()
        config = dataclasses.replace(config, lsg=dataclasses.replace(pattern, **settings.lsg))
    if length > reads:
        notes.append(f"as converted to {length:,} tokens; the checkpoint reads {reads:,}")
        positions = length + family_of(config.model_type).architecture.position_offset
        config = dataclasses.replace(config, max_position_embeddings=positions)
    model = Model(
        config,
        task,
        dtype=jnp.dtype(settings.dtype),
        param_dtype=jnp.dtype(settings.param_dtype),
        remat=settings.remat,
    )
    return model, dataclasses.replace(settings, task=task, max_length=length), notes


# The program


def _program(model: Model, settings: PlanSettings, mesh: Mesh):
    """The jitted function, its abstract arguments with their shardings, and what these weigh."""
    batch = abstract_batch(model, settings)
    accumulates = settings.accumulate > 1
    batch = _placed(batch, sharding.batch_shardings(batch, mesh, microbatches=accumulates))
    key, ids = jax.random.key(0), example_ids(model)
    if settings.mode == "inference":
        params = jax.eval_shape(lambda key: model.init(key, ids)["params"], key)
        params = _placed(params, sharding.shardings_for(params, mesh))
        weights = Memory(_bytes_per_chip(params), 0, _bytes_per_chip(batch))
        predict = jax.jit(lambda params, batch: inference.outputs_of(model, params, batch, None))
        return predict, (params, batch), weights
    optimizer = training.make_optimizer(1e-4, total_steps=1000)

    def init(key: jax.Array) -> training.TrainState:
        params: Any = model.init(key, ids)["params"]
        return training.init_state(params, optimizer, key)

    state = jax.eval_shape(init, key)
    state = _placed(state, sharding.shardings_for(state, mesh))
    step: Any = training.make_train_step(model, optimizer, settings.accumulate)
    weights = Memory(*map(_bytes_per_chip, (state.params, state.opt_state, batch)))
    return step, (state, batch), weights


def abstract_batch(model: Model, settings: PlanSettings) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch: [B, T], [B, C, T] for choices, [M, B, ...] with accumulation.

    Raises:
        ValueError: in training, for a task without a loss.
    """
    rows: tuple[int, ...] = (settings.batch_size // settings.accumulate,)
    rows = (settings.accumulate, *rows) if settings.accumulate > 1 else rows
    assert settings.max_length is not None
    choices = (_CHOICES,) if model.task == "multiple_choice" else ()
    tokens = (*rows, *choices, settings.max_length)
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if model.config.type_vocab_size > 1 else []
    shapes: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(names, (tokens, np.int32))
    if settings.mode == "train":
        for target in losses.targets_of(model):
            shapes[target.labels] = _label_shape(model, target.labels, rows, tokens)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def _label_shape(model: Model, name: str, rows, tokens) -> tuple[tuple[int, ...], Any]:
    if name == "labels" and model.task not in ("sequence_classification", "multiple_choice"):
        per_row = model.task == "next_sentence_prediction"
        return (rows if per_row else tokens), np.int32
    if model.task == "sequence_classification":
        kind = losses.problem_type(model.config, jnp.zeros((), jnp.int32))
        if kind == "multi_label_classification":
            return (*rows, model.config.num_labels), np.float32
        if kind == "regression":
            count = model.config.num_labels
            return (rows if count == 1 else (*rows, count)), np.float32
    return rows, np.int32


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _bytes_per_chip(tree: Any) -> int:
    """Of abstract arrays with shardings; random keys weigh nothing worth naming."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shape = leaf.sharding.shard_shape(leaf.shape)
            total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


# What the compiler said


def _measured(memory: Memory, stats: Any) -> Memory:
    known = memory.parameters + memory.optimizer + memory.batch
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # At the program's peak: XLA accepts or refuses by this number. The sum of all temporaries
    # counts places that are used one after the other.
    peak = stats.peak_memory_in_bytes - stats.argument_size_in_bytes - outputs
    return dataclasses.replace(
        memory,
        outputs=outputs,
        temporaries=peak if peak > 0 else stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        padding=max(stats.argument_size_in_bytes - known, 0),
    )


def _refused(
    settings, notes, topology: Topology, memory: Memory, message: str, seconds: float
) -> Plan:
    """A plan that does not fit, with the compiler's numbers; any other error is raised."""
    needed, capacity = out_of_memory(message)
    return Plan(settings, tuple(notes), memory, capacity, needed, False, message, None, seconds, {})


def out_of_memory(message: str) -> tuple[int, int]:
    """Bytes needed and available, from XLA's refusal of a program.

    Raises:
        RuntimeError: if the message says something else.
    """
    number = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({number}\) exceeds available HBM \({number}\)", message) or re.search(
        rf"Used {number} of {number} hbm", message
    )
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise RuntimeError(f"the compiler refused this program: {message[:2000]}")
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, available = (float(found[i]) * units[found[i + 1]] for i in (1, 3))
    return int(needed), int(available)


def _times(topology: Topology, program: ProgramReport) -> dict[str, float]:
    chip = topology.chip
    if chip is None:
        return {}
    times = {
        "compute": program.flops / chip.flops,
        "memory": program.bytes / chip.bandwidth,
        "communication": sum(c.wire_bytes for c in program.collectives) / chip.links,
    }
    return times | ({"compiler": program.cycles / chip.clock} if program.cycles else {})
