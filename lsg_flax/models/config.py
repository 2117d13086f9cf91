"""Configurations: frozen, validated, hashable (static under `jax.jit`), read from and written to
Hugging Face's config.json.

Field names and defaults are those of Hugging Face and of the LSG reference. Nothing is silently
corrected: an invalid value raises with the value, what is allowed, and what to do.
"""

import json
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, get_args

from lsg_flax.models.config_json import (
    LSG_FIELDS,
    OF_SOME_FAMILIES,
    read_fields,
    read_labels,
    write_fields,
)
from lsg_flax.models.task import ProblemType
from lsg_flax.patterns import LSGConfig, require

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
    """

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
        self.require_positive("vocab_size", "hidden_size")
        require(
            self.problem_type is None or self.problem_type in get_args(ProblemType),
            f"problem_type={self.problem_type!r} is unknown; choose one of "
            f"{', '.join(get_args(ProblemType))}.",
        )

    def require_positive(self, *names: str) -> None:
        """Raises ValueError for a field of these that is given and less than 1."""
        for name in names:
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1.")

    def other(self, name: str, default: Any) -> Any:
        """A field of config.json that is not one of the attributes."""
        return json.loads(self.extra).get(name, default)

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
        """A copy with other values, given by their flat names in config.json (`num_labels` and LSG
        fields included).

        Raises:
            ValueError: for an unknown name, or an LSG field where the attention is full.
        """
        known = {f.name for f in fields(self)} - {"extra"}
        lsg_overrides = {name: overrides.pop(name) for name in LSG_FIELDS if name in overrides}
        if "num_labels" in overrides:
            count = overrides.pop("num_labels")
            require(count >= 1, f"num_labels={count} must be at least 1.")
            if count != self.num_labels:
                overrides.setdefault("labels", tuple(f"LABEL_{i}" for i in range(count)))
        if "id2label" in overrides:
            overrides["labels"] = read_labels({"id2label": overrides.pop("id2label")})
        unknown = sorted(overrides.keys() - known)
        require(
            not unknown,
            f"unknown config fields {unknown}; known are "
            f"{sorted(known | set(LSG_FIELDS) | {'num_labels', 'id2label'})}.",
        )
        if lsg_overrides and "lsg" not in overrides:
            require(
                self.lsg is not None,
                f"{sorted(lsg_overrides)} are LSG settings, but this checkpoint has full "
                "attention; "
                "turn it into an LSG one first: lsg_flax.convert_checkpoint(source, ...).",
            )
            overrides["lsg"] = replace(self.lsg, **lsg_overrides)  # type: ignore[type-var]
        return replace(self, **overrides)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """One encoder of any supported family.

    Attributes:
        embedding_size: the width of the tables where it is not `hidden_size`.
        num_hidden_groups: layers share parameters: consecutive ones use the same group of
            `inner_group_num` layers (ALBERT).
    """

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
        self.require_positive("num_attention_heads", "intermediate_size", "num_hidden_layers")
        self.require_positive("max_position_embeddings", *OF_SOME_FAMILIES)
        require(
            self.num_hidden_layers % (self.num_hidden_groups or 1) == 0,
            f"num_hidden_layers={self.num_hidden_layers} is not divisible by "
            f"num_hidden_groups={self.num_hidden_groups}.",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by "
            f"num_attention_heads={self.num_attention_heads}.",
        )
        require(
            self.is_decoder or not self.add_cross_attention,
            "add_cross_attention=True is for decoders: set is_decoder=True as well.",
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            require(rate is None or 0.0 <= rate < 1.0, f"{name}={rate} must lie in [0, 1).")
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
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the layers' parameters: (layers,), or (groups, inner layers)."""
        if self.num_hidden_groups is None:
            return (self.num_hidden_layers,)
        return (self.num_hidden_groups, self.inner_group_num or 1)
