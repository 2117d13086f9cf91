"""Batched inference on documents of any length: sorted by length, padded to a few bucket lengths,
one compilation per bucket, results in the order of the documents.

Axes: B batch, C choices, T tokens.
"""

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lsg_flax.convert_from_torch import Params
from lsg_flax.models.model import Model

SHORTEST_BUCKET = 512
_PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits", "prediction_logits")
_PER_TOKEN_LOGITS = ("masked_lm", "causal_lm", "token_classification")  # tasks

Encoding = dict[str, Any]
Result = dict[str, np.ndarray]
Select = Callable[[dict[str, jax.Array], dict[str, jax.Array]], dict[str, jax.Array]]


class _Program:
    """The jitted model; tracing happens once per compilation, which is how they are counted."""

    def __init__(self, model: Model, fields: tuple[str, ...] | None, select: Select | None):
        self.compilations = 0

        def apply(params: Params, batch: dict[str, Any]) -> dict[str, jax.Array]:
            self.compilations += 1
            output = vars(model.apply({"params": params}, **batch))
            given = [name for name, value in output.items() if value is not None]
            wanted = fields or tuple(given)
            if not set(wanted) <= set(given):
                raise ValueError(
                    f"fields={fields} are not all outputs of task={model.task!r}; it has "
                    f"{', '.join(given)}."
                )
            chosen = {name: output[name] for name in wanted}
            return select(chosen, batch) if select else chosen

        self.apply = jax.jit(apply)


_program: Any = functools.lru_cache(maxsize=16)(_Program)


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

        Raises:
            ValueError: for a batch size or buckets that the model does not allow.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        limit = model.max_length
        buckets = default_buckets(limit) if buckets is None else tuple(sorted(set(buckets)))
        if not buckets or buckets[0] < 1 or buckets[-1] > limit:
            raise ValueError(
                f"buckets={buckets} must be lengths in 1..{limit}, what this checkpoint reads."
            )
        self.model, self.params = model, jax.device_put(params)
        self.batch_size, self.buckets = batch_size, buckets
        self._program = _program(model, None if fields is None else tuple(fields), select)

    @property
    def compilations(self) -> int:
        """How often this model was compiled for these fields: once per bucket and batch size,
        shared by all predictors."""
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
        _check_encodings(encodings, self.model, self.buckets[-1])
        window = window or max(len(encodings), 1)
        with tqdm(total=len(encodings), unit="document", disable=not progress) as bar:
            for start in range(0, len(encodings), window):
                yield from self._run(encodings[start : start + window], bar)

    def _run(self, encodings: Sequence[Encoding], bar: tqdm) -> list[Result]:
        results: list[Result] = [{} for _ in encodings]
        for bucket, places in self._batches(encodings):
            batch = self._pad([encodings[i] for i in places], bucket)
            outputs = jax.device_get(self._program.apply(self.params, batch))
            for row, place in enumerate(places):
                length = len(encodings[place]["input_ids"])
                results[place] = {
                    name: value[row, :length].copy() if self._per_token(name) else value[row].copy()
                    for name, value in outputs.items()
                }
            bar.update(len(places))
        return results

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
    progress: bool = True,
) -> list[Result]:
    """The outputs of each document, in order and without padding, by a `Predictor`.

    Returns:
        One dict per document of the task's outputs by Hugging Face's names, numpy arrays without
        the batch axis.

    Raises:
        ValueError: as `Predictor` and its call.
    """
    predictor = Predictor(model, params, batch_size=batch_size, buckets=buckets, fields=fields)
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
    window: int = 2048,
    progress: bool = True,
) -> None:
    """Writes one line of JSON per document, in order: its `id` and the outputs.

    The file gets its name when it is complete; before that nothing is at `path` or the old file.

    Args:
        ids: names of the documents; 0, 1, ... by default.
        window: documents sorted and held in memory together.

    Raises:
        ValueError: as `predict`, for another number of ids than documents, and for an output that
            is not finite, which JSON cannot say; its document is named.
    """
    names = list(range(len(encodings))) if ids is None else list(ids)
    if len(names) != len(encodings):
        raise ValueError(f"{len(names)} ids for {len(encodings)} documents; give one each.")
    predictor = Predictor(model, params, batch_size=batch_size, buckets=buckets, fields=fields)
    with _written_whole(pathlib.Path(path)) as file:
        results = predictor(encodings, window=window, progress=progress)
        for name, result in zip(names, results, strict=True):
            broken = [field for field, value in result.items() if not np.isfinite(value).all()]
            if broken:
                raise ValueError(f"document {name!r}: {broken} are not finite.")
            values = {field: value.astype(np.float32).tolist() for field, value in result.items()}
            file.write(json.dumps({"id": name} | values) + "\n")


def default_buckets(limit: int) -> tuple[int, ...]:
    """Powers of two from 512 up to `limit`, and `limit` itself."""
    lengths = [SHORTEST_BUCKET]
    while lengths[-1] < limit:
        lengths.append(2 * lengths[-1])
    return (*(length for length in lengths if length < limit), limit)


def _choices(values: Sequence, model: Model) -> Sequence[Sequence[int]]:
    """One list of tokens per choice; a document of another task has one."""
    return values if model.task == "multiple_choice" else [values]


def _check_encodings(encodings: Sequence[Encoding], model: Model, longest: int) -> None:
    """Raises for the first document that cannot be read; values cannot be checked under jit."""
    tables = {
        "input_ids": ("vocab_size", model.config.vocab_size),
        "attention_mask": ("what a mask may say", 2),
        "token_type_ids": ("type_vocab_size", model.config.type_vocab_size),
    }
    for place, encoding in enumerate(encodings):
        unknown = sorted(encoding.keys() - tables.keys())
        if unknown or "input_ids" not in encoding or encoding.keys() != encodings[0].keys():
            raise ValueError(
                f"document {place} has the fields {sorted(encoding)} and document 0 has "
                f"{sorted(encodings[0])}; all need input_ids and the same of {sorted(tables)}."
            )
        choices = _choices(encoding["input_ids"], model)
        if len(choices) != len(_choices(encodings[0]["input_ids"], model)):
            raise ValueError(f"document {place} has {len(choices)} choices, unlike document 0.")
        for name, (field, limit) in tables.items():
            if name in encoding:
                rows = _choices(encoding[name], model)
                _check_rows(f"document {place}", name, rows, list(map(len, choices)), field, limit)
        length = max(map(len, choices))
        if length > longest:
            raise ValueError(
                f"document {place} has {length} tokens, more than {longest}, the longest bucket; "
                "truncate it (truncation=True, max_length=...), or make a checkpoint that reads "
                "more: lsg_flax.convert_checkpoint(source, target, "
                f"max_sequence_length={length})."
            )


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


@contextlib.contextmanager
def _written_whole(path: pathlib.Path) -> Iterator[Any]:
    """A text file that gets its name at the end, if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
