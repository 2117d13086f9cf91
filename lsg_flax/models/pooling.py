"""Pools the states of a text's tokens into one vector (its embedding).

Axes: B batch, T tokens, D model width.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsg_flax.models.config import ModelConfig

Pooling = Literal["mean", "cls", "max", "global"]


def pool(
    states: Float[Array, "B T D"],
    mask: Bool[Array, "B T"] | Int[Array, "B T"],
    mode: Pooling,
    *,
    normalize: bool = False,
) -> Float[Array, "B D"]:
    """Returns one vector per text, as sentence-transformers' `Pooling`, in float32; zeros for a
    text of padding only.

    Args:
        states: the encoder's last states.
        mask: 1 or True for real tokens.
        mode: "mean" and "max" are over the real tokens; "cls" is the first token's state. "global"
            is the first global token's state; with `pool_with_global` the model returns it as the
            first token's state, so here it is the same as "cls".
        normalize: whether to scale vectors to length 1.

    Raises:
        ValueError: for an unknown mode.
    """
    check_pooling(mode)
    real = mask.astype(bool)
    states = states.astype(jnp.float32)
    if mode == "mean":
        count = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
        pooled = jnp.where(real[:, :, None], states, 0).sum(axis=1) / count
    elif mode == "max":
        pooled = jnp.where(real[:, :, None], states, jnp.finfo(jnp.float32).min).max(axis=1)
    else:
        pooled = states[:, 0]
    pooled = jnp.where(real.any(axis=1, keepdims=True), pooled, 0)  # [B, D]
    return unit(pooled) if normalize else pooled


def unit(vectors: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Scales vectors to length 1, as sentence-transformers' `Normalize`; zeros stay zeros, and have
    a finite gradient."""
    squares = (vectors**2).sum(axis=-1, keepdims=True)
    return vectors * lax.rsqrt(jnp.maximum(squares, 1e-24))


def check_pooling(mode: str, config: ModelConfig | None = None) -> None:
    """Raises ValueError for an unknown pooling mode, and for "global" if the model of this config
    does not pool with the first global token."""
    if mode not in get_args(Pooling):
        raise ValueError(f"pooling={mode!r} must be one of {', '.join(get_args(Pooling))}.")
    if mode == "global" and config and not (config.lsg and config.lsg.pool_with_global):
        remedy = config.or_convert("use 'cls' or 'mean'")
        raise ValueError(
            f"pooling='global' needs an LSG model with pool_with_global=True; {remedy}."
        )
