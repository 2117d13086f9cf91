"""Evaluates a checkpoint on data files, as `lsg-flax evaluate` does."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lsg_flax.data import (
    INPUT,
    TARGET,
    Cut,
    DataOptions,
    EvalBatch,
    EvalBatches,
    eval_batches,
    load_examples,
    unknown_labels,
)
from lsg_flax.files import write_json
from lsg_flax.hub import open_checkpoint
from lsg_flax.models import TASKS
from lsg_flax.progress import Bar
from lsg_flax.training.answers import text_scorer
from lsg_flax.training.classes import ByClass, by_class
from lsg_flax.training.embedding import make_run
from lsg_flax.training.embedding_scores import EmbeddingScorer
from lsg_flax.training.embedding_settings import EMBEDDING
from lsg_flax.training.embedding_source import embedding_ladders, no_pooler_needed
from lsg_flax.training.learning import writing_of
from lsg_flax.training.log import SCORED
from lsg_flax.training.metrics import judge
from lsg_flax.training.pictures import draw_confusion
from lsg_flax.training.preparation import buckets_for, mesh_of, options_for, shapes_for, source_for
from lsg_flax.training.scores import Scores, make_rouge_scorer
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel, open_source

REPORT, CONFUSION = "evaluation.json", "confusion.png"


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Scores of a checkpoint on some data.

    Attributes:
        rows: number of scored rows; each window of a question and each piece of joined texts
            counts as one.
        max_length: maximum tokens of a row.
        cut: what was truncated of longer texts.
        scores: the loss and the task's scores, as `training.evaluate` describes them.
        by_class: scores of each class, if classes have names.
    """

    model: str
    task: str
    rows: int
    max_length: int
    cut: Cut
    scores: Scores
    by_class: ByClass

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole report in types that JSON can represent."""
        fields = dataclasses.asdict(dataclasses.replace(self, by_class=ByClass(())))
        classes, names, confusion = self.by_class
        fields |= {"cut": self.cut._asdict(), "by_class": [row._asdict() for row in classes]}
        if confusion is not None:
            fields["confusion"] = {"labels": list(names), "rows": confusion.tolist()}
        return fields

    def save(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes evaluation.json and, for classes, confusion.png; returns the written files."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder, {REPORT: self.to_dict()})
        written, (_, names, confusion) = [folder / REPORT], self.by_class
        if confusion is not None and draw_confusion(folder / CONFUSION, names, confusion):
            written.append(folder / CONFUSION)
        return written


def evaluate_files(settings: Settings, *, progress: bool = True) -> EvaluationReport:
    """Scores `settings.model` for `settings.task` on `settings.eval_data`.

    The data is read as in training; settings that are only for training have no effect.

    Raises:
        FileNotFoundError: if the model or the data is missing.
        ValueError: if the model lacks the task's head, the data has labels that the model does not
            know, or settings do not fit the model, the data or the devices.
        ImportError: if a package that the scores need is not installed.
    """
    assert settings.eval_data is not None
    if settings.task == EMBEDDING:
        return _evaluate_vectors(settings, progress)
    if settings.predict_with_generate:
        make_rouge_scorer()  # fails before the long work if its package is missing
    source = _source(settings)
    options = _options(settings, source)
    part = {"subset": settings.subset, "split": settings.eval_split}
    if options.labels is not None:
        _check_labels(settings, options, source, part)
    more = {"cache": settings.cache, "progress": progress}
    tokenizer = source.tokenizer
    if settings.writes_targets:
        tokenizer = source.reader(settings.src_lang, settings.tgt_lang)
    data = load_examples(settings.eval_data, options, tokenizer=tokenizer, **part, **more)
    source.check_tokens(data)
    mesh = mesh_of(settings.devices, settings.mesh)
    head: dict[str, Any] = {"labels": options.labels} if options.labels else {}
    if any(target.loss == "problem_type" for target in TASKS[settings.task].targets):
        head["problem_type"] = options.problem_type
    model, params = source.load(head, {}, jnp.dtype(settings.dtype).type, mesh)
    rows = (settings.batch_size, None)
    lengths = buckets_for(settings.ladder, source.length, model, rows, mesh)
    given = {INPUT: lengths, TARGET: settings.target_buckets}
    ladders = {name: ladder for name, ladder in given.items() if ladder is not None}
    sizes: dict[str, Any] = {"batch_size": settings.batch_size}
    sizes |= shapes_for(settings, source, model.config.lsg, ladders)
    writing = writing_of(settings, model, data, sizes, tokenizer, mesh)
    how: Any = {"mesh": mesh, "scorer": text_scorer(model, data, tokenizer)}
    judged = judge(model, params, _counted(eval_batches(data, **sizes), progress), **how)
    found = judged.scores | writing(params)
    scores = {name.removeprefix(SCORED): value for name, value in found.items()}
    about = (settings.model, settings.task, len(data), source.length, data.cut)
    return EvaluationReport(*about, scores, by_class(model, judged))


def _evaluate_vectors(settings: Settings, progress: bool) -> EvaluationReport:
    """Scores embeddings: how well texts find their positives, how near a teacher's vectors are."""
    source = source_for(settings)
    options, mesh = options_for(settings, source), mesh_of(settings.devices, settings.mesh)
    data = load_examples(
        settings.eval_data or (),
        options,
        tokenizer=source.tokenizer,
        subset=settings.subset,
        split=settings.eval_split,
        cache=settings.cache,
        progress=progress,
    )
    source.check_tokens(data)
    ladders = embedding_ladders(settings, source, data, mesh)
    with no_pooler_needed():
        model, params = source.load({}, {}, jnp.dtype(settings.dtype).type, mesh)
    size, seed = settings.batch_size, settings.seed
    batches = eval_batches(data, batch_size=size, buckets=ladders, seed=seed)
    scorer = EmbeddingScorer(make_run(settings, source, model, mesh), data, mesh)
    judged = scorer(params, _counted(batches, progress))
    scores = {name.removeprefix(SCORED): value for name, value in judged.items()}
    about = (settings.model, settings.task, len(data), source.length, data.cut)
    return EvaluationReport(*about, scores, ByClass(()))


