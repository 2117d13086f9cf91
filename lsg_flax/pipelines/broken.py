"""Broken lines of a file: they raise an error with their FILE:NUMBER, or are skipped and counted. A
file without any document gets a warning: among many files one may well be empty."""

import os
import warnings
from collections.abc import Sequence
from typing import Literal

BrokenLines = Literal["raise", "skip"]


def unskipped(place: str, error: ValueError, *, skippable: bool = True) -> ValueError:
    """Returns the error for a broken line at FILE:NUMBER that is not skipped."""
    message = str(error) if str(error).startswith(place) else f"{place}: {error}"
    end = "" if message.endswith((".", "?")) else "."
    remedy = ', or pass broken_lines="skip"' if skippable else ""
    return ValueError(f"{message}{end} Mend it{remedy}.")


def line_number(place: str) -> int:
    """Returns the number in FILE:NUMBER."""
    return int(place.rpartition(":")[2])


def warn_of_skipped(skipped: Sequence[int | str], source: str | os.PathLike) -> None:
    """Warns of skipped lines, or files of a folder, if there are any."""
    if skipped:
        numbers = ", ".join(map(str, skipped[:10])) + (", ..." if len(skipped) > 10 else "")
        warnings.warn(
            f"{len(skipped)} broken lines of {source} were skipped: {numbers}.", stacklevel=3
        )


def warn_of_none(documents: int, source: str | os.PathLike) -> None:
    """Warns of a source that has no documents, so that the result is empty."""
    if not documents:
        warnings.warn(f"{source} has no documents, so the result is empty.", stacklevel=3)
