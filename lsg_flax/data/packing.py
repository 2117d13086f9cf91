"""Packing of several texts into one row: which texts share a row, and where each begins.

The rows are chosen once from lengths and seed, so that a batch stays a pure function of its number;
with grain's packing a row would depend on what was read before.

Axes: B batch, T tokens, O rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lsg_flax.data.cache import TokenizedDataset
from lsg_flax.models import TASKS, Batch

SEGMENTS, SEGMENT_ROWS = "segment_ids", "segment_rows"
_TOGETHER = 4096  # texts packed together: the time grows with texts times rows
_PLAN = 4  # random stream of the seed; batches use others


@dataclass(frozen=True)
class Packing:
    """How texts are packed into rows without seeing each other (arXiv 2107.02027, section 3.2).

    Attributes:
        length: tokens of a row.
        block: each text begins at a multiple of this number of tokens: the block size of LSG
            attention, or 1 for full attention.
        texts: most texts of a row; None for as many as fit.

    Raises:
        ValueError: for numbers below 1, and a length that is not a multiple of the block.
    """

    length: int
    block: int = 1
    texts: int | None = None

    def __post_init__(self):
        if min(self.length, self.block, self.texts or 1) < 1 or self.length % self.block:
            raise ValueError(
                f"length={self.length}, block={self.block} and texts={self.texts} must be at least "
                "1, and the length a multiple of the block."
            )

    def room(self, lengths: Int[np.ndarray, "*O"]) -> Int[np.ndarray, "*O"]:
        """Returns `lengths`, the tokens of texts, including the padding to whole blocks."""
        return -(-lengths // self.block) * self.block


def pack_rows(
    lengths: Int[np.ndarray, "_"], packing: Packing, *, seed: int = 0
) -> Int[np.ndarray, "O texts"]:
    """Returns the numbers of the texts of each row, see `Packing`; -1 after a row's last text.

    The seed shuffles the texts. Of each few thousand, the longest is placed first, each into the
    first row that has room (first fit, decreasing).

    Args:
        lengths: tokens of each text.

    Raises:
        ValueError: for a text that is longer than a row.
    """
    if len(lengths) and lengths.max() > packing.length:
        raise ValueError(
            f"a text of {lengths.max()} tokens is longer than a row of length={packing.length}; "
            "give longer rows, or truncate texts to a smaller max_length."
        )
    rows: list[list[int]] = []
    order = np.random.default_rng([seed, _PLAN]).permutation(len(lengths))
    for start in range(0, len(order), _TOGETHER):
        part = order[start : start + _TOGETHER]
        rows += _first_fit(part, packing.room(lengths[part]), packing)
    most = max(map(len, rows), default=0)
    return np.array([row + [-1] * (most - len(row)) for row in rows], np.int64).reshape(
        len(rows), most
    )


def _first_fit(
    texts: Int[np.ndarray, "_"], room: Int[np.ndarray, "_"], packing: Packing
) -> list[list[int]]:
    rows: list[list[int]] = []
    free = np.full(len(texts), packing.length)  # free tokens of each row; at most a row per text
    count = np.zeros(len(texts), np.int64)
    for place in np.argsort(-room, kind="stable").tolist():
        fits = free >= room[place]
        fits &= count < (packing.texts or len(texts))
        row = int(np.argmax(fits))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(texts[place]))
        free[row] -= room[place]
        count[row] += 1
    return rows


class PackedRows(NamedTuple):
    """Packed rows: the texts of each as numbers of the data's rows, -1 for none."""

    packing: Packing
    texts: Int[np.ndarray, "O texts"]

    def of(self, rows: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B texts"]:
        """Returns the texts of these rows; a row of -1 has none."""
        return np.where(rows[:, None] < 0, -1, self.texts[rows])

    @property
    def lengths(self) -> list[Int[np.ndarray, "O"]]:
        """Returns the lengths of all rows, in a list of the one stream."""
        return [np.full(len(self.texts), self.packing.length)]


def packed_rows(
    dataset: TokenizedDataset,
    packing: Packing,
    buckets: object,
    seed: int,
    rows: int | None = None,
) -> PackedRows:
    """Packs the first `rows` rows of a dataset, by default all; raises ValueError for data that
    cannot be packed."""
    if buckets is not None:
        raise ValueError(
            f"buckets={buckets} and packing={packing}: rows that are shared have one length; give "
            "one of them."
        )
    target = TASKS[dataset.task].targets[0] if TASKS[dataset.task].targets else None
    positions = target is not None and target.loss == "position"
    if len(dataset.streams) > 1 or dataset.choices is not None or positions:
        raise ValueError(
            "packing is for texts with labels, one for each text or token, not for "
            f"{dataset.task}; leave it out."
        )
    return PackedRows(packing, pack_rows(dataset.lengths[:rows], packing, seed=seed))


def join_texts(
    texts: Mapping[str, np.ndarray],
    lengths: Int[np.ndarray, "B texts"],
    filler: Mapping[str, np.ndarray],
    packing: Packing,
    *,
    targets: Sequence[str],
) -> Batch:
    """Returns a batch of packed rows, with "segment_ids" [B, T].

    Args:
        texts: arrays of the real texts, tokens padded to any length.
        lengths: tokens of each text, 0 if a row has no such text.
        filler: the same arrays for rows of padding, [B, T] or [B, ...].
        targets: names of the arrays that have one entry per text.
    """
    batch: Batch = {name: array.copy() for name, array in filler.items()}
    by_token = [name for name in filler if name not in targets]
    there = lengths > 0
    for name in targets:  # [B, texts, ...]
        batch[name] = np.repeat(filler[name][:, None], lengths.shape[1], axis=1)
        batch[name][there] = texts[name]
    batch[SEGMENTS] = np.zeros(filler["input_ids"].shape, np.int32)
    room = packing.room(lengths)
    begins = np.cumsum(room, axis=1) - room
    for number, (row, text) in enumerate(np.argwhere(there).tolist()):
        length, begin = int(lengths[row, text]), int(begins[row, text])
        place = slice(begin, begin + length)
        for name in by_token:
            batch[name][row, place] = texts[name][number, :length]
        batch[SEGMENTS][row, place] = text + 1
    return batch
