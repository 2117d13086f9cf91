"""The settings of an attention call: the pattern, static and hashable, and the values of one run.

Axes: N heads, H head width.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from lsg_flax.checks import Range, check_fields, require, whole
from lsg_flax.kernels import Implementation, pad
from lsg_flax.patterns import halo
from lsg_flax.patterns.config import LSGConfig
from lsg_flax.patterns.rotary import Rotary

_WINDOWS = Range(0, 2**10, "must be a number of windows, 0 or more, at most 1,024")
_LOCAL_RANGES = {
    "window_size": whole(1, 2**20),
    "look_backward": _WINDOWS,
    "look_forward": _WINDOWS,
}
_LSH_RANGES = {
    "chunk_length": whole(1, 2**20),
    "chunks_before": _WINDOWS,
    "chunks_after": _WINDOWS,
    "num_hashes": whole(1, 100),
}
GlobalTokens = Literal["prepended", "first_token", "none"]


@dataclass(frozen=True)
class Full:
    """Full attention: every query sees every key, or, if causal, those up to its own position (see
    `lsg_flax.full_attention`)."""

    causal: bool = False


@dataclass(frozen=True)
class LSG:
    """LSG attention: local blocks, sparse representatives, globals (see `lsg_flax.lsg_attention`).

    Attributes:
        texts: number of copies of the prepended globals, one for each text of a row.
        filler: number of masked positions after the prepended globals, which come after the tokens.
    """

    config: LSGConfig
    causal: bool = False
    global_tokens: GlobalTokens = "prepended"
    texts: int = 1
    filler: int = 0

    @property
    def split(self) -> int:
        """The number of prepended globals."""
        if self.global_tokens != "prepended":
            return 0
        return self.config.num_global_tokens * self.texts

    @property
    def behind(self) -> int:
        """The number of positions after the tokens."""
        return self.split + self.filler

    @property
    def full_rows(self) -> int:
        """How many positions at the start attend to everything, in the bidirectional pattern."""
        if self.split:
            return self.split
        # The reference's bos_pooling gives token 0 the full row that it computed for the weights,
        # with or without globals.
        config = self.config
        forced = config.strict_reference and config.is_sparse
        forced &= config.sparsity_type == "bos_pooling"
        return int(self.global_tokens == "first_token" or forced)

    def needs_padding(self, length: int, shards: int = 1) -> int:
        """See `LSGConfig.needs_padding`."""
        return self.config.needs_padding(length, shards)


@dataclass(frozen=True)
class Local:
    """Local attention to the own window and the neighbouring ones. For the other attributes see
    `lsg_flax.local_attention`, which has the same names.

    Attributes:
        wraps: whether windows form a ring, as in Reformer: the window before the first is the last,
            and tokens of up to one window all see each other. `causal` compares positions, so no
            token sees a later one through the ring either.

    Raises:
        ValueError: for sizes out of range, a causal pattern that looks forward, and a ring with
            rotary positions, exact windows or a shared query and key.
    """

    window_size: int
    causal: bool = False
    look_backward: int = 1
    look_forward: int = 1
    exact_windowsize: bool = False
    shared_qk: bool = False
    scale: float | None = None
    rotary: Rotary | None = None
    wraps: bool = False

    def __post_init__(self):
        check_fields(self, _LOCAL_RANGES)
        require(
            not self.wraps or not (self.rotary or self.exact_windowsize or self.shared_qk),
            "wraps=True is Reformer's local attention, which has no rotary positions, "
            "exact_windowsize or shared_qk; leave these out.",
        )
        require(
            self.wraps or not (self.causal and self.look_forward),
            f"look_forward={self.look_forward} with causal=True: a causal window sees no later "
            "window; leave look_forward out.",
        )

    @property
    def windows_seen(self) -> int:
        """The number of windows that a token sees, its own included."""
        return self.look_backward + 1 + self.look_forward

    @property
    def split(self) -> int:
        """The number of prepended globals: none."""
        return 0

    def needs_padding(self, length: int, shards: int = 1) -> int:
        """Returns how many padding tokens to add to `length` tokens so that each of `shards`
        devices has whole windows, at least as many as its neighbours see."""
        least = max(1, self.look_backward, self.look_forward) if shards > 1 else 1
        windows = max(-(-length // (self.window_size * shards)), least)
        return windows * self.window_size * shards - length


@dataclass(frozen=True)
class LSH:
    """LSH attention of Reformer (arXiv 2001.04451, section 2; transformers' LSHSelfAttention):
    queries, which are also the keys, are hashed into buckets and sorted by bucket; each sees its
    own chunk of this order and the neighbouring chunks.

    Attributes:
        chunk_length: tokens per chunk. Up to one chunk every token sees all others.
        causal: whether a token sees no later token.
        chunks_before, chunks_after: how many chunks before and after its own a token sees. The
            chunks of all hashing rounds form one ring.
        num_buckets: number of buckets per round; or its factors, each hashed on its own.
        num_hashes: number of hashing rounds, whose attention is merged.

    Raises:
        ValueError: for sizes out of range, and numbers of buckets that are not even.
    """

    chunk_length: int
    causal: bool = False
    chunks_before: int = 1
    chunks_after: int = 0
    num_buckets: int | tuple[int, ...] = 2
    num_hashes: int = 1

    def __post_init__(self):
        check_fields(self, _LSH_RANGES)
        factors = self.bucket_factors
        require(
            bool(factors) and all(2 <= n <= 2**20 and n % 2 == 0 for n in factors),
            f"num_buckets={self.num_buckets} must be an even number from 2 to 1,048,576, or a list "
            "of such factors: half of the buckets are the opposites of the other half.",
        )

    @property
    def bucket_factors(self) -> tuple[int, ...]:
        """The factors of the number of buckets, each hashed on its own."""
        given = self.num_buckets
        return (given,) if isinstance(given, int) else given

    @property
    def all_buckets(self) -> int:
        """The number of buckets per round; the bucket of padding is one more."""
        return math.prod(self.bucket_factors)

    def rotations_shape(self, heads: int, width: int) -> tuple[int, int, int, int]:
        """The shape of a layer's rotations: [heads, head width, hashes, rotations // 2]."""
        return heads, width, self.num_hashes, sum(self.bucket_factors) // 2


Pattern = Full | LSG | Local | LSH


def pattern_of(
    lsg: LSGConfig | None,
    *,
    causal: bool,
    global_tokens: GlobalTokens = "prepended",
    texts: int = 1,
    filler: int = 0,
) -> Pattern:
    """Returns the pattern of a config, for `texts` and `filler` see `LSG`; full attention if `lsg`
    is None."""
    return Full(causal) if lsg is None else LSG(lsg, causal, global_tokens, texts, filler)


def with_globals_behind(pattern: LSG, x: Shaped[Array, "*A _"]) -> Shaped[Array, "*A _"]:
    """Moves the globals from the front to after the tokens, as the pattern takes arrays, and adds
    `filler` zeros (False) at the end."""
    split = pattern.split
    return pad(jnp.concatenate([x[..., split:], x[..., :split]], axis=-1), 0, pattern.filler)


@dataclass(frozen=True)
class Runtime:
    """The values of one run of attention, beside its pattern.

    Attributes:
        dropout_rate, dropout_key: probability of dropping an attention weight, and the random key.
        lsh: what "lsh" and LSH attention hash with: a random key of the rotations, or the rotations
            (for LSH attention one array of `LSH.rotations_shape`); None for a fixed seed.
        implementation: of attention, see `lsg_flax.lsg_attention`; None for the fastest.
        blocks_per_step: query blocks computed at once; affects speed, not numerics.
        sequence_axis: inside `jax.shard_map`, the mesh axis that tokens are sharded over. The
            arrays are then those of one shard: the prepended globals, the same on each shard, and
            whole blocks of tokens, at least as many as `LSGConfig.needs_padding` requires. Shards
            exchange their edges and sum what the globals see; nothing else is communicated. Full
            attention is to keys that every shard has.
        own_lengths: for attention in a ring, the number of tokens of each row, whole chunks: the
            ring of the row ends there, as if no padding followed.
        buckets: the buckets of whole chunks from an earlier pass; LSH attention then does not hash.

    Raises:
        ValueError: for blocks_per_step below 1, a dropout_rate outside [0, 1), and a rate without a
            key.
    """

    dropout_rate: float = 0.0
    dropout_key: PRNGKeyArray | None = None
    lsh: PRNGKeyArray | tuple[Float[Array, "N H *_"], ...] | None = None
    implementation: Implementation | None = None
    blocks_per_step: int | None = None
    sequence_axis: str | None = None
    buckets: Int[Array, "B N _ T"] | None = None
    own_lengths: Int[Array, "B"] | None = None

    def __post_init__(self):
        blocks, rate = self.blocks_per_step, self.dropout_rate
        require(
            blocks is None or blocks >= 1,
            f"blocks_per_step={blocks} must be at least 1, or None.",
        )
        require(0.0 <= rate < 1.0, f"dropout_rate={rate} must be in [0, 1).")
        require(
            not rate or self.dropout_key is not None, f"dropout_rate={rate} needs a dropout_key."
        )

    def on_shard(self) -> "Runtime":
        """Returns a copy with a dropout key that differs for each shard."""
        return replace(self, dropout_key=halo.shard_key(self.dropout_key, self.sequence_axis))

    def with_other_dropout(self) -> "Runtime":
        """Returns a copy with an independent dropout key."""
        key = self.dropout_key
        return self if key is None else replace(self, dropout_key=jax.random.fold_in(key, 1))
