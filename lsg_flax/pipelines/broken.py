"""Broken lines of a file: raised by their place, or skipped and counted."""

import os
import warnings
from collections.abc import Sequence
from typing import Literal

BrokenLines = Literal["raise", "skip"]


def unskipped(place: str, error: ValueError, *, skippable: bool = True) -> ValueError:
    """What to raise for a broken line at FILE:NUMBER where none is skipped, or none can be."""
    message = str(error) if str(error).startswith(place) else f"{place}: {error}"
    end = "" if message.endswith((".", "?")) else "."
    remedy = ', or pass broken_lines="skip"' if skippable else ""
    return ValueError(f"{message}{end} Mend it{remedy}.")


def line_number(place: str) -> int:
    """The number in FILE:NUMBER."""
    return int(place.rpartition(":")[2])


def warn_of_skipped(skipped: Sequence[int | str], source: str | os.PathLike) -> None:
    """Names the lines, or files of a folder, if there are any."""
    if skipped:
        numbers = ", ".join(map(str, skipped[:10])) + (", ..." if len(skipped) > 10 else "")
        warnings.warn(
            f"{len(skipped)} broken lines of {source} were skipped: {numbers}.", stacklevel=3
        )
