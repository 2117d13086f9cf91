"""What is planned, and the plan: two records that also travel as JSON."""

import dataclasses
import json
from typing import Any, Literal, get_args

from lsg_flax.models import Remat
from lsg_flax.planning.hlo import Collective, ProgramReport
from lsg_flax.sharding import check_axes
from lsg_flax.training import Precision

RunKind = Literal["train", "inference", "generate"]
AttentionKind = Literal["lsg", "full", "local", "lsh"]
TARGET_LENGTH = 128  # tokens that are written, where nothing says how many
# What belongs to some modes alone, with the value that it has in the others.
_BELONGS: dict[str, tuple[Any, tuple[RunKind, ...]]] = {
    "remat": ("none", ("train",)),
    "accumulate": (1, ("train",)),
    "max_target_length": (None, ("train", "inference")),
    "max_new_tokens": (None, ("generate",)),
    "num_beams": (None, ("generate",)),
    "lora_r": (None, ("train",)),
    "lora_target_modules": (None, ("train",)),
    "ema_decay": (None, ("train",)),
}


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """What would be run, and where.

    Attributes:
        source: a checkpoint's folder or hub id, or a config.json; weights are not read.
        topology: such as "v5e:2x4", "h100:8", or "cpu:8".
        task: which head; None takes that of the checkpoint.
        mode: a training step (forward, backward, AdamW), batched inference, or `generate`.
        max_length: tokens per row, of an encoder-decoder those of the encoder; None is what an LSG
            checkpoint reads, else 4,096. New tokens of a decoder alone are among them.
        max_target_length: the decoder's tokens per row, of an encoder-decoder that is trained to
            write, or runs once; None is 128.
        max_new_tokens, num_beams: of `generate`; None is 128, and what the checkpoint says, else 1.
        batch_size: rows per step over all chips, all microbatches together.
        mesh: devices along "data", "fsdp", "tensor", "sequence"; one may be -1, and "data" takes
            what is left.
        attention: "lsg" plans the checkpoint as `lsg-flax convert` makes it, "full" the dense one;
            of a family that has its own alone a plan says that, "local" or "lsh".
        lsg: fields of `LSGConfig` to change.
        remat: what the backward pass recomputes.
        accumulate: microbatches per step.
        dtype, param_dtype: of the computation, and of parameters and optimizer state.
        lora_r, lora_target_modules, ema_decay: as in `training.Settings`: adapters that learn with
            the head in place of the whole, and an average of what learns.
    """

    source: str
    topology: str
    task: str | None = None
    mode: RunKind = "train"
    max_length: int | None = None
    max_target_length: int | None = None
    max_new_tokens: int | None = None
    num_beams: int | None = None
    batch_size: int = 8
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    attention: AttentionKind = "lsg"
    lsg: dict[str, Any] = dataclasses.field(default_factory=dict)
    remat: Remat = "none"
    accumulate: int = 1
    dtype: Precision = "bfloat16"
    param_dtype: Precision = "float32"
    lora_r: int | None = None
    lora_target_modules: tuple[str, ...] | None = None
    ema_decay: float | None = None

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
        for name, (off, modes) in _BELONGS.items():
            if (given := getattr(self, name)) != off and self.mode not in modes:
                why = f"; {self.mode} has no backward pass" if modes == ("train",) else ""
                allowed = " or ".join(f"mode={mode!r}" for mode in modes)
                raise ValueError(f"{name}={given!r} is for {allowed}, not {self.mode!r}{why}.")
        check_axes(self.mesh)
        if self.lora_target_modules and self.lora_r is None:
            raise ValueError(
                f"lora_target_modules={self.lora_target_modules} need lora_r, the adapters' rank."
            )
        for name in ("max_length", "max_target_length", "max_new_tokens", "num_beams", "lora_r"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1.")
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
class StepReads:
    """Bytes that a step of generation cannot do without, on one chip: all that the next token
    depends on. (A decoder with LSG attention reads a part of its cache alone.)

    Attributes:
        weights: parameters of the decoder and the head, in the precision of the computation;
            not tables of which it looks up rows.
        self_cache: what is kept of written tokens, and of a decoder's prompt, for every beam.
        cross_cache: keys and values of the encoder's states, once per row.
    """

    weights: int
    self_cache: int
    cross_cache: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.self_cache + self.cross_cache


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """What generation needs beside what a `Plan` says of its step.

    Attributes:
        reads: what the step's memory traffic is compared with.
        prefill: the work of one chip before the first step: encoder, prompt and first token.
        prefill_times: see `Plan.times`.
    """

    reads: StepReads
    prefill: ProgramReport
    prefill_times: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler said.

    Attributes:
        settings: what was planned, with task, length and mesh as they came out.
        notes: what a reader must know about them.
        memory: per chip; only of the arguments where the program was refused.
        capacity: bytes a program can use on a chip, None for a CPU.
        needed: bytes per chip, by the compiler's own refusal where it refused.
        fits: whether the compiler accepted it, for a GPU whether `needed` is no more than
            `capacity`.
        refusal: the compiler's words, where it refused.
        program: the work of one chip in a step, of generation that for one more token of each text;
            None where the program was refused.
        compile_seconds: on this machine.
        times: seconds of a step at the chip's peak, by "compute", "memory", "communication"; the
            largest is the least that a step can take. "compiler" is the sum of XLA's own cycle
            estimates, one kernel after the other.
        generation: what there is besides, with mode="generate".
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
    generation: GenerationPlan | None = None

    @property
    def roofline(self) -> float | None:
        """The least seconds that a step can take, None where the chip is not known."""
        return least_time(self.times)

    def to_json(self) -> str:
        """All of it as JSON, for `from_json`."""
        values = dataclasses.asdict(self)
        if self.program:
            values["program"] = _values_of(self.program)
        if self.generation:
            values["generation"]["prefill"] = _values_of(self.generation.prefill)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`."""
        values = json.loads(text)
        program, generation = values.pop("program"), values.pop("generation")
        if generation:
            reads, prefill, times = (generation[f.name] for f in dataclasses.fields(GenerationPlan))
            generation = GenerationPlan(StepReads(**reads), _report_of(prefill), times)
        return cls(
            **values
            | {
                "settings": PlanSettings(**values["settings"]),
                "memory": ChipMemory(**values["memory"]),
                "notes": tuple(values["notes"]),
                "program": _report_of(program) if program else None,
                "generation": generation,
            }
        )


def least_time(times: dict[str, float]) -> float | None:
    """The least seconds that work with these `Plan.times` can take."""
    bounds = [times[k] for k in ("compute", "memory", "communication") if k in times]
    return max(bounds, default=None)


def _values_of(report: ProgramReport) -> dict[str, Any]:
    return report._asdict() | {"collectives": [c._asdict() for c in report.collectives]}


def _report_of(values: dict[str, Any]) -> ProgramReport:
    values["collectives"] = tuple(Collective(**c) for c in values["collectives"])
    return ProgramReport(**values)
