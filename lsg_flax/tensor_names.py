"""Maps the names of tensors in files to those of a family's PyTorch class: removes prefixes of
wrappers, replaces old names, and finds tensors that are stored under a tied name."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lsg_flax.models import Family, ModelConfig, modern_name

FLOATS = ("float64", "float32", "float16", "bfloat16")

# Attributes and keys that contain a whole model, and parts that torch itself adds to names.
_AROUND = re.compile(r"((0\.)?(auto_)?model|module|state_dict|model_state_dict|params)\.")
_WITHIN = re.compile(r"(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
_MOST_AROUND = 8  # more prefixes mean a damaged file
_QUANTISED = {
    r"\.(SCB|weight_format)$": "bitsandbytes (8 bit)",
    r"\.(absmax|quant_map|quant_state\..*)$": "bitsandbytes (4 bit)",
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\._packed_params": "PyTorch",
}


class NamedTensors(NamedTuple):
    """The tensors of a checkpoint by the names of the family's class with a head.

    Attributes:
        tensors: the tensors by these names.
        stored: the same names -> the names in the file.
        left_out: prefixes of wrappers that were removed from the file's names.
        prefix: prefix of the body's tensors in these names.
        prefixed: whether the file has this prefix too.
    """

    tensors: dict[str, Any]
    stored: dict[str, str]
    left_out: tuple[str, ...]
    prefix: str
    prefixed: bool

    def shown(self, name: str) -> str:
        """Returns a name as it is, or would be, in the file."""
        bare = name if self.prefixed else name.removeprefix(self.prefix)
        return self.stored.get(name, bare)

    def check_dtype(self, name: str) -> None:
        """Raises ValueError for a tensor that is not floating-point."""
        dtype = str(self.tensors[name].dtype)
        if dtype not in FLOATS:
            raise ValueError(
                f"{self.shown(name)} has dtype {dtype}, and weights must be plain tensors of "
                f"{', '.join(FLOATS)}; save the model anew in one of these, dequantised if it was "
                "quantised."
            )

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same."""
        self.check_dtype(name)
        self.check_dtype(other)
        return _equal(self.tensors[name], self.tensors[other])