def _source(settings: Settings) -> SourceModel:
    """Opens the checkpoint; raises ValueError if it has no head for the task."""
    open_checkpoint(settings.model).require_head(settings.task)
    return open_source(settings.model, settings.task, settings.max_length, convert=False)


def _options(settings: Settings, source: SourceModel) -> DataOptions:
    """Returns how rows are read, with the labels of the model's head."""
    config, task = source.config, TASKS[settings.task]
    if any(target.loss == "problem_type" for target in task.targets):
        problem = config.problem_type or settings.problem_type
        settings = dataclasses.replace(settings, problem_type=problem)
    options = settings.data_options(source.length, None, token_type_ids=config.segments > 1)
    if settings.problem_type == "regression":
        return dataclasses.replace(options, width=config.num_labels)
    if options.label_column is None:
        return source.with_target_length(options)
    labels = settings.labels or config.labels
    if len(labels) != len(config.labels):
        raise ValueError(
            f"labels={labels} are {len(labels)} names, but {settings.model} has "
            f"{len(config.labels)} labels: {', '.join(config.labels)}; give one name for each, in "
            "this order."
        )
    return dataclasses.replace(options, labels=labels)


def _check_labels(
    settings: Settings, options: DataOptions, source: SourceModel, part: dict[str, Any]
) -> None:
    """Raises ValueError for labels in the data that the head does not have."""
    known = options.labels or ()
    unknown = unknown_labels(settings.eval_data or (), options, known, **part)
    if unknown and settings.on_error == "raise":
        shown = ", ".join(map(repr, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        raise ValueError(
            f"the data has labels that {source.name} does not know: {shown}. It knows "
            f"{', '.join(known[:8])}{', ...' if len(known) > 8 else ''}. Rename them in the data, "
            "skip such rows (on_error='skip'), or, if the data only uses other names, give "
            "labels=, the data's names in the order of the model's labels."
        )


def _counted(batches: EvalBatches, progress: bool) -> Iterator[EvalBatch]:
    shown = progress and jax.process_index() == 0
    with Bar("batches", about="evaluating", total=len(batches), shown=shown) as bar:
        for batch in batches:
            yield batch
            bar.update(1)
