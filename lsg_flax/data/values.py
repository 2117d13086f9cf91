"""Values in rows of data: checked, or a ValueError that says what stands there instead.

Axes: Y labels.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from lsg_flax.data.files import DataRow
from lsg_flax.files import valid_text

_MOST_LABELS = 1 << 20  # that are believed without a list of names


def value_in(row: DataRow, column: str) -> Any:
    """The value of a column, or a ValueError that lists what there is."""
    value = row.values.get(column)
    if value is None:
        found = "is empty" if column in row.values else f"is missing; there are {list(row.values)}"
        raise ValueError(f"column {column!r} {found}")
    return value


def text_in(row: DataRow, column: str) -> str:
    """The text of a column, or a ValueError that says what it is instead."""
    value = value_in(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column!r} must be a text, got {value!r:.60}")
    return valid_text(value)


def label_number(value: object, names: tuple[str, ...]) -> int:
    """The number of a label that is given by name, or by number, maybe as text.

    Raises:
        ValueError: for one that is not among the names.
    """
    if isinstance(value, str):
        if value in names:
            return names.index(value)
        if value.isdecimal():
            value = int(value)
    if isinstance(value, int) and 0 <= value < len(names):
        return int(value)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ValueError(
        f"label {value!r} is none of the {len(names)} labels {shown} (or their numbers from 0)"
    )


def names_of_labels(values: Iterable[object]) -> tuple[str, ...]:
    """The labels found in a column: the names sorted, or the numbers from 0 to the largest.

    Raises:
        ValueError: for names and numbers together, or numbers that cannot count labels.
    """
    names: set[str] = set()
    numbers: set[int] = set()
    for value in values:
        for label in value if isinstance(value, list) else [value]:
            if isinstance(label, str):
                names.add(label)
            elif isinstance(label, int) and label >= 0:
                numbers.add(int(label))
    if all(name.isdecimal() for name in names):
        names, numbers = set(), numbers | {*map(int, names)}
    if names and numbers:
        raise ValueError(
            f"labels are names such as {min(names)!r} and numbers such as {min(numbers)}; give "
            "labels=, the names in the order of their numbers."
        )
    if numbers and max(numbers) >= _MOST_LABELS:
        raise ValueError(
            f"labels are numbers up to {max(numbers)}, too many to be those of labels from 0; give "
            "labels=, or problem_type='regression' for quantities."
        )
    return tuple(map(str, range(max(numbers) + 1))) if numbers else tuple(sorted(names))


def numbers_in(value: Any) -> Float[np.ndarray, "Y"]:
    """A number or a list of them, [Y] in float32, or a ValueError."""
    try:
        numbers = [float(v) for v in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError) as error:
        raise ValueError(f"a number (or a list of them) is wanted, got {value!r}") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a finite number (or a list of them) is wanted, got {value!r}")
    return np.array(numbers, np.float32)


def answers_in(answers: object, name: str) -> list:
    """The texts or places of SQuAD's answers, or a ValueError."""
    if not isinstance(answers, dict) or not isinstance(answers.get(name), list):
        raise ValueError(
            'answers must be {"text": [...], "answer_start": [...]}, got ' + f"{answers!r:.60}"
        )
    return answers[name]
