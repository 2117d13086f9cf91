"""The configuration of Reformer, by transformers' names, and what its layers see of how many
tokens."""

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
    """Attributes follow Hugging Face's names and defaults; those that every model has are called as
    in other configs, and in config.json as there (`feed_forward_size`,
    `local_attention_probs_dropout_prob`).

    Attributes:
        attn_layers: "local" or "lsh" for each layer; num_hidden_layers is their number.
        axial_pos_shape: rows and columns that a text's positions are laid out in.
        num_buckets: None chooses by the number of tokens of a call (`buckets`), and stays None.
        hash_seed: the seed of every layer's rotations in every call; the numbers are JAX's.
        chunk_size_feed_forward, chunk_size_lm_head: tokens computed at a time, 0 for all; memory
            for time.
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
            f"attn_layers={short(layers)} must name the attention of each layer, 'local' or 'lsh', "
            f"of 1 to {MOST_LAYERS} layers.",
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
            "[64, 128], each of them hashed by itself; or null, to choose by the number of tokens.",
        )

    def _check_axes(self) -> None:
        shape, widths = self.axial_pos_shape, self.axial_pos_embds_dim
        require(
            len(shape) == len(widths) == 2 and min(*shape, *widths) >= 1,
            f"axial_pos_shape={list(shape)} and axial_pos_embds_dim={list(widths)} must have two "
            "positive numbers each, of rows and of columns.",
        )
        require(
            sum(widths) == self.hidden_size,
            f"axial_pos_embds_dim={list(widths)} adds up to {sum(widths)}, and must to hidden_size="
            f"{self.hidden_size}: a position is its row's and its column's vector side by side.",
        )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of attention that there are."""
        return tuple(kind for kind in KINDS if kind in self.attn_layers)

    @property
    def period(self) -> tuple[LayerKind, ...]:
        """The shortest beginning of the layers that the others repeat."""
        layers: Any = self.attn_layers
        sizes = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
        return next(layers[:n] for n in sizes if layers[:n] * (len(layers) // n) == layers)

    @property
    def attention(self) -> str:
        """The kind of attention, in a word."""
        return "lsh" if "lsh" in self.kinds else "local"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention_head_size

    @property
    def position_limit(self) -> tuple[str, int]:
        """What says how many rows of positions there are, and how many."""
        if not self.axial_pos_embds:
            return super().position_limit
        return "prod(axial_pos_shape)", math.prod(self.axial_pos_shape)

    def chunk_length(self, kind: LayerKind) -> int:
        """Tokens of a chunk of such layers."""
        return self.local_attn_chunk_length if kind == "local" else self.lsh_attn_chunk_length

    @property
    def chunk_multiple(self) -> int:
        """Whole chunks of every layer."""
        return math.lcm(*map(self.chunk_length, self.kinds))

    def needs_padding(self, length: int) -> int:
        """Tokens to add so that every layer has whole chunks; none to what the shortest holds."""
        short_enough = length <= min(map(self.chunk_length, self.kinds))
        return 0 if short_enough else -length % self.chunk_multiple

    @property
    def training_unit(self) -> int:
        """All axial positions, or whole chunks."""
        return self.position_limit[1] if self.axial_pos_embds else self.chunk_multiple

    def check_training_length(self, length: int) -> None:
        """Raises ValueError for a number of tokens that PyTorch's class does not train on either:
        dropout takes whole columns of axial positions, and chunks are whole."""
        if self.axial_pos_embds:
            rows, columns = self.axial_pos_shape
            require(
                length == rows * columns,
                f"{length} tokens while training, and axial_pos_shape={[rows, columns]} trains "
                f"rows of {rows} x {columns} = {rows * columns} tokens alone, whose columns are "
                "dropped as a whole: pad or cut every row to that length, or choose another "
                "axial_pos_shape.",
            )
        extra = self.needs_padding(length)
        require(
            not extra,
            f"{length} tokens while training are no whole chunks: the lengths that work are the "
            f"multiples of {self.chunk_multiple}, such as {length + extra}"
            + (", which axial_pos_shape must multiply to." if self.axial_pos_embds else "."),
        )

    def check_cache(self) -> None:
        """Raises ValueError where hashes that are kept would not do for a longer text."""
        require(
            self.num_buckets is not None or "lsh" not in self.kinds,
            "num_buckets=null with a cache: PyTorch's class fixes it by the first text that it "
            "hashes; give it, as config.buckets(number of tokens) says, or generate with "
            "use_cache=False, where every step has the number of its own length.",
        )

    def buckets(self, length: int) -> int | tuple[int, ...]:
        """How many buckets a round of hashing has for so many tokens, padding included: about two
        for each chunk, in two factors where they are many."""
        chunk = self.lsh_attn_chunk_length
        if self.num_buckets is not None or length <= chunk:  # where nothing is hashed
            return self.num_buckets or 2
        power = (2 * (length // chunk)).bit_length() - 1
        if 2**power <= 2 * max(math.isqrt(self.max_position_embeddings // chunk), chunk):
            return 2**power
        return 2 ** (power // 2), 2 ** (power - power // 2)

    def pattern(self, kind: LayerKind, length: int) -> Local | LSH:
        """What such layers see of so many tokens, padding included."""
        chunk, causal = self.chunk_length(kind), self.is_decoder
        if kind == "local":
            before, after = self.local_num_chunks_before, self.local_num_chunks_after
            return Local(chunk, causal, before, after, wraps=True)
        before, after = self.lsh_num_chunks_before, self.lsh_num_chunks_after
        return LSH(chunk, causal, before, after, self.buckets(length), self.num_hashes)

    def keys_seen(self, length: int) -> float:
        """By a token, in the mean of the layers."""
        seen = {"local": 1, "lsh": self.num_hashes}
        for kind in KINDS:
            sides = (getattr(self, f"{kind}_num_chunks_{side}") for side in ("before", "after"))
            chunk = self.chunk_length(kind)
            seen[kind] *= min((1 + sum(sides)) * chunk, length)
        return sum(seen[kind] for kind in self.attn_layers) / self.num_hidden_layers

    @property
    def lacks(self) -> tuple[str, ...]:
        """Parts of the paths of parameters that these settings leave out."""
        axial = ("row_embeddings", "column_embeddings")
        without = ("position_embeddings",) if self.axial_pos_embds else axial
        return without + tuple(f"{kind}_layers" for kind in KINDS if kind not in self.kinds)

    def layers_of(self, path: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The layers of one kind, which have a stack of their own."""
        numbers = [i for i, kind in enumerate(self.attn_layers) if f"{kind}_layers/" in path]
        return {(place,): (number,) for place, number in enumerate(numbers)}

    @classmethod
    def from_dict(cls: type[_Same], values: dict[str, Any]) -> _Same:
        """Reads config.json; raises ValueError as the others, and for a number of layers that is
        not that of attn_layers."""
        lists = ("attn_layers", "axial_pos_shape", "axial_pos_embds_dim", "num_buckets")
        values = {
            name: tuple(value) if name in lists and isinstance(value, list) else value
            for name, value in values.items()
        }
        count, layers = values.pop("num_hidden_layers", None), values.get("attn_layers", ())
        config = super().from_dict(values)
        require(
            count is None or count == config.num_hidden_layers,
            f"num_hidden_layers={count} is not the number of attn_layers={short(layers)}, which "
            f"has {config.num_hidden_layers}; leave it out.",
        )
        return config

    def with_overrides(self: _Same, **overrides: Any) -> _Same:
        """As of other configs; attn_layers says how many layers there are."""
        require(
            "num_hidden_layers" not in overrides,
            "num_hidden_layers is the number of attn_layers: give attn_layers, such as "
            f"{list(KINDS)}.",
        )
        return super().with_overrides(**overrides)


DIALECT = Dialect(
    names={
        "intermediate_size": "feed_forward_size",
        "attention_probs_dropout_prob": "local_attention_probs_dropout_prob",
    },
    absent=ABSENT
    | {"add_cross_attention": False, "type_vocab_size": 0, "tie_word_embeddings": False},
    # Tied tables have H columns, and heads read 2 H.
    refused={name: only for name, only in REFUSED.items() if name != "position_embedding_type"}
    | {"tie_word_embeddings": (False,)},
)
