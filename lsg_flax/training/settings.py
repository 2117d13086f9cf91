"""Settings of a fine-tuning run: one dataclass whose fields are the keys of a YAML file and the
flags of `lsg-flax train`. The help text of each field stands beside it."""

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

# Fields that change where and how a run works, but not what it computes: a run may be resumed with
# other values. Data is compared by its contents.
_MAY_CHANGE = (
    *("output", "cache", "train_data", "eval_data", "devices", "mesh", "evaluate_every"),
    *("eval_batch_size", "save_every", "keep", "best", "tensorboard", "remat"),
    *("log_every", "picture", "push_to_hub"),
    *("predict_with_generate", "generation", "generation_rows"),
    *("early_stopping_patience", "early_stopping_threshold", "report_to", "run_name"),
)
# Fields of tasks that generate text. Like those below they were added later: older runs lack them.
_FOR_TARGETS = ("max_target_length", "target_buckets", "src_lang", "tgt_lang")
_LATER = (
    *(*_FOR_TARGETS, "label_smoothing", "class_weights", "layerwise_lr_decay", "ema_decay"),
    *("lora_r", "lora_alpha", "lora_target_modules"),
)
_LOWER_IS_BETTER = ("eval_loss", "eval_mse", "eval_perplexity")
_EPOCHS = 3
LARGEST_SEED = 2**32 - 1  # JAX would silently drop higher bits
_LARGEST = 2**31 - 1  # counts are int32 on the device
_LEAST = {
    1: (
        *("steps", "epochs", "batch_size", "accumulate", "max_length", "devices"),
        *("evaluate_every", "eval_batch_size", "save_every", "keep", "log_every"),
        *("max_target_length", "generation_rows", "lora_r", "early_stopping_patience"),
    ),
    0: ("stride", "learning_rate", "weight_decay", "max_grad_norm", "early_stopping_threshold"),
}
# Fields that say whether and how texts are generated to be scored, one text per row.
_WRITTEN = ("predict_with_generate", "generation", "generation_rows")
_OPTIONS = [name for name in OPTION_NAMES if name != "num_return_sequences"]
_LSG_HINTS: dict[str, Any] = typing.get_type_hints(LSGConfig)


