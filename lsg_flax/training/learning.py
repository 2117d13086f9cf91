"""What a run learns by, and is scored by, for each kind of task."""

import functools
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from lsg_flax.data import TokenizedDataset, eval_batches
from lsg_flax.hub import Tokenizer
from lsg_flax.models import Model, Params
from lsg_flax.training.embedding import make_embedding_step, make_run
from lsg_flax.training.embedding_scores import EmbeddingScorer
from lsg_flax.training.embedding_source import embedding_ladders
from lsg_flax.training.metrics import evaluate
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
    """The step of an optimizer, and the scores of parameters on held-out data in batches of
    `sizes`, with those of what they write; None without data."""
    labels: dict[str, Any] = {"label_smoothing": settings.label_smoothing}
    labels["class_weights"] = settings.weights_of(model.config.labels)
    step = functools.partial(make_train_step, model, accumulate_steps=settings.accumulate, **labels)
    if data is None:
        return step, None
    batches = eval_batches(data, **sizes)
    writing = writing_of(settings, model, data, sizes, tokenizer, mesh)
    return step, lambda params: evaluate(model, params, batches, mesh=mesh) | writing(params)


def learns_vectors(
    settings: Settings,
    source: SourceModel,
    model: Model,
    data: TokenizedDataset | None,
    sizes: dict[str, Any],
    tokenizer: Tokenizer,
    mesh: Mesh | None,
) -> tuple[MakeStep, Score | None]:
    """As `learns_answers`, of embeddings."""
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
    """What is scored of the texts that the model writes, checked; nothing where none are asked."""
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
