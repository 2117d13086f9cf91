"""Which rows of the data are in batch n, and which of them a process holds. A pure function of n:
nothing has to be kept to go on anywhere.

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

_ROWS, _BATCHES = range(2)  # random numbers of these two under one seed

Remainder = Literal["fill", "carry"]


@dataclass(frozen=True)
class ProcessShare:
    """Which rows of a global batch this process holds: of each microbatch its own slice."""

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
                f"multiple of process_count={self.count}; process_index={self.index} must lie in "
                f"0..{self.count - 1}."
            )

    @classmethod
    def of(cls, index: int | None, count: int | None, batch_size: int, microbatches: int = 1):
        """With JAX's own numbers where none are given."""
        index = jax.process_index() if index is None else index
        return cls(index, jax.process_count() if count is None else count, batch_size, microbatches)

    @property
    def rows(self) -> int:
        """Of a whole step, all processes together."""
        return self.batch_size * self.microbatches

    def own(self, places: Int[np.ndarray, "O"]) -> Int[np.ndarray, "M B"]:
        """This process's share of all rows."""
        shares = places.reshape(self.microbatches, self.count, -1)  # [M, processes, B]
        return shares[:, self.index]


class Order:
    """Which rows are in batch n. A bucket is one length per stream; it has an endless sequence of
    its rows, one shuffled epoch after another, cut into batches. An epoch has the batches that its
    rows complete ("carry"), or ends each bucket with a batch filled up by -1 ("fill").

    Attributes:
        buckets: those that have rows, the shortest first, by the first stream and then the others.
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
        """For each stream its rows' lengths, and the ladder of those it is padded to."""
        sizes = [len(ladder) for ladder in ladders]
        rungs = tuple(np.searchsorted(*pair) for pair in zip(ladders, lengths, strict=True))
        numbers = np.ravel_multi_index(rungs, sizes)  # [O], of the rows' buckets
        used = np.unique(numbers)
        rungs = zip(ladders, np.unravel_index(used, sizes), strict=True)
        self.buckets = [*zip(*(np.take(*pair).tolist() for pair in rungs), strict=True)]
        self._members = [np.flatnonzero(numbers == number) for number in used]
        self._size, self._seed = size, seed
        self._remainder, self._shuffle = remainder, shuffle
        # Threads ask for the same epoch together; a few buckets of two epochs are alive at once.
        self._permuted = functools.lru_cache(2 * len(self.buckets))(self._permute)
        self._listed = functools.lru_cache(2)(self._list)

    def start(self, epoch: int) -> int:
        """The number of batches before an epoch."""
        return sum(self._before(epoch, len(rows)) for rows in self._members)

    def epoch_of(self, number: int) -> int:
        """The epoch that batch `number` belongs to."""
        rows = sum(map(len, self._members))
        enough = (number + len(self.buckets) + 1) * self._size // rows + 2
        return bisect.bisect_right(range(enough), number, key=self.start) - 1

    def batch(self, number: int) -> tuple[tuple[int, ...], Int[np.ndarray, "O"]]:
        """The bucket of batch `number`, and its rows."""
        epoch = self.epoch_of(number)
        bucket, turn = self._listed(epoch)[number - self.start(epoch)].tolist()
        return self.buckets[bucket], self._rows(bucket, epoch, turn)

    def _before(self, epoch: int, rows: int) -> int:
        if self._remainder == "carry":
            return epoch * rows // self._size
        return epoch * -(-rows // self._size)

    def _list(self, epoch: int) -> Int[np.ndarray, "Z 2"]:
        """Bucket and place in its stream of each batch of an epoch, in their order."""
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
