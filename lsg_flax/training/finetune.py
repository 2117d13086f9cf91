"""Fine-tuning from files to a checkpoint, as one function: `finetune(Settings(...))`.

It is what `lsg-flax train` runs, and a script to start one's own from: every step is a call of the
library. OUTPUT gets config.json, model.safetensors and the tokenizer, as `from_pretrained` and
`pipeline` read them; OUTPUT/best the best model; OUTPUT/checkpoints and OUTPUT/log what
training.fit writes. The same settings again continue a run that was interrupted.
"""

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
    eval_batches,
    files_at,
    labels_for,
    load_examples,
    train_batches,
)
from lsg_flax.files import check_folder, lies_in
from lsg_flax.models import TASKS, Model, ModelConfig, Params
from lsg_flax.patterns import LSGConfig
from lsg_flax.progress import say
from lsg_flax.sharding import check_batches, make_mesh
from lsg_flax.training.flops import train_flops
from lsg_flax.training.log import SCORED
from lsg_flax.training.loop import Evaluation, fit
from lsg_flax.training.metrics import evaluate
from lsg_flax.training.pictures import draw_run
from lsg_flax.training.scores import Scores, make_rouge_scorer
from lsg_flax.training.settings import Settings, Words
from lsg_flax.training.source import SourceModel, open_source
from lsg_flax.training.states import (
    Saving,
    best_step,
    check_settings,
    locked_for_run,
    restore_state,
    saved_steps,
)
from lsg_flax.training.step import TrainState, init_state, make_train_step
from lsg_flax.training.written import writing_options, written_scores


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
        FloatingPointError, training.Preempted, training.SaveError: as `training.fit`.
    """
    output, mesh = pathlib.Path(settings.output), mesh_of(settings.devices, settings.mesh)
    if settings.predict_with_generate:
        make_rouge_scorer()
        if jax.process_count() > 1:
            raise ValueError(
                f"predict_with_generate=True writes in one process, not {jax.process_count()}; "
                "leave it out, and write with the finished model (lsg-flax summarize)."
            )
    source = source_for(settings)
    _check_output(output, source.checkpoint, (settings.train_data, settings.eval_data))
    if settings.cache is not None:
        _check_cache(pathlib.Path(settings.cache), source.checkpoint, settings.train_data)
    with locked_for_run(output):
        return _run(settings, source, mesh, progress=progress, begins=begins)


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
    lengths = training_buckets(settings.buckets, source.length, source.config)
    options, tokenizer = options_for(settings, source), source.tokenizer
    if settings.writes_targets:
        tokenizer = source.reader(settings.src_lang, settings.tgt_lang)
    train, held_out = load_data(settings, options, tokenizer, progress)
    for data in filter(None, (train, held_out)):
        source.check_tokens(data)
    if progress:
        _say_cut(train, options)
    dtype, head = jnp.dtype(settings.dtype).type, _head_for(train, options)
    model, params = source.load(head, settings.lsg, dtype, mesh)
    model = model.clone(remat=settings.remat)

    # ------------------------------------------------------------- the run
    size, eval_size = settings.microbatch_size, settings.eval_batch_size
    buckets = buckets_for(lengths, settings.max_length, model, (size, eval_size), mesh)
    ladders = {INPUT: buckets, TARGET: settings.target_buckets}
    ladders = {name: lengths for name, lengths in ladders.items() if lengths is not None}
    same = {"buckets": ladders, "seed": settings.seed}
    batches = train_batches(train, batch_size=size, microbatches=settings.accumulate, **same)
    steps, every = settings.steps_of(batches.steps), settings.evaluate_every or batches.steps(1)
    optimizer = settings.optimizer(steps)
    state = init_state(params, optimizer, jax.random.key(settings.seed), mesh=mesh)
    del params  # the state has its own copy
    sizes = {"batch_size": eval_size or size} | same
    writing = _writing(settings, model, held_out, sizes, tokenizer, mesh)
    evaluation = _evaluation(model, held_out, sizes, every, mesh, writing)
    identity = settings.identity | _contents(model, steps, train, held_out)
    saving = settings.saving(output / "checkpoints", every, identity)
    flops = functools.partial(train_flops, model)
    log = settings.logging(output / "log", steps, flops=flops, progress=progress)
    smoothing = {"label_smoothing": settings.label_smoothing}
    step = make_train_step(model, optimizer, settings.accumulate, **smoothing)
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
    return _result(output, source, saving, model, state, last, history)


def _say_cut(train: TokenizedDataset, options: DataOptions) -> None:
    words = train.cut.words(options.max_length)
    if words and jax.process_index() == 0:
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
    best = _save_best(output / "best", saving, model, state, source)
    _save(output, model, state.params, source)
    scores = {name: value for name, value in last.items() if name.startswith(SCORED)}
    return Finetuned(output, model, state.params, int(state.step), scores, best, history)


def source_for(settings: Settings) -> SourceModel:
    """The checkpoint to begin with; raises ValueError if it lacks what is to be trained, or cannot
    have the pattern that is asked for."""
    length, convert = settings.max_length, settings.convert
    source = open_source(settings.model, settings.task, length, convert=convert)
    if settings.train_only == "global_tokens_and_head":
        source.check_globals()
    if settings.writes_targets:
        source.check_targets(settings.max_target_length)
    if source.converts:
        dataclasses.replace(source.config.lsg or LSGConfig(), **settings.lsg)
    else:
        source.checkpoint.config_for(settings.task, **settings.lsg)
    for name in ("buckets", "target_buckets"):
        lengths = getattr(settings, name)
        if lengths and max(lengths) > source.reads:
            raise ValueError(
                f"{name}={list(lengths)} must be lengths in 1..{source.reads}, what "
                f"{settings.model} reads."
            )
    return source


def options_for(settings: Settings, source: SourceModel) -> DataOptions:
    """How rows are read. A head that is trained further keeps its labels, if the data has no
    others; else the data's own count."""
    segments, head = source.config.segments > 1, source.labels
    options = settings.data_options(source.length, head, token_type_ids=segments)
    if options.has_target_texts and options.max_target_length is None:
        options = dataclasses.replace(options, max_target_length=source.reads)
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
    learned = load(settings.train_data, options, split=settings.train_split)
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