def of_part(tensors: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Returns the tensors of a part of a model, by the part's own names; all tensors if the file
    has no such part."""
    beginning = f"{part}."
    inner = {n.removeprefix(beginning): t for n, t in tensors.items() if n.startswith(beginning)}
    return inner or tensors


def has_own_part(tensors: Mapping[str, Any], part: str, other: str) -> bool:
    """Whether a file has a part that differs from another part."""
    twins = [
        (t, tensors.get(other + n.removeprefix(part)))
        for n, t in tensors.items()
        if n.startswith(f"{part}.")
    ]
    return any(twin is None or not _equal(tensor, twin) for tensor, twin in twins)


def of_tensorflow(tensors: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """Converts the variables of a TensorFlow checkpoint to PyTorch's names and layouts; returns
    other tensors unchanged."""
    if not family.tf_names or not any("/" in name for name in tensors):
        return tensors
    found = {}
    for name, tensor in tensors.items():
        if re.search(r"(^|/)(adam_[vm]|AdamWeightDecayOptimizer(_1)?|global_step)($|/)", name):
            continue
        for pattern, instead in family.tf_names:
            name = re.sub(pattern, instead, name)
        name = re.sub(r"/([A-Za-z]+)_(\d+)(?=/)", r"/\1/\2", name)
        tensor = np.asarray(tensor).T if name.endswith("/kernel") else tensor
        name = re.sub(r"/(kernel|gamma)$|(?<=_embeddings)$", "/weight", name)
        found[re.sub(r"/(output_bias|beta)$", "/bias", name).replace("/", ".")] = tensor
    return found


def name_tensors(
    tensors: Mapping[str, Any], family: Family, config: ModelConfig, task: str
) -> NamedTensors:
    """Returns the tensors by the names of the family's class with a head, tied ones only once.

    Raises:
        ValueError: if two different tensors map to one name or are tied, and for quantised ones.
    """
    _refuse_quantised(tensors)
    parts = {row.torch.split(".")[0] for row in (*family.encoder, *family.pooler)}
    known = parts | {family.prefix} | _beginnings_of_heads(family)
    bare = {name: _without_wrappers(name, known) for name in tensors}
    left_out = {around for name, inner in bare.items() for around in _difference(name, inner)}
    prefix = family.beginning
    beginnings = {inner.split(".")[0] for inner in bare.values()}
    prefixed = family.prefix in beginnings or not beginnings & parts
    named = NamedTensors({}, {}, tuple(sorted(left_out)), prefix, prefixed)
    for name, inner in bare.items():
        in_body = not prefixed and inner.split(".")[0] in parts
        modern = modern_name(prefix + inner if in_body else inner)
        if modern in named.tensors and not _equal(named.tensors[modern], tensors[name]):
            raise ValueError(
                f"{named.stored[modern]} and {name} in the file both map to {modern}, and differ; "
                "remove one of them."
            )
        named.tensors[modern], named.stored[modern] = tensors[name], name
    _resolve_ties(named, family, config, task)
    return named


def _resolve_ties(named: NamedTensors, family: Family, config: ModelConfig, task: str) -> None:
    """Renames tensors that are stored only under a tied name; of equal tied tensors of the task's
    head, removes the one that repeats the other."""
    tied, tensors = config.tie_word_embeddings, named.tensors
    own, needed = family.tied_names(task, tied=tied), {k.torch for k in family.keys(task, config)}
    if task == "base":  # whose class has no prefix
        own = {named.prefix + name: named.prefix + source for name, source in own.items()}
    others = {pair for head in family.heads for pair in family.tied_names(head, tied=tied).items()}
    pairs = [*own.items(), *sorted(others)]
    for name, source in pairs:
        if name not in tensors or (source in tensors and name not in own):
            continue
        if source not in tensors:
            tensors[source], named.stored[source] = tensors[name], named.stored[name]
        elif not named.equal(name, source):
            raise ValueError(
                f"{named.shown(name)} differs from {named.shown(source)}, but tie_word_embeddings "
                "is true; set tie_word_embeddings to false in config.json if the model has its "
                "own output weights."
            )
        del tensors[name]
    for name, source in pairs:  # a tied name of one head may be a tensor of another head
        if source in tensors and name not in tensors and name in needed and source not in needed:
            tensors[name], named.stored[name] = tensors.pop(source), named.stored[source]


def _beginnings_of_heads(family: Family) -> set[str]:
    tables = family.heads.values()
    rows = [row.torch for table in tables for row in (*table.rows, *table.untied_rows)]
    return {name.split(".")[0] for name in rows}


def _without_wrappers(name: str, known: set[str]) -> str:
    """Returns the name without prefixes of wrappers; unchanged if that gives no name of the
    model."""
    inner = _WITHIN.sub("", name)
    for _ in range(_MOST_AROUND):
        around = None if inner.partition(".")[0] in known else _AROUND.match(inner)
        if around is None:
            break
        inner = inner[around.end() :]
    return inner if inner.split(".")[0] in known else name


def _difference(name: str, inner: str) -> list[str]:
    if name == inner:
        return []
    around = _WITHIN.sub("", name).removesuffix(inner)
    return [*_WITHIN.findall(name), *([around] if around else [])]


def _refuse_quantised(tensors: Mapping[str, Any]) -> None:
    for name in tensors:
        for ending, tool in _QUANTISED.items():
            if re.search(ending, name):
                raise ValueError(
                    f"{name} belongs to weights that {tool} has quantised, which lsg_flax does not "
                    "read; take the model that was quantised, or undo it in PyTorch "
                    "(model.dequantize()) and save the model anew."
                )


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors are equal. NaN equals NaN; a tensor that numpy cannot read equals
    none."""
    if not {str(one.dtype), str(other.dtype)} <= {*FLOATS, "int64"}:
        return False
    if tuple(one.shape) != tuple(other.shape):
        return False
    one, other = np.asarray(one), np.asarray(other)
    return np.array_equal(one, other) or bool(
        np.all((one == other) | ((one != one) & (other != other)))
    )
