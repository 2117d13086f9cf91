"""Checks of dataclass fields at construction: types by the fields' annotations, numbers by a table
of ranges."""

import dataclasses
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

_SHORT = reprlib.Repr()  # a value in a message is short, whatever a file holds
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 2  # six to a level
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "null",
}


class Range(NamedTuple):
    """The numbers that a field may have, both ends included, and the words of its error message."""

    least: float
    most: float
    says: str


def whole(least: int, most: int) -> Range:
    """The range of a count. `most` is larger than in any real model; it keeps a damaged file from
    exhausting the host's memory."""
    return Range(least, most, f"must be at least {least} and at most {most:,}")


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def short(value: Any) -> str:
    """The value as error messages show it, shortened."""
    return _SHORT.repr(value)


def check_fields(
    record: Any, ranges: Mapping[str, Range], spelled: Callable[[str], str] = str
) -> None:
    """Checks every field of a frozen dataclass. Equivalent values are converted to the annotated
    type: NumPy numbers, an int for a float, a list for a tuple.

    Args:
        record: the dataclass instance.
        ranges: the allowed numbers of the numeric fields, by field name.
        spelled: returns the name that messages use for a field.

    Raises:
        ValueError: for a value of another type, or outside its range.
    """
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        checked = checked_value(spelled(f.name), value, f.type, ranges.get(f.name))
        if checked is not value:
            object.__setattr__(record, f.name, checked)


def checked_value(name: str, value: Any, kind: Any, limits: Range | None = None) -> Any:
    """Returns the value as the annotation `kind` requires it.

    Raises:
        ValueError: for a value of another type, outside the limits, or a float that is not finite.
    """
    try:
        checked = _typed(value, kind)
    except TypeError as error:
        raise ValueError(f"{name}={short(value)} {_wanted(value, kind)}.") from error
    if isinstance(checked, float) and not math.isfinite(checked):
        raise ValueError(f"{name}={short(value)} must be a finite number.")
    if limits and checked is not None and not limits.least <= checked <= limits.most:
        raise ValueError(f"{name}={short(value)} {limits.says}.")
    return checked


def _typed(value: Any, kind: Any) -> Any:
    """Returns the value as `kind` requires it; raises TypeError if it is of another type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for part in parts:
            try:
                return _typed(value, part)
            except TypeError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in parts:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_typed(item, parts[0]) for item in value)
    elif kind is bool:
        if isinstance(value, bool | np.bool_):
            return bool(value)
    elif kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, wanted) and not isinstance(value, bool):
            return _number(value, kind)
    elif isinstance(value, kind):
        return value
    raise TypeError


def _number(value: Any, kind: type) -> Any:
    try:
        return value if type(value) is kind else kind(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf


def _wanted(value: Any, kind: Any) -> str:
    """What an error message says about a value that is not of `kind`."""
    parts = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is tuple:
        return f"must be a list in which each item is {_WORDS[parts[0]]}"
    literals = next((p for p in (kind, *parts) if typing.get_origin(p) is Literal), None)
    if literals is not None:
        return f"is unknown; choose one of {', '.join(typing.get_args(literals))}"
    names = [
        _WORDS.get(part) or ("a list" if typing.get_origin(part) is tuple else part.__name__)
        for part in parts
    ]
    quoted = isinstance(value, str) and {int, float, bool} & {*parts}
    return f"must be {' or '.join(names)}{', without quotes' if quoted else ''}"
