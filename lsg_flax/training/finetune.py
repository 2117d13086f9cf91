"""Fine-tuning from files to a checkpoint, as one function: `finetune(Settings(...))`.

It is what `lsg-flax train` runs, and a script to start one's own from: every step is a call of the
library. OUTPUT gets config.json, model.safetensors and the tokenizer, as `from_pretrained` and
`pipeline` read them; OUTPUT/best the best model; OUTPUT/checkpoints and OUTPUT/log what
training.fit writes. The same settings again continue a run that was interrupted.
"""

import contextlib
import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lsg_flax import hub
from lsg_flax.buckets import default_buckets
from lsg_flax.data import (
    INPUT,
    TARGET,
    DataOptions,
    TokenizedDataset,
    TrainBatches,
    labels_for,
    load_examples,
    train_batches,
)
from lsg_flax.models import TASKS, Model, ModelConfig, Params
from lsg_flax.patterns import LSGConfig
from lsg_flax.progress import say
from lsg_flax.sharding import check_batches, make_mesh
from lsg_flax.training.card import check_publishing, publish
from lsg_flax.training.embedding_settings import EMBEDDING
from lsg_flax.training.embedding_source import (
    check_negatives,
    check_queries,
    embedding_ladders,
    no_pooler_needed,
    with_sentences,
)
from lsg_flax.training.flops import train_flops
from lsg_flax.training.learning import learns_answers, learns_vectors
from lsg_flax.training.log import SCORED
from lsg_flax.training.loop import Evaluation, fit
from lsg_flax.training.lora import add_lora
from lsg_flax.training.optimizers import layer_rates
from lsg_flax.training.packing import packing_for
from lsg_flax.training.pictures import draw_run
from lsg_flax.training.places import check_cache_folder, check_run_folder
from lsg_flax.training.reports import Reporting
from lsg_flax.training.scores import make_rouge_scorer
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel, open_source
from lsg_flax.training.states import (
    Saving,
    best_step,
    check_settings,
    locked_for_run,
    restore_state,
    saved_steps,
)
from lsg_flax.training.step import TrainState, init_state, trained_params


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
        pushed: the address on the hub of what was sent there.
    """

    output: pathlib.Path
    model: Model
    params: Params
    step: int
    scores: dict[str, float]
    best: int | None
    history: list[dict[str, Any]]
    pushed: str | None = None


def finetune(
    settings: Settings, *, progress: bool = True, begins: Callable[[], None] = lambda: None
) -> Finetuned:
    """Fine-tunes a checkpoint on files, or continues to.

    With several processes (after `jax.distributed.initialize()`) all of them call it, with the same
    settings and one OUTPUT that all can write to.

    Args:
        settings: the run.
        progress: show bars.
        begins: called once, when all is checked and loaded and the first step is next.

    Returns:
        The model, and how it did.

    Raises:
        FileNotFoundError: for a model or data that are not there.
        ValueError: for settings that do not fit the model, the data, the devices, or the run in
            OUTPUT that would be continued.
        OSError: if another run writes to OUTPUT.
        ImportError: without what the settings need.
        hub.PushError: if the model, which lies in OUTPUT by then, was not sent to the hub.
        FloatingPointError, training.Preempted, training.SaveError: as `training.fit`.
    """
    check_packages(settings)
    output, mesh = pathlib.Path(settings.output), mesh_of(settings.devices, settings.mesh)
    if settings.predict_with_generate and jax.process_count() > 1:
        raise ValueError(
            f"predict_with_generate=True writes in one process, not {jax.process_count()}; "
            "leave it out, and write with the finished model (lsg-flax summarize)."
        )
    source = source_for(settings)
    check_run_folder(output, source.checkpoint, (settings.train_data, settings.eval_data))
    if settings.cache is not None:
        check_cache_folder(pathlib.Path(settings.cache), source.checkpoint, settings.train_data)
    check_publishing(settings)
    with locked_for_run(output):
        return _run(settings, source, mesh, progress=progress, begins=begins)


def check_packages(settings: Settings) -> None:
    """Raises ImportError for what a run needs besides lsg_flax, and is not installed."""
    settings.reporting()
    if settings.tensorboard:
        Reporting(("tensorboard",))
    if settings.predict_with_generate:
        make_rouge_scorer()


def _run(
    settings: Settings,
    source: SourceModel,
    mesh: Mesh | None,
    *,
    progress: bool,
    begins: Callable[[], None],
) -> Finetuned:
    """The run, in a folder that is its own."""
    # ------------------------------------------------------------- what there is to work with
    output = pathlib.Path(settings.output)
    options, tokenizer = options_for(settings, source), source.tokenizer
    if settings.writes_targets:
        tokenizer = source.reader(settings.src_lang, settings.tgt_lang)
    train, held_out = load_data(settings, options, tokenizer, progress)
    for data in filter(None, (train, held_out)):
        source.check_tokens(data)
    _say_cut(train, options, shown=progress)
    dtype, head = jnp.dtype(settings.dtype).type, _head_for(train, options)
    with no_pooler_needed() if source.sentences else contextlib.nullcontext():
        model, params = source.load(head, settings.lsg, dtype, mesh)
    model = model.clone(remat=settings.remat)

    # ------------------------------------------------------------- the run
    size = settings.microbatch_size
    ladders = _ladders(settings, source, model, (train, held_out), mesh)
    same: dict[str, Any] = {"buckets": ladders, "seed": settings.seed}
    batches = _batches(settings, source, model, train, same)
    steps, every = settings.steps_of(batches.steps), settings.evaluate_every or batches.steps(1)
    unused = "^pooler/" if source.sentences and "pooler" in params else None
    optimizer, key = settings.optimizer(steps, unused), jax.random.key(settings.seed)
    if settings.lora is not None:
        params = add_lora(params, settings.lora, jax.random.split(key)[1], mesh=mesh)
    state = init_state(params, optimizer, key, mesh=mesh)
    del params  # the state has its own copy
    sizes = {"batch_size": settings.eval_batch_size or size} | same
    learns = learns_vectors if source.sentences else learns_answers
    step_by, scores = learns(settings, source, model, held_out, sizes, tokenizer, mesh)
    when = every, settings.stopping(*settings.judged_by)
    evaluation = scores and Evaluation(lambda state: scores(trained_params(state)), *when)
    identity = settings.identity | _contents(model, steps, train, held_out)
    saving = settings.saving(output / "checkpoints", every, identity)
    flops = functools.partial(train_flops, model)
    log = settings.logging(output / "log", steps, flops=flops, progress=progress)
    step = step_by(optimizer)
    run = {"steps": steps, "mesh": mesh, "microbatches": settings.accumulate > 1}
    run |= {"evaluation": evaluation, "saving": saving, "logging": log}
    if saved_steps(saving.folder):
        check_settings(saving.folder, identity)  # `fit` does too, but then the run has begun
    begins()
    state, history = fit(step, state, batches, **run)
    batches.close()
    if settings.picture and jax.process_index() == 0:
        draw_run(output / "log", train.lengths, batches.buckets)
    last = history[-1] if history else {}
    if evaluation is not None and not history:  # the run had ended before
        last = evaluation.function(state)
    result = _result(output, source, saving, model, state, last, history)
    pushed = publish(settings, source, train, result.step, result.best)
    return dataclasses.replace(result, pushed=pushed)


def _say_cut(train: TokenizedDataset, options: DataOptions, *, shown: bool) -> None:
    words = train.cut.words(options.max_length)
    if shown and words and jax.process_index() == 0:
        say(words)


def _result(
    output: pathlib.Path,
    source: SourceModel,
    saving: Saving,
    model: Model,
    state: TrainState,
    last: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> Finetuned:
    """What was trained, saved; `last` are the values of the last step."""
    best, params = _save_best(output / "best", saving, model, state, source), trained_params(state)
    _save(output, model, params, source)
    scores = {name: value for name, value in last.items() if name.startswith(SCORED)}
    return Finetuned(output, model, params, int(state.step), scores, best, history)


def source_for(settings: Settings) -> SourceModel:
    """The checkpoint to begin with; raises ValueError if it lacks what is to be trained, or cannot
    have the pattern that is asked for."""
    length, convert = settings.max_length, settings.convert
    source = open_source(settings.model, settings.task, length, convert=convert)
    if settings.task == EMBEDDING:
        source = with_sentences(settings, source)
    if settings.train_only == "global_tokens_and_head":
        source.check_globals()
    if settings.writes_targets:
        source.check_targets(settings.max_target_length)
    lsg = pattern_for(settings, source)
    if settings.packing:
        packing_for(source, lsg, settings.buckets)
    if settings.lora is not None or settings.layerwise_lr_decay is not None:
        task = source.model_task
        _check_tree(settings, Model(source.checkpoint.config_for(task), task))
    for name, lengths in (
        ("buckets", settings.ladder),
        ("target_buckets", settings.target_buckets),
    ):
        if lengths and max(lengths) > source.reads:
            raise ValueError(
                f"{name}={list(lengths)} must be lengths in 1..{source.reads}, what "
                f"{settings.model} reads."
            )
    return source


def _check_tree(settings: Settings, model: Model) -> None:
    """Raises ValueError for modules that the model lacks, and layers without an order."""
    params = model.abstract_params()
    if settings.lora is not None:
        settings.lora.kernels(params)
    if settings.layerwise_lr_decay is not None:
        layer_rates(params, settings.layerwise_lr_decay)


def pattern_for(settings: Settings, source: SourceModel) -> LSGConfig | None:
    """The pattern that is trained; raises ValueError for one that there cannot be."""
    if source.converts:
        return dataclasses.replace(source.config.lsg or LSGConfig(), **settings.lsg)
    return source.checkpoint.config_for(source.model_task, **settings.lsg).lsg


def options_for(settings: Settings, source: SourceModel) -> DataOptions:
    """How rows are read. A head that is trained further keeps its labels, if the data has no
    others; else the data's own count."""
    segments, head = source.config.segments > 1, source.labels
    options = settings.data_options(source.length, head, token_type_ids=segments)
    if source.sentences is not None:
        lower = source.sentences.do_lower_case
        return dataclasses.replace(options, token_type_ids=False, lower_case=lower)
    options = source.with_target_length(options)
    if head is None or settings.labels or options.labels is None:
        return options
    part = {"subset": settings.subset, "split": settings.train_split}
    labels = labels_for(settings.train_data, options, head, **part)
    if labels != head and len(labels) == len(head):
        warnings.warn(
            f"{source.name} has a head for the labels {', '.join(head)}; training goes on from its "
            f"weights, with those of the data in their place: {', '.join(labels)}.",
            stacklevel=3,
        )
    return dataclasses.replace(options, labels=labels)


