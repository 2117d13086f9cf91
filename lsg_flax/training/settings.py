"""What a fine-tuning run is told: one dataclass whose fields are the keys of a YAML file and the
flags of `lsg-flax train`. Every field says what it means where it stands."""

import dataclasses
import pathlib
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import optax

from lsg_flax.checks import short
from lsg_flax.data import Columns, DataOptions, OnError, TextUnit
from lsg_flax.generation import OPTION_NAMES
from lsg_flax.hub import check_repository
from lsg_flax.models import SCORES, TASKS, ProblemType, Remat
from lsg_flax.patterns import LSGConfig
from lsg_flax.sharding import AXES, check_axes
from lsg_flax.training.coerce import check_names, coerced
from lsg_flax.training.embedding_settings import COSINE, EMBEDDING_NAMES, EmbeddingSettings
from lsg_flax.training.help import of_data, of_devices, of_model, of_run, of_training
from lsg_flax.training.log import Logging
from lsg_flax.training.losses import smooths
from lsg_flax.training.optimizers import Schedule, make_optimizer, make_schedule, read_schedule
from lsg_flax.training.packing import check_packed
from lsg_flax.training.refinements import Refinements, Trained
from lsg_flax.training.scores import ROUGE
from lsg_flax.training.states import BestMode, Saving

Precision = Literal["float32", "bfloat16"]
Words = str | tuple[str, ...]

# Fields that change where and how a run works, and not what it computes: a run may be continued
# with others. The data is known by its contents.
_MAY_CHANGE = (
    *("output", "cache", "train_data", "eval_data", "devices", "mesh", "evaluate_every"),
    *("eval_batch_size", "save_every", "keep", "best", "tensorboard", "remat"),
    *("log_every", "picture", "push_to_hub"),
    *("predict_with_generate", "generation", "generation_rows"),
    *("early_stopping_patience", "early_stopping_threshold", "report_to", "run_name"),
)
# Fields for texts to write. Like those below they came later: runs that are older have none.
_FOR_TARGETS = ("max_target_length", "target_buckets", "src_lang", "tgt_lang")
_LATER = (
    *(*_FOR_TARGETS, "label_smoothing", "class_weights", "layerwise_lr_decay", "ema_decay"),
    *("lora_r", "lora_alpha", "lora_target_modules"),
)
_LOWER_IS_BETTER = ("eval_loss", "eval_mse", "eval_perplexity")
_EPOCHS = 3
LARGEST_SEED = 2**32 - 1  # JAX would drop what is beyond without a word
_LARGEST = 2**31 - 1  # of a count on the device
_LEAST = {
    1: (
        *("steps", "epochs", "batch_size", "accumulate", "max_length", "devices"),
        *("evaluate_every", "eval_batch_size", "save_every", "keep", "log_every"),
        *("max_target_length", "generation_rows", "lora_r", "early_stopping_patience"),
    ),
    0: ("stride", "learning_rate", "weight_decay", "max_grad_norm", "early_stopping_threshold"),
}
# How texts are written to be scored: whether, and what else is said of it. A row has one text.
_WRITTEN = ("predict_with_generate", "generation", "generation_rows")
_OPTIONS = [name for name in OPTION_NAMES if name != "num_return_sequences"]
_LSG_HINTS: dict[str, Any] = typing.get_type_hints(LSGConfig)


