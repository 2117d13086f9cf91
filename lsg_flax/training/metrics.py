"""Evaluation: `evaluate` runs a model over batches and returns the loss and the task's scores.

Axes: O rows of all batches, B batch, T tokens, Y labels, A answer lengths.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
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
# [B], of packed rows [B, texts], beside the arrays of a batch: which row of the data each is
ROWS = "rows"


def evaluate(
    model: Model,
    params: Params,
    batches: Iterable[tuple[Batch, Int[np.ndarray, "B *texts"]]],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Scores:
    """Returns the loss and the scores of the model's task; they do not depend on how rows are
    spread over batches.

    The scores by kind of loss are `classification_scores` (as scikit-learn's `f1_score`) for a
    class per row, `entity_scores` (seqeval's `f1_score`) for named classes per token, `perplexity`
    for other classes per token, `span_scores` for positions (the best start and end together, at
    most 30 tokens; `finetune` and `evaluate_files` score answers as texts), and by problem type
    `regression_scores` and `multi_label_scores` (labels whose logit is above 0).

    Args:
        batches: pairs of a batch and its rows' numbers, as `data.eval_batches` returns them; -1
            marks padding rows, which do not count. Packed rows have the numbers of their texts.
            Each shape is compiled once.
        mesh: the mesh that `params` are sharded over; batches are sharded over it too. With several
            processes each passes its own rows.

    Returns:
        "eval_loss" and the scores; each name begins with "eval_". Scores are shares from 0 to 1,
        but for perplexity, mean squared errors and correlations.

    Raises:
        ValueError: for a task without a loss, batches that do not fit, or if nothing counts.
    """
    return judge(model, params, batches, mesh=mesh).scores


class AnswerScorer(NamedTuple):
    """Three functions that score predictions.

    Attributes:
        answers: computes on the device what the scores need of a batch, as "predicted" and
            "labels", from the model's output and the batch, which has the numbers of its rows as
            `ROWS`.
        scores: computes the scores from the predictions and labels of all batches, the names of
            the classes, and the loss. If the scores contain "loss", it replaces the given loss, in
            which padding rows counted: float labels have no -100 to exclude them.
        keep: reduces on the host the predictions of real rows with these labels to what is needed
            until the end; None keeps them.
    """

    answers: Callable[[Model, ModelOutput, Batch], dict[str, jax.Array]]
    scores: Callable[[list[np.ndarray], list[np.ndarray], tuple[str, ...], float], Scores]
    keep: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


class Judged(NamedTuple):
    """Scores of a model, with the predictions and labels of each batch's real rows that they are
    computed from; these are empty for a task that is scored only by its loss."""

    scores: Scores
    predicted: list[np.ndarray]
    labels: list[np.ndarray]


def judge(
    model: Model,
    params: Params,
    batches: Iterable[tuple[Batch, Int[np.ndarray, "B *texts"]]],
    *,
    mesh: jax.sharding.Mesh | None = None,
    scorer: AnswerScorer | None = None,
) -> Judged:
    """Returns the scores of `evaluate` together with predictions and labels; raises as it does.
    `scorer` replaces the task's own."""
    program, chosen = _program(model, mesh, scorer and scorer.answers), scorer
    waiting, parts = None, []
    for pair in batches:
        if isinstance(pair, Mapping):
            raise ValueError(
                "each of the batches must be a pair of a batch and its rows' numbers, as "
                f"data.eval_batches makes them, got a mapping of {', '.join(map(str, pair))}; pass "
                "(batch, numpy.arange(rows))."
            )
        batch, rows = pair
        batch = dict(batch) | {ROWS: np.asarray(rows)}
        if mesh is None:
            out = program(params, batch)
        else:
            with jax.set_mesh(mesh):
                out = program(params, shard_batch(batch, mesh))
        chosen = scorer or _scorer_of(model, batch)
        if waiting is not None:  # read one batch late, so that the device need not wait
            parts.append(_read(model, waiting, chosen))
        waiting = out
    if waiting is None:
        raise ValueError("there is nothing to evaluate: no batches.")
    parts.append(_read(model, waiting, chosen))
    return _judged(model, parts, chosen)


def _make_program(
    model: Model, mesh: jax.sharding.Mesh | None, answers: Callable[..., Any] | None
) -> Any:
    """Returns the jitted forward pass; every process can read its small results."""

    def eval_step(params: Params, batch: Batch) -> dict[str, Any]:
        given = {name: jnp.asarray(array) for name, array in batch.items()}
        batch = {name: array for name, array in given.items() if name != ROWS}
        output = apply_model(model, params, batch, None)
        sums, counts = target_sums(model, output, batch), target_counts(model, batch)
        scorer = _scorer_of(model, batch)
        kept = answers or (scorer and scorer.answers)
        found = kept(model, output, given) if kept else {}
        places = {name: given[name] for name in (ROWS, "segment_ids") if name in given}
        return {"sums": sums, "counts": counts} | places | found

    if mesh is None:
        return jax.jit(eval_step)
    return jax.jit(eval_step, out_shardings=NamedSharding(mesh, PartitionSpec()))


# Any, because type checkers think that Linen modules are unhashable.
_program: Any = functools.lru_cache(maxsize=8)(_make_program)


class _KeptBatch(NamedTuple):
    """The sums and counts of a batch's loss, and the predictions and labels of its real rows if
    they are scored."""

    sums: list[np.ndarray]
    counts: list[np.ndarray]
    predicted: list[np.ndarray]
    labels: list[np.ndarray]


def _read(model: Model, out: dict[str, Any], scorer: AnswerScorer | None) -> _KeptBatch:
    out = jax.device_get(out)
    real = out[ROWS] >= 0
    if "predicted" not in out:
        return _KeptBatch(out["sums"], out["counts"], [], [])
    both = out["predicted"], out["labels"]
    if real.ndim == 2 and targets_of(model)[0].output in model.task_record.per_token:
        own = [(row, out["segment_ids"][row] == text + 1) for row, text in np.argwhere(real)]
        predicted, labels = ([array[at][None] for at in own] for array in both)  # [1, T] each
        return _KeptBatch(out["sums"], out["counts"], predicted, labels)
    predicted, labels = (array[real] for array in both)
    if scorer is not None and scorer.keep is not None:
        predicted = scorer.keep(predicted, labels)
    return _KeptBatch(out["sums"], out["counts"], [predicted], [labels])


# What the scores need of a batch, as small as possible


def _logits(model: Model, output: ModelOutput, batch: Batch) -> dict[str, jax.Array]:
    target = model.task_record.targets[0]
    logits = getattr(output, target.output)
    return {"predicted": logits, "labels": batch[target.labels].reshape(logits.shape)}


def _classes(model: Model, output: ModelOutput, batch: Batch) -> dict[str, jax.Array]:
    target = model.task_record.targets[0]
    predicted = jnp.argmax(getattr(output, target.output), axis=-1)
    return {"predicted": predicted, "labels": batch[target.labels]}


def _spans(model: Model, output: ModelOutput, batch: Batch) -> dict[str, jax.Array]:
    """Returns predictions and labels, [B, 2] each; labels are -1 for answers beyond the end."""
    targets = model.task_record.targets
    predicted = _best_spans([getattr(output, t.output) for t in targets], batch["attention_mask"])
    labels = jnp.stack([batch[t.labels] for t in targets], axis=-1)
    inside = labels < batch["attention_mask"].shape[-1]
    return {"predicted": predicted, "labels": jnp.where(inside, labels, -1)}


def _best_spans(start_and_end: list[jax.Array], mask: jax.Array) -> jax.Array:
    """Returns [B, 2], start and end with the highest sum of logits; the end is not before the
    start."""
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


def _of_arrays(function: Callable[[np.ndarray, np.ndarray], Scores]) -> Callable[..., Scores]:
    """Wraps scores that need neither names nor loss."""
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
    """Returns the predicted and the true tags of the words of each text."""
    predicted, truth = [], []
    for row, right in itertools.chain.from_iterable(map(zip, given, labels)):
        counted = right != IGNORED
        if counted.any():
            predicted.append([names[i] for i in row[counted]])
            truth.append([names[i] for i in right[counted]])
    return predicted, truth


def _of_entities(given, labels, names: tuple[str, ...], loss: float) -> Scores:
    return entity_scores(*named_tags(given, labels, names))


_SCORERS: dict[Scorer, AnswerScorer] = {
    "classes": AnswerScorer(_classes, _of_arrays(classification_scores)),
    "several_labels": AnswerScorer(_logits, _of_arrays(_of_several_labels)),
    "numbers": AnswerScorer(_logits, _of_arrays(_of_regression)),
    "entities": AnswerScorer(_classes, _of_entities),
    "spans": AnswerScorer(_spans, _of_arrays(span_scores)),
    "perplexity": AnswerScorer(lambda *_: {}, lambda *all_: {"perplexity": perplexity(all_[-1])}),
}


def _scorer_of(model: Model, batch: Batch) -> AnswerScorer | None:
    """Returns the scorer of the model's task; None for a task without scores."""
    labels = targets_of(model)[0].labels
    chosen = model.task_record.scorer_for(problem_type(model.config, batch[labels].dtype))
    return None if chosen is None else _SCORERS[chosen]


def _judged(model: Model, parts: list[_KeptBatch], scorer: AnswerScorer | None) -> Judged:
    sums, counts = (
        [np.sum(values, dtype=np.float64) for values in zip(*losses, strict=True)]
        for losses in ([part.sums for part in parts], [part.counts for part in parts])
    )
    loss = float(weighted_mean(model, sums, counts))
    predicted = [array for part in parts for array in part.predicted]
    labels = [array for part in parts for array in part.labels]
    found = scorer.scores(predicted, labels, model.config.labels, loss) if scorer else {}
    scores = {f"{SCORED}{name}": value for name, value in ({"loss": loss} | found).items()}
    return Judged(scores, predicted, labels)
