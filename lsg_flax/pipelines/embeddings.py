"""Embeddings of sentences and documents: pools the states of a text's tokens to one vector; reads
and writes sentence-transformers' folders.

Axes: B batch, T tokens, D model width.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float

from lsg_flax import hub
from lsg_flax.buckets import default_buckets
from lsg_flax.data import KINDS, cut_of
from lsg_flax.files import file_aside, valid_text
from lsg_flax.hub import SentenceSettings, Tokenizer
from lsg_flax.inference import Predictor
from lsg_flax.locks import holds, locked_file
from lsg_flax.models import Model, Params, Pooling, check_pooling
from lsg_flax.models import pool as pool
from lsg_flax.pipelines.broken import BrokenLines, warn_of_skipped
from lsg_flax.pipelines.documents import DocumentFile, Documents
from lsg_flax.pipelines.tasks import check_max_length
from lsg_flax.progress import say

TEXTS, VECTORS = KINDS, (".npy", ".jsonl")
_SHORT_BUCKETS = (32, 128)  # for sentences and queries; those of inference start at 512


@dataclasses.dataclass(frozen=True)
class _Pooled:
    """The `select` of a `Predictor`: returns the embeddings [B, D] instead of all states."""

    pooling: Pooling
    normalize: bool

    def __call__(
        self, outputs: dict[str, Array], batch: dict[str, Array]
    ) -> dict[str, Float[Array, "B D"]]:
        states, mask = outputs["last_hidden_state"], batch["attention_mask"]
        return {"embedding": pool(states, mask, self.pooling, normalize=self.normalize)}


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """Computes embeddings of texts, as sentence-transformers' SentenceTransformer.

    Attributes:
        model, params: a model of the task "base" and its parameters.
        tokenizer: a tokenizer of transformers.
        pooling: "mean", "cls", "max" or "global": how states are pooled, see
            `lsg_flax.models.pool`.
        normalize: whether vectors are scaled to length 1.
        max_length: number of tokens to which texts are truncated.
        do_lower_case: whether texts are lower-cased before the tokenizer sees them.
        source: the checkpoint it was loaded from, whose other files are saved too.

    Raises:
        ValueError: for parts that do not fit together.
    """

    model: Model
    params: Params
    tokenizer: Tokenizer
    pooling: Pooling
    normalize: bool
    max_length: int
    do_lower_case: bool = False
    source: hub.Checkpoint | None = None

    def __post_init__(self):
        """Checks that the parts fit together."""
        if self.model.task != "base":
            raise ValueError(f"the model's task is {self.model.task!r}; load it with task='base'.")
        check_pooling(self.pooling, self.model.config)
        check_max_length(self.model, self.max_length)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        dtype: Dtype = jnp.float32,
    ) -> "Embedder":
        """Loads a sentence-transformers checkpoint, or, if `pooling` is given, any checkpoint with
        a tokenizer.

        Args:
            path: folder or hub id.
            pooling, normalize, max_length: replace the settings of the folder (max_length is in
                tokens). If neither has them, vectors are not normalized, and texts are truncated
                where model and tokenizer require it.
            dtype: of the model's computation; vectors are always float32.

        Raises:
            FileNotFoundError: if there is no checkpoint or no tokenizer.
            ValueError: for modules other than Transformer, Pooling and Normalize, settings that are
                not supported or do not fit, and as `lsg_flax.from_pretrained`.
        """
        checkpoint = hub.open_checkpoint(path)
        stored = hub.read_sentence_settings(checkpoint.root, checkpoint.modules, pooling)
        with warnings.catch_warnings():  # a missing pooler does not matter: it is not used
            warnings.filterwarnings("ignore", "weights for task='base' not in the checkpoint")
            model, params = checkpoint.load("base", dtype=dtype)
        tokenizer = checkpoint.tokenizer
        if tokenizer is None:
            raise FileNotFoundError(f"{checkpoint.folder} has no tokenizer; copy its files there.")
        allowed = min(model.max_length, tokenizer.model_max_length)
        given = stored.max_length if max_length is None else max_length
        return cls(
            model,
            params,
            tokenizer,
            stored.pooling,
            stored.normalize if normalize is None else normalize,
            allowed if given is None else given,
            stored.do_lower_case,
            checkpoint,
        )

    def embed(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 8,
        buckets: Sequence[int] | None = None,
        progress: bool = True,
    ) -> Float[np.ndarray, "B D"]:
        """Returns the embedding of each text, [texts, D], in order, float32.

        Texts are truncated to `max_length` tokens, sorted by length and padded to a few lengths,
        with one compilation each (see `inference.Predictor`). An empty text has the tokenizer's
        special tokens, as in sentence-transformers; if there are none, its vector is zero.

        Args:
            texts: a list of strings.
            batch_size: texts per batch.
            buckets: lengths in tokens to pad to; by default 32, 128 and powers of two from 512.
            progress: whether to show a progress bar.

        Raises:
            ValueError: for values that are not strings, and as `Predictor`.
        """
        limit = self.max_length
        predictor = Predictor(
            self.model,
            self.params,
            batch_size=batch_size,
            buckets=default_buckets(limit, *_SHORT_BUCKETS) if buckets is None else buckets,
            fields=("last_hidden_state",),
            select=_Pooled(self.pooling, self.normalize),
        )
        results = predictor(self._encode(texts, progress), progress=progress)
        vectors = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        for place, result in enumerate(results):
            vectors[place] = result["embedding"]
        return vectors

    def _encode(self, texts: Sequence[str], progress: bool) -> list[dict[str, list[int]]]:
        wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if isinstance(texts, str) or wrong is not None:
            found = "one string" if wrong is None else f"a {type(texts[wrong]).__name__} at {wrong}"
            raise ValueError(f"texts must be a list of strings, got {found}.")
        for place, text in enumerate(texts):
            try:
                valid_text(text)
            except ValueError as error:
                raise ValueError(f"text {place}: {error}.") from error
        if not texts:
            return []
        encoded = self.tokenizer(
            [self._cleaned(text) for text in texts],
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        words = cut_of(encoded.encodings).words(self.max_length)
        if progress and words:
            say(words)
        nothing = {"input_ids": [self.model.config.filler], "attention_mask": [0]}
        return [
            {"input_ids": i, "attention_mask": [1] * len(i)} if i else nothing
            for i in encoded["input_ids"]
        ]

    def _cleaned(self, text: str) -> str:
        return text.strip().lower() if self.do_lower_case else text.strip()

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes model, tokenizer and sentence-transformers' files; if anything fails, nothing is
        written. "global" is written as sentence-transformers' name for the first token.

        Raises:
            OSError: if the files cannot be written.
        """
        settings = SentenceSettings(
            self.pooling, self.normalize, self.max_length, self.do_lower_case
        )
        parts = self.model, self.params, self.tokenizer
        hub.save_sentence_model(path, *parts, settings, source=self.source)


