"""Converts tensors of a PyTorch checkpoint to our parameters and back, by the families' key tables.
Conversion is strict: every name is used, tied or listed as ignored.

This file handles names and shapes; hub/ reads and writes files, and to_lsg.py converts full
attention to LSG.
"""

import dataclasses
import fnmatch
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lsg_flax.models import (
    Family,
    Key,
    Model,
    ModelConfig,
    Params,
    family_of,
)
from lsg_flax.tensor_names import FLOATS, NamedTensors, name_tensors, of_part, of_tensorflow

HEAD_SEED = 0  # seed of head weights that a checkpoint lacks
_LISTED = 12
_COLLECTIONS = ' Pass the tree of parameters alone: variables["params"].'
_FIXED = "/buffer"  # an array that is never trained: if a file lacks it, it has its initial value


Read = Callable[[tuple[slice, ...]], np.ndarray]  # a part of an array, by its index
Place = Callable[[str, Read, jax.ShapeDtypeStruct], jax.Array]


def params_from_torch(
    tensors: Mapping[str, Any], model: Model, place: Place | None = None
) -> Params:
    """Makes our parameters from the tensors of a PyTorch state dict.

    Missing weights of the head or pooler, and weights of a head of another size, are drawn from a
    fixed seed. One warning lists them, the unused tensors outside the body, and prefixes that were
    removed from names.

    Args:
        tensors: tensors by their stored names, of a plain or LSG checkpoint with or without a head,
            or of a model that contains this one; arrays, or objects with shape and dtype that can
            be sliced.
        model: the model to make parameters for.
        place: makes an array from its path, a function that reads a part of it, and its shape; by
            default the whole array on the default device.

    Raises:
        ValueError: for other missing tensors and unexpected tensors of the body (both are listed),
            tensors of another shape or dtype, and tied tensors that differ.
    """
    config, family = model.config, family_of(model.config.model_type)
    tensors = of_tensorflow(tensors, family)
    if model.embedders:
        return {
            name: params_from_torch(of_part(tensors, name), part, place)
            for name, part in model.embedders.items()
        }
    shapes = _leaf_shapes(model)
    keys = family.keys(model.task, config) + family.given_keys(config, shapes)
    _check_rows(keys, shapes, family)
    tensors = of_part(tensors, model.head_table.part)
    named = name_tensors(tensors, family, config, model.task)
    if model.task == "base":  # whose class has no prefix
        keys = [dataclasses.replace(key, torch=named.prefix + key.torch) for key in keys]
    unused = _check_body(keys, named, family, config)
    readers: dict[str, Read] = {}
    absent, resized = [], []
    for path, of_leaf in sorted(_by_path(keys).items()):
        if not all(key.torch in named.tensors for key in of_leaf):
            absent.append(path)
        elif sizes := _other_size(named, of_leaf[0], shapes[path]):
            absent.append(path)
            resized.append(sizes)
        else:
            readers[path] = _reader(named, of_leaf, shapes[path])
    drawn = [path for path in absent if not path.endswith(_FIXED)]
    if drawn or unused or named.left_out:
        _warn(model, drawn, resized, unused, named.left_out)
    for path, value in initial_leaves(model, absent, HEAD_SEED).items():
        readers[path] = np.asarray(value).__getitem__
    return _placed(readers, shapes, model, place)


def has_head(tensors: Mapping[str, Any], config: ModelConfig, task: str) -> bool:
    """Whether the tensors of a state dict have all names of a task's head.

    Raises:
        ValueError: if the family has no such head, or if two different tensors map to one name.
    """
    family = family_of(config.model_type)
    tensors = of_part(of_tensorflow(tensors, family), family.head(task).part)
    there = name_tensors(tensors, family, config, task).tensors
    keys = family.keys(task, config)
    return all(key.torch in there for key in keys if key.path.startswith("head/"))


