"""Sums of groups of tokens, and ranks, without sorting, gathering or scattering: they use
comparisons and products with ones and zeros, which run on an accelerator's matrix unit.

Axes: R representatives of a chunk of tokens, H head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def ranks(x: Float[Array, "chunks chunk"]) -> Int[Array, "chunks chunk"]:
    """Returns the rank of each number in its row, in the order of `jax.lax.top_k`: larger ones
    first, and of equal ones the earlier first."""
    number = np.arange(x.shape[-1])
    own, other = x[:, :, None], x[:, None]
    earlier = (number < number[:, None])[None]  # [1, chunk, chunk]
    return ((other > own) | ((other == own) & earlier)).sum(axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_groups(
    x: Float[Array, "chunks chunk H"], group: Int[Array, "chunks chunk"], count: int
) -> Float[Array, "chunks R H"]:
    """Returns the float32 sum of each of `count` groups; a token whose group is not in 0..count-1
    is left out. Only the groups are kept for the backward pass."""
    return _product("mcr,mch->mrh", _member(group, count, x.dtype), x)


def _member(group, count: int, dtype) -> Float[Array, "chunks chunk R"]:
    return (group[..., None] == jnp.arange(count)[None, None]).astype(dtype)


def _product(equation: str, member, x):
    # The default precision would round float32 to bfloat16; with the highest, products with ones
    # and zeros are exact.
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, member, x, precision=exact, preferred_element_type=jnp.float32)


def _sum_groups_forward(x, group, count):
    return sum_groups(x, group, count), (group, jnp.zeros((0,), x.dtype))


def _sum_groups_backward(count, saved, gradient):
    group, like = saved
    # A token is in at most one group, so rounding before this product equals rounding after it.
    gradient = gradient.astype(like.dtype)
    back = _product("mcr,mrh->mch", _member(group, count, like.dtype), gradient)
    return back.astype(like.dtype), None


sum_groups.defvjp(_sum_groups_forward, _sum_groups_backward)
