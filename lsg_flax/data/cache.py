"""Tokenized data on disk: flat arrays in a folder that is complete or not used.

`index.json` describes the arrays (dtype, shape, checksum); each is one file of raw numbers, mapped
into memory on reading. A row has tokens in one or more streams (the "input"; a target text is
another). The sequences of a stream are stored one after the other; `STREAM_offsets` has the start
of each. `records` are lines of JSON, one per example.

Axes: O rows, C choices, T tokens, Y labels.
"""

import functools
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from lsg_flax.data.cut import Cut
from lsg_flax.files import Json, read_json, write_json

INPUT = "input"  # the first stream, which all rows have
TARGET = "target"  # the stream of target texts
POSITIVE, NEGATIVE = "positive", "negative"  # streams of texts that belong to the input, or do not
# Prefix of the arrays' names, for the streams that a model reads.
READ = {INPUT: "", POSITIVE: "positive_", NEGATIVE: "negative_"}
OFFSETS, WORDS = "offset_mapping", "word_mapping"  # stored beside the tokens, but in no batch
_BESIDE = (OFFSETS, WORDS)
_INDEX = "index.json"
_CHUNK = 1 << 24  # bytes that a checksum reads at once


class DamagedCacheError(Exception):
    """The arrays of a folder are not those that its index describes."""


class ArrayFiles:
    """Writes arrays piece by piece into a folder; a context manager that closes the files."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._entries: dict[str, Json] = {}

    def __enter__(self) -> "ArrayFiles":
        return self

    def __exit__(self, *_):
        for file in self._files.values():
            file.close()

    def append(self, name: str, values: Shaped[np.ndarray, "..."]) -> None:
        """Appends to the array `name` along its first axis."""
        shape = list(values.shape[1:])
        entry = {"dtype": str(values.dtype), "shape": shape, "length": 0, "crc32": 0}
        entry = self._entries.setdefault(name, entry)
        if (entry["dtype"], entry["shape"]) != (str(values.dtype), shape):
            raise ValueError(f"{name} is {entry}, but {values.dtype} {shape} is to be added.")
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.bin").open("wb")
        data = values.tobytes()
        self._files[name].write(data)
        entry["length"] += len(values)
        entry["crc32"] = zlib.crc32(data, entry["crc32"])

    def finish(self, about: Json) -> None:
        """Writes the index, with `about` as further information."""
        index = {"arrays": self._entries, "about": about}
        write_json(self._folder, {_INDEX: index | {"crc32": _checksum_of(index)}})


def read_arrays(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], Json]:
    """Returns the arrays of a folder, mapped into memory, and the `about` of its index.

    Raises:
        DamagedCacheError: if the index or an array is missing, incomplete, or changed.
    """
    try:
        index = read_json(folder / _INDEX)
        if _checksum_of({name: index[name] for name in ("arrays", "about")}) != index["crc32"]:
            raise DamagedCacheError(f"{folder / _INDEX} was changed.")
        arrays = {}
        for name, entry in index["arrays"].items():
            file, shape = folder / f"{name}.bin", (entry["length"], *entry["shape"])
            if _checksum(file) != entry["crc32"]:
                raise DamagedCacheError(f"{file} has another checksum than {_INDEX} says.")
            empty = 0 in shape  # an empty file cannot be mapped
            arrays[name] = (
                np.empty(shape, entry["dtype"])
                if empty
                else np.memmap(file, entry["dtype"], mode="r", shape=shape)
            )
        return arrays, index["about"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCacheError(f"{folder} is damaged: {error}") from error


def _checksum_of(index: Json) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _checksum(file: pathlib.Path) -> int:
    value = 0
    with file.open("rb") as opened:
        while data := opened.read(_CHUNK):
            value = zlib.crc32(data, value)
    return value


class RowInfo(NamedTuple):
    """Facts about a row beside its tokens.

    Attributes:
        example: number of the example that the row is (a part) of; None for pieces of joined texts.
        id: the example's `id` in the data, otherwise its number.
        record: the stored fields of the example: question, context and answers for question
            answering.
        offsets: for question answering, start and end [T, 2] of each token in the characters of the
            context, -1 for tokens that are not in the context.
        words: the same, each widened to the word that the token is a part of.
    """

    example: int | None
    id: str | int | None
    record: Json
    offsets: Int[np.ndarray, "T 2"] | None
    words: Int[np.ndarray, "T 2"] | None


@dataclass(frozen=True, eq=False)
class Stream:
    """Sequences of tokens, one or several per row, stored one after the other for all rows."""

    shape: tuple[int, ...]  # () if a row has one sequence, (C,) if it has C
    offsets: Int[np.ndarray, "_"]  # start of each sequence, and the end of the last one
    fields: dict[str, Shaped[np.ndarray, "T"]]  # by their names in a batch

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "O"]:
        """Number of tokens of each row's longest sequence."""
        return np.diff(self.offsets).reshape(-1, math.prod(self.shape)).max(axis=1)

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Returns start and end of a row's sequences in the arrays."""
        count = math.prod(self.shape)
        return list(itertools.pairwise(self.offsets[row * count :][: count + 1].tolist()))


