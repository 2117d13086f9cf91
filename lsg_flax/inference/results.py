"""Documents to lines of JSON in a file that survives a kill."""

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
from lsg_flax.inference.predictor import Predictor, Result
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

    The file gets its name when it is complete; before that nothing is at `path` or the old file,
    and finished windows are in `path` + ".partial", where the same call continues after a kill.

    Args:
        ids: names of the documents; 0, 1, ... by default.
        window: documents sorted and held in memory together, and written together.
        unfinished: what to do with a partial file: continue it, or "replace" it.

    Raises:
        ValueError: as `predict`, for another number of ids than documents, for an output that is
            not finite, which JSON cannot say (its document is named), and for the partial file of
            another model or other documents.
        OSError: if the file cannot be written; what is finished is kept.
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
    """Writes the lines of the documents that are not finished, while the device works on what
    follows.

    Args:
        file: opened.
        rows_of: the rows for the model that a document takes, and what else is known of each.
        line_of: the line of a document, its rows and their results.
        window: documents sorted, held in memory and written together.

    Raises:
        ValueError: if the finished documents are others, and as `Predictor.stream`.
        OSError: as `ResumableLines.write`.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1.")
    file.skip(documents)
    parts, waiting = itertools.tee(
        (part, [rows_of(document) for document in part]) for part in _windows(documents, window)
    )
    outputs = predictor.stream([row[0] for rows in several for row in rows] for _, several in parts)
    for (part, several), window_results in zip(waiting, outputs, strict=True):
        results = iter(window_results)
        lines = [
            line_of(document, rows, list(itertools.islice(results, len(rows))))
            for document, rows in zip(part, several, strict=True)
        ]
        file.write(part, lines)
        bar.update(len(part))


def _windows(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Lists of `size` neighbours."""
    documents = iter(documents)
    while part := list(itertools.islice(documents, size)):
        yield part


def output_line(document: Document, result: Result) -> str:
    """The id and the outputs as JSON; raises ValueError if they are not finite."""
    broken = [field for field, value in result.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{document.place}: {broken} are not finite (id {document.name!r}).")
    return json_line({"id": document.name} | {f: np.float32(v) for f, v in result.items()})
