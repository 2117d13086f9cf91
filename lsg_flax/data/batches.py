"""Batches of fixed shapes from tokenised rows: each from one bucket of lengths, the same for the
same seed, and for any number of processes together.

Batch n is a pure function of n (order.py), so the state of an iterator is a number.

Axes: M microbatches, B batch, C choices, T tokens, Y labels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from lsg_flax.buckets import check_tokens, default_buckets
from lsg_flax.data.cache import INPUT, READ, TokenizedDataset
from lsg_flax.data.order import Order, ProcessShare, Remainder
from lsg_flax.data.packing import SEGMENT_ROWS, Packing, join_texts, pack_rows
from lsg_flax.files import Json, differences
from lsg_flax.models import IGNORED, TASKS, Batch

_ENDLESS = 2**62  # batches; what `len` can say
_MASKS, _EVAL_MASKS = range(2, 4)  # random numbers under the seed, beside those of the order

# Lengths to pad to: of the inputs, or by stream.
Buckets = Sequence[int] | Mapping[str, Sequence[int]]


class PackedRows(NamedTuple):
    """Rows that texts share, [O, texts] numbers of rows of the data, -1 for none."""

    packing: Packing
    texts: Int[np.ndarray, "O texts"]


class TrainBatches(Iterator[Batch]):
    """An iterator over batches, with a state; see `train_batches`.

    Attributes:
        buckets: the lengths that the inputs have in batches of this data.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        order: Order,
        share: ProcessShare,
        *,
        settings: Json,
        epochs: int | None,
        prefetch: int,
        packed: PackedRows | None = None,
    ):
        self._dataset, self._order, self._share, self._settings = dataset, order, share, settings
        self._packed = packed
        self.buckets = tuple(sorted({length for length, *_ in order.buckets}))
        total = _ENDLESS if epochs is None else self.steps(epochs)
        if not total:
            raise ValueError(
                f"epochs={epochs} of {len(dataset)} rows make no whole batch of {share.rows} rows "
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
        share, seed = self._share, self._settings["seed"]
        rows, places = share.own(rows), share.own(np.arange(share.rows))
        probability = self._settings["mask_probability"]
        if self._packed is None:
            seeds = [[seed, _MASKS, number, place] for place in places.reshape(-1).tolist()]
            batch = collate(self._dataset, rows.reshape(-1), bucket, seeds, probability)
        else:
            places, own = places.reshape(-1), rows.reshape(-1)
            key = [seed, _MASKS, number]
            batch = _collate_packed(self._dataset, self._packed, own, places, key, probability)
        if share.microbatches == 1:
            return batch
        return {name: x.reshape(*rows.shape, *x.shape[1:]) for name, x in batch.items()}

    def bucket_at(self, number: int) -> int:
        """The length of the inputs of batch `number`."""
        return self._order.batch(number)[0][0]

    def steps(self, epochs: int) -> int:
        """How many batches the first `epochs` epochs have."""
        return self._order.start(epochs)

    def epoch_at(self, number: int) -> int:
        """The epoch that batch `number` belongs to, from 0."""
        return self._order.epoch_of(number)

    def get_state(self) -> Json:
        """All that a new iterator needs to go on here, as JSON can say it."""
        return {"next": self._batches.get_state()["next_index"], "stream": dict(self._settings)}

    def set_state(self, state: Json) -> None:
        """Goes on where `get_state` was called, maybe with another number of processes.

        Raises:
            ValueError: if the state is of other data, batches or seed; the differences are listed.
        """
        different = [
            f"{name}: {saved} in the state, {here} here"
            for name, saved, here in differences(state.get("stream", {}), self._settings)
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
    buckets: Buckets | None = None,
    microbatches: int = 1,
    epochs: int | None = None,
    remainder: Remainder | None = None,
    shuffle: bool = True,
    mask_probability: float = 0.15,
    process_index: int | None = None,
    process_count: int | None = None,
    prefetch: int = 2,
    packing: Packing | None = None,
) -> TrainBatches:
    """Batches for training: shuffled anew in each epoch, each of one bucket, always of the same
    size.

    Args:
        batch_size: rows of a (micro)batch of all processes together.
        seed: of the order and of masked tokens; the same seed gives the same batches.
        buckets: lengths to pad to; `default_buckets` of the data's `max_length` by default. For
            data of several streams a mapping of their names, such as {"input": (512, 4096)}; those
            that are not given are padded to `default_buckets` of their longest row.
        microbatches: M > 1 gives arrays [M, B, ...], all M of the same bucket.
        epochs: how many; without end by default.
        remainder: what happens to the rows of a bucket that make no whole batch at the end of an
            epoch: "fill" adds rows that do not count (labels -100, all masked), "carry" keeps them
            for the next epoch (those of the last epoch are not seen). By default "fill", but
            "carry" for regression and multi-label, where no label is ignored.
        shuffle: False keeps the order of the data within a bucket, bucket after bucket.
        mask_probability: share of tokens that masked language models are asked for; of them 80 %
            become the mask token, 10 % another one, 10 % stay. Special tokens are never asked for.
        process_index, process_count: by default JAX's; each process gets its own rows of the same
            batches.
        prefetch: batches that threads prepare ahead; 0 prepares none.
        packing: several texts share a row, in place of buckets; a batch then has "segment_ids" [B,
            T], what a text has one of as [B, texts, ...], and "segment_rows" [B, texts], which row
            of the data each text is, -1 for none. `batch_size` counts rows that are shared, and
            which texts share one stays the same in all epochs.

    Returns:
        An iterator over dicts of arrays, [B, T] or [M, B, T] ([B, C, T] for multiple choice), by
        the names that models and losses take.

    Raises:
        ValueError: for options that do not fit each other or the data.
    """
    floats = any(dataset.arrays[name].dtype.kind == "f" for name in dataset.targets)
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
    share = ProcessShare.of(process_index, process_count, batch_size, microbatches)
    packed = None if packing is None else _packed_rows(dataset, packing, buckets, seed, floats)
    if packed is None:
        ladders = _ladders(dataset, buckets, share)
        lengths = [stream.lengths for stream in dataset.streams.values()]
    else:
        check_tokens(share.rows, packed.packing.length, share.count)
        ladders = {INPUT: (packed.packing.length,)}
        lengths = [np.full(len(packed.texts), packed.packing.length)]
    order = Order(
        lengths,
        ladders=[*ladders.values()],
        size=share.rows,
        seed=seed,
        remainder=chosen,
        shuffle=shuffle,
    )
    settings = {
        "data": dataset.fingerprint,
        "batch_size": batch_size,
        "microbatches": microbatches,
        **{"buckets" if n == INPUT else f"{n}_buckets": list(ladders[n]) for n in ladders},
        "seed": seed,
        "remainder": chosen,
        "shuffle": shuffle,
        "mask_probability": mask_probability,
    }
    if packed is not None:
        settings["packing"] = [packed.packing.block, packed.texts.shape[1]]
    options = {"settings": settings, "epochs": epochs, "prefetch": prefetch}
    return TrainBatches(dataset, order, share, **options, packed=packed)


def _packed_rows(
    dataset: TokenizedDataset, packing: Packing, buckets: Buckets | None, seed: int, floats: bool
) -> PackedRows:
    """The plan of a data set's rows; raises ValueError for data that cannot share rows."""
    if buckets is not None:
        raise ValueError(
            f"buckets={buckets} and packing={packing}: rows that are shared have one length; give "
            "one of them."
        )
    target = TASKS[dataset.task].targets[0] if TASKS[dataset.task].targets else None
    positions = target is not None and target.loss == "position"
    if len(dataset.streams) > 1 or dataset.choices is not None or positions or floats:
        raise ValueError(
            f"packing is for texts with classes, one for each text or token, not for {dataset.task}"
            + (" with labels that are floats" if floats else "")
            + "; leave it out."
        )
    return PackedRows(packing, pack_rows(dataset.lengths, packing, seed=seed))


class EvalBatch(NamedTuple):
    """A batch, and which row of the data each of its rows is; -1 for those that only fill it up,
    whose labels are -100 where that can be (0 for floats)."""

    batch: Batch
    rows: Int[np.ndarray, "B"]


@dataclass(frozen=True, eq=False)
class EvalBatches:
    """Every row once; see `eval_batches`."""

    dataset: TokenizedDataset
    order: Order
    share: ProcessShare
    seed: int
    mask_probability: float

    def __len__(self) -> int:
        return self.order.start(1)

    def __iter__(self) -> Iterator[EvalBatch]:
        for number in reversed(range(len(self))):  # a lack of memory shows at once
            bucket, rows = self.order.batch(number)
            rows = self.share.own(rows)[0]
            seeds = [[self.seed, _EVAL_MASKS, max(row, 0)] for row in rows.tolist()]
            yield EvalBatch(collate(self.dataset, rows, bucket, seeds, self.mask_probability), rows)


def eval_batches(
    dataset: TokenizedDataset,
    *,
    batch_size: int,
    buckets: Buckets | None = None,
    rows: int | None = None,
    seed: int = 0,
    mask_probability: float = 0.15,
    process_index: int | None = None,
    process_count: int | None = None,
) -> EvalBatches:
    """Batches for evaluation: every row exactly once, the longest bucket first, the same each time.

    Args:
        batch_size: rows of a batch of all processes together; the last batch of a bucket is filled
            up to it.
        rows: only the first so many.
        buckets, mask_probability, process_index, process_count: as for `train_batches`.
        seed: of the tokens that are masked, the same in each pass and for each batch size.

    Returns:
        An iterable, with a length, of `EvalBatch`.

    Raises:
        ValueError: for options that do not fit each other or the data.
    """
    share = ProcessShare.of(process_index, process_count, batch_size)
    if seed < 0 or not 0 < mask_probability < 1:
        raise ValueError(
            f"seed={seed} must be at least 0, mask_probability={mask_probability} between 0 and 1."
        )
    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows} must be at least 1.")
    order = Order(
        [stream.lengths[:rows] for stream in dataset.streams.values()],
        ladders=[*_ladders(dataset, buckets, share).values()],
        size=share.rows,
        seed=seed,
        remainder="fill",
        shuffle=False,
    )
    return EvalBatches(dataset, order, share, seed, mask_probability)


