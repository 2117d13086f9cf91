"""Predicts from file to file: reads documents, writes one line of JSON for each, and can resume.

inference/lines.py makes the output survive a kill; texts are read and answered as in pipelines.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lsg_flax.data import Cut, cut_of
from lsg_flax.files import check_output
from lsg_flax.hub import Tokenizer
from lsg_flax.inference import (
    Document,
    Encoding,
    Predictor,
    Result,
    ResumableLines,
    Unfinished,
    json_line,
    output_line,
    outputs_of,
    predict_lines,
)
from lsg_flax.models import Model, Params
from lsg_flax.pipelines.broken import BrokenLines, unskipped, warn_of_none, warn_of_skipped
from lsg_flax.pipelines.documents import DocumentFile, Documents
from lsg_flax.pipelines.generate import Text2TextGeneration
from lsg_flax.pipelines.spans import QuestionAnswering, TokenClassification
from lsg_flax.pipelines.tasks import (
    FillMask,
    ModelRow,
    PipelineError,
    PipelineTask,
    Reader,
    TextClassification,
    check_max_length,
    in_float32,
)
from lsg_flax.progress import Bar, say

# A model's task -> how its outputs are turned into answers by default.
ANSWERS: dict[str, PipelineTask] = {
    "sequence_classification": TextClassification(top_k=None),
    "token_classification": TokenClassification(aggregation_strategy="simple"),
    "question_answering": QuestionAnswering(),
    "conditional_generation": Text2TextGeneration(),
}
_PROBE = "Él NAÏVE 12.5% 日本 [MASK]\n it's"  # distinguishes tokenizers with equal vocabularies


class Written(NamedTuple):
    """The result of `predict_file`.

    Attributes:
        documents: number of lines of the target.
        computed: how many of them this call computed; the others were finished before.
        skipped: numbers of skipped lines of the source, from 1, or its files.
    """

    documents: int
    computed: int
    skipped: tuple[int | str, ...]


def predict_file(
    source: Documents,
    target: str | os.PathLike,
    model: Model,
    params: Params,
    *,
    tokenizer: Tokenizer | None = None,
    answers: PipelineTask | None = None,
    fields: Sequence[str] | None = None,
    max_length: int | None = None,
    truncation: bool = False,
    batch_size: int = 8,
    buckets: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    window: int = 256,
    broken_lines: BrokenLines = "raise",
    text_column: str | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
    unfinished: Unfinished = "continue",
    progress: bool = True,
) -> Written:
    """Writes one line of JSON per document of `source`, in order: its `id` and the model's outputs,
    or the answer that a pipeline makes of them.

    Results are first written to `target` + ".partial", window by window, which is renamed when it
    is complete. After a kill the same call resumes there, and writes the same bytes as an
    uninterrupted run if batch size, window and mesh are the same as well (others are allowed, but
    round differently).

    Args:
        source, text_column, columns: see `pipelines.DocumentFile`.
        target: the .jsonl file to write.
        model, params: the model and its parameters.
        tokenizer: a tokenizer of transformers, for documents that are not `input_ids`.
        answers: a task of pipelines, whose answers are written as `{"id", "answer"}` (`{"id",
            "summary"}` for `Summarization`). `ANSWERS` has one for each task of models with labels,
            answers in the text, or generated text.
        fields: without `answers`, the outputs to write, such as `("logits",)`; by default all.
        max_length: largest number of tokens per row; by default the tokenizer's `model_max_length`,
            or what the model reads if that is less.
        truncation: whether to truncate longer texts, which is reported at the end; otherwise they
            raise.
        batch_size, buckets, mesh: as in `Predictor`; batches are no larger than the file or a
            window.
        window: number of documents that are sorted, held in memory and written together; a kill
            loses at most what the last half minute has finished of it.
        broken_lines: whether a line that is not a document, or that the model cannot read, such as
            a text that is too long, raises ("raise") or is skipped ("skip").
        unfinished: what to do with a partial file: "continue" or "replace" it.
        progress: whether to show a progress bar.

    Returns:
        How many documents the file has, how many of them this call computed, and which lines were
        skipped. A file may have none, which is a warning.

    Raises:
        FileNotFoundError: if there is no `source`.
        ValueError: for a broken document or one that the model cannot read (with its line), outputs
            that are not finite, settings that contradict each other, and a partial file of other
            settings or another source; the message says what differs.
        OSError: if `target` cannot be written, for example because the disk is full; finished
            windows are kept.
    """
    named = {"text_column": text_column, "columns": columns}
    documents = DocumentFile(source, broken_lines=broken_lines, **named)
    check_output(target, documents.name)
    _check_answers(answers, model, fields)
    total = documents.count_lines()
    predictor = Predictor(
        model,
        params,
        batch_size=_batch_for(min(total, window), batch_size, answers, mesh),
        buckets=buckets,
        fields=fields if answers is None else answers.heads[model.task],
        mesh=mesh,
        program=None if answers is None else answers.program(model, tokenizer, mesh),
    )
    limit = _limit_for(max_length, predictor, tokenizer)
    codec = _DocumentCodec(predictor, Reader(tokenizer, model.config, limit, truncation), answers)
    settings = predictor.settings() | codec.settings() | {"text_column": text_column}
    settings |= {"columns": dict(columns)} if columns else {}
    how = {"rows_of": codec.rows, "line_of": codec.line, "window": window}
    with ResumableLines(target, settings, unfinished=unfinished) as file:
        before = file.finished
        with Bar("documents", total=total, initial=before, shown=progress) as bar:
            predict_lines(file, predictor, codec.fitting(documents), bar=bar, **how)
    warn_of_skipped(documents.skipped, documents.name)
    warn_of_none(file.finished, documents.name)
    if progress and (words := codec.cut.words(limit)):
        say(words)
    computed = file.finished - before - file.restored
    return Written(file.finished, computed, tuple(documents.skipped))


def _limit_for(max_length: int | None, predictor: Predictor, tokenizer: Tokenizer | None) -> int:
    longest = predictor.buckets[-1]
    usual = longest if tokenizer is None else min(longest, tokenizer.model_max_length)
    limit = usual if max_length is None else max_length
    if limit > longest and longest < predictor.model.max_length:
        raise ValueError(f"max_length={limit} must be in 1..{longest}, the largest of buckets.")
    check_max_length(predictor.model, limit)
    return limit


def _batch_for(
    documents: int, batch_size: int, answers: PipelineTask | None, mesh: Mesh | None
) -> int:
    """The batch size of the whole run: no more than the number of rows, because padding rows cost
    memory and time."""
    if isinstance(answers, QuestionAnswering):  # a context may have any number of rows
        return batch_size
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return min(batch_size, -(-max(documents, 1) // shards) * shards)


class _DocumentCodec:
    """Turns documents into rows of the model, and the rows' outputs into lines."""

    def __init__(self, predictor: Predictor, reader: Reader, answers: PipelineTask | None):
        self.predictor, self.reader, self.answers = predictor, reader, answers
        self._first: Encoding | None = None
        self.cut = Cut()  # what truncation removed

    def rows(self, document: Document) -> list[ModelRow]:
        """Returns a document's rows; raises ValueError, with its FILE:NUMBER, if it does not
        fit."""
        if document.rows is not None:
            return document.rows
        try:
            rows = self._rows(document.content)
            like = self._first or rows[0].inputs
            for row in rows:
                self.predictor.check(document.place, row.inputs, like=like)
        except PipelineError as error:
            raise PipelineError(f"{document.place}: {error}") from error
        except ValueError as error:
            raise unskipped(document.place, error) from error
        self._first = like
        if self.reader.truncation and not isinstance(self.answers, QuestionAnswering):
            self.cut += cut_of([row.encoding for row in rows if row.encoding is not None])
        return rows

    def fitting(self, documents: DocumentFile) -> Iterator[Document]:
        """Yields all documents; if broken lines are skipped, only those that fit, with their
        rows."""
        if documents.broken_lines == "raise":
            yield from documents
            return
        for document in documents:
            try:
                rows = self.rows(document)
            except PipelineError:
                raise
            except ValueError as error:
                documents.leave_out(document.place, error)
            else:
                yield document._replace(rows=rows)

    def _rows(self, content: dict[str, Any]) -> list[ModelRow]:
        reader, answers = self.reader, self.answers
        choices = self.predictor.model.task_record.input_rank == 3
        if "input_ids" in content:
            if answers is not None and not isinstance(answers, TextClassification):
                raise ValueError(
                    f"answers={type(answers).__name__} needs the text, not input_ids; leave "
                    "answers out to get the outputs."
                )
            names = ("input_ids", "attention_mask", "token_type_ids")
            nested = isinstance(content["input_ids"][0], list)
            if nested != choices:
                raise ValueError(
                    "input_ids are one list of numbers, for multiple_choice one such list for each "
                    "choice."
                )
            return [ModelRow({name: content[name] for name in names if name in content}, None)]
        if reader.tokenizer is None:
            raise PipelineError("a text needs tokenizer=; without one documents are input_ids.")
        if choices:
            task = self.predictor.model.task
            raise ValueError(f"{task} reads input_ids, one list for each choice.")
        item = _item(content)
        if answers is None:
            return reader.rows(*([item] if isinstance(item, str) else item.values()))
        return answers.rows(reader, item)

    def line(self, document: Document, rows: Sequence[ModelRow], results: list[Result]) -> str:
        """Returns the line of a document."""
        if self.answers is None:
            return output_line(document, results[0])
        for result in results:
            output_line(document, result)  # raises for outputs that are not finite
        results = [in_float32(result) for result in results]
        answer = self.answers.answer(self.reader, _item(document.content), list(rows), results)
        return json_line({"id": document.name} | self.answers.entry(answer))

    def settings(self) -> dict[str, Any]:
        """Returns the settings that decide the lines beside the model's, as JSON values."""
        tokenizer = self.reader.tokenizer
        return {
            "tokenizer": None if tokenizer is None else _tokenizer_digest(tokenizer),
            "max_length": self.reader.max_length,
            "truncation": self.reader.truncation,
            "answers": None if self.answers is None else repr(self.answers),
        }


