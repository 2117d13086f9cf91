"""A survey of a run's data before training: rows, lengths, truncation, labels, buckets.

Axes: O rows.
"""

import dataclasses

import numpy as np

from lsg_flax.buckets import default_buckets
from lsg_flax.data import (
    INPUT,
    TARGET,
    Packing,
    TokenizedDataset,
    pack_rows,
    spread,
    train_batches,
)
from lsg_flax.training.embedding_source import check_negatives, check_queries, embedding_ladders
from lsg_flax.training.preparation import (
    check_packages,
    load_data,
    options_for,
    pattern_for,
    shapes_for,
    source_for,
    training_buckets,
)
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel


@dataclasses.dataclass(frozen=True)
class DataSurvey:
    """Facts about the rows of some data.

    Attributes:
        rows: number of rows; each window of a question and each piece of joined texts counts.
        skipped: number of broken rows that were left out.
        lengths: spread of the rows' lengths in tokens, see `spread`.
        others: the same for the rows' other texts, such as positives.
        cut: what is truncated of long texts, in words; "" if nothing is.
        labels: how often each label occurs, if labels have names.
        buckets: number of rows that are padded to each length in tokens; with packing rows of
            several texts.
        real: share of their positions that are not padding.
        packed: whether several texts are packed into each row.
    """

    rows: int
    skipped: int
    lengths: dict[str, int]
    others: dict[str, dict[str, int]]
    cut: str
    labels: dict[str, int]
    buckets: dict[int, int]
    real: float
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class RunSurvey:
    """What a run would do: its data, and its number of steps in total and in an epoch."""

    train: DataSurvey
    held_out: DataSurvey | None
    steps: int
    epoch: int


def survey(settings: Settings, *, progress: bool = True) -> RunSurvey:
    """Reads and tokenizes the data of a run, which then finds it in the cache. It reads no weights,
    uses no devices, and writes nothing to OUTPUT.

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
    shapes = shapes_for(settings, source, pattern_for(settings, source), given)
    batches = train_batches(
        train,
        batch_size=settings.microbatch_size,
        microbatches=settings.accumulate,
        prefetch=0,
        **shapes,
    )
    epoch, steps = batches.steps(1), settings.steps_of(batches.steps)
    batches.close()
    buckets, other = ladders[INPUT] or (), None
    if held_out is not None:
        own = embedding_ladders(settings, source, held_out, None) if source.sentences else ladders
        other = _survey_of(held_out, own[INPUT] or (), length)
    learned = _survey_of(train, buckets, length)
    if settings.packing:
        learned = _packed(learned, train, **shapes)
        other = None if held_out is None or other is None else _packed(other, held_out, **shapes)
    return RunSurvey(learned, other, steps, epoch)


def _packed(
    survey: DataSurvey, data: TokenizedDataset, *, packing: Packing, seed: int
) -> DataSurvey:
    """Returns the survey with packed rows in place of buckets."""
    shared = len(pack_rows(data.lengths, packing, seed=seed))
    real = float(data.lengths.sum() / (shared * packing.length))
    buckets = {packing.length: shared}
    return dataclasses.replace(survey, buckets=buckets, real=real, packed=True)


def _ladders(
    settings: Settings,
    source: SourceModel,
    train: TokenizedDataset,
    held_out: TokenizedDataset | None,
) -> dict[str, tuple[int, ...] | None]:
    """Returns the lengths that `finetune` pads to; raises ValueError where it would."""
    if source.sentences is not None:
        found = embedding_ladders(settings, source, train, None)
        check_negatives(settings, train, found)
        check_queries(settings, held_out)
        return {**found}
    whole = settings.mesh.get("sequence", 1) > 1  # then `finetune` pads all rows to one length
    buckets = training_buckets(settings.ladder, source.length, source.config)
    buckets = buckets or ((source.length,) if whole else default_buckets(source.length))
    return {INPUT: buckets, TARGET: settings.target_buckets}


def _survey_of(data: TokenizedDataset, buckets: tuple[int, ...], length: int) -> DataSurvey:
    lengths = np.asarray(data.lengths)  # [O]
    ladder = np.sort(buckets)
    padded = ladder[np.searchsorted(ladder, lengths)]
    found, counts = np.unique(padded, return_counts=True)
    return DataSurvey(
        len(data),
        data.skipped,
        data.spread,
        {name: spread(of) for name, of in data.read_lengths.items() if name != INPUT},
        data.cut.words(length),
        _count_labels(data),
        dict(zip(found.tolist(), counts.tolist(), strict=True)),
        float(lengths.sum() / padded.sum()),
    )


def _count_labels(data: TokenizedDataset) -> dict[str, int]:
    """Returns how often rows, or tagged words, have each label."""
    if data.labels is None:
        return {}
    labels = np.asarray(data.arrays["labels"])
    if labels.dtype.kind == "f":  # several for a row
        counts = labels.sum(axis=0)
    else:
        counts = np.bincount(labels[labels >= 0], minlength=len(data.labels))
    return dict(zip(data.labels, counts.astype(int).tolist(), strict=True))
