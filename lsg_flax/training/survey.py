"""What a run would learn from, before there is any: rows, lengths, what is cut, labels, buckets.

Axes: O rows.
"""

import dataclasses

import numpy as np

from lsg_flax.buckets import default_buckets
from lsg_flax.data import INPUT, READ, TARGET, TokenizedDataset, pack_rows, spread, train_batches
from lsg_flax.training.embedding_source import check_negatives, check_queries, embedding_ladders
from lsg_flax.training.packing import packing_for
from lsg_flax.training.preparation import (
    check_packages,
    load_data,
    options_for,
    pattern_for,
    source_for,
    training_buckets,
)
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel


@dataclasses.dataclass(frozen=True)
class DataSurvey:
    """What is known of rows without running anything.

    Attributes:
        rows: as they are learned from; windows of questions and pieces of joined texts count each.
        skipped: broken rows that were left out.
        lengths: tokens of a row, see `spread`.
        others: the same of texts that are read beside the rows' own.
        cut: in words, what is lost of long texts; "" if nothing is.
        labels: how often each label is there, where they have names.
        buckets: how many rows are padded to each length; with packing rows of several texts.
        real: the share of their places that are no padding.
    """

    rows: int
    skipped: int
    lengths: dict[str, int]
    others: dict[str, dict[str, int]]
    cut: str
    labels: dict[str, int]
    buckets: dict[int, int]
    real: float


@dataclasses.dataclass(frozen=True)
class RunSurvey:
    """What a run would do: its data, and its steps in all and in an epoch."""

    train: DataSurvey
    held_out: DataSurvey | None
    steps: int
    epoch: int


def survey(settings: Settings, *, progress: bool = True) -> RunSurvey:
    """Reads and tokenises the data of a run, as the run then finds it; no weights, no devices, and
    nothing in OUTPUT.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `finetune`.
    """
    check_packages(settings)
    source = source_for(settings)
    options, tokenizer = options_for(settings, source), source.tokenizer
    if settings.writes_targets:
        tokenizer = source.reader(settings.src_lang, settings.tgt_lang)
    train, held_out = load_data(settings, options, tokenizer, progress)
    source.check_tokens(train)
    length = source.length
    ladders = _ladders(settings, source, train, held_out)
    given = {name: lengths for name, lengths in ladders.items() if lengths is not None}
    packing = None
    if settings.packing:
        packing = packing_for(source, pattern_for(settings, source), settings.buckets)
    batches = train_batches(
        train,
        batch_size=settings.microbatch_size,
        microbatches=settings.accumulate,
        seed=settings.seed,
        prefetch=0,
        buckets=given if packing is None else None,
        packing=packing,
    )
    epoch, steps = batches.steps(1), settings.steps_of(batches.steps)
    batches.close()
    buckets, other = ladders[INPUT] or (), None
    if held_out is not None:
        own = embedding_ladders(settings, source, held_out, None) if source.sentences else ladders
        other = _survey_of(held_out, own[INPUT] or (), length)
    learned = _survey_of(train, buckets, length)
    if packing is not None:
        shared = len(pack_rows(train.lengths, packing, seed=settings.seed))
        real = float(train.lengths.sum() / (shared * packing.length))
        learned = dataclasses.replace(learned, buckets={packing.length: shared}, real=real)
    return RunSurvey(learned, other, steps, epoch)


def _ladders(
    settings: Settings,
    source: SourceModel,
    train: TokenizedDataset,
    held_out: TokenizedDataset | None,
) -> dict[str, tuple[int, ...] | None]:
    """The lengths that `finetune` pads to, which refuses what is refused here."""
    if source.sentences is not None:
        found = embedding_ladders(settings, source, train, None)
        check_negatives(settings, train, found)
        check_queries(settings, held_out)
        return {**found}
    whole = settings.mesh.get("sequence", 1) > 1  # as `finetune` pads for several devices
    buckets = training_buckets(settings.ladder, source.length, source.config)
    buckets = buckets or ((source.length,) if whole else default_buckets(source.length))
    return {INPUT: buckets, TARGET: settings.target_buckets}


def _survey_of(data: TokenizedDataset, buckets: tuple[int, ...], length: int) -> DataSurvey:
    lengths = np.asarray(data.lengths)  # [O]
    read = {name: stream.lengths for name, stream in data.streams.items() if name in READ}
    ladder = np.sort(buckets)
    padded = ladder[np.searchsorted(ladder, lengths)]
    found, counts = np.unique(padded, return_counts=True)
    return DataSurvey(
        len(data),
        data.skipped,
        data.spread,
        {name: spread(of) for name, of in read.items() if name != INPUT},
        data.cut.words(length),
        _count_labels(data),
        dict(zip(found.tolist(), counts.tolist(), strict=True)),
        float(lengths.sum() / padded.sum()),
    )


def _count_labels(data: TokenizedDataset) -> dict[str, int]:
    """Of rows, or of the words that are tagged."""
    if data.labels is None:
        return {}
    labels = np.asarray(data.arrays["labels"])
    if labels.dtype.kind == "f":  # several for a row
        counts = labels.sum(axis=0)
    else:
        counts = np.bincount(labels[labels >= 0], minlength=len(data.labels))
    return dict(zip(data.labels, counts.astype(int).tolist(), strict=True))
