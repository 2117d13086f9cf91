"""Record Reformer's two attentions into tests/golden/ from transformers, in its environment.

    python tests/reference/record_lsh.py    adds them to what is there, or records them anew

A causal token that sees only itself, several times, has scores of -1e5 there, between which
float32 has steps of 0.008: such cases are in float64.

Axes: n batch, h heads, t tokens, d head size.
"""

import numpy as np
import worker_lsh  # noqa: F401 (makes its kind known)
from recorder import VOCABULARY, normal, query_key_value, ragged, record_alone, token_ids

N, HEADS, WIDTH, CHUNK, T = 2, 2, 6, 4, 24
FACTORS = dict(num_buckets=[2, 4])
# Chunks before and behind, whether causal, length, whether masked, and what is hashed.
LOCAL = {
    "both": (1, 1, False, T, True),
    "before": (1, 0, False, T, False),
    "causal": (1, 0, True, T, True),
    "causal_both": (1, 1, True, T, False),
    "own": (0, 0, False, T, True),
    "many": (3, 2, False, T, True),
    "around": (2, 1, False, 2 * CHUNK, False),
    "causal_around": (3, 0, True, 2 * CHUNK, True),
    "one_chunk": (1, 1, False, CHUNK, True),
    "causal_one_chunk": (1, 0, True, CHUNK, False),
}
LSH = {
    "before": (1, 0, False, T, False, {}),
    "masked": (1, 0, False, T, True, {}),
    "hashes": (1, 0, False, T, True, dict(num_hashes=3)),
    "factors": (1, 1, False, T, True, FACTORS),
    "factors_hashes": (0, 1, False, T, False, FACTORS | dict(num_hashes=2)),
    "own": (0, 0, False, T, False, {}),
    "many": (3, 2, False, T, True, dict(num_hashes=2)),
    "around": (2, 1, False, 2 * CHUNK, False, {}),
    "one_chunk": (1, 0, False, CHUNK, True, dict(num_hashes=2)),
    "causal": (1, 0, True, T, True, {}),
    "causal_both": (1, 1, True, T, False, FACTORS),
    "causal_one_chunk": (1, 0, True, CHUNK, False, {}),
    "causal_hashes": (1, 0, True, T, False, FACTORS | dict(num_hashes=3)),
    "causal_hashes_masked": (1, 1, True, T, True, dict(num_hashes=2)),
    "causal_around": (3, 0, True, 2 * CHUNK, True, dict(num_hashes=2)),
}
GENERATION = dict(
    vocab_size=VOCABULARY,
    attention_head_size=6,
    num_attention_heads=2,
    hidden_size=10,
    feed_forward_size=14,
    axial_pos_shape=[8, 6],
    axial_pos_embds_dim=[4, 6],
    max_position_embeddings=48,
    is_decoder=True,
    num_buckets=[2, 4],
)
CHUNKS = {  # of local and LSH attention
    "mixed": dict(local_attn_chunk_length=4, lsh_attn_chunk_length=6, num_hashes=2),
    "alike": dict(local_attn_chunk_length=4, lsh_attn_chunk_length=4, num_hashes=3),
    "lsh": dict(lsh_attn_chunk_length=4, lsh_num_chunks_before=2),
    "local": dict(local_attn_chunk_length=4),
}
PROMPTS, COUNT = (3, 4, 5, 6, 9, 12, 19), 20
EXACT = ("causal_hashes", "causal_hashes_masked", "causal_around")


def record(recorder):
    for kind, cases in (("local", LOCAL), ("lsh", LSH)):
        for name, (before, after, causal, t, masked, *hashing) in cases.items():
            sides = {f"{kind}_num_chunks_before": before, f"{kind}_num_chunks_after": after}
            config = {f"{kind}_attn_chunk_length": CHUNK, "is_decoder": causal} | sides
            mask = ragged(N, t) if masked else None
            inputs = query_key_value(N, HEADS, t, WIDTH, mask=mask, gradients=True)
            if masked:
                inputs["cotangent"] = np.where(mask[:, None, :, None], inputs["cotangent"], 0)
            if hashing:
                config |= dict(num_buckets=4, num_hashes=1) | hashing[0]
                inputs["key"] = inputs["query"]
                shape = (HEADS, WIDTH, config["num_hashes"], np.sum(config["num_buckets"]) // 2)
                inputs["rotations"] = normal(*shape)
            fields = dict(lsh=kind == "lsh", config=config)
            dtypes = ("float64", "float32") if kind == "lsh" and name in EXACT else ("float32",)
            for dtype in dtypes:
                recorder.add(
                    "reformer_attention",
                    f"reformer_attention_{kind}_{name}_{dtype}",
                    "reformer_attention",
                    inputs,
                    **fields,
                    dtype=dtype,
                )
    for name, chunks in CHUNKS.items():
        kinds = [name] if name in ("lsh", "local") else ["local", "lsh", "lsh"]
        for t in PROMPTS:
            recorder.add(
                "reformer_attention",
                f"reformer_attention_generation_{name}_{t}",
                "reformer_generation",
                dict(prompt=token_ids(t)),
                config=GENERATION | chunks | dict(attn_layers=kinds),
                count=COUNT,
            )


if __name__ == "__main__":
    record_alone(record, "reformer_attention")
