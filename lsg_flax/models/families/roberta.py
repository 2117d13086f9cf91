"""RoBERTa: BERT with positions counted from pad_token_id + 1, and heads on the first token's
state."""

from dataclasses import replace
from functools import partial

from lsg_flax.models import heads, task
from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config_json import Dialect
from lsg_flax.models.families import bert
from lsg_flax.models.families.family import Family, HeadTable, Row
from lsg_flax.models.layout import DENSE, DENSE_WITHOUT_BIAS, NORM, TENSOR

_MASKED_LM = HeadTable(
    task.MASKED_LM,
    "ForMaskedLM",
    partial(heads.LanguageModelHead, act="gelu"),
    (
        Row("lm_head.dense", "head/transform", DENSE),
        Row("lm_head.layer_norm", "head/layer_norm", NORM),
        Row("lm_head.bias", "head/bias", TENSOR),
    ),
    tied={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    untied_rows=(Row("lm_head.decoder", "head", DENSE_WITHOUT_BIAS),),
)

ROBERTA = Family(
    model_type="roberta",
    class_prefix="Roberta",
    prefix="roberta",
    encoder=bert.ENCODER,
    pooler=bert.POOLER,
    tables=(
        bert.BASE,
        HeadTable(
            task.SEQUENCE_CLASSIFICATION,
            "ForSequenceClassification",
            partial(heads.FirstTokenHead, act="tanh", dropout_first=True),
            (
                Row("classifier.dense", "head/dense", DENSE),
                Row("classifier.out_proj", "head/classifier", DENSE),
            ),
        ),
        bert.MULTIPLE_CHOICE,
        bert.TOKEN_CLASSIFICATION,
        bert.QUESTION_ANSWERING,
        _MASKED_LM,
        replace(_MASKED_LM, task=task.CAUSAL_LM, class_suffix="ForCausalLM"),
    ),
    to_lsg=bert.WITHOUT_SEGMENTS,
    dialect=Dialect({"vocab_size": 50265, "pad_token_id": 1}),
    architecture=Architecture(positions="behind_padding", position_offset=2),
)
