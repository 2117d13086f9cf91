"""How good a model is: the scores of each task as functions of numpy arrays, and `evaluate`, which
runs a model over batches and gives them all.

Axes: R rows (of all batches), B batch, T tokens, K labels.
"""

import collections
import functools
import math
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Int, Num

from lsg_flax.models import IGNORED, Model, Params
from lsg_flax.sharding import shard_batch
from lsg_flax.training.losses import (
    Batch,
    apply_model,
    problem_type,
    target_counts,
    target_sums,
    weighted_mean,
)

Scores = dict[str, float]
LONGEST_ANSWER = 30  # tokens, as in SQuAD's usual evaluation


def classification_scores(predicted: Int[np.ndarray, "R"], labels: Int[np.ndarray, "R"]) -> Scores:
    """`accuracy`, and `macro_f1`: the mean F1 of the classes that occur among the labels or the
    predictions (scikit-learn's). Labels of -100 do not count.

    Raises:
        ValueError: if no label counts.
    """
    predicted, labels = _counted(predicted, labels)
    classes = np.union1d(predicted, labels)[:, None]  # [classes, 1]
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(_f1(predicted[None] == classes, labels[None] == classes).mean()),
    }


def multi_label_scores(
    predicted: Bool[np.ndarray, "R K"], labels: Num[np.ndarray, "R K"]
) -> Scores:
    """`micro_f1` over all decisions together, `macro_f1` over the labels that occur or are
    predicted, and `accuracy`: how many rows are right in whole.

    Raises:
        ValueError: if there are no rows.
    """
    _need_rows(len(labels))
    truth = labels > 0.5
    occur = truth.any(axis=0) | predicted.any(axis=0)
    each = _f1(predicted.T, truth.T)[occur]
    return {
        "accuracy": float((predicted == truth).all(axis=1).mean()),
        "micro_f1": float(_f1(predicted.reshape(1, -1), truth.reshape(1, -1))[0]),
        "macro_f1": float(each.mean()) if len(each) else 0.0,
    }


def regression_scores(predicted: Num[np.ndarray, "*R"], labels: Num[np.ndarray, "*R"]) -> Scores:
    """`mse`, and `pearson`, Pearson's correlation (0 where one side is constant).

    Raises:
        ValueError: if there are no rows.
    """
    _need_rows(labels.size)
    x, y = (np.asarray(side, np.float64).reshape(-1) for side in (predicted, labels))
    mse = float(((x - y) ** 2).mean())
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return {"mse": mse, "pearson": float((x * y).sum()) / scale if scale else 0.0}


