"""Parameters of a LocalTransformer as functions of their names and shapes, so that neither side of
a comparison stores them."""

import numpy as np


def drawn(name, shape, scale=0.3):
    """Around 1 for norms and scales, around their first values for residual streams, else around 0.

    Embeddings are as large as PyTorch's, and branches read a whole stream: a LayerNorm of small
    numbers makes gradients that float32 has few digits of.
    """
    generator = np.random.default_rng([*name.encode(), *shape])
    norms = (".branch.norm.weight", ".1.branch.0.weight", "to_logits.0.weight")
    centre = float(name.endswith((*norms, "q_scale", "k_scale", "static_beta")))
    if name.endswith("static_alpha"):
        centre = np.eye(*shape, 1) + np.eye(*shape) * (np.arange(shape[0]) == 0)[:, None]
    scale = 1.0 if name.endswith("emb.weight") else scale
    return np.asarray(centre + scale * generator.standard_normal(tuple(shape)), np.float32)
