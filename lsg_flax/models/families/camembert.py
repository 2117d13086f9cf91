"""CamemBERT: RoBERTa with class names and a vocabulary of its own."""

from dataclasses import replace

from lsg_flax.models.config_json import Dialect
from lsg_flax.models.families.roberta import ROBERTA

CAMEMBERT = replace(
    ROBERTA,
    model_type="camembert",
    class_prefix="Camembert",
    dialect=Dialect({"pad_token_id": 1}),
)
