"""The fields of Hugging Face's config.json <-> those of our configs: how each model_type writes
them, and what is refused because it changes the computation."""

import json
from dataclasses import fields
from typing import Any, NamedTuple

from lsg_flax.patterns import LSGConfig, require

LSG_FIELDS = tuple(f.name for f in fields(LSGConfig))
OF_SOME_FAMILIES = ("embedding_size", "num_hidden_groups", "inner_group_num")  # None: not written
# Values of the fields Hugging Face omits from config.json when they are the default.
_NUM_LABELS_DEFAULT = 2
# What PyTorch's classes compute otherwise and these models do not: field -> the values that are
# fine.
REFUSED: dict[str, tuple] = {
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
}


class Dialect(NamedTuple):
    """How one model_type writes config.json. A field that it neither reads nor refuses changes
    nothing in the family's PyTorch classes; it is kept as it is.

    Attributes:
        defaults: where they differ from the config's, by our names.
        names: ours -> theirs, where they differ.
        absent: fields of ours that it does not have; their default is their only value.
        refused: fields that change the computation -> the values that are supported.
    """

    defaults: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    names: dict[str, str] = {}  # noqa: RUF012
    absent: tuple[str, ...] = ()
    refused: dict[str, tuple] = REFUSED


DIALECTS: dict[str, Dialect] = {}  # by model_type; families/registry.py fills it


def read_fields(values: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a config class, from the fields of a config.json, plain or LSG.

    Args:
        types: of the config's fields by name, `labels`, `lsg` and `extra` among them.

    Raises:
        ValueError: for a setting that changes the computation and is not supported.
    """
    values = dict(values)
    dialect = DIALECTS.get(values.get("model_type", "bert"), Dialect())
    for name, supported in dialect.refused.items():
        value = values.get(name)
        require(
            value in supported,
            f"{name}={value!r} in config.json changes what the model computes and is not "
            f"supported; only {supported[0]!r} is.",
        )
    for name, theirs in dialect.names.items():
        if theirs in values:
            values[name] = values.pop(theirs)
    values = dialect.defaults | values
    known = types.keys() - {"labels", "lsg", "extra"}
    ours = {name: values.pop(name) for name in sorted(known & values.keys())}
    for name, value in ours.items():  # JSON knows numbers only: 0 may stand for 0.0
        if types[name] in (float, float | None) and isinstance(value, int):
            ours[name] = float(value)
    lsg = None
    if is_lsg(values):
        values.pop("base_model_prefix", None)
        lsg = LSGConfig(**{name: values.pop(name) for name in LSG_FIELDS if name in values})
    labels = read_labels(values)
    return {**ours, "labels": labels, "lsg": lsg, "extra": json.dumps(values, sort_keys=True)}


def write_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `read_fields`: Hugging Face's names, the LSG fields flat beside them, unknown
    fields as they were read."""
    labels, lsg, extra = (values.pop(name) for name in ("labels", "lsg", "extra"))
    dialect = DIALECTS.get(values["model_type"], Dialect())
    unused = (name for name in OF_SOME_FAMILIES if values.get(name, 0) is None)
    for name in (*dialect.absent, *unused):
        del values[name]
    for name, theirs in dialect.names.items():
        values[theirs] = values.pop(name)
    values["id2label"] = {str(i): label for i, label in enumerate(labels)}
    values["label2id"] = {label: i for i, label in enumerate(labels)}
    if lsg:
        values["base_model_prefix"] = "lsg"
        values |= {name: getattr(lsg, name) for name in LSG_FIELDS}
        if not lsg.strict_reference:  # ours, not the reference's: written only where it is set
            del values["strict_reference"]
    return json.loads(extra) | values


def is_lsg(values: dict[str, Any]) -> bool:
    """Whether the fields of a config.json are those of an LSG checkpoint."""
    architectures = values.get("architectures") or []
    architectures = [architectures] if isinstance(architectures, str) else architectures
    return values.get("base_model_prefix") == "lsg" or any(
        name.startswith("LSG") for name in architectures
    )


def read_labels(values: dict[str, Any]) -> tuple[str, ...]:
    """Takes the label names out of the fields, in id order.

    Raises:
        ValueError: for ids with gaps.
    """
    id2label = values.pop("id2label", None)
    values.pop("label2id", None)
    count = values.pop("num_labels", None)
    if id2label is None:
        return tuple(f"LABEL_{i}" for i in range(_NUM_LABELS_DEFAULT if count is None else count))
    names = {int(i): str(label) for i, label in id2label.items()}
    require(
        sorted(names) == list(range(len(names))),
        f"id2label has the ids {sorted(names)}; they must be 0..{len(names) - 1} without gaps.",
    )
    return tuple(names[i] for i in range(len(names)))
