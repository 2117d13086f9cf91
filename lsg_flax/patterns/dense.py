"""The LSG pattern as a dense boolean matrix, for the dense reference and for reading.

Axes: T tokens, S keys, G global tokens, R representatives.
"""

import numpy as np
from jaxtyping import Bool

from lsg_flax.patterns.pattern import LSG
from lsg_flax.patterns.representatives import right_offset


def seen_by(pattern: LSG, length: int) -> Bool[np.ndarray, "T S"]:
    """Returns which query may see which key, see `lsg_flax.attention.attention_pattern`. With
    several texts in a row the globals are those of all texts."""
    config, block, split = pattern.config, pattern.config.block_size, pattern.split
    token, total = np.arange(length), split + length
    of = token[:, None] // block  # the block of each query
    blocked_path = length > 2 * block
    tokens = abs(of - token // block) <= 1 if blocked_path else np.ones((length, length), bool)
    if pattern.causal:
        tokens &= token <= token[:, None]
    if blocked_path and pattern.global_tokens == "first_token":
        tokens[:, 0] = True
    parts = [np.ones((length, split), bool), tokens]
    if blocked_path and config.is_sparse:
        step, wide = config.sparse_step, config.sparse_block_size
        unit = np.arange((length + config.needs_padding(length)) // config.sparsity_factor)
        left, right = (
            (of - 1) * step - wide,
            of * step + right_offset(config),
        )  # first ones seen
        sees_left = (left <= unit) & (unit < left + wide)
        sees_right = (right <= unit) & (unit < right + wide)
        parts.append(sees_left if pattern.causal else sees_left | sees_right)
    seen = np.concatenate(parts, axis=1)  # [T, G + T + R]
    seen = np.concatenate([np.zeros((split, seen.shape[1]), bool), seen])
    rows = pattern.full_rows if blocked_path and not pattern.causal else split
    seen[:rows] = np.arange(seen.shape[1]) < total
    return seen
