"""The registry of families."""

import re
from typing import Any

from lsg_flax.checks import short
from lsg_flax.models.config import ModelConfig
from lsg_flax.models.config_json import DIALECTS, class_names
from lsg_flax.models.families.albert import ALBERT
from lsg_flax.models.families.bart import BART
from lsg_flax.models.families.bert import BERT
from lsg_flax.models.families.camembert import CAMEMBERT
from lsg_flax.models.families.distilbert import DISTILBERT
from lsg_flax.models.families.electra import ELECTRA
from lsg_flax.models.families.family import Family
from lsg_flax.models.families.local_transformer import LOCAL_TRANSFORMER
from lsg_flax.models.families.mbart import MBART
from lsg_flax.models.families.pegasus import PEGASUS
from lsg_flax.models.families.realm import REALM
from lsg_flax.models.families.reformer import REFORMER
from lsg_flax.models.families.roberta import ROBERTA
from lsg_flax.models.families.squeezebert import SQUEEZEBERT
from lsg_flax.models.families.xlm_roberta import XLM_ROBERTA
from lsg_flax.models.outputs import ModelOutput
from lsg_flax.models.task import TASKS

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Registers a family by its model_type, its dialect for the configs, and its new tasks.

    Raises:
        ValueError: if the model_type is taken, a task has two heads, or a target is not a field of
            `ModelOutput`.
    """
    name = family.model_type
    if name in FAMILIES:
        raise ValueError(
            f"model_type={name!r} is already that of {FAMILIES[name].class_prefix}; give "
            f"{family.class_prefix} another model_type."
        )
    tasks, outputs = [table.task for table in family.tables], ModelOutput.__dataclass_fields__
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"{name} has two heads for one task: {[task.name for task in tasks]}.")
    for task, output in [(each.name, t.output) for each in tasks for t in each.targets]:
        if output not in outputs:
            raise ValueError(
                f"output={output!r} of the task {task!r} is unknown; choose one of {[*outputs]}."
            )
    FAMILIES[name] = family
    DIALECTS[name] = family.dialect
    for each in tasks:  # if families have tasks of the same name, TASKS has that of the first
        TASKS.setdefault(each.name, each)


for _family in (
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    CAMEMBERT,
    ELECTRA,
    DISTILBERT,
    ALBERT,
    BART,
    MBART,
    PEGASUS,
    SQUEEZEBERT,
    REALM,
    LOCAL_TRANSFORMER,
    REFORMER,
):
    register(_family)


def family_of(model_type: str) -> Family:
    """Returns the family of a model_type in config.json.

    Raises:
        ValueError: for a model_type that is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type={short(model_type)} is not supported; supported are {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def read_config(values: dict[str, Any]) -> ModelConfig:
    """Makes the config of a model from the fields of a config.json, plain or LSG.

    Raises:
        ValueError: for a model_type or a setting that is not supported, or an invalid value.
    """
    family = family_of(model_type_of(values))
    return family.config_type.from_dict(values | {"model_type": family.model_type})


def model_type_of(values: dict[str, Any]) -> str:
    """Returns the model_type of a config.json, by `architectures` if it has none.

    Raises:
        ValueError: if it has neither.
    """
    model_type = values.get("model_type")
    if model_type is not None:
        for name, family in FAMILIES.items():
            if model_type in (*family.other_types, family.lsg_type):
                return name
        return model_type
    classes = class_names(values)
    for name in classes:
        for family in FAMILIES.values():
            names = "|".join((family.class_prefix, *family.other_names))
            known = re.fullmatch(f"(LSG)?({names})(Model|LMHeadModel|For[A-Z].*)", name)
            if known or family.task_of(name):
                return family.model_type
    raise ValueError(
        f"there is no model_type, and architectures={short(classes)} has no class of a supported "
        f"family; write model_type into config.json or pass model_type=, one of "
        f"{', '.join(FAMILIES)}."
    )
