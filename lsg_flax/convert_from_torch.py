"""Tensors of a PyTorch checkpoint <-> our parameters, by the families' key tables. Strict: every
name is used, tied or ignored.

This file knows names and shapes; files are those of hub/, and turning full attention into LSG is
to_lsg.py's.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lsg_flax.models import (
    EncoderConfig,
    Family,
    Key,
    Model,
    Params,
    family_of,
    modern_name,
)

HEAD_SEED = 0  # of head weights that a checkpoint does not have
_LISTED = 12


Place = Callable[[str, Callable[[tuple[slice, ...]], np.ndarray], jax.ShapeDtypeStruct], jax.Array]


def params_from_torch(
    tensors: Mapping[str, Any], model: Model, place: Place | None = None
) -> Params:
    """Our parameters from the tensors of a PyTorch state dict.

    Weights of the head or pooler that are missing are drawn from a fixed seed and named in one
    warning, as are those of another head that are left over.

    Args:
        tensors: by name, as stored, of a plain or LSG checkpoint with or without a head; arrays, or
            what has their shape and gives parts of itself by slices.
        model: whose config, task and parameter dtype are wanted.
        place: makes the array of a path from a function that reads a part of it, and its shape;
            a whole array on the default device by default.

    Raises:
        ValueError: for any other missing or unexpected tensor (both are listed), or one of another
            shape.
    """
    config, family = model.config, family_of(model.config.model_type)
    tensors = {modern_name(name): tensor for name, tensor in tensors.items()}
    keys, shapes = family.keys(model.task, config), _leaf_shapes(model)
    _check_rows(keys, shapes, family)
    tensors = _with_prefix(tensors, family, model.task)
    found = {key.torch for key in keys} & tensors.keys()
    missing = [key for key in keys if key.torch not in found]
    strictly_missing = [key.torch for key in missing if key.path.startswith("encoder/")]
    other_heads, unexpected = _sort_unused(tensors, found, family, model.task, config)
    if strictly_missing or unexpected:
        raise ValueError(_mismatch(strictly_missing, unexpected, family, config))
    readers: dict[str, Callable[[tuple[slice, ...]], np.ndarray]] = {
        path: _reader(tensors, of_leaf, shapes[path])
        for path, of_leaf in _by_path(keys).items()
        if all(key.torch in found for key in of_leaf)
    }
    absent = sorted(shapes.keys() - readers.keys())
    if absent or other_heads:
        _warn_heads(absent, other_heads, model)
    for path, value in initial_leaves(model, absent, HEAD_SEED).items():
        readers[path] = np.asarray(value).__getitem__
    leaves, dtype = {}, model.param_dtype
    for path, read in readers.items():

        def cast(index, read=read):
            return read(index).astype(dtype)

        shape = shapes[path]
        if place is None:
            leaves[path] = jnp.asarray(cast((slice(None),) * len(shape)))
        else:
            leaves[path] = place(path, cast, jax.ShapeDtypeStruct(shape, dtype))
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def params_to_torch(params: Params, model: Model) -> dict[str, np.ndarray]:
    """The tensors of the PyTorch class for `model`, by name; tied ones are written out, so that it
    loads them strictly.

    Raises:
        ValueError: if `params` are not those of `model`.
    """
    config, family = model.config, family_of(model.config.model_type)
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    shapes = _leaf_shapes(model)
    wrong = sorted(
        path for path in shapes.keys() & leaves.keys() if tuple(leaves[path].shape) != shapes[path]
    )
    if shapes.keys() != leaves.keys() or wrong:
        raise ValueError(
            f"params are not those of this {model.task} model: missing "
            f"{sorted(shapes.keys() - leaves.keys())[:_LISTED]}, "
            f"unexpected {sorted(leaves.keys() - shapes.keys())[:_LISTED]}, "
            "of another shape "
            f"{[(path, tuple(leaves[path].shape), shapes[path]) for path in wrong[:_LISTED]]}."
        )
    keys = family.keys(model.task, config)
    _check_rows(keys, shapes, family)
    tensors = {}
    for path, of_leaf in _by_path(keys).items():
        leaf = np.asarray(leaves[path])
        for key in of_leaf:
            tensor = leaf if key.layer is None else leaf[key.layer]
            tensors[key.torch] = np.ascontiguousarray(key.storage.to_torch(tensor))
    for name, source in family.tied_names(model.task, tied=config.tie_word_embeddings).items():
        tensors[name] = tensors[source].copy()
    return tensors


def initial_leaves(model: Model, paths: list[str], seed: int) -> dict[str, jax.Array]:
    """Freshly drawn parameters at `paths`; only these are computed."""
    if not paths:
        return {}

    def draw(key):
        drawn = flax.traverse_util.flatten_dict(
            model.init(key, **model.example_inputs())["params"], sep="/"
        )
        return {path: drawn[path] for path in paths}

    return jax.jit(draw)(jax.random.key(seed))


def _traced_leaf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(model.abstract_params(), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


# Tracing `init` takes half a second, and a checkpoint that is loaded and saved again asks twice.
# Any, since type checkers take Linen modules for unhashable.
_leaf_shapes: Any = functools.lru_cache(maxsize=32)(_traced_leaf_shapes)


def _check_rows(keys: list[Key], shapes: dict[str, tuple[int, ...]], family: Family) -> None:
    """Raises ValueError if the family's rows are not those of its models."""
    rows = {key.path: key for key in keys}
    if rows.keys() != shapes.keys():
        raise ValueError(
            f"the rows of {family.model_type} do not fit its models: they lack "
            f"{sorted(shapes.keys() - rows.keys())[:_LISTED]} and have beside "
            f"{sorted(rows.keys() - shapes.keys())[:_LISTED]}; mend models/families."
        )
    for path, key in rows.items():
        key.torch_shape(shapes[path][len(key.layer or ()) :])


