"""Opens and checks what an embedding run needs, before any weights are read: the model to train,
its teacher and its rows."""

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

_SHORT_BUCKETS = (32, 128)  # without pairs; pairs have one length, and one program


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A model whose vectors the student learns.

    Attributes:
        name: the user's name for it.
        checkpoint: its opened checkpoint.
        how: how its hidden states become a vector.
        length: tokens of the parts that it reads, special tokens included.
        frame: the special tokens around a text.
    """

    name: str
    checkpoint: Checkpoint
    how: SentenceSettings
    length: int
    frame: Frame

    def load(self, dtype: DTypeLike, mesh: Mesh | None) -> tuple[Model, Params]:
        """Returns the model and its parameters, sharded over `mesh` if there is one."""
        with no_pooler_needed():
            return self.checkpoint.load("base", dtype=dtype, mesh=mesh)


@contextlib.contextmanager
def no_pooler_needed() -> Iterator[None]:
    """Suppresses the warning that a base model's pooler is missing: embeddings do not use it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "weights for task='base' not in the checkpoint")
        yield


def open_teacher(settings: Settings) -> tuple[Teacher, ModelConfig, Tokenizer] | None:
    """Returns the teacher, its config and its tokenizer, without reading weights; None without one.

    Raises:
        FileNotFoundError: if the teacher or its tokenizer is missing.
        ValueError: if its folder does not say how hidden states become vectors, or it cannot read
            parts of `teacher_length`.
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
    """Returns the model to train with the way in which its hidden states become vectors: that of
    its folder, otherwise of the settings, otherwise of the teacher.

    Raises:
        FileNotFoundError, ValueError: if none of them says so, or the model cannot make embeddings
            or does not fit the teacher.
    """
    config, checkpoint = source.config, source.checkpoint
    if isinstance(config, EncoderDecoderConfig):
        raise ValueError(
            f"{source.name} is an encoder-decoder ({config.model_type}), which is made to write "
            "texts; embeddings need an encoder, such as BERT or RoBERTa."
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
                f"teacher={teacher.name} has normalize={teacher.how.normalize}, but {source.name} "
                f"has normalize={how.normalize} (a Normalize module in modules.json), so their "
                "vectors differ in length; give both the same modules."
            )
    length = source.length
    if settings.max_length is None and not source.converts:
        length = min(length, how.max_length or length)
    source.tokenizer.model_max_length = length
    return dataclasses.replace(source, length=length, sentences=how._replace(max_length=length))


def embedding_ladders(
    settings: Settings, source: SourceModel, data: TokenizedDataset, mesh: Mesh | None
) -> dict[str, tuple[int, ...]]:
    """Returns the lengths that each stream is padded to.

    They are `settings.buckets` if given. By default single texts have 32, 128 and powers of two
    from 512. Pairs have the one length that fits the longest, so that a batch mixes texts of all
    lengths and there is one program. Where the mesh splits texts, the only length is the longest.

    Raises:
        ValueError: for lengths that the model cannot read, and rows or lengths that the mesh cannot
            split evenly.
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
    """Raises ValueError if some batch of pairs would have no negatives."""
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
    """Raises ValueError if `best` is a retrieval score, but `eval_data` has no queries."""
    retrieves = (settings.best or "").removeprefix("eval_").startswith(("recall", "mrr", "ndcg"))
    if retrieves and data is not None and POSITIVE not in data.streams:
        raise ValueError(
            f"best={settings.best!r} is a retrieval score, but eval_data has no queries: no row "
            f"has a {settings.data_options(1, None, token_type_ids=False).columns.positive!r} "
            "column; add it, or choose 'eval_loss' or 'eval_cosine'."
        )


def _rungs(data: TokenizedDataset, name: str, lengths: tuple[int, ...]) -> list[int]:
    return [min(n for n in lengths if n >= own) for own in data.streams[name].lengths.tolist()]
