"""Reads rows that embeddings are trained on: texts with positives and negatives.

Axes: T tokens, C choices.
"""

from collections.abc import Iterator

import numpy as np

from lsg_flax.data.cache import INPUT, NEGATIVE, POSITIVE, READ, EncodedRow, Sequences
from lsg_flax.data.files import DataRow
from lsg_flax.data.tasks import Example, ExampleEncoder
from lsg_flax.data.values import text_in, texts_in

_NONE = (None, "", [])  # values of an empty cell


class PairExampleEncoder(ExampleEncoder):
    """Reads a text, optionally a positive, and optionally negatives, each as a stream. All rows
    must have the same number of each."""

    _counts: dict[str, int] | None = None  # number of texts in each stream

    def example(self, row: DataRow) -> Example:
        """Checks a row's columns; all rows must have the same ones."""
        names = self.options.columns
        texts = {INPUT: [text_in(row, names.text)]}
        if row.values.get(names.positive) not in _NONE:
            texts[POSITIVE] = [text_in(row, names.positive)]
        elif self.options.with_labels:
            raise ValueError(
                f"column {names.positive!r}, a text that belongs to {names.text!r}, is empty or "
                f"missing; there are {list(row.values)}. Give its name by columns={{'positive': "
                "'NAME'}, or give a teacher, which needs no positives"
            )
        if (given := row.values.get(names.negative)) not in _NONE:
            several = isinstance(given, list)
            texts[NEGATIVE] = (
                texts_in(row, names.negative, "text") if several else [text_in(row, names.negative)]
            )
        counts = {name: len(part) for name, part in texts.items()}
        self._counts = self._counts or counts
        if counts != self._counts:
            here, before = (
                {self._column(n): k for n, k in c.items()} for c in (counts, self._counts)
            )
            raise ValueError(
                f"it has the texts {here}, but the rows before have {before}; all rows must have "
                "the same number of each"
            )
        return Example(row.place, tuple(texts.items()), None, self.id_of(row))

    def _column(self, stream: str) -> str:
        names = self.options.columns
        return {INPUT: names.text, POSITIVE: names.positive, NEGATIVE: names.negative}[stream]

    def encode(self, examples: list[Example]) -> Iterator[tuple[Example | None, list[EncodedRow]]]:
        """Yields one row per example, with its streams in their order."""
        streams: list[dict[str, Sequences]] = [{} for _ in examples]
        for name in self._counts or ():
            parts = [dict(example.inputs)[name] for example in examples]
            encoded = self.tokenize([self._cleaned(text) for part in parts for text in part])
            ids = iter(encoded["input_ids"])
            for stream, part in zip(streams, parts, strict=True):
                stream[name] = _sequences(name, [next(ids) for _ in part])
        for example, stream in zip(examples, streams, strict=True):
            empty = [name for name, part in stream.items() if not np.all(part.lengths)]
            if empty:
                self.problems.found(example.place, f"no tokens: the {empty[0]} text has none")
            yield example, [] if empty else [EncodedRow(stream, {})]

    def _cleaned(self, text: str) -> str:
        """Returns the text as `Embedder` reads it."""
        return text.strip().lower() if self.options.lower_case else text.strip()


def _sequences(name: str, ids: list[list[int]]) -> Sequences:
    """Returns the tokens of a row's texts in a stream; only negatives have an axis of texts, even
    if there is one."""
    lengths = np.array([len(part) for part in ids])  # [C]
    fields = {f"{READ[name]}input_ids": np.concatenate([np.array(i, np.int32) for i in ids])}
    return Sequences(lengths if name == NEGATIVE else int(lengths[0]), fields)
