"""Fine-tuning from files to a checkpoint, as one function: `finetune(Settings(...))`.

It is what `lsg-flax train` runs, and a script to start one's own from: every step is a call of the
library. OUTPUT gets config.json, model.safetensors and the tokenizer, as `from_pretrained` and
`pipeline` read them; OUTPUT/best the best model; OUTPUT/checkpoints and OUTPUT/log what
training.fit writes. The same settings again continue a run that was interrupted.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lsg_flax import hub
from lsg_flax.buckets import default_buckets
from lsg_flax.data import (
    LABELLED,
    Columns,
    DataOptions,
    TokenizedDataset,
    eval_batches,
    load_examples,
    train_batches,
)
from lsg_flax.hub import LSGOptions
from lsg_flax.models import EncoderConfig, Model, Params, family_of
from lsg_flax.sharding import check_batches, make_mesh, shard
from lsg_flax.training import metrics
from lsg_flax.training.log import train_flops
from lsg_flax.training.loop import TrainState, fit, init_state, make_train_step
from lsg_flax.training.optimizers import make_optimizer
from lsg_flax.training.settings import Settings
from lsg_flax.training.states import best_step, restore_state, saved_steps

# Settings that change where and how a run works, and not what it computes: a run may be continued
# with others. The data is known by its contents, see `_identity`.
_MAY_CHANGE = (
    *("output", "cache", "train_data", "eval_data", "devices", "mesh", "evaluate_every"),
    *("eval_batch_size", "save_every", "keep", "best", "tensorboard", "remat"),
)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """What a run gives.

    Attributes:
        output: the folder with the last model.
        model, params: the last model; the parameters lie on the run's mesh.
        step: how many steps it was trained.
        scores: of the last model on `eval_data`; empty without.
        best: the step of the model in OUTPUT/best; None without `eval_data`.
        history: one dict per step that this call ran, see `training.fit`.
    """

    output: pathlib.Path
    model: Model
    params: Params
    step: int
    scores: dict[str, float]
    best: int | None
    history: list[dict[str, Any]]


def finetune(settings: Settings, *, progress: bool = True) -> Finetuned:
    """Fine-tunes a checkpoint on files, or continues to.

    With several processes (after `jax.distributed.initialize()`) all of them call it, with the same
    settings and one OUTPUT that all can write to.

    Args:
        settings: the run.
        progress: show bars.

    Returns:
        The model, and how it did.

    Raises:
        FileNotFoundError: for a model or data that are not there.
        ValueError: for settings that do not fit the model, the data, the devices, or the run in
            OUTPUT that would be continued.
        FloatingPointError, training.Preempted, checkpoints.SaveError: as `training.fit`.
    """
    # ------------------------------------------------------------- what there is to work with
    output = pathlib.Path(settings.output)
    mesh = _mesh(settings)
    source = _Source(settings)
    _check_output(output, source.folder)
    train, held_out = _data(settings, source, progress=progress)

    # ------------------------------------------------------------- model
    model, params = source.load(settings, train, mesh)
    buckets = _buckets(settings, model, mesh)
    evaluate = None
    if held_out is not None:
        evaluate = functools.partial(_evaluate, settings, model, held_out, buckets, mesh)

    # ------------------------------------------------------------- the run
    batches = train_batches(
        train,
        batch_size=settings.microbatch_size,
        microbatches=settings.accumulate,
        buckets=buckets,
        seed=settings.seed,
    )
    steps = settings.steps_of(batches.steps)
    optimizer = _optimizer(settings, steps)
    state = init_state(params, optimizer, jax.random.key(settings.seed), mesh=mesh)
    del params  # the state has its own copy
    identity = _identity(settings, model, steps, train, held_out)
    options = {"steps": steps, "mesh": mesh, "settings": identity, "progress": progress}
    options |= _fit_options(settings, output, model, epoch=batches.steps(1))
    step = make_train_step(model, optimizer, settings.accumulate)
    state, history = fit(step, state, batches, evaluate=evaluate, **options)
    batches.close()

    # ------------------------------------------------------------- results
    best = _save_best(settings, output, model, state, source.tokenizer)
    _save(output, model, state.params, source.tokenizer)
    scores = {}
    if evaluate is not None:  # a run that had ended before has no history
        last = history[-1] if history else evaluate(state)
        scores = {name: value for name, value in last.items() if name.startswith("eval_")}
    return Finetuned(output, model, state.params, int(state.step), scores, best, history)


class _Source:
    """The checkpoint that a run begins with.

    Attributes:
        folder, config, tokenizer: what it is.
        reads: how many tokens it can read.
        length: how many a row of the run has at most.
        converts: whether it gets LSG attention, or more positions, first.
    """

    def __init__(self, settings: Settings):
        self.folder = hub.resolve(settings.model)
        self.values = hub.read_config(self.folder)
        self.config = EncoderConfig.from_dict(self.values)
        family_of(self.config.model_type).head(settings.task)  # raises for one it does not have
        self.reads = Model(self.config, settings.task).max_length
        plain = self.config.lsg is None
        usual = LSGOptions.max_sequence_length if settings.convert and plain else self.reads
        self.length = settings.max_length or usual
        self.converts = settings.convert and (plain or self.length > self.reads)
        if self.length > self.reads and not settings.convert:
            raise ValueError(
                f"max_length={self.length}, but {settings.model} reads {self.reads} tokens; set "
                "convert (--convert) to make it read more here, or run lsg-flax convert "
                f"{settings.model} TARGET --max-sequence-length {self.length} and train TARGET."
            )
        if settings.train_only == "global_tokens_and_head" and plain and not self.converts:
            raise ValueError(
                f"train_only={settings.train_only!r}, but {settings.model} has full attention and "
                "no global tokens; set convert (--convert) to give it some."
            )
        self.tokenizer = hub.read_tokenizer(self.folder)
        if self.tokenizer is None:
            raise ValueError(
                f"{settings.model} has no tokenizer; put its files (tokenizer.json or vocab.txt, "
                "tokenizer_config.json) beside config.json."
            )
        self.tokenizer.model_max_length = max(self.length, self.reads)

    def options(self, settings: Settings) -> DataOptions:
        """How rows become examples for this model."""
        return DataOptions(
            settings.task,
            self.length,
            problem_type=settings.problem_type,
            labels=settings.labels or self._labels(settings),
            pack=settings.pack,
            stride=settings.stride,
            token_type_ids=self.config.type_vocab_size > 1,
            text_unit=settings.text_unit,
            on_error=settings.on_error,
            columns=Columns(**settings.columns),
        )

    def _labels(self, settings: Settings) -> tuple[str, ...] | None:
        """Of a head that is trained further, if it has names: their order is the head's."""
        family, labels = family_of(self.config.model_type), self.config.labels
        classes = self.values.get("architectures") or []
        trained = [family.task_of(name) for name in classes] == [settings.task]
        unnamed = all(label == f"LABEL_{number}" for number, label in enumerate(labels))
        if settings.task not in LABELLED or settings.problem_type == "regression":
            return None
        return labels if trained and not unnamed else None

    def load(
        self, settings: Settings, data: TokenizedDataset, mesh: Mesh | None
    ) -> tuple[Model, Params]:
        """The model to train, with a head for the labels of the data."""
        overrides: dict[str, Any] = {}
        if settings.task in LABELLED:
            overrides["labels"] = data.labels
        if settings.task == "sequence_classification":
            overrides["problem_type"] = settings.problem_type
            if settings.problem_type == "regression":
                del overrides["labels"]
                overrides["num_labels"] = data.arrays["labels"].shape[1]
        dtype = jnp.dtype(settings.dtype).type
        if not self.converts:
            overrides |= settings.lsg
            model, params = hub.from_pretrained(
                self.folder, settings.task, dtype=dtype, mesh=mesh, **overrides
            )
            return model.clone(remat=settings.remat), params
        model, params = hub.from_pretrained(self.folder, settings.task, dtype=dtype, **overrides)
        resize = self.config.lsg is not None
        model, params = hub.make_lsg(
            model,
            params,
            self.tokenizer,
            options=LSGOptions(self.length, resize_lsg=resize),
            pattern=settings.lsg,
        )
        params = params if mesh is None else shard(jax.device_get(params), mesh)
        return model.clone(remat=settings.remat), params


