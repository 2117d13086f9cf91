"""Several texts packed into one row, by `segment_ids`: 1 for the tokens of the first, 2 of the
second, 0 for padding. Each text begins at a block of the LSG pattern and has positions and globals
of its own, so that it has the outputs that it has alone in a row.

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
    """What a text's first place is a multiple of."""
    return config.lsg.block_size if config.lsg else 1


def count_segments(
    segment_ids: Any, given: int | None, config: EncoderConfig, *, answers: bool
) -> int:
    """How many texts a row has at most, 0 without `segment_ids`.

    Args:
        given: None takes as many as there are blocks.
        answers: whether the model answers for each text, so that the number is a shape.

    Raises:
        ValueError: for a number without segments, or none where it is needed.
    """
    if segment_ids is None:
        require(given is None, f"num_segments={given} needs segment_ids.")
        return 0
    require(
        sequence_shards() == 1,
        f"segment_ids over sequence={sequence_shards()} devices: a row of several texts is not cut "
        "over a sequence axis; lay its devices along data.",
    )
    if given is not None:
        return checked_value("num_segments", given, int, whole(1, 2**20))
    require(
        config.lsg is not None or not answers,
        "segment_ids without num_segments: a model with full attention has no blocks to tell how "
        "many texts a row has at most; give num_segments=, the number of answers of each row.",
    )
    return -(-segment_ids.shape[-1] // block_of(config))


def check_segments(segment_ids: Any, number: int, config: EncoderConfig, limit: int) -> None:
    """Raises ValueError for `segment_ids` that number no texts; values are read where they can be.

    Args:
        number: the most texts of a row.
        limit: positions that the model has.
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
            f"segment_ids of row {wrong[0]} number no texts that can be packed: each of at most "
            f"num_segments={number} texts has its own number, from 1 on and rising, its tokens lie "
            f"together, and the first at a multiple of "
            + (f"block_size={block}" if config.lsg else "1")
            + "; padding is 0. lsg_flax.data.pack_rows lays texts out like that."
        )
    longest = max(int(np.bincount(row)[1:].max(initial=0)) for row in ids)
    require(
        longest <= limit,
        f"a text of {longest} tokens in a row is more than the {limit} positions of this "
        f"checkpoint (max_position_embeddings={config.max_position_embeddings}); truncate it.",
    )


def first_places(segment_ids: Int[Array, "B T"], number: int) -> Int[Array, "B texts"]:
    """The place of each text's first token; T for one that is not there."""
    texts = jnp.arange(1, number + 1)[None, :, None]
    own = segment_ids[:, None] == texts  # [B, texts, T]
    return jnp.where(own.any(axis=-1), jnp.argmax(own, axis=-1), segment_ids.shape[1])


def begins_text(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether a token is the first of its text."""
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    return (segment_ids != 0) & (segment_ids != before)


def count_in_texts(real: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many `real` tokens of its own text stand before each token."""
    before = jnp.cumsum(real, axis=1) - real.astype(jnp.int32)
    return before - jax.lax.cummax(jnp.where(begins_text(segment_ids), before, 0), axis=1)


def places_in_texts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The place of each token in its text, 0 for padding."""
    places = count_in_texts(jnp.ones(segment_ids.shape, bool), segment_ids)
    return jnp.where(segment_ids == 0, 0, places)


def first_states(
    states: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], number: int
) -> Float[Array, "B texts D"]:
    """The state of each text's first token, of some other for a text that is not there."""
    places = jnp.minimum(first_places(segment_ids, number), states.shape[1] - 1)
    return jnp.take_along_axis(states, places[..., None], axis=1)


def with_first_states(
    states: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], first: Float[Array, "B texts D"]
) -> Float[Array, "B T D"]:
    """The states with others at the first token of each text."""
    rows, places = jnp.arange(len(states))[:, None], first_places(segment_ids, first.shape[1])
    return states.at[rows, places].set(first, mode="drop")
