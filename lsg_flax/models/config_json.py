"""Converts between the fields of Hugging Face's config.json and those of our configs: how each
model_type names them, and which ones are refused because they change the computation."""

import json
import math
import numbers
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from lsg_flax.checks import Range, checked_value, require, short, whole
from lsg_flax.patterns import LSGConfig

LSG_FIELDS = tuple(f.name for f in fields(LSGConfig))
LABEL_COUNT = whole(1, 2**20)
RATE = Range(0.0, 1 - 2**-53, "must be in [0, 1)")  # of a dropout
# Fields that only some families have; None for all others, where PyTorch ignores them.
ABSENT: dict[str, Any] = dict.fromkeys(("embedding_size", "num_hidden_groups", "inner_group_num"))
NOT_A_DECODER: dict[str, Any] = {"is_decoder": False, "add_cross_attention": False}
# The LSG classes of these families would mix causal parts in.
ENCODES_ONLY: dict[str, tuple] = {"is_decoder": (False, None)}
# Fields that change what PyTorch's classes compute, without support here -> the allowed values.
REFUSED: dict[str, tuple] = {
    "position_embedding_type": ("absolute",),  # with null PyTorch leaves the positions out
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
# Fields that every family may have beside our own, with the types that are read.
_OTHERS: dict[str, Any] = {
    "architectures": str | tuple[str, ...] | None,
    "bos_token_id": int | None,
    "eos_token_id": int | tuple[int, ...] | None,
    "mask_token_id": int | None,
}


class Groups(NamedTuple):
    """A field beside ours with the number of groups that a projection's features are split into.

    Attributes:
        default: the number if config.json leaves the field out.
        of: our fields with numbers of features, each of which it must divide.
    """

    default: int
    of: tuple[str, ...]


class Dialect(NamedTuple):
    """How one model_type writes config.json. Fields that it neither reads nor refuses have no
    effect in the family's PyTorch classes; they are kept unchanged.

    Attributes:
        defaults: defaults that differ from the config's, by our names.
        names: our names -> theirs, where they differ.
        absent: our fields that the family's PyTorch classes do not read -> the value that they
            compute with.
        needed: fields that must be a number here and are None in other families.
        also: those of `names` that PyTorch also reads under our name, which then has priority.
        others: fields that are read beside ours -> their types; floats are dropout rates.
        groups: those of `others` that are numbers of groups.
        equal: our fields -> other fields that they must be equal to.
        refused: fields that change the computation -> the supported values.
        refused_by_lsg: as `refused`, for fields that only the LSG classes read.
    """

    defaults: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    names: dict[str, str] = {}  # noqa: RUF012
    absent: dict[str, Any] = ABSENT
    needed: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    others: dict[str, Any] = {}  # noqa: RUF012
    groups: dict[str, Groups] = {}  # noqa: RUF012
    equal: dict[str, str] = {}  # noqa: RUF012
    refused: dict[str, tuple] = REFUSED
    refused_by_lsg: dict[str, tuple] = {}  # noqa: RUF012

    def spelled(self, name: str) -> str:
        """Returns what error messages call one of our fields."""
        return f"{self.names[name]} ({name})" if name in self.names else name

    def check_others(self, values: Mapping[str, Any], *, lsg: bool) -> None:
        """Checks the fields beside ours. Raises ValueError for unsupported values of fields that
        change the computation, and for values of a wrong type."""
        refused = self.refused | (self.refused_by_lsg if lsg else {})
        for name, supported in refused.items():
            require(
                name not in values or values[name] in supported,
                f"{name}={short(values.get(name))} in config.json changes what the model computes "
                f"and is not supported; only {supported[0]!r} is.",
            )
        for name, kind in (_OTHERS | self.others).items():
            if name in values:
                checked_value(name, values[name], kind, RATE if kind is float else None)

    def check_absent(self, values: Mapping[str, Any], model_type: str) -> None:
        """Raises ValueError for values of our fields that the family's PyTorch classes do not
        support."""
        for name, only in self.absent.items():
            require(
                values.get(name, only) == only,
                f"{name}={short(values.get(name))} is not possible for {model_type}, whose PyTorch "
                f"classes do not read it; give {name}={only!r}.",
            )
        for name in self.needed:
            require(
                values[name] is not None,
                f"{self.spelled(name)}=None must be a number for {model_type}.",
            )

    def check_sizes(
        self, values: Mapping[str, Any], others: Mapping[str, Any], model_type: str
    ) -> None:
        """Raises ValueError for sizes that do not fit together; `values` are our fields, `others`
        those beside them."""
        for name, same in self.equal.items():
            require(
                values[name] == values[same],
                f"{name}={values[name]} must equal {same}={values[same]}, because {model_type} has "
                f"no projection from embeddings to layers; give {name}={values[same]} (the default "
                f"of config.json is {self.defaults.get(name)}).",
            )
        for name, (default, sizes) in self.groups.items():
            count = others.get(name, default)
            fits = math.gcd(count or default, *(values[size] for size in sizes))
            for size in sizes:
                require(
                    count >= 1 and values[size] % count == 0,
                    f"{name}={count} does not divide {size}={values[size]}, of which each group "
                    f"takes an equal share; give a divisor, such as {fits}.",
                )


DIALECTS: dict[str, Dialect] = {}  # by model_type; families/registry.py fills it


def dialect_of(model_type: str) -> Dialect:
    """Returns the dialect of a family; BERT's for an unknown one."""
    return DIALECTS.get(model_type, Dialect())


def read_fields(values: dict[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the arguments of a config class from the fields of a config.json, plain or LSG; the
    class checks them.

    Args:
        values: the fields of config.json.
        types: the types of the config's fields, by name.

    Raises:
        ValueError: for invalid labels, `architectures` or model_type.
    """
    values = dict(values)
    dialect = dialect_of(checked_value("model_type", values.get("model_type", "bert"), str))
    ours: dict[str, Any] = dict(dialect.defaults)
    for name in set(types) - {"labels", "lsg", "extra", *dialect.absent}:
        for theirs in (dialect.names.get(name, name), *{name} & {*dialect.also}):
            if theirs in values:
                ours[name] = values.pop(theirs)
    ours |= {name: value for name, value in dialect.absent.items() if name in types}
    if (count := ours.pop("num_labels", None)) is not None and values.get("id2label") is None:
        values.setdefault("num_labels", count)
    require(
        ours.keys() <= types.keys(),
        f"model_type={ours.get('model_type')!r} has the fields {sorted({*ours} - {*types})}, which "
        "this config class lacks; lsg_flax.models.read_config picks the class of the family.",
    )
    for name, value in ours.items():  # JSON has one type of numbers: 0 may mean 0.0
        if type(value) is int and types[name] in (float, float | None):
            ours[name] = checked_value(dialect.spelled(name), value, float)
    lsg = None
    if is_lsg(values):
        if values.get("base_model_prefix") == "lsg":
            del values["base_model_prefix"]
        lsg = LSGConfig(**{name: values.pop(name) for name in LSG_FIELDS if name in values})
    labels = read_labels(values)
    try:
        extra = json.dumps(values, sort_keys=True)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"a field of the config cannot be written as JSON: {error}") from error
    return {**ours, "labels": labels, "lsg": lsg, "extra": extra}


def write_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `read_fields`: returns Hugging Face's names, with the LSG fields at the same
    level, and unknown fields as they were read; `label2id` is made from the labels."""
    labels, lsg, extra = (values.pop(name) for name in ("labels", "lsg", "extra"))
    dialect = dialect_of(values["model_type"])
    for name in dialect.absent:
        values.pop(name, None)
    if "classifier_dropout" in dialect.names and values["classifier_dropout"] is None:
        # The family's class has another name for this field, and needs a number, not null.
        values["classifier_dropout"] = values["hidden_dropout_prob"]
    for name, theirs in dialect.names.items():
        values[theirs] = values.pop(name)
    values["id2label"] = {str(i): label for i, label in enumerate(labels)}
    values["label2id"] = {label: i for i, label in enumerate(labels)}
    others = json.loads(extra)
    if lsg:
        others.setdefault("base_model_prefix", "lsg")
        values |= {name: getattr(lsg, name) for name in LSG_FIELDS}
        if not lsg.strict_reference:  # not a field of the reference: written only if it is set
            del values["strict_reference"]
    return others | values


def class_names(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of PyTorch's classes in config.json (`architectures`); usually one, empty
    if there are none.

    Raises:
        ValueError: if `architectures` is neither a name nor a list of names.
    """
    names = values.get("architectures")
    names = checked_value("architectures", names, _OTHERS["architectures"]) or ()
    return (names,) if isinstance(names, str) else names  # the reference's converter writes a str


def is_lsg(values: Mapping[str, Any]) -> bool:
    """Whether the fields of a config.json belong to an LSG checkpoint."""
    classes = class_names(values)
    return values.get("base_model_prefix") == "lsg" or any(n.startswith("LSG") for n in classes)


def read_labels(values: dict[str, Any]) -> tuple[str, ...]:
    """Takes the labels out of the fields and returns their names in id order. As in PyTorch,
    `id2label` has priority over `num_labels`, and `label2id` is not read.

    Raises:
        ValueError: for ids with gaps, or an `id2label` that does not map ids to names.
    """
    id2label, label2id = (values.pop(name, None) for name in ("id2label", "label2id"))
    counted = "num_labels" in values
    count: int = checked_value("num_labels", values.pop("num_labels", 2), int, LABEL_COUNT)
    for name, given in (("id2label", id2label), ("label2id", label2id)):
        require(
            given is None or isinstance(given, Mapping),
            f'{name}={short(given)} must be a mapping, such as id2label={{"0": "no", "1": "yes"}}.',
        )
    if id2label is None:
        return tuple(f"LABEL_{i}" for i in range(count))
    if counted and count != len(id2label):
        warnings.warn(
            f"num_labels={count} is ignored, because id2label has {len(id2label)} names.",
            stacklevel=2,
        )
    # Names may be numbers in PyTorch; here they become strings.
    names = {
        _label_id(i): str(checked_value("id2label", n, str | int)) for i, n in id2label.items()
    }
    require(
        sorted(names) == list(range(len(id2label))),
        f"id2label has the ids {short(sorted(names))}; they must be 0..{len(id2label) - 1} without "
        "gaps.",
    )
    labels = tuple(names[i] for i in range(len(names)))
    unclear = [n for n in dict.fromkeys(labels) if labels.count(n) > 1 or not n.strip()]
    if unclear:
        warnings.warn(
            f"id2label has empty or repeated names, {short(unclear)}, which cannot be told apart "
            "in answers; give each label its own name.",
            stacklevel=2,
        )
    return labels


def _label_id(key: Any) -> int:
    try:
        if isinstance(key, str | numbers.Integral):
            return int(key)
    except ValueError:
        pass
    raise ValueError(f"id2label has the id {short(key)}; ids must be integers.")
