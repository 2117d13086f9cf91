"""Finds the best blocks for questions: exact search for the largest inner products, in parts and
over devices; or search by an index library.

Axes: D model width (here of the projection).
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lsg_flax.checks import require
from lsg_flax.hub import StoredTensor
from lsg_flax.sharding import AXES, check_devices, make_mesh

_SCORES = 2**26  # number of scores computed at once on a device: 256 MiB in float32
_LEAST = float(np.finfo(np.float32).min)


Stored = np.ndarray | jax.Array | StoredTensor  # embeddings, [blocks, D]; np.memmap is an array


class Beam(NamedTuple):
    """The best blocks of each question, best first; with exact search the lower number comes first
    among equal ones."""

    scores: Float[np.ndarray, "questions beam"]
    blocks: Int[np.ndarray, "questions beam"]


Search = Callable[[Float[np.ndarray, "questions D"], int], Beam]  # of queries and the beam's size


def device_search(
    embeddings: Stored,
    *,
    mesh: Mesh | None = None,
    dtype: Dtype = jnp.float32,
    recall: float | None = None,
) -> Search:
    """Makes a search for the largest inner products (arXiv 2002.08909, section 3.3) on devices,
    which keep the embeddings in memory; each device reads only its own part of a file.

    Args:
        embeddings: embeddings of the blocks, [blocks, D].
        mesh: a mesh of `sharding.make_mesh`, over all devices of which blocks are sharded; by
            default one device.
        dtype: of the embeddings and their products; sums are float32.
        recall: None for the exact best blocks; otherwise `lax.approx_max_k` (arXiv 2206.14286)
            finds about this share of them, which is faster on a TPU.

    Raises:
        ValueError: if there are no embeddings, or `recall` is outside 0..1. The search raises it
            for queries of another width, and a beam larger than the index.
    """
    require(recall is None or 0 < recall < 1, f"recall={recall} must be between 0 and 1, or None.")
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    check_devices(mesh)
    count, width = _size(embeddings)

    def read(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(rows)
        part = np.zeros((last - first, width), dtype)
        if first < count:  # otherwise this part is only padding
            part[: count - first] = np.asarray(embeddings[first : min(last, count)])
        return part

    rows = math.ceil(count / mesh.size) * mesh.size
    placed = jax.make_array_from_callback(
        (rows, width), NamedSharding(mesh, PartitionSpec(AXES)), read
    )

    def search(queries: Float[np.ndarray, "questions D"], beam: int) -> Beam:
        _check(queries, beam, count, width)
        found = best_blocks(mesh, count, beam, recall)(placed, jnp.asarray(queries))
        return Beam(*jax.device_get(found))

    return search


def faiss_search(embeddings: Stored, *, factory: str = "Flat") -> Search:
    """Makes a search by faiss (arXiv 1702.08734), for indexes that are faster on a CPU than exact
    search.

    Args:
        embeddings: embeddings of the blocks, [blocks, D].
        factory: argument of `faiss.index_factory`, such as "Flat" (exact) or "IVF4096,Flat".

    Raises:
        ImportError: if faiss is not installed.
        ValueError: for a factory that faiss does not know. The search raises it as `device_search`,
            and if faiss finds fewer blocks than asked for.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "faiss_search needs faiss: pip install 'lsg-flax[faiss]', or use device_search."
        ) from error
    count, width = _size(embeddings)
    vectors = np.ascontiguousarray(embeddings[:], np.float32)
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
    except RuntimeError as error:
        raise ValueError(f"faiss refuses factory={factory!r}: {error}") from error
    index.add(vectors)

    def search(queries: Float[np.ndarray, "questions D"], beam: int) -> Beam:
        _check(queries, beam, count, width)
        found = Beam(*index.search(np.ascontiguousarray(queries, np.float32), beam))
        few = int((found.blocks >= 0).sum(axis=1).min())
        require(few == beam, f"factory={factory!r} found only {few} of {beam} blocks; use 'Flat'.")
        return found

    return search


