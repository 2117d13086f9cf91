"""How the next token is chosen: one record per method, and the function that chooses.

Axes: B batch, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lsg_flax.checks import require
from lsg_flax.generation.rules import check_number, check_whole
from lsg_flax.sharding import over_rows


@dataclass(frozen=True)
class Greedy:
    """Chooses the most likely token, as transformers' `greedy_search`."""


@dataclass(frozen=True)
class Sample:
    """Draws a token from the most likely ones, as transformers' TemperatureLogitsWarper,
    TopKLogitsWarper and TopPLogitsWarper (nucleus sampling, arXiv 1904.09751).

    Attributes:
        temperature: the logits are divided by it.
        top_k: number of tokens to draw from, the most likely ones; None for all.
        top_p: draw from the fewest of these whose total probability reaches it; None for all.

    Raises:
        ValueError: for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        check_number("temperature (do_sample=False is greedy): temperature", self.temperature)
        require(
            self.temperature >= 1e-20,  # dividing logits by less would overflow
            f"temperature={self.temperature} must be at least 1e-20; do_sample=False is greedy.",
        )
        if self.top_k is not None:
            check_whole("top_k (None keeps all): top_k", self.top_k, 1)
        if self.top_p is not None:
            check_number("top_p", self.top_p, positive=False)
            require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1], or None for all.")


def pick(
    logits: Float[Array, "*B V"], picker: Greedy | Sample, key: PRNGKeyArray
) -> Int[Array, "*B"]:
    """Returns the next token of every row; `Greedy` does not use `key`."""
    match picker:
        case Greedy():
            return jnp.argmax(logits, axis=-1)
        case Sample():
            return jax.random.categorical(key, warp(logits, picker), axis=-1)


def warp(logits: Float[Array, "*B V"], sample: Sample, keep: int = 1) -> Float[Array, "*B V"]:
    """Applies temperature, top_k and top_p, in this order, to the logits; the last two keep at
    least `keep` tokens."""
    logits = logits.astype(jnp.float32) / sample.temperature
    if sample.top_k is not None:
        logits = _likeliest(logits, max(sample.top_k, keep))
    return logits if sample.top_p is None else _nucleus(logits, sample.top_p, keep)


def top_k(
    scores: Float[Array, "B *_"], count: int
) -> tuple[Float[Array, "B *_"], Int[Array, "B *_"]]:
    """`lax.top_k`, computed on a mesh by each device for its own rows."""
    found, places = over_rows(partial(lax.top_k, k=count))(scores)
    return found, places


def _likeliest(logits: Float[Array, "*B V"], count: int) -> Float[Array, "*B V"]:
    """Sets all logits but the `count` highest to -inf."""
    lowest = top_k(logits, min(count, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < lowest, -jnp.inf, logits)


def _nucleus(logits: Float[Array, "*B V"], probability: float, keep: int) -> Float[Array, "*B V"]:
    """Sets to -inf all logits but the fewest whose total probability reaches `probability`."""
    falling = jnp.sort(logits, axis=-1, descending=True)
    reached = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
    kept = jnp.roll(reached, 1, axis=-1) < probability
    kept = kept.at[..., :keep].set(True)  # [*B, V]
    lowest = jnp.where(kept, falling, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)
