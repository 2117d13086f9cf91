"""Tokenised data on disk: flat arrays in a folder that is there whole or not at all.

`index.json` describes the arrays (dtype, shape, checksum) and is written last; each array is one
file of raw numbers, mapped into memory on reading. Rows lie one after the other, `offsets` says
where their sequences begin; `records` are lines of JSON, one per example.

Axes: R rows, C choices, T tokens.
"""

import functools
import itertools
import json
import pathlib
import shutil
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from lsg_flax.files import read_json, write_json

_INDEX = "index.json"
_CHUNK = 1 << 24  # bytes that a checksum reads at once


class DamagedCacheError(Exception):
    """A folder of arrays that are not those its index describes."""


class ArrayFiles:
    """Writes arrays piece by piece, as a context; leaving it well writes the index."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._entries: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "ArrayFiles":
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, kind, *_):
        try:
            for file in self._files.values():
                file.close()
        finally:
            if kind is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def names(self) -> set[str]:
        """Of the arrays so far."""
        return {*self._entries}

    def append(self, name: str, values: Shaped[np.ndarray, "..."]) -> None:
        """Adds to the array `name`, which grows along its first axis."""
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

    def finish(self, about: dict[str, Any]) -> None:
        """Closes the arrays and writes the index with what else is to be known."""
        for file in self._files.values():
            file.close()
        index = {"arrays": self._entries, "about": about}
        write_json(self._folder, {_INDEX: index | {"crc32": _checksum_of(index)}})


def read_arrays(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a folder, mapped into memory, and what its index says about them.

    Raises:
        DamagedCacheError: if the index or an array is missing, cut off, or changed.
    """
    try:
        index = read_json(folder / _INDEX)
        if _checksum_of({name: index[name] for name in ("arrays", "about")}) != index["crc32"]:
            raise DamagedCacheError(f"{folder / _INDEX} was changed.")
        arrays = {}
        for name, entry in index["arrays"].items():
            file, shape = folder / f"{name}.bin", (entry["length"], *entry["shape"])
            if _checksum(file) != entry["crc32"]:
                raise DamagedCacheError(f"{file} is not what {_INDEX} says: another checksum.")
            empty = 0 in shape  # nothing that could be mapped
            arrays[name] = (
                np.empty(shape, entry["dtype"])
                if empty
                else np.memmap(file, entry["dtype"], mode="r", shape=shape)
            )
        return arrays, index["about"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCacheError(f"{folder} is damaged: {error}") from error


def _checksum_of(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _checksum(file: pathlib.Path) -> int:
    value = 0
    with file.open("rb") as opened:
        while data := opened.read(_CHUNK):
            value = zlib.crc32(data, value)
    return value


class RowInfo(NamedTuple):
    """What belongs to a row beside its tokens.

    Attributes:
        example: the number of the example it is (a part) of; pieces of joined texts have none.
        id: the example's `id` in the data, else its number.
        record: what is kept of the example: question, context and answers for question answering.
        offsets: for question answering, the characters [T, 2] of the context that each token
            stands for, -1 for tokens that are not of the context.
    """

    example: int | None
    id: Any
    record: dict[str, Any]
    offsets: Int[np.ndarray, "T 2"] | None


class TokenizedDataset:
    """Rows of tokens with their labels, read from disk as they are asked for.

    Attributes:
        fingerprint: of the data, the tokenizer and the options.
        options: `DataOptions` as a dict.
        labels: names of the labels in the order of their numbers, where they have names.
        choices: texts to choose from in each row, for multiple choice; else None.
        examples: how many there are; pieces of joined texts count none.
        skipped: broken rows left out, the first of them in `messages`.
        truncated: texts that were cut to `max_length`.
        pad_token_id: what fills up a row; 0 where the tokenizer has none, for it is masked.
        mask_token_id: what hides a token of masked_lm; -1 where the tokenizer has none.
        special_ids: tokens that masked_lm never asks for; `ordinary_ids` are all others.
    """

    def __init__(self, folder: pathlib.Path):
        """Opens a folder that `load_examples` has written.

        Raises:
            DamagedCacheError: if it is not whole.
        """
        self.arrays, about = read_arrays(folder)
        try:
            self.fingerprint: str = about["fingerprint"]
            self.options: dict[str, Any] = about["options"]
            self.labels = None if about["labels"] is None else tuple(about["labels"])
            self.choices: int | None = about["choices"]
            self.skipped, self.messages = about["skipped"], tuple(about["messages"])
            self.truncated: int = about["truncated"]
            self.pad_token_id: int = about["pad_token_id"]
            self.mask_token_id: int = about["mask_token_id"]
            self.special_ids = np.array(about["special_ids"], np.int64)
            self.ordinary_ids = np.setdiff1d(np.arange(about["vocab_size"]), self.special_ids)
            self.token_fields = frozenset(about["token_fields"])
        except (KeyError, TypeError) as error:
            raise DamagedCacheError(f"{folder}: its index lacks {error}.") from error
        self._offsets = self.arrays["offsets"]
        self.examples = max(len(self.arrays["record_ends"]) - 1, 0)

    def __len__(self) -> int:
        return len(self.arrays["examples"])

    @property
    def task(self) -> str:
        """What the rows are for."""
        return self.options["task"]

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "R"]:
        """Tokens of each row, of its longest choice for multiple choice."""
        return np.diff(self._offsets).reshape(len(self), -1).max(axis=1)

    @property
    def num_labels(self) -> int | None:
        """How many outputs a head for these labels has; None where that is no question."""
        if self.labels is not None:
            return len(self.labels)
        regression = self.options["problem_type"] == "regression" and "labels" in self.arrays
        return self.arrays["labels"].shape[-1] if regression else None

    @property
    def row_fields(self) -> list[str]:
        """Names of the targets that a row has one of."""
        names = ("labels", "start_positions", "end_positions")
        return [name for name in names if name in self.arrays and name not in self.token_fields]

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Where the sequences of a row lie in the arrays of tokens: one, or one per choice."""
        count = self.choices or 1
        ends = self._offsets[row * count : (row + 1) * count + 1].tolist()
        return list(itertools.pairwise(ends))

    def __getitem__(self, row: int | np.integer) -> dict[str, Any]:
        """The arrays of a row by Hugging Face's names, without padding; for multiple choice a list
        of one per choice.

        Raises:
            IndexError: if there is no such row.
        """
        row = self._checked(row)
        fields = {}
        for name in sorted(self.token_fields - {"offset_mapping"}):
            parts = [np.array(self.arrays[name][a:b], np.int32) for a, b in self.spans(row)]
            fields[name] = parts[0] if self.choices is None else parts
        return fields | {name: np.array(self.arrays[name][row]) for name in self.row_fields}

    def info(self, row: int | np.integer) -> RowInfo:
        """What belongs to a row beside its tokens.

        Raises:
            IndexError: if there is no such row.
        """
        row = self._checked(row)
        example = int(self.arrays["examples"][row])
        record = {} if example < 0 else self.record(example)
        (start, stop), *_ = self.spans(row)
        offsets = self.arrays.get("offset_mapping")
        return RowInfo(
            None if example < 0 else example,
            None if example < 0 else record.get("id", example),
            record,
            None if offsets is None else np.array(offsets[start:stop]),
        )

    def record(self, example: int | np.integer) -> dict[str, Any]:
        """What is kept of an example beside its tokens: `id` where it has one, and for question
        answering question, context and answers.

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


class RowWriter:
    """Adds rows and the records of their examples to array files, many at a time."""

    def __init__(self, files: ArrayFiles, token_fields: frozenset[str]):
        """`token_fields` are the arrays that have one entry per token."""
        self._files, self._token_fields = files, token_fields
        self._tokens = self._bytes = 0
        self.rows = self.examples = 0
        self.choices = 1
        files.append("offsets", np.zeros(1, np.int64))
        files.append("record_ends", np.zeros(1, np.int64))

    def add(self, groups: Iterable[tuple[dict[str, Any] | None, list[dict[str, Any]]]]) -> None:
        """Adds, for each example, its record and its rows; no record for rows of several."""
        rows, owners, records = [], [], []
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
        lengths = np.array([row["lengths"] for row in rows], np.int64)  # [R, C]
        offsets = self._tokens + np.cumsum(lengths.reshape(-1))
        self._files.append("offsets", offsets)
        for name in rows[0].keys() - {"lengths"}:
            values = [row[name] for row in rows]
            join = np.concatenate if name in self._token_fields else np.stack
            self._files.append(name, join(values))
        self.choices, self._tokens = lengths.shape[1], int(offsets[-1])
        self._bytes += sum(map(len, records))
        self.rows, self.examples = self.rows + len(rows), self.examples + len(records)
