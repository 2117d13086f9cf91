"""The representatives of LSG attention as a source of keys: calls the selections of `sparsity.py`,
which see one head with tokens first, for arrays in the layout of the kernels.

Axes: B batch, N heads, H head width, T tokens (whole blocks, no globals).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lsg_flax.kernels import Source, pad
from lsg_flax.patterns import halo, segments, sparsity
from lsg_flax.patterns.config import LSGConfig
from lsg_flax.patterns.pattern import LSG, Runtime

DEFAULT_LSH_SEED = 0


def pad_to_blocks(
    config: LSGConfig, query: Float[Array, "B N H _"], source: Source
) -> tuple[Float[Array, "B N H T"], Source]:
    """Pads queries and keys with zeros (False) at the end to whole blocks."""
    extra = config.needs_padding(query.shape[-1])
    return jax.tree.map(lambda x: pad(x, 0, extra), (query, source))


def right_offset(config: LSGConfig) -> int:
    """The number of the first representative in the right-hand window of block 0. With one per
    block lsg_converter's `LSGAttentionProduct.reshape_to_sparse_block` starts at the block itself.
    """
    return 2 * config.sparse_step if config.sparse_step > 1 else 0


def representatives_of(
    pattern: LSG, query: Float[Array, "B N H T"], source: Source, run: Runtime
) -> Source:
    """Returns the representatives of a shard's tokens (`get_sparse_tokens_with_...` of
    lsg_converter's LSGSelfAttention)."""
    config, blocks = pattern.config, None
    if source.segments is None:
        bos_query = first_query(config, query, source.mask, run.sequence_axis)
    else:
        blocks = segments.of_blocks(source.segments, config.block_size)
        bos_query = segments.first_queries(config, query, blocks)
    chosen = choose(config, hide_global(pattern, source, run), bos_query, run, source.mask)
    standalone_pooling = config.sparsity_type == "pooling" and not pattern.split
    if config.strict_reference and standalone_pooling and config.sparsity_factor > 1:
        # The standalone layers' mean of masks overflows, which unmasks groups of padding.
        chosen = chosen._replace(mask=jnp.ones_like(chosen.mask))
    if blocks is not None:
        chosen = chosen._replace(segments=segments.of_representatives(config, blocks))
    return chosen


def hide_global(pattern: LSG, source: Source, run: Runtime) -> Source:
    """Masks the first token if it is a global, so that it is not seen twice."""
    if pattern.global_tokens != "first_token":
        return source
    first = (jnp.arange(source.mask.shape[-1]) == 0) & halo.is_first(run.sequence_axis)
    return source._replace(mask=source.mask & ~first[None, None])


def first_query(
    config: LSGConfig,
    query: Float[Array, "B N H T"],
    mask: Bool[Array, "B 1 T"],
    axis: str | None = None,
) -> Float[Array, "B N H"]:
    """Returns the query whose scores are the weights of "bos_pooling": that of the first real
    token, so that left padding does not leak. The reference takes that of position 0, which counts
    as real under mask_first_token."""
    if config.strict_reference or config.mask_first_token:
        return halo.share_first(query[..., 0], axis)
    # A masked sum instead of indexing, whose gradient would be a scatter.
    first = jnp.argmax(mask, axis=-1)[..., None, None]  # [B, 1, 1, 1]
    is_first = jnp.arange(query.shape[-1])[None, None, None] == first  # [B, 1, 1, T]
    chosen = jnp.where(is_first, query, 0).sum(axis=-1).astype(query.dtype)
    return halo.share_first_with(chosen, mask.any(axis=(1, 2)), axis)


def choose(
    config: LSGConfig,
    source: Source,
    bos_query: Float[Array, "B N H *blocks"],
    run: Runtime,
    bos_mask: Bool[Array, "B 1 T"] | None = None,
) -> Source:
    """Calls `sparsity.select` for arrays with features first."""
    key, value, mask = sparsity.select(
        source.key.swapaxes(2, 3),
        source.value.swapaxes(2, 3),
        source.mask[:, 0],
        config=config,
        bos_query=jnp.moveaxis(bos_query, 2, -1),
        bos_mask=None if bos_mask is None else bos_mask[:, 0],
        rotations=_rotations(config, source.key.shape, run),
    )
    return Source(key.swapaxes(2, 3), value.swapaxes(2, 3), mask)


def _rotations(config: LSGConfig, shape: tuple[int, ...], run: Runtime):
    """The rotations that "lsh" hashes with; None for other types."""
    if not config.is_sparse or sparsity.effective_type(config) != "lsh":
        return None
    if isinstance(run.lsh, tuple):
        return run.lsh
    key = jax.random.key(DEFAULT_LSH_SEED) if run.lsh is None else run.lsh
    return sparsity.lsh_rotations(key, config, num_heads=shape[1], head_dim=shape[2])
