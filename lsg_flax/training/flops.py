"""Model FLOPs of a training step, and the chips' peak FLOP/s, for the model FLOPs utilisation.

Axes: M microbatches, B batch, T tokens.
"""

import functools
import math
import re
from typing import Any

import flax.traverse_util
import numpy as np

from lsg_flax.chips import CHIPS
from lsg_flax.models import IGNORED, Batch, EncoderConfig, Model, ReformerConfig
from lsg_flax.patterns import Local

# Peak dense bfloat16 FLOP/s of one chip, by part of its `device_kind`. A JAX device is one chip
# (of v4 and v5p both cores together).
PEAK_FLOPS = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bfloat16 FLOP/s of a device by JAX's name for it; None if unknown."""
    matching = [k for k in PEAK_FLOPS if re.search(rf"\b{k}\b", device_kind, re.IGNORECASE)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def train_flops(model: Model, batch: Batch) -> float:
    """Returns the model FLOPs of a training step on a batch: those that the formulas need on real
    tokens (as in PaLM, arXiv 2204.02311, appendix B).

    They are 6 P + 12 L D S per real token: two FLOPs for each of the P parameters in matrix
    products (the encoder's kernels, as often as they are used, and those of heads that answer per
    token, the vocabulary's included) and 4 D for each of S keys seen (scores and values, L layers,
    width D), three times for forward and backward. S is T with full attention; with LSG attention
    the global tokens, three local blocks and two sparse ones, and g more for the g rows that see
    all; with local attention its windows; of a Reformer the chunks of each layer, in every round of
    hashing; never more than T. A decoder's tokens, as many as labels, see each other and the
    encoder's, which the keys and values of cross-attention are made of. Padding, recomputation
    (remat), dropout and gradients that frozen parameters save are left out, so that utilisations
    of different settings can be compared.

    Args:
        batch: arrays [B, T] or [M, B, T] by Hugging Face's names.
    """
    ids = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    mask, total, seen = batch.get("attention_mask"), 0.0, 0
    read = [(ids.shape, mask)]
    if model.has_two_stacks:
        labels = batch.get("labels") if model.task_record.generates else None
        read += read if labels is None else [(labels.shape, np.asarray(labels) != IGNORED)]
    for part, (shape, real) in zip(model.parts, read, strict=True):
        stack, length = model.config.stacks[part], shape[-1]
        tokens = math.prod(shape) if real is None else int(np.count_nonzero(np.asarray(real)))
        keys = _keys_seen(stack, length) + seen
        if "segment_ids" in batch:
            keys = _keys_of_texts(stack, batch["segment_ids"])
        attention = 12 * stack.num_hidden_layers * stack.num_attention_heads * stack.head_dim * keys
        total += float(tokens) * (6 * _matmul_parameters(model, part) + attention)
        seen = length
    return total


def _keys_of_texts(config: EncoderConfig, segment_ids: Any) -> float:
    """Returns how many keys a token sees on average if rows hold several texts."""
    rows = np.asarray(segment_ids).reshape(-1, np.shape(segment_ids)[-1])
    lengths = np.concatenate([np.bincount(row)[1:] for row in rows])
    return float(np.average([_keys_seen(config, n) for n in lengths.tolist()], weights=lengths))


def _keys_seen(config: EncoderConfig, length: int) -> int | float:
    if isinstance(config, ReformerConfig):
        return config.keys_seen(length)
    lsg, pattern = config.lsg, config.kept_pattern
    if isinstance(pattern, Local):
        others = (pattern.windows_seen - 1) * pattern.window_size
        return min(length, others + (1 if pattern.exact_windowsize else pattern.window_size))
    if lsg is None:
        return length
    sparse = 0 if lsg.sparsity_type in (None, "none") else 2 * lsg.sparse_block_size
    return min(length, 2 * lsg.num_global_tokens + 3 * lsg.block_size + sparse)


def _count_matmul_parameters(model: Model, part: str) -> int:
    """Returns the number of parameters that each token of a stack is multiplied with."""
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(model.abstract_params(), sep="/")
    config = model.config.stacks[part]
    uses = config.num_hidden_layers // (config.num_hidden_groups or config.num_hidden_layers)
    answers = bool(model.task_record.per_token) and part == model.parts[-1]
    kernels = [p for p in leaves if re.search("/kernels?$", p) and _reader(p, model) == part]
    kernels += [p for p in leaves if re.match("head/.*kernel$", p)] if answers else []
    count = sum(leaves[p].size * (uses if "/layers/" in p else 1) for p in kernels)
    if not answers:
        return count
    head = {path: leaf.shape for path, leaf in leaves.items() if path.startswith("head/")}
    own = any(config.vocab_size in shape for path, shape in head.items() if "kernel" in path)
    scores = model.task_record.generates or (config.vocab_size,) in head.values()
    if scores and not own:  # the logits come from the tied embedding table
        count += config.vocab_size * config.embedding_width
    return count


def _reader(path: str, model: Model) -> str:
    """Returns the stack whose tokens are multiplied with a parameter."""
    if model.has_two_stacks and re.search("/cross_attention/(key|value)/", path):
        return "encoder"
    return path.split("/")[0]


# Any, because type checkers think that Linen modules are unhashable.
_matmul_parameters: Any = functools.lru_cache(maxsize=8)(_count_matmul_parameters)
