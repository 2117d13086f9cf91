"""The families of checkpoints, as tables (see family.py)."""

from collections.abc import Callable
from functools import partial

from lsg_flax.models import heads
from lsg_flax.models.family import Family, HeadTable, Rows
from lsg_flax.models.heads import Head
from lsg_flax.models.task import REPLACED_TOKENS, SENTENCE_ORDER

_EMBEDDINGS, _LAYERS = "encoder/embeddings", "encoder/layers"


def _tables(*names: str) -> Rows:
    return tuple(("embedding", f"embeddings.{n}", f"{_EMBEDDINGS}/{n}") for n in names)


def _encoder(layer: str, *names: str) -> Rows:
    """Embeddings and layers, from the names of query, key, value, output, its norm, up, down and
    its norm behind `layer`."""
    ours = ("attention/query", "attention/key", "attention/value", "attention/output")
    ours += ("attention_norm", "mlp_up", "mlp_down", "mlp_norm")
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return (
        *_tables(*tables, "global_embeddings"),
        ("norm", "embeddings.LayerNorm", f"{_EMBEDDINGS}/layer_norm"),
        *(
            ("norm" if path.endswith("norm") else "dense", f"{layer}.{name}", f"{_LAYERS}/{path}")
            for name, path in zip(names, ours, strict=True)
        ),
    )


_BERT_ATTENTION = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
_BERT_ENCODER = (
    *_encoder(
        "encoder.layer.{0}",
        *(f"attention.{name}" for name in _BERT_ATTENTION),
        *("intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    *(
        (kind, f"encoder.layer.{{0}}.crossattention.{name}", f"{_LAYERS}/cross_attention{ours}")
        for kind, name, ours in zip(
            ("dense",) * 4 + ("norm",),
            _BERT_ATTENTION,
            ("/query", "/key", "/value", "/output", "_norm"),
            strict=True,
        )
    ),
)
_POOLER: Rows = (("dense", "pooler.dense", "pooler/dense"),)


def _language_model(
    encoder: str,
    transform: str,
    norm: str,
    bias: str,
    kernel: str,
    *,
    path: str = "head",
    beside: Rows = (),
) -> dict:
    """A language model's head from its tensors' names: rows (with those `beside` it), what is
    tied, and the kernel that takes the place of the word table where it is not."""
    tied = {f"{kernel}.weight": f"{encoder}.embeddings.word_embeddings.weight"}
    if bias != f"{kernel}.bias":
        tied[f"{kernel}.bias"] = bias
    return {
        "rows": (
            ("dense", transform, f"{path}/transform"),
            ("norm", norm, f"{path}/layer_norm"),
            ("bias", bias, f"{path}/bias"),
            *beside,
        ),
        "tied": tied,
        "untied_rows": (("kernel", kernel, path),),
    }


def _classifier(
    module: Callable[..., Head] = heads.SequenceClassificationHead, *, pooled: bool = False
) -> dict:
    return {
        "module": module,
        "rows": (("dense", "classifier", "head/classifier"),),
        "pooled": pooled,
    }


def _common_heads(
    question_answering: Callable[..., Head] = heads.QuestionAnsweringHead,
) -> dict[str, HeadTable]:
    """The heads that are the same everywhere."""
    return {
        "token_classification": HeadTable(
            "ForTokenClassification", **_classifier(heads.TokenClassificationHead)
        ),
        "question_answering": HeadTable(
            "ForQuestionAnswering",
            question_answering,
            (("dense", "qa_outputs", "head/outputs"),),
        ),
    }


def _pooled_heads() -> dict[str, HeadTable]:
    """The heads that classify by the pooler's output."""
    return {
        "base": HeadTable("Model", heads.BaseHead, pooled=True),
        "sequence_classification": HeadTable(
            "ForSequenceClassification", **_classifier(pooled=True)
        ),
        "multiple_choice": HeadTable(
            "ForMultipleChoice", **_classifier(heads.MultipleChoiceHead, pooled=True)
        ),
    }


_BERT_LM = partial(
    _language_model,
    "bert",
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias",
    "cls.predictions.decoder",
)
_NEXT_SENTENCE: Rows = (("dense", "cls.seq_relationship", "head/seq_relationship"),)

BERT = Family(
    model_type="bert",
    architecture="Bert",
    prefix="bert",
    encoder=_BERT_ENCODER,
    pooler=_POOLER,
    heads={
        **_pooled_heads(),
        **_common_heads(),
        "masked_lm": HeadTable("ForMaskedLM", heads.LanguageModelHead, **_BERT_LM()),
        "causal_lm": HeadTable("LMHeadModel", heads.LanguageModelHead, **_BERT_LM()),
        "pretraining": HeadTable(
            "ForPreTraining",
            heads.PretrainingHead,
            pooled=True,
            **_BERT_LM(path="head/masked_lm", beside=_NEXT_SENTENCE),
        ),
        "next_sentence_prediction": HeadTable(
            "ForNextSentencePrediction", heads.NextSentenceHead, _NEXT_SENTENCE, pooled=True
        ),
    },
)


def _roberta(model_type: str, architecture: str) -> Family:
    """RoBERTa and its descendants differ in names only."""
    language_model = _language_model(
        "roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"
    )
    module = partial(heads.LanguageModelHead, act="gelu")
    return Family(
        model_type=model_type,
        architecture=architecture,
        prefix="roberta",
        encoder=_BERT_ENCODER,
        pooler=_POOLER,
        heads={
            **_pooled_heads(),
            **_common_heads(),
            "masked_lm": HeadTable("ForMaskedLM", module, **language_model),
            "causal_lm": HeadTable("ForCausalLM", module, **language_model),
            "sequence_classification": HeadTable(
                "ForSequenceClassification",
                partial(heads.FirstTokenHead, act="tanh", dropout_first=True),
                (
                    ("dense", "classifier.dense", "head/dense"),
                    ("dense", "classifier.out_proj", "head/classifier"),
                ),
            ),
        },
        positions_after_padding=True,
        position_offset=2,
        globals_with_segment=False,
    )


_ELECTRA_LM = _language_model(
    "electra",
    "generator_predictions.dense",
    "generator_predictions.LayerNorm",
    "generator_lm_head.bias",
    "generator_lm_head",
)
_ELECTRA_LM_HEAD = partial(heads.LanguageModelHead, act="gelu")

ELECTRA = Family(
    model_type="electra",
    architecture="Electra",
    prefix="electra",
    encoder=(
        *_BERT_ENCODER,
        ("dense", "embeddings_project", "encoder/embeddings_project"),
    ),
    pooler=(),
    heads={
        "base": HeadTable("Model", heads.BaseHead),
        **_common_heads(),
        "masked_lm": HeadTable("ForMaskedLM", _ELECTRA_LM_HEAD, **_ELECTRA_LM),
        "causal_lm": HeadTable("ForCausalLM", _ELECTRA_LM_HEAD, **_ELECTRA_LM),
        "pretraining": HeadTable(
            "ForPreTraining",
            heads.DiscriminatorHead,
            (
                ("dense", "discriminator_predictions.dense", "head/dense"),
                ("dense", "discriminator_predictions.dense_prediction", "head/prediction"),
            ),
            task=REPLACED_TOKENS,
        ),
        "sequence_classification": HeadTable(
            "ForSequenceClassification",
            partial(heads.FirstTokenHead, act="gelu", dropout_first=True),
            (
                ("dense", "classifier.dense", "head/dense"),
                ("dense", "classifier.out_proj", "head/classifier"),
            ),
        ),
        "multiple_choice": HeadTable(
            "ForMultipleChoice",
            heads.SequenceSummaryHead,
            (
                ("dense", "sequence_summary.summary", "head/dense"),
                ("dense", "classifier", "head/classifier"),
            ),
        ),
    },
)

_DISTILBERT_CLASSIFIER: Rows = (
    ("dense", "pre_classifier", "head/dense"),
    ("dense", "classifier", "head/classifier"),
)

DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBert",
    prefix="distilbert",
    encoder=_encoder(
        "transformer.layer.{0}",
        *(f"attention.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")),
        *("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
    ),
    pooler=(),
    heads={
        "base": HeadTable("Model", heads.BaseHead),
        **_common_heads(
            partial(heads.QuestionAnsweringHead, dropout_field="qa_dropout", dropout_default=0.1)
        ),
        "token_classification": HeadTable(
            "ForTokenClassification",
            **_classifier(partial(heads.TokenClassificationHead, of_hidden=True)),
        ),
        "masked_lm": HeadTable(
            "ForMaskedLM",
            heads.LanguageModelHead,
            **_language_model(
                "distilbert",
                "vocab_transform",
                "vocab_layer_norm",
                "vocab_projector.bias",
                "vocab_projector",
            ),
        ),
        "sequence_classification": HeadTable(
            "ForSequenceClassification",
            partial(heads.FirstTokenHead, act="relu"),
            _DISTILBERT_CLASSIFIER,
        ),
        "multiple_choice": HeadTable(
            "ForMultipleChoice",
            partial(heads.FirstTokenHead, act="relu", choices=True),
            _DISTILBERT_CLASSIFIER,
        ),
    },
)

