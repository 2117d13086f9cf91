"""BART: an encoder and a decoder with one word table, and the tensor names that mBART and Pegasus
share."""

from dataclasses import replace
from functools import partial

from lsg_flax.models import heads, task
from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config_json import ABSENT, REFUSED, Dialect
from lsg_flax.models.config_seq2seq import EncoderDecoderConfig
from lsg_flax.models.families.family import Family, HeadTable, PositionTable, Row, Rows, ToLSG
from lsg_flax.models.layout import BUFFER, DENSE, DENSE_WITHOUT_BIAS, NORM, TABLE

WHOLE = {"is_encoder_decoder": True, "is_decoder": False}
ALONE = {"is_encoder_decoder": False, "is_decoder": True}


def _attention(torch: str, path: str) -> Rows:
    parts = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output"))
    return tuple(Row(f"{torch}.{theirs}", f"{path}/{ours}", DENSE) for theirs, ours in parts)


def stack(side: str) -> Rows:
    """Returns the rows of the encoder or the decoder."""
    layer, path = f"{side}.layers.{{0}}", f"{side}/layers"
    return (
        Row(f"{side}.embed_positions", f"{side}/embeddings/position_embeddings", TABLE),
        Row(f"{side}.layernorm_embedding", f"{side}/embeddings/layer_norm", NORM),
        *_attention(f"{layer}.self_attn", f"{path}/attention"),
        Row(f"{layer}.self_attn_layer_norm", f"{path}/attention_norm", NORM),
        Row(f"{layer}.fc1", f"{path}/mlp_up", DENSE),
        Row(f"{layer}.fc2", f"{path}/mlp_down", DENSE),
        Row(f"{layer}.final_layer_norm", f"{path}/mlp_norm", NORM),
    )


ENCODER: Rows = (
    *stack("encoder"),
    Row("encoder.global_embeddings", "encoder/embeddings/global_embeddings", TABLE),
)
DECODER: Rows = (
    *stack("decoder"),
    *_attention("decoder.layers.{0}.encoder_attn", "decoder/layers/cross_attention"),
    Row("decoder.layers.{0}.encoder_attn_layer_norm", "decoder/layers/cross_attention_norm", NORM),
)
SHARED = Row("shared", "shared", TABLE)
TIED = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
}
_SCORES = (Row("lm_head", "head", DENSE_WITHOUT_BIAS),)

# PyTorch's loss of the decoder on its own compares labels with the scores at the same position.
_CAUSAL_LM = replace(
    task.CAUSAL_LM,
    targets=(task.Target("logits", "labels", "class"),),
    fixed=ALONE,
    examples=None,
)
BASE = HeadTable(
    replace(task.BASE, fixed=WHOLE),
    "Model",
    heads.BaseHead,
    tied={name.removeprefix("model."): "shared.weight" for name in TIED},
)
CONDITIONAL_GENERATION = HeadTable(
    replace(task.CONDITIONAL_GENERATION, fixed=WHOLE),
    "ForConditionalGeneration",
    partial(heads.WordScoresHead, biased=True),
    (Row("final_logits_bias", "head/final_logits_bias", BUFFER),),
    tied={**TIED, "lm_head.weight": "model.shared.weight"},
    untied_rows=_SCORES,
)
SEQUENCE_CLASSIFICATION = HeadTable(
    replace(task.SEQUENCE_CLASSIFICATION, fixed=WHOLE),
    "ForSequenceClassification",
    partial(heads.FirstTokenHead, act="tanh", dropout_first=True),
    (
        Row("classification_head.dense", "head/dense", DENSE),
        Row("classification_head.out_proj", "head/classifier", DENSE),
    ),
    tied=TIED,
    at_last_eos=True,
)
QUESTION_ANSWERING = HeadTable(
    replace(task.QUESTION_ANSWERING, fixed={**task.QUESTION_ANSWERING.fixed, **WHOLE}),
    "ForQuestionAnswering",
    heads.QuestionAnsweringHead,
    (Row("qa_outputs", "head/outputs", DENSE),),
    tied=TIED,
)


def causal_lm(decoder: Rows) -> HeadTable:
    """Makes the head of the decoder on its own, which attends to encoder states if they are
    given."""
    return HeadTable(
        _CAUSAL_LM,
        "ForCausalLM",
        heads.WordScoresHead,
        tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
        untied_rows=_SCORES,
        body=(Row("decoder.embed_tokens", "shared", TABLE), *decoder),
    )


TO_LSG = ToLSG(
    (
        PositionTable("encoder/embeddings/position_embeddings/embedding"),
        PositionTable("decoder/embeddings/position_embeddings/embedding"),
    ),
    "encoder/embeddings/global_embeddings/embedding",
    "shared/embedding",
)
DIALECT = Dialect(
    {"num_labels": 3, "decoder_start_token_id": 2},
    {"hidden_size": "d_model", "initializer_range": "init_std"},
    absent=ABSENT | {"type_vocab_size": 0, "layer_norm_eps": 1e-5},
    also=("hidden_size",),
    refused={name: REFUSED[name] for name in ("pruned_heads", "quantization_config")},
)

BART = Family(
    model_type="bart",
    class_prefix="Bart",
    prefix="model",
    encoder=(SHARED, *ENCODER, *DECODER),
    pooler=(),
    tables=(
        BASE,
        SEQUENCE_CLASSIFICATION,
        QUESTION_ANSWERING,
        CONDITIONAL_GENERATION,
        causal_lm(DECODER),
    ),
    to_lsg=TO_LSG,
    dialect=DIALECT,
    architecture=Architecture(position_offset=2, embeds_padding=True, shifts_inputs=True),
    config_type=EncoderDecoderConfig,
    ignored=("encoder.version", "decoder.version"),
)
