"""Batched inference on documents of any length: sorted by length, padded to a few bucket lengths,
one compilation per bucket, results in the order of the documents.

Axes: B batch, T tokens.
"""

import collections
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lsg_flax.buckets import check_tokens, default_buckets
from lsg_flax.inference.encodings import Encoding, batches_of, check_encoding, padded
from lsg_flax.inference.program import Runnable, Select, program_of
from lsg_flax.models import Model, Params
from lsg_flax.progress import Bar
from lsg_flax.sharding import check_batches, check_devices, shard

IN_FLIGHT = 2  # batches that the device has been given while one before them is fetched

Result = dict[str, np.ndarray]


class _InFlight(NamedTuple):
    """What the device was given, and where the outputs belong."""

    encodings: Sequence[Encoding]  # of the window
    results: list[Result]
    places: list[int]  # of the batch's documents in the window
    outputs: dict[str, jax.Array]
    last: bool  # of the window


class Predictor:
    """A model made ready for documents.

    Attributes:
        buckets: the lengths documents are padded to.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        batch_size: int = 8,
        buckets: Sequence[int] | None = None,
        fields: Sequence[str] | None = None,
        select: Select | None = None,
        mesh: Mesh | None = None,
        program: Runnable | None = None,
    ):
        """Chooses the lengths and outputs.

        Args:
            batch_size: documents at once; the last batch of a bucket is filled up to it.
            buckets: lengths to pad to; powers of two from 512 up to what the model reads by
                default.
            fields: outputs wanted, such as `("logits",)`; all of the task's by default.
            select: makes other outputs of them and of the padded batch, under jit, so that only
                these leave the device; hashable, equal ones share their compilations. An output
                under a name of its own keeps all its rows.
            mesh: of `sharding.make_mesh`: parameters and batches are cut over its devices. All of
                them must be this process's; several processes each take their own documents.
            program: is run in place of the model, and made for the same mesh; `fields` and `select`
                do nothing to it.

        Raises:
            ValueError: for a batch size or buckets that the model or the mesh does not allow.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        model.config.check_tokens()
        limit = model.max_length
        buckets = default_buckets(limit) if buckets is None else tuple(sorted(set(buckets)))
        if not buckets or buckets[0] < 1 or buckets[-1] > limit:
            raise ValueError(
                f"buckets={buckets} must be lengths in 1..{limit}, what this checkpoint reads."
            )
        check_tokens(batch_size, buckets[-1])
        if mesh is not None:
            _check_mesh(mesh, model, batch_size, buckets)
        self.model = model
        self.params = jax.device_put(params) if mesh is None else shard(params, mesh)
        self.batch_size, self.buckets = batch_size, buckets
        self._fields = None if fields is None else tuple(fields)
        self._program = program or program_of(model, self._fields, select, mesh)

    @property
    def compilations(self) -> int:
        """How often this model was compiled for these fields: once per bucket and batch size,
        shared by all predictors on the same mesh."""
        return self._program.compilations

    def __call__(
        self, encodings: Sequence[Encoding], *, window: int | None = None, progress: bool = True
    ) -> Iterator[Result]:
        """Yields the outputs of each document, in order, without padding.

        Args:
            encodings: per document the lists a tokenizer gives without padding: `input_ids` and,
                as wanted, `attention_mask` and `token_type_ids`, the same for all. For multiple
                choice each holds one list per choice.
            window: documents that are sorted and held in memory together, all by default.
            progress: show a bar with documents per second.

        Raises:
            ValueError: for a document that is empty, longer than the longest bucket, or has ids
                beyond the model's tables; it is named by its place. Also for unknown `fields`.
        """
        for place, encoding in enumerate(encodings):
            self.check(f"document {place}", encoding, like=encodings[0])
        size = window or max(len(encodings), 1)
        windows = (encodings[start : start + size] for start in range(0, len(encodings), size))
        with Bar("documents", total=len(encodings), shown=progress) as bar:
            for results in self._stream(windows, bar):
                yield from results

    def stream(self, windows: Iterable[Sequence[Encoding]]) -> Iterator[list[Result]]:
        """Yields the results of each window, in order, while the device works on what follows.

        Args:
            windows: encodings that are sorted and held in memory together, at least one; read
                lazily, as far ahead as keeps `IN_FLIGHT` batches at the device.

        Raises:
            ValueError: as the call; places are counted over all windows.
        """
        yield from self._stream(self._checked(windows), Bar("documents", shown=False))

    def _checked(self, windows: Iterable[Sequence[Encoding]]) -> Iterator[Sequence[Encoding]]:
        count = 0
        for number, encodings in enumerate(windows):
            if not encodings:
                raise ValueError(f"window {number} has no documents; leave it out.")
            for place, encoding in enumerate(encodings, start=count):
                self.check(f"document {place}", encoding, like=encodings[0])
            count += len(encodings)
            yield encodings

    def check(self, name: str, encoding: Encoding, *, like: Encoding) -> None:
        """Raises ValueError for a document, called `name`, that cannot be read or has other fields
        than the document `like`; values cannot be checked under jit."""
        check_encoding(name, encoding, like, model=self.model, longest=self.buckets[-1])

    def settings(self) -> dict[str, Any]:
        """What decides the results, as JSON values: the model, a digest of its parameters, fields
        and buckets; not the batch size and the mesh, which only round differently."""
        model = {"task": self.model.task, "dtype": np.dtype(self.model.dtype).name}
        return {
            "model": model | {"config": self.model.config.to_dict()},
            "parameters": _digest(self.params),
            "fields": self._fields,
            "buckets": list(self.buckets),
        }

    def _stream(self, windows: Iterable[Sequence[Encoding]], bar: Bar) -> Iterator[list[Result]]:
        flying: collections.deque[_InFlight] = collections.deque()
        for batch in self._start(windows):
            flying.append(batch)
            if len(flying) > IN_FLIGHT:
                yield from self._finish(flying.popleft(), bar)
        while flying:
            yield from self._finish(flying.popleft(), bar)

    def _start(self, windows: Iterable[Sequence[Encoding]]) -> Iterator[_InFlight]:
        for encodings in windows:
            results: list[Result] = [{} for _ in encodings]
            batches = list(batches_of(encodings, self.model, self.batch_size, self.buckets))
            for number, (bucket, places) in enumerate(batches, start=1):
                some = [encodings[i] for i in places]
                arrays = padded(some, self.model, self.batch_size, bucket)
                outputs = self._program.start(self.params, arrays)
                yield _InFlight(encodings, results, places, outputs, number == len(batches))

    def _finish(self, batch: _InFlight, bar: Bar) -> Iterator[list[Result]]:
        """Fetches a batch; yields the results of its window if it was the last one."""
        outputs, per_token = jax.device_get(batch.outputs), self.model.task_record.per_token
        for row, place in enumerate(batch.places):
            length = len(batch.encodings[place]["input_ids"])
            batch.results[place] = {
                name: (value[row, :length] if name in per_token else value[row]).copy()
                for name, value in outputs.items()
            }
        bar.update(len(batch.places))
        if batch.last:
            yield batch.results


def predict(
    model: Model,
    params: Params,
    encodings: Sequence[Encoding],
    *,
    batch_size: int = 8,
    buckets: Sequence[int] | None = None,
    fields: Sequence[str] | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> list[Result]:
    """The outputs of each document, in order and without padding, by a `Predictor`, whose settings
    these are and which raises.

    Returns:
        One dict per document of the task's outputs by Hugging Face's names, numpy arrays without
        the batch axis.
    """
    predictor = Predictor(
        model, params, batch_size=batch_size, buckets=buckets, fields=fields, mesh=mesh
    )
    return list(predictor(encodings, progress=progress))


def _digest(params: Params) -> str:
    """Of paths, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _check_mesh(mesh: Mesh, model: Model, batch_size: int, buckets: Sequence[int]) -> None:
    """Raises for what the mesh cannot cut, and for one over several processes."""
    check_devices(mesh)
    lsg = model.config.lsg
    check_batches(mesh, {"batch_size": batch_size}, buckets, lsg and lsg.needs_padding)
