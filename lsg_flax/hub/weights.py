"""Opens the tensors of a checkpoint's folder by their PyTorch names: safetensors, in one file or
sharded, read in slices; pytorch_model.bin; flax_model.msgpack."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lsg_flax.files import check_pointer, read_json
from lsg_flax.hub.weight_trees import UnreadTensor, damaged, read_bin, read_msgpack, read_npz

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NPZ = "model.npz"  # the variables of a TensorFlow checkpoint by their names
MSGPACK, MSGPACK_INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"

# safetensors' names of dtypes
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{f"{kind[0].upper()}{n}": f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)},
    **{"C64": "complex64", "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2"},
}


class StoredTensor:
    """A tensor in a safetensors file, of which slices are read on demand."""

    def __init__(self, stored: Any):
        self._stored = stored
        self.shape = tuple(stored.get_shape())
        self.dtype = _DTYPES.get(stored.get_dtype(), str(stored.get_dtype()))

    def __getitem__(self, index) -> np.ndarray:
        """Reads a slice."""
        return self._stored[index]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._stored[...], dtype)


Tensors = Mapping[str, StoredTensor | UnreadTensor | np.ndarray]


def open_tensors(folder: pathlib.Path) -> Tensors:
    """Opens every tensor of a checkpoint, by its PyTorch name: stored ones, or arrays of a file
    that is read as a whole. Of several formats, safetensors have priority, then pickles.

    Raises:
        FileNotFoundError: if there are no weights or a shard is missing.
        ValueError: if a file is damaged or a Git LFS pointer, or a pickle has anything but weights.
    """
    readers: dict[str, Callable[[pathlib.Path], Tensors]] = {
        WEIGHTS: _open_safetensors,
        INDEX: lambda index: _read_shards(index, _open_safetensors),
        BIN: read_bin,
        BIN_INDEX: lambda index: _read_shards(index, read_bin),
        MSGPACK: read_msgpack,
        NPZ: read_npz,
        MSGPACK_INDEX: _refuse_flax_shards,
    }
    for name, read in readers.items():
        if (folder / name).is_file():
            check_pointer(folder / name)
            return read(folder / name)
    raise FileNotFoundError(
        f"{folder} has no weights: none of {', '.join(readers)}; it has {_listing(folder)}."
    )


def _listing(folder: pathlib.Path) -> list[str]:
    files = sorted(folder.iterdir())
    names = [p.name if p.exists() else f"{p.name} (a link to nothing)" for p in files]
    return names[:20] + (["..."] if len(names) > 20 else [])


def _refuse_flax_shards(index: pathlib.Path) -> Tensors:
    raise ValueError(
        f"{index} is the index of a Flax checkpoint in several files, which is not supported; load "
        "it with transformers 4 and save it as one safetensors file."
    )


def _read_shards(index: pathlib.Path, read: Callable[[pathlib.Path], Tensors]) -> Tensors:
    """Reads the tensors of the shards that an index lists, which must be in its folder."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map; download the checkpoint again.")
    kind = pathlib.Path(index.name.removesuffix(".index.json")).suffix
    files = {file.name: file for file in index.parent.glob(f"*{kind}") if file.is_file()}
    shards = sorted({str(name) for name in places.values()})
    for shard in shards:
        if shard not in files:
            raise FileNotFoundError(
                f"{index} lists the shard {shard:.200}, which is not there: shards are {kind} "
                "files in the folder of the index; download the checkpoint again."
            )
        check_pointer(files[shard])
    tensors: dict[str, StoredTensor | UnreadTensor | np.ndarray] = {}
    for shard in shards:
        tensors |= {n: t for n, t in read(files[shard]).items() if places.get(n, shard) == shard}
    lost = sorted(places.keys() - tensors.keys())
    if lost:
        raise ValueError(
            f"{index} lists tensors that its shards do not have: {lost[:10]}; download the "
            "checkpoint again."
        )
    return tensors


def _open_safetensors(file: pathlib.Path) -> Tensors:
    try:
        opened = safetensors.safe_open(file, framework="numpy")
        return {name: StoredTensor(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise damaged(file, error) from error
