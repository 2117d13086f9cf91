"""Record LocalTransformer's part of tests/golden/ from lucidrains' local-attention, in its
environment.

    python tests/reference/record_local_transformer.py    adds it to what is there, or anew

Without a mask a bidirectional reference sees the zeros that it pads with, so it gets one; the
outputs of padding are weighed with 0.

Axes: n batch, t tokens, d model width.
"""

import numpy as np
import worker_local  # noqa: F401 (makes its kind known)
from recorder import VOCABULARY, normal, ragged, record_alone, token_ids

N, WINDOW = 2, 4
SIZES = dict(num_tokens=VOCABULARY, max_seq_len=24, dim=10, depth=2, heads=2, dim_head=6)
SIZES |= dict(local_attn_window_size=WINDOW)
OPTIONS = {
    "usual": {},
    "one_stream": dict(num_residual_streams=1),
    "bidirectional": dict(causal=False),
    "whole_windows": dict(exact_windowsize=False),
    "bidirectional_whole_windows": dict(causal=False, exact_windowsize=False, look_backward=2),
    "xpos": dict(use_xpos=True, xpos_scale_base=3),
    "bias": dict(use_dynamic_pos_bias=True),
    "rmsnorm": dict(qk_rmsnorm=True, num_residual_streams=1),
    "rmsnorm_scale": dict(qk_rmsnorm=True, qk_scale=3, exact_windowsize=False, use_xpos=True),
    "gates": dict(gate_values_per_head=True, num_residual_streams=2),
    "back_2": dict(look_backward=2, num_residual_streams=1),
    "back_0": dict(look_backward=0, exact_windowsize=False),
    "forward_2": dict(causal=False, look_forward=2),
    "shared_qk": dict(shared_qk=True, num_residual_streams=1),
    "everything": dict(
        qk_rmsnorm=True,
        gate_values_per_head=True,
        use_dynamic_pos_bias=True,
        ff_mult=3,
        heads=3,
        num_residual_streams=3,
        exact_windowsize=False,
        ignore_index=7,
    ),
    "embeddings": dict(num_tokens=None, use_xpos=True),
}
GRADIENTS_OF = (
    "token_emb.weight",
    "pos_emb.weight",
    "dynamic_pos_bias.mlp.0.weight",
    "layers.0.0.static_alpha",
    "layers.1.0.dynamic_alpha_fn",
    "layers.0.1.dynamic_beta_scale",
    "layers.1.1.norm.gamma",
    "layers.0.0.branch.to_qkv.weight",
    "layers.1.0.branch.k_scale",
    "layers.0.0.branch.to_v_gate.0.weight",
    "layers.0.1.branch.1.weight",
)


GLOBAL_OPTIONS = {
    "every_layer": {},
    "some_layers": dict(depth=3, layers_insert_global_attn=[3, 1], num_residual_streams=1),
    "one_layer": dict(layers_insert_global_attn=[2], num_residual_streams=2),
}


def record_global(recorder):
    for name, options in GLOBAL_OPTIONS.items():
        layer = max(options.get("layers_insert_global_attn", [1])) - 1
        names = ("branch.to_qkv.weight", "branch.to_out.bias", "branch.norm.weight")
        names += ("static_alpha", "dynamic_beta_fn")
        recorder.add(
            "local_transformer_global",
            f"local_transformer_global_{name}",
            "local_transformer",
            dict(x=token_ids(N, 13), weight=normal(N, 13, VOCABULARY))
            | dict(with_loss=np.ones((), np.int32)),
            options=SIZES | options,
            global_attn_layer=True,
            grad_of=("token_emb.weight", *(f"global_layers.{layer}.{name}" for name in names)),
            generate=11,  # as many as there are positions
        )


def record(recorder):
    record_global(recorder)
    for name, options in OPTIONS.items():
        options = SIZES | options
        tokens, causal = options["num_tokens"], options.get("causal", True)
        t = 13
        inputs = dict(x=token_ids(N, t) if tokens else normal(N, t, options["dim"]))
        weight = normal(N, t, tokens or options["dim"])
        if not causal:
            inputs["mask"] = ragged(N, t)
            weight = np.where(inputs["mask"][..., None], weight, 0)
        if tokens:  # the reference's loss reads t - 1 = 12 tokens, whole windows
            inputs["with_loss"] = np.ones((), np.int32)
        more = dict(generate=30) if causal and tokens else {}  # more than there are positions
        recorder.add(
            "local_transformer",
            f"local_transformer_{name}",
            "local_transformer",
            inputs | dict(weight=weight),
            options=options,
            grad_of=GRADIENTS_OF,
            **more,
        )
    length = SIZES["max_seq_len"]  # the loss is of a token more, which is a label alone
    recorder.add(
        "local_transformer_one_more",
        "local_transformer_one_more",
        "local_transformer",
        dict(
            x=token_ids(N, length + 1),
            weight=normal(N, length, VOCABULARY),
            with_loss=np.ones((), np.int32),
        ),
        options=SIZES | dict(num_residual_streams=1),
        grad_of=GRADIENTS_OF,
    )


if __name__ == "__main__":
    record_alone(record, "local_transformer")