def _data(
    settings: Settings, source: _Source, *, progress: bool
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """What is learned from and, if given, what is held out, with the same labels."""
    options = source.options(settings)
    load = functools.partial(
        load_examples,
        tokenizer=source.tokenizer,
        subset=settings.subset,
        cache=settings.cache,
        progress=progress and jax.process_index() == 0,
    )
    train = load(settings.train_data, options, split=settings.train_split)
    if settings.eval_data is None:
        return train, None
    if options.label_column is not None:
        options = dataclasses.replace(options, labels=train.labels)
    return train, load(settings.eval_data, options, split=settings.eval_split)


def _optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    return make_optimizer(
        settings.learning_rate,
        total_steps=steps,
        warmup_steps=round(settings.warmup * steps),
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        frozen=settings.frozen_paths,
    )


def _fit_options(
    settings: Settings, output: pathlib.Path, model: Model, *, epoch: int
) -> dict[str, Any]:
    """Of `training.fit`: when is evaluated and saved, and where; `epoch` is one in steps."""
    every = settings.evaluate_every or epoch
    return {
        "microbatches": settings.accumulate > 1,
        "evaluate_every": None if settings.eval_data is None else every,
        "checkpoints": output / "checkpoints",
        "save_every": settings.save_every or every,
        "keep": settings.keep,
        "best": settings.judged_by,
        "mode": settings.mode,
        "log": output / "log",
        "tensorboard": settings.tensorboard,
        "flops": functools.partial(train_flops, model),
    }


def _evaluate(
    settings: Settings,
    model: Model,
    held_out: TokenizedDataset,
    buckets: tuple[int, ...] | None,
    mesh: Mesh | None,
    state: TrainState,
) -> dict[str, float]:
    size = settings.eval_batch_size or settings.microbatch_size
    rows = eval_batches(held_out, batch_size=size, buckets=buckets, seed=settings.seed)
    return metrics.evaluate(model, state.params, rows, mesh=mesh)


def _mesh(settings: Settings) -> Mesh | None:
    """None on a single device."""
    every = jax.devices()
    count = settings.devices or len(every)
    if count > len(every) or (count < len(every) and jax.process_count() > 1):
        raise ValueError(
            f"devices={count}, but there are {len(every)} of {jax.process_count()} processes; "
            "choose at most as many, and all of them where there are several processes."
        )
    mesh = make_mesh(**settings.mesh, devices=every[:count])
    return None if count == 1 and jax.process_count() == 1 else mesh


def _buckets(settings: Settings, model: Model, mesh: Mesh | None) -> tuple[int, ...] | None:
    """The lengths of batches; raises for what the mesh cannot cut, before anything is compiled."""
    if mesh is None:
        return settings.buckets
    shards = mesh.shape["sequence"]
    length = settings.max_length or model.max_length
    # A text that is short for the shards of a long sequence is padded to what they need.
    usual = (length,) if shards > 1 else default_buckets(length)
    buckets = settings.buckets or usual
    rows = {"batch_size": settings.microbatch_size}
    if settings.eval_batch_size is not None:
        rows["eval_batch_size"] = settings.eval_batch_size
    lsg = model.config.lsg
    check_batches(mesh, rows, buckets, lsg and lsg.needs_padding)
    return buckets


def _identity(
    settings: Settings,
    model: Model,
    steps: int,
    train: TokenizedDataset,
    held_out: TokenizedDataset | None,
) -> dict[str, Any]:
    """What makes a run this run: it can be continued only with the same."""
    values = dataclasses.asdict(settings)
    for name in _MAY_CHANGE:
        del values[name]
    values |= {"steps": steps, "epochs": settings.epochs, "config": model.config.to_dict()}
    values["contents_of_train_data"] = train.fingerprint
    values["contents_of_eval_data"] = held_out.fingerprint if held_out is not None else None
    return json.loads(json.dumps(values))


def _check_output(output: pathlib.Path, source: pathlib.Path) -> None:
    """OUTPUT is new, or that of an earlier call."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={output} is a file; give a folder, or a new name for one.")
    if output.is_dir() and output.samefile(source):
        raise ValueError(f"output={output} is the model to train; give another folder.")
    if (output / hub.CONFIG).exists() and not saved_steps(output / "checkpoints"):
        raise ValueError(
            f"output={output} holds a model that this run has not made; give another folder."
        )


def _save_best(
    settings: Settings,
    output: pathlib.Path,
    model: Model,
    state: TrainState,
    tokenizer: Any,
) -> int | None:
    """Writes OUTPUT/best; the step that it is of, None where nothing judges."""
    if settings.judged_by is None:
        return None
    step = best_step(output / "checkpoints", settings.judged_by, mode=settings.mode)
    chosen = restore_state(output / "checkpoints", state, step=step)
    _save(output / "best", model, chosen.params, tokenizer)
    return step


def _save(folder: pathlib.Path, model: Model, params: Params, tokenizer: Any) -> None:
    """Writes a checkpoint, by the first process; all of them give their shards."""
    first = jax.process_index() == 0
    if jax.process_count() > 1:  # one after the other, and the others keep nothing
        params = jax.tree.map(functools.partial(_gathered, kept=first), params)
    if first:
        hub.save_pretrained(folder, model, params, tokenizer)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _gathered(leaf: Any, *, kept: bool) -> np.ndarray | None:
    whole = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(whole) if kept else None
