"""Pipelines like Hugging Face's: from texts of any length to answers as plain Python values.
tasks.py and spans.py define how a task reads texts and outputs; batching and buckets are those of
inference/.
"""

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from lsg_flax import hub
from lsg_flax.buckets import default_buckets
from lsg_flax.hub import Checkpoint, Tokenizer
from lsg_flax.inference import Predictor, Runnable, Select
from lsg_flax.models import Model, Params
from lsg_flax.pipelines.generate import Summarization, Text2TextGeneration, Translation
from lsg_flax.pipelines.spans import QuestionAnswering, TokenClassification
from lsg_flax.pipelines.tasks import (
    FeatureExtraction,
    FillMask,
    ModelRow,
    PipelineTask,
    Reader,
    TextClassification,
    check_choice,
    check_max_length,
    in_float32,
)

SENTENCE_BUCKET = 128  # an extra bucket for sentences, shorter than those of documents
_WINDOW = 32  # batches whose documents are sorted by length and held in memory together

TASKS: dict[str, type[PipelineTask]] = {
    "fill-mask": FillMask,
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "feature-extraction": FeatureExtraction,
    "text2text-generation": Text2TextGeneration,
    "summarization": Summarization,
    "translation": Translation,
}
ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}


def head_named(name: str) -> str:
    """Returns the task of models (first of several) that a pipeline with this name needs, such as
    "token_classification" for "ner"; other names as they are."""
    name = ALIASES.get(name, name)
    return next(iter(TASKS[name].heads)) if name in TASKS else name


class Pipeline:
    """A pipeline for one task and model; made by `pipeline`."""

    def __init__(
        self,
        task: PipelineTask,
        model: Model,
        params: Params,
        reader: Reader,
        *,
        batch_size: int,
        buckets: Sequence[int],
    ):
        self.task, self.reader = task, reader
        self.model, self.params = model, jax.device_put(params)
        self.batch_size, self.buckets = batch_size, tuple(buckets)
        self._used: dict[tuple[Select | None, Runnable | None], Predictor] = {}
        self._predictor(task, None, 2)  # checks the settings

    def __call__(
        self,
        inputs: Any = None,
        *,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        truncation: bool | None = None,
        **options: Any,
    ) -> Any:
        """Returns the answers, in the order of the documents.

        Args:
            inputs: a text, a list of texts, or an iterator, which is read and answered lazily.
            question, context: for question answering, instead of dicts of both.
            truncation, **options: values that replace the pipeline's in this call.

        Raises:
            ValueError: for a document that the model cannot read, or an unknown option.
        """
        task = self.task.with_options(**options)
        reader = self.reader if truncation is None else replace(self.reader, truncation=truncation)
        items = task.items(inputs, question, context)
        if isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
            rows = iter([(items, task.rows(reader, items))])
            (answer,) = self._answers(task, reader, rows)
            return task.alone(items, answer)
        answers = self._answers(task, reader, _rows_of(task, reader, items))
        return list(answers) if isinstance(items, list | tuple) else answers

    def _answers(
        self, task: PipelineTask, reader: Reader, documents: Iterator[tuple[Any, list[ModelRow]]]
    ) -> Iterator[Any]:
        while window := list(itertools.islice(documents, _WINDOW * self.batch_size)):
            group, rows = zip(*window, strict=True)
            flat = [row for part in rows for row in part]
            predictor = self._predictor(task, task.select(reader, flat), len(flat))
            outputs = predictor([row.inputs for row in flat], progress=False)
            for item, part in zip(group, rows, strict=True):
                results = [in_float32(r) for r in itertools.islice(outputs, len(part))]
                yield task.answer(reader, item, part, results)

    def _predictor(self, task: PipelineTask, select: Select | None, rows: int) -> Predictor:
        """The predictor for so many rows; a single row runs in a batch of one."""
        program = task.program(self.model, self.reader.tokenizer)
        self._used[select, program] = Predictor(
            self.model,
            self.params,
            batch_size=1 if rows == 1 else self.batch_size,
            buckets=self.buckets,
            fields=task.heads[self.model.task],
            select=select,
            program=program,
        )
        return self._used[select, program]

    @property
    def compilations(self) -> int:
        """How often the model was compiled for this task: once per bucket for a single row, and
        once for batches; shared by all pipelines of the model."""
        return sum(predictor.compilations for predictor in self._used.values())


