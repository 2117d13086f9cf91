"""Configurations: frozen, validated, hashable (static under `jax.jit`), read from and written to
Hugging Face's config.json.

Field names and defaults are those of Hugging Face and of the LSG reference. Nothing is silently
corrected: an invalid value raises with the value, what is allowed, and what to do.
"""

import json
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, get_args

SparsityType = Literal["none", "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

SPARSITY_TYPES: tuple[str, ...] = get_args(SparsityType)
MAX_GLOBAL_TOKENS = 512  # rows of the reference's global embedding table


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class LSGConfig:
    """The attention pattern: local blocks, sparse representatives, global tokens.

    Every query block of `block_size` tokens attends to its own block and both neighbours, to
    `sparse_block_size` sparse representatives on either side of those, and to the global tokens.
    One representative stands for `sparsity_factor` tokens.

    Attributes:
        block_size: tokens per block.
        sparse_block_size: representatives on each side; 0 switches the sparse part off. Must exceed
            3/4 of `block_size / sparsity_factor`: below that the reference's windows silently fall
            inside the local window.
        sparsity_factor: tokens per representative, dividing `block_size`; 0 or less switches the
            sparse part off.
        sparsity_type: how representatives are chosen; None is accepted for "none".
        num_global_tokens: learned tokens in front of the sequence, 1..512.
        lsh_num_pre_rounds: hashing rounds before the last one, for "lsh".
        adaptive: pad any length to whole blocks; otherwise lengths over two blocks must be
            multiples of `block_size`.
        pool_with_global: the first token's final state is replaced by that of the first global
            token.
        mask_first_token: hide token 0 from every query (needs `pool_with_global`).
        strict_reference: reproduce the reference's padding leak in "bos_pooling" (and in the
            standalone "pooling") bit for bit.

    Raises:
        ValueError: for a setting that the reference would crash on or silently change.
    """

    adaptive: bool = True
    block_size: int = 128
    lsh_num_pre_rounds: int = 1
    mask_first_token: bool = False
    num_global_tokens: int = 1
    pool_with_global: bool = True
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: SparsityType = "norm"
    strict_reference: bool = False

    def __post_init__(self):
        if self.sparsity_type is None:
            object.__setattr__(self, "sparsity_type", "none")
        _require(
            self.sparsity_type in SPARSITY_TYPES,
            f"sparsity_type={self.sparsity_type!r} is unknown; choose one of "
            f"{', '.join(SPARSITY_TYPES)}.",
        )
        _require(self.block_size >= 1, f"block_size={self.block_size} must be at least 1.")
        _require(
            self.sparse_block_size >= 0,
            f"sparse_block_size={self.sparse_block_size} must be 0 (off) or positive.",
        )
        _require(
            self.lsh_num_pre_rounds >= 0,
            f"lsh_num_pre_rounds={self.lsh_num_pre_rounds} must be 0 or positive.",
        )
        _require(
            1 <= self.num_global_tokens <= MAX_GLOBAL_TOKENS,
            f"num_global_tokens={self.num_global_tokens} is outside 1..{MAX_GLOBAL_TOKENS}, the "
            "rows of the global embedding table.",
        )
        _require(
            self.pool_with_global or not self.mask_first_token,
            "mask_first_token=True hides the first token, so its state must come from a global: "
            "set pool_with_global=True.",
        )
        _require(
            self.sparsity_factor <= 0 or self.block_size % self.sparsity_factor == 0,
            f"block_size={self.block_size} is not divisible by "
            f"sparsity_factor={self.sparsity_factor}; {self._factor_remedy()}",
        )  # without a sparse part too: PyTorch's classes ask for it
        if self.is_sparse:
            self._validate_sparse()

    def _factor_remedy(self) -> str:
        block = self.block_size
        fitting = [d for d in range(1, block + 1) if block % d == 0 and (block // d) % 2 == 0]
        return (
            f"for block_size={block} choose sparsity_factor from {[*fitting, block]}, "
            "or 0 for no sparse part."
        )

    def _validate_sparse(self) -> None:
        block, sparse, factor = self.block_size, self.sparse_block_size, self.sparsity_factor
        step = block // factor
        _require(
            step == 1 or step % 2 == 0,
            f"block_size/sparsity_factor = {block}/{factor} = {step} is odd, and the sparse "
            f"windows need it even (or 1); {self._factor_remedy()}",
        )
        _require(
            4 * sparse > 3 * step,
            f"sparse_block_size={sparse} must be greater than 3/4 of block_size/sparsity_factor = "
            f"{step}, i.e. at least "
            f"{3 * step // 4 + 1}: smaller windows fall inside the local window. Use "
            f"sparse_block_size={block}, or 0 for none.",
        )
        if self.sparsity_type in ("norm", "lsh") and factor > 1:
            chunk = self.selection_chunk
            _require(
                chunk % factor == 0,
                f"sparsity_type={self.sparsity_type!r} picks from chunks of min(block_size, "
                f"sparse_block_size) = {chunk} tokens, "
                f"which sparsity_factor={factor} must divide; use sparse_block_size={block}.",
            )
        if self.sparsity_type == "lsh" and factor != sparse:
            _require(
                self.selection_chunk // factor >= 2,
                "sparsity_type='lsh' needs at least two buckets per chunk, but min(block_size, "
                "sparse_block_size)/sparsity_factor = "
                f"{self.selection_chunk}/{factor}; lower sparsity_factor.",
            )

    @property
    def is_sparse(self) -> bool:
        """Whether there is a sparse part at all."""
        return (
            self.sparsity_type != "none" and self.sparsity_factor > 0 and self.sparse_block_size > 0
        )

    @property
    def sparse_step(self) -> int:
        """Representatives per block."""
        return self.block_size // self.sparsity_factor

    @property
    def selection_chunk(self) -> int:
        """Tokens per chunk from which "norm" and "lsh" pick."""
        return min(self.block_size, self.sparse_block_size)

    def needs_padding(self, length: int, shards: int = 1) -> int:
        """Tokens to append to `length` real ones so that the blocked path sees whole blocks; 0 on
        the short path.

        Args:
            shards: how many devices the tokens are spread over, with as many blocks each.

        Raises:
            ValueError: if the length needs padding and `adaptive` is off, or if shards would be
                smaller than what a neighbour needs of them.
        """
        if shards == 1 and length <= 2 * self.block_size:
            return 0
        unit = shards * self.block_size
        extra = -length % unit
        if shards > 1:
            self._check_shards(length, shards, (length + extra) // unit)
        _require(
            self.adaptive or not extra,
            f"length {length} is over two blocks and not a multiple of "
            f"{'' if shards == 1 else f'{shards} shards x '}block_size={self.block_size}, and "
            f"adaptive=False: pad the inputs to {length + extra} or set adaptive=True.",
        )
        return extra

    def _check_shards(self, length: int, shards: int, blocks: int) -> None:
        needed = max(3, -(-self.sparse_halo // self.sparse_step) if self.is_sparse else 0)
        _require(
            blocks >= needed,
            f"{length} tokens over sequence={shards} devices give each {blocks} blocks of "
            f"{self.block_size}, fewer than the {needed} that its neighbours look into; use at "
            f"most sequence={max(length // (needed * self.block_size), 1)}, or texts of more than "
            f"{shards * (needed - 1) * self.block_size} tokens.",
        )
        _require(
            not self.strict_reference,
            "strict_reference=True reproduces numbers that depend on the padding of the whole "
            f"text, which sequence={shards} shards do not see; use sequence=1.",
        )

    @property
    def sparse_halo(self) -> int:
        """Representatives in front of a run of blocks, and behind it, that its queries see."""
        return self.sparse_step + self.sparse_block_size


_LSG_FIELDS = tuple(f.name for f in fields(LSGConfig))
# Values of the fields Hugging Face omits from config.json when they are the default.
_NUM_LABELS_DEFAULT = 2


class Dialect(NamedTuple):
    """How one model_type writes config.json.

    Attributes:
        defaults: where they differ from `EncoderConfig`'s, by our names.
        names: ours -> theirs, where they differ.
        absent: fields of ours that it does not have; their default is their only value.
    """

    defaults: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    names: dict[str, str] = {}  # noqa: RUF012
    absent: tuple[str, ...] = ()


DIALECTS: dict[str, Dialect] = {
    "roberta": Dialect({"vocab_size": 50265, "pad_token_id": 1}),
    "xlm-roberta": Dialect({"pad_token_id": 1}),
    "camembert": Dialect({"pad_token_id": 1}),
    "electra": Dialect(
        {
            "embedding_size": 128,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        }
    ),
    "distilbert": Dialect(
        {"num_hidden_layers": 6, "classifier_dropout": 0.2, "type_vocab_size": 0},
        {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "classifier_dropout": "seq_classif_dropout",
        },
        ("type_vocab_size", "layer_norm_eps"),
    ),
    "albert": Dialect(
        {
            "vocab_size": 30000,
            "embedding_size": 128,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "intermediate_size": 16384,
            "num_hidden_groups": 1,
            "inner_group_num": 1,
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout": 0.1,
        },
        {"classifier_dropout": "classifier_dropout_prob"},
    ),
}
# What PyTorch's classes compute otherwise, and these models do not: field -> the values that are
# fine.
_UNSUPPORTED: dict[str, tuple] = {
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
    "summary_type": ("first", None),
    "summary_use_proj": (True, None),
}
_OF_SOME_FAMILIES = ("embedding_size", "num_hidden_groups", "inner_group_num")


@dataclass(frozen=True)
class EncoderConfig:
    """One encoder of any supported family, with full attention (`lsg=None`) or LSG attention.

    Attributes follow Hugging Face's names. `labels` holds the label names in id order (`id2label`);
    `extra` keeps every field of config.json that lsg_flax does not use, as canonical JSON, so that
    it survives a round trip. `embedding_size` is the width of the tables where it is not
    `hidden_size`. With `num_hidden_groups`, layers share parameters: consecutive ones use the same
    group of `inner_group_num` layers (ALBERT).
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    embedding_size: int | None = None
    num_hidden_groups: int | None = None
    inner_group_num: int | None = None
    problem_type: ProblemType | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    lsg: LSGConfig | None = None
    extra: str = field(default="{}", repr=False)

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "num_hidden_layers",
            *_OF_SOME_FAMILIES,
        ):
            absent = name in _OF_SOME_FAMILIES and getattr(self, name) is None
            _require(
                absent or getattr(self, name) >= 1,
                f"{name}={getattr(self, name)} must be at least 1.",
            )
        _require(
            self.num_hidden_layers % (self.num_hidden_groups or 1) == 0,
            f"num_hidden_layers={self.num_hidden_layers} is not divisible by "
            f"num_hidden_groups={self.num_hidden_groups}.",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by "
            f"num_attention_heads={self.num_attention_heads}.",
        )
        _require(
            self.is_decoder or not self.add_cross_attention,
            "add_cross_attention=True is for decoders: set is_decoder=True as well.",
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            _require(rate is None or 0.0 <= rate < 1.0, f"{name}={rate} must lie in [0, 1).")
        _require(
            self.problem_type is None or self.problem_type in get_args(ProblemType),
            f"problem_type={self.problem_type!r} is unknown; choose one of "
            f"{', '.join(get_args(ProblemType))}.",
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
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the layers' parameters: (layers,), or (groups, inner layers)."""
        if self.num_hidden_groups is None:
            return (self.num_hidden_layers,)
        return (self.num_hidden_groups, self.inner_group_num or 1)

    def other(self, name: str, default: Any) -> Any:
        """A field of config.json that is not one of the attributes."""
        return json.loads(self.extra).get(name, default)

    @property
    def num_labels(self) -> int:
        """Number of labels of a classification head."""
        return len(self.labels)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EncoderConfig":
        """Reads the fields of a Hugging Face config.json, plain or LSG.

        Raises:
            ValueError: for a setting that changes the computation and is not supported, or an
                invalid value.
        """
        values = dict(values)
        for name, supported in _UNSUPPORTED.items():
            value = values.get(name)
            _require(
                value in supported,
                f"{name}={value!r} in config.json changes what the model computes and is not "
                f"supported; only {supported[0]!r} is.",
            )
        dialect = DIALECTS.get(values.get("model_type", "bert"), Dialect())
        for name, theirs in dialect.names.items():
            if theirs in values:
                values[name] = values.pop(theirs)
        values = dialect.defaults | values
        known = {f.name for f in fields(cls)} - {"labels", "lsg", "extra"}
        ours = {name: values.pop(name) for name in sorted(known & values.keys())}
        for name, value in ours.items():  # JSON knows numbers only: 0 may stand for 0.0
            if name in _FLOATS and isinstance(value, int):
                ours[name] = float(value)
        lsg = None
        if is_lsg(values):
            values.pop("base_model_prefix", None)
            lsg = LSGConfig(**{name: values.pop(name) for name in _LSG_FIELDS if name in values})
        labels = _read_labels(values)
        return cls(**ours, labels=labels, lsg=lsg, extra=json.dumps(values, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """The fields for config.json: Hugging Face's names, the LSG fields flat beside them,
        unknown fields as they were read."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("labels", "lsg", "extra")
        }
        dialect = DIALECTS.get(self.model_type, Dialect())
        for name in (*dialect.absent, *(n for n in _OF_SOME_FAMILIES if values[n] is None)):
            del values[name]
        for name, theirs in dialect.names.items():
            values[theirs] = values.pop(name)
        values["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
        values["label2id"] = {label: i for i, label in enumerate(self.labels)}
        if self.lsg:
            values["base_model_prefix"] = "lsg"
            values |= {name: getattr(self.lsg, name) for name in _LSG_FIELDS}
            if (
                not self.lsg.strict_reference
            ):  # ours, not the reference's: written only where it is set
                del values["strict_reference"]
        return json.loads(self.extra) | values

    def with_overrides(self, **overrides: Any) -> "EncoderConfig":
        """A copy with other values, given by their flat names in config.json (`num_labels` and LSG
        fields included).

        Raises:
            ValueError: for an unknown name, or an LSG field where the attention is full.
        """
        known = {f.name for f in fields(self)} - {"extra"}
        lsg_overrides = {name: overrides.pop(name) for name in _LSG_FIELDS if name in overrides}
        if "num_labels" in overrides:
            count = overrides.pop("num_labels")
            _require(count >= 1, f"num_labels={count} must be at least 1.")
            if count != self.num_labels:
                overrides.setdefault("labels", tuple(f"LABEL_{i}" for i in range(count)))
        if "id2label" in overrides:
            overrides["labels"] = _read_labels({"id2label": overrides.pop("id2label")})
        unknown = sorted(overrides.keys() - known)
        _require(
            not unknown,
            f"unknown config fields {unknown}; known are "
            f"{sorted(known | set(_LSG_FIELDS) | {'num_labels', 'id2label'})}.",
        )
        if lsg_overrides and "lsg" not in overrides:
            _require(
                self.lsg is not None,
                f"{sorted(lsg_overrides)} are LSG settings, but this checkpoint has full "
                "attention; "
                "turn it into an LSG one first: lsg_flax.convert_checkpoint(source, ...).",
            )
            overrides["lsg"] = replace(self.lsg, **lsg_overrides)  # type: ignore[type-var]
        return replace(self, **overrides)


_FLOATS = {f.name for f in fields(EncoderConfig) if f.type in (float, float | None)}


def is_lsg(values: dict[str, Any]) -> bool:
    """Whether the fields of a config.json are those of an LSG checkpoint."""
    architectures = values.get("architectures") or []
    architectures = [architectures] if isinstance(architectures, str) else architectures
    return values.get("base_model_prefix") == "lsg" or any(
        name.startswith("LSG") for name in architectures
    )


def _read_labels(values: dict[str, Any]) -> tuple[str, ...]:
    id2label = values.pop("id2label", None)
    values.pop("label2id", None)
    count = values.pop("num_labels", None)
    if id2label is None:
        return tuple(f"LABEL_{i}" for i in range(_NUM_LABELS_DEFAULT if count is None else count))
    names = {int(i): str(label) for i, label in id2label.items()}
    _require(
        sorted(names) == list(range(len(names))),
        f"id2label has the ids {sorted(names)}; they must be 0..{len(names) - 1} without gaps.",
    )
    return tuple(names[i] for i in range(len(names)))
