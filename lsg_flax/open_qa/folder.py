"""Writes folders of an OpenQA, in the format of transformers' RealmForOpenQA, and makes them from a
corpus.

The weights are safetensors in two parts. The second is the index, which may exceed the memory.
"""

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from lsg_flax import hub
from lsg_flax.checks import require
from lsg_flax.files import check_folder, save_tensors, write_json, written_aside
from lsg_flax.hub import Tokenizer
from lsg_flax.locks import locked
from lsg_flax.open_qa import embeddings
from lsg_flax.open_qa.embeddings import BLOCK_EMBEDDINGS, BlockEmbedder, embed_blocks
from lsg_flax.open_qa.records import BLOCK_RECORDS, Records, write_records

_MODELS, _INDEX = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
_STAGED = "block_emb.safetensors"  # the index, until all other files are written


class OpenQAParts(NamedTuple):
    """The contents of a folder beside the embeddings: tensors of embedder and reader by their names
    in PyTorch's whole model, the fields of config.json, tokenizer and records."""

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: Tokenizer
    records: Records


def write_folder(
    folder: str | os.PathLike, parts: OpenQAParts, write_index: Callable[[pathlib.Path], Any]
) -> None:
    """Writes all files of a folder; if anything fails, nothing is written.

    Raises:
        ValueError: if the folder holds another model's weights, which would be read instead.
        OSError: if another process writes there, or nothing can be written.
    """
    folder = pathlib.Path(folder)
    stale = [name for name in (hub.WEIGHTS, hub.BIN) if (folder / name).exists()]
    require(
        not stale,
        f"{folder} holds {stale}, which would be read in place of the new weights; give another "
        "folder, or remove that model first.",
    )
    config = {"architectures": ["RealmForOpenQA"], "num_block_records": len(parts.records)}
    places = dict.fromkeys(parts.tensors, _MODELS) | {BLOCK_EMBEDDINGS: _INDEX}
    with written_aside(folder) as aside:
        save_tensors(aside / _MODELS, parts.tensors, {"format": "pt"})
        write_index(aside / _INDEX)
        write_records(aside / BLOCK_RECORDS, parts.records)
        hub.save_tokenizer(parts.tokenizer, aside)
        size = sum((aside / name).stat().st_size for name in (_MODELS, _INDEX))
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_json(aside, {hub.INDEX: index, hub.CONFIG: parts.config | config})


def build_index(
    model: str | os.PathLike,
    records: Records,
    folder: str | os.PathLike,
    *,
    keep_embeddings: bool = False,
    batch_size: int = 32,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> int:
    """Makes a folder for `OpenQA.from_pretrained`, with the models and tokenizer of another folder,
    the blocks of a corpus and their embeddings. After a kill the same call resumes.

    Args:
        model: folder or hub id of a RealmForOpenQA, with or without an index.
        records: the blocks.
        folder: the folder to write.
        keep_embeddings: whether to keep the embeddings of `model` instead of computing new ones.
        batch_size, mesh: as in `inference.Predictor`.
        progress: whether to show a progress bar.

    Returns:
        How many blocks this call has embedded.

    Raises:
        FileNotFoundError: if there is no checkpoint or no tokenizer.
        ValueError: if it lacks embedder or reader, if the embeddings to keep are of another number
            of blocks, and as `embed_blocks` and `write_folder`.
        OSError: if another process writes there, or nothing can be written.
    """
    check_folder("folder", folder)
    checkpoint, folder = hub.open_checkpoint(model), pathlib.Path(folder)
    tensors, tokenizer = dict(checkpoint.tensors), checkpoint.tokenizer
    kept: Any = tensors.pop(BLOCK_EMBEDDINGS, np.zeros((0, 0)))
    beginnings = {name.split(".")[0] for name in tensors}
    require(
        beginnings == {"embedder", "reader"},
        f"{model} has tensors of {sorted(beginnings)}, but must have those of embedder and reader, "
        "as a RealmForOpenQA has; lsg_flax.OpenQA.save_pretrained writes such a folder.",
    )
    if tokenizer is None:
        raise FileNotFoundError(f"{model} has no tokenizer; copy its files there.")
    config = {n: value for n, value in checkpoint.values.items() if n != "generation_config"}
    parts = OpenQAParts({n: np.asarray(t) for n, t in tensors.items()}, config, tokenizer, records)
    if keep_embeddings:
        require(
            kept.shape[0] == len(records),
            f"{model} has embeddings of {kept.shape[0]} blocks, but {records.place} has "
            f"{len(records)} blocks; compute new embeddings (keep_embeddings=False).",
        )
        write_folder(folder, parts, lambda file: embeddings.write_embeddings(file, kept))
        return 0
    options = {"batch_size": batch_size, "mesh": mesh}
    embedder = BlockEmbedder(*checkpoint.load("embedder"), tokenizer, **options)
    with locked(folder):
        staged, of_run = folder / _STAGED, {"width": embedder.width, "progress": progress}
        done = embed_blocks(staged, records, embedder, settings=embedder.settings(), **of_run)
        write_folder(folder, parts, lambda file: shutil.copyfile(staged, file))
        staged.unlink()
    return done
