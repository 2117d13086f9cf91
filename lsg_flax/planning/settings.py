"""The records of a plan's settings and of the plan, which can be written as JSON."""

import dataclasses
import json
from typing import Any, Literal, get_args

from lsg_flax.models import Remat
from lsg_flax.planning.hlo import Collective, ProgramReport
from lsg_flax.sharding import check_axes
from lsg_flax.training import Precision

RunKind = Literal["train", "inference", "generate"]
AttentionKind = Literal["lsg", "full", "local", "lsh"]
TARGET_LENGTH = 128  # default number of generated or target tokens
# Settings of some modes only, with the value that they have in the others.
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
    """The run to plan, and the topology to plan it for.

    Attributes:
        source: a checkpoint's folder or hub id, or a config.json; weights are not read.
        topology: chips and their arrangement, such as "v5e:2x4", "h100:8" or "cpu:8".
        task: the head; by default that of the checkpoint.
        mode: "train" (a training step: forward, backward, AdamW), "inference" (a batch), or
            "generate" (text generation).
        max_length: tokens per row; for an encoder-decoder those of the encoder. By default what an
            LSG checkpoint reads, else 4,096. For a causal model new tokens are included.
        max_target_length: tokens per row of the decoder, for an encoder-decoder with mode="train"
            or "inference"; by default 128.
        max_new_tokens: with mode="generate", number of new tokens; by default 128.
        num_beams: with mode="generate", number of beams; by default the checkpoint's, else 1.
        batch_size: rows per step over all chips and microbatches.
        mesh: number of devices along "data", "fsdp", "tensor", "sequence"; one may be -1, and
            "data" takes what is left.
        attention: "lsg" plans the checkpoint as `lsg-flax convert` would make it, "full" with dense
            attention. Families with only their own attention have "local" or "lsh" in their plan.
        lsg: fields of `LSGConfig` to change.
        remat: what the backward pass recomputes: "none", "dots" or "full".
        accumulate: number of microbatches per step.
        dtype, param_dtype: of the computation, and of parameters and optimizer state.
        lora_r, lora_target_modules: as in `training.Settings`: train only adapters and the head.
        ema_decay: as in `training.Settings`: also keep an average of the trainable parameters, and
            which share of it a step keeps.

    Raises:
        ValueError: for invalid settings.
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
                f"lora_target_modules={self.lora_target_modules} need lora_r, the rank; set it."
            )
        for name in ("max_length", "max_target_length", "max_new_tokens", "num_beams", "lora_r"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1.")
        if self.attention == "full" and self.lsg:
            raise ValueError(
                f"{sorted(self.lsg)} are LSG settings, but attention='full'; leave them out."
            )


@dataclasses.dataclass(frozen=True)
class ChipMemory:
    """Bytes per chip. A donated argument and the output that reuses its memory count once."""

    parameters: int
    optimizer: int
    batch: int
    outputs: int = 0  # those that do not reuse an argument's memory
    temporaries: int = 0  # at the peak
    code: int = 0
    padding: int = 0  # of arguments, due to the chip's memory layout

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class StepReads:
    """Bytes that a step of generation must read on one chip: everything that the next token depends
    on. (A decoder with LSG attention reads only a part of its cache.)

    Attributes:
        weights: bytes of the parameters of decoder and head, in the precision of the computation,
            without tables in which it only looks up rows.
        self_cache: bytes of the cache of generated tokens, and of a decoder's prompt, for every
            beam.
        cross_cache: bytes of the keys and values of the encoder's states, once per row.
    """

    weights: int
    self_cache: int
    cross_cache: int

    @property
    def total(self) -> int:
        """The bytes of all three."""
        return self.weights + self.self_cache + self.cross_cache


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """The results that only a plan of generation has, beside the work of a step.

    Attributes:
        reads: the bytes that a step must read, to compare its memory traffic with.
        prefill: the work of one chip before the first step: encoder, prompt and first token.
        prefill_times: seconds, see `Plan.times`.
    """

    reads: StepReads
    prefill: ProgramReport
    prefill_times: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of planning.

    Attributes:
        settings: the settings, with task, length and mesh filled in.
        notes: remarks that a reader of the plan needs.
        memory: bytes per chip; only of the arguments if the compiler refused the program.
        capacity: bytes that a program can use on a chip; None for a CPU.
        needed: bytes per chip that the program needs; if it was refused, as the compiler says.
        fits: whether the compiler accepted the program; for a GPU whether `needed` is at most
            `capacity`.
        refusal: the compiler's message if it refused the program.
        program: the work of one chip in a step, for generation that of one more token per text;
            None if the program was refused.
        compile_seconds: seconds that compilation took on this machine.
        times: seconds of a step at the chip's peak for "compute", "memory" and "communication"; a
            step takes at least the largest of these. "compiler" is the sum of XLA's own cycle
            estimates, one kernel after the other.
        generation: further results with mode="generate", else None.
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
        """A lower bound of the seconds per step; None if the chip's peaks are unknown."""
        return least_time(self.times)

    def to_json(self) -> str:
        """Returns the plan as JSON, for `from_json`."""
        values = dataclasses.asdict(self)
        if self.program:
            values["program"] = _values_of(self.program)
        if self.generation:
            values["generation"]["prefill"] = _values_of(self.generation.prefill)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads a plan that `to_json` wrote."""
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
    """Returns a lower bound of the seconds for these `Plan.times`; None if they are empty."""
    bounds = [times[k] for k in ("compute", "memory", "communication") if k in times]
    return max(bounds, default=None)


def _values_of(report: ProgramReport) -> dict[str, Any]:
    return report._asdict() | {"collectives": [c._asdict() for c in report.collectives]}


def _report_of(values: dict[str, Any]) -> ProgramReport:
    values["collectives"] = tuple(Collective(**c) for c in values["collectives"])
    return ProgramReport(**values)