def entity_scores(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> Scores:
    """`precision`, `recall` and `f1` of whole entities, and `accuracy` of tags, by seqeval (as
    CoNLL's script).

    Args:
        predicted, labels: per text the tags of its words, such as "B-PER", "I-PER", "O".

    Raises:
        ImportError: if seqeval is not installed.
        ValueError: if there are no texts.
    """
    _need_rows(len(labels))
    try:
        import seqeval.metrics
    except ImportError as error:
        raise ImportError(
            "the F1 of entities needs the package seqeval: pip install 'lsg-flax[metrics]'."
        ) from error
    metrics: Any = seqeval.metrics
    truth, given = [list(text) for text in labels], [list(text) for text in predicted]
    return {
        "accuracy": float(metrics.accuracy_score(truth, given)),
        "precision": float(metrics.precision_score(truth, given, zero_division=0)),
        "recall": float(metrics.recall_score(truth, given, zero_division=0)),
        "f1": float(metrics.f1_score(truth, given, zero_division=0)),
    }


def answer_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> Scores:
    """`exact_match` and `f1` of answers in words, as SQuAD defines them: without case, punctuation
    and articles, against whichever right answer fits best. A question without answers is answered
    rightly by "".

    Args:
        answers: per question all right ones.

    Raises:
        ValueError: if there are no questions.
    """
    _need_rows(len(answers))
    exact, overlap = [], []
    for given, right in zip(predicted, answers, strict=True):
        words = _words(given)
        truths = [_words(answer) for answer in right] or [[]]
        exact.append(max(words == truth for truth in truths))
        overlap.append(max(_word_f1(words, truth) for truth in truths))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def span_scores(predicted: Int[np.ndarray, "R 2"], labels: Int[np.ndarray, "R 2"]) -> Scores:
    """`exact_match` and `f1` of answers as tokens: first and last place, of rows that have one.

    Args:
        labels: rows with a place below 0 do not count.

    Raises:
        ValueError: if no row has an answer.
    """
    counted = (labels >= 0).all(axis=1)
    predicted, labels = predicted[counted], labels[counted]
    _need_rows(len(labels))
    first, last = np.maximum(predicted, labels)[:, 0], np.minimum(predicted, labels)[:, 1]
    shared = np.maximum(last - first + 1, 0)
    sizes = sum(side[:, 1] - side[:, 0] + 1 for side in (predicted, labels))
    return {
        "exact_match": float((predicted == labels).all(axis=1).mean()),
        "f1": float((2 * shared / sizes).mean()),
    }


def perplexity(loss: float) -> float:
    """exp of the mean loss per token; infinity where that is beyond float."""
    return math.exp(loss) if loss < 700 else math.inf


def _counted(predicted: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counted = labels != IGNORED
    _need_rows(int(counted.sum()))
    return predicted[counted], labels[counted]


def _need_rows(count: int) -> None:
    if not count:
        raise ValueError("there is nothing to score: no row has a label that counts.")


def _f1(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of each row of decisions; 0 where there is nothing."""
    right = (predicted & truth).sum(axis=1)
    return 2 * right / np.maximum(predicted.sum(axis=1) + truth.sum(axis=1), 1)


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _word_f1(words: list[str], truth: list[str]) -> float:
    if not words or not truth:
        return float(words == truth)
    shared = (collections.Counter(words) & collections.Counter(truth)).total()
    return 2 * shared / (len(words) + len(truth))


# Over batches


def evaluate(
    model: Model,
    params: Params,
    batches: Iterable[tuple[Batch, Int[np.ndarray, "B"]]],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Scores:
    """The loss and the scores of the model's task, independent of how rows are spread over batches.

    Scores by task: `classification_scores` (sequence classification, multiple choice, next
    sentence), `regression_scores`, `multi_label_scores` (labels whose logit is above 0),
    `entity_scores`, `span_scores` (the best start and end together, at most 30 tokens; for texts
    see `answer_scores`), and for language models `perplexity`.

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
    program, waiting, parts = _program(model, mesh), None, []
    for batch, rows in batches:
        batch = dict(batch) | {"real": np.asarray(rows) >= 0}
        if mesh is None:
            out = program(params, batch)
        else:
            with jax.set_mesh(mesh):
                out = program(params, shard_batch(batch, mesh))
        if waiting is not None:  # read one batch late, so that the device need not wait
            parts.append(jax.device_get(waiting))
        waiting = out
    if waiting is None:
        raise ValueError("there is nothing to evaluate: no batches.")
    scores = _scores(model, [*parts, jax.device_get(waiting)])
    return {f"eval_{name}": value for name, value in scores.items()}


def _make_program(model: Model, mesh: jax.sharding.Mesh | None) -> Any:
    """The jitted forward pass; every process can read its small results."""

    def eval_step(params: Params, batch: Batch) -> dict[str, Any]:
        real = batch["real"]
        batch = {name: array for name, array in batch.items() if name != "real"}
        output = apply_model(model, params, batch, None)
        result = {
            "sums": target_sums(model, output, batch),
            "counts": target_counts(model, batch),
            "real": real,
        }
        answer = _answers(model, output, batch)
        return result | ({} if answer is None else {"predicted": answer[0], "labels": answer[1]})

    if mesh is None:
        return jax.jit(eval_step)
    return jax.jit(eval_step, out_shardings=NamedSharding(mesh, PartitionSpec()))


_program: Any = functools.lru_cache(maxsize=8)(_make_program)


def _answers(model: Model, output: Any, batch: Batch) -> tuple[jax.Array, jax.Array] | None:
    """What the scores of the task look at, as small as it can be."""
    if model.task == "question_answering":
        return _best_spans(output, batch["attention_mask"]), _labelled_spans(batch)
    if model.task not in _CLASSIFIES:
        return None
    labels = jnp.asarray(batch["labels"])
    if _kind(model, labels) in ("regression", "multi_label_classification"):
        return output.logits, labels.reshape(output.logits.shape)
    return jnp.argmax(output.logits, axis=-1), labels


_CLASSIFIES = (
    "sequence_classification",
    "token_classification",
    "multiple_choice",
    "next_sentence_prediction",
)


def _kind(model: Model, labels: Any) -> str:
    if model.task != "sequence_classification":
        return model.task
    return problem_type(model.config, jnp.asarray(labels))


def _best_spans(output: Any, mask: Any) -> jax.Array:
    """[B, 2]: the start and end of the highest sum of logits, the end not before the start."""
    real = jnp.asarray(mask) != 0
    lowest = jnp.finfo(jnp.float32).min / 4
    start, end = (
        jnp.where(real, logits.astype(jnp.float32), lowest)
        for logits in (output.start_logits, output.end_logits)
    )
    length = start.shape[1]
    span = min(LONGEST_ANSWER, length)
    ends = jnp.pad(end, ((0, 0), (0, span - 1)), constant_values=lowest)
    sums = jnp.stack([start + ends[:, i : i + length] for i in range(span)], axis=-1)  # [B, T, L]
    best = jnp.argmax(sums.reshape(len(start), -1), axis=-1)
    return jnp.stack([best // span, best // span + best % span], axis=-1)


def _labelled_spans(batch: Batch) -> jax.Array:
    """[B, 2], -1 where the answer lies beyond the end."""
    spans = jnp.stack([jnp.asarray(batch[f"{end}_positions"]) for end in ("start", "end")], -1)
    return jnp.where(spans < batch["input_ids"].shape[-1], spans, -1)


def _scores(model: Model, parts: list[dict[str, Any]]) -> Scores:
    targets = len(parts[0]["sums"])
    sums, counts = (
        [np.sum([part[name][i] for part in parts], dtype=np.float64) for i in range(targets)]
        for name in ("sums", "counts")
    )
    if "predicted" not in parts[0]:
        loss = float(weighted_mean(model, sums, counts))
        language = model.task in ("masked_lm", "causal_lm")
        return {"loss": loss} | ({"perplexity": perplexity(loss)} if language else {})
    if model.task == "token_classification":
        return {"loss": float(weighted_mean(model, sums, counts)), **_of_tokens(model, parts)}
    predicted, labels = (
        np.concatenate([part[name][part["real"]] for part in parts])
        for name in ("predicted", "labels")
    )
    kind = _kind(model, labels)
    if kind == "regression":
        scores = regression_scores(predicted, labels)
        return {"loss": scores["mse"]} | scores
    if kind == "multi_label_classification":
        loss = np.logaddexp(0.0, predicted) - predicted * labels  # rows that fill up are left out
        return {"loss": float(loss.mean())} | multi_label_scores(predicted > 0, labels)
    score = span_scores if kind == "question_answering" else classification_scores
    return {"loss": float(weighted_mean(model, sums, counts))} | score(predicted, labels)


def _of_tokens(model: Model, parts: list[dict[str, Any]]) -> Scores:
    predicted, truth, names = [], [], model.config.labels
    for part in parts:
        for given, labels in zip(part["predicted"], part["labels"], strict=True):
            counted = labels != IGNORED
            if counted.any():
                predicted.append([names[i] for i in given[counted]])
                truth.append([names[i] for i in labels[counted]])
    return entity_scores(predicted, truth)
