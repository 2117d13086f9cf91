"""XLM-RoBERTa: RoBERTa with class names and a vocabulary of its own."""

from dataclasses import replace

from lsg_flax.models.config_json import Dialect
from lsg_flax.models.families.roberta import ROBERTA

XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    class_prefix="XLMRoberta",
    dialect=Dialect({"pad_token_id": 1}),
)
