"""BERT, and the tensor names that RoBERTa, its descendants and ELECTRA share."""

from dataclasses import replace

from lsg_flax.models import heads, task
from lsg_flax.models.families.family import (
    Family,
    HeadTable,
    PositionTable,
    Row,
    Rows,
    ToLSG,
)
from lsg_flax.models.layout import DENSE, DENSE_WITHOUT_BIAS, NORM, TABLE, TENSOR

_EMBEDDINGS = "encoder/embeddings"
_LAYER = "encoder.layer.{0}"

EMBEDDINGS: Rows = (
    Row("embeddings.word_embeddings", "encoder/embeddings/word_embeddings", TABLE),
    Row("embeddings.position_embeddings", "encoder/embeddings/position_embeddings", TABLE),
    Row("embeddings.token_type_embeddings", "encoder/embeddings/token_type_embeddings", TABLE),
    Row("embeddings.global_embeddings", "encoder/embeddings/global_embeddings", TABLE),
    Row("embeddings.LayerNorm", "encoder/embeddings/layer_norm", NORM),
)
ENCODER: Rows = (
    *EMBEDDINGS,
    Row(f"{_LAYER}.attention.self.query", "encoder/layers/attention/query", DENSE),
    Row(f"{_LAYER}.attention.self.key", "encoder/layers/attention/key", DENSE),
    Row(f"{_LAYER}.attention.self.value", "encoder/layers/attention/value", DENSE),
    Row(f"{_LAYER}.attention.output.dense", "encoder/layers/attention/output", DENSE),
    Row(f"{_LAYER}.attention.output.LayerNorm", "encoder/layers/attention_norm", NORM),
    Row(f"{_LAYER}.intermediate.dense", "encoder/layers/mlp_up", DENSE),
    Row(f"{_LAYER}.output.dense", "encoder/layers/mlp_down", DENSE),
    Row(f"{_LAYER}.output.LayerNorm", "encoder/layers/mlp_norm", NORM),
    Row(f"{_LAYER}.crossattention.self.query", "encoder/layers/cross_attention/query", DENSE),
    Row(f"{_LAYER}.crossattention.self.key", "encoder/layers/cross_attention/key", DENSE),
    Row(f"{_LAYER}.crossattention.self.value", "encoder/layers/cross_attention/value", DENSE),
    Row(f"{_LAYER}.crossattention.output.dense", "encoder/layers/cross_attention/output", DENSE),
    Row(f"{_LAYER}.crossattention.output.LayerNorm", "encoder/layers/cross_attention_norm", NORM),
)
POOLER: Rows = (Row("pooler.dense", "pooler/dense", DENSE),)
CLASSIFIER: Rows = (Row("classifier", "head/classifier", DENSE),)
ANSWER_ENDS: Rows = (Row("qa_outputs", "head/outputs", DENSE),)

POSITIONS = PositionTable(f"{_EMBEDDINGS}/position_embeddings/embedding")
WITHOUT_SEGMENTS = ToLSG(
    (POSITIONS,),
    f"{_EMBEDDINGS}/global_embeddings/embedding",
    f"{_EMBEDDINGS}/word_embeddings/embedding",
)
WITH_SEGMENTS = replace(WITHOUT_SEGMENTS, segments=f"{_EMBEDDINGS}/token_type_embeddings/embedding")

BASE = HeadTable(task.BASE, "Model", heads.BaseHead, pooled=True)
SEQUENCE_CLASSIFICATION = HeadTable(
    task.SEQUENCE_CLASSIFICATION,
    "ForSequenceClassification",
    heads.SequenceClassificationHead,
    CLASSIFIER,
    pooled=True,
)
TOKEN_CLASSIFICATION = HeadTable(
    task.TOKEN_CLASSIFICATION, "ForTokenClassification", heads.TokenClassificationHead, CLASSIFIER
)
QUESTION_ANSWERING = HeadTable(
    task.QUESTION_ANSWERING, "ForQuestionAnswering", heads.QuestionAnsweringHead, ANSWER_ENDS
)
MULTIPLE_CHOICE = HeadTable(
    task.MULTIPLE_CHOICE, "ForMultipleChoice", heads.MultipleChoiceHead, CLASSIFIER, pooled=True
)
MASKED_LM = HeadTable(
    task.MASKED_LM,
    "ForMaskedLM",
    heads.LanguageModelHead,
    (
        Row("cls.predictions.transform.dense", "head/transform", DENSE),
        Row("cls.predictions.transform.LayerNorm", "head/layer_norm", NORM),
        Row("cls.predictions.bias", "head/bias", TENSOR),
    ),
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    untied_rows=(Row("cls.predictions.decoder", "head", DENSE_WITHOUT_BIAS),),
)
_PRETRAINING = replace(
    MASKED_LM,
    task=task.PRETRAINING,
    class_suffix="ForPreTraining",
    module=heads.PretrainingHead,
    pooled=True,
    rows=(
        Row("cls.predictions.transform.dense", "head/masked_lm/transform", DENSE),
        Row("cls.predictions.transform.LayerNorm", "head/masked_lm/layer_norm", NORM),
        Row("cls.predictions.bias", "head/masked_lm/bias", TENSOR),
        Row("cls.seq_relationship", "head/seq_relationship", DENSE),
    ),
    untied_rows=(Row("cls.predictions.decoder", "head/masked_lm", DENSE_WITHOUT_BIAS),),
)

BERT = Family(
    model_type="bert",
    class_prefix="Bert",
    prefix="bert",
    encoder=ENCODER,
    pooler=POOLER,
    tables=(
        BASE,
        SEQUENCE_CLASSIFICATION,
        MULTIPLE_CHOICE,
        TOKEN_CLASSIFICATION,
        QUESTION_ANSWERING,
        MASKED_LM,
        replace(MASKED_LM, task=task.CAUSAL_LM, class_suffix="LMHeadModel"),
        _PRETRAINING,
        HeadTable(
            task.NEXT_SENTENCE_PREDICTION,
            "ForNextSentencePrediction",
            heads.NextSentenceHead,
            (Row("cls.seq_relationship", "head/seq_relationship", DENSE),),
            pooled=True,
        ),
    ),
    to_lsg=WITH_SEGMENTS,
)
