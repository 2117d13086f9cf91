"""What a fine-tuning run is told: one dataclass whose fields are the keys of a YAML file and the
flags of `lsg-flax train`. Every field says what it means where it stands."""

import dataclasses
import difflib
import math
import os
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from lsg_flax.data import Columns, OnError, TextUnit, readable_tasks
from lsg_flax.models import ProblemType, Remat
from lsg_flax.patterns import LSGConfig
from lsg_flax.sharding import AXES
from lsg_flax.training.optimizers import Schedule

Group = Literal["data", "model", "training", "devices", "run"]
Precision = Literal["float32", "bfloat16"]
Trained = Literal["all", "head", "global_tokens_and_head"]
Words = str | tuple[str, ...]
if typing.TYPE_CHECKING:
    TrainedTask = str
else:
    TrainedTask = Literal[*readable_tasks()]

# What stays as it is, by what is trained; searched in paths such as "encoder/layers/mlp_up/kernel".
FROZEN: dict[str, str | None] = {
    "all": None,
    "head": "^encoder/",
    "global_tokens_and_head": "^encoder/(?!embeddings/global_embeddings)",
}
# Scores of an evaluation beside eval_loss, by task and, for sequence_classification, by what is
# predicted.
SCORES: dict[str, tuple[str, ...]] = {
    "single_label_classification": ("accuracy", "macro_f1"),
    "multi_label_classification": ("accuracy", "micro_f1", "macro_f1"),
    "regression": ("mse", "pearson"),
    "token_classification": ("accuracy", "precision", "recall", "f1"),
    "question_answering": ("exact_match", "f1"),
    "multiple_choice": ("accuracy", "macro_f1"),
    "masked_lm": ("perplexity",),
    "causal_lm": ("perplexity",),
}
_LOWER_IS_BETTER = ("eval_loss", "eval_mse", "eval_perplexity")
_EPOCHS = 3
_LSG_NAMES = tuple(f.name for f in dataclasses.fields(LSGConfig))