def _ladders(
    dataset: TokenizedDataset, given: Buckets | None, share: ProcessShare
) -> dict[str, tuple[int, ...]]:
    """The lengths that each stream is padded to, and in which a batch is small enough."""
    by_stream = {} if given is None else given if isinstance(given, Mapping) else {INPUT: given}
    if unknown := by_stream.keys() - dataset.streams.keys():
        raise ValueError(f"buckets={given} name {sorted(unknown)}, not {[*dataset.streams]}.")
    ladders = {}
    for name, stream in dataset.streams.items():
        longest = int(stream.lengths.max())
        limit = dataset.options["max_length"] if name == INPUT else longest
        lengths = by_stream.get(name, default_buckets(limit))
        ladders[name] = tuple(sorted({int(length) for length in lengths}))
        if not ladders[name] or ladders[name][0] < 1 or ladders[name][-1] < longest:
            raise ValueError(
                f"buckets={given} must be lengths from 1, and the longest row has {longest} tokens "
                f"of {name}; add a bucket, or tokenise with a smaller max_length."
            )
        padded = min(length for length in ladders[name] if length >= longest)
        check_tokens(share.rows, padded, share.count)
    return ladders


def collate(
    dataset: TokenizedDataset,
    rows: Int[np.ndarray, "B"],
    bucket: Sequence[int],
    seeds: Sequence[Sequence[int]],
    mask_probability: float,
) -> Batch:
    """The arrays of a batch: rows padded to the lengths of a bucket, and for -1 one that does not
    count; `seeds` are those of the masked tokens of each row."""
    batch: Batch = {}
    for name, length in zip(dataset.streams, bucket, strict=True):
        batch |= _padded(dataset, name, rows, length)
    batch |= _own_labels(dataset, batch, seeds, mask_probability)
    return batch | {name: _targets(dataset, name, rows, bucket[0]) for name in dataset.targets}


