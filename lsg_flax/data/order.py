"""Which rows of the data are in batch n, and which of them a process gets. Both are pure functions
of n, so that a run can resume at any batch without saved state.

Axes: M microbatches, B batch, O rows, Z batches.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Int

_ROWS, _BATCHES = range(2)  # two random streams of one seed

Remainder = Literal["fill", "carry"]


def checked_remainder(given: Remainder | None, *, floats: bool) -> Remainder:
    """Returns what happens to rows that do not fill a batch; raises ValueError if float labels,
    none of which can be ignored, do not allow it."""
    chosen: Remainder = given or ("carry" if floats else "fill")
    if chosen not in ("fill", "carry") or (floats and chosen == "fill"):
        raise ValueError(
            f"remainder={given!r} must be 'fill' or 'carry'; with float labels only 'carry', "
            "because no such label can be ignored unless texts are packed."
        )
    return chosen


@dataclass(frozen=True)
class ProcessShare:
    """The rows of a global batch that this process gets: its own slice of each microbatch."""

    index: int
    count: int
    batch_size: int
    microbatches: int = 1

    def __post_init__(self):
        if self.batch_size < 1 or self.microbatches < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and microbatches={self.microbatches} must be at "
                "least 1."
            )
        if not 0 <= self.index < self.count or self.batch_size % self.count:
            raise ValueError(
                f"batch_size={self.batch_size} is that of all processes together and must be a "
                f"multiple of process_count={self.count}; process_index={self.index} must be in "
                f"0..{self.count - 1}."
            )

    @classmethod
    def of(cls, index: int | None, count: int | None, batch_size: int, microbatches: int = 1):
        """Returns the share of a process; None takes JAX's own index and count."""
        index = jax.process_index() if index is None else index
        return cls(index, jax.process_count() if count is None else count, batch_size, microbatches)

    @property
    def rows(self) -> int:
        """Number of rows of a whole step, of all processes together."""
        return self.batch_size * self.microbatches

    def own(self, places: Int[np.ndarray, "O"]) -> Int[np.ndarray, "M B"]:
        """Returns this process's share of all rows."""
        shares = places.reshape(self.microbatches, self.count, -1)  # [M, processes, B]
        return shares[:, self.index]


class Order:
    """Which rows are in batch n.

    A bucket is one length per stream. It has an endless sequence of its rows, one shuffled epoch
    after another, split into batches. An epoch has the batches that its rows complete ("carry"), or
    the last batch of each bucket is padded with -1 ("fill").

    Attributes:
        buckets: the buckets that have rows, sorted by the length of the first stream, then of the
            others.
    """

    def __init__(
        self,
        lengths: Sequence[Int[np.ndarray, "O"]],
        *,
        ladders: Sequence[Sequence[int]],
        size: int,
        seed: int,
        remainder: Remainder,
        shuffle: bool,
    ):
        """Assigns rows to buckets.

        Args:
            lengths: for each stream the lengths of its rows.
            ladders: for each stream the ascending lengths that it is padded to.
            size: rows of a batch.
        """
        sizes = [len(ladder) for ladder in ladders]
        rungs = tuple(np.searchsorted(*pair) for pair in zip(ladders, lengths, strict=True))
        numbers = np.ravel_multi_index(rungs, sizes)  # [O], of the rows' buckets
        used = np.unique(numbers)
        rungs = zip(ladders, np.unravel_index(used, sizes), strict=True)
        self.buckets = [*zip(*(np.take(*pair).tolist() for pair in rungs), strict=True)]
        self._members = [np.flatnonzero(numbers == number) for number in used]
        self._size, self._seed = size, seed
        self._remainder, self._shuffle = remainder, shuffle
        # Threads ask for the same epochs at the same time; at most two epochs are in use.
        self._permuted = functools.lru_cache(2 * len(self.buckets))(self._permute)
        self._listed = functools.lru_cache(2)(self._list)

    def start(self, epoch: int) -> int:
        """Returns the number of batches before an epoch."""
        return sum(self._before(epoch, len(rows)) for rows in self._members)

    def epoch_of(self, number: int) -> int:
        """Returns the epoch that batch `number` belongs to."""
        rows = sum(map(len, self._members))
        enough = (number + len(self.buckets) + 1) * self._size // rows + 2
        return bisect.bisect_right(range(enough), number, key=self.start) - 1

    def batch(self, number: int) -> tuple[tuple[int, ...], Int[np.ndarray, "O"]]:
        """Returns the bucket of batch `number`, and its rows."""
        epoch = self.epoch_of(number)
        bucket, turn = self._listed(epoch)[number - self.start(epoch)].tolist()
        return self.buckets[bucket], self._rows(bucket, epoch, turn)

    def _before(self, epoch: int, rows: int) -> int:
        if self._remainder == "carry":
            return epoch * rows // self._size
        return epoch * -(-rows // self._size)

    def _list(self, epoch: int) -> Int[np.ndarray, "Z 2"]:
        """Returns the batches of an epoch: each one's bucket, and its number in that bucket."""
        parts = []
        for bucket, rows in enumerate(self._members):
            turns = np.arange(self._before(epoch, len(rows)), self._before(epoch + 1, len(rows)))
            parts.append(np.stack([np.full_like(turns, bucket), turns], axis=1))
        pairs = np.concatenate(parts)
        if not self._shuffle:
            return pairs
        return np.random.default_rng([self._seed, _BATCHES, epoch]).permutation(pairs)

    def _rows(self, bucket: int, epoch: int, turn: int) -> Int[np.ndarray, "O"]:
        count = len(self._members[bucket])
        if self._remainder == "fill":
            first = (turn - self._before(epoch, count)) * self._size
            rows = self._permuted(bucket, epoch)[first : first + self._size]
            return np.pad(rows, (0, self._size - len(rows)), constant_values=-1)
        epochs, places = np.divmod(np.arange(turn * self._size, (turn + 1) * self._size), count)
        parts = [self._permuted(bucket, int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def _permute(self, bucket: int, epoch: int) -> Int[np.ndarray, "O"]:
        if not self._shuffle:
            return self._members[bucket]
        generator = np.random.default_rng([self._seed, _ROWS, epoch, bucket])
        return generator.permutation(self._members[bucket])