_ALBERT_LM = partial(
    _language_model,
    "albert",
    "predictions.dense",
    "predictions.LayerNorm",
    "predictions.bias",
    "predictions.decoder",
)

ALBERT = Family(
    model_type="albert",
    architecture="Albert",
    prefix="albert",
    encoder=(
        *_encoder(
            "encoder.albert_layer_groups.{0}.albert_layers.{1}",
            *(f"attention.{n}" for n in ("query", "key", "value", "dense", "LayerNorm")),
            *("ffn", "ffn_output", "full_layer_layer_norm"),
        ),
        ("dense", "encoder.embedding_hidden_mapping_in", "encoder/embeddings_project"),
    ),
    pooler=(("dense", "pooler", "pooler/dense"),),
    heads={
        **_pooled_heads(),
        **_common_heads(),
        "masked_lm": HeadTable(
            "ForMaskedLM",
            heads.LanguageModelHead,
            **_ALBERT_LM(),
        ),
        "pretraining": HeadTable(
            "ForPreTraining",
            heads.SentenceOrderHead,
            pooled=True,
            task=SENTENCE_ORDER,
            **_ALBERT_LM(
                path="head/masked_lm",
                beside=(("dense", "sop_classifier.classifier", "head/sentence_order/classifier"),),
            ),
        ),
    },
    always_projects=True,
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        BERT,
        _roberta("roberta", "Roberta"),
        _roberta("xlm-roberta", "XLMRoberta"),
        _roberta("camembert", "Camembert"),
        ELECTRA,
        DISTILBERT,
        ALBERT,
    )
}


def family_of(model_type: str) -> Family:
    """The family that config.json names.

    Raises:
        ValueError: for a model_type that is not supported.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; supported are {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