def _collate_packed(
    dataset: TokenizedDataset,
    packed: PackedRows,
    rows: Int[np.ndarray, "B"],
    places: Int[np.ndarray, "B"],
    key: list[int],
    mask_probability: float,
) -> Batch:
    """The arrays of a batch of shared rows; `places` are those of the rows in the whole batch, from
    which with `key` the masked tokens of each text are drawn."""
    none, width = np.full(len(rows), -1), packed.texts.shape[1]
    texts = np.where(rows[:, None] < 0, -1, packed.texts[rows])  # [B, texts]
    lengths = np.where(texts < 0, 0, dataset.lengths[texts])
    there = texts >= 0
    numbers = (places[:, None] * width + np.arange(width))[there]  # of texts in the whole batch
    seeds = [[*key, number] for number in numbers.tolist()]
    longest = max(int(lengths.max()), 1)
    each = collate(dataset, texts[there], (longest,), seeds, mask_probability)
    filler = collate(dataset, none, (packed.packing.length,), [key] * len(none), mask_probability)
    return join_texts(each, lengths, filler, packed.packing) | {
        SEGMENT_ROWS: texts.astype(np.int32)
    }


def _padded(
    dataset: TokenizedDataset, name: str, rows: Int[np.ndarray, "B"], length: int
) -> dict[str, Int[np.ndarray, "B *C T"]]:
    """The fields of a stream, and where it is real if a model reads it; other streams' padding are
    labels that do not count."""
    stream = dataset.streams[name]
    labels = [target.labels for target in TASKS[dataset.task].targets]
    fill = {f"{prefix}input_ids": dataset.pad_token_id for prefix in READ.values()}
    fill |= dict.fromkeys(labels, IGNORED)
    shape = (len(rows), math.prod(stream.shape), length)
    names = [*stream.fields, *([f"{READ[name]}attention_mask"] if name in READ else [])]
    arrays = {n: np.full(shape, fill.get(n, 0), np.int32) for n in names}
    for place in np.flatnonzero(rows >= 0).tolist():
        for number, (start, stop) in enumerate(stream.spans(int(rows[place]))):
            for n, array in arrays.items():
                values = stream.fields[n][start:stop] if n in stream.fields else 1
                array[place, number, : stop - start] = values
    return {n: array.reshape(len(rows), *stream.shape, length) for n, array in arrays.items()}