def check_fields(model: Model, fields: Sequence[str]) -> None:
    """Raises ValueError for outputs that the model does not have; needs no weights."""
    outputs = functools.partial(outputs_of, model, fields=tuple(fields))
    jax.eval_shape(outputs, model.abstract_params(), model.example_inputs())


def _check_answers(
    answers: PipelineTask | None, model: Model, fields: Sequence[str] | None
) -> None:
    """Raises ValueError for a task that this model or a file does not support."""
    if answers is None:
        return
    name = type(answers).__name__
    if isinstance(answers, FillMask):
        raise ValueError("answers=FillMask is not possible for files; use lsg_flax.pipeline.")
    if model.task not in answers.heads:
        raise ValueError(
            f"answers={name} needs a model for {' or '.join(answers.heads)}, but this model's "
            f"task is {model.task!r}."
        )
    if fields is not None:
        raise ValueError("answers= and fields= exclude each other; give one of them.")


def _item(content: dict[str, Any]) -> Any:
    """The document as pipelines take it: a text, or a dict of two; {} for input_ids."""
    asks = content.keys() >= {"question", "context"}
    kind = ("question", "context") if asks else ("text", "text_pair")
    item = {name: content[name] for name in kind if name in content}
    return item["text"] if item.keys() == {"text"} else item


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A digest of a tokenizer's vocabulary and behaviour."""
    parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts.append(tokenizer(_PROBE, _PROBE, verbose=False)["input_ids"])
    return hashlib.sha256(json_line(parts).encode()).hexdigest()