class TextLines(NamedTuple):
    """The texts of a file, each with its id and, for messages, its FILE:NUMBER."""

    names: list[Any]
    texts: list[str]
    places: list[str]


def read_texts(
    source: Documents,
    *,
    broken_lines: BrokenLines = "raise",
    skippable: bool = True,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> TextLines:
    """Reads ids and texts of all documents; the arguments are those of `DocumentFile`.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it has other contents.
    """
    how = {"broken_lines": broken_lines, "skippable": skippable, "columns": columns}
    documents = DocumentFile(source, **how)
    found = TextLines([], [], [])
    for document in documents:
        if "text" not in document.content:
            error = ValueError(f'it has {sorted(document.content)} and must have a "text"')
            documents.leave_out(document.place, error)
            continue
        found.names.append(document.name)
        found.texts.append(document.content["text"])
        found.places.append(document.place)
    warn_of_skipped(documents.skipped, documents.name)
    return found


def write_vectors(
    file: str | os.PathLike, names: Sequence[Any], vectors: Float[np.ndarray, "B D"]
) -> None:
    """Writes the array as .npy, or one object with "id" and "embedding" per line as .jsonl.

    A temporary file is renamed when it is complete.

    Raises:
        ValueError: for another kind of file, or vectors that are not finite.
        OSError: if it cannot be written, or another process is writing it.
    """
    file = check_suffix(file, VECTORS)
    broken = [n for n, vector in zip(names, vectors, strict=True) if not np.isfinite(vector).all()]
    if broken:
        raise ValueError(f"the vectors of {broken[:10]} are not finite.")
    lock = contextlib.nullcontext() if holds(file) else locked_file(file)
    with lock, file_aside(file) as aside, aside.open("wb") as opened:
        if file.suffix == ".npy":
            np.save(opened, vectors)
            return
        for name, vector in zip(names, vectors, strict=True):
            line = json.dumps({"id": name, "embedding": vector.tolist()})
            opened.write(f"{line}\n".encode())


def check_suffix(file: str | os.PathLike, suffixes: tuple[str, ...]) -> pathlib.Path:
    """Returns the path; raises ValueError unless it ends in one of `suffixes`."""
    if pathlib.Path(file).suffix not in suffixes:
        raise ValueError(f"{file} must end in {' or '.join(suffixes)}.")
    return pathlib.Path(file)