def _own_labels(
    dataset: TokenizedDataset, batch: Batch, seeds: Sequence[Sequence[int]], probability: float
) -> dict[str, Int[np.ndarray, "B T"]]:
    """Labels that are the tokens themselves, and with them the inputs that hide some."""
    task = TASKS[dataset.task]
    if task.examples not in ("masked_text", "running_text"):
        return {}
    shown, mask = batch["input_ids"].copy(), batch["attention_mask"]
    labels = np.where(mask == 1, shown, np.int32(IGNORED))
    for row, length in enumerate(mask.sum(axis=1).tolist()):
        if task.examples == "masked_text" and length:
            generator = np.random.default_rng(seeds[row])
            hidden = _masked(dataset, shown[row, :length], generator, probability)
            shown[row, :length], labels[row, :length] = hidden
    return {"input_ids": shown, task.targets[0].labels: labels}


def _targets(
    dataset: TokenizedDataset, name: str, rows: Int[np.ndarray, "B"], length: int
) -> Shaped[np.ndarray, "B *Y"]:
    """Of rows, one each: for -1 what the loss ignores, labels of -100 and positions behind the
    end; for floats, which have no such value, 0."""
    stored = dataset.arrays[name]
    positions = [t.labels for t in TASKS[dataset.task].targets if t.loss == "position"]
    ignored = 0 if stored.dtype.kind == "f" else length if name in positions else IGNORED
    targets = np.full((len(rows), *stored.shape[1:]), ignored, stored.dtype)
    targets[rows >= 0] = stored[rows[rows >= 0]]
    return targets


def _masked(
    dataset: TokenizedDataset,
    ids: Int[np.ndarray, "T"],
    generator: np.random.Generator,
    probability: float,
) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
    """Tokens to fill in, as BERT: of those asked for 80 % masked, 10 % another one, 10 % as is.
    What is shown, and the labels."""
    asked, how = generator.random((2, len(ids)))
    ordinary = dataset.ordinary_ids
    asked = (asked < probability) & ~np.isin(ids, dataset.special_ids)
    others = ordinary[generator.integers(len(ordinary), size=len(ids))]
    shown = np.where(how < 0.8, dataset.mask_token_id, np.where(how < 0.9, others, ids))
    return np.where(asked, shown, ids), np.where(asked, ids, IGNORED)
