"""Batches of fixed shapes from tokenized rows. Each batch is from one bucket of lengths. The same
seed gives the same batches, for any number of processes.

Batch n is a pure function of n (order.py), so the state of an iterator is a number.

Axes: M microbatches, B batch, C choices, T tokens, O rows, Y labels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from lsg_flax.buckets import check_tokens, default_buckets
from lsg_flax.data.cache import INPUT, READ, TokenizedDataset
from lsg_flax.data.order import Order, ProcessShare, Remainder, checked_remainder
from lsg_flax.data.packing import SEGMENT_ROWS, PackedRows, Packing, join_texts, packed_rows
from lsg_flax.files import Json, differences
from lsg_flax.models import IGNORED, TASKS, Batch

_ENDLESS = 2**62  # batches; about the most that `len` can return
_MASKS, _EVAL_MASKS = range(2, 4)  # random streams of a seed; order.py and packing.py use others

# Lengths to pad to: of the inputs, or of each stream by its name.
Buckets = Sequence[int] | Mapping[str, Sequence[int]]


class TrainBatches(Iterator[Batch]):
    """An iterator over batches whose state can be saved; see `train_batches`.

    Attributes:
        buckets: the lengths, in tokens, of inputs that occur in batches of this data.

    Raises:
        ValueError: if this number of epochs does not fill a single batch.
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
                f"epochs={epochs} of {len(dataset)} rows do not fill a batch of {share.rows} rows "
                f"in any of the buckets {self.buckets}; lower batch_size, or raise epochs."
            )
        import grain  # takes half a second, so only where it is needed

        read = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
        # Threads, not processes: a forked tokenizer, or JAX itself, hangs.
        self._batches = iter(grain.MapDataset.range(total).map(self.batch_at).to_iter_dataset(read))

    def __next__(self) -> Batch:
        return next(self._batches)

    def batch_at(self, number: int) -> Batch:
        """Returns batch `number`, from 0, independent of the iterator's position."""
        bucket, rows = self._order.batch(int(number))
        share, seed = self._share, self._settings["seed"]
        rows, places = share.own(rows), share.own(np.arange(share.rows))
        probability = self._settings["mask_probability"]
        if self._packed is None:
            seeds = [[seed, _MASKS, number, place] for place in places.reshape(-1).tolist()]
            batch = collate(self._dataset, rows.reshape(-1), bucket, seeds, probability)
        else:
            texts = self._packed.of(rows.reshape(-1))
            numbers = places.reshape(-1, 1) * texts.shape[1] + np.arange(texts.shape[1])
            seeds = [[seed, _MASKS, number, n] for n in numbers[texts >= 0].tolist()]
            packing = self._packed.packing
            batch = _collate_packed(self._dataset, packing, texts, seeds, probability)
        if share.microbatches == 1:
            return batch
        return {name: x.reshape(*rows.shape, *x.shape[1:]) for name, x in batch.items()}

    def bucket_at(self, number: int) -> int:
        """Returns the length in tokens of the inputs of batch `number`."""
        return self._order.batch(number)[0][0]

    def steps(self, epochs: int) -> int:
        """Returns the number of batches (steps) in the first `epochs` epochs."""
        return self._order.start(epochs)

    def epoch_at(self, number: int) -> int:
        """Returns the epoch (from 0) that batch `number` belongs to."""
        return self._order.epoch_of(number)

    def get_state(self) -> Json:
        """Returns what a new iterator needs to continue here, as values that JSON can represent."""
        return {"next": self._batches.get_state()["next_index"], "stream": dict(self._settings)}

    def set_state(self, state: Json) -> None:
        """Continues where `get_state` was called, also with another number of processes.

        Raises:
            ValueError: if the state is of other data, batches or seed; the differences are listed.
        """
        different = [
            f"{name}: {saved} in the state, {here} here"
            for name, saved, here in differences(state.get("stream", {}), self._settings)
        ]
        if different:
            raise ValueError(
                "the state is of other batches, so continuing would repeat or lose rows; give the "
                "same data and options: " + "; ".join(different)
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
    """Returns batches for training, shuffled again in each epoch, each of one bucket, all of the
    same size.

    Args:
        batch_size: rows of a (micro)batch of all processes together.
        seed: seed of the order and of masked tokens; the same seed gives the same batches.
        buckets: lengths in tokens to pad to; by default `default_buckets` of the data's
            `max_length`. For data of several streams a mapping of their names, such as {"input":
            (512, 4096)}; streams that are not given are padded to `default_buckets` of their
            longest row.
        microbatches: M > 1 gives arrays [M, B, ...], all M of the same bucket.
        epochs: number of epochs; by default endless.
        remainder: what happens to the rows of a bucket that do not fill a batch at the end of an
            epoch: "fill" adds padding rows that do not count (labels -100, all masked), "carry"
            keeps them for the next epoch (those of the last epoch are never used). By default
            "fill", but "carry" for regression and multi-label, where no label is ignored unless
            texts are packed.
        shuffle: False keeps the order of the data within a bucket, bucket after bucket.
        mask_probability: share of tokens that masked language models predict; of them 80 % become
            the mask token, 10 % a random one, 10 % stay (arXiv 1810.04805, section 3.1). Special
            tokens are never predicted.
        process_index, process_count: by default JAX's; each process gets its own rows of the same
            batches.
        prefetch: batches that threads prepare ahead; 0 prepares none.
        packing: pack several texts into each row, instead of buckets. A batch then has
            "segment_ids" [B, T], arrays with one entry per text as [B, texts, ...], and
            "segment_rows" [B, texts], the number of each text in the data, -1 for none.
            `batch_size` counts packed rows; the same texts share a row in all epochs.

    Returns:
        An iterator over dicts of arrays, [B, T] or [M, B, T] ([B, C, T] for multiple choice), by
        the names that models and losses take.

    Raises:
        ValueError: for options that do not fit each other or the data.
    """
    floats = any(dataset.arrays[name].dtype.kind == "f" for name in dataset.targets)
    floats = floats and packing is None  # of shared rows the segments say which labels count
    remainder = checked_remainder(remainder, floats=floats)
    if seed < 0 or (epochs is not None and epochs < 1) or prefetch < 0:
        raise ValueError(
            f"seed={seed} and prefetch={prefetch} must be at least 0, epochs={epochs} at least 1."
        )
    if not 0 < mask_probability < 1:
        raise ValueError(f"mask_probability={mask_probability} must be above 0 and below 1.")
    share = ProcessShare.of(process_index, process_count, batch_size, microbatches)
    packed = None if packing is None else packed_rows(dataset, packing, buckets, seed)
    lengths, ladders = _lengths_and_ladders(dataset, buckets, share, packed)
    order = Order(
        lengths,
        ladders=[*ladders.values()],
        size=share.rows,
        seed=seed,
        remainder=remainder,
        shuffle=shuffle,
    )
    settings = {
        "data": dataset.fingerprint,
        "batch_size": batch_size,
        "microbatches": microbatches,
        **{"buckets" if n == INPUT else f"{n}_buckets": list(ladders[n]) for n in ladders},
        "seed": seed,
        "remainder": remainder,
        "shuffle": shuffle,
        "mask_probability": mask_probability,
    }
    if packed is not None:
        settings["packing"] = [packed.packing.block, packed.texts.shape[1]]
    options = {"settings": settings, "epochs": epochs, "prefetch": prefetch}
    return TrainBatches(dataset, order, share, **options, packed=packed)


class EvalBatch(NamedTuple):
    """A batch, and the numbers of its rows in the data; -1 marks padding rows, whose labels are
    -100 (0 for float labels). Of packed rows, the numbers of their texts."""

    batch: Batch
    rows: Int[np.ndarray, "B *texts"]


@dataclass(frozen=True, eq=False)
class EvalBatches:
    """Batches that have every row once; see `eval_batches`."""

    dataset: TokenizedDataset
    order: Order
    share: ProcessShare
    seed: int
    mask_probability: float
    packed: PackedRows | None = None

    def __len__(self) -> int:
        return self.order.start(1)

    def __iter__(self) -> Iterator[EvalBatch]:
        for number in reversed(range(len(self))):  # longest first: out of memory shows at once
            bucket, rows = self.order.batch(number)
            rows = self.share.own(rows)[0]
            if self.packed is None:
                seeds = [[self.seed, _EVAL_MASKS, max(row, 0)] for row in rows.tolist()]
                batch = collate(self.dataset, rows, bucket, seeds, self.mask_probability)
            else:
                rows, packing = self.packed.of(rows), self.packed.packing
                seeds = [[self.seed, _EVAL_MASKS, row] for row in rows[rows >= 0].tolist()]
                how = (packing, rows, seeds, self.mask_probability)
                batch = _collate_packed(self.dataset, *how)
            yield EvalBatch(batch, rows)


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
    packing: Packing | None = None,
) -> EvalBatches:
    """Returns batches for evaluation: every row exactly once, the longest bucket first, the same
    batches in each pass.

    Args:
        batch_size: rows of a batch of all processes together; the last batch of a bucket is padded
            to it.
        rows: use only the first `rows` rows of the data.
        buckets, mask_probability, process_index, process_count, packing: as for `train_batches`.
        seed: seed of masked tokens, which are the same in each pass and for each batch size, and of
            the texts that share rows.

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
    packed = None if packing is None else packed_rows(dataset, packing, buckets, seed, rows)
    lengths, ladders = _lengths_and_ladders(dataset, buckets, share, packed, rows)
    order = Order(
        lengths,
        ladders=[*ladders.values()],
        size=share.rows,
        seed=seed,
        remainder="fill",
        shuffle=False,
    )
    return EvalBatches(dataset, order, share, seed, mask_probability, packed)


def _lengths_and_ladders(
    dataset: TokenizedDataset,
    buckets: Buckets | None,
    share: ProcessShare,
    packed: PackedRows | None,
    rows: int | None = None,
) -> tuple[list[Int[np.ndarray, "O"]], dict[str, tuple[int, ...]]]:
    """Returns the lengths of the first `rows` rows, and the ladder, of each stream; those of the
    shared rows if texts are packed."""
    if packed is not None:
        return packed.lengths, _ladders(dataset, {INPUT: (packed.packing.length,)}, share)
    lengths = [stream.lengths[:rows] for stream in dataset.streams.values()]
    return lengths, _ladders(dataset, buckets, share)


def _ladders(
    dataset: TokenizedDataset, given: Buckets | None, share: ProcessShare
) -> dict[str, tuple[int, ...]]:
    """Returns the lengths that each stream is padded to; raises ValueError if rows are longer, or a
    batch would be too large."""
    by_stream = {} if given is None else given if isinstance(given, Mapping) else {INPUT: given}
    if unknown := by_stream.keys() - dataset.streams.keys():
        raise ValueError(
            f"buckets={given}: the data has no {sorted(unknown)}; give lengths for some of "
            f"{[*dataset.streams]}."
        )
    ladders = {}
    for name, stream in dataset.streams.items():
        longest = int(stream.lengths.max())
        limit = dataset.options["max_length"] if name == INPUT else longest
        lengths = by_stream.get(name, default_buckets(limit))
        ladders[name] = tuple(sorted({int(length) for length in lengths}))
        if not ladders[name] or ladders[name][0] < 1 or ladders[name][-1] < longest:
            raise ValueError(
                f"buckets={given} must be lengths of at least 1, one of them at least {longest}, "
                f"the tokens of the longest {name}; add a bucket, or tokenize with a smaller "
                "max_length."
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
    """Returns the arrays of a batch: rows padded to the lengths of a bucket; -1 gives a padding row
    that does not count. `seeds` are the seeds of each row's masked tokens."""
    batch: Batch = {}
    for name, length in zip(dataset.streams, bucket, strict=True):
        batch |= _padded(dataset, name, rows, length)
    batch |= _own_labels(dataset, batch, seeds, mask_probability)
    return batch | {name: _targets(dataset, name, rows, bucket[0]) for name in dataset.targets}


