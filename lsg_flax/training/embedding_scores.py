"""Scores of embeddings on held-out rows: how near they are to the teacher's, and retrieval scores.

Axes: B batch (of queries), O rows of all batches, C choices, D model width.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from lsg_flax.data import INPUT, NEGATIVE, POSITIVE, READ, EvalBatch, TokenizedDataset
from lsg_flax.models import Batch, Params
from lsg_flax.sharding import shard_batch
from lsg_flax.training.embedding import EmbeddingRun, distances, embed_batch, prefixes_of
from lsg_flax.training.embedding_settings import COSINE
from lsg_flax.training.log import SCORED
from lsg_flax.training.retrieval import retrieval_scores
from lsg_flax.training.scores import Scores


class EmbeddingScorer:
    """Computes the scores of a run's embeddings on rows of data; its program is compiled once."""

    def __init__(self, run: EmbeddingRun, data: TokenizedDataset, mesh: Mesh | None):
        self._run, self._mesh = run, mesh
        found = [name for name in (POSITIVE, NEGATIVE) if name in data.streams]
        self._queries, self._documents = (_numbered(data, names) for names in ([INPUT], found))

        def embed(params: Params, batch: Batch, *given: Params) -> dict[str, Any]:
            rows = batch["rows"]
            batch = {name: array for name, array in batch.items() if name != "rows"}
            if not given:
                return {"rows": rows, "vectors": embed_batch(run, params, batch, None)}
            found = distances(run, params, batch, *given)
            loss, count = (sum(part[i] for part in found.values()) for i in (0, 1))
            cosines = [found[prefix][2] for prefix in prefixes_of(batch)]
            masks = [batch[f"{p}attention_mask"].any(axis=-1).reshape(-1) for p in found]
            cosine = jnp.where(jnp.concatenate(masks), jnp.concatenate(cosines), 0).sum()
            vectors = {prefix: part[3] for prefix, part in found.items()}
            return {"rows": rows, "vectors": vectors, "sums": jnp.stack([loss, count, cosine])}

        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._program = jax.jit(embed, out_shardings=everywhere)

    def __call__(self, params: Params, batches: Iterable[EvalBatch]) -> Scores:
        """Returns the scores; each name begins with "eval_".

        They are the `retrieval_scores` of texts with a positive, searched among the positives and
        negatives of all rows. With a teacher there are also "cosine", the mean cosine of each
        text's vector with the teacher's, and "loss", the distance to the teacher.
        """
        width, sums = self._run.model.config.hidden_size, np.zeros(3)
        both = self._queries, self._documents
        kinds = [(texts, np.zeros((texts.size, width), np.float32)) for texts in both]
        for batch, rows in batches:
            found = jax.device_get(self._start(params, dict(batch) | {"rows": rows}))
            real = found["rows"] >= 0
            for texts, vectors in kinds:
                for name, numbers in texts.numbers.items():
                    places = numbers[found["rows"][real]].reshape(-1)
                    values = found["vectors"][READ[name]].reshape(len(real), -1, width)
                    vectors[places] = values[real].reshape(-1, width)
            sums += found.get("sums", 0)
        (_, queries), (_, documents) = kinds
        scores = self._retrieval(queries, documents) if len(documents) else {}
        if self._run.teacher is not None:
            loss, count, cosine = sums.tolist()
            scores |= {"loss": loss / count, COSINE: cosine / count}
        return {f"{SCORED}{name}": value for name, value in scores.items()}

    def _start(self, params: Params, batch: Batch) -> Any:
        if self._mesh is None:
            return self._program(params, batch, *self._run.given)
        with jax.set_mesh(self._mesh):
            return self._program(params, shard_batch(batch, self._mesh), *self._run.given)

    def _retrieval(
        self, queries: Float[np.ndarray, "B D"], documents: Float[np.ndarray, "O D"]
    ) -> Scores:
        relevant: list[set[int]] = [set() for _ in queries]
        asked, own = self._queries.numbers[INPUT], self._documents.numbers[POSITIVE]
        for query, document in zip(asked.tolist(), own.tolist(), strict=True):
            relevant[query].add(document)
        lists = [sorted(documents) for documents in relevant]
        return retrieval_scores(queries, documents, lists, scale=self._run.scale)


class _TextNumbers(NamedTuple):
    """Numbers of the distinct texts of some streams: how many there are (size), and for each stream
    the number of each row's text."""

    size: int
    numbers: dict[str, Int[np.ndarray, "O *C"]]


def _numbered(data: TokenizedDataset, names: list[str]) -> _TextNumbers:
    known: dict[bytes, int] = {}
    numbers = {}
    for name in names:
        stream = data.streams[name]
        ids = stream.fields[f"{READ[name]}input_ids"]
        spans = [span for row in range(len(data)) for span in stream.spans(row)]
        found = [known.setdefault(ids[a:b].tobytes(), len(known)) for a, b in spans]
        numbers[name] = np.array(found).reshape(len(data), *stream.shape)
    return _TextNumbers(len(known), numbers)
