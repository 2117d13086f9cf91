"""Batched inference on documents of any length: sorted by length, padded to a few bucket lengths,
one compilation per bucket, results in the order of the documents.

Axes: B batch, C choices, T tokens.
"""

import collections
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lsg_flax.buckets import default_buckets as default_buckets
from lsg_flax.inference.lines import Document, ResumableLines, Unfinished, json_line
from lsg_flax.models import Model, Params
from lsg_flax.sharding import batch_shardings, shard, shard_batch

IN_FLIGHT = 2  # batches that the device has been given while one before them is fetched
_PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits", "prediction_logits")
_PER_TOKEN_LOGITS = ("masked_lm", "causal_lm", "token_classification")  # tasks

Encoding = dict[str, Any]
Result = dict[str, np.ndarray]
Select = Callable[[dict[str, jax.Array], dict[str, jax.Array]], dict[str, jax.Array]]


def outputs_of(
    model: Model, params: Params, batch: dict[str, Any], fields: tuple[str, ...] | None
) -> dict[str, jax.Array]:
    """The outputs of these names, or all; raises ValueError for one that the task does not have."""
    output = vars(model.apply({"params": params}, **batch))
    given = [name for name, value in output.items() if value is not None]
    wanted = fields or tuple(given)
    if not set(wanted) <= set(given):
        raise ValueError(
            f"fields={fields} are not all outputs of task={model.task!r}; it has "
            f"{', '.join(given)}."
        )
    return {name: output[name] for name in wanted}


