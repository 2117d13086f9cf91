"""Batches of fixed shapes from tokenised rows: each from one bucket of lengths, the same for the
same seed, and for any number of processes together.

Batch n is a pure function of n (order.py), so the state of an iterator is a number.

Axes: M microbatches, B batch, C choices, T tokens, K labels.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from lsg_flax.buckets import default_buckets
from lsg_flax.data.cache import TokenizedDataset
from lsg_flax.data.options import IGNORED
from lsg_flax.data.order import Order, Part, Remainder
from lsg_flax.files import differences

_ENDLESS = 2**62  # batches; what `len` can say
_MASKS, _EVAL_MASKS = range(2, 4)  # random numbers under the seed, beside those of the order

Batch = dict[str, np.ndarray]


class TrainBatches(Iterator[Batch]):
    """An iterator over batches, with a state; see `train_batches`.

    Attributes:
        buckets: the lengths that batches of this data have.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        order: Order,
        part: Part,
        *,
        stream: dict[str, Any],
        epochs: int | None,
        prefetch: int,
    ):
        self._dataset, self._order, self._part, self._stream = dataset, order, part, stream
        self.buckets = tuple(order.buckets)
        total = _ENDLESS if epochs is None else self.steps(epochs)
        if not total:
            raise ValueError(
                f"epochs={epochs} of {len(dataset)} rows make no whole batch of {part.rows} rows "
                f"in any of the buckets {self.buckets}; lower batch_size, or raise epochs."
            )
        import grain  # half a second, only for those who train

        read = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
        # Threads only: a forked tokenizer, or JAX itself, hangs.
        self._batches = iter(grain.MapDataset.range(total).map(self.batch_at).to_iter_dataset(read))

    def __next__(self) -> Batch:
        return next(self._batches)

    def batch_at(self, number: int) -> Batch:
        """Batch `number`, from 0, whatever has been read before."""
        bucket, rows = self._order.batch(int(number))
        part, seed = self._part, self._stream["seed"]
        rows, places = part.own(rows), part.own(np.arange(part.rows))
        seeds = [[seed, _MASKS, number, place] for place in places.reshape(-1).tolist()]
        batch = collate(
            self._dataset,
            rows.reshape(-1),
            length=bucket,
            seeds=seeds,
            mask_probability=self._stream["mask_probability"],
        )
        if part.microbatches == 1:
            return batch
        return {name: x.reshape(*rows.shape, *x.shape[1:]) for name, x in batch.items()}

    def bucket_at(self, number: int) -> int:
        """The length of batch `number`."""
        return self._order.batch(number)[0]

    def steps(self, epochs: int) -> int:
        """How many batches the first `epochs` epochs have."""
        return self._order.start(epochs)

    def epoch_at(self, number: int) -> int:
        """The epoch that batch `number` belongs to, from 0."""
        return self._order.epoch_of(number)

    def get_state(self) -> dict[str, Any]:
        """All that a new iterator needs to go on here, as JSON can say it."""
        return {"next": self._batches.get_state()["next_index"], "stream": dict(self._stream)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, maybe with another number of processes.

        Raises:
            ValueError: if the state is of other data, batches or seed; the differences are listed.
        """
        different = [
            f"{name}: {saved} in the state, {here} here"
            for name, saved, here in differences(state.get("stream", {}), self._stream)
        ]
        if different:
            raise ValueError(
                "the state is of another stream of batches, so going on would repeat or lose rows; "
                + "; ".join(different)
            )
        self._batches.set_state({"next_index": state["next"]})

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()


def train_batches(
    dataset: TokenizedDataset,
    *,
    batch_size: int,
    seed: int,
    buckets: Sequence[int] | None = None,
    microbatches: int = 1,
    epochs: int | None = None,
    remainder: Remainder | None = None,
    shuffle: bool = True,
    mask_probability: float = 0.15,
    process_index: int | None = None,
    process_count: int | None = None,
    prefetch: int = 2,
) -> TrainBatches:
    """Batches for training: shuffled anew in each epoch, each of one bucket, always of the same
    size.

    Args:
        batch_size: rows of a (micro)batch of all processes together.
        seed: of the order and of masked tokens; the same seed gives the same batches.
        buckets: lengths to pad to; `default_buckets` of the data's `max_length` by default.
        microbatches: M > 1 gives arrays [M, B, ...], all M of the same bucket.
        epochs: how many; without end by default.
        remainder: what happens to the rows of a bucket that make no whole batch at the end of an
            epoch: "fill" adds rows that do not count (labels -100, all masked), "carry" keeps them
            for the next epoch (those of the last epoch are not seen). By default "fill", but
            "carry" for regression and multi-label, where no label is ignored.
        shuffle: False keeps the order of the data within a bucket, bucket after bucket.
        mask_probability: share of tokens that `masked_lm` asks for; of them 80 % become the mask
            token, 10 % another one, 10 % stay. Special tokens are never asked for.
        process_index: by default JAX's; each process gets its own rows of the same batches.
        process_count: by default JAX's.
        prefetch: batches that threads prepare ahead; 0 prepares none.

    Returns:
        An iterator over dicts of arrays, [B, T] or [M, B, T] ([B, C, T] for multiple choice), by
        the names that models and losses take.

    Raises:
        ValueError: for options that do not fit each other or the data.
    """
    floats = dataset.row_fields == ["labels"] and dataset.arrays["labels"].dtype.kind == "f"
    chosen: Remainder = remainder or ("carry" if floats else "fill")
    if chosen not in ("fill", "carry") or (floats and chosen == "fill"):
        raise ValueError(
            f"remainder={remainder!r}: choose 'fill' or 'carry'; with labels that are floats only "
            "'carry', for no such label is ignored."
        )
    if seed < 0 or (epochs is not None and epochs < 1) or prefetch < 0:
        raise ValueError(
            f"seed={seed} and prefetch={prefetch} must be at least 0, epochs={epochs} at least 1."
        )
    if not 0 < mask_probability < 1:
        raise ValueError(f"mask_probability={mask_probability} must lie between 0 and 1.")
    part = Part.of(process_index, process_count, batch_size, microbatches)
    lengths = _buckets(dataset, buckets)
    order = Order(
        dataset.lengths,
        buckets=lengths,
        size=part.rows,
        seed=seed,
        remainder=chosen,
        shuffle=shuffle,
    )
    stream = {
        "data": dataset.fingerprint,
        "batch_size": batch_size,
        "microbatches": microbatches,
        "buckets": list(lengths),
        "seed": seed,
        "remainder": chosen,
        "shuffle": shuffle,
        "mask_probability": mask_probability,
    }
    return TrainBatches(dataset, order, part, stream=stream, epochs=epochs, prefetch=prefetch)


class EvalBatch(NamedTuple):
    """A batch, and which row of the data each of its rows is; -1 for those that only fill it up,
    whose labels are -100 where that can be (0 for floats)."""

    batch: Batch
    rows: Int[np.ndarray, "B"]


class EvalBatches:
    """Every row once; see `eval_batches`."""

    def __init__(
        self,
        dataset: TokenizedDataset,
        order: Order,
        part: Part,
        *,
        seed: int,
        mask_probability: float,
    ):
        self._dataset, self._order, self._part = dataset, order, part
        self._seed, self._mask_probability = seed, mask_probability

    def __len__(self) -> int:
        return self._order.start(1)

    def __iter__(self) -> Iterator[EvalBatch]:
        for number in reversed(range(len(self))):  # a lack of memory shows at once
            bucket, rows = self._order.batch(number)
            rows = self._part.own(rows)[0]
            batch = collate(
                self._dataset,
                rows,
                length=bucket,
                seeds=[[self._seed, _EVAL_MASKS, max(row, 0)] for row in rows.tolist()],
                mask_probability=self._mask_probability,
            )
            yield EvalBatch(batch, rows)


def eval_batches(
    dataset: TokenizedDataset,
    *,
    batch_size: int,
    buckets: Sequence[int] | None = None,
    seed: int = 0,
    mask_probability: float = 0.15,
    process_index: int | None = None,
    process_count: int | None = None,
) -> EvalBatches:
    """Batches for evaluation: every row exactly once, the longest bucket first, the same each time.

    Args:
        batch_size: rows of a batch of all processes together; the last batch of a bucket is filled
            up to it.
        buckets: as for `train_batches`.
        seed: of the tokens that `masked_lm` asks for, the same in each pass and for each batch
            size.
        mask_probability: as for `train_batches`.
        process_index: by default JAX's; each process gets its own rows of the same batches.
        process_count: by default JAX's.

    Returns:
        An iterable, with a length, of `EvalBatch`.

    Raises:
        ValueError: for options that do not fit each other or the data.
    """
    part = Part.of(process_index, process_count, batch_size)
    if seed < 0 or not 0 < mask_probability < 1:
        raise ValueError(
            f"seed={seed} must be at least 0, mask_probability={mask_probability} between 0 and 1."
        )
    order = Order(
        dataset.lengths,
        buckets=_buckets(dataset, buckets),
        size=part.rows,
        seed=seed,
        remainder="fill",
        shuffle=False,
    )
    return EvalBatches(dataset, order, part, seed=seed, mask_probability=mask_probability)


def _buckets(dataset: TokenizedDataset, given: Sequence[int] | None) -> tuple[int, ...]:
    longest = int(dataset.lengths.max())
    if given is None:
        return default_buckets(dataset.options["max_length"])
    buckets = tuple(sorted({int(length) for length in given}))
    if not buckets or buckets[0] < 1 or buckets[-1] < longest:
        raise ValueError(
            f"buckets={given} must be lengths from 1, and the longest row has {longest} tokens; "
            "add a bucket, or tokenise with a smaller max_length."
        )
    return buckets


def collate(
    dataset: TokenizedDataset,
    rows: Int[np.ndarray, "B"],
    *,
    length: int,
    seeds: Sequence[Sequence[int]],
    mask_probability: float = 0.15,
) -> Batch:
    """The arrays of a batch: rows padded to `length`, and for -1 one that does not count.

    Args:
        seeds: of the masked tokens of each row.

    Returns:
        `input_ids`, `attention_mask` and, as the data has them, `token_type_ids` and targets.
    """
    shape = (len(rows), dataset.choices or 1, length)  # [B, C, T]
    fill = {"input_ids": dataset.pad_token_id, "labels": IGNORED}
    names = dataset.token_fields - {"offset_mapping"} | {"attention_mask"}
    names |= {"labels"} if dataset.task in ("masked_lm", "causal_lm") else set()
    batch: Batch = {name: np.full(shape, fill.get(name, 0), np.int32) for name in sorted(names)}
    real = [(place, row) for place, row in enumerate(rows.tolist()) if row >= 0]
    for place, row in real:
        for choice, (start, stop) in enumerate(dataset.spans(row)):
            values = {n: dataset.arrays[n][start:stop] for n in names & dataset.token_fields}
            values["attention_mask"] = np.ones(stop - start, np.int32)
            if dataset.task == "causal_lm":
                values["labels"] = values["input_ids"]
            elif dataset.task == "masked_lm":
                generator = np.random.default_rng(seeds[place])
                values |= _masked(dataset, values["input_ids"], generator, mask_probability)
            for name, array in values.items():
                batch[name][place, choice, : stop - start] = array
    if dataset.choices is None:
        batch = {name: array[:, 0] for name, array in batch.items()}  # [B, T]
    return batch | {name: _targets(dataset, name, rows, length) for name in dataset.row_fields}


def _targets(
    dataset: TokenizedDataset, name: str, rows: Int[np.ndarray, "B"], length: int
) -> Shaped[np.ndarray, "B *K"]:
    """Of rows, one each: for -1 what the loss ignores, labels of -100 and positions behind the
    end; for floats, which have no such value, 0."""
    stored = dataset.arrays[name]
    ignored = IGNORED if name == "labels" else length
    ignored = 0 if stored.dtype.kind == "f" else ignored
    targets = np.full((len(rows), *stored.shape[1:]), ignored, stored.dtype)
    targets[rows >= 0] = stored[rows[rows >= 0]]
    return targets


def _masked(
    dataset: TokenizedDataset,
    ids: Int[np.ndarray, "T"],
    generator: np.random.Generator,
    probability: float,
) -> Batch:
    """Tokens to fill in, as BERT: of those asked for 80 % masked, 10 % another one, 10 % as is."""
    asked, how = generator.random((2, len(ids)))
    ordinary = dataset.ordinary_ids
    asked = (asked < probability) & ~np.isin(ids, dataset.special_ids)
    others = ordinary[generator.integers(len(ordinary), size=len(ids))]
    shown = np.where(how < 0.8, dataset.mask_token_id, np.where(how < 0.9, others, ids))
    return {"input_ids": np.where(asked, shown, ids), "labels": np.where(asked, ids, IGNORED)}