def _by_path(keys: list[Key]) -> dict[str, list[Key]]:
    grouped: dict[str, list[Key]] = {}
    for key in keys:
        grouped.setdefault(key.path, []).append(key)
    return grouped


def _with_prefix(tensors: dict[str, Any], family: Family, task: str) -> dict[str, Any]:
    """Names as a model of `task` has them: encoder tensors carry the prefix, except in the base
    model."""
    prefix = f"{family.prefix}."
    stored_with = any(name.startswith(prefix) for name in tensors)
    if stored_with and task == "base":
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not stored_with and task != "base":
        parts = {row.torch.split(".")[0] for row in (*family.encoder, *family.pooler)}
        return {
            prefix + name if name.split(".")[0] in parts else name: tensor
            for name, tensor in tensors.items()
        }
    return tensors


def _sort_unused(
    tensors, found: set[str], family: Family, task: str, config: EncoderConfig
) -> tuple[list[str], list[str]]:
    """Unused names: those of another head of the family, and those that nothing explains. Ties are
    checked on the way."""
    unused = (
        tensors.keys()
        - found
        - {name for buffer in family.ignored for name in (buffer, f"{family.prefix}.{buffer}")}
    )
    for other in family.heads:
        for name, source in family.tied_names(other, tied=config.tie_word_embeddings).items():
            place = source if source in tensors else source.removeprefix(f"{family.prefix}.")
            if name in unused and place in tensors:
                if not np.array_equal(tensors[name], tensors[place]):
                    raise ValueError(
                        f"{name} differs from {source}, but tie_word_embeddings is true; "
                        "set tie_word_embeddings to false in config.json if the model has its own "
                        "output weights."
                    )
                unused = unused - {name}
    others = set(_names_of_heads(family, config))
    if task == "base":
        others |= {name.removeprefix(f"{family.prefix}.") for name in others}
    return sorted(unused & others), sorted(unused - others)


def _names_of_heads(family: Family, config: EncoderConfig):
    for task in family.heads:
        yield from (
            key.torch for key in family.keys(task, config) if not key.path.startswith("encoder/")
        )
        yield from family.head(task).tied


def _reader(
    tensors: Mapping[str, Any], keys: list[Key], shape: tuple[int, ...]
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Reads a part of a leaf, from the tensors of its layers if it is stacked; only that part of a
    file is touched."""
    lead = shape[: len(keys[0].layer)] if keys[0].layer is not None else ()
    expected = shape[len(lead) :]
    for key in keys:
        given, wanted = tuple(tensors[key.torch].shape), key.torch_shape(expected)
        if given != wanted:
            raise ValueError(
                f"{key.torch} has shape {given}, but config.json asks for {wanted}; the file "
                "belongs to another config.json, or the config was overridden "
                "(num_labels, vocab_size, ...)."
            )

    def part(key: Key, index: tuple[slice, ...]) -> np.ndarray:
        return key.storage.read(tensors[key.torch], index, expected)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not lead:
            return part(keys[0], index)
        numbers = np.arange(len(keys)).reshape(lead)[index[: len(lead)]]
        parts = [part(keys[number], index[len(lead) :]) for number in numbers.flat]
        return np.stack(parts).reshape(*numbers.shape, *parts[0].shape)

    return read


def _mismatch(
    missing: list[str], unexpected: list[str], family: Family, config: EncoderConfig
) -> str:
    def listing(sign, names):
        rest = [f"  {sign} ... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
        return [f"  {sign} {name}" for name in names[:_LISTED]] + rest

    lines = [
        f"the checkpoint does not match its config ({family.model_type}, "
        f"{'LSG' if config.lsg else 'full'} attention):"
    ]
    lines += [f"missing from the file: {len(missing)}", *listing("-", missing)]
    lines += [f"in the file but not in the model: {len(unexpected)}", *listing("+", unexpected)]
    if any("global_embeddings" in name for name in unexpected):
        lines.append('This is an LSG checkpoint: its config.json needs "base_model_prefix": "lsg".')
    return "\n".join(lines)


def _warn_heads(absent: list[str], other_heads: list[str], model: Model) -> None:
    parts = []
    if absent:
        parts.append(
            f"not in the checkpoint and drawn from seed {HEAD_SEED}: {', '.join(absent)} "
            "(fine-tune before use)"
        )
    if other_heads:
        parts.append(f"of another head and not used: {', '.join(other_heads[:_LISTED])}")
    warnings.warn(f"weights for task={model.task!r} " + "; ".join(parts) + ".", stacklevel=5)
