"""Embeddings by contrast: each text's own positive is to be found among those of all rows, with the
gradient of a large batch computed in parts of it. (GradCache, arXiv 2101.06983, section 3)

Axes: B batch (of anchors), O rows (of candidates), T tokens, D model width, M microbatches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from lsg_flax.models import IGNORED, Batch, Params, unit
from lsg_flax.training.losses import cross_entropy_sum

# From parameters, a (micro)batch and a dropout key to a tree of arrays with a row for each of its.
Vectors = dict[str, Array]
EmbedBatch = Callable[[Params, Batch, PRNGKeyArray | None], Vectors]


def ranking_loss(
    anchors: Float[Array, "B D"],
    candidates: Float[Array, "O D"],
    others: Bool[Array, "B O"],
    *,
    scale: float,
) -> Float[Array, ""]:
    """The mean over the anchors of -log softmax(scale * cosine)[own], in float32: that of
    sentence-transformers' MultipleNegativesRankingLoss, where all other candidates are negatives.

    Under a mesh the batch is that of all devices: XLA gathers the candidates.

    Args:
        anchors: texts; the candidate of the same place is the own one.
        candidates: what belongs to the anchors, and behind it negatives of any anchor.
        others: the candidates that are negatives of each anchor. An anchor without any does not
            count.
    """
    rows = len(anchors)
    sides = unit(anchors.astype(jnp.float32)), unit(candidates.astype(jnp.float32))
    scores = scale * jnp.einsum("BD,OD->BO", *sides, precision="highest")
    seen = others | jnp.eye(rows, len(candidates), dtype=bool)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    real = others.any(axis=1)  # [B]
    labels = jnp.where(real, jnp.arange(rows), IGNORED)
    return cross_entropy_sum(scores, labels) / jnp.maximum(real.sum(), 1)


def other_texts(
    anchors: Int[Array, "B T"],
    positives: Int[Array, "B S"],
    negatives: Int[Array, "K U"] | None,
) -> Bool[Array, "B O"]:
    """Which candidates, positives and behind them negatives, are no texts of each anchor, by ids
    padded with 0 where nothing is real: not its own positive, however often that is there, nor one
    of the same anchor in another row. Rows of padding alone are nobody's, and have none.
    """
    asked, own = (_fingerprints(ids) for ids in (anchors, positives))
    same = _equal(own, own) | _equal(asked, asked)
    real = positives.any(axis=1)
    if negatives is not None:
        given = _fingerprints(negatives)
        same = jnp.concatenate([same, _equal(own, given)], axis=1)
        real = jnp.concatenate([real, negatives.any(axis=1)])
    return ~same & real[None] & anchors.any(axis=1)[:, None]


def _fingerprints(ids: Int[Array, "O T"]) -> UInt32[Array, "O 2"]:
    """Two random sums of a text's ids, which two texts in 2**60 have in common."""
    weights = np.random.default_rng(0).integers(2**31, size=(ids.shape[1], 2), dtype=np.uint32)
    weights = jnp.asarray(2 * weights.T + 1)  # the same for a place, whatever the width
    return (ids.astype(jnp.uint32)[:, None] * weights[None]).sum(axis=2, dtype=jnp.uint32)


def _equal(one: UInt32[Array, "B 2"], other: UInt32[Array, "O 2"]) -> Bool[Array, "B O"]:
    return (one[:, None] == other[None]).all(axis=2)


def cached_gradients(
    embed: EmbedBatch,
    loss: Callable[[Vectors], Float[Array, ""]],
    params: Params,
    batch: Batch,
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], Params]:
    """The loss of the vectors of M microbatches together, [M, B, ...] each, and its gradient in
    float32, in the memory that one of them needs: all are embedded, then one after the other again,
    with what the loss asks of its vectors.

    Dropout masks of the second time are those of the first.
    """
    numbers = jnp.arange(len(jax.tree.leaves(batch)[0]))

    def embedded(params: Params, number: Array, part: Batch) -> Vectors:
        return embed(params, part, jax.random.fold_in(key, number))

    def first(_, numbered):
        return None, embedded(params, *numbered)

    def second(total: Params, numbered: Any):
        number, part, wanted = numbered
        _, pull = jax.vjp(lambda params: embedded(params, number, part), params)
        (gradient,) = pull(wanted)
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradient), None

    _, vectors = jax.lax.scan(first, None, (numbers, batch))
    value, wanted = jax.value_and_grad(loss)(vectors)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return value, jax.lax.scan(second, zeros, (numbers, batch, wanted))[0]
