"""Scores of predictions against labels, as functions of numpy arrays.

Axes: O rows of all batches, Y labels.
"""

import collections
import math
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Num

from lsg_flax.models import IGNORED

Scores = dict[str, float]

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]”’])\s+")


def classification_scores(predicted: Int[np.ndarray, "O"], labels: Int[np.ndarray, "O"]) -> Scores:
    """Returns `accuracy` and `macro_f1`, the mean F1 of the classes that occur among the labels or
    the predictions (as in scikit-learn). Labels of -100 do not count.

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
    predicted: Bool[np.ndarray, "O Y"], labels: Num[np.ndarray, "O Y"]
) -> Scores:
    """Returns `micro_f1` over all decisions together, `macro_f1` over the labels that occur or are
    predicted, and `accuracy`, the share of rows whose labels are all right.

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


def regression_scores(predicted: Num[np.ndarray, "*O"], labels: Num[np.ndarray, "*O"]) -> Scores:
    """Returns `mse` and `pearson`, Pearson's correlation (0 if one side is constant).

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
    """Returns `precision`, `recall` and `f1` of whole entities, and `accuracy` of tags, computed by
    seqeval (as CoNLL's script does).

    Args:
        predicted, labels: for each text the tags of its words, such as "B-PER", "I-PER", "O".

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
    """Returns `exact_match` and `f1` of answers in words, as SQuAD defines them: case, punctuation
    and articles are ignored, and the best-fitting right answer counts. For a question without
    answers the right answer is "".

    Args:
        answers: for each question all right answers.

    Raises:
        ValueError: if there are no questions.
    """
    _need_rows(len(answers))
    exact, overlap = [], []
    for given, right in zip(predicted, answers, strict=True):
        words = _words(given)
        truths = [truth for answer in right if (truth := _words(answer))] or [[]]
        exact.append(max(words == truth for truth in truths))
        overlap.append(max(_word_f1(words, truth) for truth in truths))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def make_rouge_scorer() -> Any:
    """Returns rouge-score's scorer, as `rouge_scores` uses it.

    Raises:
        ImportError: if rouge-score is not installed.
    """
    try:
        import rouge_score.rouge_scorer
    except ImportError as error:
        raise ImportError(
            "ROUGE needs the package rouge-score: pip install 'lsg-flax[summarization]'."
        ) from error
    return rouge_score.rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)


def rouge_scores(written: Sequence[str], references: Sequence[str]) -> Scores:
    """Returns `rouge1`, `rouge2`, `rougeL` and `rougeLsum`, from 0 to 1: means over the texts of
    the F1 of rouge-score's RougeScorer with its stemmer, which reads only a-z and 0-9. For
    `rougeLsum` a sentence ends at the end of a line, and at white space after ".", "!" or "?", with
    or without a closing quote or bracket.

    Raises:
        ImportError: if rouge-score is not installed.
        ValueError: if there are no texts.
    """
    _need_rows(len(references))
    scorer = make_rouge_scorer()
    pairs = zip(references, written, strict=True)
    split = ([_SENTENCE_END.sub("\n", text) for text in pair] for pair in pairs)
    each = [scorer.score(*pair) for pair in split]
    return {name: float(np.mean([scores[name].fmeasure for scores in each])) for name in ROUGE}


def span_scores(predicted: Int[np.ndarray, "O 2"], labels: Int[np.ndarray, "O 2"]) -> Scores:
    """Returns `exact_match` and `f1` of answers given by their first and last token.

    Args:
        labels: positions of the right answers; rows with a position below 0 do not count.

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
    """Returns exp(mean loss per token); infinity if that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def _counted(predicted: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counted = labels != IGNORED
    _need_rows(int(counted.sum()))
    return predicted[counted], labels[counted]


def _need_rows(count: int) -> None:
    if not count:
        raise ValueError("there is nothing to score: no row has a label that counts.")


def _f1(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns the F1 of each row of decisions; 0 for a row without any positive one."""
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
