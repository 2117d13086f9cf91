"""Checks the arguments of attention, [batch, tokens, heads, width], and transposes them so that
features come first.

Axes: B batch, T tokens, S keys, N heads, H head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsg_flax.checks import require
from lsg_flax.kernels import Source
from lsg_flax.patterns.pattern import LSG
from lsg_flax.patterns.segments import check_packing, with_globals


class Arrays(NamedTuple):
    """The checked inputs of attention. `mask` is True for keys that may be seen; `segments` number
    the texts that share a row."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]
    mask: Bool[Array, "B S"]
    segments: Int[Array, "B S"] | None = None

    def features_first(self) -> tuple[Float[Array, "B N H T"], Source]:
        """The queries, and the keys that they see."""
        query, key, value = map(features_first, self[:3])
        segments = None if self.segments is None else self.segments[:, None]
        return query, Source(key, value, self.mask[:, None], segments=segments)


def checked_tokens(query, key, value, mask, segments=None) -> Arrays:
    """Returns `checked_arrays` of self-attention.

    Args:
        query, key, value, mask: as in `checked_arrays`, with S = T.
        segments: numbers of the texts, [B, T]; tokens of segment 0 are padding.

    Raises:
        ValueError: as `checked_arrays`, and for other numbers of queries than of keys, and segments
            that are not integers of that shape.
    """
    if query.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"query {query.shape} and key {key.shape} must have the same batch and tokens."
        )
    arrays = checked_arrays(query, key, value, mask)
    if segments is None:
        return arrays
    segments = checked_segments(segments, key.shape[:2])
    return arrays._replace(mask=arrays.mask & (segments != 0), segments=segments)


def checked_segments(segments, shape: tuple[int, ...]) -> Int[Array, "B _"]:
    """Returns segment_ids as an array; raises ValueError unless they are integers of this shape."""
    if segments.shape != shape or not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers of shape {shape} (batch, tokens without prepended "
            "globals; 0 = padding, 1, 2, ... = the texts of a row), got "
            f"{segments.dtype} {segments.shape}."
        )
    return jnp.asarray(segments)


def checked_arrays(query, key, value, mask) -> Arrays:
    """Returns the arrays with a boolean mask, keys and values repeated to one head per query head.

    Args:
        query: [B, T, N, H].
        key, value: [B, S, heads, H]; `heads` divides N.
        mask: boolean, [B, S]; None if all keys may be seen.

    Raises:
        ValueError: for shapes that do not fit together, and arrays that are not floating-point.
    """
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"
    if {query.ndim, key.ndim, value.ndim} != {4}:
        raise ValueError(
            f"query, key and value must be [batch, tokens, heads, width], not {shapes}."
        )
    if 0 in (*query.shape, *key.shape):
        raise ValueError(f"every axis must have at least one entry, but there are {shapes}.")
    if key.shape != value.shape:
        raise ValueError(
            f"key and value must have the same shape, got {key.shape} and {value.shape}."
        )
    if query.shape[::3] != key.shape[::3] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{shapes} do not fit: batch and width must agree, and the heads of key must divide "
            "those of query."
        )
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {array.dtype}, but attention needs floating-point numbers; give "
                "float32, bfloat16 or float16, for example by astype(jnp.float32)."
            )
    if mask is None:
        mask = jnp.ones(key.shape[:2], bool)
    if mask.shape != key.shape[:2] or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be boolean of shape {key.shape[:2]} (batch, tokens; True = real), got "
            f"{mask.dtype} {mask.shape}; "
            "make one from Hugging Face's 0/1 mask with mask.astype(bool)."
        )
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (key, value))
    return Arrays(query, key, value, mask)


def check_shards(segment_ids, shards: int) -> None:
    """Raises ValueError for rows of several texts, with segment_ids [B, T], if there are several
    `shards` of the sequence."""
    require(
        segment_ids is None or shards == 1,
        f"segment_ids with sequence={shards} devices: a row of several texts cannot be sharded "
        "over a sequence axis; use these devices as data instead.",
    )


def checked_for(pattern: LSG, arrays: tuple, segment_ids, num_segments: int | None) -> Arrays:
    """Returns `checked_tokens` of query, key, value and mask, with the segments of the prepended
    globals of `num_segments` texts in front of those of the tokens, segment_ids [B, T - globals];
    raises ValueError for invalid settings of the pattern or of the segments."""
    if pattern.global_tokens not in ("prepended", "first_token", "none"):
        raise ValueError(
            f"global_tokens={pattern.global_tokens!r} is unknown; choose 'prepended', "
            "'first_token' or 'none'."
        )
    tokens, split, texts = checked_tokens(*arrays), pattern.split, pattern.texts
    if tokens.query.shape[1] < split:
        raise ValueError(
            f"the first {'num_segments x ' if texts > 1 else ''}num_global_tokens={split} "
            f"positions are the globals, but there are only {tokens.query.shape[1]} positions."
        )
    if segment_ids is None:
        require(num_segments is None, f"num_segments={num_segments} needs segment_ids.")
        return tokens
    check_packing(pattern.config)
    require(
        pattern.global_tokens != "first_token",
        "global_tokens='first_token' makes one global for the whole row, but segment_ids put "
        "several texts into it; choose 'prepended' or 'none'.",
    )
    require(
        not split or num_segments is not None,
        f"segment_ids with prepended globals: each text has its own num_global_tokens="
        f"{pattern.config.num_global_tokens}; pass num_segments=, the most texts of a row.",
    )
    batch, length = tokens.mask.shape
    segments = checked_segments(segment_ids, (batch, length - split))
    segments = with_globals(segments, texts, split // texts)
    return checked_tokens(*arrays, segments=segments)


def features_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N H T"]:
    """Transposes to the layout of patterns and kernels."""
    return x.transpose(0, 2, 3, 1)


def tokens_first(x: Float[Array, "B N H T"]) -> Float[Array, "B T N H"]:
    """Transposes to the layout of public functions."""
    return x.transpose(0, 3, 1, 2)
