"""Writes outputs of documents as lines of JSON, in a resumable file."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lsg_flax.files import id_in
from lsg_flax.inference.encodings import Encoding
from lsg_flax.inference.lines import Document, ResumableLines, Unfinished, json_line
from lsg_flax.inference.predictor import DocumentWindow, Predictor, Result
from lsg_flax.models import Model, Params
from lsg_flax.progress import Bar


def predict_to_jsonl(
    path: str | os.PathLike,
    model: Model,
    params: Params,
    encodings: Sequence[Encoding],
    *,
    ids: Sequence[Any] | None = None,
    batch_size: int = 8,
    buckets: Sequence[int] | None = None,
    fields: Sequence[str] | None = None,
    mesh: Mesh | None = None,
    window: int = 2048,
    unfinished: Unfinished = "continue",
    progress: bool = True,
) -> None:
    """Writes one line of JSON per document, in order: its `id` and the outputs.

    Finished windows are written to `path` + ".partial", where the same call resumes after a kill;
    it is renamed to `path` when it is complete, and an old file is kept until then.

    Args:
        path: the .jsonl file to write.
        model, params, encodings, batch_size, buckets, fields, mesh, progress: as in `predict`.
        ids: ids of the documents; by default 0, 1, ...
        window: number of documents that are sorted, held in memory and written together.
        unfinished: what to do with a partial file: "continue" or "replace" it.

    Raises:
        ValueError: as `predict`; if there are not as many ids as documents; for an output that is
            not finite, which JSON cannot represent (the message has its document); and for a
            partial file of another model or other documents.
        OSError: if the file cannot be written; finished windows are kept.
    """
    names = list(range(len(encodings))) if ids is None else list(ids)
    if len(names) != len(encodings):
        raise ValueError(f"{len(names)} ids for {len(encodings)} documents; give one each.")
    predictor = Predictor(
        model, params, batch_size=batch_size, buckets=buckets, fields=fields, mesh=mesh
    )
    for place, (name, encoding) in enumerate(zip(names, encodings, strict=True)):
        id_in({"id": json.loads(json_line(name))}, place)
        predictor.check(f"document {place}", encoding, like=encodings[0])
    documents = (
        Document(name, json_line([name, encoding]).encode(), f"document {place}", encoding)
        for place, (name, encoding) in enumerate(zip(names, encodings, strict=True))
    )
    with (
        ResumableLines(path, predictor.settings(), unfinished=unfinished) as file,
        Bar("documents", total=len(names), initial=file.finished, shown=progress) as bar,
    ):
        predict_lines(
            file,
            predictor,
            documents,
            rows_of=lambda document: [(document.content, None)],
            line_of=lambda document, _, results: output_line(document, results[0]),
            window=window,
            bar=bar,
        )


def predict_lines(
    file: ResumableLines,
    predictor: Predictor,
    documents: Iterator[Document],
    *,
    rows_of: Callable[[Document], Sequence[tuple[Encoding, Any]]],
    line_of: Callable[[Document, Any, list[Result]], str],
    window: int,
    bar: Bar,
) -> None:
    """Writes the lines of the unfinished documents, while the device computes the next ones.

    Args:
        file: the opened file.
        predictor: runs the model.
        documents: all documents, finished ones included.
        rows_of: returns the rows of a document, each an encoding and further data.
        line_of: returns the line for a document, its rows and their results.
        window: number of documents that are sorted, held in memory and written together.
        bar: the progress bar.

    Raises:
        ValueError: if the finished documents are others, and as `Predictor.stream`.
        OSError: as `ResumableLines.write`.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1.")
    file.skip(documents)
    started, waiting = itertools.tee(
        _WindowLines(part, [rows_of(document) for document in part], file.ahead(part), line_of)
        for part in _windows(documents, window)
    )
    batches = predictor.batches(each.window() for each in started)
    for part in waiting:
        shown = 0
        for results, last in batches:
            if not last and not file.due():
                continue
            lines = part.finished(results)
            (file.write if last else file.keep)(part.documents, lines)
            bar.update(len(lines) - shown)
            shown = len(lines)
            if last:
                break


class _WindowLines:
    """The documents of a window, and the lines of those that are finished."""

    def __init__(
        self,
        documents: Sequence[Document],
        rows: Sequence[Sequence[tuple[Encoding, Any]]],
        lines: dict[int, str],
        line_of: Callable[[Document, Any, list[Result]], str],
    ):
        self.documents, self._rows, self._lines, self._line_of = documents, rows, lines, line_of
        ends = itertools.accumulate(map(len, rows), initial=0)
        self._spans = list(itertools.pairwise(ends))  # the rows of each document among all rows

    def window(self) -> DocumentWindow:
        """Returns the rows for the model; those of documents that have a line are known."""
        known = (row for place in self._lines for row in range(*self._spans[place]))
        return DocumentWindow([row[0] for rows in self._rows for row in rows], frozenset(known))

    def finished(self, results: list[Result]) -> dict[int, str]:
        """Returns the lines of the documents, by place, whose rows all have results."""
        for place, (start, end) in enumerate(self._spans):
            if place not in self._lines and all(results[start:end]):
                given = self.documents[place], self._rows[place], results[start:end]
                self._lines[place] = self._line_of(*given)
        return self._lines


def _windows(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Yields lists of `size` consecutive documents."""
    documents = iter(documents)
    while part := list(itertools.islice(documents, size)):
        yield part


def output_line(document: Document, result: Result) -> str:
    """Returns id and outputs as JSON; raises ValueError if outputs are not finite."""
    broken = [field for field, value in result.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{document.place}: {broken} are not finite (id {document.name!r}).")
    return json_line({"id": document.name} | {f: np.float32(v) for f, v in result.items()})
