"""The configuration of Reformer, with transformers' names, and the attention patterns of its
layers."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

from lsg_flax.checks import Range, require, short, whole
from lsg_flax.models.config import MOST_LAYERS, EncoderConfig
from lsg_flax.models.config_json import ABSENT, RATE, REFUSED, Dialect
from lsg_flax.patterns import LSH, Local

_Same = TypeVar("_Same", bound="ReformerConfig")
LayerKind = Literal["local", "lsh"]
KINDS: tuple[LayerKind, ...] = get_args(LayerKind)


@dataclass(frozen=True, kw_only=True)
class ReformerConfig(EncoderConfig):
    """The config of a Reformer (arXiv 2001.04451), with the names and defaults of transformers'
    ReformerConfig. Settings that all models have are named as in other configs; config.json keeps
    its own names for them (`feed_forward_size`, `local_attention_probs_dropout_prob`).

    Attributes:
        attn_layers: "local" or "lsh" for each layer; `num_hidden_layers` is their number.
        attention_head_size: features of one attention head.
        axial_norm_std: standard deviation of drawn position tables.
        axial_pos_shape: rows and columns in which the positions of a text are arranged.
        axial_pos_embds_dim: features of a row's and of a column's position.
        local_attn_chunk_length, lsh_attn_chunk_length: tokens per chunk.
        local_num_chunks_before, lsh_num_chunks_before: chunks before its own that a token sees.
        local_num_chunks_after, lsh_num_chunks_after: chunks after its own that a token sees.
        lsh_attention_probs_dropout_prob: probability of dropping an attention weight.
        num_buckets, num_hashes: number of buckets and rounds of hashing. num_buckets=None chooses
            by the number of tokens of a call (see `buckets`), and is not changed by it.
        hash_seed: seed of every layer's rotations in every call; the numbers are JAX's.
        chunk_size_feed_forward, chunk_size_lm_head: tokens computed at a time, 0 for all: smaller
            chunks need less memory and more time.

    Raises:
        ValueError: as `EncoderConfig`, and for other kinds of layers, LSG attention, a decoder with
            chunks after its own, numbers of buckets that cannot be hashed to, and axial shapes
            that do not fit hidden_size.
    """

    RANGES: ClassVar[dict[str, Range]] = EncoderConfig.RANGES | {
        "attention_head_size": whole(1, 2**20),
        **{f"{kind}_attn_chunk_length": whole(1, 2**20) for kind in KINDS},
        **{f"{kind}_num_chunks_before": whole(0, 2**10) for kind in KINDS},
        **{f"{kind}_num_chunks_after": whole(0, 2**10) for kind in KINDS},
        **dict.fromkeys(("chunk_size_feed_forward", "chunk_size_lm_head"), whole(0, 2**28)),
        "lsh_attention_probs_dropout_prob": RATE,
        "num_hashes": whole(1, 100),
        "hash_seed": whole(0, 2**32 - 1),
        "axial_norm_std": Range(0.0, 100.0, "must be 0 or positive, at most 100"),
    }
    SHARES: ClassVar[tuple[tuple[str, str], ...]] = ()  # heads have a width of their own
    LENGTHENS: ClassVar[bool] = False

    model_type: str = "reformer"
    vocab_size: int = 320
    hidden_size: int = 256
    tie_word_embeddings: bool = False
    num_hidden_layers: int = field(init=False)
    intermediate_size: int = 512
    hidden_act: str = "relu"
    hidden_dropout_prob: float = 0.05
    attention_probs_dropout_prob: float = 0.05
    max_position_embeddings: int = 4096
    type_vocab_size: int = 0
    attention_head_size: int = 64
    attn_layers: tuple[str, ...] = ("local", "lsh") * 3
    axial_norm_std: float = 1.0
    axial_pos_embds: bool = True
    axial_pos_shape: tuple[int, ...] = (64, 64)
    axial_pos_embds_dim: tuple[int, ...] = (64, 192)
    chunk_size_feed_forward: int = 0
    chunk_size_lm_head: int = 0
    hash_seed: int | None = None
    local_attn_chunk_length: int = 64
    local_num_chunks_before: int = 1
    local_num_chunks_after: int = 0
    lsh_attn_chunk_length: int = 64
    lsh_attention_probs_dropout_prob: float = 0.0
    lsh_num_chunks_before: int = 1
    lsh_num_chunks_after: int = 0
    num_buckets: int | tuple[int, ...] | None = None
    num_hashes: int = 1

    def __post_init__(self):
        layers = self.attn_layers
        require(
            isinstance(layers, list | tuple)
            and 1 <= len(layers) <= MOST_LAYERS
            and all(kind in KINDS for kind in layers),
            f"attn_layers={short(layers)} must list 'local' or 'lsh' for each layer, of 1 to "
            f"{MOST_LAYERS} layers.",
        )
        object.__setattr__(self, "num_hidden_layers", len(layers))
        super().__post_init__()
        require(self.lsg is None, "lsg: a Reformer has no LSG attention; leave it out.")
        for kind in self.kinds if self.is_decoder else ():
            name = f"{kind}_num_chunks_after"
            require(
                not getattr(self, name),
                f"{name}={getattr(self, name)} with is_decoder=True: a decoder sees no later "
                f"tokens; give {name}=0.",
            )
        self._check_buckets()
        if self.axial_pos_embds:
            self._check_axes()

    def _check_buckets(self) -> None:
        given = self.num_buckets
        if isinstance(given, tuple):
            fits = bool(given) and all(2 <= n <= 2**20 and n % 2 == 0 for n in given)
        else:
            fits = given is None or (2 <= given <= 2**20 and given & (given - 1) == 0)
        require(
            fits,
            f"num_buckets={given} must be a power of two, or a list of even factors such as "
            "[64, 128], each hashed on its own; or null, to choose by the number of tokens.",
        )

    def _check_axes(self) -> None:
        shape, widths = self.axial_pos_shape, self.axial_pos_embds_dim
        require(
            len(shape) == len(widths) == 2 and min(*shape, *widths) >= 1,
            f"axial_pos_shape={list(shape)} and axial_pos_embds_dim={list(widths)} must have two "
            "positive numbers each, for rows and for columns.",
        )
        require(
            sum(widths) == self.hidden_size,
            f"axial_pos_embds_dim={list(widths)} adds up to {sum(widths)}, but must add up to "
            f"hidden_size={self.hidden_size}: a position's embedding is those of its row and its "
            "column concatenated.",
        )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of attention that the layers have."""
        return tuple(kind for kind in KINDS if kind in self.attn_layers)

    @property
    def period(self) -> tuple[LayerKind, ...]:
        """The shortest sequence of layer kinds of which all layers are repetitions."""
        layers: Any = self.attn_layers
        sizes = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
        return next(layers[:n] for n in sizes if layers[:n] * (len(layers) // n) == layers)

    @property
    def attention(self) -> str:
        """The kind of attention, in a word."""
        return "lsh" if "lsh" in self.kinds else "local"

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.attention_head_size

    @property
    def position_limit(self) -> tuple[str, int]:
        """The name of the setting that limits positions, and the number of positions."""
        if not self.axial_pos_embds:
            return super().position_limit
        return "prod(axial_pos_shape)", math.prod(self.axial_pos_shape)

    def chunk_length(self, kind: LayerKind) -> int:
        """Returns the tokens per chunk of layers of this kind."""
        return self.local_attn_chunk_length if kind == "local" else self.lsh_attn_chunk_length

    @property
    def chunk_multiple(self) -> int:
        """The smallest number of tokens that is a multiple of every layer's chunk."""
        return math.lcm(*map(self.chunk_length, self.kinds))

    def needs_padding(self, length: int) -> int:
        """Returns how many tokens to add to `length` tokens so that every layer has whole chunks; 0
        up to the shortest chunk."""
        short_enough = length <= min(map(self.chunk_length, self.kinds))
        return 0 if short_enough else -length % self.chunk_multiple

    @property
    def training_unit(self) -> int:
        """The number of all axial positions, or else `chunk_multiple`."""
        return self.position_limit[1] if self.axial_pos_embds else self.chunk_multiple

    def check_training_length(self, length: int) -> None:
        """Raises ValueError for a number of tokens that PyTorch's class cannot train on either:
        dropout drops whole columns of axial positions, and chunks must be whole."""
        if self.axial_pos_embds:
            rows, columns = self.axial_pos_shape
            require(
                length == rows * columns,
                f"{length} tokens while training, but axial_pos_shape={[rows, columns]} trains "
                f"only on rows of {rows} x {columns} = {rows * columns} tokens, because dropout "
                "drops whole columns of positions: pad or truncate every row to that length, or "
                "choose another axial_pos_shape.",
            )
        extra = self.needs_padding(length)
        require(
            not extra,
            f"{length} tokens while training are not whole chunks: give a multiple of "
            f"{self.chunk_multiple}, such as {length + extra}"
            + (", and an axial_pos_shape whose product is that." if self.axial_pos_embds else "."),
        )

    def check_cache(self) -> None:
        """Raises ValueError if cached hashes would not be valid for a longer text."""
        require(
            self.num_buckets is not None or "lsh" not in self.kinds,
            "num_buckets=null with a cache: PyTorch's class fixes it by the first text that it "
            "hashes; set it to config.buckets(number of tokens), or generate with use_cache=False, "
            "where every step chooses it by its own length.",
        )

    def buckets(self, length: int) -> int | tuple[int, ...]:
        """Returns the number of buckets of a hashing round for `length` tokens, padding included:
        about two per chunk, in two factors if there are many."""
        chunk = self.lsh_attn_chunk_length
        if self.num_buckets is not None or length <= chunk:  # up to one chunk nothing is hashed
            return self.num_buckets or 2
        power = (2 * (length // chunk)).bit_length() - 1
        if 2**power <= 2 * max(math.isqrt(self.max_position_embeddings // chunk), chunk):
            return 2**power
        return 2 ** (power // 2), 2 ** (power - power // 2)

    def pattern(self, kind: LayerKind, length: int) -> Local | LSH:
        """Returns the attention pattern of layers of this kind for `length` tokens, padding
        included."""
        chunk, causal = self.chunk_length(kind), self.is_decoder
        if kind == "local":
            before, after = self.local_num_chunks_before, self.local_num_chunks_after
            return Local(chunk, causal, before, after, wraps=True)
        before, after = self.lsh_num_chunks_before, self.lsh_num_chunks_after
        return LSH(chunk, causal, before, after, self.buckets(length), self.num_hashes)

    def keys_seen(self, length: int) -> float:
        """Returns the number of keys that one of `length` tokens sees, as the mean over the
        layers."""
        seen = {"local": 1, "lsh": self.num_hashes}
        for kind in KINDS:
            sides = (getattr(self, f"{kind}_num_chunks_{side}") for side in ("before", "after"))
            chunk = self.chunk_length(kind)
            seen[kind] *= min((1 + sum(sides)) * chunk, length)
        return sum(seen[kind] for kind in self.attn_layers) / self.num_hidden_layers

    @property
    def lacks(self) -> tuple[str, ...]:
        """Parts of the paths of parameters that a model with these settings does not have."""
        axial = ("row_embeddings", "column_embeddings")
        without = ("position_embeddings",) if self.axial_pos_embds else axial
        return without + tuple(f"{kind}_layers" for kind in KINDS if kind not in self.kinds)

    def layers_of(self, path: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """As of other configs; the layers of each kind have a stack of their own."""
        numbers = [i for i, kind in enumerate(self.attn_layers) if f"{kind}_layers/" in path]
        return {(place,): (number,) for place, number in enumerate(numbers)}

    @classmethod
    def from_dict(cls: type[_Same], values: dict[str, Any]) -> _Same:
        """Makes a config from the fields of config.json; raises ValueError as other configs do, and
        if num_hidden_layers is not the number of attn_layers."""
        lists = ("attn_layers", "axial_pos_shape", "axial_pos_embds_dim", "num_buckets")
        values = {
            name: tuple(value) if name in lists and isinstance(value, list) else value
            for name, value in values.items()
        }
        count, layers = values.pop("num_hidden_layers", None), values.get("attn_layers", ())
        config = super().from_dict(values)
        require(
            count is None or count == config.num_hidden_layers,
            f"num_hidden_layers={count}, but attn_layers={short(layers)} lists "
            f"{config.num_hidden_layers} layers; leave num_hidden_layers out.",
        )
        return config

    def with_overrides(self: _Same, **overrides: Any) -> _Same:
        """Returns a copy as other configs do; raises ValueError as these, and for
        num_hidden_layers, which follows from attn_layers."""
        require(
            "num_hidden_layers" not in overrides,
            "num_hidden_layers cannot be set: it is the number of attn_layers; give attn_layers, "
            f"such as {list(KINDS)}.",
        )
        return super().with_overrides(**overrides)


DIALECT = Dialect(
    names={
        "intermediate_size": "feed_forward_size",
        "attention_probs_dropout_prob": "local_attention_probs_dropout_prob",
    },
    absent=ABSENT
    | {"add_cross_attention": False, "type_vocab_size": 0, "tie_word_embeddings": False},
    # Tied tables would have H columns, but heads read 2 H.
    refused={name: only for name, only in REFUSED.items() if name != "position_embedding_type"}
    | {"tie_word_embeddings": (False,)},
)
