"""Checked values of rows of data; a ValueError says what a row has instead.

Axes: Y labels.
"""

import contextlib
import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lsg_flax.data.files import DataRow
from lsg_flax.data.options import Columns
from lsg_flax.files import is_blank, valid_text

_QUANTITY = r"[+-]?(\d+\.?\d*|\.\d+)"
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
# Largest plausible number of labels without a list of names: in total, and besides 100 per label
# that occurs.
_MOST_LABELS, _UNSEEN = 1 << 20, 1000
_COLUMNS = vars(Columns()).values()


def value_in(row: DataRow, column: str) -> Any:
    """Returns the value of a column; raises ValueError with the row's columns if it is missing."""
    value = row.values.get(column)
    if value is None:
        if column in row.values:
            raise ValueError(f"column {column!r} is empty")
        named = f"; if it has another name, pass columns={{{column!r}: '...'}}"
        advice = named if column in _COLUMNS else ""
        raise ValueError(f"column {column!r} is missing; there are {list(row.values)}{advice}")
    return value


def text_in(row: DataRow, column: str) -> str:
    """Returns the text of a column; raises ValueError if it is something else, or empty."""
    value = value_in(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column!r} must be a text, got {value!r:.60}")
    if is_blank(value):
        raise ValueError(f"{column!r} is empty")
    return valid_text(value)


def texts_in(row: DataRow, column: str, what: str) -> list[str]:
    """Returns the texts of a list; raises ValueError if it is something else. `what` names a text
    in the error, such as "word"."""
    value = value_in(row, column)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{column!r} must be a list of {what}s, got {value!r:.60}")
    if not value:
        raise ValueError(f"{column!r} is empty")
    blank = [place for place, text in enumerate(value) if is_blank(text)]
    if blank:
        raise ValueError(f"{column!r} has an empty {what} at {blank[0]} (from 0)")
    return [valid_text(text) for text in value]


# What a label in a row means, in data for training, evaluation and prediction:
#
#   "pos"             the name
#   1, 1.0, "1"       the number 1, and so are "01" and "1.0"
#   true, false       the numbers 1 and 0
#   "", " ", " pos"   invalid: the row is broken
#   0.5, NaN, null, lists, objects: invalid
#
# A number is a label's id, counted from 0; but if some names are numbers, it is a name.


def label_value(value: object) -> str | int:
    """Returns the name or number of a label.

    Raises:
        ValueError: if it is neither.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        if is_blank(value):
            raise ValueError(f"the label {value!r} is empty")
        if value != value.strip():
            raise ValueError(
                f"the label {value!r} has spaces around it and would be another class than "
                f"{value.strip()!r}; remove them, or give labels=, the names with their spaces"
            )
        return valid_text(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise ValueError(f"a label must be a name or a whole number, got {value!r:.60}")


class LabelTable(NamedTuple):
    """Names of labels, prepared for look-up."""

    places: dict[str, int]
    numbers: bool  # whether some names are numbers themselves

    @classmethod
    @functools.lru_cache(maxsize=8)
    def of(cls, names: tuple[str, ...]) -> "LabelTable":
        """Returns the table of these names."""
        places = {name: place for place, name in enumerate(names)}
        return cls(places, any(_number_of(name) is not None for name in names))


def label_number(value: object, names: tuple[str, ...]) -> int:
    """Returns the number of a label that is given by name or by number.

    Raises:
        ValueError: if it is not among the names.
    """
    table = LabelTable.of(names)
    if isinstance(value, str) and value in table.places:
        return table.places[value]
    value = label_value(value)
    number = _number_of(value)
    if number is not None and str(number) in table.places:
        return table.places[str(number)]
    if number is not None and 0 <= number < len(names) and not table.numbers:
        return number
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    numbers = "" if table.numbers else " (or their numbers from 0)"
    raise ValueError(f"label {value!r:.60} is none of the {len(names)} labels {shown}{numbers}")


def _number_of(value: str | int) -> int | None:
    """Returns the whole number of a label, which may be text; None for a name."""
    if isinstance(value, int):
        return value
    return int(value.split(".")[0]) if re.fullmatch(r"[+-]?\d{1,18}(\.0*)?", value) else None


def labels_in(values: Iterable[object]) -> set[str | int]:
    """Returns the labels of a column, also those in lists. Values that are not labels are ignored
    here; reading their row reports them."""
    found: set[str | int] = set()
    for value in values:
        for label in value if isinstance(value, list) else [value]:
            with contextlib.suppress(ValueError):
                found.add(label_value(label))
    return found


def names_of_labels(values: Iterable[object]) -> tuple[str, ...]:
    """Returns the labels found in a column: the names sorted, or the numbers from 0 to the largest.

    Raises:
        ValueError: for names and numbers together, or numbers that cannot be ids of labels.
    """
    found = labels_in(values)
    names = {label for label in found if isinstance(label, str)}
    numbers = {label for label in found if isinstance(label, int)}
    if names and all(re.fullmatch(_QUANTITY, name) for name in names):  # as in a .csv
        whole = {name: number for name in names if (number := _number_of(name)) is not None}
        if names - whole.keys():
            raise ValueError(
                f"labels are numbers such as {min(names - whole.keys())} that are not whole; give "
                "problem_type='regression' for quantities, or labels=, the names."
            )
        names, numbers = set(), numbers | {*whole.values()}
    if names and numbers:
        raise ValueError(
            f"labels are names such as {min(names)!r} and numbers such as {min(numbers)}; give "
            "labels=, the names in the order of their numbers."
        )
    most = min(_MOST_LABELS, _UNSEEN + 100 * len(numbers))
    if numbers and max(numbers) >= most:
        raise ValueError(
            f"labels are {len(numbers)} different numbers up to {max(numbers)!r:.60}, too large to "
            "be ids of labels from 0; give labels=, or problem_type='regression' for quantities."
        )
    return tuple(map(str, range(max(numbers) + 1))) if numbers else tuple(sorted(names))


def numbers_in(value: Any) -> Float[np.ndarray, "Y"]:
    """Returns a number, or a list of numbers, as [Y] in float32; raises ValueError for other
    values."""
    try:
        numbers = [float(v) for v in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the label must be a number or a list of them, got {value!r:.60}"
        ) from error
    if not numbers or not all(abs(number) <= _LARGEST_FLOAT for number in numbers):
        raise ValueError(
            f"the label must be a finite float32 number or a list of them, got {value!r:.60}"
        )
    return np.array(numbers, np.float32)


def answers_in(answers: object, name: str) -> list:
    """Returns the texts or starts of SQuAD's answers; raises ValueError for another form."""
    if not isinstance(answers, dict) or not isinstance(answers.get(name), list):
        raise ValueError(
            'answers must be {"text": [...], "answer_start": [...]}, got ' + f"{answers!r:.60}"
        )
    return answers[name]
