"""Prompts checked, and filled up to a bucket.

Axes: B batch, T tokens of the prompt.
"""

import numpy as np
from jaxtyping import Bool, Integer
from numpy.typing import ArrayLike

from lsg_flax.generation.steps import CausalModel


def check_prompt(
    model: CausalModel, input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[Integer[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Ids and mask as arrays; raises ValueError for such as cannot be continued."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"input_ids must be integers [batch, tokens], at least one of each, got {ids.dtype} "
            f"{ids.shape}."
        )
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"input_ids lie in {ids.min()}..{ids.max()}, but vocab_size="
            f"{model.config.vocab_size} allows 0..{model.config.vocab_size - 1}."
        )
    given = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask)
    if given.shape != ids.shape or not np.isin(given, (0, 1)).all():
        raise ValueError(
            f"attention_mask {given.shape} must have the shape of input_ids {ids.shape}, and hold "
            "1 for real tokens and 0 for padding."
        )
    mask = given.astype(bool)
    if not mask[:, -1].all():
        raise ValueError(
            f"rows {np.flatnonzero(~mask[:, -1]).tolist()} of the prompt end in padding; pad on "
            "the left (tokenizer.padding_side = 'left')."
        )
    return ids, mask


def slots_to_fill(
    model: CausalModel,
    length: int,
    max_new_tokens: int,
    bucket: int,
    position_ids: ArrayLike | None,
) -> int:
    """Slots to append to a prompt of `length` tokens for its bucket, as far as there are positions;
    raises ValueError if they do not reach."""
    if max_new_tokens < 1 or bucket < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and bucket={bucket} must be at least 1.")
    given = position_ids is not None
    last = int(np.asarray(position_ids)[:, -1].max()) if given else length - 1
    limit = model.config.max_position_embeddings if given else model.max_length
    if last + max_new_tokens > limit:  # the last token needs no position
        raise ValueError(
            f"max_new_tokens={max_new_tokens} behind a prompt of {length} tokens needs "
            f"{last + max_new_tokens} positions, and this checkpoint has {limit}: at most "
            f"{max(limit - last, 0)} fit. Shorten the prompt, or convert the checkpoint with a "
            "larger max_sequence_length."
        )
    fill = -length % bucket
    return fill if given else min(fill, limit - (length + max_new_tokens - 1))