def _placed(
    readers: Mapping[str, Read],
    shapes: dict[str, tuple[int, ...]],
    model: Model,
    place: Place | None,
) -> Params:
    """Returns the tree of arrays, in the dtype of the parameters."""
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
    """Returns the tensors for the PyTorch class of `model`, by name, including tied ones, so that
    strict loading works. Shapes are PyTorch's, such as [out, in] for a projection.

    Raises:
        ValueError: if `params` are not those of `model`, or are no floating-point numbers.
    """
    config, family = model.config, family_of(model.config.model_type)
    if model.embedders:
        return _parts_to_torch(params, model)
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
            f"{_COLLECTIONS if 'params' in params else ''}"
        )
    for path, leaf in leaves.items():
        if str(leaf.dtype) not in FLOATS:
            raise ValueError(
                f"{path} has dtype {leaf.dtype}, and no model would load it; give parameters of "
                f"{', '.join(FLOATS)}."
            )
    keys = family.keys(model.task, config) + family.given_keys(config, shapes)
    _check_rows(keys, shapes, family)
    tensors = {}
    for path, of_leaf in _by_path(keys).items():
        leaf = np.asarray(leaves[path])
        for key in of_leaf:
            tensor = leaf if key.layer is None else leaf[key.layer]
            tensors[key.torch] = np.asarray(key.storage.to_torch(tensor), order="C")
    for name, source in family.tied_names(model.task, tied=config.tie_word_embeddings).items():
        tensors[name] = tensors[source].copy()
    return tensors


def _parts_to_torch(params: Params, model: Model) -> dict[str, np.ndarray]:
    """Returns the tensors of a scorer; PyTorch's class always has a query embedder, which may be a
    copy of the embedder."""
    parts = model.embedders
    if params.keys() != parts.keys():
        raise ValueError(
            f"params of this {model.task} model must have the parts {[*parts]}, got {[*params]}; "
            "own_query_embedder decides whether there are two."
        )
    tensors = {name: params_to_torch(params[name], part) for name, part in parts.items()}
    tensors = {"query_embedder": tensors["embedder"]} | tensors
    return {f"{name}.{n}": t.copy() for name, part in tensors.items() for n, t in part.items()}


def initial_leaves(model: Model, paths: list[str], seed: int) -> dict[str, jax.Array]:
    """Draws initial parameters at `paths`; only these are computed. Stacked layers have a leading
    axis: [layers, ...]."""
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


# Cached, because tracing `init` takes half a second, and loading and saving both need it. Any,
# because type checkers believe that Linen modules are not hashable.
_leaf_shapes: Any = functools.lru_cache(maxsize=32)(_traced_leaf_shapes)


def _check_rows(keys: list[Key], shapes: dict[str, tuple[int, ...]], family: Family) -> None:
    """Raises ValueError if the family's rows do not match the parameters of its models."""
    rows = {key.path: key for key in keys}
    if rows.keys() != shapes.keys():
        raise ValueError(
            f"the rows of {family.model_type} do not fit its models: they lack "
            f"{sorted(shapes.keys() - rows.keys())[:_LISTED]} and have beside "
            f"{sorted(rows.keys() - shapes.keys())[:_LISTED]}; correct models/families."
        )
    for path, key in rows.items():
        key.torch_shape(shapes[path][len(key.layer or ()) :])


def _by_path(keys: list[Key]) -> dict[str, list[Key]]:
    grouped: dict[str, list[Key]] = {}
    for key in keys:
        grouped.setdefault(key.path, []).append(key)
    return grouped


def _is_of_body(key: Key) -> bool:
    """Whether every checkpoint of the family must have this tensor."""
    return not key.path.startswith(("head/", "pooler/")) and not key.path.endswith(_FIXED)


def _check_body(
    keys: list[Key], named: NamedTensors, family: Family, config: ModelConfig
) -> list[str]:
    """Returns the unused tensors outside the body; raises ValueError if tensors of the body are
    missing or unexpected."""
    unused = named.tensors.keys() - {key.torch for key in keys}
    for pattern in family.ignored:
        unused -= {*fnmatch.filter(unused, named.prefix + pattern)}
    outside = tuple(f"{named.prefix}{row.torch}." for row in family.pooler)
    if not named.prefix:  # without a prefix names do not show what belongs to the body
        outside += tuple(f"{row.torch}." for table in family.tables for row in table.rows)
    # A model may have a part of the body only.
    known = {named.prefix + key.torch for key in family.keys("base", config)}
    unexpected = {name for name in unused - known if name.startswith(named.prefix)}
    unexpected = {name for name in unexpected if not name.startswith(outside)}
    wanted = [key.torch for key in keys if _is_of_body(key)]
    around = family.given.torch.partition("{")[0] if family.given else None
    if around and not any(name.startswith(around) for name in named.tensors):  # drawn instead
        wanted = [name for name in wanted if not name.startswith(around)]
    missing = [name for name in wanted if name not in named.tensors]
    if missing or unexpected:
        rest = unused - unexpected if missing else set()  # may be the missing ones, misnamed
        there = [*sorted(unexpected), *sorted(rest)]
        sides = [[*map(named.shown, names)] for names in (missing, there)]
        raise ValueError(_mismatch(sides[0], sides[1], family, config))
    return sorted(map(named.shown, unused - unexpected))


