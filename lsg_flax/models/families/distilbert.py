"""DistilBERT: BERT without segments and pooler, under names of its own."""

from functools import partial

from lsg_flax.models import heads, task
from lsg_flax.models.config_json import ABSENT, ENCODES_ONLY, NOT_A_DECODER, REFUSED, Dialect
from lsg_flax.models.families import bert
from lsg_flax.models.families.family import Family, HeadTable, Row
from lsg_flax.models.layout import DENSE, DENSE_WITHOUT_BIAS, NORM, TABLE, TENSOR

_LAYER = "transformer.layer.{0}"
_CLASSIFIER = (
    Row("pre_classifier", "head/dense", DENSE),
    Row("classifier", "head/classifier", DENSE),
)

DISTILBERT = Family(
    model_type="distilbert",
    class_prefix="DistilBert",
    prefix="distilbert",
    encoder=(
        Row("embeddings.word_embeddings", "encoder/embeddings/word_embeddings", TABLE),
        Row("embeddings.position_embeddings", "encoder/embeddings/position_embeddings", TABLE),
        Row("embeddings.global_embeddings", "encoder/embeddings/global_embeddings", TABLE),
        Row("embeddings.LayerNorm", "encoder/embeddings/layer_norm", NORM),
        Row(f"{_LAYER}.attention.q_lin", "encoder/layers/attention/query", DENSE),
        Row(f"{_LAYER}.attention.k_lin", "encoder/layers/attention/key", DENSE),
        Row(f"{_LAYER}.attention.v_lin", "encoder/layers/attention/value", DENSE),
        Row(f"{_LAYER}.attention.out_lin", "encoder/layers/attention/output", DENSE),
        Row(f"{_LAYER}.sa_layer_norm", "encoder/layers/attention_norm", NORM),
        Row(f"{_LAYER}.ffn.lin1", "encoder/layers/mlp_up", DENSE),
        Row(f"{_LAYER}.ffn.lin2", "encoder/layers/mlp_down", DENSE),
        Row(f"{_LAYER}.output_layer_norm", "encoder/layers/mlp_norm", NORM),
    ),
    pooler=(),
    tables=(
        HeadTable(task.BASE, "Model", heads.BaseHead),
        HeadTable(
            task.TOKEN_CLASSIFICATION,
            "ForTokenClassification",
            partial(heads.TokenClassificationHead, of_hidden=True),
            bert.CLASSIFIER,
        ),
        HeadTable(
            task.QUESTION_ANSWERING,
            "ForQuestionAnswering",
            partial(heads.QuestionAnsweringHead, dropout_field="qa_dropout", dropout_default=0.1),
            bert.ANSWER_ENDS,
        ),
        HeadTable(
            task.MASKED_LM,
            "ForMaskedLM",
            heads.LanguageModelHead,
            (
                Row("vocab_transform", "head/transform", DENSE),
                Row("vocab_layer_norm", "head/layer_norm", NORM),
                Row("vocab_projector.bias", "head/bias", TENSOR),
            ),
            tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
            untied_rows=(Row("vocab_projector", "head", DENSE_WITHOUT_BIAS),),
        ),
        HeadTable(
            task.SEQUENCE_CLASSIFICATION,
            "ForSequenceClassification",
            partial(heads.FirstTokenHead, act="relu"),
            _CLASSIFIER,
        ),
        HeadTable(
            task.MULTIPLE_CHOICE,
            "ForMultipleChoice",
            partial(heads.FirstTokenHead, act="relu", choices=True),
            _CLASSIFIER,
        ),
    ),
    to_lsg=bert.WITHOUT_SEGMENTS,
    dialect=Dialect(
        {"num_hidden_layers": 6, "classifier_dropout": 0.2},
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
        absent=ABSENT
        | NOT_A_DECODER
        | {"type_vocab_size": 0, "layer_norm_eps": 1e-12},  # which its classes have as a constant
        also=("hidden_size", "num_hidden_layers", "num_attention_heads"),
        others={"qa_dropout": float},
        refused={n: v for n, v in REFUSED.items() if n != "position_embedding_type"},
        refused_by_lsg=ENCODES_ONLY,
    ),
)
