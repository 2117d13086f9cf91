"""Weights that are read whole, out of trees: PyTorch's pickles, the msgpack files of Hugging Face's
Flax classes, numpy archives, under the names and layouts that PyTorch has, or TensorFlow."""

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
    """A tensor of a kind that numpy does not have: nothing but its shape and dtype is known."""

    shape: tuple[int, ...]
    dtype: str


WholeTensors = Mapping[str, np.ndarray | UnreadTensor]


def read_bin(file: pathlib.Path) -> WholeTensors:
    """The tensors of a PyTorch pickle: a state dict, named parameters, or these inside of
    dictionaries, whose keys then begin their names.

    Raises:
        ImportError: without torch.
        ValueError: if the file is damaged, or holds anything but weights.
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
    except Exception as error:  # the unpickler's own, of any type, where bytes are damaged
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise _no_weights(file, error) from None
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a zip cut short
            raise
        raise damaged(file, error) from error
    if not leaves:
        raise ValueError(f"{file} is not a state dict: it should hold tensors by name.")
    return {name: _from_torch(tensor) for name, tensor in _once(file, leaves).items()}


def _no_weights(file: pathlib.Path, error: Exception) -> ValueError:
    """Without torch's own text, which advises weights_only=False: that runs whatever is there."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return ValueError(
        f"{file} holds more than weights{f' ({found[1]})' if found else ', or is no pickle'}, and "
        "was not opened, since unpickling it could run code; save the model's state_dict() where "
        "it was made, best as safetensors."
    )


def read_msgpack(file: pathlib.Path) -> WholeTensors:
    """The tensors of a Flax class of Hugging Face, which has PyTorch's modules under their names.

    Raises:
        ValueError: if the file is damaged, or holds no such tree.
    """
    contents = file.read_bytes()
    try:
        leaves = list(_leaves(flax.serialization.msgpack_restore(contents)))
    except Exception as error:  # of msgpack, numpy and flax, where bytes are damaged
        raise damaged(file, error) from error
    arrays = [_as_in_torch(name, a) for name, a in leaves if name and isinstance(a, np.ndarray)]
    if not arrays:
        raise ValueError(f"{file} is not a tree of parameters: it should hold arrays by name.")
    return _once(file, arrays)


def read_npz(file: pathlib.Path) -> WholeTensors:
    """The arrays of a numpy archive by name; raises ValueError if it is damaged, or holds objects,
    which would be unpickled."""
    try:
        with np.load(file) as archive:
            return dict(archive)
    except Exception as error:  # of numpy and zipfile, where bytes are damaged
        raise damaged(file, error) from error


def _as_in_torch(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    module, dot, end = name.rpartition(".")
    if dot and end in _OF_FLAX:
        return f"{module}.{_OF_FLAX[end]}", array.T if end == "kernel" else array
    return name, array


def _once(file: pathlib.Path, leaves: list[tuple[str, Contents]]) -> dict[str, Contents]:
    """By name; raises ValueError where two have the same."""
    found: dict[str, Contents] = {}
    for name, leaf in leaves:
        if name in found:
            raise ValueError(f"{file} has two tensors called {name}; keep the one that is meant.")
        found[name] = leaf
    return found


def damaged(file: pathlib.Path, error: Exception) -> ValueError:
    """What to say of a file that cannot be read."""
    said = str(error) or type(error).__name__
    return ValueError(f"{file} is damaged or cut short ({said:.300}); copy or download it again.")


def _leaves(tree: object, beginning: str = "") -> Iterator[tuple[str, object]]:
    """What is in dictionaries whose keys are texts, these joined with dots."""
    if not isinstance(tree, dict):
        yield beginning.removesuffix("."), tree
        return
    for name, inner in tree.items():
        if isinstance(name, str):
            yield from _leaves(inner, f"{beginning}{name}.")


def _from_torch(tensor: Any) -> np.ndarray | UnreadTensor:
    """numpy has no bfloat16 of its own; its bits travel as int16."""
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
