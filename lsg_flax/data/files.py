"""Reads rows of data as dicts, from local files or the `datasets` library, one at a time, each with
its place (such as FILE:LINE) for messages."""

import csv
import glob
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lsg_flax.files import Json, read_lines, utf8_text

OnError = Literal["raise", "skip"]
TextUnit = Literal["line", "file"]
Paths = str | pathlib.Path | Sequence[str | pathlib.Path]

_REPORTED = 5  # skipped rows whose messages are kept
_LARGEST_FIELD = 2**31 - 1  # of a CSV file; Python's limit, 128 KiB, is too small for documents


class DataRow(NamedTuple):
    """The values of one row of the data, and its place in the data."""

    place: str
    values: Json


class Problems:
    """Handles broken rows: raises, or counts and skips them.

    Attributes:
        skipped: number of skipped rows.
        messages: the first few reasons.
    """

    def __init__(self, on_error: OnError):
        self.on_error = on_error
        self.skipped = 0
        self.messages: list[str] = []

    def found(self, place: str, reason: object) -> None:
        """Raises or counts a broken row.

        Raises:
            ValueError: unless broken rows are skipped.
        """
        message = f"{place}: {reason}"
        if self.on_error == "raise":
            raise ValueError(f"{message} (on_error='skip' skips such rows)")
        self.skipped += 1
        if len(self.messages) < _REPORTED:
            self.messages.append(message)


class FileSource:
    """Local files of one kind."""

    def __init__(self, files: Sequence[pathlib.Path], text_unit: TextUnit):
        self.files = tuple(files)
        self.text_unit: TextUnit = text_unit
        self._states = self._state()
        self.name = ", ".join(map(str, self.files[:3])) + (", ..." if len(self.files) > 3 else "")

    def rows(self, problems: Problems) -> Iterator[DataRow]:
        """Yields all rows, file by file."""
        for file in self.files:
            if file.suffix == ".txt":
                yield from _read_text(file, self.text_unit, problems)
            else:
                yield from _READERS[file.suffix](file, problems)

    def digest(self) -> str:
        """Returns a hash of the contents of the files, in order."""
        total, self._states = hashlib.sha256(), self._state()
        for file in self.files:
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
            total.update(file.suffix.encode())
        return total.hexdigest()

    def check_unchanged(self) -> None:
        """Raises ValueError if a file has changed since `digest` read it; otherwise its rows would
        be cached as those of the old file."""
        for file, before, now in zip(self.files, self._states, self._state(), strict=True):
            if before != now:
                raise ValueError(
                    f"{file} changed while it was read; run again when it is complete."
                )

    def _state(self) -> list[tuple[int, int, int] | None]:
        """Returns what changes with the contents of each file; None for a missing file."""
        states = [file.stat() if file.exists() else None for file in self.files]
        return [state and (state.st_ino, state.st_size, state.st_mtime_ns) for state in states]

    def label_names(self, column: str) -> tuple[str, ...] | None:
        """Returns the names of the labels if the source knows them; files do not."""
        return None


class DatasetPart(NamedTuple):
    """A part of a dataset of the `datasets` library.

    Attributes:
        subset: subset (configuration), the second argument of `load_dataset`.
        split: None if the dataset has only one split.
    """

    name: str
    subset: str | None = None
    split: str | None = None


class DatasetSource:
    """A split of a dataset of the `datasets` library.

    Raises:
        ImportError: if the library is not installed.
        ValueError: if it cannot load the dataset, or if `split` is None and there are several.
    """

    def __init__(self, name: str, subset: str | None, split: str | None):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"{name!r} is not a file or folder here; to load it as the name of a dataset, "
                "install the `datasets` library: pip install 'lsg-flax[data]'."
            ) from error
        try:
            loaded: Any = datasets.load_dataset(name, subset, split=split)
        except Exception as error:  # the library raises many kinds
            raise ValueError(
                f"{name!r} is not a file or folder here, and `datasets` cannot load it as "
                f"load_dataset({name!r}, {subset!r}, split={split!r}): {error}. As files, {name} "
                f"must end in {', '.join(KINDS)}, or be a folder or a pattern of such files; "
                "nothing is there now."
            ) from error
        if split is None:  # all splits were loaded
            if len(loaded) != 1:
                raise ValueError(
                    f"the dataset {name!r} has the splits {', '.join(loaded)}; give one of them as "
                    "split=."
                )
            ((split, loaded),) = loaded.items()
        self.dataset = loaded
        self.name = f"{name}[{split}]"

    def rows(self, problems: Problems) -> Iterator[DataRow]:
        """Yields all rows in order."""
        for number, values in enumerate(self.dataset):
            yield DataRow(f"{self.name}, row {number}", values)

    def digest(self) -> str:
        """Returns the library's own fingerprint of the table and of all changes to it."""
        return f"{self.name} {self.dataset._fingerprint}"

    def check_unchanged(self) -> None:
        """Does nothing: the library keeps a table as it was loaded."""

    def label_names(self, column: str) -> tuple[str, ...] | None:
        """Returns the names of a `ClassLabel` column, or of a column of lists of them."""
        feature = self.dataset.features.get(column)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return None if names is None else tuple(names)


DataSource = FileSource | DatasetSource