def load_data(
    settings: Settings, options: DataOptions, tokenizer: hub.Tokenizer, progress: bool
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """What is learned from and, if given, what is held out, with the same labels."""
    load = functools.partial(
        load_examples,
        tokenizer=tokenizer,
        subset=settings.subset,
        cache=settings.cache,
        progress=progress and jax.process_index() == 0,
    )
    settings.weights_of(options.labels)  # before reading, where the labels are known
    learned = load(settings.train_data, options, split=settings.train_split)
    settings.weights_of(learned.labels)
    if settings.eval_data is None:
        return learned, None
    if options.label_column is not None:
        options = dataclasses.replace(options, labels=learned.labels)
    if options.problem_type == "regression":
        options = dataclasses.replace(options, width=learned.arrays["labels"].shape[1])
    return learned, load(settings.eval_data, options, split=settings.eval_split)


def _head_for(data: TokenizedDataset, options: DataOptions) -> dict[str, Any]:
    """Fields of the config that make a head for the labels of the data."""
    task = TASKS[options.task]
    if not task.named_labels:
        return {}
    by_problem = any(target.loss == "problem_type" for target in task.targets)
    values = {"problem_type": options.problem_type} if by_problem else {}
    if options.problem_type == "regression":
        return values | {"num_labels": data.arrays["labels"].shape[1]}
    return values | {"labels": data.labels}


def _ladders(
    settings: Settings,
    source: SourceModel,
    model: Model,
    data: tuple[TokenizedDataset, TokenizedDataset | None],
    mesh: Mesh | None,
) -> dict[str, tuple[int, ...]]:
    """The lengths that training data is padded to, by stream where they are not left to it; raises
    ValueError for rows that cannot be learned from, or that the mesh cannot cut."""
    if source.sentences is not None:
        found = embedding_ladders(settings, source, data[0], mesh)
        check_negatives(settings, data[0], found)
        check_queries(settings, data[1])
        return found
    lengths = training_buckets(settings.ladder, source.length, source.config)
    sizes = (settings.microbatch_size, settings.eval_batch_size)
    buckets = buckets_for(lengths, settings.max_length, model, sizes, mesh)
    ladders = {INPUT: buckets, TARGET: settings.target_buckets}
    return {name: lengths for name, lengths in ladders.items() if lengths is not None}


def _batches(
    settings: Settings,
    source: SourceModel,
    model: Model,
    train: TokenizedDataset,
    padded: dict[str, Any],
) -> TrainBatches:
    """Microbatches of padded rows, or of rows that several texts share."""
    packed: dict[str, Any] = {"seed": settings.seed}
    if settings.packing:
        packed["packing"] = packing_for(source, model.config.lsg, settings.buckets)
    sizes = {"batch_size": settings.microbatch_size, "microbatches": settings.accumulate}
    return train_batches(train, **sizes, **(packed if settings.packing else padded))


def mesh_of(devices: int | None, axes: dict[str, int]) -> Mesh | None:
    """The mesh of the first `devices`, by default all; None on a single one."""
    every = jax.devices()
    count = devices or len(every)
    if count > len(every) or (count < len(every) and jax.process_count() > 1):
        raise ValueError(
            f"devices={count}, but there are {len(every)} of {jax.process_count()} processes; "
            "choose at most as many, and all of them where there are several processes."
        )
    mesh = make_mesh(**axes, devices=every[:count])
    return None if count == 1 and jax.process_count() == 1 else mesh


def training_buckets(
    given: tuple[int, ...] | None, longest: int, config: ModelConfig
) -> tuple[int, ...] | None:
    """The lengths of batches that a model is trained on, by default those that it can be; None
    where it trains on all, for the data to choose. Raises ValueError for lengths that it cannot."""
    unit = config.training_unit
    if given is None and unit > 1:
        given = tuple(sorted({-(-length // unit) * unit for length in default_buckets(longest)}))
    for length in given or ():
        config.check_training_length(length)
    return given


def buckets_for(
    given: tuple[int, ...] | None,
    max_length: int | None,
    model: Model,
    rows: tuple[int, int | None],
    mesh: Mesh | None,
) -> tuple[int, ...] | None:
    """The lengths of batches; raises for what the mesh cannot cut, before anything is compiled."""
    if mesh is None:
        return given
    length, lsg = max_length or model.max_length, model.config.lsg
    # A text that is short for the shards of a long sequence is padded to what they need.
    usual = (length,) if mesh.shape["sequence"] > 1 else default_buckets(length)
    named = zip(("batch_size", "eval_batch_size"), rows, strict=True)
    sizes = {name: size for name, size in named if size is not None}
    check_batches(mesh, sizes, given or usual, lsg and lsg.needs_padding)
    return given or usual


def _contents(
    model: Model, steps: int, train: TokenizedDataset, held_out: TokenizedDataset | None
) -> dict[str, Any]:
    """What belongs to the identity of a run beside its settings."""
    return {
        "steps": steps,
        "config": model.config.to_dict(),
        "contents_of_train_data": train.fingerprint,
        "contents_of_eval_data": None if held_out is None else held_out.fingerprint,
    }


def _save_best(
    folder: pathlib.Path, saving: Saving, model: Model, state: TrainState, source: SourceModel
) -> int | None:
    """Writes the best model; the step that it is of, None where nothing judges."""
    if saving.best is None:
        return None
    step = best_step(saving.folder, saving.best, mode=saving.mode)
    chosen = restore_state(saving.folder, state, step=step)
    _save(folder, model, trained_params(chosen), source)
    return step


def _save(folder: pathlib.Path, model: Model, params: Params, source: SourceModel) -> None:
    """Writes a checkpoint, by the first process; all of them give their shards."""
    first = jax.process_index() == 0
    if jax.process_count() > 1:  # one after the other, and the others keep nothing
        params = jax.tree.map(functools.partial(_gathered, kept=first), params)
    if first:
        parts, origin = (model, params, source.tokenizer), {"source": source.checkpoint}
        if source.sentences is None:
            hub.save_pretrained(folder, *parts, **origin)
        else:
            hub.save_sentence_model(folder, *parts, source.sentences, **origin)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _gathered(leaf: Any, *, kept: bool) -> np.ndarray | None:
    whole = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(whole) if kept else None
