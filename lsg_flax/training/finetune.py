"""Fine-tuning from data files to a checkpoint, as one function: `finetune(Settings(...))`.

`lsg-flax train` runs it. It is also a start for a script of your own: every step is a call of the
library. OUTPUT gets config.json, model.safetensors and the tokenizer, as `from_pretrained` and
`pipeline` read them; OUTPUT/best the best model; OUTPUT/checkpoints and OUTPUT/log what
training.fit writes. Calling it again with the same settings resumes an interrupted run.
"""

import contextlib
import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lsg_flax import hub
from lsg_flax.data import DataOptions, TokenizedDataset, train_batches
from lsg_flax.models import Model, Params
from lsg_flax.progress import count_of, say
from lsg_flax.training.card import check_publishing, publish
from lsg_flax.training.embedding_source import no_pooler_needed
from lsg_flax.training.flops import train_flops
from lsg_flax.training.learning import learns_answers, learns_vectors
from lsg_flax.training.log import SCORED
from lsg_flax.training.loop import Evaluation, fit
from lsg_flax.training.lora import add_lora
from lsg_flax.training.packing import packing_for
from lsg_flax.training.pictures import draw_run
from lsg_flax.training.places import check_cache_folder, check_run_folder
from lsg_flax.training.preparation import (
    Parts,
    check_packages,
    head_for,
    load_data,
    mesh_of,
    options_for,
    pattern_for,
    shapes_for,
    source_for,
    train_ladders,
)
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel
from lsg_flax.training.states import (
    Saving,
    best_step,
    check_settings,
    locked_for_run,
    restore_state,
    saved_steps,
    stored_settings,
)
from lsg_flax.training.step import TrainState, init_state, trained_params