def _collate_packed(
    dataset: TokenizedDataset,
    packing: Packing,
    texts: Int[np.ndarray, "B texts"],
    seeds: Sequence[Sequence[int]],
    mask_probability: float,
) -> Batch:
    """Returns the arrays of a batch of packed rows with these `texts`, -1 for none. Each text has
    a seed of its masked tokens."""
    lengths = np.where(texts < 0, 0, dataset.lengths[texts])
    longest = max(int(lengths.max()), 1)
    each = collate(dataset, texts[texts >= 0], (longest,), seeds, mask_probability)
    none = np.full(len(texts), -1)
    filler = collate(dataset, none, (packing.length,), [], mask_probability)
    joined = join_texts(each, lengths, filler, packing, targets=dataset.targets)
    return joined | {SEGMENT_ROWS: texts.astype(np.int32)}


def _padded(
    dataset: TokenizedDataset, name: str, rows: Int[np.ndarray, "B"], length: int
) -> dict[str, Int[np.ndarray, "B *C T"]]:
    """Returns the padded fields of a stream, with an attention mask if a model reads it; a stream
    of labels is padded with labels that do not count."""
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
    """Returns labels of language models, which are the tokens, and inputs with masked tokens."""
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
    """Returns the target of each row. For -1 it is what the loss ignores: -100 as label, a position
    beyond the end, or 0 for floats, which have no ignored value."""
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
    """Returns input ids with masked tokens, and labels, as for BERT: of the tokens to predict 80 %
    are masked, 10 % replaced by a random one, 10 % unchanged."""
    asked, how = generator.random((2, len(ids)))
    ordinary = dataset.ordinary_ids
    asked = (asked < probability) & ~np.isin(ids, dataset.special_ids)
    others = ordinary[generator.integers(len(ordinary), size=len(ids))]
    shown = np.where(how < 0.8, dataset.mask_token_id, np.where(how < 0.9, others, ids))
    return np.where(asked, shown, ids), np.where(asked, ids, IGNORED)
