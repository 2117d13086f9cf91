"""LSG attention for several texts packed into one row, each starting at the start of a block:
computes which text each block and representative belongs to.

Segments number the texts of a row from 1; padding has 0.

Axes: B batch, N heads, H head width, T tokens (whole blocks, no globals).
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsg_flax.checks import require
from lsg_flax.patterns.config import LSGConfig

HIDDEN = -1  # the segment of representatives that no query sees


def check_packing(config: LSGConfig) -> None:
    """Raises ValueError for a pattern that cannot keep the texts of a row apart."""
    require(
        not config.strict_reference,
        "strict_reference=True reproduces numbers that depend on the padding after a text, but "
        "with several texts in one row (segment_ids) other texts follow there; set it to False, or "
        "give each text its own row.",
    )
    chunk, kind = config.selection_chunk, config.sparsity_type
    in_chunks = config.is_sparse and config.sparsity_factor > 1 and kind in ("norm", "lsh")
    require(
        not in_chunks or config.block_size % chunk == 0,
        f"sparsity_type={kind!r} picks from chunks of sparse_block_size={chunk} tokens, but "
        f"block_size={config.block_size} is not a multiple of that, so chunks would reach from one "
        "text of a row (segment_ids) into the next; choose a sparse_block_size that divides "
        "block_size, or give each text its own row.",
    )


def of_blocks(segments: Int[Array, "B 1 T"], size: int) -> Int[Array, "B 1 blocks"]:
    """Returns the text of each block; after the text's last token a block may have padding."""
    return segments.reshape(*segments.shape[:2], -1, size).max(axis=-1)


def of_representatives(config: LSGConfig, blocks: Int[Array, "B 1 blocks"]):
    """Returns the text of each representative, [B, 1, R]; HIDDEN for a text of up to two blocks,
    which in a row of its own would have full attention without representatives."""
    together = blocks[..., None] == blocks[..., None, :]  # [B, 1, blocks, blocks]
    sparse = together.sum(axis=-1) > 2
    return jnp.repeat(jnp.where(sparse, blocks, HIDDEN), config.sparse_step, axis=-1)


def first_queries(
    config: LSGConfig, query: Float[Array, "B N H T"], blocks: Int[Array, "B 1 blocks"]
) -> Float[Array, "B N H blocks"]:
    """Returns for each block the query of its text's first token."""
    together = blocks[..., None] == blocks[..., None, :]
    begins = jnp.argmax(together, axis=-1)[:, :, None]  # [B, 1, 1, blocks], the text's first block
    return jnp.take_along_axis(query[..., :: config.block_size], begins, axis=-1)


def with_globals(tokens: Int[Array, "B T"], texts: int, each: int) -> Int[Array, "B _"]:
    """Returns the segments of `each` globals for each of `texts` texts, followed by those of the
    tokens."""
    globals_ = jnp.repeat(jnp.arange(1, texts + 1, dtype=tokens.dtype), each)[None]
    globals_ = jnp.broadcast_to(globals_, (tokens.shape[0], texts * each))
    return jnp.concatenate([globals_, tokens], axis=1)


def are_texts(ids: Any, number: int, block: int) -> Any:
    """Returns which rows of a NumPy or JAX array are valid segments: at most `number` texts,
    numbered in rising order from 1, the tokens of each contiguous and starting at a multiple of
    `block` tokens."""
    numbers: Any = np if isinstance(ids, np.ndarray) else jnp
    before = numbers.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    highest = (
        np.maximum.accumulate(before, axis=1)
        if isinstance(ids, np.ndarray)
        else jax.lax.cummax(before, axis=1)
    )
    begins, at_block = (ids != 0) & (ids != before), np.arange(ids.shape[1])[None] % block == 0
    fits = (ids >= 0) & (ids <= number) & ((ids == 0) | (ids >= highest))
    return (fits & (~begins | (at_block & (ids > highest)))).all(axis=1)


def only_of_texts(
    context: Float[Array, "B *T"], segments: Int[Array, "B _"] | None, block: int
) -> Float[Array, "B *T"]:
    """Returns the context; under jit, where segments cannot be read, NaN for rows with invalid
    segments (see `are_texts`, also for `block`).

    Raises:
        ValueError: for invalid segments outside jit.
    """
    if segments is None:
        return context
    if isinstance(segments, jax.core.Tracer):
        right = are_texts(segments, segments.shape[1], block)
        return jnp.where(right.reshape(-1, *[1] * (context.ndim - 1)), context, jnp.nan)
    right = are_texts(np.asarray(segments), segments.shape[1], block)
    require(
        bool(right.all()),
        f"segment_ids of row {int(np.argmin(right))} are invalid: they must rise from 1, the "
        "tokens of each text must be contiguous and start at a multiple of the block, "
        f"{block}; padding is 0.",
    )
    return context
