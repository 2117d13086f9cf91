"""ELECTRA: BERT with embeddings that may be narrower than the layers, and no pooler."""

from dataclasses import replace
from functools import partial

from lsg_flax.models import heads, task
from lsg_flax.models.config_json import ABSENT, Dialect
from lsg_flax.models.families import bert
from lsg_flax.models.families.family import Family, HeadTable, Row
from lsg_flax.models.layout import DENSE, DENSE_WITHOUT_BIAS, NORM, TENSOR

_MASKED_LM = HeadTable(
    task.MASKED_LM,
    "ForMaskedLM",
    partial(heads.LanguageModelHead, act="gelu"),
    (
        Row("generator_predictions.dense", "head/transform", DENSE),
        Row("generator_predictions.LayerNorm", "head/layer_norm", NORM),
        Row("generator_lm_head.bias", "head/bias", TENSOR),
    ),
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    untied_rows=(Row("generator_lm_head", "head", DENSE_WITHOUT_BIAS),),
)

ELECTRA = Family(
    model_type="electra",
    class_prefix="Electra",
    prefix="electra",
    encoder=(
        *bert.ENCODER,
        Row("embeddings_project", "encoder/embeddings_project", DENSE),
    ),
    pooler=(),
    tables=(
        HeadTable(task.BASE, "Model", heads.BaseHead),
        bert.TOKEN_CLASSIFICATION,
        bert.QUESTION_ANSWERING,
        _MASKED_LM,
        replace(_MASKED_LM, task=task.CAUSAL_LM, class_suffix="ForCausalLM"),
        HeadTable(
            task.REPLACED_TOKENS,
            "ForPreTraining",
            heads.DiscriminatorHead,
            (
                Row("discriminator_predictions.dense", "head/dense", DENSE),
                Row("discriminator_predictions.dense_prediction", "head/prediction", DENSE),
            ),
        ),
        HeadTable(
            task.SEQUENCE_CLASSIFICATION,
            "ForSequenceClassification",
            partial(heads.FirstTokenHead, act="gelu", dropout_first=True),
            (
                Row("classifier.dense", "head/dense", DENSE),
                Row("classifier.out_proj", "head/classifier", DENSE),
            ),
        ),
        HeadTable(
            task.MULTIPLE_CHOICE,
            "ForMultipleChoice",
            heads.SequenceSummaryHead,
            (
                Row("sequence_summary.summary", "head/dense", DENSE),
                Row("classifier", "head/classifier", DENSE),
            ),
        ),
    ),
    to_lsg=bert.WITH_SEGMENTS,
    dialect=Dialect(
        {
            "embedding_size": 128,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        absent={name: only for name, only in ABSENT.items() if name != "embedding_size"},
        needed=("embedding_size",),
        others={  # of the head of multiple choice
            "summary_activation": str | None,
            "summary_first_dropout": float,
            "summary_last_dropout": float,
        },
    ),
)
