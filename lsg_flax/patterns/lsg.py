"""LSG attention of arrays with features first, [B, N, H, T], on one device or on a shard.

Axes: B batch, T tokens, N heads, H head width, S keys, R sparse representatives.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lsg_flax.kernels import Source, Spec, Window, attend, attend_in_part, pad
from lsg_flax.patterns import halo, sparsity
from lsg_flax.patterns.config import LSGConfig

GlobalTokens = Literal["prepended", "first_token", "none"]


DEFAULT_LSH_SEED = 0


FULL_ATTENTION_BLOCK = (
    256  # queries per block of full attention: affects speed and memory, not numerics
)


def attend_features_first(
    query: Float[Array, "B N H T"],
    key: Float[Array, "B N H S"],
    value: Float[Array, "B N H S"],
    mask: Bool[Array, "B S"],
    *,
    config: LSGConfig | None,
    causal: bool = False,
    global_tokens: GlobalTokens = "prepended",
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    lsh_key: PRNGKeyArray | None = None,
    lsh_rotations: tuple[Float[Array, "N H _"], ...] | None = None,
    blocks_per_step: int | None = None,
    sequence_axis: str | None = None,
) -> Float[Array, "B N H T"]:
    """`lsg_attention`, or without a config `full_attention`, on the layout they compute in.

    A model that projects straight to [B, N, H, T] saves the transposes, which are slow on CPU.
    Shapes are not checked here.

    Args:
        sequence_axis: inside `jax.shard_map`, the mesh axis that tokens are spread over. The arrays
            are this shard's: the prepended globals, the same in each, and whole blocks of tokens,
            at least as many as `config.needs_padding` asks for. Shards exchange their edges and
            add up what the globals see; nothing else moves.
    """
    if blocks_per_step is not None and blocks_per_step < 1:
        raise ValueError(f"blocks_per_step={blocks_per_step} must be at least 1, or None.")
    dropout = Dropout.checked(dropout_rate, dropout_key)
    everything = Source(key, value, mask[:, None])
    if config is None:
        return attend_to_all(query, everything, dropout, causal=causal)
    axis, dropout = sequence_axis, dropout.of_shard(sequence_axis)
    split = config.num_global_tokens if global_tokens == "prepended" else 0
    short = axis is None and query.shape[-1] - split <= 2 * config.block_size
    if short:
        context = attend_to_all(query, everything, dropout, causal=causal)
    else:
        tokens = Tokens(*(x[..., split:] for x in (query, key, value, mask)))
        shared = Source(*(x[..., : split or 1] for x in everything))
        if not split:  # the globals are in the first shard, if anywhere
            shared = Source(*(halo.of_first(x, axis) for x in shared))
        rotations = rotations_of(config, query, lsh_key, lsh_rotations)
        context = _block_rows(
            tokens, shared, config, causal, global_tokens, rotations, blocks_per_step, dropout, axis
        )
    if causal:  # as in the reference, the outputs of prepended globals are their raw queries
        of_tokens = context[..., split:] if short else context
        return jnp.concatenate([query[..., :split], of_tokens], axis=-1) if split else context
    rows = 0 if short else full_rows(config, global_tokens)
    if rows:
        first = _full_over_shards(query[..., :rows], everything, split, dropout.other(), axis)
        if not split:
            first = jnp.where(halo.is_first(axis), first, context[..., :rows])
        context = jnp.concatenate([first, context[..., rows - split :]], axis=-1)
    return context


def _full_over_shards(query, source: Source, split: int, dropout: "Dropout", axis: str | None):
    """Full attention of the globals: the `split` prepended ones, or the first token."""
    if axis is None:
        return attend_to_all(query, source, dropout)
    if split:  # every shard has them: they are keys once
        is_key = (jnp.arange(source.mask.shape[-1]) >= split) | halo.is_first(axis)
        source = source._replace(mask=source.mask & is_key[None, None])
    first = query if split else halo.of_first(query, axis)
    spec = _full_spec(first, dropout)
    parts = attend_in_part(_scaled(first), (), source, spec, dropout.key)
    return halo.combined(*parts, axis)


def attend_to_all(query, source: Source, dropout: "Dropout", *, causal: bool = False):
    """Attention of every query to every key, in memory linear in their number."""
    spec = _full_spec(query, dropout, causal=causal)
    return attend(_scaled(query), (), source, spec, dropout.key)


def _full_spec(query, dropout: "Dropout", *, causal: bool = False) -> Spec:
    block = min(query.shape[-1], FULL_ATTENTION_BLOCK)
    return Spec(block, shared_causal=causal, dropout_rate=dropout.rate)


class Dropout(NamedTuple):
    """Dropout of attention weights: how likely one is dropped, and the key; none without a rate."""

    rate: float
    key: PRNGKeyArray | None

    @classmethod
    def checked(cls, rate: float, key: PRNGKeyArray | None) -> "Dropout":
        """Raises ValueError for a rate outside [0, 1), or one without a key."""
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout_rate={rate} must lie in [0, 1).")
        if rate and key is None:
            raise ValueError(f"dropout_rate={rate} needs a dropout_key.")
        return cls(rate, key if rate else None)

    def of_shard(self, axis: str | None) -> "Dropout":
        """The same rate with a key of the shard's own."""
        return self._replace(key=halo.folded(self.key, axis))

    def other(self) -> "Dropout":
        """The same rate with an independent key."""
        return self if self.key is None else self._replace(key=jax.random.fold_in(self.key, 1))


