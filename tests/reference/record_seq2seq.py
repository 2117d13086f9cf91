"""Record the encoder-decoders of tests/golden/ from the PyTorch reference, in its environment.

    python tests/reference/record_seq2seq.py    adds them to what is there, or records them anew

Axes: n batch, t tokens of the encoder, u tokens of the decoder.
"""

import numpy as np
import worker
from recorder import (
    GOLDEN,
    VOCABULARY,
    blocks_of,
    leaks,
    normal,
    ragged,
    record_alone,
    token_ids,
)

FILE = "model_seq2seq"
WIDTH, PAD, END = 12, {"bart": 1, "mbart": 1, "pegasus": 0}, {"bart": 2, "mbart": 2, "pegasus": 1}
SIZES = dict(
    vocab_size=VOCABULARY,
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=3,
    encoder_ffn_dim=16,
    decoder_ffn_dim=20,
    max_position_embeddings=48,
)
PATTERN = dict(block_size=8, sparse_block_size=8, sparsity_factor=2, num_global_tokens=3)
GRADIENTS_OF = (
    "model.shared.weight",
    "model.encoder.layers.0.self_attn.q_proj.weight",
    "model.encoder.layers.1.fc2.bias",
    "model.decoder.layers.0.encoder_attn.k_proj.weight",
    "model.decoder.layers.1.final_layer_norm.weight",
)
CLASSES = {
    "bart_base": ("LSGBartModel", {}),
    "bart_conditional_generation": ("LSGBartForConditionalGeneration", {}),
    "bart_sequence_classification": ("LSGBartForSequenceClassification", {}),
    "bart_question_answering": ("LSGBartForQuestionAnswering", {}),
    "bart_causal_lm": ("LSGBartForCausalLM", {}),
    "bart_plain_conditional_generation": (
        "BartForConditionalGeneration",
        dict(tie_word_embeddings=False),
    ),
    "mbart_conditional_generation": (
        "LSGMBartForConditionalGeneration",
        dict(scale_embedding=True, activation_function="relu"),
    ),
    "mbart_sequence_classification": ("LSGMBartForSequenceClassification", dict(num_labels=4)),
    "pegasus_conditional_generation": (
        "LSGPegasusForConditionalGeneration",
        dict(scale_embedding=True, activation_function="relu"),
    ),
    "pegasus_plain_causal_lm": ("PegasusForCausalLM", {}),
}


def make_models():
    for seed, (folder, (cls, config)) in enumerate(CLASSES.items()):
        pattern = PATTERN if cls.startswith("LSG") else {}
        fields = SIZES | pattern | config | dict(model_type=folder.split("_")[0])
        case = dict(kind="make_model", out=folder, config=fields, seed=seed, scale=0.3)
        worker.run_case(case | {"class": cls}, {}, GOLDEN)
        (GOLDEN / folder / "generation_config.json").unlink(missing_ok=True)


def texts(folder, t, u, *, left=False):
    """Ragged tokens of both sides, each row of the encoder's ended by one end token."""
    family = folder.split("_")[0]
    mask, decoder_mask = ragged(2, t), ragged(2, u)
    decoder_mask = decoder_mask[:, ::-1] if left else decoder_mask
    ids, decoder_ids = token_ids(2, t), token_ids(2, u)
    ids[np.arange(2), mask.sum(1) - 1] = END[family]
    return dict(
        input_ids=np.where(mask, ids, PAD[family]).astype(np.int32),
        attention_mask=mask.astype(np.int32),
        decoder_input_ids=np.where(decoder_mask, decoder_ids, PAD[family]).astype(np.int32),
        decoder_attention_mask=decoder_mask.astype(np.int32),
    )