# What must be the same to resume a run, but follows from its settings, its data and its model.
_FOLLOW = ("config", "contents_of_train_data", "contents_of_eval_data")


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """Result of a run.

    Attributes:
        output: folder with the last model.
        model, params: the last model; the parameters are sharded over the run's mesh.
        step: number of steps that the last model was trained.
        scores: scores of the last model on `eval_data`; empty without `eval_data`.
        best: the step of the model in OUTPUT/best; None without `eval_data`.
        history: one dict per step that this call ran, see `training.fit`.
        pushed: address of the pushed model on the hub; None if nothing was pushed.
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
    """Fine-tunes a checkpoint on data files, or resumes an interrupted run.

    With several processes (after `jax.distributed.initialize()`) all of them call it, with the same
    settings and one OUTPUT that all can write to.

    Args:
        settings: settings of the run.
        progress: show progress bars.
        begins: called once, when everything is checked and loaded, right before the first step.

    Returns:
        The trained model and its scores.

    Raises:
        FileNotFoundError: if the model or the data is missing.
        ValueError: if settings do not fit the model, the data, the devices, or the run in OUTPUT
            that would be resumed.
        OSError: if another run writes to OUTPUT.
        ImportError: if a package that the settings need is not installed.
        hub.PushError: if the model could not be pushed to the hub; it is in OUTPUT by then.
        FloatingPointError, training.Preempted, training.SaveError: as `training.fit`.
    """
    check_packages(settings)
    output, mesh = pathlib.Path(settings.output), mesh_of(settings.devices, settings.mesh)
    if settings.predict_with_generate and jax.process_count() > 1:
        raise ValueError(
            f"predict_with_generate=True works with one process, not {jax.process_count()}; leave "
            "it out and generate with the finished model (lsg-flax summarize)."
        )
    source = source_for(settings)
    check_run_folder(output, source.checkpoint, (settings.train_data, settings.eval_data))
    if settings.cache is not None:
        check_cache_folder(pathlib.Path(settings.cache), source.checkpoint, settings.train_data)
    check_publishing(settings)
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
    """Runs the training, in a folder that is locked for this run."""
    output = pathlib.Path(settings.output)
    (train, held_out), tokenizer, model, params = _load(settings, source, mesh, progress)
    size = settings.microbatch_size
    ladders = train_ladders(settings, source, model, (train, held_out), mesh)
    same = shapes_for(settings, source, model.config.lsg, ladders)
    batches = train_batches(train, batch_size=size, microbatches=settings.accumulate, **same)
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
    identity = settings.identity | _contents(settings, model, steps, train, held_out)
    saving = settings.saving(_checkpoints(settings), every, identity)
    flops = functools.partial(train_flops, model)
    log = settings.logging(output / "log", steps, flops=flops, progress=progress)
    step = step_by(optimizer)
    run = {"steps": steps, "mesh": mesh, "microbatches": settings.accumulate > 1}
    run |= {"evaluation": evaluation, "saving": saving, "logging": log}
    if saved := saved_steps(saving.folder):  # `fit` checks too, but only after `begins()`
        follows = _FOLLOW if settings.steps else (*_FOLLOW, "steps")
        check_settings(saving.folder, identity, follows=follows)
    begins()
    if saved and saved[-1] >= steps and progress and jax.process_index() == 0:
        done = count_of(steps, "step")
        say(f"already finished after {done}: nothing is trained; more steps need another OUTPUT")
    state, history = fit(step, state, batches, **run)
    batches.close()
    if settings.picture and jax.process_index() == 0:
        draw_run(output / "log", train.read_lengths, batches.buckets)
    last = history[-1] if history else {}
    if evaluation is not None and not history:  # the run was finished before this call
        last = evaluation.function(state)
    result = _result(output, source, saving, model, state, last, history)
    pushed = publish(settings, source, train, result.step, result.best)
    return dataclasses.replace(result, pushed=pushed)


def _load(
    settings: Settings, source: SourceModel, mesh: Mesh | None, progress: bool
) -> tuple[Parts, hub.Tokenizer, Model, Params]:
    """Loads the data, the tokenizer (with the languages of targets set), and the model."""
    options, tokenizer = options_for(settings, source), source.tokenizer
    if settings.writes_targets:
        tokenizer = source.reader(settings.src_lang, settings.tgt_lang)
    data = load_data(settings, options, tokenizer, progress)
    for part in filter(None, data):
        source.check_tokens(part)
    if progress and jax.process_index() == 0:
        _say_read(settings, source, data[0], options)
    dtype, head = jnp.dtype(settings.dtype).type, head_for(data[0], options)
    resumes = bool(saved_steps(_checkpoints(settings)))
    with _needed_warnings(source, resumes=resumes):
        model, params = source.load(head, settings.lsg, dtype, mesh)
    return data, tokenizer, model.clone(remat=settings.remat), params


def _checkpoints(settings: Settings) -> pathlib.Path:
    return pathlib.Path(settings.output) / "checkpoints"


@contextlib.contextmanager
def _needed_warnings(source: SourceModel, *, resumes: bool) -> Iterator[None]:
    """Suppresses warnings of weights that the run does not use: a pooler, or, if it resumes, those
    that its checkpoint replaces."""
    pooler = no_pooler_needed() if source.sentences else contextlib.nullcontext()
    with pooler, warnings.catch_warnings():
        if resumes:
            warnings.filterwarnings("ignore", "weights for task")
        yield


def _say_read(
    settings: Settings, source: SourceModel, train: TokenizedDataset, options: DataOptions
) -> None:
    """Prints what is truncated, and the length of packed rows if no setting gives it."""
    if words := train.cut.words(options.max_length):
        say(words)
    if settings.packing and settings.buckets is None:
        length = packing_for(source, pattern_for(settings, source), None).length
        say(f"packing: texts share rows of {length:,} tokens; buckets (--buckets) sets more")


def _result(
    output: pathlib.Path,
    source: SourceModel,
    saving: Saving,
    model: Model,
    state: TrainState,
    last: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> Finetuned:
    """Saves the trained models and returns the result; `last` are the values of the last step."""
    best, params = _save_best(output / "best", saving, model, state, source), trained_params(state)
    _save(output, model, params, source)
    scores = {name: value for name, value in last.items() if name.startswith(SCORED)}
    return Finetuned(output, model, params, int(state.step), scores, best, history)


def _contents(
    settings: Settings,
    model: Model,
    steps: int,
    train: TokenizedDataset,
    held_out: TokenizedDataset | None,
) -> dict[str, Any]:
    """Returns what, beside the settings, must be the same to resume a run."""
    parts = {"contents_of_train_data": train, "contents_of_eval_data": held_out}
    values = {"steps": steps, "config": model.config.to_dict()}
    values |= {name: part and part.fingerprint for name, part in parts.items()}
    stored = stored_settings(_checkpoints(settings))
    if stored is not None and "data" not in stored:  # a run that 0.2.0 has begun
        return values
    return values | {"data": {name: part and part.contents for name, part in parts.items()}}


def _save_best(
    folder: pathlib.Path, saving: Saving, model: Model, state: TrainState, source: SourceModel
) -> int | None:
    """Saves the best model and returns its step; None if no score decides which is best."""
    if saving.best is None:
        return None
    step = best_step(saving.folder, saving.best, mode=saving.mode)
    chosen = restore_state(saving.folder, state, step=step)
    _save(folder, model, trained_params(chosen), source)
    return step


def _save(folder: pathlib.Path, model: Model, params: Params, source: SourceModel) -> None:
    """Saves a checkpoint: all processes contribute their shards, the first one writes."""
    first = jax.process_index() == 0
    if jax.process_count() > 1:  # leaf by leaf; the other processes keep nothing
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
