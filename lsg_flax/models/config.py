"""Configurations: frozen, validated, hashable (static under `jax.jit`), read from and written to
Hugging Face's config.json.

Field names and defaults are those of Hugging Face and of the LSG reference. Nothing is silently
corrected: an invalid value raises with the value, what is allowed, and what to do.
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

MOST_LAYERS = 1000  # with parameters of their own; each has 16 tensors that are listed by name
# Not typing.Self, which beartype refuses in the tests.
AnyConfig = TypeVar("AnyConfig", bound="ModelConfig")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every kind of model has. Attributes follow Hugging Face's names.

    Attributes:
        labels: the label names in id order (`id2label`).
        lsg: the attention pattern; None is full attention.
        extra: every field of config.json that lsg_flax does not use, as canonical JSON, so that it
            survives a round trip.
        RANGES: of the fields that are numbers. The upper ends are beyond every real model.
        LENGTHENS: whether `convert_checkpoint` makes such a model read longer texts.
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
            f"pad_token_id={pad} is outside {-size}..{size - 1}, the rows that vocab_size={size} "
            "gives.",
        )
        require(
            self.problem_type != "single_label_classification" or self.num_labels > 1,
            "problem_type='single_label_classification' needs two labels or more, and num_labels="
            "1; use problem_type='regression' for one number.",  # transformers 5 asks for it too
        )
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        others = json.loads(self.extra)
        dialect.check_absent(values, self.model_type)
        dialect.check_others(others, lsg=self.lsg is not None)
        dialect.check_sizes(values, others, self.model_type)

    @property
    def dialect(self) -> Dialect:
        """How the family writes config.json."""
        # No text yet where a wrong value is about to be refused.
        return dialect_of(self.model_type) if isinstance(self.model_type, str) else Dialect()

    def other(self, name: str, default: Any) -> Any:
        """A field of config.json that is not one of the attributes."""
        return json.loads(self.extra).get(name, default)

    @property
    def stacks(self) -> "dict[str, EncoderConfig]":
        """The stacks of layers by the first part of their parameters' paths."""
        raise NotImplementedError

    @property
    def segments(self) -> int:
        """How many segments `token_type_ids` tells apart; 0 where the model has none."""
        return next(iter(self.stacks.values())).type_vocab_size

    @property
    def filler(self) -> int:
        """The row of the word table that stands where a mask hides what it is."""
        self.check_tokens()
        return (self.pad_token_id or 0) % self.vocab_size

    def check_tokens(self) -> None:
        """Raises ValueError for a model without a table of tokens, which takes embeddings alone."""
        require(
            self.vocab_size > 0,
            "this model has num_tokens=None, so no table of tokens and no scores of them: give "
            "model.apply inputs_embeds, and task='base'.",
        )

    @property
    def attention(self) -> str:
        """The kind of attention, in a word."""
        return "LSG" if self.lsg else "full"

    def or_convert(self, remedy: str, tokens: int | None = None) -> str:
        """What to do, for a message: `remedy`, or a conversion where such a model has one.

        Args:
            remedy: what helps every model, such as "truncate it".
            tokens: to be read; None where LSG attention is all that is missing.
        """
        what = "give it LSG attention" if tokens is None else "make a checkpoint that reads more"
        if not self.LENGTHENS:
            return f"{remedy} (no conversion of a {self.model_type} can {what})"
        length = "" if tokens is None else f", max_sequence_length={tokens}"
        return f"{remedy}, or {what}: lsg_flax.convert_checkpoint(source, target{length})"

    @property
    def usual_task(self) -> str:
        """The task of a config.json that names none."""
        return "base"

    @property
    def ignored_label(self) -> int:
        """A label of tokens that does not count; -100 never does."""
        return IGNORED

    def cuts_last_token(self, length: int) -> bool:
        """Whether a loss of the next tokens of so many reads all but the last, a label alone."""
        return False

    @property
    def training_unit(self) -> int:
        """What the tokens of a row that it trains on are a multiple of."""
        return 1

    def check_training_length(self, length: int) -> None:
        """Raises ValueError for a number of tokens that it cannot be trained on; few have any."""

    @property
    def num_labels(self) -> int:
        """Number of labels of a classification head."""
        return len(self.labels)

    @classmethod
    def from_dict(cls: type[AnyConfig], values: dict[str, Any]) -> AnyConfig:
        """Reads the fields of a Hugging Face config.json, plain or LSG.

        Raises:
            ValueError: for a setting that changes the computation and is not supported, or an
                invalid value.
        """
        return cls(**read_fields(values, {f.name: f.type for f in fields(cls)}))

    def to_dict(self) -> dict[str, Any]:
        """The fields for config.json: Hugging Face's names, the LSG fields flat beside them,
        unknown fields as they were read."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return write_fields(values)

    def with_overrides(self: AnyConfig, **overrides: Any) -> AnyConfig:
        """A copy with other values, given by their flat names in config.json or by ours
        (`num_labels` and LSG fields included).

        Raises:
            ValueError: for an unknown name, or an LSG field where the attention is full.
        """
        known = {f.name for f in fields(self)} - {"extra", "model_type"}
        own = {name: overrides.pop(name) for name in known & overrides.keys()}
        given = own | heed_keywords(overrides)
        ours = {theirs: name for name, theirs in self.dialect.names.items()}
        values = {ours.get(name, name): value for name, value in given.items()}
        require(
            len(values) == len(given),
            f"{sorted(given.keys() & ours)} are given under both of their names; give one of them.",
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
        """The labels that overrides give as Hugging Face calls them, which are taken out."""
        names = ("num_labels", "id2label", "label2id")
        given = {name: overrides.pop(name) for name in names if name in overrides}
        if not given or "labels" in overrides:
            require(not given, f"labels and {[*given]} are one thing: give one of them.")
            return {}
        labels = read_labels(dict(given))
        if given.keys() == {"num_labels"} and len(labels) == self.num_labels:
            return {}
        inverse = {label: i for i, label in enumerate(labels)}
        require(
            given.get("num_labels", len(labels)) == len(labels)
            and given.get("label2id", inverse) == inverse,
            f"{' and '.join(f'{n}={v!r}' for n, v in given.items())} do not say the same; "
            "id2label gives the names by their ids.",
        )
        return {"labels": labels}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """One encoder of any supported family. Defaults are BERT's; those of another family come from
    `EncoderConfig.from_dict({"model_type": ...})`.

    Attributes:
        embedding_size: the width of the tables where it is not `hidden_size`.
        num_hidden_groups: layers share parameters: consecutive ones use the same group of
            `inner_group_num` layers (ALBERT).
        SHARES: fields and the number of equal parts that each is cut into.
    """

    RANGES: ClassVar[dict[str, Range]] = ModelConfig.RANGES | {
        "num_hidden_layers": whole(1, MOST_LAYERS),
        "num_attention_heads": whole(1, 2**16),
        "intermediate_size": whole(1, 2**24),
        "hidden_dropout_prob": RATE,
        "attention_probs_dropout_prob": RATE,
        "max_position_embeddings": whole(1, 2**28),
        "type_vocab_size": whole(0, 2**20),
        "layer_norm_eps": Range(0.0, 1.0, "must lie in [0, 1]"),
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
                f"sparsity_factor={lsg.sparsity_factor} over "
                f"num_attention_heads={self.num_attention_heads} some tokens are seen by no head; "
                "a factor up to the heads is better.",
                stacklevel=3,
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """Width of the embedding tables."""
        return self.embedding_size or self.hidden_size

    @property
    def kept_pattern(self) -> LSGConfig | Local | None:
        """What a cache has slots for; None for full attention."""
        return self.lsg

    @property
    def position_limit(self) -> tuple[str, int]:
        """What says how many rows of positions there are, and how many."""
        return "max_position_embeddings", self.max_position_embeddings

    @property
    def lacks(self) -> tuple[str, ...]:
        """Parts of the paths of parameters that these settings leave out."""
        parts = {
            "global_embeddings": self.lsg is not None,
            "token_type_embeddings": bool(self.type_vocab_size),
            "cross_attention": self.add_cross_attention,
        }
        return tuple(part for part, there in parts.items() if not there)

    @property
    def stacks(self) -> dict[str, "EncoderConfig"]:
        """The stacks of layers by the first part of their parameters' paths."""
        return {"encoder": self}

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the layers' parameters: (layers,), or (groups, inner layers)."""
        if self.num_hidden_groups is None:
            return (self.num_hidden_layers,)
        return (self.num_hidden_groups, self.inner_group_num or 1)

    def layers_of(self, path: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The layers that a stacked parameter has: places in the stack -> PyTorch's numbers."""
        del path
        return {place: place for place in np.ndindex(*self.stack)}
