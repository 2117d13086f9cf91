"""The train step and the scores of a run, for each kind of task."""

import functools
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from lsg_flax.data import TokenizedDataset, eval_batches
from lsg_flax.hub import Tokenizer
from lsg_flax.models import Model, Params
from lsg_flax.training.answers import text_scorer
from lsg_flax.training.embedding import make_embedding_step, make_run
from lsg_flax.training.embedding_scores import EmbeddingScorer
from lsg_flax.training.embedding_source import embedding_ladders
from lsg_flax.training.metrics import judge
from lsg_flax.training.scores import Scores
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel
from lsg_flax.training.step import TrainStep, make_train_step
from lsg_flax.training.written import writing_options, written_scores

MakeStep = Callable[[optax.GradientTransformation], TrainStep]
Score = Callable[[Params], Scores]


def learns_answers(
    settings: Settings,
    source: SourceModel,
    model: Model,
    data: TokenizedDataset | None,
    sizes: dict[str, Any],
    tokenizer: Tokenizer,
    mesh: Mesh | None,
) -> tuple[MakeStep, Score | None]:
    """Returns two functions for a task with labels or target texts: one makes the train step of
    an optimizer; one scores parameters on held-out data, including the texts that they generate if
    that is set, or is None without data.

    Args:
        sizes: arguments of `eval_batches`, such as the batch size.
    """
    labels: dict[str, Any] = {"label_smoothing": settings.label_smoothing}
    labels["class_weights"] = settings.weights_of(model.config.labels)
    step = functools.partial(make_train_step, model, accumulate_steps=settings.accumulate, **labels)
    if data is None:
        return step, None
    batches = eval_batches(data, **sizes)
    writing = writing_of(settings, model, data, sizes, tokenizer, mesh)
    how: Any = {"mesh": mesh, "scorer": text_scorer(model, data, tokenizer)}
    return step, lambda params: judge(model, params, batches, **how).scores | writing(params)


def learns_vectors(
    settings: Settings,
    source: SourceModel,
    model: Model,
    data: TokenizedDataset | None,
    sizes: dict[str, Any],
    tokenizer: Tokenizer,
    mesh: Mesh | None,
) -> tuple[MakeStep, Score | None]:
    """Returns the same two functions as `learns_answers`, for embeddings."""
    run = make_run(settings, source, model, mesh)
    step = functools.partial(make_embedding_step, run, accumulate_steps=settings.accumulate)
    if data is None:
        return step, None
    sizes |= {"buckets": embedding_ladders(settings, source, data, mesh)}
    scorer, batches = EmbeddingScorer(run, data, mesh), eval_batches(data, **sizes)
    return step, lambda params: scorer(params, batches)


def writing_of(
    settings: Settings,
    model: Model,
    data: TokenizedDataset,
    sizes: dict[str, Any],
    tokenizer: Tokenizer,
    mesh: Mesh | None,
) -> Score:
    """Returns a function that scores the texts that the model writes; it returns no scores unless
    `predict_with_generate` is set. Options of generation are checked here."""
    if not settings.predict_with_generate:
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
