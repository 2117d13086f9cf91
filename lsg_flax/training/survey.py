"""What a run would learn from, before there is any: rows, lengths, what is cut, labels, buckets.

Axes: O rows.
"""

import dataclasses

import numpy as np

from lsg_flax.buckets import default_buckets
from lsg_flax.data import INPUT, TARGET, TokenizedDataset, train_batches
from lsg_flax.training.finetune import load_data, options_for, source_for, training_buckets
from lsg_flax.training.settings import Settings


@dataclasses.dataclass(frozen=True)
class DataSurvey:
    """What is known of rows without running anything.

    Attributes:
        rows: as they are learned from; windows of questions and pieces of joined texts count each.
        skipped: broken rows that were left out.
        lengths: tokens of the shortest, the middle one, the 90th of 100, and the longest row.
        cut: in words, what is lost of long texts; "" if nothing is.
        labels: how often each label is there, where they have names.
        buckets: how many rows are padded to each length.
        real: the share of their places that are no padding.
    """

    rows: int
    skipped: int
    lengths: tuple[int, ...]
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
    source = source_for(settings)
    options, tokenizer = options_for(settings, source), source.tokenizer
    if settings.writes_targets:
        tokenizer = source.reader(settings.src_lang, settings.tgt_lang)
    train, held_out = load_data(settings, options, tokenizer, progress)
    source.check_tokens(train)
    length = source.length
    whole = settings.mesh.get("sequence", 1) > 1  # as `finetune` pads for several devices
    buckets = training_buckets(settings.buckets, length, source.config)
    buckets = buckets or ((length,) if whole else default_buckets(length))
    ladders = {INPUT: buckets, TARGET: settings.target_buckets}
    batches = train_batches(
        train,
        batch_size=settings.microbatch_size,
        microbatches=settings.accumulate,
        buckets={name: given for name, given in ladders.items() if given is not None},
        seed=settings.seed,
        prefetch=0,
    )
    epoch, steps = batches.steps(1), settings.steps_of(batches.steps)
    batches.close()
    other = None if held_out is None else _survey_of(held_out, buckets, length)
    return RunSurvey(_survey_of(train, buckets, length), other, steps, epoch)


def _survey_of(data: TokenizedDataset, buckets: tuple[int, ...], length: int) -> DataSurvey:
    lengths = np.asarray(data.lengths)  # [O]
    ladder = np.sort(buckets)
    padded = ladder[np.searchsorted(ladder, lengths)]
    found, counts = np.unique(padded, return_counts=True)
    quantiles = np.quantile(lengths, (0, 0.5, 0.9, 1), method="nearest")
    return DataSurvey(
        len(data),
        data.skipped,
        tuple(int(value) for value in quantiles),
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