def open_source(
    paths: Paths, *, subset: str | None, split: str | None, text_unit: TextUnit = "line"
) -> DataSource:
    """Opens the source of rows.

    Args:
        paths: a file, a folder, a pattern such as "data/part-*.jsonl", a list of these, or the
            name of a dataset for `datasets.load_dataset`.
        subset, split: part of a dataset, see `DatasetPart`.
        text_unit: whether a line or a whole file counts as one text in .txt files.

    Raises:
        FileNotFoundError: if there are no such files.
        ValueError: for files of unknown or several kinds, or a dataset that cannot be loaded.
        ImportError: for a dataset, if the `datasets` library is not installed.
    """
    given = [paths] if isinstance(paths, str | pathlib.Path) else list(paths)
    if len(given) == 1 and isinstance(given[0], str) and is_dataset_name(given[0]):
        return DatasetSource(given[0], subset, split)
    files = [file for path in given for file in _files_of(str(path))]
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        raise ValueError(
            f"the files of {paths!r} are of the kinds {kinds}; give files of one kind, for example "
            "with a pattern such as 'folder/*.jsonl'."
        )
    return FileSource(files, text_unit)


def files_at(paths: Paths) -> list[pathlib.Path]:
    """Returns the files that `open_source` reads for these paths; none for a dataset.

    Raises:
        FileNotFoundError: if there are no such files.
        ValueError: for a file of a kind that cannot be read.
    """
    given = [paths] if isinstance(paths, str | pathlib.Path) else list(paths)
    return [f for path in given if not is_dataset_name(str(path)) for f in _files_of(str(path))]


def is_dataset_name(path: str) -> bool:
    """Returns whether a path is not a file, folder or pattern, but may be the name of a dataset."""
    known = pathlib.Path(path).suffix in KINDS
    return (
        not known
        and not pathlib.Path(path).exists()
        and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path))
    )


def _files_of(path: str) -> list[pathlib.Path]:
    place = pathlib.Path(path).expanduser()
    if place.is_file():
        if place.suffix not in KINDS:
            raise ValueError(f"{path} cannot be read; give a file of {', '.join(KINDS)}.")
        return [place]
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if not _hidden(file.relative_to(place)))
    else:
        files = sorted(map(pathlib.Path, glob.glob(str(place), recursive=True)))
    found = [file for file in files if file.suffix in KINDS and file.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{path} is not a file, nor a folder or pattern with files of {', '.join(KINDS)} "
            f"(other files there: {[file.name for file in files[:3]]})."
        )
    return found


def _hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# Readers of files.


def _read_jsonl(file: pathlib.Path, problems: Problems) -> Iterator[DataRow]:
    for line in read_lines(file, blank=False):
        try:
            values = line.json_object()
        except ValueError as error:
            problems.found(line.place, error)
        else:
            yield DataRow(line.place, values)


def _read_csv(file: pathlib.Path, problems: Problems) -> Iterator[DataRow]:
    csv.field_size_limit(_LARGEST_FIELD)
    # Not `read_lines`: a quoted field may contain line ends. Bytes that are not UTF-8 are read as
    # surrogates, so that reading can continue after them; the row is then reported.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            names = next(reader, [])
            utf8_text("".join(names))
        except (csv.Error, ValueError) as error:  # never skipped: every row needs the names
            raise ValueError(
                f"{file}:1: the names of the columns cannot be read: {error}; save the file as CSV "
                "in UTF-8."
            ) from error
        if len(set(names)) < len(names):
            raise ValueError(f"{file}:1: names of columns must differ, got {names}; rename some.")
        while True:
            first = reader.line_num + 1
            place = f"{file}:{first}"
            try:
                fields = next(reader, None)
                if fields is None:
                    return
                if not fields:  # a blank line
                    continue
                if len(fields) != len(names):
                    raise ValueError(f"{len(fields)} fields for the columns {names}")
                utf8_text("".join(fields))
            except (csv.Error, ValueError) as error:
                if isinstance(error, csv.Error) and reader.line_num > first:
                    raise ValueError(  # never skipped: the end of the row is unknown
                        f"{place}: a quoted field is wrong at line {reader.line_num}: {error}; "
                        "check its quotes"
                    ) from error
                problems.found(place, f"not a row of CSV: {error}")
                continue
            yield DataRow(place, dict(zip(names, fields, strict=True)))


def _read_parquet(file: pathlib.Path, problems: Problems) -> Iterator[DataRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {file} needs pyarrow: pip install 'lsg-flax[data]'.") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{file}: it needs columns with different names, got {names}.")
            for batch in opened.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield DataRow(f"{file}, row {number}", values)
    except pyarrow.ArrowException as error:  # never skipped: nothing after the damage is readable
        raise ValueError(f"{file} is not valid Parquet after row {number}: {error}") from error


def _read_text(file: pathlib.Path, unit: TextUnit, problems: Problems) -> Iterator[DataRow]:
    texts: list[str] = []
    for line in read_lines(file, blank=unit == "file"):
        try:
            texts.append(line.text())
        except ValueError as error:
            problems.found(line.place, error)
            if unit == "file":
                return
            continue
        if unit == "line":
            yield DataRow(line.place, {"text": texts.pop()})
    if "".join(texts).strip():
        yield DataRow(f"{file}:1", {"text": "\n".join(texts).rstrip("\n")})


_READERS: dict[str, Callable[[pathlib.Path, Problems], Iterator[DataRow]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
KINDS = (*_READERS, ".txt")
