"""How good a model is: `evaluate` runs it over batches and gives the loss and the task's scores.

Axes: O rows of all batches, B batch, T tokens, A answer lengths.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from lsg_flax.models import IGNORED, Batch, Model, ModelOutput, Params, Scorer
from lsg_flax.sharding import shard_batch
from lsg_flax.training.log import SCORED
from lsg_flax.training.losses import (
    apply_model,
    problem_type,
    target_counts,
    target_sums,
    targets_of,
    weighted_mean,
)
from lsg_flax.training.scores import (
    Scores,
    classification_scores,
    entity_scores,
    multi_label_scores,
    perplexity,
    regression_scores,
    span_scores,
)

LONGEST_ANSWER = 30  # tokens, as in SQuAD's usual evaluation


def evaluate(
    model: Model,
    params: Params,
    batches: Iterable[tuple[Batch, Int[np.ndarray, "B"]]],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Scores:
    """The loss and the scores of the model's task, independent of how rows are spread over batches.

    Scores by the kind of loss: `classification_scores` of a class per row, `entity_scores` of named
    classes per token, `perplexity` of other classes per token, `span_scores` of positions (the best
    start and end together, at most 30 tokens; for texts see `answer_scores`), and by problem type
    `regression_scores` and `multi_label_scores` (labels whose logit is above 0).

    Args:
        batches: pairs of a batch and its rows' numbers, -1 for rows that only fill up and do not
            count, as `data.eval_batches` gives. As many shapes, as many compilations.
        mesh: where `params` lie; batches are placed on it. With several processes each gives its
            own rows.

    Returns:
        "eval_loss", and the scores, each with "eval_" before its name.

    Raises:
        ValueError: for a task without a loss, batches that do not fit, or if nothing counts.
    """
    return judge(model, params, batches, mesh=mesh).scores


class Judged(NamedTuple):
    """The scores of a model, and of each batch the answers and labels that they are of, one for
    each real row; empty for a task that is scored by its loss alone."""

    scores: Scores
    predicted: list[np.ndarray]
    labels: list[np.ndarray]


def judge(
    model: Model,
    params: Params,
    batches: Iterable[tuple[Batch, Int[np.ndarray, "B"]]],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Judged:
    """What `evaluate` gives and raises, with what it is made of."""
    program, scorer, waiting, parts = _program(model, mesh), None, None, []
    for batch, rows in batches:
        batch = dict(batch) | {"real": np.asarray(rows) >= 0}
        if mesh is None:
            out = program(params, batch)
        else:
            with jax.set_mesh(mesh):
                out = program(params, shard_batch(batch, mesh))
        scorer = _scorer_of(model, batch)
        if waiting is not None:  # read one batch late, so that the device need not wait
            parts.append(jax.device_get(waiting))
        waiting = out
    if waiting is None:
        raise ValueError("there is nothing to evaluate: no batches.")
    parts.append(jax.device_get(waiting))
    return _judged(model, parts, scorer)


def _make_program(model: Model, mesh: jax.sharding.Mesh | None) -> Any:
    """The jitted forward pass; every process can read its small results."""

    def eval_step(params: Params, batch: Batch) -> dict[str, Any]:
        real = batch["real"]
        batch = {name: jnp.asarray(array) for name, array in batch.items() if name != "real"}
        output = apply_model(model, params, batch, None)
        sums, counts = target_sums(model, output, batch), target_counts(model, batch)
        scorer = _scorer_of(model, batch)
        answers = scorer.answers(model, output, batch) if scorer else {}
        return {"sums": sums, "counts": counts, "real": real} | answers

    if mesh is None:
        return jax.jit(eval_step)
    return jax.jit(eval_step, out_shardings=NamedSharding(mesh, PartitionSpec()))


# Any, since type checkers take Linen modules for unhashable.
_program: Any = functools.lru_cache(maxsize=8)(_make_program)


# What is kept of a batch for the scores, as small as it can be


def _logits(model: Model, output: ModelOutput, batch: Batch) -> dict[str, jax.Array]:
    target = model.task_record.targets[0]
    logits = getattr(output, target.output)
    return {"predicted": logits, "labels": batch[target.labels].reshape(logits.shape)}


def _classes(model: Model, output: ModelOutput, batch: Batch) -> dict[str, jax.Array]:
    target = model.task_record.targets[0]
    predicted = jnp.argmax(getattr(output, target.output), axis=-1)
    return {"predicted": predicted, "labels": batch[target.labels]}


def _spans(model: Model, output: ModelOutput, batch: Batch) -> dict[str, jax.Array]:
    """[B, 2] each, labels -1 where the answer lies beyond the end."""
    targets = model.task_record.targets
    predicted = _best_spans([getattr(output, t.output) for t in targets], batch["attention_mask"])
    labels = jnp.stack([batch[t.labels] for t in targets], axis=-1)
    inside = labels < batch["attention_mask"].shape[-1]
    return {"predicted": predicted, "labels": jnp.where(inside, labels, -1)}


def _best_spans(start_and_end: list[jax.Array], mask: jax.Array) -> jax.Array:
    """[B, 2]: the start and end of the highest sum of logits, the end not before the start."""
    real = mask != 0
    lowest = jnp.finfo(jnp.float32).min / 4
    start, end = (jnp.where(real, logits.astype(jnp.float32), lowest) for logits in start_and_end)
    length = start.shape[1]
    span = min(LONGEST_ANSWER, length)
    ends = jnp.pad(end, ((0, 0), (0, span - 1)), constant_values=lowest)
    sums = jnp.stack([start + ends[:, i : i + length] for i in range(span)], axis=-1)  # [B, T, A]
    best = jnp.argmax(sums.reshape(len(start), -1), axis=-1)
    return jnp.stack([best // span, best // span + best % span], axis=-1)


# The scores of all batches


class _AnswerScorer(NamedTuple):
    """What is kept of a batch, and the scores of the answers and labels of all batches, the names
    of the classes, and the loss. Scores among which is "loss" correct it: among floats, rows that
    only fill up a batch have no label that says so."""

    answers: Callable[[Model, ModelOutput, Batch], dict[str, jax.Array]]
    scores: Callable[[list[np.ndarray], list[np.ndarray], tuple[str, ...], float], Scores]


def _of_arrays(function: Callable[[np.ndarray, np.ndarray], Scores]) -> Callable[..., Scores]:
    """For scores that ask for neither names nor loss."""
    return lambda given, labels, *_: function(np.concatenate(given), np.concatenate(labels))


def _of_regression(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    scores = regression_scores(predicted, labels)
    return {"loss": scores["mse"]} | scores


def _of_several_labels(logits: np.ndarray, labels: np.ndarray) -> Scores:
    losses = np.logaddexp(0.0, logits) - logits * labels
    return {"loss": float(losses.mean())} | multi_label_scores(logits > 0, labels)


def named_tags(
    given: list[np.ndarray], labels: list[np.ndarray], names: tuple[str, ...]
) -> tuple[list[list[str]], list[list[str]]]:
    """Predicted and right tags of the words of each text."""
    predicted, truth = [], []
    for row, right in itertools.chain.from_iterable(map(zip, given, labels)):
        counted = right != IGNORED
        if counted.any():
            predicted.append([names[i] for i in row[counted]])
            truth.append([names[i] for i in right[counted]])
    return predicted, truth


def _of_entities(given, labels, names: tuple[str, ...], loss: float) -> Scores:
    return entity_scores(*named_tags(given, labels, names))


_SCORERS: dict[Scorer, _AnswerScorer] = {
    "classes": _AnswerScorer(_classes, _of_arrays(classification_scores)),
    "several_labels": _AnswerScorer(_logits, _of_arrays(_of_several_labels)),
    "numbers": _AnswerScorer(_logits, _of_arrays(_of_regression)),
    "entities": _AnswerScorer(_classes, _of_entities),
    "spans": _AnswerScorer(_spans, _of_arrays(span_scores)),
    "perplexity": _AnswerScorer(lambda *_: {}, lambda *all_: {"perplexity": perplexity(all_[-1])}),
}


def _scorer_of(model: Model, batch: Batch) -> _AnswerScorer | None:
    """The task's; None for one that has no scores."""
    labels = targets_of(model)[0].labels
    chosen = model.task_record.scorer_for(problem_type(model.config, batch[labels].dtype))
    return None if chosen is None else _SCORERS[chosen]


def _judged(model: Model, parts: list[dict[str, Any]], scorer: _AnswerScorer | None) -> Judged:
    sums, counts = (
        [np.sum(values, dtype=np.float64) for values in zip(*(p[name] for p in parts), strict=True)]
        for name in ("sums", "counts")
    )
    loss = float(weighted_mean(model, sums, counts))
    predicted, labels = (
        [part[name][part["real"]] for part in parts if name in part]
        for name in ("predicted", "labels")
    )
    found = scorer.scores(predicted, labels, model.config.labels, loss) if scorer else {}
    scores = {f"{SCORED}{name}": value for name, value in ({"loss": loss} | found).items()}
    return Judged(scores, predicted, labels)
