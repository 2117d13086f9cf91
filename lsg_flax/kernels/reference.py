"""`attend` in a simple form: every query has its own list of keys. Its cost is quadratic, so it is
for tests and for reading.

Axes: B batch, N heads, H head width, T tokens (queries), S keys, W keys of a block's windows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lsg_flax.kernels.spec import NEGATIVE, NO_BIASES, Biases, Queries, Rule, Source, Spec


def masked_softmax(
    scores: Float[Array, "... S"], mask: Bool[Array, "... S"]
) -> Float[Array, "... S"]:
    """Returns the softmax over the last axis in float32; masked entries are exactly 0, also in a
    fully masked row."""
    scores = jnp.where(mask, scores.astype(jnp.float32), NEGATIVE)
    return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)


def attend_reference(
    spec: Spec,
    queries: Queries,
    sources: tuple[Source, ...] = (),
    shared: Source | None = None,
    biases: Biases = NO_BIASES,
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """Computes what `attend` does, without dropout."""
    batch, heads, _, length = queries.features.shape
    place = np.arange(length)[:, None]  # [T, 1]
    parts = []  # per window, and for the shared keys: value [B, N, H, T, W], score and mask
    for i, window in enumerate(spec.windows):
        source, block = sources[window.source], place // spec.block
        index = window.offset + block * window.stride + np.arange(window.width)  # [T, W]
        exists = jnp.asarray((index >= 0) & (index < source.mask.shape[-1]))[None, None]
        seen = jax.tree.map(lambda x, index=index: x.at[..., index].get(mode="clip"), source)
        bias = biases.windows[i] if biases.windows else None
        if bias is not None:
            bias = bias[:, :, np.arange(length) % spec.block]  # [#B, #N, T, W]
        allowed = _allowed(window.rule, queries, seen, (place, index - window.lead))
        mask = seen.mask & exists & allowed & _own_segment(queries, seen)
        parts.append((seen.value, _scores(queries, seen, bias), mask))
    if shared is not None:
        seen = jax.tree.map(lambda x: x[..., None, :], shared)  # [B, N, H, 1, S]
        places = np.arange(shared.mask.shape[-1])[None]
        bias = None if biases.shared is None else biases.shared[:, :, None]
        allowed = _allowed(spec.shared_rule, queries, seen, (place, places))
        mask = seen.mask & allowed & _own_segment(queries, seen)
        parts.append((seen.value, _scores(queries, seen, bias), mask))
    values, *rest = zip(*parts, strict=True)
    shape = (batch, heads, length)
    scores, masks = (
        jnp.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in group], axis=-1)
        for group in rest
    )
    ends = np.cumsum([value.shape[-1] for value in values])[:-1].tolist()
    weights = jnp.split(masked_softmax(scores, masks), ends, axis=-1)
    pairs = zip(values, weights, strict=True)
    contexts: list[Array] = [(value * weight[:, :, None]).sum(axis=-1) for value, weight in pairs]
    normaliser = jax.nn.logsumexp(jnp.where(masks, scores, NEGATIVE), axis=-1)
    return sum(contexts[1:], contexts[0]).astype(queries.features.dtype), normaliser


def _scores(queries: Queries, seen: Source, bias) -> Float[Array, "B N T W"]:
    query, key = (x.astype(jnp.float32) for x in (queries.features[..., None], seen.key))
    scores = (query * key).sum(axis=2)
    return scores if bias is None else scores + bias


def _allowed(rule: Rule, queries: Queries, seen: Source, places) -> Bool[Array, "#B #N #T #W"]:
    if rule == Rule():
        return jnp.ones((1, 1, 1, 1), bool)
    if queries.positions is None:
        return jnp.asarray(rule.allows(*places))[None, None]
    return rule.allows(queries.positions[..., None], seen.positions)


def _own_segment(queries: Queries, seen: Source) -> Bool[Array, "#B #N #T #W"]:
    if queries.segments is None or seen.segments is None:
        return jnp.ones((1, 1, 1, 1), bool)
    return queries.segments[..., None] == seen.segments
