"""Several texts packed into one row by `segment_ids`: 1 for the tokens of the first text, 2 for the
second, 0 for padding. Each text starts at the start of a block of the LSG pattern and has its own
positions and globals, so that its outputs are those that it has in a row of its own.

Axes: B batch, T tokens, D model width.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lsg_flax.checks import checked_value, require, whole
from lsg_flax.models.config import EncoderConfig
from lsg_flax.patterns import are_texts
from lsg_flax.sharding import sequence_shards


def block_of(config: EncoderConfig) -> int:
    """Returns the number of tokens of which every text's start must be a multiple."""
    return config.lsg.block_size if config.lsg else 1


def count_segments(
    segment_ids: Any, given: int | None, config: EncoderConfig, *, answers: bool
) -> int:
    """Returns the largest number of texts in a row; 0 without `segment_ids`.

    Args:
        segment_ids: [B, T], or None.
        given: the number that the caller passed; None for the number of blocks.
        config: of the stack that reads the rows.
        answers: whether the model has an output for each text, so that the number is a shape.

    Raises:
        ValueError: for a number without segments, and if it is needed but not given.
    """
    if segment_ids is None:
        require(given is None, f"num_segments={given} needs segment_ids.")
        return 0
    require(
        sequence_shards() == 1,
        f"segment_ids with sequence={sequence_shards()} devices: a row of several texts cannot be "
        "sharded over a sequence axis; use these devices as data instead.",
    )
    if given is not None:
        return checked_value("num_segments", given, int, whole(1, 2**20))
    require(
        config.lsg is not None or not answers,
        "segment_ids without num_segments: with full attention there are no blocks that limit the "
        "number of texts in a row; give num_segments=, the number of answers per row.",
    )
    return -(-segment_ids.shape[-1] // block_of(config))


def check_segments(segment_ids: Any, number: int, config: EncoderConfig, limit: int) -> None:
    """Raises ValueError for invalid `segment_ids`; under jit their values cannot be checked.

    Args:
        segment_ids: [B, T].
        number: the largest number of texts in a row.
        config: of the stack that reads the rows.
        limit: number of positions that the model has.
    """
    require(
        bool(jnp.issubdtype(segment_ids.dtype, jnp.integer)),
        f"segment_ids have dtype {segment_ids.dtype}; they must be integers, 0 for padding and 1, "
        "2, ... for the texts of a row.",
    )
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids, block = np.asarray(segment_ids), block_of(config)
    wrong = np.flatnonzero(~are_texts(ids, number, block))
    if len(wrong):
        raise ValueError(
            f"segment_ids of row {wrong[0]} are invalid: at most num_segments={number} texts must "
            "be numbered in rising order from 1, the tokens of each must be contiguous, and the "
            "first at a multiple of "
            + (f"block_size={block}" if config.lsg else "1")
            + "; padding is 0. lsg_flax.data.pack_rows makes such rows."
        )
    longest = max(int(np.bincount(row)[1:].max(initial=0)) for row in ids)
    require(
        longest <= limit,
        f"a text of {longest} tokens in a row is more than the {limit} positions of this "
        f"checkpoint (max_position_embeddings={config.max_position_embeddings}); truncate it.",
    )


def first_places(segment_ids: Int[Array, "B T"], number: int) -> Int[Array, "B texts"]:
    """Returns the position of each text's first token; T for a text that does not exist."""
    texts = jnp.arange(1, number + 1)[None, :, None]
    own = segment_ids[:, None] == texts  # [B, texts, T]
    return jnp.where(own.any(axis=-1), jnp.argmax(own, axis=-1), segment_ids.shape[1])


def begins_text(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns whether each token is the first of its text."""
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    return (segment_ids != 0) & (segment_ids != before)


def count_in_texts(real: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns how many `real` tokens of the same text precede each token."""
    before = jnp.cumsum(real, axis=1) - real.astype(jnp.int32)
    return before - jax.lax.cummax(jnp.where(begins_text(segment_ids), before, 0), axis=1)


def places_in_texts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the position of each token in its text, 0 for padding."""
    places = count_in_texts(jnp.ones(segment_ids.shape, bool), segment_ids)
    return jnp.where(segment_ids == 0, 0, places)


def first_states(
    states: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], number: int
) -> Float[Array, "B texts D"]:
    """Returns the state of each text's first token; an arbitrary state for a text that does not
    exist."""
    places = jnp.minimum(first_places(segment_ids, number), states.shape[1] - 1)
    return jnp.take_along_axis(states, places[..., None], axis=1)


def with_first_states(
    states: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], first: Float[Array, "B texts D"]
) -> Float[Array, "B T D"]:
    """Returns the states with those of each text's first token replaced."""
    rows, places = jnp.arange(len(states))[:, None], first_places(segment_ids, first.shape[1])
    return states.at[rows, places].set(first, mode="drop")
