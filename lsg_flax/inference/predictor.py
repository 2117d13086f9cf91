"""Batched inference on documents of any length: documents are sorted by length and padded to a few
bucket lengths, with one compilation per bucket; results are in the order of the documents.

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

IN_FLIGHT = 2  # batches that are queued on the device while an earlier one is fetched

Result = dict[str, np.ndarray]


class DocumentWindow(NamedTuple):
    """Documents that are sorted and held in memory together."""

    encodings: Sequence[Encoding]
    known: frozenset[int] = frozenset()  # numbers of those that need no results


class _InFlight(NamedTuple):
    """A batch on the device, and where its outputs belong."""

    encodings: Sequence[Encoding]  # of the window
    results: list[Result]
    places: list[int]  # of the batch's documents in the window
    outputs: dict[str, jax.Array]
    last: bool  # of the window


class Predictor:
    """Runs a model on documents, in batches of a few lengths.

    Attributes:
        buckets: the lengths in tokens that documents are padded to.
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
        """Places the parameters and chooses lengths and outputs.

        Args:
            model, params: the model and its parameters.
            batch_size: documents per batch; the last batch of a bucket is padded to it.
            buckets: lengths in tokens to pad to; by default powers of two from 512 up to what the
                model reads.
            fields: the outputs to return, such as `("logits",)`; by default all of the task.
            select: a function of the outputs and the padded batch that returns other outputs; it
                runs under jit, so that only these leave the device. It must be hashable; equal ones
                share compilations. Outputs under new names are not cut to a document's tokens.
            mesh: a mesh of `sharding.make_mesh`, over which parameters and batches are sharded. All
                its devices must belong to this process; with several processes each predicts its
                own documents.
            program: runs instead of the model, and must be made for the same mesh; `fields` and
                `select` are then ignored.

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
                f"buckets={buckets} must be lengths in 1..{limit}, the tokens that this checkpoint "
                "reads."
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
        """How often this model was compiled for these fields: once per bucket and batch size; all
        predictors on the same mesh share compilations."""
        return self._program.compilations

    def __call__(
        self, encodings: Sequence[Encoding], *, window: int | None = None, progress: bool = True
    ) -> Iterator[Result]:
        """Yields the outputs of each document, in order, without padding.

        Args:
            encodings: per document the lists that a tokenizer returns without padding: `input_ids`
                and, optionally, `attention_mask` and `token_type_ids`; all documents must have the
                same. For multiple choice each has one list per choice.
            window: number of documents that are sorted and held in memory together; by default all.
            progress: whether to show a bar with documents per second.

        Raises:
            ValueError: for a document that is empty, longer than the longest bucket, or has ids
                beyond the model's tables; the message has its number. Also for unknown `fields`.
        """
        for place, encoding in enumerate(encodings):
            self.check(f"document {place}", encoding, like=encodings[0])
        size = window or max(len(encodings), 1)
        windows = (encodings[start : start + size] for start in range(0, len(encodings), size))
        with Bar("documents", total=len(encodings), shown=progress) as bar:
            for results in self._stream(windows, bar):
                yield from results

    def stream(self, windows: Iterable[Sequence[Encoding]]) -> Iterator[list[Result]]:
        """Yields the results of each window, in order, while the device computes the next ones.

        Args:
            windows: lists of at least one encoding, each of which is sorted and held in memory.
                They are read lazily, far enough ahead to keep `IN_FLIGHT` batches on the device.

        Raises:
            ValueError: as the call; documents are numbered over all windows.
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
        """Raises ValueError for a document, `name` in messages, that cannot be read or has other
        fields than the document `like`. It is checked here because values cannot be checked under
        jit."""
        check_encoding(name, encoding, like, model=self.model, longest=self.buckets[-1])

    def settings(self) -> dict[str, Any]:
        """Returns the settings that decide the results, as JSON values: the model, a digest of its
        parameters, fields and buckets; not batch size and mesh, which only affect rounding."""
        model = {"task": self.model.task, "dtype": np.dtype(self.model.dtype).name}
        return {
            "model": model | {"config": self.model.config.to_dict()},
            "parameters": _digest(self.params),
            "fields": self._fields,
            "buckets": list(self.buckets),
        }

    def _stream(self, windows: Iterable[Sequence[Encoding]], bar: Bar) -> Iterator[list[Result]]:
        for results, last in self.batches((DocumentWindow(each) for each in windows), bar):
            if last:
                yield results

    def batches(
        self, windows: Iterable[DocumentWindow], bar: Bar | None = None
    ) -> Iterator[tuple[list[Result], bool]]:
        """Yields, when a batch is finished, the results of its window so far, and whether it was
        the window's last batch; documents that are not finished have empty results.

        Args:
            windows: read as by `stream`, but not checked; `check` allows each encoding.
            bar: is moved by the documents of each batch.
        """
        flying: collections.deque[_InFlight] = collections.deque()
        for batch in self._start(windows):
            flying.append(batch)
            if len(flying) > IN_FLIGHT:
                yield self._finish(flying.popleft(), bar)
        while flying:
            yield self._finish(flying.popleft(), bar)

    def _start(self, windows: Iterable[DocumentWindow]) -> Iterator[_InFlight]:
        for encodings, known in windows:
            results: list[Result] = [{} for _ in encodings]
            every = batches_of(encodings, self.model, self.batch_size, self.buckets)
            batches = [(bucket, places) for bucket, places in every if not known.issuperset(places)]
            for number, (bucket, places) in enumerate(batches, start=1):
                some = [encodings[i] for i in places]
                arrays = padded(some, self.model, self.batch_size, bucket)
                outputs = self._program.start(self.params, arrays)
                yield _InFlight(encodings, results, places, outputs, number == len(batches))
            if not batches:
                yield _InFlight(encodings, results, [], {}, True)

    def _finish(self, batch: _InFlight, bar: Bar | None) -> tuple[list[Result], bool]:
        """Fetches a batch; returns the results of its window, and whether it was the last one."""
        outputs, per_token = jax.device_get(batch.outputs), self.model.task_record.per_token
        for row, place in enumerate(batch.places):
            length = len(batch.encodings[place]["input_ids"])
            batch.results[place] = {
                name: (value[row, :length] if name in per_token else value[row]).copy()
                for name, value in outputs.items()
            }
        if bar is not None:
            bar.update(len(batch.places))
        return batch.results, batch.last


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
    """Runs a model on documents, by a `Predictor`, whose arguments and errors these are.

    Args:
        model, params: the model and its parameters.
        encodings: per document the lists that a tokenizer returns without padding.
        batch_size, buckets, fields, mesh: as in `Predictor`.
        progress: whether to show a progress bar.

    Returns:
        For each document, in order, a dict of the task's outputs by Hugging Face's names: numpy
        arrays without the batch axis and without padding.
    """
    predictor = Predictor(
        model, params, batch_size=batch_size, buckets=buckets, fields=fields, mesh=mesh
    )
    return list(predictor(encodings, progress=progress))


def _digest(params: Params) -> str:
    """A digest of paths, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _check_mesh(mesh: Mesh, model: Model, batch_size: int, buckets: Sequence[int]) -> None:
    """Raises ValueError if the mesh does not divide batches evenly or spans several processes."""
    check_devices(mesh)
    lsg = model.config.lsg
    check_batches(mesh, {"batch_size": batch_size}, buckets, lsg and lsg.needs_padding)
