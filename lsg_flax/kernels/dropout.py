"""Dropout by a hash of the position: the backward pass needs only the key, and every kernel can
compute the same bits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, UInt32


def kept(key: PRNGKeyArray, shape: tuple[int, ...], rate: float) -> Float[Array, "..."]:
    """Returns dropout's factor, 0 or 1 / (1 - rate), for every entry of an array of this shape.

    The bits are a 32-bit mixing hash (two multiplications) of the entry's index, seeded from the
    key. It is fused into the multiplication; JAX's own generators doubled the time of the whole
    attention on CPU.
    """
    seed = seed_of(key)
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return kept_at(place, seed, rate)


def seed_of(key: PRNGKeyArray) -> UInt32[Array, "2"]:
    """Returns the seed of the hash."""
    return jax.random.bits(key, (2,), jnp.uint32)


def kept_at(place: UInt32[Array, "..."], seed, rate: float) -> Float[Array, "..."]:
    """Returns the factors of entries with these indices; `seed` has two numbers of 32 bits."""
    bits = place ^ seed[0]
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15) ^ seed[1]) * jnp.uint32(0x846CA68B)
    bits ^= bits >> 16
    return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), 1.0 / (1.0 - rate), 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: Float[Array, "..."], key: PRNGKeyArray, rate: float) -> Float[Array, "..."]:
    """Sets entries to 0 with probability `rate`, and scales the others, as Flax's `nn.Dropout`; the
    backward pass needs only the key."""
    return x * kept(key, x.shape, rate).astype(x.dtype)


drop.defvjp(
    lambda x, key, rate: (drop(x, key, rate), key),
    lambda rate, key, gradient: (drop(gradient, key, rate), None),
)