class Help(NamedTuple):
    """What a setting is, and what is done where it is not given."""

    group: Group
    about: str
    unset: str = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A fine-tuning run; what each field means stands beside it and in `lsg-flax train --help`.

    A value may be what YAML makes of it: a list for a tuple, "1e-4" for a number.

    Raises:
        ValueError: for a value that is not allowed, and for values that exclude each other.
    """

    model: Annotated[str, Help("model", "folder with tokenizer, or id on the Hugging Face hub")]
    train_data: Annotated[
        Words,
        Help(
            "data", ".jsonl, .csv, .parquet or .txt files, a folder, a pattern, or a dataset's name"
        ),
    ]
    output: Annotated[
        str, Help("run", "folder for the model, checkpoints/ and log/; to resume, run again")
    ]
    task: Annotated[TrainedTask, Help("model", "what the model learns")]

    eval_data: Annotated[Words | None, Help("data", "held-out data, as --train-data")] = None
    subset: Annotated[str | None, Help("data", "of a dataset: second argument of load_dataset")] = (
        None
    )
    train_split: Annotated[str, Help("data", "of a dataset, for training")] = "train"
    eval_split: Annotated[str, Help("data", "of a dataset, for evaluation")] = "validation"
    columns: Annotated[
        dict[str, str],
        Help("data", "what columns are called, such as text=body", "their usual names"),
    ] = dataclasses.field(default_factory=dict)
    labels: Annotated[
        tuple[str, ...] | None,
        Help("data", "names in the order of their numbers", "those in the data, sorted"),
    ] = None
    problem_type: Annotated[ProblemType, Help("data", "of sequence_classification")] = (
        "single_label_classification"
    )
    max_length: Annotated[int | None, Help("data", "tokens of a row", "what the model reads")] = (
        None
    )
    buckets: Annotated[
        tuple[int, ...] | None,
        Help("data", "lengths that rows are padded to", "powers of two from 512, --max-length"),
    ] = None
    stride: Annotated[int, Help("data", "question_answering: tokens that windows share")] = 128
    pack: Annotated[bool, Help("data", "language models: join texts to rows of --max-length")] = (
        True
    )
    text_unit: Annotated[TextUnit, Help("data", "what is a text in .txt files")] = "line"
    on_error: Annotated[OnError, Help("data", "what a broken row does")] = "raise"
    cache: Annotated[
        str | None, Help("data", "folder that keeps tokens", "lsg_flax in the user's cache")
    ] = None

    convert: Annotated[
        bool, Help("model", "give it LSG attention and --max-length positions first")
    ] = False
    lsg: Annotated[
        dict[str, Any],
        Help("model", "attention pattern, such as num_global_tokens=7", "the model's"),
    ] = dataclasses.field(default_factory=dict)
    dtype: Annotated[Precision, Help("model", "of the computation; parameters are float32")] = (
        "float32"
    )
    remat: Annotated[Remat, Help("model", "what the backward pass recomputes to save memory")] = (
        "none"
    )

    epochs: Annotated[
        int | None, Help("training", "passes over the data", f"{_EPOCHS}, or what --steps says")
    ] = None
    steps: Annotated[int | None, Help("training", "optimizer steps, in place of --epochs")] = None
    batch_size: Annotated[
        int, Help("training", "rows per step, over all devices and microbatches")
    ] = 8
    accumulate: Annotated[
        int, Help("training", "microbatches that the rows of a step are cut into")
    ] = 1
    learning_rate: Annotated[float, Help("training", "the highest")] = 5e-5
    schedule: Annotated[Schedule, Help("training", "of the learning rate, after warmup")] = "linear"
    warmup: Annotated[float, Help("training", "share of the steps in which the rate rises")] = 0.1
    weight_decay: Annotated[float, Help("training", "of AdamW; not for biases and LayerNorms")] = (
        0.01
    )
    max_grad_norm: Annotated[float | None, Help("training", "gradients are clipped to it")] = 1.0
    train_only: Annotated[Trained, Help("training", "which parameters learn")] = "all"
    frozen: Annotated[
        str | None,
        Help("training", "regular expression of parameters that do not, in place of --train-only"),
    ] = None
    seed: Annotated[int, Help("training", "of dropout and of the order of the data")] = 0

    mesh: Annotated[
        dict[str, int], Help("devices", f"devices along {', '.join(AXES)}", "all along data")
    ] = dataclasses.field(default_factory=dict)
    devices: Annotated[int | None, Help("devices", "use the first N devices", "all")] = None

    evaluate_every: Annotated[
        int | None, Help("run", "steps between evaluations", "those of an epoch")
    ] = None
    eval_batch_size: Annotated[int | None, Help("run", "rows at once", "those of a microbatch")] = (
        None
    )
    save_every: Annotated[
        int | None, Help("run", "steps between checkpoints", "as --evaluate-every")
    ] = None
    keep: Annotated[int, Help("run", "how many of the last checkpoints stay")] = 2
    best: Annotated[
        str | None,
        Help("run", "score whose best model goes to OUTPUT/best", "eval_loss with --eval-data"),
    ] = None
    tensorboard: Annotated[bool, Help("run", "write event files to OUTPUT/log too")] = False

    def __post_init__(self):
        for name, value in _coerced_all(vars(self)).items():
            object.__setattr__(self, name, value)
        for name in ("steps", "epochs", "batch_size", "accumulate", "max_length", "devices"):
            _at_least(1, name, getattr(self, name))
        for name in ("evaluate_every", "eval_batch_size", "save_every", "keep"):
            _at_least(1, name, getattr(self, name))
        for name in ("seed", "stride", "learning_rate", "weight_decay", "max_grad_norm"):
            _at_least(0, name, getattr(self, name))
        for name, known in (
            ("columns", [f.name for f in dataclasses.fields(Columns)]),
            ("mesh", AXES),
            ("lsg", _LSG_NAMES),
        ):
            check_names(name, getattr(self, name), known)
        self._check_choices()
        self._check_evaluation()

    def _check_choices(self) -> None:
        if self.epochs and self.steps:
            raise ValueError(f"epochs={self.epochs} and steps={self.steps}: give one of them.")
        if self.frozen is not None and self.train_only != "all":
            raise ValueError(
                f"frozen={self.frozen!r} and train_only={self.train_only!r}: give one of them."
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of accumulate={self.accumulate}, the "
                "microbatches that it is cut into."
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is a share of the steps, from 0 to below 1.")

    def _check_evaluation(self) -> None:
        if self.eval_data is None:
            for name in ("best", "evaluate_every", "eval_batch_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r} needs eval_data.")
            return
        kind = self.problem_type if self.task == "sequence_classification" else self.task
        known = ("eval_loss", *(f"eval_{name}" for name in SCORES[kind]))
        if self.best is not None and self.best not in known:
            raise ValueError(
                f"best={self.best!r} is none of the scores of {kind}: {', '.join(known)}."
            )
        if self.save_every and (self.evaluate_every or self.save_every) % self.save_every:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} must be a multiple of save_every="
                f"{self.save_every}: only a model that is saved can turn out to be the best."
            )

    @property
    def judged_by(self) -> str | None:
        """The score that chooses the best model."""
        return self.best or ("eval_loss" if self.eval_data is not None else None)

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether `judged_by` is best at its highest or lowest."""
        return "min" if self.judged_by in _LOWER_IS_BETTER else "max"

    @property
    def microbatch_size(self) -> int:
        """Rows that go through the model at once."""
        return self.batch_size // self.accumulate

    @property
    def frozen_paths(self) -> str | None:
        """The regular expression of what stays as it is."""
        return self.frozen if self.frozen is not None else FROZEN[self.train_only]

    def steps_of(self, epoch_length: Callable[[int], int]) -> int:
        """How many steps the run has; `epoch_length` counts those of so many epochs."""
        return self.steps or epoch_length(self.epochs or _EPOCHS)