def record(recorder):
    make_models()

    def add(folder, name, t=29, u=7, *, without=(), left=False, config=None, inputs=None, **fields):
        arguments = texts(folder, t, u, left=left) | (inputs or {})
        arguments = {k: v for k, v in arguments.items() if k not in without}
        config = config or {}
        leak = {}
        if t > 2 * PATTERN["block_size"] and "plain" not in folder and "causal" not in folder:
            mask = arguments.get("attention_mask", np.ones((2, t), bool)).astype(bool)
            pattern = PATTERN | dict(sparsity_type="norm") | config
            leak = leaks(pattern, blocks_of(mask, PATTERN["block_size"]))
        fields |= {"class": CLASSES[folder][0]} | dict(checkpoint=folder, config=config) | leak
        recorder.add(FILE, f"{FILE}_{folder}_{name}", "model", arguments, **fields)

    decoder = ("decoder_input_ids", "decoder_attention_mask")
    record_patterns(add, decoder)
    record_heads(add, decoder)
    for folder in CLASSES:
        if folder.endswith("conditional_generation"):
            add(folder, "hidden_states", output_hidden_states=True)
            weight = normal(2, 7, VOCABULARY) / 8 * ragged(2, 7)[..., None]
            weight = dict(weight_logits=weight.astype(np.float32))
            kind = {} if "plain" in folder else dict(config=dict(sparsity_type="stride"))
            add(folder, "gradients", inputs=weight, grad_of=GRADIENTS_OF, **kind)
            labels = np.where(ragged(2, 9), token_ids(2, 9), -100).astype(np.int32)
            add(folder, "labels", inputs=dict(labels=labels), without=decoder)


def record_patterns(add, decoder):
    folder = "bart_conditional_generation"
    for kind in ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none"):
        add(folder, kind, config=dict(sparsity_type=kind))
    add(folder, "bos_pooling_leak", 40, config=dict(sparsity_type="bos_pooling"))
    for t in (5, 16, 17, 45):
        add(folder, f"t{t}", t, t, without=("attention_mask", "decoder_attention_mask"))
    alone = dict(pass_global_tokens_to_decoder=False)
    masked = dict(mask_first_token=True)
    for name, config in {
        "globals_kept": alone,
        "globals_kept_not_pooled": alone | dict(pool_with_global=False),
        "mask_first_token": masked,
        "mask_first_token_globals_kept": masked | alone,
        "globals_1": dict(num_global_tokens=1),
        "scaled": dict(scale_embedding=True),
    }.items():
        add(folder, name, config=config)
    add(folder, "mask_first_token_without_mask", config=masked, without=("attention_mask",))
    add(folder, "not_adaptive", 24, config=dict(adaptive=False))
    add(folder, "decoder_padded_left", left=True)
    embeds, scaled = dict(inputs_embeds=normal(2, 29, WIDTH)), dict(scale_embedding=True)
    add(folder, "inputs_embeds", inputs=embeds, without=("input_ids",), config=scaled)
    embeds = dict(decoder_inputs_embeds=normal(2, 7, WIDTH))
    add(folder, "decoder_inputs_embeds", inputs=embeds, without=decoder[:1], config=scaled)
    states = dict(encoder_outputs=normal(2, 3 + 29, WIDTH))
    add(folder, "encoder_outputs", inputs=states, without=("input_ids",))
    add(folder, "shifted_inputs", without=decoder)
    add("mbart_conditional_generation", "shifted_inputs", without=decoder)
    add("bart_base", "shifted_inputs", without=decoder, output_hidden_states=True)
    config = alone | dict(sparsity_type="pooling")
    add("bart_base", "hidden_states_globals_kept", config=config, output_hidden_states=True)


def record_heads(add, decoder):
    for folder, labels in (
        ("bart_sequence_classification", [2, 0]),
        ("mbart_sequence_classification", [1, 3]),
    ):
        add(folder, "loss", inputs=dict(labels=np.array(labels, np.int32)), without=decoder)
    weight = dict(weight_logits=normal(2, 3))
    gradients = dict(inputs=weight, without=decoder, grad_of=GRADIENTS_OF)
    add("bart_sequence_classification", "gradients", 16, **gradients)
    ends = dict(start_positions=np.array([1, 3]), end_positions=np.array([4, 6]))
    add("bart_question_answering", "loss", inputs=ends, without=decoder)
    for folder in ("bart_causal_lm", "pegasus_plain_causal_lm"):
        states = dict(
            encoder_hidden_states=normal(2, 11, WIDTH),
            encoder_attention_mask=ragged(2, 11).astype(np.int32),
        )
        labels = dict(labels=token_ids(2, 13))
        add(folder, "alone", 13, inputs=labels, without=decoder, output_hidden_states=True)
        add(folder, "with_states", 13, inputs=states | labels, without=decoder)


if __name__ == "__main__":
    record_alone(record, FILE)
