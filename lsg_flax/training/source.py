"""The checkpoint that fine-tuning starts from: what it can read, and the model to train from it."""

import copy
import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lsg_flax.data import DataOptions, TokenizedDataset
from lsg_flax.hub import (
    Checkpoint,
    LSGOptions,
    SentenceSettings,
    Tokenizer,
    check_languages,
    make_lsg,
    open_checkpoint,
)
from lsg_flax.models import TASKS, Model, ModelConfig, Params
from lsg_flax.sharding import shard


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """An opened checkpoint, and how a run uses it.

    Attributes:
        name: the user's name for it.
        checkpoint, tokenizer: the opened checkpoint and its tokenizer.
        task: the task that it is trained for.
        length: maximum tokens of a row.
        converts: whether it is first converted to LSG attention, or to more positions.
        sentences: how texts become vectors, if embeddings are trained; saved with the model.
    """

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    task: str
    length: int
    converts: bool
    sentences: SentenceSettings | None = None

    @property
    def model_task(self) -> str:
        """The task of the model that is trained."""
        return TASKS[self.task].model_task

    @property
    def config(self) -> ModelConfig:
        """The config of the checkpoint, before any conversion."""
        return self.checkpoint.config

    @property
    def reads(self) -> int:
        """The maximum number of tokens that the model to train can read."""
        config = self.checkpoint.config_for(self.model_task)
        return self.length if self.converts else Model(config, self.model_task).max_length

    def check_globals(self) -> None:
        """Raises ValueError if there are no global tokens to train."""
        if self.config.lsg is None and not self.converts:
            remedy = "train only the head (train_only='head')"
            remedy += ", or set convert (--convert)" if self.config.LENGTHENS else ""
            raise ValueError(
                f"train_only='global_tokens_and_head', but {self.name} has {self.config.attention} "
                f"attention and no global tokens; {self.config.or_convert(remedy)}."
            )

    def check_targets(self, longest: int | None) -> None:
        """Raises ValueError for a model that cannot generate texts of `longest` tokens."""
        if longest is not None and longest > self.reads:
            raise ValueError(
                f"max_target_length={longest}, but the decoder of {self.name} has {self.reads} "
                "positions; give at most that many, or set convert (--convert) and a max_length "
                "as large: encoder and decoder then get that many positions."
            )
        model = Model(self.checkpoint.config_for(self.task), self.task)
        jax.eval_shape(model.shift_right, jax.ShapeDtypeStruct((1, 2), np.int32))

    def with_target_length(self, options: DataOptions) -> DataOptions:
        """Returns the options, with targets by default as long as the model can read."""
        if not options.has_target_texts or options.max_target_length is not None:
            return options
        return dataclasses.replace(options, max_target_length=self.reads)

    def reader(self, src_lang: str | None, tgt_lang: str | None) -> Tokenizer:
        """Returns a tokenizer with the languages of texts and targets set; by default its own.

        Raises:
            ValueError: for languages that the tokenizer does not know, or if it needs languages
                that are not given.
        """
        given = {"src_lang": src_lang, "tgt_lang": tgt_lang}
        tokenizer = copy.deepcopy(self.tokenizer)  # the original is saved unchanged
        if not hasattr(tokenizer, "src_lang"):
            if any(given.values()):
                raise ValueError(
                    f"src_lang={src_lang!r}, tgt_lang={tgt_lang!r}: the tokenizer of {self.name} "
                    "does not know languages; leave them out."
                )
            return tokenizer
        given = {name: code or getattr(tokenizer, name, None) for name, code in given.items()}
        check_languages(tokenizer, given)
        for name, code in given.items():
            setattr(tokenizer, name, code)
        return tokenizer

    def check_tokens(self, data: TokenizedDataset) -> None:
        """Raises ValueError for tokens that the model has no embedding for."""
        size = self.config.vocab_size
        fields = [pair for stream in data.streams.values() for pair in stream.fields.items()]
        ids = [part for name, part in fields if name.endswith(("input_ids", "labels"))]
        largest = max(data.pad_token_id, *(int(part.max()) for part in ids))
        if largest >= size:
            raise ValueError(
                f"the tokenizer of {self.name} gives the token {largest}, but vocab_size={size} "
                f"allows 0..{size - 1}; tokenizer and model do not belong together: put the "
                "model's own files beside config.json."
            )

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels of a head that is trained further, in the head's order; None if the head is
        new or its labels have no names."""
        labels, trained = self.config.labels, self.checkpoint.head == self.task
        unnamed = all(label == f"LABEL_{number}" for number, label in enumerate(labels))
        named = TASKS[self.task].named_labels
        return labels if named and trained and not unnamed else None

    def load(
        self,
        overrides: dict[str, Any],
        pattern: dict[str, Any],
        dtype: DTypeLike,
        mesh: Mesh | None,
    ) -> tuple[Model, Params]:
        """Loads the model to train and its parameters.

        Args:
            overrides: fields of the config, such as the labels of the head.
            pattern: fields of `LSGConfig`.
            dtype: dtype of the computation.
            mesh: mesh to shard the parameters over.
        """
        if not self.converts:
            options = {"dtype": dtype, "mesh": mesh} | overrides | pattern
            return self.checkpoint.load(self.model_task, **options)
        model, params = self.checkpoint.load(self.model_task, dtype=dtype, **overrides)
        options = LSGOptions(self.length, resize_lsg=self.config.lsg is not None)
        model, params = make_lsg(model, params, self.tokenizer, options=options, pattern=pattern)
        return model, params if mesh is None else shard(jax.device_get(params), mesh)


def open_source(name: str, task: str, max_length: int | None, *, convert: bool) -> SourceModel:
    """Opens a checkpoint without reading its weights.

    Args:
        name: folder or hub id.
        max_length: maximum tokens of a row; None takes the tokenizer's `model_max_length` (the
            length that the model was trained at), at most what the model reads; with `convert`, a
            model without LSG attention gets 4096.
        convert: first convert it to LSG attention and enough positions.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: for a task that the model has no head for or a length that it cannot read, or if
            it has no tokenizer.
    """
    checkpoint = open_checkpoint(name)
    config = checkpoint.config
    config.check_tokens()
    learned = TASKS[task]
    model = Model(checkpoint.config_for(learned.model_task), learned.model_task)
    reads, plain = model.max_length, config.lsg is None
    if learned.learned_by is None and model.task_record.examples is None:
        raise ValueError(
            f"{task} of {config.model_type} cannot be trained from files, because its labels "
            "differ from those of other families; train it on batches of your own with "
            "lsg_flax.training.loss_fn, or choose one of "
            f"{[n for n, head in model.family.heads.items() if head.task.examples]}."
        )
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{name} has no tokenizer; put its files (tokenizer.json or vocab.txt, "
            "tokenizer_config.json) beside config.json."
        )
    usual = min(reads, tokenizer.model_max_length)
    length = max_length or (LSGOptions.max_sequence_length if convert and plain else usual)
    if length > reads and not convert:
        remedy = "set convert (--convert) to make it read more here, " if config.LENGTHENS else ""
        raise ValueError(
            f"max_length={length}, but {name} reads {reads} tokens; "
            f"{config.or_convert(f'{remedy}give at most max_length={reads}', length)}."
        )
    tokenizer.model_max_length = length  # saved with the model: others read so much by default
    converts = convert and (plain or length > reads)
    return SourceModel(name, checkpoint, tokenizer, task, length, converts)
