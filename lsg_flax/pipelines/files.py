"""From file to file: documents of a file or folder in, one line of JSON for each out; resumable.

How lines survive a kill is inference/lines.py's; texts are read, and answers made, as pipelines do.
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
from lsg_flax.pipelines.broken import BrokenLines, unskipped, warn_of_skipped
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
    in_float32,
)
from lsg_flax.progress import Bar, say

# A model's task -> what its answers are without further options.
ANSWERS: dict[str, PipelineTask] = {
    "sequence_classification": TextClassification(top_k=None),
    "token_classification": TokenClassification(aggregation_strategy="simple"),
    "question_answering": QuestionAnswering(),
    "conditional_generation": Text2TextGeneration(),
}
_PROBE = "Él NAÏVE 12.5% 日本 [MASK]\n it's"  # tells apart tokenizers of the same vocabulary


class Written(NamedTuple):
    """What `predict_file` did."""

    documents: int  # lines of the target
    computed: int  # of these by this call; the others were finished before
    skipped: tuple[int | str, ...]  # broken lines of the source by number, from 1, or its files


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
    """Writes one line of JSON per document of `source`, in order: its `id` and the model's outputs
    or, on request, the answer that a pipeline makes of them.

    The file gets its name when it is complete. Before that, finished windows are in `target` +
    ".partial"; a killed run continues there when it is called again, and then makes the same bytes
    as an undisturbed one, if batch size, window and mesh are the same too (others are allowed, and
    round differently).

    Args:
        source, broken_lines, text_column, columns: see `DocumentFile`.
        tokenizer: of transformers, for documents that are not `input_ids`.
        answers: write `{"id", "answer"}`, the answer of this task of pipelines (`{"id",
            "summary"}` of `Summarization`); `ANSWERS` has one for each model's task that has
            labels or places, or writes.
        fields: without `answers`, the outputs wanted, such as `("logits",)`; all by default.
        max_length: tokens read at most; by default the tokenizer's `model_max_length`, at which the
            model was trained, or what the model reads if that is less.
        truncation: cut longer texts, which is said at the end; without it they raise.
        batch_size, buckets, mesh: of `Predictor`; batches are no larger than the file or a window.
        window: documents sorted, held in memory and written together: what a kill may cost.
        broken_lines: raise for a line that is no document or that the model cannot read, such as a
            text that is too long, or skip it.
        unfinished: what to do with a partial file: continue it, or "replace" it.

    Returns:
        How many documents were written, and how many of them now.

    Raises:
        FileNotFoundError: if there is no `source`.
        ValueError: for a document that is broken or does not fit (by its line), outputs that are
            not finite, settings that do not go together, and the partial file of other settings or
            another source, saying what differs.
        OSError: if `target` cannot be written, as on a full disk; what is finished is kept.
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
    if progress and (words := codec.cut.words(limit)):
        say(words)
    return Written(file.finished, file.finished - before, tuple(documents.skipped))


def _limit_for(max_length: int | None, predictor: Predictor, tokenizer: Tokenizer | None) -> int:
    longest = predictor.buckets[-1]
    usual = longest if tokenizer is None else min(longest, tokenizer.model_max_length)
    limit = usual if max_length is None else max_length
    if not 1 <= limit <= longest:
        raise ValueError(f"max_length={limit} must lie in 1..{longest}, the buckets.")
    return limit


def _batch_for(
    documents: int, batch_size: int, answers: PipelineTask | None, mesh: Mesh | None
) -> int:
    """The batch size of the whole run: no more rows than so many documents have, for what fills a
    batch up costs memory and time."""
    if isinstance(answers, QuestionAnswering):  # a context has any number of rows
        return batch_size
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return min(batch_size, -(-max(documents, 1) // shards) * shards)


class _DocumentCodec:
    """From a document to the model's rows, and from their outputs to its line."""

    def __init__(self, predictor: Predictor, reader: Reader, answers: PipelineTask | None):
        self.predictor, self.reader, self.answers = predictor, reader, answers
        self._first: Encoding | None = None
        self.cut = Cut()  # what was lost of long texts

    def rows(self, document: Document) -> list[ModelRow]:
        """Raises ValueError, with the document's place, for one that does not fit."""
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
        """Those that fit, with their rows, where others are skipped; else all of them."""
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
        """The line of a document."""
        if self.answers is None:
            return output_line(document, results[0])
        for result in results:
            output_line(document, result)  # raises for outputs that are not finite
        results = [in_float32(result) for result in results]
        answer = self.answers.answer(self.reader, _item(document.content), list(rows), results)
        return json_line({"id": document.name} | self.answers.entry(answer))

    def settings(self) -> dict[str, Any]:
        """What decides the lines besides the model, as JSON values."""
        tokenizer = self.reader.tokenizer
        return {
            "tokenizer": None if tokenizer is None else _tokenizer_digest(tokenizer),
            "max_length": self.reader.max_length,
            "truncation": self.reader.truncation,
            "answers": None if self.answers is None else repr(self.answers),
        }


def check_fields(model: Model, fields: Sequence[str]) -> None:
    """Raises ValueError for outputs that the model does not have; its weights are not needed."""
    outputs = functools.partial(outputs_of, model, fields=tuple(fields))
    jax.eval_shape(outputs, model.abstract_params(), model.example_inputs())


def _check_answers(
    answers: PipelineTask | None, model: Model, fields: Sequence[str] | None
) -> None:
    """Raises for a task that this model or a file cannot serve."""
    if answers is None:
        return
    name = type(answers).__name__
    if isinstance(answers, FillMask):
        raise ValueError("answers=FillMask is not possible for files; use lsg_flax.pipeline.")
    if model.task not in answers.heads:
        raise ValueError(
            f"answers={name} needs a model of the task {' or '.join(answers.heads)}, and this "
            f"one's is {model.task!r}."
        )
    if fields is not None:
        raise ValueError("fields= are of outputs; give either answers or fields.")


def _item(content: dict[str, Any]) -> Any:
    """What a pipeline would be given: a text or a dict of two; nothing for input_ids."""
    asks = content.keys() >= {"question", "context"}
    kind = ("question", "context") if asks else ("text", "text_pair")
    item = {name: content[name] for name in kind if name in content}
    return item["text"] if item.keys() == {"text"} else item


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of its vocabulary and of how it reads."""
    parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts.append(tokenizer(_PROBE, _PROBE, verbose=False)["input_ids"])
    return hashlib.sha256(json_line(parts).encode()).hexdigest()
