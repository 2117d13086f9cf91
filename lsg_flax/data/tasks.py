"""Encoders that turn rows of data into rows of tokens and labels, one for each kind of example.

Axes: T tokens, Y labels.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lsg_flax.data.answers import answer_places
from lsg_flax.data.cache import INPUT, OFFSETS, TARGET, WORDS, EncodedRow, Sequences
from lsg_flax.data.cut import Cut, cut_of
from lsg_flax.data.files import DataRow, Problems
from lsg_flax.data.options import DEFAULT_PROBLEM, DataOptions
from lsg_flax.data.values import answers_in, label_number, numbers_in, text_in, texts_in, value_in
from lsg_flax.files import Json
from lsg_flax.models import IGNORED, TASKS

# What a tokenizer returns for each token, and the dtype that it is stored in.
_TOKEN_FIELDS = {"input_ids": np.int32, "token_type_ids": np.int8, OFFSETS: np.int32}


class Example(NamedTuple):
    """A row of data whose columns are checked."""

    place: str
    inputs: tuple[Any, ...]  # what the tokenizer reads
    label: Any  # as it is stored; None without a label
    record: Json  # stored beside the tokens


class ExampleEncoder:
    """Reads the rows of a task; a subclass says how.

    Attributes:
        cut: what was truncated of texts that are too long.
    """

    fast = False  # whether it needs a fast tokenizer, which knows words and characters

    def __init__(
        self,
        options: DataOptions,
        tokenizer: Any,
        labels: tuple[str, ...] | None,
        problems: Problems,
    ):
        self.options, self.task, self.tokenizer = options, TASKS[options.task], tokenizer
        self.labels, self.problems = labels, problems
        self.cut = Cut()
        if self.fast and not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{options.task} needs the positions of tokens in the text, which "
                f"{type(tokenizer).__name__}, a slow tokenizer, does not know; give a fast one "
                "(AutoTokenizer with use_fast=True, or a folder with tokenizer.json)."
            )

    def examples(self, rows: Iterable[DataRow]) -> Iterator[Example]:
        """Yields an example for each row that is not broken."""
        for row in rows:
            try:
                yield self.example(row)
            except ValueError as error:
                self.problems.found(row.place, error)

    def example(self, row: DataRow) -> Example:
        """Returns the example of a row; raises ValueError if the row is broken."""
        raise NotImplementedError

    def encode(self, examples: list[Example]) -> Iterator[tuple[Example | None, list[EncodedRow]]]:
        """Yields the rows of tokens of each example; the example is None if a row is of several."""
        raise NotImplementedError

    def rest(self) -> Iterator[tuple[Example | None, list[EncodedRow]]]:
        """Yields the rows that are left after all examples are encoded."""
        return iter(())

    def id_of(self, row: DataRow) -> Json:
        """Returns the id of a row; empty if it has none."""
        column = self.options.columns.id
        value = row.values.get(column)
        if value is not None and not isinstance(value, str | int):
            raise ValueError(f"{column!r} must be a text or an integer, got {value!r:.60}")
        return {} if value is None else {"id": value}

    def tokenize(
        self, texts: Sequence, pairs: Sequence | None = None, *, written: bool = False, **options
    ) -> Any:
        """Calls the tokenizer on a chunk of texts; `written` means that they are targets."""
        types = self.options.token_type_ids
        types = types and "token_type_ids" in self.tokenizer.model_input_names
        given = dict(truncation=True, max_length=self.options.max_length) | options
        parts = {"text": list(texts), "text_pair": None if pairs is None else list(pairs)}
        encoded = self.tokenizer(
            **({"text_target": list(texts)} if written else parts),
            return_token_type_ids=types,
            return_attention_mask=False,
            verbose=False,
            **given,
        )
        if not given.get("return_overflowing_tokens") and given["truncation"]:
            self.cut += cut_of(encoded.encodings)
        return encoded

    def inputs(self, example: Example, encoded: Any, *places: int) -> Sequences | None:
        """Returns the tokens of the texts at these places; None, and a broken row is reported, if
        one has no tokens."""
        lengths = [len(encoded["input_ids"][place]) for place in places]
        if 0 in lengths:
            self.problems.found(
                example.place, "no tokens: the text is empty, and the tokenizer adds none"
            )
            return None
        fields = {
            name: np.concatenate([np.asarray(encoded[name][place], dtype) for place in places])
            for name, dtype in _TOKEN_FIELDS.items()
            if name in encoded
        }
        return Sequences(np.array(lengths) if self.task.input_rank == 3 else lengths[0], fields)

    def rows(
        self, inputs: Sequences | None, *labels: np.ndarray | np.generic | None
    ) -> list[EncodedRow]:
        """Returns the row of an example; none if `inputs` is None. `labels` are those of the task's
        targets in their order; None leaves one out."""
        names = [target.labels for target in self.task.targets]
        given = {n: v for n, v in zip(names, labels, strict=False) if v is not None}
        return [] if inputs is None else [EncodedRow({INPUT: inputs}, given)]


class TextExampleEncoder(ExampleEncoder):
    """Reads a text or a pair of texts, with one label, several labels, numbers, or no label."""

    def __init__(self, options, tokenizer, labels, problems):
        super().__init__(options, tokenizer, labels, problems)
        self.width: int | None = options.width  # numbers per row in regression

    def example(self, row):
        names = self.options.columns
        texts = (text_in(row, names.text),)
        if row.values.get(names.text_pair) not in (None, ""):
            texts += (text_in(row, names.text_pair),)
        label = self._label(value_in(row, names.label)) if self._labelled else None
        return Example(row.place, texts, label, self.id_of(row))

    @property
    def _labelled(self) -> bool:
        labelled = self.task.examples == "text" and self.task.targets
        return bool(labelled) and self.options.with_labels

    def _label(self, value: object) -> np.ndarray | np.int32:
        problem = self.options.problem_type
        if problem == "regression":
            numbers = numbers_in(value)
            self.width = self.width or len(numbers)
            if len(numbers) != self.width:
                before = "the training data" if self.options.width else "the rows before"
                raise ValueError(
                    f"the label has {len(numbers)} numbers, but {self.width} in {before}"
                )
            return numbers
        if problem == DEFAULT_PROBLEM:
            if isinstance(value, list):
                raise ValueError(
                    f"the label must be a single one, got {value!r}; several labels need "
                    "problem_type='multi_label_classification'"
                )
            return np.int32(label_number(value, self.labels or ()))
        if not isinstance(value, list):
            raise ValueError(f"the label must be a list of labels, got {value!r}")
        present = np.zeros(len(self.labels or ()), np.float32)
        present[[label_number(v, self.labels or ()) for v in value]] = 1.0
        return present

    def encode(self, examples) -> Iterator[tuple[Example | None, list[EncodedRow]]]:
        for _, group in itertools.groupby(examples, lambda example: len(example.inputs)):
            group = list(group)
            encoded = self.tokenize(*zip(*(example.inputs for example in group), strict=True))
            for place, example in enumerate(group):
                inputs = self.inputs(example, encoded, place)
                yield example, self.rows(inputs, example.label)


class WordExampleEncoder(ExampleEncoder):
    """Reads words with a tag each; the first token of a word has its tag, other tokens do not
    count."""

    fast = True

    def __init__(self, options, tokenizer, labels, problems):
        super().__init__(options, tokenizer, labels, problems)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
        steps = backend.get("pretokenizers", [backend])
        if any(s.get("type") == "ByteLevel" and not s["add_prefix_space"] for s in steps):
            raise ValueError(
                f"{type(tokenizer).__name__} tokenizes a word differently without a space before "
                "it; load it with add_prefix_space=True, because these words are already split."
            )

    def example(self, row):
        names = self.options.columns
        words, tags = texts_in(row, names.tokens, "word"), None
        if self.options.with_labels:
            given = value_in(row, names.tags)
            if not isinstance(given, list) or len(given) != len(words):
                raise ValueError(
                    f"{names.tags!r} must be a list of one label for each of {len(words)} words, "
                    f"got {given!r:.60}"
                )
            tags = np.array([label_number(tag, self.labels or ()) for tag in given], np.int32)
        return Example(row.place, (words,), tags, self.id_of(row))

    def encode(self, examples):
        encoded = self.tokenize([e.inputs[0] for e in examples], is_split_into_words=True)
        for place, example in enumerate(examples):
            inputs = self.inputs(example, encoded, place)
            if inputs is not None and example.label is not None:
                words = [-1 if word is None else word for word in encoded.word_ids(place)]
                first = [w >= 0 and w != before for before, w in itertools.pairwise([-1, *words])]
                labels = np.where(first, example.label[words], IGNORED).astype(np.int32)
                inputs.fields[self.task.targets[0].labels] = labels
            yield example, self.rows(inputs)


class QuestionExampleEncoder(ExampleEncoder):
    """Reads questions with contexts, split into windows. The answer is a span of tokens, or
    position 0 if the window does not contain all of it."""

    fast = True

    def example(self, row):
        names = self.options.columns
        question, context = text_in(row, names.question), text_in(row, names.context)
        record = self.id_of(row) | {"question": question, "context": context}
        if not self.options.with_labels:
            return Example(row.place, (question, context), None, record)
        answers = value_in(row, names.answers)
        texts, starts = (answers_in(answers, name) for name in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise ValueError(
                f"{names.answers!r} has {len(texts)} texts, but {len(starts)} answer_start; give "
                "one for each text"
            )
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not isinstance(start, int) or not text.strip():
                raise ValueError(
                    f"an answer must be a text and an integer answer_start, got {text!r}, {start!r}"
                )
            if start < 0 or context[start : start + len(text)] != text:
                raise ValueError(
                    f"the answer {text!r:.60} is not at character {start} of the context, which "
                    f"has {context[max(start, 0) : max(start, 0) + len(text)]!r:.60} there"
                )
        record["answers"] = {"text": texts, "answer_start": starts}
        span = (-1, -1)  # characters of the first answer
        if texts:
            start = starts[0] + len(texts[0]) - len(texts[0].lstrip())
            span = start, start + len(texts[0].strip())
        return Example(row.place, (question, context), span, record)

    def encode(self, examples):
        examples = self._fitting(examples)
        if not examples:
            return
        encoded = self.tokenize(
            *zip(*(example.inputs for example in examples), strict=True),
            truncation="only_second",
            stride=self.options.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows: list[list[EncodedRow]] = [[] for _ in examples]
        for place, number in enumerate(encoded["overflow_to_sample_mapping"]):
            inputs, span = self.inputs(examples[number], encoded, place), examples[number].label
            if inputs is None:
                continue
            inputs.fields[WORDS] = words = answer_places(encoded.encodings[place])
            offsets = inputs.fields[OFFSETS]
            offsets[words[:, 0] < 0] = -1
            positions = () if span is None else map(np.int32, _tokens_of(span, offsets))
            windows[number] += self.rows(inputs, *positions)
        yield from zip(examples, windows, strict=True)

    def _fitting(self, examples: list[Example]) -> list[Example]:
        """Returns the examples whose question leaves room for windows; reports the others."""
        questions = [example.inputs[0] for example in examples]
        encoded = self.tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        fitting = []
        for example, ids in zip(examples, encoded, strict=True):
            room = self.options.max_length - len(ids) - special
            if room > self.options.stride:
                fitting.append(example)
                continue
            self.problems.found(
                example.place,
                f"max_length={self.options.max_length} leaves {max(room, 0)} tokens for the "
                f"context beside a question of {len(ids)}, which must be more than "
                f"stride={self.options.stride}",
            )
        return fitting


class ChoiceExampleEncoder(ExampleEncoder):
    """Reads a text with several choices, each a pair with it; all rows must have as many."""

    choices: int | None = None

    def example(self, row):
        names = self.options.columns
        choices = texts_in(row, names.choices, "text")
        wanted = len(choices) if self.choices is None else self.choices
        if len(choices) != wanted or wanted < 2:
            raise ValueError(
                f"{names.choices!r} has {len(choices)} texts; it must have at least 2, and the "
                f"same number in all rows{f' ({self.choices})' if self.choices else ''}"
            )
        text, label = text_in(row, names.text), None
        if self.options.with_labels:
            value = value_in(row, names.label)
            label = np.int32(label_number(value, tuple(map(str, range(wanted)))))
        self.choices = wanted
        return Example(row.place, (text, choices), label, self.id_of(row))

    def encode(self, examples):
        texts = [text for text, choices in (e.inputs for e in examples) for _ in choices]
        encoded = self.tokenize(texts, [choice for e in examples for choice in e.inputs[1]])
        for number, example in enumerate(examples):
            count = len(example.inputs[1])
            places = range(number * count, (number + 1) * count)
            yield example, self.rows(self.inputs(example, encoded, *places), example.label)


class TargetTextExampleEncoder(ExampleEncoder):
    """Reads texts with a target text for each, whose tokens are the labels, a second stream."""

    def example(self, row):
        names = self.options.columns
        text, record = text_in(row, names.text), self.id_of(row)
        if self.options.with_labels:
            record["target"] = text_in(row, names.target)  # not truncated, to score generated texts
        return Example(row.place, (text,), None, record)

    def encode(self, examples):
        encoded, targets = self.tokenize([e.inputs[0] for e in examples]), None
        if self.options.with_labels:
            limit = self.options.max_target_length
            cut = {"truncation": limit is not None, "max_length": limit}
            texts = [e.record["target"] for e in examples]
            targets = self.tokenize(texts, written=True, **cut)["input_ids"]
        for place, example in enumerate(examples):
            rows = self.rows(self.inputs(example, encoded, place))
            if rows and targets is not None:
                labels = np.array(targets[place], np.int32)
                stream = Sequences(len(labels), {self.task.targets[0].labels: labels})
                rows[0].streams[TARGET] = stream
                if not len(labels):
                    reason = f"{self.options.columns.target!r} has no tokens"
                    self.problems.found(example.place, reason)
                    rows = []
            yield example, rows


class PackedTextEncoder(TextExampleEncoder):
    """Joins texts, with the tokenizer's separator between them, and splits them into pieces. Each
    piece has the special tokens of a single text around it and fills `max_length`; the last may be
    shorter."""

    def __init__(self, options, tokenizer, labels, problems):
        super().__init__(options, tokenizer, labels, problems)
        plain, framed = (
            tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]
            for special in (False, True)
        )
        at = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        self._before, self._after = framed[:at], framed[at + len(plain) :]
        self._room = options.max_length - len(self._before) - len(self._after)
        if self._room < 1:
            raise ValueError(
                f"max_length={options.max_length} leaves no room beside the special tokens "
                f"{self._before + self._after}; give a larger one."
            )
        separators = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        self._between = [token for token in separators if token is not None][:1]
        self._waiting: list[int] = []

    def encode(self, examples) -> Iterator[tuple[Example | None, list[EncodedRow]]]:
        texts = [text for example in examples for text in example.inputs]
        for ids in self.tokenize(texts, add_special_tokens=False, truncation=False)["input_ids"]:
            self._waiting += [*self._between, *ids] if self._waiting else ids
        whole = len(self._waiting) // self._room * self._room
        for start in range(0, whole, self._room):
            yield None, [self._piece(self._waiting[start : start + self._room])]
        self._waiting = self._waiting[whole:]

    def rest(self):
        if self._waiting:
            yield None, [self._piece(self._waiting)]

    def _piece(self, ids: list[int]) -> EncodedRow:
        ids = [*self._before, *ids, *self._after]
        inputs = Sequences(len(ids), {"input_ids": np.array(ids, np.int32)})
        return EncodedRow({INPUT: inputs}, {})


def _tokens_of(span: tuple[int, int], offsets: np.ndarray) -> tuple[int, int]:
    """Returns the first and the last token of a span of characters; 0, 0 if the window does not
    contain all of it."""
    start, end = span
    inside = np.flatnonzero(offsets[:, 1] > offsets[:, 0])  # tokens of the context, not empty
    if start < 0 or not len(inside):
        return 0, 0
    if offsets[inside[0], 0] > start or offsets[inside[-1], 1] < end:
        return 0, 0
    touched = inside[(offsets[inside, 1] > start) & (offsets[inside, 0] < end)]
    return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)