def _other_size(named: NamedTensors, key: Key, shape: tuple[int, ...]) -> str | None:
    """Returns how the size of a head's tensor differs from the model's; None if it does not."""
    if not key.path.startswith("head/"):
        return None
    given, wanted = tuple(named.tensors[key.torch].shape), key.torch_shape(shape)
    if given == wanted or len(given) != len(wanted) or 0 in given:
        return None
    return f"{named.shown(key.torch)} {list(given)}, wanted {list(wanted)}"


def _reader(named: NamedTensors, keys: list[Key], shape: tuple[int, ...]) -> Read:
    """Returns a function that reads a part of a leaf, from the tensors of its layers if it is
    stacked; it reads only that part of a file."""
    lead = shape[: len(keys[0].layer)] if keys[0].layer is not None else ()
    expected = shape[len(lead) :]
    for key in keys:
        named.check_dtype(key.torch)
        given, wanted = tuple(named.tensors[key.torch].shape), key.torch_shape(expected)
        if given != wanted:
            raise ValueError(
                f"{named.shown(key.torch)} has shape {given}, but config.json asks for "
                f"{wanted}; the file belongs to another config.json, or the config was overridden "
                "(num_labels, vocab_size, ...)."
            )

    def part(key: Key, index: tuple[slice, ...]) -> np.ndarray:
        return key.storage.read(named.tensors[key.torch], index, expected)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not lead:
            return part(keys[0], index)
        numbers = np.arange(len(keys)).reshape(lead)[index[: len(lead)]]
        parts = [part(keys[number], index[len(lead) :]) for number in numbers.flat]
        return np.stack(parts).reshape(*numbers.shape, *parts[0].shape)

    return read


def _mismatch(
    missing: list[str], unexpected: list[str], family: Family, config: ModelConfig
) -> str:
    def listing(sign, names):
        rest = [f"  {sign} ... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
        return [f"  {sign} {name}" for name in names[:_LISTED]] + rest

    lines = [
        f"the checkpoint does not match its config ({family.model_type}, "
        f"{config.attention} attention):"
    ]
    lines += [f"missing from the file: {len(missing)}", *listing("-", missing)]
    lines += [f"in the file but not in the model: {len(unexpected)}", *listing("+", unexpected)]
    if any("global_embeddings" in name for name in unexpected):
        lines.append('This is an LSG checkpoint: its config.json needs "base_model_prefix": "lsg".')
    if any(name.startswith("global_layers.") for name in (*missing, *unexpected)):
        lines.append("global_attention= needs parts named as in the file (docs/checkpoints.md).")
    return "\n".join(lines)


def _warn(
    model: Model,
    absent: list[str],
    resized: list[str],
    unused: list[str],
    left_out: tuple[str, ...],
) -> None:
    parts = []
    if absent:
        sizes = f"; in the file they are {'; '.join(resized)}" if resized else ""
        parts.append(
            f"not in the checkpoint and drawn from seed {HEAD_SEED}: {', '.join(absent)} "
            f"(fine-tune before use{sizes})"
        )
    if unused:
        more = f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else ""
        parts.append(f"of another head and not used: {', '.join(unused[:_LISTED])}{more}")
    if left_out:
        parts.append(f"read without the beginning {', '.join(map(repr, left_out))} of their names")
    warnings.warn(f"weights for task={model.task!r} " + "; ".join(parts) + ".", stacklevel=5)
