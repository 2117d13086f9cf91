"""Configurations: frozen, validated, hashable (static under `jax.jit`), read from and written to
Hugging Face's config.json.

Field names and defaults are those of Hugging Face and of the LSG reference. Nothing is silently
corrected: an invalid value raises ValueError with the value, what is allowed, and what to do.
"""

import json
import math
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from lsg_flax.checks import Range, check_fields, checked_value, require, whole
from lsg_flax.models.activations import activation
from lsg_flax.models.config_json import (
    LABEL_COUNT,
    LSG_FIELDS,
    RATE,
    Dialect,
    dialect_of,
    read_fields,
    read_labels,
    write_fields,
)
from lsg_flax.models.keywords import heed_keywords
from lsg_flax.models.task import IGNORED, ProblemType
from lsg_flax.patterns import Local, LSGConfig

MOST_LAYERS = 1000  # with parameters of their own: each has 16 tensors that are listed by name
# Not typing.Self, which beartype refuses in the tests.
AnyConfig = TypeVar("AnyConfig", bound="ModelConfig")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields that all models have, with the names of transformers' BertConfig and its like.

    Attributes:
        vocab_size, hidden_size: number of tokens in the table, and of features of a state.
        initializer_range: standard deviation of drawn weights.
        labels: the label names in id order (`id2label`).
        lsg: the attention pattern; None for full attention.
        extra: all fields of config.json that lsg_flax does not use, as canonical JSON, so that they
            survive a round trip.
        RANGES: allowed ranges of the numeric fields. The upper ends exceed every real model.
        LENGTHENS: whether `convert_checkpoint` can make such a model read longer texts.

    Raises:
        ValueError: for a value of another type or outside its range, a pad_token_id that is not in
            the table, a single label for single_label_classification, and settings that the family
            does not have.
    """

    RANGES: ClassVar[dict[str, Range]] = {
        "vocab_size": whole(1, 2**28),
        "hidden_size": whole(1, 2**20),
        "initializer_range": Range(0.0, 100.0, "must be 0 or positive, at most 100"),
    }
    LENGTHENS: ClassVar[bool] = True

    model_type: str
    vocab_size: int = 30522
    hidden_size: int = 768
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    problem_type: ProblemType | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    lsg: LSGConfig | None = None
    extra: str = field(default="{}", repr=False)

    def __post_init__(self):
        dialect = self.dialect
        check_fields(self, self.RANGES, dialect.spelled)
        checked_value("num_labels", len(self.labels), int, LABEL_COUNT)
        pad, size = self.pad_token_id, self.vocab_size
        require(
            pad is None or -size <= pad < size,  # as in PyTorch, which counts from the end too
            f"pad_token_id={pad} is outside {-size}..{size - 1}, the rows of a table of "
            f"vocab_size={size}.",
        )
        require(
            self.problem_type != "single_label_classification" or self.num_labels > 1,
            "problem_type='single_label_classification' needs two labels or more, got num_labels="
            "1; use problem_type='regression' for one number.",  # as in transformers 5
        )
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        others = json.loads(self.extra)
        dialect.check_absent(values, self.model_type)
        dialect.check_others(others, lsg=self.lsg is not None)
        dialect.check_sizes(values, others, self.model_type)

    @property
    def dialect(self) -> Dialect:
        """How the family writes its config.json."""
        # model_type may not be a string yet: then the checks of the fields raise.
        return dialect_of(self.model_type) if isinstance(self.model_type, str) else Dialect()

    def other(self, name: str, default: Any) -> Any:
        """Returns a field of config.json that is not one of the attributes."""
        return json.loads(self.extra).get(name, default)

    @property
    def stacks(self) -> "dict[str, EncoderConfig]":
        """The configs of the stacks of layers, by the first part of their parameters' paths; raises
        NotImplementedError in this base class."""
        raise NotImplementedError

    @property
    def segments(self) -> int:
        """The number of segments of `token_type_ids`; 0 if the model has none."""
        return next(iter(self.stacks.values())).type_vocab_size

    @property
    def filler(self) -> int:
        """The token id for positions that a mask hides: the padding token, or 0; raises ValueError
        as `check_tokens`."""
        self.check_tokens()
        return (self.pad_token_id or 0) % self.vocab_size

    def check_tokens(self) -> None:
        """Raises ValueError for a model without a table of tokens, which reads only embeddings."""
        require(
            self.vocab_size > 0,
            "this model has num_tokens=None, so it has no table of tokens and no scores of them: "
            "pass inputs_embeds to model.apply, and use task='base'.",
        )

    @property
    def attention(self) -> str:
        """The kind of attention in one word, for messages and cards."""
        return "LSG" if self.lsg else "full"

    def or_convert(self, remedy: str, tokens: int | None = None) -> str:
        """Returns what to do, for an error message: `remedy`, or a conversion if there is one.

        Args:
            remedy: what helps with every model, such as "truncate it".
            tokens: how many tokens should be read; None if only LSG attention is missing.
        """
        what = "give it LSG attention" if tokens is None else "make a checkpoint that reads more"
        if not self.LENGTHENS:
            return f"{remedy} (no conversion of a {self.model_type} model can {what})"
        length = "" if tokens is None else f", max_sequence_length={tokens}"
        length += ", resize_lsg=True" if self.lsg else ""  # otherwise trained globals are lost
        return f"{remedy}, or {what}: lsg_flax.convert_checkpoint(source, target{length})"

    @property
    def usual_task(self) -> str:
        """The task of a checkpoint whose config.json has no `architectures`."""
        return "base"

    @property
    def ignored_label(self) -> int:
        """A token label that the loss ignores, beside -100."""
        return IGNORED

    def cuts_last_token(self, length: int) -> bool:
        """Whether next-token losses on rows of `length` tokens read all but the last, which is
        only a label."""
        return False

    @property
    def training_unit(self) -> int:
        """The row lengths that the model trains on are multiples of this number of tokens."""
        return 1

    def check_training_length(self, length: int) -> None:
        """Raises ValueError for a `length` in tokens that the model cannot be trained on. Few
        models have such lengths."""

    @property
    def num_labels(self) -> int:
        """The number of labels of a classification head."""
        return len(self.labels)

    @classmethod
    def from_dict(cls: type[AnyConfig], values: dict[str, Any]) -> AnyConfig:
        """Makes a config from the fields of a Hugging Face config.json, plain or LSG.

        Raises:
            ValueError: for a setting that changes the computation and is not supported, and for
                invalid values.
        """
        return cls(**read_fields(values, {f.name: f.type for f in fields(cls)}))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for config.json: Hugging Face's names, with the LSG fields at the same
        level, and unknown fields as they were read."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return write_fields(values)

    def with_overrides(self: AnyConfig, **overrides: Any) -> AnyConfig:
        """Returns a copy with other values.

        Args:
            **overrides: new values by the names of config.json or of the attributes, `num_labels`
                and LSG fields included.

        Raises:
            ValueError: for an unknown name or an invalid value, and for an LSG field if the
                attention is full.
        """
        known = {f.name for f in fields(self)} - {"extra", "model_type"}
        own = {name: overrides.pop(name) for name in known & overrides.keys()}
        given = own | heed_keywords(overrides)
        ours = {theirs: name for name, theirs in self.dialect.names.items()}
        values = {ours.get(name, name): value for name, value in given.items()}
        require(
            len(values) == len(given),
            f"{sorted(given.keys() & ours)} are given under both of their names; use one of them.",
        )
        values |= self._labels_of(values)
        lsg = {name: values.pop(name) for name in LSG_FIELDS if name in values}
        others = {name: values.pop(name) for name in self.dialect.others if name in values}
        unknown = sorted(values.keys() - known)
        require(
            not unknown,
            f"unknown config fields {unknown}; known are "
            f"{sorted({*known, *LSG_FIELDS, *self.dialect.others, 'num_labels', 'id2label'})}.",
        )
        if lsg and "lsg" not in values:
            require(
                self.lsg is not None,
                f"{sorted(lsg)} are LSG settings, but this checkpoint has {self.attention} "
                f"attention; {self.or_convert('leave them out')}.",
            )
            values["lsg"] = replace(self.lsg, **lsg)  # type: ignore[type-var]
        if others:
            values["extra"] = json.dumps(json.loads(self.extra) | others, sort_keys=True)
        return replace(self, **values)

    def _labels_of(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Takes labels by Hugging Face's names (`num_labels`, `id2label`, `label2id`) out of the
        overrides and returns them as `labels`."""
        names = ("num_labels", "id2label", "label2id")
        given = {name: overrides.pop(name) for name in names if name in overrides}
        if not given or "labels" in overrides:
            require(not given, f"labels and {[*given]} set the same thing: give one of them.")
            return {}
        labels = read_labels(dict(given))
        if given.keys() == {"num_labels"} and len(labels) == self.num_labels:
            return {}
        inverse = {label: i for i, label in enumerate(labels)}
        require(
            given.get("num_labels", len(labels)) == len(labels)
            and given.get("label2id", inverse) == inverse,
            f"{' and '.join(f'{n}={v!r}' for n, v in given.items())} contradict each other; give "
            "id2label alone, the names by their ids.",
        )
        return {"labels": labels}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """The config of an encoder, or of a decoder on its own, of any supported family.

    Names and defaults are those of transformers' BertConfig;
    `EncoderConfig.from_dict({"model_type": ...})` has the defaults of another family.

    Attributes:
        num_hidden_layers, num_attention_heads: number of layers, and of heads of each.
        intermediate_size: features between the two projections of a feed-forward layer.
        hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout: probabilities of
            dropping a feature of a state, an attention weight, and a feature that a head reads.
        max_position_embeddings, type_vocab_size: number of positions and of segments.
        embedding_size: features of the embedding tables if it is not `hidden_size`.
        num_hidden_groups: number of groups of layers with shared parameters (ALBERT): consecutive
            layers use the same group of `inner_group_num` layers.
        SHARES: pairs of fields, of which the second must divide the first.

    Raises:
        ValueError: as `ModelConfig`, and for an unknown activation, a hidden_size or number of
            layers that is not divisible as it must be, more than 1,000 layers with parameters of
            their own, and cross-attention without `is_decoder`.
    """

    RANGES: ClassVar[dict[str, Range]] = ModelConfig.RANGES | {
        "num_hidden_layers": whole(1, MOST_LAYERS),
        "num_attention_heads": whole(1, 2**16),
        "intermediate_size": whole(1, 2**24),
        "hidden_dropout_prob": RATE,
        "attention_probs_dropout_prob": RATE,
        "max_position_embeddings": whole(1, 2**28),
        "type_vocab_size": whole(0, 2**20),
        "layer_norm_eps": Range(0.0, 1.0, "must be in [0, 1]"),
        "classifier_dropout": RATE,
        "embedding_size": whole(1, 2**20),
        "num_hidden_groups": whole(1, MOST_LAYERS),
        "inner_group_num": whole(1, 100),
    }
    SHARES: ClassVar[tuple[tuple[str, str], ...]] = (("hidden_size", "num_attention_heads"),)

    model_type: str = "bert"
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    embedding_size: int | None = None
    num_hidden_groups: int | None = None
    inner_group_num: int | None = None

    def __post_init__(self):
        super().__post_init__()
        activation(self.hidden_act, self.dialect.spelled("hidden_act"))
        for name, of in (("num_hidden_layers", "num_hidden_groups"), *self.SHARES):
            value, parts = getattr(self, name), getattr(self, of) or 1
            require(
                value % parts == 0,
                f"{self.dialect.spelled(name)}={value} is not divisible by "
                f"{self.dialect.spelled(of)}={parts}.",
            )
        require(
            math.prod(self.stack) <= MOST_LAYERS,
            f"num_hidden_groups={self.num_hidden_groups} of inner_group_num={self.inner_group_num} "
            f"layers are more than {MOST_LAYERS:,}.",
        )
        require(
            self.type_vocab_size >= 1 or "type_vocab_size" in self.dialect.absent,
            f"type_vocab_size=0 must be at least 1: {self.model_type} adds a segment to every "
            "token.",
        )
        require(
            self.is_decoder or not self.add_cross_attention,
            "add_cross_attention=True is for decoders: set is_decoder=True as well.",
        )
        lsg = self.lsg
        if (
            lsg
            and lsg.is_sparse
            and "stride" in lsg.sparsity_type
            and lsg.sparsity_factor > self.num_attention_heads
        ):
            warnings.warn(
                f"sparsity_type={lsg.sparsity_type!r} gives each head other tokens, so with "
                f"sparsity_factor={lsg.sparsity_factor} larger than "
                f"num_attention_heads={self.num_attention_heads} no head sees some tokens; use a "
                "factor of at most the number of heads.",
                stacklevel=3,
            )

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """Features of the embedding tables."""
        return self.embedding_size or self.hidden_size

    @property
    def kept_pattern(self) -> LSGConfig | Local | None:
        """The pattern that decides how many slots a cache has; None for full attention."""
        return self.lsg

    @property
    def position_limit(self) -> tuple[str, int]:
        """The name of the setting that limits positions, and the number of positions."""
        return "max_position_embeddings", self.max_position_embeddings

    @property
    def lacks(self) -> tuple[str, ...]:
        """Parts of the paths of parameters that a model with these settings does not have."""
        parts = {
            "global_embeddings": self.lsg is not None,
            "token_type_embeddings": bool(self.type_vocab_size),
            "cross_attention": self.add_cross_attention,
        }
        return tuple(part for part, there in parts.items() if not there)

    @property
    def stacks(self) -> dict[str, "EncoderConfig"]:
        """The configs of the stacks of layers, by the first part of their parameters' paths."""
        return {"encoder": self}

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the layers' parameters: (layers,), or (groups, inner layers)."""
        if self.num_hidden_groups is None:
            return (self.num_hidden_layers,)
        return (self.num_hidden_groups, self.inner_group_num or 1)

    def layers_of(self, path: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Returns the layers of a stacked parameter: indices in the stack -> PyTorch's indices."""
        del path
        return {place: place for place in np.ndindex(*self.stack)}