def _size(embeddings: Stored) -> tuple[int, int]:
    shape = tuple(map(int, embeddings.shape))
    require(
        len(shape) == 2 and 0 not in shape,
        f"embeddings {shape} must be [blocks, width], at least one of each.",
    )
    return shape[0], shape[1]


def _check(queries: np.ndarray, beam: int, count: int, width: int) -> None:
    require(
        queries.ndim == 2 and queries.shape[1] == width,
        f"queries {queries.shape} must be [questions, {width}], as wide as the blocks' embeddings.",
    )
    require(
        1 <= beam <= count,
        f"a beam of {beam} blocks does not fit an index of {count}; set searcher_beam_size and "
        f"reader_beam_size in config.json to 1..{count}, or index more blocks.",
    )


@functools.lru_cache(maxsize=64)
def best_blocks(
    mesh: Mesh, count: int, beam: int, recall: float | None = None
) -> jax.stages.Wrapped:
    """Returns the jitted search of `device_search`, (embeddings [rows, D], queries [questions, D])
    -> (scores, numbers), each [questions, beam]. A device computes its scores in parts of at most
    256 MiB, and picks the best of its own rows; only these are exchanged.

    Args:
        count: number of rows that are blocks; the rows after them are never found.
        beam: number of blocks to find for each question.
        recall: as in `device_search`.
    """

    def of_shard(blocks: Array, queries: Array) -> tuple[Array, Array]:
        first, size = lax.axis_index(AXES) * blocks.shape[0], min(beam, blocks.shape[0])
        found = _best_rows(blocks, queries, count - first, size, recall)
        scores, rows = (lax.all_gather(x, AXES, axis=1, tiled=True) for x in found)
        shards = jnp.arange(mesh.size).repeat(size)[None]
        return _best(scores, rows + shards * blocks.shape[0], beam)

    parts, whole = PartitionSpec(AXES), PartitionSpec()
    run = jax.shard_map(  # all devices gather the same
        of_shard, mesh=mesh, in_specs=(parts, whole), out_specs=whole, check_vma=False
    )
    return jax.jit(run)


def _best_rows(blocks: Array, queries: Array, count: Array, beam: int, recall: float | None):
    """Returns the best of one device's rows, of which the first `count` are blocks."""
    rows, precision = blocks.shape[0], "highest" if blocks.dtype == jnp.float32 else None
    parts = min(math.ceil(rows * queries.shape[0] / _SCORES), max(rows // beam, 1))
    size = math.ceil(rows / parts)
    queries = queries.astype(blocks.dtype)

    def of_part(number: Array) -> tuple[Array, Array]:
        start = jnp.minimum(number * size, rows - size)  # the last part reaches back
        part = lax.dynamic_slice_in_dim(blocks, start, size)
        contracted, numbers = (((1,), (1,)), ((), ())), start + jnp.arange(size)
        scores = lax.dot_general(
            queries, part, contracted, precision, preferred_element_type=jnp.float32
        )  # [questions, size]
        scores = jnp.where(((numbers >= number * size) & (numbers < count))[None], scores, _LEAST)
        if recall is None or beam == size:
            found, places = lax.top_k(scores, beam)
        else:
            found, places = lax.approx_max_k(scores, beam, recall_target=recall)
        return found, start + places

    if parts == 1:
        return of_part(jnp.int32(0))
    scores, numbers = lax.map(of_part, jnp.arange(parts))  # [parts, questions, beam]
    scores, numbers = (jnp.concatenate(list(x), axis=1) for x in (scores, numbers))
    return _best(scores, numbers, beam)


def _best(scores: Array, numbers: Array, beam: int) -> tuple[Array, Array]:
    scores, places = lax.top_k(scores, beam)
    return scores, jnp.take_along_axis(numbers, places, axis=1)