def spread(lengths: Int[np.ndarray, "O"]) -> dict[str, int]:
    """Returns the minimum of `lengths` in tokens, the median, the 90th percentile and the maximum,
    by name."""
    points = {"min": 0.0, "median": 0.5, "90th percentile": 0.9, "max": 1.0}
    found = np.quantile(lengths, list(points.values()), method="nearest")
    return {name: int(length) for name, length in zip(points, found, strict=True)}


class TokenizedDataset:
    """Rows of tokens with their labels, read from disk when they are accessed.

    Attributes:
        fingerprint: hash of the data, the tokenizer and the options.
        contents: start of a hash of the data alone; None if the folder was opened without it.
        options: `DataOptions` as a dict.
        labels: names of the labels in the order of their ids, if they have names.
        arrays: all arrays by name; `streams` has those of tokens, `targets` lists the names of
            those with one entry per row.
        examples: number of examples; pieces of joined texts count as none.
        skipped: number of broken rows that were left out; `messages` has the first reasons.
        truncated: number of texts that were truncated to `max_length`, or `max_target_length`;
            `cut` says more.
        pad_token_id: id of padding; 0 if the tokenizer has none, which is fine since it is masked.
        mask_token_id: id of the mask token; -1 if the tokenizer has none.
        special_ids: ids that are never masked; `ordinary_ids` are all others.
    """

    def __init__(self, folder: pathlib.Path):
        """Opens a folder that `load_examples` has written.

        Raises:
            DamagedCacheError: if it is not complete.
        """
        self.arrays, about = read_arrays(folder)
        self.contents: str | None = None
        try:
            self.fingerprint: str = about["fingerprint"]
            self.options: Json = about["options"]
            self.labels = None if about["labels"] is None else tuple(about["labels"])
            self.skipped, self.messages = about["skipped"], tuple(about["messages"])
            self.truncated: int = about["truncated"]
            self.cut = Cut(*about.get("cut", (0, self.truncated)))  # older caches have no "cut"
            self.pad_token_id: int = about["pad_token_id"]
            self.mask_token_id: int = about["mask_token_id"]
            self.special_ids = np.array(about["special_ids"], np.int64)
            self.ordinary_ids = np.setdiff1d(np.arange(about["vocab_size"]), self.special_ids)
            self.targets: list[str] = about["targets"]
            self.streams = {
                name: Stream(
                    tuple(entry["shape"]),
                    self.arrays[f"{name}_offsets"],
                    {
                        field: self.arrays[field]
                        for field in entry["fields"]
                        if field not in _BESIDE
                    },
                )
                for name, entry in about["streams"].items()
            }
        except (KeyError, TypeError) as error:
            raise DamagedCacheError(f"{folder}: its index lacks {error}.") from error
        self.examples = max(len(self.arrays["record_ends"]) - 1, 0)

    def __len__(self) -> int:
        return len(self.arrays["examples"])

    @property
    def task(self) -> str:
        """The task that the rows are for."""
        return self.options["task"]

    @property
    def lengths(self) -> Int[np.ndarray, "O"]:
        """Number of tokens of each row's input; of the longest one if there are choices."""
        return self.streams[INPUT].lengths

    @property
    def read_lengths(self) -> dict[str, Int[np.ndarray, "O"]]:
        """Number of tokens of each row's longest text, by stream, of all that a model reads."""
        return {name: stream.lengths for name, stream in self.streams.items() if name in READ}

    @property
    def spread(self) -> dict[str, int]:
        """The `spread` of the rows' lengths."""
        return spread(self.lengths)

    @property
    def choices(self) -> int | None:
        """Number of inputs to choose from in each row; None if a row has one input."""
        return next(iter(self.streams[INPUT].shape), None)

    @property
    def num_labels(self) -> int | None:
        """Number of outputs of a head for these labels; None if labels do not decide it."""
        if self.labels is not None:
            return len(self.labels)
        regression = self.options["problem_type"] == "regression" and "labels" in self.arrays
        return self.arrays["labels"].shape[-1] if regression else None

    def __getitem__(self, row: int | np.integer) -> dict[str, Any]:
        """Returns the arrays of a row by Hugging Face's names, without padding; with choices, lists
        of one array per choice.

        Raises:
            IndexError: if there is no such row.
        """
        row = self._checked(row)
        fields = {}
        for stream in self.streams.values():
            for name, array in stream.fields.items():
                parts = [np.array(array[a:b], np.int32) for a, b in stream.spans(row)]
                fields[name] = parts if stream.shape else parts[0]
        return fields | {name: np.array(self.arrays[name][row]) for name in self.targets}

    def info(self, row: int | np.integer) -> RowInfo:
        """Returns the facts about a row beside its tokens.

        Raises:
            IndexError: if there is no such row.
        """
        row = self._checked(row)
        example = int(self.arrays["examples"][row])
        record = {} if example < 0 else self.record(example)
        (start, stop), *_ = self.streams[INPUT].spans(row)
        offsets, words = (
            None if self.arrays.get(name) is None else np.array(self.arrays[name][start:stop])
            for name in _BESIDE
        )
        return RowInfo(
            None if example < 0 else example,
            None if example < 0 else record.get("id", example),
            record,
            offsets,
            words,
        )

    def record(self, example: int | np.integer) -> Json:
        """Returns the stored fields of an example beside its tokens: `id` if it has one, and for
        question answering question, context and answers.

        Raises:
            IndexError: if there is no such example.
        """
        if not 0 <= example < self.examples:
            raise IndexError(f"example {example} is not in 0..{self.examples - 1}.")
        start, stop = self.arrays["record_ends"][int(example) : int(example) + 2].tolist()
        return json.loads(self.arrays["records"][start:stop].tobytes())

    def _checked(self, row: int | np.integer) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in 0..{len(self) - 1}.")
        return int(row)


