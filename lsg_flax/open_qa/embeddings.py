"""Computes the embeddings of all blocks of a corpus, in windows, into a safetensors file; an
interrupted run can resume.

Axes: B batch, D model width (here of the projection).
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from lsg_flax.buckets import default_buckets
from lsg_flax.checks import require
from lsg_flax.files import check_file, differences, sync_folder
from lsg_flax.hub import Tokenizer
from lsg_flax.inference import Predictor
from lsg_flax.locks import locked_file, refusals
from lsg_flax.models import Model, Params
from lsg_flax.open_qa.pairs import checked_config
from lsg_flax.open_qa.records import Records
from lsg_flax.open_qa.search import Stored
from lsg_flax.progress import Bar

BLOCK_EMBEDDINGS = "block_emb"  # the tensor's name
WINDOW = 1024  # blocks embedded and written together; a kill loses at most one window
_BUCKETS = (32, 64, 128, 256)  # in tokens; blocks of Wikipedia have at most 288
_OURS = "lsg_flax"  # key in the file's metadata

Embed = Callable[[Sequence[str]], Float[np.ndarray, "B D"]]


class BlockEmbedder:
    """Computes embeddings of texts with a model of the task "embedder" (transformers'
    RealmEmbedder): [CLS] text [SEP], truncated to what the model reads.

    Attributes:
        width: number of features of an embedding.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 32,
        mesh: Mesh | None = None,
    ):
        """Prepares the model; batch_size and mesh are those of `inference.Predictor`.

        Raises:
            ValueError: for another task, a tokenizer of another vocabulary, and as `Predictor`.
        """
        config = checked_config(model, "embedder", tokenizer)
        self._tokenizer, self.width = tokenizer, config.retriever_proj_size
        options = {"batch_size": batch_size, "fields": ("projected_score",), "mesh": mesh}
        buckets = default_buckets(model.max_length, *_BUCKETS)
        self._predictor = Predictor(model, params, buckets=buckets, **options)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "B D"]:
        """Returns the embedding of each text, [texts, D], float32."""
        length = self._predictor.buckets[-1]
        encoded = self._tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
        results = self._predictor([{"input_ids": ids} for ids in encoded], progress=False)
        return np.stack([result["projected_score"] for result in results]).astype(np.float32)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that decide the embeddings, as JSON values."""
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        digest = hashlib.sha256(vocabulary.encode()).hexdigest()
        batch = {"vocabulary": digest, "batch_size": self._predictor.batch_size}
        return self._predictor.settings() | batch


def embed_blocks(
    target: str | os.PathLike,
    records: Records,
    embed: Embed,
    *,
    width: int,
    settings: dict[str, Any],
    window: int = WINDOW,
    progress: bool = True,
) -> int:
    """Writes the embeddings of all blocks as the tensor `block_emb`, [blocks, D], float32, of a
    safetensors file.

    Finished windows are written to `target` + ".partial", which is renamed when it is complete. The
    same call resumes there after a kill, and writes the same bytes as an uninterrupted run. A
    complete target is not changed.

    Args:
        target: the file to write.
        records: the blocks.
        embed: returns embeddings of texts, such as a `BlockEmbedder` or a `pipelines.Embedder`'s
            `embed`.
        width: number of features of an embedding.
        settings: everything that decides the results of `embed`, as JSON values; stored in the
            file.
        window: number of blocks embedded and written together.
        progress: whether to show a progress bar.

    Returns:
        How many blocks this call has embedded.

    Raises:
        ValueError: for embeddings that have another shape or are not finite, and for a partial
            file of other settings or records; the message says what differs.
        OSError: if it cannot be written, or another process is writing it; finished windows are
            kept.
    """
    target, settings = check_file(target), settings | {"window": window, "records": _sum(records)}
    header, row = _header(len(records), width, settings), 4 * width
    partial = target.with_name(f"{target.name}.partial")
    with locked_file(target), refusals(target):
        if _header_of(target) == header:
            return 0
        _begin(partial, header, settings)
        # The last window is computed again: after a power failure it may not be on the disk.
        windows = (partial.stat().st_size - len(header)) // (row * window)
        first = max(windows - 1, 0) * window
        bar = Bar("blocks", total=len(records), initial=first, shown=progress)
        with partial.open("r+b") as opened, bar:
            opened.truncate(len(header) + first * row)
            opened.seek(0, os.SEEK_END)
            for start in range(first, len(records), window):
                numbers = range(start, min(start + window, len(records)))
                opened.write(_checked(embed(records.texts(numbers)), numbers, width).tobytes())
                opened.flush()
                os.fsync(opened.fileno())
                bar.update(len(numbers))
        os.replace(partial, target)
        sync_folder(target.parent)
    return len(records) - first


def write_embeddings(file: pathlib.Path, embeddings: Stored) -> None:
    """Writes the file of `embed_blocks` from existing embeddings, part by part."""
    count, width = map(int, embeddings.shape)
    with file.open("wb") as opened:
        opened.write(_header(count, width, {}))
        for start in range(0, count, WINDOW):
            part = np.asarray(embeddings[start : min(start + WINDOW, count)])
            opened.write(part.astype("<f4").tobytes())


def _checked(vectors: Any, numbers: range, width: int) -> Float[np.ndarray, "B D"]:
    vectors, wanted = np.asarray(vectors, "<f4"), (len(numbers), width)
    require(vectors.shape == wanted, f"embed returned {vectors.shape}, but must return {wanted}.")
    broken = [n for n, v in zip(numbers, vectors, strict=True) if not np.isfinite(v).all()]
    require(
        not broken,
        f"the embeddings of blocks {broken[:10]} are not finite; check the embedder's parameters.",
    )
    return vectors


def _header(count: int, width: int, settings: dict[str, Any]) -> bytes:
    """Returns the start of a safetensors file with one tensor: the length of its JSON, and the
    JSON, padded with spaces to a multiple of eight bytes."""
    tensor = {"dtype": "F32", "shape": [count, width], "data_offsets": [0, count * width * 4]}
    metadata = {"format": "pt", _OURS: json.dumps(settings)}
    text = json.dumps({"__metadata__": metadata, BLOCK_EMBEDDINGS: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_of(file: pathlib.Path) -> bytes:
    if not file.exists():
        return b""
    with file.open("rb") as opened:
        length = opened.read(8)
        return length + opened.read(min(int.from_bytes(length, "little"), file.stat().st_size))


def _begin(partial: pathlib.Path, header: bytes, settings: dict[str, Any]) -> None:
    """Writes the header if it is missing; raises ValueError if the file is of another run."""
    there = _header_of(partial)
    if there != header and header.startswith(there):  # an empty file, or killed within its header
        partial.write_bytes(header)
    elif there != header:
        try:
            before = json.loads(json.loads(there[8:])["__metadata__"][_OURS])
        except (ValueError, KeyError):
            before = {}
        changes = differences(before, json.loads(json.dumps(settings)))
        told = "; ".join(f"{path} was {was!r} and is {now!r}" for path, was, now in changes)
        raise ValueError(
            f"{partial} belongs to another run ({told or 'the shape of its embeddings differs'}). "
            "Give the settings and blocks of that run, or remove the file to start over."
        )


def _sum(records: Records) -> str:
    digest = hashlib.sha256()
    for value in records.values:
        digest.update(len(value).to_bytes(8, "little") + bytes(value))
    return digest.hexdigest()