def read_settings(
    file: str | os.PathLike | None, given: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from a YAML file, those in `given` in place of the file's; the entries of the
    mappings `columns`, `lsg` and `mesh` one by one.

    Args:
        file: None takes `given` alone.
        given: values by the names of `Settings`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no YAML mapping, unknown or missing names, and as
            `Settings`.
    """
    values = {} if file is None else _read_yaml(pathlib.Path(file))
    known = [f.name for f in dataclasses.fields(Settings)]
    check_names("settings" if file is None else str(file), values, known)
    for name, value in (given or {}).items():
        before = values.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = {**before, **value}
        values[name] = value
    check_names("settings", values, known)
    missing = [
        f.name
        for f in dataclasses.fields(Settings)
        if f.default is f.default_factory is dataclasses.MISSING and values.get(f.name) is None
    ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be given"
            + (" as flags or in a YAML file." if file is None else f", as flags or in {file}.")
        )
    return Settings(**_coerced_all(values))


def check_names(where: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError for an unknown name, with the known one that is nearest."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{where}: {name!r} is unknown; {hint}Known are {', '.join(known)}.")


def _read_yaml(file: pathlib.Path) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; give a YAML file with settings.")
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} must hold lines such as 'model: ./bert-4096', but holds a "
            f"{type(values).__name__}."
        )
    return values


def _at_least(least: int, name: str, value: int | float | None) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def _coerced_all(values: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(Settings)
    return {name: _coerced(name, value, hints[name]) for name, value in values.items()}


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """The value as its annotation wants it, or a ValueError that says what it should be."""
    kind: Any
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value is None and types.NoneType in parts:
            return None
        rest = [part for part in parts if part is not types.NoneType]
        if len(rest) > 1:  # a text, or several
            rest = [str] if isinstance(value, str | os.PathLike) else rest[1:]
        return _coerced(name, value, rest[0])
    if kind is Literal:
        if value not in parts:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, parts))}.")
        return value
    if kind is tuple and isinstance(value, list | tuple) and value:
        return tuple(_coerced(name, item, parts[0]) for item in value)
    if kind is dict and isinstance(value, Mapping):
        return {str(key): _coerced(f"{name}.{key}", v, parts[1]) for key, v in value.items()}
    if kind is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if kind is float and not isinstance(value, bool):
        try:
            number = float(str(value))  # YAML takes 1e-4, without a dot, for a text
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    if kind is Any or (kind in (int, bool) and type(value) is kind):
        return value
    wanted = {
        tuple: "a list of at least one",
        dict: "a mapping of names to values",
        str: "a text",
        float: "a number",
        int: "a whole number",
        bool: "true or false",
    }
    raise ValueError(f"{name}={value!r} must be {wanted[kind]}.")
