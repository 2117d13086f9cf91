"""What there is to say of an attention call: the pattern, static and hashable, and what a run
brings.

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
    """Every query sees every key; of its own place and earlier ones, if causal."""

    causal: bool = False


@dataclass(frozen=True)
class LSG:
    """Local blocks, sparse representatives, globals (see `lsg_flax.lsg_attention`).

    Attributes:
        texts: how many copies of prepended globals there are, one for each text of a row.
        filler: masked places behind the prepended globals, which lie behind the tokens in turn.
    """

    config: LSGConfig
    causal: bool = False
    global_tokens: GlobalTokens = "prepended"
    texts: int = 1
    filler: int = 0

    @property
    def split(self) -> int:
        """Prepended globals."""
        if self.global_tokens != "prepended":
            return 0
        return self.config.num_global_tokens * self.texts

    @property
    def behind(self) -> int:
        """Places behind the tokens."""
        return self.split + self.filler

    @property
    def full_rows(self) -> int:
        """How many first positions attend to everything, in the bidirectional pattern."""
        if self.split:
            return self.split
        # The reference's bos_pooling gives token 0 the full row that it computed for the weights,
        # whether globals are wanted or not.
        config = self.config
        forced = config.strict_reference and config.is_sparse
        forced &= config.sparsity_type == "bos_pooling"
        return int(self.global_tokens == "first_token" or forced)

    def needs_padding(self, length: int, shards: int = 1) -> int:
        """See `LSGConfig.needs_padding`."""
        return self.config.needs_padding(length, shards)


@dataclass(frozen=True)
class Local:
    """Own window and neighbouring ones (see `lsg_flax.local_attention`, which has these names).

    Attributes:
        wraps: as in Reformer, windows lie in a ring: one before the first is the last, and of up to
            one window all see each other. `causal` goes by places, so that no token sees a later
            one through the ring either.
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
            f"look_forward={self.look_forward} with causal=True: a causal window sees none behind "
            "it; leave look_forward out.",
        )

    @property
    def windows_seen(self) -> int:
        return self.look_backward + 1 + self.look_forward

    @property
    def split(self) -> int:
        return 0

    def needs_padding(self, length: int, shards: int = 1) -> int:
        """Tokens to add so that every shard has whole windows, as many as neighbours look at."""
        least = max(1, self.look_backward, self.look_forward) if shards > 1 else 1
        windows = max(-(-length // (self.window_size * shards)), least)
        return windows * self.window_size * shards - length


@dataclass(frozen=True)
class LSH:
    """Reformer's attention of similar tokens: queries, which are the keys too, are hashed into
    buckets, and sorted by these; each sees its own chunk of the order and neighbouring ones.

    Attributes:
        chunk_length: tokens of a chunk. Up to one chunk every token sees all others.
        causal: no token sees a later one.
        chunks_before, chunks_after: how many chunks around its own a token sees. Chunks of all
            rounds of hashing lie in one ring.
        num_buckets: of a round; or in factors, each hashed by itself.
        num_hashes: rounds, whose attention is merged.
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
        given = self.num_buckets
        return (given,) if isinstance(given, int) else given

    @property
    def all_buckets(self) -> int:
        """Of a round; padding's is one more."""
        return math.prod(self.bucket_factors)

    def rotations_shape(self, heads: int, width: int) -> tuple[int, int, int, int]:
        """Of what a layer hashes with: [heads, head width, hashes, rotations // 2]."""
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
    """The pattern of a config, full attention without one."""
    return Full(causal) if lsg is None else LSG(lsg, causal, global_tokens, texts, filler)


def with_globals_behind(pattern: LSG, x: Shaped[Array, "*A _"]) -> Shaped[Array, "*A _"]:
    """Arrays as the pattern takes them, of ones that begin with the globals: these behind the
    tokens, and behind them zeros (False)."""
    split = pattern.split
    return pad(jnp.concatenate([x[..., split:], x[..., :split]], axis=-1), 0, pattern.filler)


@dataclass(frozen=True)
class Runtime:
    """What a run brings to a pattern.

    Attributes:
        dropout_rate, dropout_key: of attention weights, how likely one is dropped.
        lsh: what "lsh" and LSH attention hash with: a key to draw rotations from, or the rotations
            (LSH attention's are one array, `LSH.rotations_shape`); None for a fixed seed.
        implementation: of the kernel; None for the fastest.
        blocks_per_step: query blocks computed at once; affects speed, not numerics.
        sequence_axis: inside `jax.shard_map`, the mesh axis that tokens are spread over. The arrays
            are then this shard's: the prepended globals, the same in each, and whole blocks of
            tokens, at least as many as `LSGConfig.needs_padding` asks for. Shards exchange their
            edges and add up what the globals see; nothing else moves. Full attention is to keys
            that every shard has.
        own_lengths: attention in a ring of each row as if it had so many tokens, whole chunks, and
            no padding behind these: the ring of its chunks ends there.
        buckets: of whole chunks, that an earlier pass hashed into: LSH attention hashes no more.
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
        require(0.0 <= rate < 1.0, f"dropout_rate={rate} must lie in [0, 1).")
        require(
            not rate or self.dropout_key is not None, f"dropout_rate={rate} needs a dropout_key."
        )

    def on_shard(self) -> "Runtime":
        """The same with a dropout key of the shard's own."""
        return replace(self, dropout_key=halo.shard_key(self.dropout_key, self.sequence_axis))

    def with_other_dropout(self) -> "Runtime":
        """The same with an independent dropout key."""
        key = self.dropout_key
        return self if key is None else replace(self, dropout_key=jax.random.fold_in(key, 1))