def trained_tasks() -> tuple[str, ...]:
    """The tasks that are trained from files: those whose rows can be read."""
    return tuple(name for name, task in TASKS.items() if task.is_trained and task.examples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Refinements, EmbeddingSettings):
    """A fine-tuning run; what each field means stands beside it and in `lsg-flax train --help`.

    A value may be what YAML makes of it: a list for a tuple, "1e-4" for a number.

    Raises:
        ValueError: for a value that is not allowed, and for values that exclude each other.
    """

    model: Annotated[str, of_model("folder with tokenizer, or id on the Hugging Face hub")]
    train_data: Annotated[
        Words,
        of_data(".jsonl, .csv, .parquet or .txt files, a folder, a pattern, or a dataset's name"),
    ]
    output: Annotated[
        str, of_run("folder for the model, checkpoints/ and log/; to resume, run again")
    ]
    task: Annotated[str, of_model("what the model learns", choices=trained_tasks)]

    eval_data: Annotated[Words | None, of_data("held-out data, as --train-data")] = None
    subset: Annotated[str | None, of_data("of a dataset: second argument of load_dataset")] = None
    train_split: Annotated[str, of_data("of a dataset, for training")] = "train"
    eval_split: Annotated[str, of_data("of a dataset, for evaluation")] = "validation"
    columns: Annotated[
        dict[str, str], of_data("what columns are called, such as text=body", "their usual names")
    ] = dataclasses.field(default_factory=dict)
    labels: Annotated[
        tuple[str, ...] | None,
        of_data("names in the order of their numbers", "those in the data, sorted"),
    ] = None
    problem_type: Annotated[ProblemType, of_data("of sequence_classification")] = (
        "single_label_classification"
    )
    max_length: Annotated[
        int | None, of_data("tokens of a row", "what the model was trained at, or reads")
    ] = None
    buckets: Annotated[
        tuple[int, ...] | None,
        of_data("lengths of rows, with --packing one", "powers of two from 512, --max-length"),
    ] = None
    max_target_length: Annotated[
        int | None,
        of_data("conditional_generation: tokens of a target", "what the model's decoder reads"),
    ] = None
    target_buckets: Annotated[
        tuple[int, ...] | None,
        of_data("lengths that targets are padded to", "powers of two from 512, the longest target"),
    ] = None
    src_lang: Annotated[
        str | None, of_data("language of the texts, such as mBART's en_XX", "the tokenizer's")
    ] = None
    tgt_lang: Annotated[str | None, of_data("language of the targets", "the tokenizer's")] = None
    packing: Annotated[bool, of_data("several texts, kept apart, in each row")] = False
    stride: Annotated[int, of_data("question_answering: tokens that windows share")] = 128
    pack: Annotated[bool, of_data("language models: join texts to rows of --max-length")] = True
    text_unit: Annotated[TextUnit, of_data("what is a text in .txt files")] = "line"
    on_error: Annotated[OnError, of_data("what a broken row does")] = "raise"
    cache: Annotated[
        str | None, of_data("folder that keeps tokens", "lsg_flax in the user's cache")
    ] = None

    convert: Annotated[bool, of_model("give it LSG attention and --max-length positions first")] = (
        False
    )
    lsg: Annotated[
        dict[str, Any], of_model("attention pattern, such as num_global_tokens=7", "the model's")
    ] = dataclasses.field(default_factory=dict)
    dtype: Annotated[Precision, of_model("of the computation; parameters are float32")] = "float32"
    remat: Annotated[Remat, of_model("what the backward pass recomputes to save memory")] = "none"

    epochs: Annotated[
        int | None, of_training("passes over the data", f"{_EPOCHS}, or what --steps says")
    ] = None
    steps: Annotated[int | None, of_training("optimizer steps, in place of --epochs")] = None
    batch_size: Annotated[int, of_training("rows per step, over all devices and microbatches")] = 8
    accumulate: Annotated[int, of_training("microbatches that the rows of a step are cut into")] = 1
    learning_rate: Annotated[float, of_training("peak learning rate, which warmup rises to")] = 5e-5
    schedule: Annotated[Schedule, of_training("of the learning rate, after warmup")] = "linear"
    warmup: Annotated[float, of_training("share of the steps in which the rate rises")] = 0.1
    weight_decay: Annotated[float, of_training("of AdamW; not for biases and LayerNorms")] = 0.01
    label_smoothing: Annotated[
        float, of_training("share of each label that goes to all classes evenly")
    ] = 0.0
    max_grad_norm: Annotated[float | None, of_training("gradients are clipped to it")] = 1.0
    train_only: Annotated[Trained, of_training("which parameters learn")] = "all"
    frozen: Annotated[
        str | None,
        of_training("regular expression of parameters that do not, in place of --train-only"),
    ] = None
    seed: Annotated[int, of_training("of dropout and of the order of the data")] = 0

    mesh: Annotated[
        dict[str, int], of_devices(f"devices along {', '.join(AXES)}", "all along data")
    ] = dataclasses.field(default_factory=dict)
    devices: Annotated[int | None, of_devices("use the first N devices", "all")] = None

    evaluate_every: Annotated[
        int | None, of_run("steps between evaluations", "those of an epoch")
    ] = None
    eval_batch_size: Annotated[int | None, of_run("rows at once", "those of a microbatch")] = None
    save_every: Annotated[
        int | None, of_run("steps between checkpoints", "as --evaluate-every")
    ] = None
    keep: Annotated[int, of_run("how many of the last checkpoints stay")] = 2
    best: Annotated[
        str | None,
        of_run("score whose best model goes to OUTPUT/best", "eval_loss with --eval-data"),
    ] = None
    predict_with_generate: Annotated[
        bool, of_run("conditional_generation: score what the model writes for --eval-data by ROUGE")
    ] = False
    generation: Annotated[
        dict[str, Any],
        of_run("how it is written: options of generate, such as num_beams=4", "the checkpoint's"),
    ] = dataclasses.field(default_factory=dict)
    generation_rows: Annotated[
        int | None, of_run("it is written for the first N rows of --eval-data", "all")
    ] = None
    log_every: Annotated[
        int | None,
        of_run(
            "steps between lines of progress: loss, tokens/s, time left, memory",
            "one every ten seconds, where there is no terminal",
        ),
    ] = None
    picture: Annotated[
        bool, of_run("draw loss, scores, learning rate and lengths: OUTPUT/log/run.png")
    ] = True
    push_to_hub: Annotated[
        str | None, of_run("repository of the hub, such as me/areas, that gets the best model")
    ] = None
    tensorboard: Annotated[bool, of_run("write event files to OUTPUT/log too")] = False

    @classmethod
    def for_data(cls, *, model: str, task: str, data: Words, **given: Any) -> "Settings":
        """Settings to read `data` for a model that is there; nothing is trained or written."""
        places: dict[str, Any] = {"train_data": data, "eval_data": data, "output": "."}
        return cls(model=model, task=task, **coerced_values(places | given))

    def __post_init__(self):
        for name, value in coerced_values(vars(self)).items():
            object.__setattr__(self, name, value)
        self._check_numbers()
        check_names("columns", self.columns, [f.name for f in dataclasses.fields(Columns)])
        check_names("mesh", self.mesh, AXES)
        check_axes(self.mesh)
        self._check_pattern()
        self._check_choices()
        if self.packing:
            check_packed(self.task, self.problem_type, self.mesh.get("sequence", 1))
        self._check_evaluation()
        self._check_targets()
        self._check_embedding()
        self.data_options(self.max_length or 1, None, token_type_ids=False)

    def _check_pattern(self) -> None:
        """Each value by itself; whether they fit together, the model's pattern decides."""
        check_names("lsg", self.lsg, list(_LSG_HINTS))
        plain = LSGConfig(sparse_block_size=0, sparsity_factor=0)
        for name, value in self.lsg.items():
            if (name, value) != ("sparsity_type", None):  # which stands for "none"
                coerced(f"lsg.{name}", value, _LSG_HINTS[name])
            if name != "sparsity_factor":  # fits a block size or does not
                dataclasses.replace(plain, **{name: value})

    def _check_numbers(self) -> None:
        for least, names in _LEAST.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"{name}={short(value)} must be at least {least}.")
                if value is not None and value > _LARGEST:
                    raise ValueError(f"{name}={short(value)} must be at most {_LARGEST}.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed={short(self.seed)} must lie in 0..{LARGEST_SEED}.")
        for name in ("buckets", "target_buckets"):
            lengths = getattr(self, name)
            if lengths and not 1 <= min(lengths) <= max(lengths) <= _LARGEST:
                raise ValueError(f"{name}={list(lengths)} must be lengths of at least 1.")
        if self.max_grad_norm == 0:
            raise ValueError(
                "max_grad_norm=0 would clip every gradient to nothing; give a positive number, or "
                "null in a YAML file to clip none."
            )

    def _check_choices(self) -> None:
        if self.task not in trained_tasks():
            raise ValueError(f"task={self.task!r} must be one of {', '.join(trained_tasks())}.")
        if self.frozen is not None:
            try:
                re.compile(self.frozen)
            except re.error as error:
                raise ValueError(
                    f"frozen={self.frozen!r} is no regular expression: {error}."
                ) from error
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub)
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
        task, scorer = TASKS[self.task], TASKS[self.task].scorer_for(self.problem_type)
        kind = self.problem_type if task.scorer == "problem_type" else self.task
        scores = () if scorer is None else SCORES[scorer]
        scores = (*scores, *(ROUGE if self.predict_with_generate else ()))
        scores = (*scores, *((COSINE,) if self.teacher is not None else ()))
        known = ("eval_loss", *(f"eval_{name}" for name in scores))
        if self.best is not None and self.best not in known:
            more = {f"eval_{name}" for name in ROUGE if self.writes_targets}
            hint = "; ROUGE needs predict_with_generate" if self.best in more else ""
            raise ValueError(
                f"best={self.best!r} is none of the scores of {kind}: {', '.join(known)}{hint}."
            )
        if self.save_every and (self.evaluate_every or self.save_every) % self.save_every:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} must be a multiple of save_every="
                f"{self.save_every}: only a model that is saved can turn out to be the best."
            )

    def _check_targets(self) -> None:
        """What is for tasks with texts to write, and what scores such texts."""
        given = [name for name in _FOR_TARGETS if getattr(self, name) is not None]
        given += [name for name in _WRITTEN if getattr(self, name)]
        if given and not self.writes_targets:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} is for tasks with a text to write, not "
                f"{self.task}; leave it out."
            )
        check_names("generation", self.generation, _OPTIONS)
        for name in _WRITTEN[1:]:
            if getattr(self, name) and not self.predict_with_generate:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} says how texts are written for eval_data; "
                    "set predict_with_generate too."
                )
        if self.predict_with_generate and self.eval_data is None:
            raise ValueError("predict_with_generate=True needs eval_data to write texts for.")
        targets, named_labels = TASKS[self.task].targets, TASKS[self.task].named_labels
        smoothed = bool(targets) and all(smooths(t, self.problem_type) for t in targets)
        named, evaluates = smoothed and named_labels, self.eval_data is not None
        self.check_refinements(self.frozen, has_classes=named, evaluates=evaluates)
        if not 0 <= self.label_smoothing < 1 or (self.label_smoothing and not smoothed):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must be from 0 to below 1, and 0 for "
                f"labels that are no classes, as those of {self.task} may be."
            )

    @property
    def writes_targets(self) -> bool:
        """Whether the task has texts to write."""
        return TASKS[self.task].examples == "text_to_text"

    @property
    def ladder(self) -> tuple[int, ...] | None:
        """The lengths that rows of one text are padded to."""
        return None if self.packing else self.buckets

    @property
    def microbatch_size(self) -> int:
        """Rows that go through the model at once."""
        return self.batch_size // self.accumulate

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a run this run: it can be continued only with the same."""
        values = dataclasses.asdict(self)
        unset = [n for n in (*_LATER, "packing", *EMBEDDING_NAMES) if not values[n]]
        return {n: value for n, value in values.items() if n not in (*_MAY_CHANGE, *unset)}

    def data_options(
        self, length: int, labels: tuple[str, ...] | None, *, token_type_ids: bool
    ) -> DataOptions:
        """How rows become examples of at most `length` tokens; `labels` are the model's own."""
        names = ("task", "problem_type", "stride", "text_unit", "on_error")
        named = self.problem_type != "regression"
        return DataOptions(
            max_length=length,
            labels=self.labels or (labels if named else None),
            token_type_ids=token_type_ids,
            columns=Columns(**self.columns),
            max_target_length=self.max_target_length,
            with_labels=self.teacher is None,
            pack=self.pack and not self.packing,
            **{name: getattr(self, name) for name in names},
        )

    def optimizer(self, steps: int, unused: str | None = None) -> optax.GradientTransformation:
        """AdamW for a run of so many steps; `unused` matches parameters that nothing reads."""
        frozen = self.frozen or self.stays(self.train_only)
        return make_optimizer(
            self.learning_rate,
            **self._schedule(steps),
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            frozen="|".join(filter(None, (frozen, unused))) or None,
            layerwise_lr_decay=self.layerwise_lr_decay,
            ema_decay=self.ema_decay,
        )

    def _schedule(self, steps: int) -> dict[str, Any]:
        warmup = min(round(self.warmup * steps), steps - 1)
        return {"total_steps": steps, "warmup_steps": warmup, "schedule": self.schedule}

    def logging(self, folder: pathlib.Path, steps: int, **more: Any) -> Logging:
        """What a run of so many steps tells of itself, and writes to `folder`."""
        rates = make_schedule(self.learning_rate, **self._schedule(steps))
        options = {"every": self.log_every, "learning_rate": read_schedule(rates)} | more
        options["reporting"] = self.reporting()
        return Logging(folder, self.tensorboard, **options)

    def saving(self, folder: pathlib.Path, every: int, identity: dict[str, Any]) -> Saving:
        """Saves in `folder`, each time that `every` steps are done if nothing else is said."""
        best, mode = self.judged_by
        return Saving(folder, self.save_every or every, self.keep, best, mode, identity)

    @property
    def judged_by(self) -> tuple[str | None, BestMode]:
        """The score that says which model is better, and whether "max" or "min" of it is."""
        best = self.best or ("eval_loss" if self.eval_data is not None else None)
        return best, "min" if best in _LOWER_IS_BETTER else "max"

    def steps_of(self, epoch_length: Callable[[int], int]) -> int:
        """How many steps the run has; `epoch_length` counts those of so many epochs."""
        return self.steps or epoch_length(self.epochs or _EPOCHS)


REQUIRED = tuple(
    field.name
    for field in dataclasses.fields(Settings)
    if field.default is field.default_factory is dataclasses.MISSING
)


def coerced_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of `Settings`, of the types that those have; raises ValueError."""
    hints = typing.get_type_hints(Settings)
    return {name: coerced(name, value, hints[name]) for name, value in values.items()}
