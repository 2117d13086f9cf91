"""How the next token is picked: one record per way, and one match that picks.

Axes: B batch, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray


@dataclass(frozen=True)
class Greedy:
    """The likeliest token."""


@dataclass(frozen=True)
class Sample:
    """A token drawn from the likeliest ones; raises ValueError for values out of range."""

    temperature: float = 1.0  # divides the logits
    top_k: int | None = None  # keeps the likeliest k
    top_p: float | None = None  # keeps, of these, the fewest that together have this probability

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be positive; do_sample=False is greedy."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or None for all.")


Picker = Greedy | Sample


def picker_of(sample: Sample, *, do_sample: bool) -> Picker:
    """The way of `generate`'s options; raises ValueError for some that need do_sample."""
    if not do_sample and sample != Sample():
        raise ValueError(
            f"temperature, top_k and top_p need do_sample=True, got {sample}; without it the "
            "likeliest token is taken."
        )
    return sample if do_sample else Greedy()


def pick(logits: Float[Array, "B V"], picker: Picker, key: PRNGKeyArray) -> Int[Array, "B"]:
    """The next token of every row; `key` is not used by `Greedy`."""
    match picker:
        case Greedy():
            return jnp.argmax(logits, axis=-1)
        case Sample(temperature, top_k, top_p):
            logits = logits.astype(jnp.float32) / temperature
            if top_k is not None:
                logits = _likeliest(logits, top_k)
            if top_p is not None:
                logits = _nucleus(logits, top_p)
            return jax.random.categorical(key, logits, axis=-1)


def _likeliest(logits: Float[Array, "B V"], count: int) -> Float[Array, "B V"]:
    """-inf for all but the likeliest `count`."""
    lowest = lax.top_k(logits, min(count, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < lowest, -jnp.inf, logits)


def _nucleus(logits: Float[Array, "B V"], probability: float) -> Float[Array, "B V"]:
    """-inf for all but the fewest that together have this probability."""
    falling = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
    kept = jnp.roll(before, 1, axis=-1).at[:, 0].set(0.0) < probability  # [B, V]
    lowest = jnp.where(kept, falling, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)