def _evaluation(
    model: Model,
    data: TokenizedDataset | None,
    sizes: dict[str, Any],
    every: int,
    mesh: Mesh | None,
    writing: Callable[[Params], Scores],
) -> Evaluation | None:
    """Scores on held-out data in batches of `sizes`, with those of `writing`; None without data."""
    if data is None:
        return None
    batches = eval_batches(data, **sizes)

    def scores(state: TrainState) -> Scores:
        return evaluate(model, state.params, batches, mesh=mesh) | writing(state.params)

    return Evaluation(scores, every)


def _writing(
    settings: Settings,
    model: Model,
    data: TokenizedDataset | None,
    sizes: dict[str, Any],
    tokenizer: hub.Tokenizer,
    mesh: Mesh | None,
) -> Callable[[Params], Scores]:
    """What is scored of the texts that the model writes, checked; nothing where none are asked."""
    if not settings.predict_with_generate or data is None:
        return lambda params: {}
    given, longest = settings.generation, settings.max_target_length
    return functools.partial(
        written_scores,
        model,
        batches=eval_batches(data, rows=settings.generation_rows, **sizes),
        tokenizer=tokenizer,
        options=writing_options(model, tokenizer, given, longest),
        mesh=mesh,
    )


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


def _check_output(
    output: pathlib.Path, source: hub.Checkpoint, data: tuple[Words | None, ...]
) -> None:
    """OUTPUT is new, or that of an earlier call; nothing in it is read as data, or will be."""
    check_folder("output", output)
    for words in data:
        for file in files_at(words or ()):
            if lies_in(file, output):
                raise ValueError(
                    f"output={output} holds the data file {file}; give a folder without data."
                )
        for path in [words] if isinstance(words, str) else words or ():
            folder = pathlib.Path(path)
            if folder.is_dir() and folder.resolve() in (place := output.resolve(), *place.parents):
                raise ValueError(
                    f"output={output} lies in the data {path}, whose files would then be more with "
                    "each step; give another folder."
                )
    if output.is_dir() and any(output.samefile(place) for place in (source.root, source.folder)):
        raise ValueError(f"output={output} is the model to train; give another folder.")
    there = sorted(file.name for file in output.iterdir()) if output.is_dir() else []
    taken = [name for name in there if name == "best" or hub.is_model_file(name)]
    if taken and not saved_steps(output / "checkpoints"):
        raise ValueError(
            f"output={output} holds a model that this run has not made ({', '.join(taken)}); give "
            "another folder."
        )


def _check_cache(cache: pathlib.Path, source: hub.Checkpoint, data: Words) -> None:
    """The cache is a folder of its own."""
    places = [source.root, source.folder, *(file.parent for file in files_at(data))]
    for place in places:
        if cache.resolve() == place.resolve():
            raise ValueError(
                f"cache={cache} holds the model or the data; give a folder of its own, or leave it "
                "out."
            )


def _save_best(
    folder: pathlib.Path, saving: Saving, model: Model, state: TrainState, source: SourceModel
) -> int | None:
    """Writes the best model; the step that it is of, None where nothing judges."""
    if saving.best is None:
        return None
    step = best_step(saving.folder, saving.best, mode=saving.mode)
    chosen = restore_state(saving.folder, state, step=step)
    _save(folder, model, chosen.params, source)
    return step


def _save(folder: pathlib.Path, model: Model, params: Params, source: SourceModel) -> None:
    """Writes a checkpoint, by the first process; all of them give their shards."""
    first = jax.process_index() == 0
    if jax.process_count() > 1:  # one after the other, and the others keep nothing
        params = jax.tree.map(functools.partial(_gathered, kept=first), params)
    if first:
        hub.save_pretrained(folder, model, params, source.tokenizer, source=source.checkpoint)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _gathered(leaf: Any, *, kept: bool) -> np.ndarray | None:
    whole = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(whole) if kept else None
