"""ALBERT: layers in groups that share parameters, after narrow embeddings that are always
projected."""

from dataclasses import replace

from lsg_flax.models import heads, task
from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config_json import ABSENT, ENCODES_ONLY, NOT_A_DECODER, Dialect
from lsg_flax.models.families import bert
from lsg_flax.models.families.family import Family, HeadTable, Row
from lsg_flax.models.layout import DENSE, DENSE_WITHOUT_BIAS, NORM, TABLE, TENSOR

_LAYER = "encoder.albert_layer_groups.{0}.albert_layers.{1}"
_MASKED_LM = HeadTable(
    task.MASKED_LM,
    "ForMaskedLM",
    heads.LanguageModelHead,
    (
        Row("predictions.dense", "head/transform", DENSE),
        Row("predictions.LayerNorm", "head/layer_norm", NORM),
        Row("predictions.bias", "head/bias", TENSOR),
    ),
    tied={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    untied_rows=(Row("predictions.decoder", "head", DENSE_WITHOUT_BIAS),),
)
_PRETRAINING = replace(
    _MASKED_LM,
    task=task.SENTENCE_ORDER,
    class_suffix="ForPreTraining",
    module=heads.SentenceOrderHead,
    pooled=True,
    rows=(
        Row("predictions.dense", "head/masked_lm/transform", DENSE),
        Row("predictions.LayerNorm", "head/masked_lm/layer_norm", NORM),
        Row("predictions.bias", "head/masked_lm/bias", TENSOR),
        Row("sop_classifier.classifier", "head/sentence_order/classifier", DENSE),
    ),
    untied_rows=(Row("predictions.decoder", "head/masked_lm", DENSE_WITHOUT_BIAS),),
)

ALBERT = Family(
    model_type="albert",
    class_prefix="Albert",
    prefix="albert",
    encoder=(
        Row("embeddings.word_embeddings", "encoder/embeddings/word_embeddings", TABLE),
        Row("embeddings.position_embeddings", "encoder/embeddings/position_embeddings", TABLE),
        Row(
            "embeddings.token_type_embeddings",
            "encoder/embeddings/token_type_embeddings",
            TABLE,
        ),
        Row("embeddings.global_embeddings", "encoder/embeddings/global_embeddings", TABLE),
        Row("embeddings.LayerNorm", "encoder/embeddings/layer_norm", NORM),
        Row("encoder.embedding_hidden_mapping_in", "encoder/embeddings_project", DENSE),
        Row(f"{_LAYER}.attention.query", "encoder/layers/attention/query", DENSE),
        Row(f"{_LAYER}.attention.key", "encoder/layers/attention/key", DENSE),
        Row(f"{_LAYER}.attention.value", "encoder/layers/attention/value", DENSE),
        Row(f"{_LAYER}.attention.dense", "encoder/layers/attention/output", DENSE),
        Row(f"{_LAYER}.attention.LayerNorm", "encoder/layers/attention_norm", NORM),
        Row(f"{_LAYER}.ffn", "encoder/layers/mlp_up", DENSE),
        Row(f"{_LAYER}.ffn_output", "encoder/layers/mlp_down", DENSE),
        Row(f"{_LAYER}.full_layer_layer_norm", "encoder/layers/mlp_norm", NORM),
    ),
    pooler=(Row("pooler", "pooler/dense", DENSE),),
    tables=(
        bert.BASE,
        bert.SEQUENCE_CLASSIFICATION,
        bert.MULTIPLE_CHOICE,
        bert.TOKEN_CLASSIFICATION,
        bert.QUESTION_ANSWERING,
        _MASKED_LM,
        _PRETRAINING,
    ),
    to_lsg=bert.WITH_SEGMENTS,
    dialect=Dialect(
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
        absent=NOT_A_DECODER,
        needed=(*ABSENT,),
        refused_by_lsg=ENCODES_ONLY,
    ),
    architecture=Architecture(always_projects=True),
)
