"""What an embedding run learns from, checked before any weights are read: the model to train, its
teacher, its rows."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping

from jax.sharding import Mesh
from jax.typing import DTypeLike

from lsg_flax.buckets import default_buckets
from lsg_flax.data import NEGATIVE, POSITIVE, TokenizedDataset
from lsg_flax.hub import (
    Checkpoint,
    SentenceSettings,
    Tokenizer,
    open_checkpoint,
    read_sentence_settings,
)
from lsg_flax.models import EncoderDecoderConfig, Model, ModelConfig, Params, check_pooling
from lsg_flax.sharding import SEQUENCE, check_batches
from lsg_flax.training.distillation import Frame, check_part, check_teacher
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel

_SHORT_BUCKETS = (32, 128)  # of texts alone; pairs have one length, and one program


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A model whose vectors are learned.

    Attributes:
        name: what the user calls it.
        checkpoint: of its weights.
        how: how its states become a vector.
        length: tokens of the parts that it reads, their special ones included.
        frame: the special tokens.
    """

    name: str
    checkpoint: Checkpoint
    how: SentenceSettings
    length: int
    frame: Frame

    def load(self, dtype: DTypeLike, mesh: Mesh | None) -> tuple[Model, Params]:
        """The model and its parameters, where the run has its own."""
        with no_pooler_needed():
            return self.checkpoint.load("base", dtype=dtype, mesh=mesh)


@contextlib.contextmanager
def no_pooler_needed() -> Iterator[None]:
    """Loads a base model without a warning that its pooler is not there: it is not used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "weights for task='base' not in the checkpoint")
        yield


def open_teacher(settings: Settings) -> tuple[Teacher, ModelConfig, Tokenizer] | None:
    """The teacher with its config and tokenizer, its weights not read yet; None without one.

    Raises:
        FileNotFoundError: if it, or its tokenizer, is not there.
        ValueError: if it does not say how states become vectors, or cannot read such parts.
    """
    if settings.teacher is None:
        return None
    name, checkpoint = settings.teacher, open_checkpoint(settings.teacher)
    given = None if checkpoint.modules else settings.pooling
    how, tokenizer = (
        read_sentence_settings(checkpoint.root, checkpoint.modules, given),
        checkpoint.tokenizer,
    )
    if tokenizer is None:
        raise FileNotFoundError(f"teacher={name} has no tokenizer; copy its files there.")
    reads = Model(checkpoint.config_for("base"), "base").max_length
    usual = how.max_length or min(reads, tokenizer.model_max_length)
    length, frame = settings.teacher_length or usual, Frame.of(tokenizer)
    check_part(name, length, reads, frame)
    return Teacher(name, checkpoint, how, length, frame), checkpoint.config, tokenizer


def with_sentences(settings: Settings, source: SourceModel) -> SourceModel:
    """The checkpoint with how its states become vectors: as its folder says, or else the settings,
    or else the teacher.

    Raises:
        FileNotFoundError, ValueError: for what does not say so, cannot be embedded, or does not fit
            the teacher.
    """
    config, checkpoint = source.config, source.checkpoint
    if isinstance(config, EncoderDecoderConfig):
        raise ValueError(
            f"{source.name} is an encoder-decoder ({config.model_type}), whose states are those of "
            "a text to write; embeddings need an encoder, such as BERT or RoBERTa."
        )
    opened, pooling = open_teacher(settings), settings.pooling
    if opened is not None and not checkpoint.modules:
        how = opened[0].how
        how = how._replace(pooling=pooling or how.pooling, max_length=None)
    else:
        how = read_sentence_settings(checkpoint.root, checkpoint.modules, pooling)
    check_pooling(how.pooling, None if source.converts else config)
    if opened is not None:
        teacher, its_config, its_tokenizer = opened
        own = (source.name, config, source.tokenizer)
        check_teacher((teacher.name, its_config, its_tokenizer), own)
        if teacher.how.normalize != how.normalize:
            raise ValueError(
                f"teacher={teacher.name} has normalize={teacher.how.normalize}, and {source.name} "
                f"normalize={how.normalize} (a Normalize module in modules.json): lengths could "
                "not be learned; give both the same modules."
            )
    length = source.length
    if settings.max_length is None and not source.converts:
        length = min(length, how.max_length or length)
    source.tokenizer.model_max_length = length
    return dataclasses.replace(source, length=length, sentences=how._replace(max_length=length))


def embedding_ladders(
    settings: Settings, source: SourceModel, data: TokenizedDataset, mesh: Mesh | None
) -> dict[str, tuple[int, ...]]:
    """The lengths that each stream is padded to: those of the settings; else for texts alone 32,
    128 and powers of two from 512, and for pairs the one that holds the longest, so that a batch
    has texts of all lengths and there is one program. Devices that cut texts have the longest.

    Raises:
        ValueError: for lengths that the model, and rows and lengths that the mesh cannot have.
    """
    config, limit = source.config, source.length
    shards = settings.mesh.get(SEQUENCE, 1) if mesh is None else mesh.shape[SEQUENCE]
    given = (limit,) if shards > 1 else settings.buckets
    unit, usual = config.training_unit, default_buckets(limit, *_SHORT_BUCKETS)
    lengths = tuple(sorted({-(-length // unit) * unit for length in given or usual}))
    for length in lengths:
        config.check_training_length(length)
    ladders = {}
    for name, stream in data.streams.items():
        fitting = [length for length in lengths if length >= int(stream.lengths.max())][:1]
        several = len(data.streams) == 1 or given is not None or not fitting
        ladders[name] = lengths if several else tuple(fitting)
    if mesh is not None:
        sizes = {"batch_size": settings.microbatch_size}
        sizes |= {"eval_batch_size": settings.eval_batch_size} if settings.eval_batch_size else {}
        check_batches(mesh, sizes, lengths, config.lsg and config.lsg.needs_padding)
    return ladders


def check_negatives(
    settings: Settings, data: TokenizedDataset, ladders: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError for pairs that make a batch without negatives."""
    if settings.teacher is not None or NEGATIVE in data.streams:
        return
    size, remedy = settings.batch_size, "give a column of negatives, or another batch_size"
    if size == 1:
        raise ValueError(
            "batch_size=1: the negatives of a pair are the other rows of its batch, and there are "
            f"none; {remedy}."
        )
    rungs = zip(*(_rungs(data, name, of) for name, of in ladders.items()), strict=True)
    counts: dict[tuple[int, ...], int] = {}
    for bucket in rungs:
        counts[bucket] = counts.get(bucket, 0) + 1
    for bucket, count in counts.items():
        if count % size == 1:
            raise ValueError(
                f"{count} rows of at most {' and '.join(map(str, bucket))} tokens, in batches of "
                f"batch_size={size}, leave a batch of one row, which has no negatives; {remedy}, "
                "or one row less."
            )


def check_queries(settings: Settings, data: TokenizedDataset | None) -> None:
    """Raises ValueError for a run whose best model is to be told by what no row has."""
    retrieves = (settings.best or "").removeprefix("eval_").startswith(("recall", "mrr", "ndcg"))
    if retrieves and data is not None and POSITIVE not in data.streams:
        raise ValueError(
            f"best={settings.best!r} is of retrieval, but eval_data has no queries: no row has a "
            f"{settings.data_options(1, None, token_type_ids=False).columns.positive!r} to be "
            "found; add the column, or choose 'eval_loss' or 'eval_cosine'."
        )


def _rungs(data: TokenizedDataset, name: str, lengths: tuple[int, ...]) -> list[int]:
    return [min(n for n in lengths if n >= own) for own in data.streams[name].lengths.tolist()]
