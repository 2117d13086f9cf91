"""What a shard of a long sequence needs of the others, inside `jax.shard_map`: its neighbours'
edges, and what the first shard has.

Every shard holds whole blocks of tokens, in order along a mesh axis. With `axis=None` there is one
shard, without neighbours.

Axes: B batch, T tokens of a shard.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PRNGKeyArray, Shaped


def add_neighbours(x: Shaped[Array, "*A T"], before: int, after: int, axis: str | None):
    """The tokens of a shard between the last `before` of the shard in front and the first `after`
    of the one behind; zeros (False) where there is none."""
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
    """Whether this is the shard where the sequence begins."""
    return True if axis is None else lax.axis_index(axis) == 0


def share_first(x: Shaped[Array, "*A"], axis: str | None):
    """What the first shard has, in all of them."""
    return x if axis is None else _sum(jnp.where(is_first(axis), x, 0), axis).astype(x.dtype)


def _sum(x, axis: str):
    """Over the shards; in float32, since XLA on CPU dies of a bfloat16 sum inside a shard."""
    exact = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return lax.psum(exact, axis)


def share_first_with(x: Shaped[Array, "B *A"], has: Bool[Array, "B"], axis: str | None):
    """Per row, what the first shard with `has` has, in all of them; zeros where none has it."""
    if axis is None:
        return x
    place = jnp.where(has, lax.axis_index(axis), lax.axis_size(axis))
    chosen = has & (place == lax.pmin(place, axis))
    return _sum(jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, 0), axis).astype(x.dtype)


def shard_key(key: PRNGKeyArray | None, axis: str | None) -> PRNGKeyArray | None:
    """A random key of the shard's own."""
    return key if key is None or axis is None else jax.random.fold_in(key, lax.axis_index(axis))
