"""The fields of Hugging Face's config.json <-> those of our configs: how each model_type writes
them, and what is refused because it changes the computation."""

import json
from dataclasses import fields
from typing import Any, NamedTuple

from lsg_flax.patterns import LSGConfig, require

LSG_FIELDS = tuple(f.name for f in fields(LSGConfig))


# Values of the fields Hugging Face omits from config.json when they are the default.
_NUM_LABELS_DEFAULT = 2


class Dialect(NamedTuple):
    """How one model_type writes config.json.

    Attributes:
        defaults: where they differ from `EncoderConfig`'s, by our names.
        names: ours -> theirs, where they differ.
        absent: fields of ours that it does not have; their default is their only value.
    """

    defaults: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    names: dict[str, str] = {}  # noqa: RUF012
    absent: tuple[str, ...] = ()


DIALECTS: dict[str, Dialect] = {
    "roberta": Dialect({"vocab_size": 50265, "pad_token_id": 1}),
    "xlm-roberta": Dialect({"pad_token_id": 1}),
    "camembert": Dialect({"pad_token_id": 1}),
    "electra": Dialect(
        {
            "embedding_size": 128,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        }
    ),
    "distilbert": Dialect(
        {"num_hidden_layers": 6, "classifier_dropout": 0.2, "type_vocab_size": 0},
        {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "classifier_dropout": "seq_classif_dropout",
        },
        ("type_vocab_size", "layer_norm_eps"),
    ),
    "albert": Dialect(
        {
            "vocab_size": 30000,
            "embedding_size": 128,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "intermediate_size": 16384,
            "num_hidden_groups": 1,
            "inner_group_num": 1,
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout": 0.1,
        },
        {"classifier_dropout": "classifier_dropout_prob"},
    ),
}


# What PyTorch's classes compute otherwise, and these models do not: field -> the values that are
# fine.
_UNSUPPORTED: dict[str, tuple] = {
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
    "summary_type": ("first", None),
    "summary_use_proj": (True, None),
}


def read_fields(values: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a config class, from the fields of a config.json, plain or LSG.

    Args:
        types: of the config's fields by name, `labels`, `lsg` and `extra` among them.

    Raises:
        ValueError: for a setting that changes the computation and is not supported.
    """
    values = dict(values)
    for name, supported in _UNSUPPORTED.items():
        value = values.get(name)
        require(
            value in supported,
            f"{name}={value!r} in config.json changes what the model computes and is not "
            f"supported; only {supported[0]!r} is.",
        )
    dialect = DIALECTS.get(values.get("model_type", "bert"), Dialect())
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
    for name in dialect.absent:
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
