"""Record local attention of tests/golden/ from lucidrains' local-attention, in its environment.

    python tests/reference/record_local.py    adds it to what is there, or records it anew

Without a mask the reference sees the zeros that it pads a bidirectional sequence with, and a query
that sees nothing gets something: so there is a mask, and the cotangent of such queries is 0.

Axes: n batch, h heads, t tokens, d head size.
"""

import numpy as np
from recorder import normal, query_key_value, ragged, record_alone

N, HEADS, WIDTH, WINDOW = 2, 2, 6, 4
OPTIONS = {
    "both": {},
    "causal": dict(causal=True),
    "causal_back_2": dict(causal=True, look_backward=2),
    "back_0": dict(look_backward=0, look_forward=0),
    "back_2_forward_0": dict(look_backward=2, look_forward=0),
    "forward_2": dict(look_forward=2),
    "exact": dict(exact_windowsize=True),
    "causal_exact": dict(causal=True, exact_windowsize=True),
    "causal_exact_back_2": dict(causal=True, exact_windowsize=True, look_backward=2),
    "shared_qk": dict(shared_qk=True),
    "causal_shared_qk": dict(causal=True, shared_qk=True),
    "xpos": dict(use_xpos=True),
    "causal_xpos": dict(causal=True, use_xpos=True, xpos_scale_base=3.0),
    "causal_exact_xpos": dict(causal=True, use_xpos=True, exact_windowsize=True, look_backward=2),
    "scale": dict(scale=2.0),
    "no_positions": dict(use_rotary_pos_emb=False),
    "causal_no_positions": dict(causal=True, use_rotary_pos_emb=False),
}
BIASED = ("both", "causal", "causal_exact_xpos", "shared_qk", "no_positions")


def record(recorder):
    for name, options in OPTIONS.items():
        for t in (19, 24) if name in BIASED else (19,):
            bias = {}
            if t == 24:
                seen = options.get("look_backward", 1) + 1 + (not options.get("causal", False))
                bias = dict(attn_bias=normal(HEADS, WINDOW, seen * WINDOW))
            mask = ragged(N, t)
            inputs = query_key_value(N, HEADS, t, WIDTH, mask=mask, gradients=True) | bias
            inputs["cotangent"] = np.where(mask[:, None, :, None], inputs["cotangent"], 0)
            if options.get("shared_qk"):
                inputs["key"] = inputs["query"]
            fields = dict(options=dict(window_size=WINDOW, dim=WIDTH) | options)
            recorder.add(
                "local_attention",
                f"local_attention_{name}_{t}",
                "local_attention",
                inputs,
                **fields,
            )


if __name__ == "__main__":
    record_alone(record, "local_attention")
