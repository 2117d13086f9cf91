"""Exchange between the shards of a long sequence, inside `jax.shard_map`: the edges of neighbours,
and values of the first shard.

Every shard holds whole blocks of tokens, in order along a mesh axis. With `axis=None` there is one
shard, without neighbours.

Axes: B batch, T tokens of a shard.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PRNGKeyArray, Shaped


def add_neighbours(x: Shaped[Array, "*A T"], before: int, after: int, axis: str | None):
    """Returns the tokens of a shard, with the last `before` tokens of the previous shard in front
    and the first `after` tokens of the next one at the end; zeros (False) if there is no such
    shard."""
    if axis is None:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])
    last = lax.axis_size(axis) - 1
    parts = [x]
    if before:
        edge = x[..., x.shape[-1] - before :]
        parts.insert(0, lax.ppermute(edge, axis, [(i, i + 1) for i in range(last)]))
    if after:
        parts.append(lax.ppermute(x[..., :after], axis, [(i + 1, i) for i in range(last)]))
    return jnp.concatenate(parts, axis=-1)


def is_first(axis: str | None) -> Bool[Array, ""] | bool:
    """Whether this is the first shard of the sequence."""
    return True if axis is None else lax.axis_index(axis) == 0


def share_first(x: Shaped[Array, "*A"], axis: str | None):
    """Returns the first shard's value on every shard."""
    return x if axis is None else _sum(jnp.where(is_first(axis), x, 0), axis).astype(x.dtype)


def _sum(x, axis: str):
    """The sum over the shards; in float32, since XLA on CPU crashes on a bfloat16 sum inside a
    shard."""
    exact = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return lax.psum(exact, axis)


def share_first_with(x: Shaped[Array, "B *A"], has: Bool[Array, "B"], axis: str | None):
    """Returns on every shard, per row, the value of the first shard whose `has` is True; zeros if
    there is none."""
    if axis is None:
        return x
    place = jnp.where(has, lax.axis_index(axis), lax.axis_size(axis))
    chosen = has & (place == lax.pmin(place, axis))
    return _sum(jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, 0), axis).astype(x.dtype)


def shard_key(key: PRNGKeyArray | None, axis: str | None) -> PRNGKeyArray | None:
    """Returns a random key that differs for each shard."""
    return key if key is None or axis is None else jax.random.fold_in(key, lax.axis_index(axis))
