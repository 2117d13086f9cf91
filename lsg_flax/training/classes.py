"""Scores of each class on its own, and the confusion matrix of the classes.

Axes: O rows of all batches, Y labels.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lsg_flax.models import IGNORED, Model, Scorer
from lsg_flax.training.metrics import Judged, named_tags


class ClassScores(NamedTuple):
    """Scores of one class; `support` is how often the labels have it."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class ByClass(NamedTuple):
    """Scores of all classes and, where each answer is one class, the confusion matrix.

    `confusion[i, j]` counts how often the label was `names[i]` and the prediction `names[j]`.
    """

    classes: tuple[ClassScores, ...]
    names: tuple[str, ...] = ()
    confusion: Int[np.ndarray, "Y Y"] | None = None


def by_class(model: Model, judged: Judged) -> ByClass:
    """Returns the scores of each class of a model whose labels have names.

    With one or several labels per text a class is a label. With a label per token a class is a kind
    of entity, as seqeval counts them, and the confusion matrix is that of the tags. For other tasks
    the result is empty.
    """
    scorer, names = _scorer(model), model.config.labels
    if scorer == "several_labels":
        predicted, labels = (np.concatenate(part) for part in judged[1:])
        return ByClass(_of_flags(predicted > 0, labels > 0.5, names))
    if scorer not in ("classes", "entities"):
        return ByClass(())
    flat = (np.concatenate([array.reshape(-1) for array in part]) for part in judged[1:])
    predicted, labels = flat
    predicted, labels = predicted[labels != IGNORED], labels[labels != IGNORED]
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    if scorer == "entities":
        return ByClass(_of_entities(judged, names), names, confusion)
    numbers = np.arange(len(names))
    flags = predicted[:, None] == numbers, labels[:, None] == numbers
    return ByClass(_of_flags(*flags, names), names, confusion)


def _scorer(model: Model) -> Scorer | None:
    record, problem = model.task_record, model.config.problem_type
    chosen = record.scorer_for(problem or "single_label_classification")
    return chosen if record.named_labels else None


def _of_flags(
    predicted: Bool[np.ndarray, "O Y"], labels: Bool[np.ndarray, "O Y"], names: tuple[str, ...]
) -> tuple[ClassScores, ...]:
    right = (predicted & labels).sum(axis=0)
    given, support = predicted.sum(axis=0), labels.sum(axis=0)
    precision, recall = right / np.maximum(given, 1), right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(given + support, 1)
    columns = (precision.tolist(), recall.tolist(), f1.tolist(), support.tolist())
    return tuple(ClassScores(*row) for row in zip(names, *columns, strict=True))


def _of_entities(judged: Judged, names: tuple[str, ...]) -> tuple[ClassScores, ...]:
    import seqeval.metrics  # installed, or `judge` would have failed before

    predicted, truth = named_tags(*judged[1:], names)
    metrics: Any = seqeval.metrics
    report = metrics.classification_report(truth, predicted, output_dict=True, zero_division=0)
    found = []
    for name, values in sorted(report.items()):
        if not name.endswith(" avg"):
            precision, recall, f1 = (float(values[s]) for s in ("precision", "recall", "f1-score"))
            found.append(ClassScores(name, precision, recall, f1, int(values["support"])))
    return tuple(found)