def pipeline(
    task: str,
    model: str | os.PathLike | tuple[Model, Params],
    tokenizer: Tokenizer | str | os.PathLike | None = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    truncation: bool = False,
    buckets: Sequence[int] | None = None,
    dtype: Dtype | None = None,
    **options: Any,
) -> Pipeline:
    """Makes a pipeline from text to answers, such as `pipeline("fill-mask", path)("Paris is the
    [MASK] of France.")`.

    Answers are those of transformers 4.37's `pipeline`, with these differences: a list gives a
    list, also for a single text; a text that is too long raises unless `truncation=True`; targets
    of fill-mask must be one token; problem_type "regression" applies no function to the logits (as
    transformers 5); windows of question answering are as long as the model reads, not 384 tokens;
    features are arrays.

    Args:
        task: "fill-mask", "text-classification", "token-classification", "question-answering",
            "feature-extraction", "text2text-generation", "summarization" or "translation"; also
            "ner", "sentiment-analysis", and names such as "translation_en_to_ro", which set
            src_lang and tgt_lang. The classes in `pipelines` describe options and answers.
        model: a folder or hub id, or a model with its parameters.
        tokenizer: a tokenizer or a folder; by default that of the model's folder.
        batch_size: rows per batch; a single row runs on its own.
        max_length: the largest number of tokens per row; by default what model and tokenizer allow.
            For tasks that generate text it limits generated tokens, as in transformers; these read
            up to the longest bucket.
        truncation: whether to truncate longer texts (question answering reads all in windows).
        buckets: lengths in tokens that rows are padded to, with one compilation each.
        dtype: of the computation; by default float32.
        **options: options of the task, which each call may change.

    Returns:
        A `Pipeline`, to be called with texts.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: for an unknown task or option, a checkpoint without the task's head or without a
            tokenizer, and settings that do not fit the model.
    """
    if len(parts := task.split("_")) == 4 and parts[0::2] == ["translation", "to"]:
        task = parts[0]
        options = {"src_lang": parts[1], "tgt_lang": parts[3]} | options
    task = ALIASES.get(task, task)
    check_choice("task", task, (*TASKS, *ALIASES))
    chosen = TASKS[task]()
    if "max_length" in chosen.option_names and max_length is not None:
        options["max_length"], max_length = max_length, None
    chosen = chosen.with_options(**options)
    if isinstance(model, tuple):
        network, params = model
        if network.task not in chosen.heads:
            raise ValueError(_wrong_head(task, f"this model's task is {network.task!r}"))
        network = network if dtype is None else network.clone(dtype=dtype)
    else:
        checkpoint = hub.open_checkpoint(model)
        network, params = _load(task, checkpoint, jnp.float32 if dtype is None else dtype)
        tokenizer = checkpoint.folder if tokenizer is None else tokenizer
    found, limit = _tokenizer_of(tokenizer), network.max_length
    usual = min(limit, found.model_max_length)  # the length that the model was trained with
    max_length = usual if max_length is None else max_length
    check_max_length(network, max_length)
    if buckets is None:
        buckets = default_buckets(max_length, SENTENCE_BUCKET)
    reader = Reader(
        found, network.config, min(max_length, max(buckets, default=max_length)), truncation
    )
    return Pipeline(chosen, network, params, reader, batch_size=batch_size, buckets=buckets)


def _tokenizer_of(given: Any) -> Any:
    """Returns a tokenizer, reading it if a folder is given."""
    if isinstance(given, str | os.PathLike):
        folder = hub.resolve(given, hub.TOKENIZER_ALONE)
        given = hub.read_tokenizer(folder)
        if given is None:
            raise ValueError(f"{folder} has no tokenizer; pass tokenizer=, an object or a folder.")
    if given is None:
        raise ValueError("a model with its parameters needs tokenizer=, an object or a folder.")
    return given


def _rows_of(
    task: PipelineTask, reader: Reader, items: Iterable
) -> Iterator[tuple[Any, list[ModelRow]]]:
    """Yields each document with its rows; errors say which document does not fit."""
    for place, item in enumerate(items):
        try:
            yield item, task.rows(reader, item)
        except ValueError as error:
            raise ValueError(f"document {place}: {error}") from error


def _load(task: str, checkpoint: Checkpoint, dtype: Dtype) -> tuple[Model, Params]:
    """Loads the model; raises ValueError if the checkpoint has no head for the task."""
    heads = TASKS[task].heads
    if "base" in heads:
        with warnings.catch_warnings():  # unread heads are expected
            warnings.filterwarnings("ignore", message="weights for task")
            return checkpoint.load("base", dtype=dtype)
    names = checkpoint.architectures or ("a model without a head",)
    if checkpoint.head not in heads:
        raise ValueError(_wrong_head(task, f"{checkpoint.root} is {names[0]}"))
    return checkpoint.load(dtype=dtype)


def _wrong_head(task: str, found: str) -> str:
    return (
        f"{task} needs a model with the task {' or '.join(TASKS[task].heads)}, but {found}; "
        "fine-tune such a head on it, or load one with lsg_flax.from_pretrained(path, task=...) "
        "and pass (model, params)."
    )
