"""The tensors of a checkpoint's folder by their PyTorch names: safetensors, whole or sharded, read
in slices, and pytorch_model.bin."""

import errno
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lsg_flax.files import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# safetensors' names of dtypes
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class StoredTensor:
    """A tensor in a safetensors file: slices of it are read when asked for."""

    def __init__(self, stored: Any):
        self._stored = stored
        self.shape = tuple(stored.get_shape())
        self.dtype = _DTYPES.get(stored.get_dtype(), str(stored.get_dtype()))

    def __getitem__(self, index) -> np.ndarray:
        """Reads a part."""
        return self._stored[index]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._stored[...], dtype)


Tensors = dict[str, StoredTensor | np.ndarray]


def open_tensors(folder: pathlib.Path) -> Tensors:
    """Every tensor of a checkpoint by its PyTorch name: stored ones, or arrays of a pickle.

    Raises:
        FileNotFoundError: if there are no weights or a shard is missing.
        ValueError: if a file is damaged, or a pickle holds anything but weights.
    """
    if (folder / WEIGHTS).exists():
        return _open_safetensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        return _read_shards(folder, INDEX, _open_safetensors)
    if (folder / BIN).exists():
        return _read_bin(folder / BIN)
    if (folder / BIN_INDEX).exists():
        return _read_shards(folder, BIN_INDEX, _read_bin)
    raise FileNotFoundError(
        f"{folder} has no weights: none of {WEIGHTS}, {INDEX}, {BIN}, {BIN_INDEX}."
    )


def _read_shards(
    folder: pathlib.Path, index: str, read: Callable[[pathlib.Path], Tensors]
) -> Tensors:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / index} has no weight_map; download the checkpoint again.")
    shards = sorted(set(places.values()))
    for shard in shards:
        if not (folder / shard).exists():
            raise FileNotFoundError(
                f"{folder / index} names the shard {shard}, which is not there; download the "
                "checkpoint again."
            )
    tensors: Tensors = {}
    for shard in shards:
        tensors |= read(folder / shard)
    lost = sorted(places.keys() - tensors.keys())
    if lost:
        raise ValueError(
            f"{folder / index} names tensors that its shards do not hold: {lost[:10]}."
        )
    return tensors


def _open_safetensors(file: pathlib.Path) -> Tensors:
    try:
        opened = safetensors.safe_open(file, framework="numpy")
        return {name: StoredTensor(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _damaged(file, error) from error


def _read_bin(file: pathlib.Path) -> Tensors:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{file} is a PyTorch pickle; reading it needs torch: pip install 'lsg-flax[torch]'."
        ) from error
    import pickle

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than weights and was not opened, since unpickling it could run "
            f"code: {error}"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a zip cut short
            raise
        raise _damaged(file, error) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(t, torch.Tensor) for t in tensors.values()
    ):
        raise ValueError(f"{file} is not a state dict: it should hold tensors by name.")
    return {name: _to_numpy(tensor) for name, tensor in tensors.items()}


def _damaged(file: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged or cut short ({error}); copy or download it again.")


def _to_numpy(tensor: Any) -> np.ndarray:
    """numpy has no bfloat16 of its own; its bits travel as int16."""
    import torch  # pyright: ignore[reportMissingImports]

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
