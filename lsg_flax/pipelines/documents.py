"""Reads documents from files, for all commands that write an output for each document.

.csv, .parquet, patterns and folders are read as in data/. Because each document has an output, an
empty line of a .txt is an empty text here.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, get_args

from lsg_flax.data import (
    KINDS,
    DataRow,
    DatasetPart,
    DatasetSource,
    Problems,
    files_at,
    is_dataset_name,
    open_source,
)
from lsg_flax.files import Line, id_in, is_blank, read_lines, valid_text, whole_file
from lsg_flax.inference import Document
from lsg_flax.pipelines.broken import BrokenLines, line_number, unskipped
from lsg_flax.pipelines.tasks import check_choice

Documents = str | os.PathLike | DatasetPart  # a file, folder, pattern or dataset
COLUMNS = ("id", "text", "text_pair", "question", "context")  # fields that `columns` may rename
_CONTENTS = (("input_ids",), ("question", "context"), ("text",))  # fields that make a document


class _NoSuchField(ValueError):
    """A row does not have a field; in a table, no row has it."""


class _LeftOut(Problems):
    """Passes on broken rows of data as broken lines of the file."""

    def __init__(self, documents: "DocumentFile"):
        super().__init__("skip")
        self._documents = documents

    def found(self, place: str, reason: object) -> None:
        self._documents.leave_out(place, ValueError(str(reason)))


class DocumentFile:
    """The documents of a .jsonl, .csv, .parquet or .txt file, of a folder or pattern of such files,
    or of a dataset, read lazily.

    Attributes:
        name: name of the source.
        broken_lines: whether broken lines raise or are skipped.
        skipped: numbers of the broken lines that were skipped so far; for several files, .parquet
            and datasets their FILE:NUMBER.
    """

    def __init__(
        self,
        source: Documents,
        *,
        broken_lines: BrokenLines = "raise",
        text_column: str | None = None,
        columns: Mapping[str, str] = MappingProxyType({}),
        skippable: bool = True,
    ):
        """Finds the files; documents are read when iterated.

        Args:
            source: a .txt has one text per line; empty lines are empty texts. A .jsonl has an
                object per line with "text" (and optionally "text_pair"), with "question" and
                "context", or with "input_ids" (and optionally "attention_mask" and
                "token_type_ids"). An "id" is optional; by default it is the line's number from 0.
                Texts of a .jsonl must not be empty; other fields and blank lines are ignored. A
                .csv or .parquet has columns of these names; the line of names does not count. In a
                folder each .txt is one text, in the order of their names, which are the ids. Other
                files of a folder, or of a pattern such as "data/*.csv", must be of one kind and are
                read one after the other; their documents without an id get their FILE:NUMBER. The
                name of a dataset, or a `DatasetPart`, has rows with such columns.
            broken_lines: whether a line without such a document raises or is skipped.
            text_column: the field that is the text, instead of those above.
            columns: names of the fields in the file, by the names above.
            skippable: whether the message of a broken line advises skipping it.

        Raises:
            FileNotFoundError, ValueError: if there is no such file, it is of another kind, or an
                option is unknown.
        """
        part = source if isinstance(source, DatasetPart) else DatasetPart(os.fspath(source))
        self.skipped: list[int | str] = []
        check_choice("broken_lines", broken_lines, get_args(BrokenLines))
        self.broken_lines, self._text_column = broken_lines, text_column
        self._columns, self._skippable = dict(columns), skippable
        if text_column is not None:
            self._columns["text"] = text_column
        if unknown := sorted(self._columns.keys() - set(COLUMNS)):
            raise ValueError(f"columns has {unknown}; it may have {', '.join(COLUMNS)}.")
        self._dataset = DatasetSource(*part) if is_dataset_name(part.name) else None
        self.name = self._dataset.name if self._dataset else part.name
        self._texts, self._files = ([], []) if self._dataset else self._files_at(part)
        self._of_texts = [file.suffix for file in self._files[:1]] == [".txt"]
        if self._of_texts and self._columns:
            given = f"text_column={text_column!r}" if text_column else f"columns={self._columns}"
            raise ValueError(
                f"{given} is for a .jsonl, .csv or .parquet; {part.name} has only texts."
            )

    @property
    def _is_table(self) -> bool:
        """Whether all rows have the same fields."""
        return self._dataset is not None or {f.suffix for f in self._files} <= {".csv", ".parquet"}

    def _files_at(self, part: DatasetPart) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
        """Returns the text files if the source is a folder of texts, and all files."""
        for name, value in part._asdict().items():
            if name != "name" and value is not None:
                raise ValueError(
                    f"{name}={value!r} is for a dataset, but {part.name} names files; leave it out."
                )
        folder = pathlib.Path(part.name)
        found = (file for file in folder.glob("*.txt") if file.is_file())
        texts = sorted(found) if folder.is_dir() else []
        return texts, texts or self._rows_at(part.name)

    def _rows_at(self, source: str) -> list[pathlib.Path]:
        place = pathlib.Path(source)
        pattern = any(sign in source for sign in "*?[")
        if not place.is_dir() and not (pattern and not place.exists()):
            if place.suffix not in KINDS:
                absent = "" if place.exists() else "; nothing is there now"
                raise ValueError(
                    f"{source} must end in {', '.join(KINDS)}, or be a folder or a pattern of such "
                    f"files, or the name of a dataset{absent}."
                )
            if not place.is_file():
                raise FileNotFoundError(f"{source} is no file.")
            return [place]
        files = files_at(source)
        kinds = sorted({file.suffix for file in files})
        if len(kinds) > 1:
            raise ValueError(
                f"the files of {source} are of the kinds {kinds}; give files of one kind, for "
                "example by a pattern such as 'folder/*.jsonl'."
            )
        return files

    def __iter__(self) -> Iterator[Document]:
        """Yields the documents; raises ValueError for a broken line, with its FILE:NUMBER."""
        for line in self._lines():
            try:
                content = self._content_of(line)
                name = id_in(content, self._name_of(line))
            except ValueError as error:
                self.leave_out(line.place, error)
            else:
                yield Document(name, line.raw, line.place, content)

    def leave_out(self, place: str, error: ValueError) -> None:
        """Raises the error of the broken line at FILE:NUMBER as a ValueError, or counts it as
        skipped."""
        if self.broken_lines == "raise":
            if isinstance(error, _NoSuchField) and self._is_table:
                raise ValueError(f"{place}: {error}.") from error
            raise unskipped(place, error, skippable=self._skippable) from error
        if self._texts:
            self.skipped.append(pathlib.Path(place).name)
        elif len(self._files) != 1 or self._files[0].suffix == ".parquet":
            self.skipped.append(place)
        else:
            self.skipped.append(line_number(place))

    def count_lines(self) -> int:
        """Returns the number of documents, broken ones included, except for rows that cannot be
        separated."""
        if self._texts:
            return len(self._texts)
        return sum(1 for _ in self._lines(Problems("skip")))

    def _lines(self, problems: Problems | None = None) -> Iterator[Line]:
        """Yields the lines. An empty line of a .txt is a text, one of a .jsonl is ignored. Each
        file of a folder of texts is one line, and each row of columns is a line of JSON."""
        problems = problems or _LeftOut(self)
        if self._dataset is not None:
            yield from _lines_of(self._dataset.rows(problems))
        for number, file in enumerate(self._files, 1):
            if self._texts:
                yield whole_file(file, number)
            elif file.suffix in (".txt", ".jsonl"):
                yield from read_lines(file, blank=file.suffix == ".txt")
            else:
                yield from _lines_of(open_source(file, subset=None, split=None).rows(problems))

    def _name_of(self, line: Line) -> int | str:
        if self._texts:
            return self._texts[line.number - 1].name
        return line.place if len(self._files) > 1 else line.number - 1

    def _content_of(self, line: Line) -> dict[str, Any]:
        """Returns the document in a line; raises ValueError if there is none."""
        if self._of_texts:
            return {"text": line.text()}
        content = line.json_object()
        if self._text_column is not None and not isinstance(content.get(self._text_column), str):
            kind = ValueError if self._text_column in content else _NoSuchField
            raise kind(f"it has {sorted(content)} and must have {self._text_column!r}, a text")
        if not self._columns:
            return _content(content)
        missing = [column for column in self._columns.values() if column not in content]
        if missing:
            raise _NoSuchField(f"it has {sorted(content)} and must have {missing[0]!r}")
        named = {name: content[column] for name, column in self._columns.items()}
        others = (name for name in COLUMNS if name not in named and name in content)
        if self._text_column is not None:  # only the text, no other content
            others = (name for name in ("id",) if name not in named and name in content)
        return _content(named | {name: content[name] for name in others})


def _lines_of(rows: Iterable[DataRow]) -> Iterator[Line]:
    for count, row in enumerate(rows, 1):
        yield Line(row.place, count, json.dumps(row.values, default=str).encode())


def _content(content: dict[str, Any]) -> dict[str, Any]:
    """Checks the fields of a line; raises ValueError if they are not a document."""
    kind = next((names for names in _CONTENTS if content.keys() >= set(names)), None)
    if kind is None:
        kinds = ", or ".join(" and ".join(names) for names in reversed(_CONTENTS))
        texts = {name: len(text) for name, text in content.items() if isinstance(text, str)}
        longest = max(texts.keys() - {"id"}, key=lambda name: (texts[name], name), default=None)
        advice = f"; if the text has another name, pass text_column={longest!r}" * bool(longest)
        raise _NoSuchField(f"it has {sorted(content)} and must have {kinds}{advice}")
    if content.get("text_pair", "") in (None, ""):  # no pair, as in training
        content = {name: value for name, value in content.items() if name != "text_pair"}
    for name in ("text", "text_pair", "question", "context"):
        if not isinstance(content.get(name, ""), str):
            raise ValueError(f"its {name} must be a text, got {json.dumps(content[name]):.60}")
        if name in content and is_blank(valid_text(content[name])):
            raise ValueError(f"its {name} is empty")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if not _are_ids(content.get(name, [0])):
            raise ValueError(f"its {name} must be a list of integers")
    masks = content.get("attention_mask", [1])
    if not all(map(any, masks if isinstance(masks[0], list) else [masks])):
        raise ValueError("its attention_mask is 0 everywhere, so there is nothing to read")
    return content


def _are_ids(values: object) -> bool:
    """Whether a value is a list of integers, or, for multiple choice, of such lists."""
    if not isinstance(values, list) or not values:
        return False
    if all(isinstance(value, list) for value in values):
        return all(value and all(type(v) is int for v in value) for value in values)
    return all(type(value) is int for value in values)
