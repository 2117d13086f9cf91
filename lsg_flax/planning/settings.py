"""What is planned, and the plan: two records that also travel as JSON."""

import dataclasses
import json
from typing import Any, Literal, get_args

from lsg_flax.models import Remat
from lsg_flax.planning.hlo import Collective, ProgramReport
from lsg_flax.sharding import check_axes
from lsg_flax.training import Precision

RunKind = Literal["train", "inference"]
AttentionKind = Literal["lsg", "full"]


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
    mode: RunKind = "train"
    max_length: int | None = None
    batch_size: int = 8
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    attention: AttentionKind = "lsg"
    lsg: dict[str, Any] = dataclasses.field(default_factory=dict)
    remat: Remat = "none"
    accumulate: int = 1
    dtype: Precision = "bfloat16"
    param_dtype: Precision = "float32"

    def __post_init__(self):
        for name, kind in (("mode", RunKind), ("attention", AttentionKind), ("remat", Remat)):
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
        check_axes(self.mesh)
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1.")
        if self.attention == "full" and self.lsg:
            raise ValueError(f"{sorted(self.lsg)} are LSG settings, and attention='full'.")


@dataclasses.dataclass(frozen=True)
class ChipMemory:
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
    memory: ChipMemory
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
                "memory": ChipMemory(**values["memory"]),
                "notes": tuple(values["notes"]),
                "program": ProgramReport(**program) if program else None,
            }
        )
