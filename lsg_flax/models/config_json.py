"""The fields of Hugging Face's config.json <-> those of our configs: how each model_type writes
them, and what is refused because it changes the computation."""

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
RATE = Range(0.0, 1 - 2**-53, "must lie in [0, 1)")  # of a dropout
# Fields of some families only; None to all others, as in PyTorch, where they change nothing.
ABSENT: dict[str, Any] = dict.fromkeys(("embedding_size", "num_hidden_groups", "inner_group_num"))
NOT_A_DECODER: dict[str, Any] = {"is_decoder": False, "add_cross_attention": False}
ENCODES_ONLY: dict[str, tuple] = {"is_decoder": (False, None)}  # LSG ones mix causal parts in
# What PyTorch's classes compute otherwise and these models do not: field -> the values that are
# fine.
REFUSED: dict[str, tuple] = {
    "position_embedding_type": ("absolute",),  # null leaves the positions out there
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
# What every family may have beside our fields, where it is read.
_OTHERS: dict[str, Any] = {
    "architectures": str | tuple[str, ...] | None,
    "bos_token_id": int | None,
    "eos_token_id": int | tuple[int, ...] | None,
    "mask_token_id": int | None,
}


class Groups(NamedTuple):
    """A field beside ours that holds how many groups a projection's features are cut into.

    Attributes:
        default: where config.json leaves it out.
        of: our fields with the numbers of features, which it divides.
    """

    default: int
    of: tuple[str, ...]


class Dialect(NamedTuple):
    """How one model_type writes config.json. A field that it neither reads nor refuses changes
    nothing in the family's PyTorch classes; it is kept as it is.

    Attributes:
        defaults: where they differ from the config's, by our names.
        names: ours -> theirs, where they differ.
        absent: fields of ours that its PyTorch classes do not read -> what they compute with.
        needed: fields that are None elsewhere, and a number here.
        also: of `names`, those that PyTorch reads under our name too, which then wins.
        others: fields that are read beside ours -> their types; floats are rates of dropout.
        groups: numbers of groups, of `others`.
        equal: fields of ours -> others that they must be equal to.
        refused: fields that change the computation -> the values that are supported.
        refused_by_lsg: the same, of those that only the LSG classes read.
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
        """What messages call a field of ours."""
        return f"{self.names[name]} ({name})" if name in self.names else name

    def check_others(self, values: Mapping[str, Any], *, lsg: bool) -> None:
        """Raises ValueError for fields beside ours that change the computation and are not
        supported, or that are read and have another type."""
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
        """Raises ValueError for values of our fields that the family's PyTorch classes cannot
        have."""
        for name, only in self.absent.items():
            require(
                values.get(name, only) == only,
                f"{name}={short(values.get(name))} is not possible for {model_type}: its PyTorch "
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
        """Raises ValueError for sizes that do not fit each other, given our fields and those beside
        them."""
        for name, same in self.equal.items():
            require(
                values[name] == values[same],
                f"{name}={values[name]} is unlike {same}={values[same]}, and {model_type} has no "
                f"projection from embeddings to layers; give {name}={values[same]} (a config.json "
                f"that leaves it out means {self.defaults.get(name)}).",
            )
        for name, (default, sizes) in self.groups.items():
            count = others.get(name, default)
            fits = math.gcd(count or default, *(values[size] for size in sizes))
            for size in sizes:
                require(
                    count >= 1 and values[size] % count == 0,
                    f"{name}={count} does not divide {size}={values[size]}, of which each group "
                    f"takes an equal share; give a number of groups that does, such as {fits}.",
                )


DIALECTS: dict[str, Dialect] = {}  # by model_type; families/registry.py fills it


def dialect_of(model_type: str) -> Dialect:
    """The dialect of a family, BERT's for one that is not known."""
    return DIALECTS.get(model_type, Dialect())


def read_fields(values: dict[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a config class, from the fields of a config.json, plain or LSG; the class
    checks them.

    Args:
        types: of the config's fields, by name.

    Raises:
        ValueError: for fields that cannot be told apart: damaged labels, classes, model_type.
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
        f"model_type={ours.get('model_type')!r} has {sorted({*ours} - {*types})}, which "
        "this config does not; lsg_flax.models.read_config picks the one of the family.",
    )
    for name, value in ours.items():  # JSON knows numbers only: 0 may stand for 0.0
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
        raise ValueError(f"a config holds what JSON cannot: {error}") from error
    return {**ours, "labels": labels, "lsg": lsg, "extra": extra}


def write_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `read_fields`: Hugging Face's names, the LSG fields flat beside them, unknown
    fields as they were read; `label2id` is that of the labels."""
    labels, lsg, extra = (values.pop(name) for name in ("labels", "lsg", "extra"))
    dialect = dialect_of(values["model_type"])
    for name in dialect.absent:
        values.pop(name, None)
    if "classifier_dropout" in dialect.names and values["classifier_dropout"] is None:
        # Its class has this field under a name of its own and wants a number, not null.
        values["classifier_dropout"] = values["hidden_dropout_prob"]
    for name, theirs in dialect.names.items():
        values[theirs] = values.pop(name)
    values["id2label"] = {str(i): label for i, label in enumerate(labels)}
    values["label2id"] = {label: i for i, label in enumerate(labels)}
    others = json.loads(extra)
    if lsg:
        others.setdefault("base_model_prefix", "lsg")
        values |= {name: getattr(lsg, name) for name in LSG_FIELDS}
        if not lsg.strict_reference:  # ours, not the reference's: written only where it is set
            del values["strict_reference"]
    return others | values


def class_names(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of PyTorch's classes in config.json; often one, none where it says nothing.

    Raises:
        ValueError: for anything else than names.
    """
    names = values.get("architectures")
    names = checked_value("architectures", names, _OTHERS["architectures"]) or ()
    return (names,) if isinstance(names, str) else names  # the reference's converter leaves a text


def is_lsg(values: Mapping[str, Any]) -> bool:
    """Whether the fields of a config.json are those of an LSG checkpoint."""
    classes = class_names(values)
    return values.get("base_model_prefix") == "lsg" or any(n.startswith("LSG") for n in classes)


def read_labels(values: dict[str, Any]) -> tuple[str, ...]:
    """Takes the label names out of the fields, in id order. As in PyTorch, `id2label` wins over
    `num_labels`, and `label2id` is not read.

    Raises:
        ValueError: for ids with gaps, or what is no mapping from ids to names.
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
            f"num_labels={count} does not count, since id2label has {len(id2label)} names.",
            stacklevel=2,
        )
    # Names may be numbers in PyTorch; here they are texts.
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
            f"id2label has names that are empty or there twice, {short(unclear)}, which answers do "
            "not tell apart; give each label a name of its own.",
            stacklevel=2,
        )
    return labels


def _label_id(key: Any) -> int:
    try:
        if isinstance(key, str | numbers.Integral):
            return int(key)
    except ValueError:
        pass
    raise ValueError(f"id2label has the id {short(key)}, which is no whole number.")
