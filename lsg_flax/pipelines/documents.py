"""Documents of files, as all commands read them that make something of each.

Rows of .csv and .parquet, patterns and folders are those of data/; an output belongs to each
document, so that an empty line of a .txt is an empty text here.
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

Documents = str | os.PathLike | DatasetPart  # where they are
COLUMNS = ("id", "text", "text_pair", "question", "context")  # what may be called otherwise
_CONTENTS = (("input_ids",), ("question", "context"), ("text",))  # what a line has of a document


class _LeftOut(Problems):
    """Broken rows of data, which are the file's broken lines."""

    def __init__(self, documents: "DocumentFile"):
        super().__init__("skip")
        self._documents = documents

    def found(self, place: str, reason: object) -> None:
        self._documents.leave_out(place, ValueError(str(reason)))


class DocumentFile:
    """The documents of a .jsonl, .csv, .parquet or .txt, of a folder or pattern of such files, or
    of a dataset, read lazily.

    Attributes:
        name: of what they are read from.
        broken_lines: what is done with them.
        skipped: numbers of the broken lines that were passed over so far; of several files, of
            .parquet and of a dataset their places.
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
        """Names the files.

        Args:
            source: .txt with one text per line, empty ones too, or .jsonl of objects with "text"
                (and maybe "text_pair"), "question" and "context", or "input_ids" (and maybe
                "attention_mask" and "token_type_ids"), and maybe "id", else the line's place from
                0. Texts in it are not empty. Other entries, and blank lines of a .jsonl, are
                ignored. .csv and .parquet have columns of these names, and lines counted without
                the names. Of a folder each .txt is one text, in the order of their names, which are
                the ids; other files of a folder or of a pattern such as "data/*.csv", of one kind,
                come one after the other, and documents without an id are called by their place. The
                name of a dataset, or a `DatasetPart`, has rows with such columns.
            broken_lines: raise for a line that is none of this, or skip it.
            text_column: the entry that is the text, in place of all these.
            columns: what the entries are called, by the names above.
            skippable: whether who reads the message of a broken line may choose to skip it.

        Raises:
            FileNotFoundError, ValueError: for no such file, another kind, or another choice.
        """
        part = source if isinstance(source, DatasetPart) else DatasetPart(os.fspath(source))
        self.skipped: list[int | str] = []
        check_choice("broken_lines", broken_lines, get_args(BrokenLines))
        self.broken_lines, self._text_column = broken_lines, text_column
        self._columns, self._skippable = dict(columns), skippable
        if text_column is not None:
            self._columns["text"] = text_column
        if unknown := sorted(self._columns.keys() - set(COLUMNS)):
            raise ValueError(f"columns name {unknown}; there are {', '.join(COLUMNS)}.")
        self._dataset = DatasetSource(*part) if is_dataset_name(part.name) else None
        self.name = self._dataset.name if self._dataset else part.name
        self._texts, self._files = ([], []) if self._dataset else self._files_at(part)
        self._of_texts = [file.suffix for file in self._files[:1]] == [".txt"]
        if self._of_texts and self._columns:
            given = f"text_column={text_column!r}" if text_column else f"columns={self._columns}"
            raise ValueError(
                f"{given} is for a .jsonl, .csv or .parquet; {part.name} has texts alone."
            )

    def _files_at(self, part: DatasetPart) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
        """The texts of a folder of them, and all files."""
        for name, value in part._asdict().items():
            if name != "name" and value is not None:
                raise ValueError(
                    f"{name}={value!r} is of a dataset, and {part.name} names files; leave it out."
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
        """Raises ValueError for a broken line, by its place."""
        for line in self._lines():
            try:
                content = self._content_of(line)
                name = id_in(content, self._name_of(line))
            except ValueError as error:
                self.leave_out(line.place, error)
            else:
                yield Document(name, line.raw, line.place, content)

    def leave_out(self, place: str, error: ValueError) -> None:
        """Raises, unless broken lines are skipped, for the line at FILE:NUMBER."""
        if self.broken_lines == "raise":
            raise unskipped(place, error, skippable=self._skippable) from error
        if self._texts:
            self.skipped.append(pathlib.Path(place).name)
        elif len(self._files) != 1 or self._files[0].suffix == ".parquet":
            self.skipped.append(place)
        else:
            self.skipped.append(line_number(place))

    def count_lines(self) -> int:
        """Those with documents, broken ones too, but for rows that cannot be told apart."""
        if self._texts:
            return len(self._texts)
        return sum(1 for _ in self._lines(Problems("skip")))

    def _lines(self, problems: Problems | None = None) -> Iterator[Line]:
        """An empty line of a .txt is a text like others; in a .jsonl it is nothing. A file of a
        folder of texts counts as one line, and a row of columns is the line that says the same."""
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
        """Raises ValueError for what is no document."""
        if self._of_texts:
            return {"text": line.text()}
        content = line.json_object()
        if self._text_column is not None and not isinstance(content.get(self._text_column), str):
            raise ValueError(
                f"it has {sorted(content)} and must have {self._text_column!r}, a text"
            )
        if not self._columns:
            return _content(content)
        missing = [column for column in self._columns.values() if column not in content]
        if missing:
            raise ValueError(f"it has {sorted(content)} and must have {missing[0]!r}")
        named = {name: content[column] for name, column in self._columns.items()}
        others = (name for name in COLUMNS if name not in named and name in content)
        if self._text_column is not None:  # the text, and nothing else
            others = (name for name in ("id",) if name not in named and name in content)
        return _content(named | {name: content[name] for name in others})


def _lines_of(rows: Iterable[DataRow]) -> Iterator[Line]:
    for count, row in enumerate(rows, 1):
        yield Line(row.place, count, json.dumps(row.values, default=str).encode())


def _content(content: dict[str, Any]) -> dict[str, Any]:
    """What a line says; ValueError if it is no document."""
    kind = next((names for names in _CONTENTS if content.keys() >= set(names)), None)
    if kind is None:
        kinds = "; or ".join(" and ".join(names) for names in _CONTENTS)
        raise ValueError(
            f"it has {sorted(content)} and must have {kinds}; columns= or text_column= names "
            "another entry that is the text"
        )
    if content.get("text_pair", "") in (None, ""):  # no pair, as in training
        content = {name: value for name, value in content.items() if name != "text_pair"}
    for name in ("text", "text_pair", "question", "context"):
        if not isinstance(content.get(name, ""), str):
            raise ValueError(f"its {name} must be a text, got {json.dumps(content[name]):.60}")
        if name in content and is_blank(valid_text(content[name])):
            raise ValueError(f"its {name} is empty")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if not _are_ids(content.get(name, [0])):
            raise ValueError(f"its {name} are no list of whole numbers")
    masks = content.get("attention_mask", [1])
    if not all(map(any, masks if isinstance(masks[0], list) else [masks])):
        raise ValueError("its attention_mask is 0 everywhere, so there is nothing to read")
    return content


def _are_ids(values: object) -> bool:
    """A list of whole numbers, or of such lists for multiple choice."""
    if not isinstance(values, list) or not values:
        return False
    if all(isinstance(value, list) for value in values):
        return all(value and all(type(v) is int for v in value) for value in values)
    return all(type(value) is int for value in values)