class Tokens(NamedTuple):
    """The part of the inputs that is cut into blocks, features first."""

    query: Float[Array, "B N H T"]
    key: Float[Array, "B N H T"]
    value: Float[Array, "B N H T"]
    mask: Bool[Array, "B T"]


def rotations_of(config: LSGConfig, query, key: PRNGKeyArray | None, rotations=None):
    """What "lsh" hashes with: the rotations given, or those of a key, or of a fixed seed; None for
    other types. `query` is [B, N, H, T]."""
    if not config.is_sparse or sparsity.effective_type(config) != "lsh" or rotations is not None:
        return rotations
    key = jax.random.key(DEFAULT_LSH_SEED) if key is None else key
    return sparsity.lsh_rotations(key, config, num_heads=query.shape[1], head_dim=query.shape[2])


def full_rows(config: LSGConfig, global_tokens: GlobalTokens) -> int:
    """How many first positions attend to everything, in the bidirectional pattern."""
    if global_tokens == "prepended":
        return config.num_global_tokens
    # The reference's bos_pooling gives token 0 the full row that it computed for the weights,
    # whether globals are wanted or not.
    forced = config.strict_reference and config.is_sparse
    return int(global_tokens == "first_token" or (forced and config.sparsity_type == "bos_pooling"))


def pad_to_blocks(tokens: Tokens, config: LSGConfig) -> Tokens:
    """The tokens with zeros (False) behind them up to a whole block."""
    extra = config.needs_padding(tokens.query.shape[-1])
    return Tokens(*(pad(x, 0, extra) for x in tokens))


def right_offset(config: LSGConfig) -> int:
    """First representative of block 0's right-hand window. At one representative per block the
    reference starts at the block itself."""
    return 2 * config.sparse_step if config.sparse_step > 1 else 0


def representatives_of(
    tokens: Tokens,
    config: LSGConfig,
    global_tokens: GlobalTokens,
    rotations,
    axis: str | None = None,
):
    """Of whole blocks of tokens: keys and values [B, N, H, R], mask [B, N, R]."""
    mask = tokens.mask
    if global_tokens == "first_token":
        mask = mask & ~_is_first_token(mask, axis)
    key, value, chosen = sparsity.select(
        tokens.key.swapaxes(2, 3),
        tokens.value.swapaxes(2, 3),
        mask,
        config=config,
        bos_query=first_query(tokens.query, tokens.mask, config, axis),
        bos_mask=tokens.mask,
        rotations=rotations,
    )
    standalone_pooling = config.sparsity_type == "pooling" and global_tokens != "prepended"
    if config.strict_reference and standalone_pooling and config.sparsity_factor > 1:
        # The standalone layers' mean of masks overflows, which unmasks groups of padding.
        chosen = jnp.ones_like(chosen)
    return key.swapaxes(2, 3), value.swapaxes(2, 3), chosen


def _is_first_token(mask: Bool[Array, "B T"], axis: str | None) -> Bool[Array, "1 T"]:
    return (jnp.arange(mask.shape[1])[None] == 0) & halo.is_first(axis)


def first_query(
    query: Float[Array, "B N H T"],
    mask: Bool[Array, "B T"],
    config: LSGConfig,
    axis: str | None = None,
) -> Float[Array, "B N H"]:
    """The query that "bos_pooling" weighs with: of the first real token, so that left padding does
    not leak. The reference's is that of position 0, which counts as real under mask_first_token."""
    if config.strict_reference or config.mask_first_token:
        return halo.of_first(query[..., 0], axis)
    first = jnp.argmax(mask, axis=1)[:, None, None, None]  # [B, 1, 1, 1]
    chosen = jnp.take_along_axis(query, first, axis=-1)[..., 0]
    return halo.of_first_true(chosen, mask.any(axis=1), axis)


def _block_rows(
    tokens: Tokens,
    shared: Source,
    config: LSGConfig,
    causal: bool,
    global_tokens: GlobalTokens,
    rotations,
    blocks_per_step: int | None,
    dropout: Dropout,
    axis: str | None,
) -> Float[Array, "B N H T"]:
    """Context of the tokens in blocks."""
    block, wide, length = config.block_size, config.sparse_block_size, tokens.query.shape[-1]
    tokens = pad_to_blocks(tokens, config)
    mask = tokens.mask
    if global_tokens == "first_token":
        mask = mask & ~_is_first_token(mask, axis)  # seen once, as the global
    local = Source(tokens.key, tokens.value, mask[:, None])
    sources = [_extended(local, block, causal, axis)]
    windows = [Window(0, 0, block, (2 if causal else 3) * block, causal=causal)]
    if config.is_sparse:
        step, halo_size = config.sparse_step, config.sparse_halo
        chosen = Source(*representatives_of(tokens, config, global_tokens, rotations, axis))
        sources.append(_extended(chosen, halo_size, causal, axis))
        windows.append(Window(1, 0, step, wide))
        if not causal:
            windows.append(Window(1, halo_size + right_offset(config), step, wide))
    spec = Spec(block, tuple(windows), False, blocks_per_step or 0, dropout.rate)
    globals_ = None if global_tokens == "none" else shared
    context = attend(_scaled(tokens.query), tuple(sources), globals_, spec, dropout.key)
    return context[..., :length]


def _extended(source: Source, size: int, causal: bool, axis: str | None) -> Source:
    """A source between the `size` keys in front of it and, if they may be seen, those behind."""
    after = 0 if causal else size
    return Source(*(halo.extended(x, size, after, axis) for x in source))


def _scaled(query: Float[Array, "B N H T"]) -> Float[Array, "B N H T"]:
    return query * query.shape[2] ** -0.5