class Sequences(NamedTuple):
    """The tokens of a row in one stream, as arrays by their names in a batch."""

    lengths: int | Int[np.ndarray, "C"]  # of a row's one sequence, or of its several sequences
    fields: dict[str, Shaped[np.ndarray, "T *Y"]]  # all sequences, one after the other


class EncodedRow(NamedTuple):
    """A row as it is stored: its tokens by stream, the input first, and its targets."""

    streams: dict[str, Sequences]
    targets: dict[str, Shaped[np.ndarray, "*Y"] | np.generic]


class RowWriter:
    """Adds rows and the records of their examples to array files, many at a time; `about` describes
    them for the index."""

    def __init__(self, files: ArrayFiles):
        self._files, self._bytes = files, 0
        self._tokens: dict[str, int] = {}
        self.about: Json = {"streams": {}, "targets": []}
        self.rows = self.examples = 0
        files.append("record_ends", np.zeros(1, np.int64))

    def add(self, groups: Iterable[tuple[Json | None, list[EncodedRow]]]) -> None:
        """Adds the record and the rows of each example; the record is None for rows of several."""
        rows: list[EncodedRow] = []
        owners, records = [], []
        for record, encoded in groups:
            if record is not None and encoded:
                owners += [self.examples + len(records)] * len(encoded)
                records.append(json.dumps(record).encode())
            else:
                owners += [-1] * len(encoded)
            rows += encoded
        if not rows:
            return
        self._files.append("examples", np.array(owners, np.int64))
        self._files.append("records", np.frombuffer(b"".join(records), np.uint8))
        ends = self._bytes + np.cumsum([len(record) for record in records], dtype=np.int64)
        self._files.append("record_ends", ends)
        for name in rows[0].streams:
            self._add_stream(name, [row.streams[name] for row in rows])
        for name in rows[0].targets:
            self._files.append(name, np.stack([row.targets[name] for row in rows]))
        self.about["targets"] = [*rows[0].targets]
        self._bytes += sum(map(len, records))
        self.rows, self.examples = self.rows + len(rows), self.examples + len(records)

    def _add_stream(self, name: str, parts: list[Sequences]) -> None:
        lengths = np.array([part.lengths for part in parts], np.int64)  # [O] or [O, C]
        if name not in self._tokens:
            self._files.append(f"{name}_offsets", np.zeros(1, np.int64))
        offsets = self._tokens.get(name, 0) + np.cumsum(lengths.reshape(-1))
        self._files.append(f"{name}_offsets", offsets)
        self._tokens[name] = int(offsets[-1])
        fields = sorted(parts[0].fields)
        for field in fields:
            self._files.append(field, np.concatenate([part.fields[field] for part in parts]))
        self.about["streams"][name] = {"shape": list(lengths.shape[1:]), "fields": fields}
