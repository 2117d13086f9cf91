"""SqueezeBERT: BERT with grouped projections and its own tensor names. PyTorch has no LSG classes
for it, so LSG checkpoints are saved with a model_type of lsg_flax."""

from dataclasses import replace

from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config_json import (
    ABSENT,
    ENCODES_ONLY,
    NOT_A_DECODER,
    REFUSED,
    Dialect,
    Groups,
)
from lsg_flax.models.families import bert
from lsg_flax.models.families.family import Family, Row
from lsg_flax.models.layout import GROUPS, NORM

_LAYER = "encoder.layers.{0}"
_GROUPS = {
    **dict.fromkeys(("q_groups", "k_groups", "v_groups"), Groups(4, ("hidden_size",))),
    "post_attention_groups": Groups(1, ("hidden_size",)),
    **dict.fromkeys(
        ("intermediate_groups", "output_groups"), Groups(4, ("hidden_size", "intermediate_size"))
    ),
}
_MASKED_LM = replace(
    bert.MASKED_LM,
    pooled=True,
    tied=bert.MASKED_LM.tied
    | {"cls.predictions.decoder.weight": "transformer.embeddings.word_embeddings.weight"},
)

SQUEEZEBERT = Family(
    model_type="squeezebert",
    class_prefix="SqueezeBert",
    prefix="transformer",
    encoder=(
        *bert.EMBEDDINGS,
        Row(f"{_LAYER}.attention.query", "encoder/layers/attention/query", GROUPS),
        Row(f"{_LAYER}.attention.key", "encoder/layers/attention/key", GROUPS),
        Row(f"{_LAYER}.attention.value", "encoder/layers/attention/value", GROUPS),
        Row(f"{_LAYER}.post_attention.conv1d", "encoder/layers/attention/output", GROUPS),
        Row(f"{_LAYER}.post_attention.layernorm", "encoder/layers/attention_norm", NORM),
        Row(f"{_LAYER}.intermediate.conv1d", "encoder/layers/mlp_up", GROUPS),
        Row(f"{_LAYER}.output.conv1d", "encoder/layers/mlp_down", GROUPS),
        Row(f"{_LAYER}.output.layernorm", "encoder/layers/mlp_norm", NORM),
    ),
    pooler=bert.POOLER,
    tables=(  # each of its classes has the pooler, whether the head reads it or not
        bert.BASE,
        bert.SEQUENCE_CLASSIFICATION,
        bert.MULTIPLE_CHOICE,
        replace(bert.TOKEN_CLASSIFICATION, pooled=True),
        replace(bert.QUESTION_ANSWERING, pooled=True),
        _MASKED_LM,
    ),
    to_lsg=bert.WITH_SEGMENTS,
    dialect=Dialect(
        {"embedding_size": 768},
        absent={name: only for name, only in ABSENT.items() if name != "embedding_size"}
        | NOT_A_DECODER
        | {"classifier_dropout": None},
        others=dict.fromkeys(_GROUPS, int),
        groups=_GROUPS,
        equal={"embedding_size": "hidden_size"},
        refused={n: v for n, v in REFUSED.items() if n != "position_embedding_type"}
        | ENCODES_ONLY,  # with is_decoder its class would make a causal mask
    ),
    architecture=Architecture(
        layer_norm_eps=1e-12,  # a constant in its class
        groups=(
            ("query", "q_groups"),
            ("key", "k_groups"),
            ("value", "v_groups"),
            ("output", "post_attention_groups"),
            ("mlp_up", "intermediate_groups"),
            ("mlp_down", "output_groups"),
        ),
    ),
    lsg_type="lsg-squeezebert",
)
