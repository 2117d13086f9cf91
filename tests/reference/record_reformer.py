"""Record Reformer's part of tests/golden/ from transformers, in the reference environment.

    python tests/reference/record_reformer.py    adds it to what is there, or records it anew

Axes: n batch, t tokens.
"""

import numpy as np
import worker_reformer  # noqa: F401 (makes its kind known)
from recorder import VOCABULARY, normal, ragged, record_alone, token_ids

N, T, LABELS = 2, 24, 3
SIZES = dict(
    vocab_size=VOCABULARY,
    attention_head_size=6,
    num_attention_heads=2,
    hidden_size=10,
    feed_forward_size=14,
    attn_layers=["local", "lsh"],
    axial_pos_shape=[4, 6],
    axial_pos_embds_dim=[4, 6],
    max_position_embeddings=24,
    local_attn_chunk_length=4,
    lsh_attn_chunk_length=6,
    num_buckets=4,
    hidden_dropout_prob=0.0,
    local_attention_probs_dropout_prob=0.0,
)
DECODER = dict(is_decoder=True)
# Differences of the config, and of the case. A token that sees only itself, in several rounds, has
# weights in float32 that are off by 3e-3 (docs/design.md).
OPTIONS = {
    "usual": ({}, {}),
    "usual_causal": (DECODER, {}),
    "local": (dict(attn_layers=["local"]), {}),
    "lsh": (dict(attn_layers=["lsh"]), {}),
    "local_wide": (
        dict(attn_layers=["local"], local_num_chunks_before=2, local_num_chunks_after=1),
        {},
    ),
    "local_causal_back_2": (DECODER | dict(attn_layers=["local"], local_num_chunks_before=2), {}),
    "local_alone": (dict(attn_layers=["local"], local_num_chunks_before=0), {}),
    "lsh_wide": (dict(attn_layers=["lsh"], lsh_num_chunks_after=1), {}),
    "lsh_alone": (dict(attn_layers=["lsh"], lsh_num_chunks_before=0), {}),
    "hashes": (dict(num_hashes=3), {}),
    "hashes_causal": (DECODER | dict(num_hashes=3), {}),
    "hashes_causal_exact": (DECODER | dict(num_hashes=3), dict(dtype="float64")),
    "factors": (dict(num_buckets=[2, 4], num_hashes=2), {}),
    "chosen_buckets": (dict(num_buckets=None), {}),
    "chosen_factors": (
        dict(
            num_buckets=None,
            lsh_attn_chunk_length=2,
            attn_layers=["lsh"],
            max_position_embeddings=24,
        ),
        {},
    ),
    "any_order": (dict(attn_layers=["lsh", "local", "local", "lsh", "lsh"]), {}),
    "repeated": (dict(attn_layers=["local", "local", "lsh"] * 2), {}),
    "learned": (dict(axial_pos_embds=False), {}),
    "learned_causal": (DECODER | dict(axial_pos_embds=False, hidden_act="gelu"), {}),
    "chunked": (dict(chunk_size_feed_forward=8), {}),
}
LENGTHS = {"short": 3, "one_chunk": 4, "a_chunk_of_one_kind": 6, "padded": 13, "whole": 24}
GRADIENTS_OF = (
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weights.0",
    "embeddings.position_embeddings.weights.1",
    "embeddings.position_embeddings.embedding.weight",
    "encoder.layer_norm.weight",
    "encoder.layers.0.attention.layer_norm.weight",
    "encoder.layers.0.attention.self_attention.query.weight",
    "encoder.layers.0.attention.self_attention.query_key.weight",
    "encoder.layers.0.attention.output.dense.weight",
    "encoder.layers.1.attention.self_attention.query_key.weight",
    "encoder.layers.1.attention.self_attention.value.weight",
    "encoder.layers.1.feed_forward.dense.dense.weight",
    "encoder.layers.4.attention.self_attention.query_key.weight",
    "encoder.layers.5.feed_forward.output.dense.bias",
)
TOKEN_LABELS = np.where(ragged(N, T), token_ids(N, T), -100).astype(np.int32)
CLASSES = {
    "causal_lm": ("ModelWithLMHead", DECODER, dict(labels=TOKEN_LABELS)),
    "masked_lm": ("ForMaskedLM", dict(chunk_size_lm_head=6), dict(labels=TOKEN_LABELS)),
    "sequence_classification": (
        "ForSequenceClassification",
        dict(num_labels=LABELS),
        dict(labels=np.array([2, 0], np.int32)),
    ),
    "question_answering": (
        "ForQuestionAnswering",
        {},
        dict(start_positions=np.array([1, 3]), end_positions=np.array([4, 30])),
    ),
}


def inputs_of(t, *, mask=True):
    real = ragged(N, t)
    ids = np.where(real, token_ids(N, t), 0).astype(np.int32) if mask else token_ids(N, t)
    return (
        dict(input_ids=ids, attention_mask=real.astype(np.int32)) if mask else dict(input_ids=ids)
    )


def record(recorder):
    def add(name, suffix, config, inputs, **fields):
        fields |= {"class": f"Reformer{suffix}", "config": SIZES | config}
        recorder.add("reformer", f"reformer_{name}", "reformer", inputs, **fields)

    for name, (config, fields) in OPTIONS.items():
        for masked in (False, True):
            weight = normal(N, T, 2 * SIZES["hidden_size"]) / 8
            weight = np.where(ragged(N, T)[..., None], weight, 0) if masked else weight
            given = inputs_of(T, mask=masked) | dict(weight_last_hidden_state=weight)
            label = f"{name}_masked" if masked else name
            add(label, "Model", config, given, grad_of=GRADIENTS_OF, **fields)
    for name, t in LENGTHS.items():
        for kind, config in (("both", dict(num_buckets=None)), ("causal", DECODER)):
            given = inputs_of(t, mask=kind == "both")
            add(f"length_{name}_{kind}", "Model", config, given, output_hidden_states=True)
    t = 24
    places = dict(position_ids=np.arange(t, dtype=np.int32)[None, ::-1].repeat(N, 0))
    add("position_ids", "Model", {}, inputs_of(t) | places)
    add("learned_position_ids", "Model", dict(axial_pos_embds=False), inputs_of(t) | places)
    embeds = dict(inputs_embeds=normal(N, 13, SIZES["hidden_size"]))
    add("inputs_embeds", "Model", {}, embeds)
    for name, (suffix, config, labels) in CLASSES.items():
        # Padding that sees no token has other logits there, which compete for the answer.
        given = inputs_of(T, mask=name != "question_answering") | labels
        shapes = dict.fromkeys(("start_logits", "end_logits"), (N, T))
        if name != "question_answering":
            shapes = dict(logits=(N, T, VOCABULARY) if "_lm" in name else (N, LABELS))
        for output, shape in shapes.items():
            weight = normal(*shape) / 8
            if shape[:2] == (N, T):
                weight = weight * ragged(N, T).reshape(N, T, *[1] * (len(shape) - 2))
            given[f"weight_{output}"] = weight.astype(np.float32)
        add(name, suffix, config, given, grad_of="all")


if __name__ == "__main__":
    record_alone(record, "reformer")
