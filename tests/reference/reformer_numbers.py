"""Parameters and rotations of a Reformer as functions of their names and shapes, so that neither
side of a comparison stores them."""

import numpy as np


def drawn(name, shape, scale=0.3):
    """Around 1 for norms, else around 0; embeddings are as large as PyTorch's axial ones, so that a
    LayerNorm does not read small numbers, of whose gradients float32 has few digits."""
    generator = np.random.default_rng([*name.removeprefix("reformer.").encode(), *shape])
    centre = float("layer_norm.weight" in name)
    scale = 1.0 if "embeddings." in name else scale
    return np.asarray(centre + scale * generator.standard_normal(tuple(shape)), np.float32)


def rotations(number, shape):
    """Of the hashing that comes as that number: [heads, head width, hashes, rotations // 2]."""
    generator = np.random.default_rng([number, *shape])
    return generator.standard_normal(shape).astype(np.float32)
