"""Reformer, whose layers are stacked by the kind of their attention."""

from functools import partial

from lsg_flax.models import heads, reformer, task
from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config_reformer import DIALECT, ReformerConfig
from lsg_flax.models.families.family import Family, HeadTable, Row
from lsg_flax.models.layout import (
    AXIAL_COLUMNS,
    AXIAL_ROWS,
    DENSE,
    DENSE_WITHOUT_BIAS,
    NORM,
    TABLE,
    TENSOR,
)

_EMBEDDINGS = "encoder/embeddings"
_LAYER, _POSITIONS = "encoder.layers.{0}", "embeddings.position_embeddings"
_PROJECTIONS = {"local": ("query", "key", "value"), "lsh": ("query_key", "value")}
_SCORES = (
    Row("lm_head.decoder", "head", DENSE_WITHOUT_BIAS),
    Row("lm_head.bias", "head/bias", TENSOR),
)
_ONE_BIAS = {"lm_head.decoder.bias": "lm_head.bias"}


def _layers(kind: str) -> tuple[Row, ...]:
    ours = f"encoder/{kind}_layers"
    attention, mlp = f"{_LAYER}.attention", f"{_LAYER}.feed_forward"
    own = ((f"{attention}.self_attention.{n}", f"attention/{n}") for n in _PROJECTIONS[kind])
    bare = (*own, (f"{attention}.output.dense", "attention/output"))
    return (
        Row(f"{attention}.layer_norm", f"{ours}/attention_norm", NORM),
        *(Row(theirs, f"{ours}/{name}", DENSE_WITHOUT_BIAS) for theirs, name in bare),
        Row(f"{mlp}.layer_norm", f"{ours}/mlp_norm", NORM),
        Row(f"{mlp}.dense.dense", f"{ours}/mlp_up", DENSE),
        Row(f"{mlp}.output.dense", f"{ours}/mlp_down", DENSE),
    )


REFORMER = Family(
    model_type="reformer",
    class_prefix="Reformer",
    prefix="reformer",
    encoder=(
        Row("embeddings.word_embeddings", f"{_EMBEDDINGS}/word_embeddings", TABLE),
        Row(f"{_POSITIONS}.embedding", f"{_EMBEDDINGS}/position_embeddings", TABLE),
        Row(f"{_POSITIONS}.weights.0", f"{_EMBEDDINGS}/row_embeddings", AXIAL_ROWS),
        Row(f"{_POSITIONS}.weights.1", f"{_EMBEDDINGS}/column_embeddings", AXIAL_COLUMNS),
        *_layers("local"),
        *_layers("lsh"),
        Row("encoder.layer_norm", "encoder/final_norm", NORM),
    ),
    pooler=(),
    tables=(
        HeadTable(task.BASE, "Model", heads.BaseHead),
        HeadTable(
            task.CAUSAL_LM,
            "ModelWithLMHead",
            reformer.ReformerScoresHead,
            _SCORES,
            tied=_ONE_BIAS,
        ),
        HeadTable(
            task.MASKED_LM,
            "ForMaskedLM",
            partial(reformer.ReformerScoresHead, causal=False),
            _SCORES,
            tied=_ONE_BIAS,
        ),
        HeadTable(
            task.SEQUENCE_CLASSIFICATION,
            "ForSequenceClassification",
            partial(heads.FirstTokenHead, act="tanh", dropout_first=True),
            (
                Row("classifier.dense", "head/dense", DENSE),
                Row("classifier.out_proj", "head/classifier", DENSE),
            ),
        ),
        HeadTable(
            task.QUESTION_ANSWERING,
            "ForQuestionAnswering",
            heads.QuestionAnsweringHead,
            (Row("qa_outputs", "head/outputs", DENSE),),
        ),
    ),
    to_lsg=None,
    dialect=DIALECT,
    architecture=Architecture(embedding_norm=False, embeds_padding=True),
    config_type=ReformerConfig,
    ignored=("encoder.layers.*.attention.self_attention.*mask_value_float*",),  # of old files
)