def trained_tasks() -> tuple[str, ...]:
    """Returns the tasks that can be trained from files: those whose rows can be read."""
    return tuple(name for name, task in TASKS.items() if task.is_trained and task.examples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Refinements, EmbeddingSettings):
    """Settings of a fine-tuning run; the help text beside each field is also in
    `lsg-flax train --help`.

    Values may have the types that YAML gives: a list for a tuple, "1e-4" for a number.

    Raises:
        ValueError: for a value that is not allowed, and for values that exclude each other.
    """

    model: Annotated[str, of_model("folder with model and tokenizer, or Hugging Face hub id")]
    train_data: Annotated[
        Words,
        of_data(".jsonl, .csv, .parquet or .txt files, a folder, a pattern, or a dataset's name"),
    ]
    output: Annotated[
        str, of_run("folder for the model, checkpoints/ and log/; run again to resume")
    ]
    task: Annotated[str, of_model("task that the model is trained for", choices=trained_tasks)]

    eval_data: Annotated[Words | None, of_data("held-out data, given as --train-data")] = None
    subset: Annotated[str | None, of_data("subset (configuration) of a hub dataset")] = None
    train_split: Annotated[str, of_data("split of a hub dataset, for training")] = "train"
    eval_split: Annotated[str, of_data("split of a hub dataset, for evaluation")] = "validation"
    columns: Annotated[
        dict[str, str],
        of_data(
            "names of the columns, such as text=body",
            "text, label, ...; the end of `lsg-flax train --help` lists them",
        ),
    ] = dataclasses.field(default_factory=dict)
    labels: Annotated[
        tuple[str, ...] | None,
        of_data("names of the labels, in the order of their ids", "those in the data, sorted"),
    ] = None
    problem_type: Annotated[ProblemType, of_data("kind of sequence_classification")] = (
        "single_label_classification"
    )
    max_length: Annotated[
        int | None,
        of_data("maximum tokens of a row; longer texts are truncated", "the model's own limit"),
    ] = None
    buckets: Annotated[
        tuple[int, ...] | None,
        of_data(
            "lengths in tokens that rows are padded to; with --packing exactly one",
            "powers of two from 512, then --max-length",
        ),
    ] = None
    max_target_length: Annotated[
        int | None,
        of_data("conditional_generation: maximum tokens of a target", "what the decoder reads"),
    ] = None
    target_buckets: Annotated[
        tuple[int, ...] | None,
        of_data(
            "lengths in tokens that targets are padded to",
            "powers of two from 512, then the longest",
        ),
    ] = None
    src_lang: Annotated[
        str | None, of_data("language of the texts, such as mBART's en_XX", "the tokenizer's")
    ] = None
    tgt_lang: Annotated[str | None, of_data("language of the targets", "the tokenizer's")] = None
    packing: Annotated[
        bool, of_data("pack several texts into each row; they do not see each other")
    ] = False
    stride: Annotated[int, of_data("question_answering: tokens that consecutive windows share")] = (
        128
    )
    pack: Annotated[bool, of_data("language models: join texts to rows of --max-length")] = True
    text_unit: Annotated[TextUnit, of_data("what counts as one text in .txt files")] = "line"
    on_error: Annotated[OnError, of_data("what to do with a broken row")] = "raise"
    cache: Annotated[
        str | None, of_data("folder that keeps tokenized data", "lsg_flax in the user's cache")
    ] = None

    convert: Annotated[
        bool, of_model("first convert the model to LSG attention and --max-length positions")
    ] = False
    lsg: Annotated[
        dict[str, Any], of_model("LSG attention, such as num_global_tokens=7", "the model's")
    ] = dataclasses.field(default_factory=dict)
    dtype: Annotated[Precision, of_model("dtype of the computation; parameters are float32")] = (
        "float32"
    )
    remat: Annotated[Remat, of_model("what the backward pass recomputes to save memory")] = "none"

    epochs: Annotated[
        int | None, of_training("passes over the data", f"{_EPOCHS}, unless --steps is given")
    ] = None
    steps: Annotated[int | None, of_training("optimizer steps, instead of --epochs")] = None
    batch_size: Annotated[int, of_training("rows per step, over all devices and microbatches")] = 8
    accumulate: Annotated[int, of_training("microbatches that a step's rows are split into")] = 1
    learning_rate: Annotated[float, of_training("peak learning rate, reached after warmup")] = 5e-5
    schedule: Annotated[Schedule, of_training("learning rate after warmup")] = "linear"
    warmup: Annotated[float, of_training("share of the steps in which the rate rises")] = 0.1
    weight_decay: Annotated[
        float, of_training("weight decay of AdamW; biases and LayerNorms have none")
    ] = 0.01
    label_smoothing: Annotated[
        float, of_training("share of each label that is spread evenly over all classes")
    ] = 0.0
    max_grad_norm: Annotated[float | None, of_training("gradients are clipped to this norm")] = 1.0
    train_only: Annotated[Trained, of_training("which parameters are trained")] = "all"
    frozen: Annotated[
        str | None,
        of_training("regular expression of parameters to freeze, instead of --train-only"),
    ] = None
    seed: Annotated[int, of_training("seed of dropout and of the order of the data")] = 0

    mesh: Annotated[
        dict[str, int], of_devices(f"devices along the axes {', '.join(AXES)}", "all along data")
    ] = dataclasses.field(default_factory=dict)
    devices: Annotated[int | None, of_devices("use the first N devices", "all")] = None

    evaluate_every: Annotated[int | None, of_run("steps between evaluations", "one epoch")] = None
    eval_batch_size: Annotated[
        int | None, of_run("rows per batch of evaluation", "those of a microbatch")
    ] = None
    save_every: Annotated[
        int | None, of_run("steps between checkpoints", "as --evaluate-every")
    ] = None
    keep: Annotated[int, of_run("how many of the last checkpoints to keep")] = 2
    best: Annotated[
        str | None,
        of_run("score that chooses the model in OUTPUT/best", "eval_loss with --eval-data"),
    ] = None
    predict_with_generate: Annotated[
        bool, of_run("conditional_generation: score generated texts for --eval-data by ROUGE")
    ] = False
    generation: Annotated[
        dict[str, Any],
        of_run("options of generate for these texts, such as num_beams=4", "the checkpoint's"),
    ] = dataclasses.field(default_factory=dict)
    generation_rows: Annotated[
        int | None, of_run("generate only for the first N rows of --eval-data", "all")
    ] = None
    log_every: Annotated[
        int | None,
        of_run(
            "steps between lines of progress: loss, tokens/s, time left, memory",
            "a line every ten seconds if there is no terminal",
        ),
    ] = None
    picture: Annotated[
        bool, of_run("draw loss, scores, learning rate and lengths to OUTPUT/log/run.png")
    ] = True
    push_to_hub: Annotated[
        str | None, of_run("hub repository, such as me/areas, to push the best model to")
    ] = None
    tensorboard: Annotated[bool, of_run("write TensorBoard files to OUTPUT/log too")] = False

    @classmethod
    def for_data(cls, *, model: str, task: str, data: Words, **given: Any) -> "Settings":
        """Returns settings to read `data` for a given model; nothing is trained or written."""
        places: dict[str, Any] = {"train_data": data, "eval_data": data, "output": "."}
        return cls(model=model, task=task, **coerced_values(places | given))

    def __post_init__(self):
        for name, value in coerced_values(vars(self)).items():
            object.__setattr__(self, name, value)
        self._check_numbers()
        check_names(
            "columns (as in text=body)", self.columns, [f.name for f in dataclasses.fields(Columns)]
        )
        check_names("mesh", self.mesh, AXES)
        check_axes(self.mesh)
        self._check_pattern()
        self._check_choices()
        if self.packing:
            check_packed(self.task, self.mesh.get("sequence", 1))
        self._check_evaluation()
        self._check_targets()
        self._check_embedding()
        self.data_options(self.max_length or 1, None, token_type_ids=False)

    def _check_pattern(self) -> None:
        """Checks each value of `lsg` on its own; whether they fit together depends on the model."""
        check_names("lsg", self.lsg, list(_LSG_HINTS))
        plain = LSGConfig(sparse_block_size=0, sparsity_factor=0)
        for name, value in self.lsg.items():
            if (name, value) != ("sparsity_type", None):  # which stands for "none"
                coerced(f"lsg.{name}", value, _LSG_HINTS[name])
            if name != "sparsity_factor":  # its check needs the model's block size
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
            raise ValueError(f"seed={short(self.seed)} must be in 0..{LARGEST_SEED}.")
        for name in ("buckets", "target_buckets"):
            lengths = getattr(self, name)
            if lengths and not 1 <= min(lengths) <= max(lengths) <= _LARGEST:
                raise ValueError(f"{name}={list(lengths)} must be lengths of at least 1.")
        if self.max_grad_norm == 0:
            raise ValueError(
                "max_grad_norm=0 would clip every gradient to 0; give a positive number, or null "
                "in a YAML file to turn clipping off."
            )

    def _check_choices(self) -> None:
        if self.task not in trained_tasks():
            raise ValueError(f"task={self.task!r} must be one of {', '.join(trained_tasks())}.")
        if self.frozen is not None:
            try:
                re.compile(self.frozen)
            except re.error as error:
                raise ValueError(
                    f"frozen={self.frozen!r} is not a regular expression: {error}."
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
                f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}, "
                "the number of microbatches that it is split into."
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup={self.warmup} must be a share of the steps, at least 0 and below 1."
            )

    def _check_evaluation(self) -> None:
        if self.eval_data is None:
            for name in ("best", "evaluate_every", "eval_batch_size"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs eval_data; give eval_data, or leave "
                        f"{name} out."
                    )
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
                f"best={self.best!r} must be one of the scores of {kind}: {', '.join(known)}{hint}."
            )
        if self.save_every and (self.evaluate_every or self.save_every) % self.save_every:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} must be a multiple of save_every="
                f"{self.save_every}: only a saved model can become the best one."
            )

    def _check_targets(self) -> None:
        """Checks what is only for tasks that generate text, how that is scored, and refinements."""
        given = [name for name in _FOR_TARGETS if getattr(self, name) is not None]
        given += [name for name in _WRITTEN if getattr(self, name)]
        if given and not self.writes_targets:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} is for tasks that generate text, such as "
                f"conditional_generation, not {self.task}; leave it out."
            )
        check_names("generation", self.generation, _OPTIONS)
        for name in _WRITTEN[1:]:
            if getattr(self, name) and not self.predict_with_generate:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for texts that are generated for "
                    "eval_data; set predict_with_generate too."
                )
        if self.predict_with_generate and self.eval_data is None:
            raise ValueError("predict_with_generate=True needs eval_data; give eval_data too.")
        targets, named_labels = TASKS[self.task].targets, TASKS[self.task].named_labels
        smoothed = bool(targets) and all(smooths(t, self.problem_type) for t in targets)
        named, evaluates = smoothed and named_labels, self.eval_data is not None
        self.check_refinements(self.frozen, has_classes=named, evaluates=evaluates)
        if not 0 <= self.label_smoothing < 1 or (self.label_smoothing and not smoothed):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must be at least 0 and below 1, and 0 for "
                f"labels that are not classes, as those of {self.task} may be."
            )

    @property
    def writes_targets(self) -> bool:
        """Whether the task generates text, such as summaries."""
        return TASKS[self.task].examples == "text_to_text"

    @property
    def ladder(self) -> tuple[int, ...] | None:
        """The lengths in tokens that rows of one text each are padded to; None with packing."""
        return None if self.packing else self.buckets

    @property
    def microbatch_size(self) -> int:
        """Number of rows that go through the model at once."""
        return self.batch_size // self.accumulate

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that must be the same to resume a run."""
        values = dataclasses.asdict(self)
        unset = [n for n in (*_LATER, "packing", *EMBEDDING_NAMES) if not values[n]]
        return {n: value for n, value in values.items() if n not in (*_MAY_CHANGE, *unset)}

    def data_options(
        self, length: int, labels: tuple[str, ...] | None, *, token_type_ids: bool
    ) -> DataOptions:
        """Returns how rows become examples of at most `length` tokens; `labels` are the model's."""
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
        """Returns AdamW for a run of `steps` steps; `unused` matches parameters that nothing
        reads, which are frozen too."""
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
        """Returns what a run of `steps` steps shows, and logs to `folder`."""
        rates = make_schedule(self.learning_rate, **self._schedule(steps))
        options = {"every": self.log_every, "learning_rate": read_schedule(rates)} | more
        options["reporting"] = self.reporting()
        return Logging(folder, self.tensorboard, **options)

    def saving(self, folder: pathlib.Path, every: int, identity: dict[str, Any]) -> Saving:
        """Returns how checkpoints are saved: every `save_every` steps, by default `every`."""
        best, mode = self.judged_by
        return Saving(folder, self.save_every or every, self.keep, best, mode, identity)

    @property
    def judged_by(self) -> tuple[str | None, BestMode]:
        """The score that decides which model is best, and whether its "max" or its "min" is."""
        best = self.best or ("eval_loss" if self.eval_data is not None else None)
        return best, "min" if best in _LOWER_IS_BETTER else "max"

    def steps_of(self, epoch_length: Callable[[int], int]) -> int:
        """Returns the number of steps of the run; `epoch_length` counts the steps of N epochs."""
        return self.steps or epoch_length(self.epochs or _EPOCHS)


REQUIRED = tuple(
    field.name
    for field in dataclasses.fields(Settings)
    if field.default is field.default_factory is dataclasses.MISSING
)


def coerced_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values, by the names of `Settings`, in the types of its fields; raises ValueError."""
    hints = typing.get_type_hints(Settings)
    return {name: coerced(name, value, hints[name]) for name, value in values.items()}
