"""What there is to say of an attention call: the pattern, static and hashable, and what a run
brings.

Axes: N heads, H head width.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from lsg_flax.checks import require
from lsg_flax.kernels import Implementation
from lsg_flax.patterns import halo
from lsg_flax.patterns.config import LSGConfig

GlobalTokens = Literal["prepended", "first_token", "none"]


@dataclass(frozen=True)
class Full:
    """Every query sees every key; of its own place and earlier ones, if causal."""

    causal: bool = False


@dataclass(frozen=True)
class LSG:
    """Local blocks, sparse representatives, globals (see `lsg_flax.lsg_attention`)."""

    config: LSGConfig
    causal: bool = False
    global_tokens: GlobalTokens = "prepended"

    @property
    def split(self) -> int:
        """Globals in front of the tokens."""
        return self.config.num_global_tokens if self.global_tokens == "prepended" else 0

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


Pattern = Full | LSG


def pattern_of(
    lsg: LSGConfig | None, *, causal: bool, global_tokens: GlobalTokens = "prepended"
) -> Pattern:
    """The pattern of a config, full attention without one."""
    return Full(causal) if lsg is None else LSG(lsg, causal, global_tokens)


@dataclass(frozen=True)
class Runtime:
    """What a run brings to a pattern.

    Attributes:
        dropout_rate, dropout_key: of attention weights, how likely one is dropped.
        lsh: what "lsh" hashes with: a key to draw rotations from, or the rotations; None for a
            fixed seed.
        implementation: of the kernel; None for the fastest.
        blocks_per_step: query blocks computed at once; affects speed, not numerics.
        sequence_axis: inside `jax.shard_map`, the mesh axis that tokens are spread over. The arrays
            are then this shard's: the prepended globals, the same in each, and whole blocks of
            tokens, at least as many as `LSGConfig.needs_padding` asks for. Shards exchange their
            edges and add up what the globals see; nothing else moves. Full attention is to keys
            that every shard has.
    """

    dropout_rate: float = 0.0
    dropout_key: PRNGKeyArray | None = None
    lsh: PRNGKeyArray | tuple[Float[Array, "N H _"], ...] | None = None
    implementation: Implementation | None = None
    blocks_per_step: int | None = None
    sequence_axis: str | None = None

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
