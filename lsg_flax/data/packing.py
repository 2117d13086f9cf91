"""Several texts in one row: which texts share one, and where each lies.

A plan is made once from lengths and seed, so that a batch stays a pure function of its number;
grain's packing is a stream whose rows depend on what was read before.

Axes: B batch, T tokens, O rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lsg_flax.models import Batch

SEGMENTS, SEGMENT_ROWS = "segment_ids", "segment_rows"
_TOGETHER = 4096  # texts that are laid out together: time is their number times that of their rows
_PLAN = 4  # random numbers under the seed, beside those of batches


@dataclass(frozen=True)
class Packing:
    """How rows are shared.

    Attributes:
        length: tokens of a row.
        block: each text begins at a multiple of it: the block size of LSG attention, 1 for full
            attention.
        texts: how many share a row at most; None for as many as fit.

    Raises:
        ValueError: for numbers below 1, and a length that is not of whole blocks.
    """

    length: int
    block: int = 1
    texts: int | None = None

    def __post_init__(self):
        if min(self.length, self.block, self.texts or 1) < 1 or self.length % self.block:
            raise ValueError(
                f"length={self.length}, block={self.block} and texts={self.texts} must be at least "
                "1, and the length whole blocks: give a multiple of the block."
            )

    def room(self, lengths: Int[np.ndarray, "*O"]) -> Int[np.ndarray, "*O"]:
        """The tokens that texts take with the padding behind them to whole blocks."""
        return -(-lengths // self.block) * self.block


def pack_rows(
    lengths: Int[np.ndarray, "_"], packing: Packing, *, seed: int = 0
) -> Int[np.ndarray, "O texts"]:
    """Which texts share a row: numbers of texts, -1 where a row has no more.

    The seed shuffles the texts; of each few thousand the longest is laid out first, and each into
    the first row that has room (first fit, decreasing).

    Args:
        lengths: tokens of each text.

    Raises:
        ValueError: for a text that is longer than a row.
    """
    if len(lengths) and lengths.max() > packing.length:
        raise ValueError(
            f"a text of {lengths.max()} tokens is longer than a row of length={packing.length}; "
            "give longer rows, or cut texts to a smaller max_length."
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
    free = np.full(len(texts), packing.length)  # of each row; as many as there may be
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


def join_texts(
    texts: Mapping[str, np.ndarray],
    lengths: Int[np.ndarray, "B texts"],
    filler: Mapping[str, np.ndarray],
    packing: Packing,
) -> Batch:
    """A batch of rows that share texts, with "segment_ids" [B, T].

    Args:
        texts: arrays of the texts that are there, tokens padded to any length.
        lengths: tokens of each, 0 for one that is not there.
        filler: the same arrays of rows of padding, [B, T] or [B, ...].
    """
    batch: Batch = {name: array.copy() for name, array in filler.items()}
    shape = filler["input_ids"].shape
    by_token = [name for name, array in filler.items() if array.shape == shape]
    there = lengths > 0
    for name in filler.keys() - {*by_token}:  # [B, texts, ...]
        batch[name] = np.repeat(filler[name][:, None], lengths.shape[1], axis=1)
        batch[name][there] = texts[name]
    batch[SEGMENTS] = np.zeros(shape, np.int32)
    room = packing.room(lengths)
    begins = np.cumsum(room, axis=1) - room
    for number, (row, text) in enumerate(np.argwhere(there).tolist()):
        length, begin = int(lengths[row, text]), int(begins[row, text])
        place = slice(begin, begin + length)
        for name in by_token:
            batch[name][row, place] = texts[name][number, :length]
        batch[SEGMENTS][row, place] = text + 1
    return batch