class _Program:
    """The jitted model; tracing happens once per compilation, which is how they are counted."""

    def __init__(
        self,
        model: Model,
        fields: tuple[str, ...] | None,
        select: Select | None,
        mesh: Mesh | None,
    ):
        self.compilations, self.mesh = 0, mesh

        def apply(params: Params, batch: dict[str, Any]) -> dict[str, jax.Array]:
            self.compilations += 1
            chosen = outputs_of(model, params, batch, fields)
            return select(chosen, batch) if select else chosen

        self._apply = jax.jit(apply)

    def start(self, params: Params, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Gives a batch to the device; the outputs come to the host as soon as they are there."""
        if self.mesh is None:
            outputs = self._apply(params, batch)
        else:
            with jax.set_mesh(self.mesh):
                outputs = self._apply(params, shard_batch(batch, self.mesh))
        for value in outputs.values():
            value.copy_to_host_async()
        return outputs


_program: Any = functools.lru_cache(maxsize=16)(_Program)


class _Batch(NamedTuple):
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

        Raises:
            ValueError: for a batch size or buckets that the model or the mesh does not allow.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        limit = model.max_length
        buckets = default_buckets(limit) if buckets is None else tuple(sorted(set(buckets)))
        if not buckets or buckets[0] < 1 or buckets[-1] > limit:
            raise ValueError(
                f"buckets={buckets} must be lengths in 1..{limit}, what this checkpoint reads."
            )
        if mesh is not None:
            _check_mesh(mesh, model, batch_size, buckets)
        self.model = model
        self.params = jax.device_put(params) if mesh is None else shard(params, mesh)
        self.batch_size, self.buckets = batch_size, buckets
        self._fields = None if fields is None else tuple(fields)
        self._program = _program(model, self._fields, select, mesh)

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
        with tqdm(total=len(encodings), unit="document", disable=not progress) as bar:
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
        yield from self._stream(self._checked(windows), tqdm(disable=True))

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
        """Raises for a document that cannot be read; values cannot be checked under jit.

        Args:
            name: what messages call it.
            like: another document, which has the same fields.

        Raises:
            ValueError: as the call.
        """
        config, longest = self.model.config, self.buckets[-1]
        tables = {
            "input_ids": ("vocab_size", config.vocab_size),
            "attention_mask": ("what a mask may say", 2),
            "token_type_ids": ("type_vocab_size", config.type_vocab_size),
        }
        unknown = sorted(encoding.keys() - tables.keys())
        if unknown or "input_ids" not in encoding or encoding.keys() != like.keys():
            raise ValueError(
                f"{name} has the fields {sorted(encoding)} and the first one has {sorted(like)}; "
                f"all need input_ids and the same of {sorted(tables)}."
            )
        choices = _choices(encoding["input_ids"], self.model)
        if len(choices) != len(_choices(like["input_ids"], self.model)):
            raise ValueError(f"{name} has {len(choices)} choices, unlike the first one.")
        for field in encoding:
            rows = _choices(encoding[field], self.model)
            _check_rows(name, field, rows, list(map(len, choices)), *tables[field])
        length = max(map(len, choices))
        if length > longest:
            raise ValueError(
                f"{name} has {length} tokens, more than {longest}, the longest bucket; "
                "truncate it (truncation=True, max_length=...), or make a checkpoint that reads "
                "more: lsg_flax.convert_checkpoint(source, target, "
                f"max_sequence_length={length})."
            )

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

    def _stream(self, windows: Iterable[Sequence[Encoding]], bar: tqdm) -> Iterator[list[Result]]:
        flying: collections.deque[_Batch] = collections.deque()
        for batch in self._start(windows):
            flying.append(batch)
            if len(flying) > IN_FLIGHT:
                yield from self._finish(flying.popleft(), bar)
        while flying:
            yield from self._finish(flying.popleft(), bar)

    def _start(self, windows: Iterable[Sequence[Encoding]]) -> Iterator[_Batch]:
        for encodings in windows:
            results: list[Result] = [{} for _ in encodings]
            batches = list(self._batches(encodings))
            for number, (bucket, places) in enumerate(batches, start=1):
                arrays = self._pad([encodings[i] for i in places], bucket)
                outputs = self._program.start(self.params, arrays)
                yield _Batch(encodings, results, places, outputs, number == len(batches))

    def _finish(self, batch: _Batch, bar: tqdm) -> Iterator[list[Result]]:
        """Fetches a batch; yields the results of its window if it was the last one."""
        outputs = jax.device_get(batch.outputs)
        for row, place in enumerate(batch.places):
            length = len(batch.encodings[place]["input_ids"])
            batch.results[place] = {
                name: value[row, :length].copy() if self._per_token(name) else value[row].copy()
                for name, value in outputs.items()
            }
        bar.update(len(batch.places))
        if batch.last:
            yield batch.results

    def _per_token(self, name: str) -> bool:
        return name in _PER_TOKEN or (name == "logits" and self.model.task in _PER_TOKEN_LOGITS)

    def _batches(self, encodings: Sequence[Encoding]) -> Iterator[tuple[int, list[int]]]:
        """Bucket and places of the documents of each batch; the longest first, so that a lack of
        memory shows at once."""
        lengths = [max(map(len, _choices(e["input_ids"], self.model))) for e in encodings]
        waiting: dict[int, list[int]] = {bucket: [] for bucket in reversed(self.buckets)}
        for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            waiting[min(b for b in self.buckets if b >= lengths[place])].append(place)
        for bucket, places in waiting.items():
            for start in range(0, len(places), self.batch_size):
                yield bucket, places[start : start + self.batch_size]

    def _pad(self, encodings: list[Encoding], bucket: int) -> dict[str, np.ndarray]:
        """Arrays [B, T] ([B, C, T] for choices) of a whole batch; what fills it up is masked."""
        fill = {"input_ids": self.model.config.pad_token_id or 0}
        choices = len(_choices(encodings[0]["input_ids"], self.model))
        arrays = {
            name: np.full((self.batch_size, choices, bucket), fill.get(name, 0), np.int32)
            for name in sorted(encodings[0].keys() | {"attention_mask"})
        }
        for row, encoding in enumerate(encodings):
            for name, array in arrays.items():
                given = encoding.get(name)  # only the mask may be missing
                for choice, ids in enumerate(_choices(encoding["input_ids"], self.model)):
                    tokens = 1 if given is None else _choices(given, self.model)[choice]
                    array[row, choice, : len(ids)] = tokens
        if self.model.task == "multiple_choice":
            return arrays
        return {name: array[:, 0] for name, array in arrays.items()}


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
    these are.

    Returns:
        One dict per document of the task's outputs by Hugging Face's names, numpy arrays without
        the batch axis.

    Raises:
        ValueError: as `Predictor` and its call.
    """
    predictor = Predictor(
        model, params, batch_size=batch_size, buckets=buckets, fields=fields, mesh=mesh
    )
    return list(predictor(encodings, progress=progress))


def predict_to_jsonl(
    path: str | os.PathLike,
    model: Model,
    params: Params,
    encodings: Sequence[Encoding],
    *,
    ids: Sequence[Any] | None = None,
    batch_size: int = 8,
    buckets: Sequence[int] | None = None,
    fields: Sequence[str] | None = None,
    mesh: Mesh | None = None,
    window: int = 2048,
    unfinished: Unfinished = "continue",
    progress: bool = True,
) -> None:
    """Writes one line of JSON per document, in order: its `id` and the outputs.

    The file gets its name when it is complete; before that nothing is at `path` or the old file,
    and finished windows are in `path` + ".partial", where the same call continues after a kill.

    Args:
        ids: names of the documents; 0, 1, ... by default.
        window: documents sorted and held in memory together, and written together.
        unfinished: what to do with a partial file: continue it, or "replace" it.

    Raises:
        ValueError: as `predict`, for another number of ids than documents, for an output that is
            not finite, which JSON cannot say (its document is named), and for the partial file of
            another model or other documents.
        OSError: if the file cannot be written; what is finished is kept.
    """
    names = list(range(len(encodings))) if ids is None else list(ids)
    if len(names) != len(encodings):
        raise ValueError(f"{len(names)} ids for {len(encodings)} documents; give one each.")
    predictor = Predictor(
        model, params, batch_size=batch_size, buckets=buckets, fields=fields, mesh=mesh
    )
    for place, encoding in enumerate(encodings):
        predictor.check(f"document {place}", encoding, like=encodings[0])
    documents = (
        Document(name, json_line([name, encoding]).encode(), f"document {place}", encoding)
        for place, (name, encoding) in enumerate(zip(names, encodings, strict=True))
    )
    with (
        ResumableLines(path, predictor.settings(), unfinished=unfinished) as file,
        tqdm(total=len(names), initial=file.finished, unit="document", disable=not progress) as bar,
    ):
        predict_lines(
            file,
            predictor,
            documents,
            rows_of=lambda document: [(document.content, None)],
            line_of=lambda document, _, results: output_line(document, results[0]),
            window=window,
            bar=bar,
        )


def predict_lines(
    file: ResumableLines,
    predictor: Predictor,
    documents: Iterator[Document],
    *,
    rows_of: Callable[[Document], Sequence[tuple[Encoding, Any]]],
    line_of: Callable[[Document, Any, list[Result]], str],
    window: int,
    bar: tqdm,
) -> None:
    """Writes the lines of the documents that are not finished, while the device works on what
    follows.

    Args:
        file: opened.
        rows_of: the rows for the model that a document takes, and what else is known of each.
        line_of: the line of a document, its rows and their results.
        window: documents sorted, held in memory and written together.

    Raises:
        ValueError: if the finished documents are others, and as `Predictor.stream`.
        OSError: as `ResumableLines.write`.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1.")
    file.skip(documents)
    parts, waiting = itertools.tee(
        (part, [rows_of(document) for document in part]) for part in _windows(documents, window)
    )
    outputs = predictor.stream([row[0] for rows in several for row in rows] for _, several in parts)
    for (part, several), window_results in zip(waiting, outputs, strict=True):
        results = iter(window_results)
        lines = [
            line_of(document, rows, list(itertools.islice(results, len(rows))))
            for document, rows in zip(part, several, strict=True)
        ]
        file.write(part, lines)
        bar.update(len(part))


def _windows(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Lists of `size` neighbours."""
    documents = iter(documents)
    while part := list(itertools.islice(documents, size)):
        yield part


def output_line(document: Document, result: Result) -> str:
    """The id and the outputs as JSON; raises ValueError if they are not finite."""
    broken = [field for field, value in result.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{document.place}: {broken} are not finite (id {document.name!r}).")
    return json_line({"id": document.name} | {f: np.float32(v) for f, v in result.items()})


def _digest(params: Params) -> str:
    """Of paths, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _choices(values: Sequence, model: Model) -> Sequence[Sequence[int]]:
    """One list of tokens per choice; a document of another task has one."""
    return values if model.task == "multiple_choice" else [values]


def _check_mesh(mesh: Mesh, model: Model, batch_size: int, buckets: Sequence[int]) -> None:
    """Raises for what the mesh cannot cut, and for one over several processes."""
    shards = mesh.shape["sequence"]
    if {device.process_index for device in mesh.devices.flat} != {jax.process_index()}:
        raise ValueError(
            "the mesh has devices of other processes; give each process its own documents and a "
            "mesh of its own devices: make_mesh(..., devices=jax.local_devices())."
        )
    for bucket in buckets:
        batch_shardings({"input_ids": jax.ShapeDtypeStruct((batch_size, bucket), np.int32)}, mesh)
        if shards > 1 and model.config.lsg:
            model.config.lsg.needs_padding(bucket, shards)


def _check_rows(place: str, name: str, rows, lengths: list[int], field: str, limit: int) -> None:
    given = list(map(len, rows))
    if given != lengths or 0 in lengths:
        raise ValueError(
            f"{place} has {given} {name} and {lengths} input_ids; they must be as many, at least 1."
        )
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= limit:
        raise ValueError(
            f"{place} has {name} in {low}..{high}, but {field}={limit} allows 0..{limit - 1}; do "
            "tokenizer and checkpoint belong together?"
        )
