"""Contrastive training of embeddings: each text must find its own positive among those of all rows.
The gradient of a large batch is computed in microbatches. (GradCache, arXiv 2101.06983, section 3)

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

# Returns, of parameters, a (micro)batch and a dropout key, arrays with one row per text.
Vectors = dict[str, Array]
EmbedBatch = Callable[[Params, Batch, PRNGKeyArray | None], Vectors]


def ranking_loss(
    anchors: Float[Array, "B D"],
    candidates: Float[Array, "O D"],
    others: Bool[Array, "B O"],
    *,
    scale: float,
) -> Float[Array, ""]:
    """Returns the mean over the anchors of -log softmax(scale * cosine)[own], in nats and float32.

    It is the loss of sentence-transformers' MultipleNegativesRankingLoss (arXiv 1705.00652, section
    4.4), where all other candidates are negatives. Under a mesh the batch is that of all devices:
    XLA gathers the candidates.

    Args:
        anchors: embeddings of texts; the positive of an anchor is the candidate of the same index.
        candidates: embeddings of the positives, followed by those of negatives of any anchor.
        others: which candidates are negatives of each anchor. An anchor without negatives does not
            count.
        scale: factor of the cosines.
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
    """Returns which candidates (positives, then negatives) are negatives of each anchor.

    A candidate is no negative of an anchor if its text equals the anchor's own positive, or the
    positive of the same anchor text in another row. Rows that are only padding are no candidates
    and have no negatives. Ids must be 0 at padding.
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
    """Returns two random sums of each text's ids; two texts share both with odds of 1 in 2**60."""
    weights = np.random.default_rng(0).integers(2**31, size=(ids.shape[1], 2), dtype=np.uint32)
    weights = jnp.asarray(2 * weights.T + 1)  # a position's weight is the same for any width
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
    """Returns the loss of all M microbatches as one batch, and its gradient in float32. (GradCache,
    arXiv 2101.06983, section 3)

    It needs the memory of one microbatch. The first pass embeds all microbatches and computes the
    gradient of the loss with respect to the embeddings; the second pass embeds one microbatch after
    the other again and backpropagates its part of that gradient. Both passes have the same dropout
    masks.

    Args:
        batch: arrays [M, B, ...].
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
