"""Reads weight files that must be read as a whole: PyTorch's pickles, msgpack files of Hugging
Face's Flax classes, and numpy archives, with the names and layouts of PyTorch, or of TensorFlow."""

import errno
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.serialization
import jax.numpy as jnp
import numpy as np

Contents = TypeVar("Contents")

_OF_FLAX = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


class UnreadTensor(NamedTuple):
    """A tensor of a kind that numpy does not have: only its shape and dtype are known."""

    shape: tuple[int, ...]
    dtype: str


WholeTensors = Mapping[str, np.ndarray | UnreadTensor]


def read_bin(file: pathlib.Path) -> WholeTensors:
    """Reads the tensors of a PyTorch pickle: a state dict, named parameters, or these inside
    dictionaries, whose keys become prefixes of the names.

    Raises:
        ImportError: if torch is not installed.
        ValueError: if the file is damaged, or contains anything but weights.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{file} is a PyTorch pickle; reading it needs torch: pip install 'lsg-flax[torch]'."
        ) from error
    import pickle

    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(tree, list):  # of model.named_parameters()
            tree = dict(pair for pair in tree if isinstance(pair, tuple) and len(pair) == 2)
        leaves = [(name, t) for name, t in _leaves(tree) if name and isinstance(t, torch.Tensor)]
    except Exception as error:  # for damaged bytes the unpickler raises errors of any type
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise _no_weights(file, error) from None
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a truncated zip
            raise
        raise damaged(file, error) from error
    if not leaves:
        raise ValueError(f"{file} is not a state dict: it should hold tensors by name.")
    return {name: _from_torch(tensor) for name, tensor in _once(file, leaves).items()}


def _no_weights(file: pathlib.Path, error: Exception) -> ValueError:
    """The error for a pickle with more than weights. It leaves out torch's own text, which advises
    weights_only=False: that would run any code in the file."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return ValueError(
        f"{file} has more than weights{f' ({found[1]})' if found else ', or is not a pickle'}, and "
        "was not opened, because unpickling it could run code; save the model's state_dict() where "
        "it was made, best as safetensors."
    )


def read_msgpack(file: pathlib.Path) -> WholeTensors:
    """Reads the tensors of a Flax class of Hugging Face, whose modules have PyTorch's names.

    Raises:
        ValueError: if the file is damaged, or has no tree of arrays.
    """
    contents = file.read_bytes()
    try:
        leaves = list(_leaves(flax.serialization.msgpack_restore(contents)))
    except Exception as error:  # msgpack, numpy and flax raise many types for damaged bytes
        raise damaged(file, error) from error
    arrays = [_as_in_torch(name, a) for name, a in leaves if name and isinstance(a, np.ndarray)]
    if not arrays:
        raise ValueError(f"{file} is not a tree of parameters: it should have arrays by name.")
    return _once(file, arrays)


def read_npz(file: pathlib.Path) -> WholeTensors:
    """Reads the arrays of a numpy archive by name; raises ValueError if it is damaged, or has
    objects, which would be unpickled."""
    try:
        with np.load(file) as archive:
            return dict(archive)
    except Exception as error:  # numpy and zipfile raise many types for damaged bytes
        raise damaged(file, error) from error


def _as_in_torch(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    module, dot, end = name.rpartition(".")
    if dot and end in _OF_FLAX:
        return f"{module}.{_OF_FLAX[end]}", array.T if end == "kernel" else array
    return name, array


def _once(file: pathlib.Path, leaves: list[tuple[str, Contents]]) -> dict[str, Contents]:
    """Returns the leaves by name; raises ValueError if two have the same name."""
    found: dict[str, Contents] = {}
    for name, leaf in leaves:
        if name in found:
            raise ValueError(f"{file} has two tensors called {name}; remove one of them.")
        found[name] = leaf
    return found


def damaged(file: pathlib.Path, error: Exception) -> ValueError:
    """Returns the error for a file that cannot be read."""
    said = str(error) or type(error).__name__
    return ValueError(f"{file} is damaged or truncated ({said:.300}); copy or download it again.")


def _leaves(tree: object, beginning: str = "") -> Iterator[tuple[str, object]]:
    """Yields the leaves of nested dictionaries, with their string keys joined by dots."""
    if not isinstance(tree, dict):
        yield beginning.removesuffix("."), tree
        return
    for name, inner in tree.items():
        if isinstance(name, str):
            yield from _leaves(inner, f"{beginning}{name}.")


def _from_torch(tensor: Any) -> np.ndarray | UnreadTensor:
    """Converts a tensor. numpy has no bfloat16 of its own, so its bits are passed as int16."""
    import torch  # pyright: ignore[reportMissingImports]

    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized or tensor.is_meta or tensor.layout != torch.strided:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else "sparse"
        return UnreadTensor(shape, f"{dtype} ({kind})")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    try:
        return tensor.numpy()
    except TypeError:  # float8 and others
        return UnreadTensor(shape, dtype)
