"""Retrieval scores of embeddings: how well a text's vector finds the texts that belong to it.

Axes: B batch (of queries), O rows (of documents), D model width.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lsg_flax.training.scores import Scores

CUT = 10  # found documents that count
_AT_ONCE = 256  # queries that are scored together


def retrieval_scores(
    queries: Float[np.ndarray, "B D"],
    documents: Float[np.ndarray, "O D"],
    relevant: Sequence[Sequence[int]],
    *,
    scale: float,
) -> Scores:
    """Returns retrieval scores from 0 to 1, as sentence-transformers'
    InformationRetrievalEvaluator, and a loss in nats, as means over the queries.

    `recall@1` and `recall@10` are the share of a query's documents among the first 1 or 10;
    `mrr@10` is the reciprocal rank of the first of its documents; `ndcg@10` is their discounted
    gain, 1 / log2(rank + 1), divided by the best possible one. Documents are ordered by cosine; of
    equal ones the earlier comes first. `loss` is -log softmax(scale * cosine) of a document that
    belongs to the query, among it and all that do not, as a mean over such pairs.

    Args:
        relevant: for each query the indices of its documents, at least one.
        scale: factor of the cosines in `loss`.

    Raises:
        ValueError: if there are no queries, or a query has no documents.
    """
    if not len(queries) or not all(relevant):
        raise ValueError(
            f"there are {len(queries)} queries, {sum(not of for of in relevant)} of them without a "
            "document; retrieval needs queries that each have a positive."
        )
    queries, documents = (v / np.maximum(_norm(v), 1e-12) for v in (queries, documents))
    losses: list[float] = []
    ranked = []
    for start in range(0, len(queries), _AT_ONCE):
        scores = queries[start : start + _AT_ONCE] @ documents.T  # [B, O]
        ranked.append(np.argsort(-scores, axis=1, kind="stable")[:, :CUT])
        for row, own in zip(scores, relevant[start : start + _AT_ONCE], strict=True):
            losses += _losses(scale * row.astype(np.float64), np.asarray(own))
    return {"loss": float(np.mean(losses))} | _of_ranks(np.concatenate(ranked), relevant)


def _of_ranks(found: Int[np.ndarray, "B O"], relevant: Sequence[Sequence[int]]) -> Scores:
    """Returns the scores of the first documents found for each query, the best one first."""
    hits = np.zeros((len(found), CUT), bool)
    for place, own in enumerate(relevant):
        hits[place, : found.shape[1]] = np.isin(found[place], np.asarray(own))
    counts = np.array([len(own) for own in relevant])
    gains = 1 / np.log2(np.arange(CUT) + 2)
    best = np.cumsum(gains)[np.minimum(counts, CUT) - 1]
    first = np.where(hits.any(axis=1), 1 / (1 + hits.argmax(axis=1)), 0.0)
    return {
        "recall@1": float((hits[:, 0] / counts).mean()),
        "recall@10": float((hits.sum(axis=1) / counts).mean()),
        f"mrr@{CUT}": float(first.mean()),
        f"ndcg@{CUT}": float((hits @ gains / best).mean()),
    }


def _losses(scores: Float[np.ndarray, "O"], own: Int[np.ndarray, "_"]) -> list[float]:
    others = np.delete(scores, own)
    return [float(np.logaddexp.reduce(np.append(others, scores[i])) - scores[i]) for i in own]


def _norm(vectors: Float[np.ndarray, "O D"]) -> Float[np.ndarray, "O 1"]:
    return np.linalg.norm(vectors, axis=1, keepdims=True)
