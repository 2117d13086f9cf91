"""Model FLOPs of a training step, and the peak of the chips that their utilisation is a share of.

Axes: M microbatches, B batch, T tokens.
"""

import functools
import math
from typing import Any

import flax.traverse_util
import numpy as np

from lsg_flax.chips import CHIPS
from lsg_flax.models import Batch, EncoderConfig, Model

# Peak dense bfloat16 FLOP/s of one chip by what `device_kind` contains; NVIDIA's from its data
# sheets (SXM). A device of JAX is one chip (two cores of v4 and v5p together).
PEAK_FLOPS = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds} | {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by JAX's name for it; None for one that is not known."""
    matching = [name for name in PEAK_FLOPS if name.lower() in device_kind.lower()]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def train_flops(model: Model, batch: Batch) -> float:
    """Model FLOPs of a training step on a batch: what the mathematics asks for on real tokens.

    Per real token 6 P + 12 L D S: two FLOPs for each of the P parameters in matrix products (the
    encoder's kernels, as often as they are used, and those of heads that answer per token, the
    vocabulary's included) and 4 D for each of S keys seen (scores and values, L layers, width D),
    three times for forward and backward. S is T with full attention; with LSG attention
    the globals, three local blocks and two sparse ones, and g more for the g rows that see all;
    never more than T. Padding, recomputation (remat), dropout and gradients that
    freezing spares are left out, so the utilisation computed from it compares like with like.

    Args:
        batch: [B, T] or [M, B, T] by Hugging Face's names.
    """
    ids = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    mask = batch.get("attention_mask")
    tokens = math.prod(ids.shape) if mask is None else int(np.count_nonzero(np.asarray(mask)))
    config, length = model.config, ids.shape[-1]
    attention = 12 * config.num_hidden_layers * config.hidden_size * _keys_seen(config, length)
    return float(tokens) * (6 * _matmul_parameters(model) + attention)


def _keys_seen(config: EncoderConfig, length: int) -> int:
    lsg = config.lsg
    if lsg is None:
        return length
    sparse = 0 if lsg.sparsity_type in (None, "none") else 2 * lsg.sparse_block_size
    return min(length, 2 * lsg.num_global_tokens + 3 * lsg.block_size + sparse)


def _count_matmul_parameters(model: Model) -> int:
    """Parameters that each token is multiplied with."""
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(model.abstract_params(), sep="/")
    config = model.config
    uses = config.num_hidden_layers // (config.num_hidden_groups or config.num_hidden_layers)
    parts = ("encoder/", "head/") if model.task_record.per_token else ("encoder/",)
    kernels = [p for p in leaves if p.endswith("/kernel") and p.startswith(parts)]
    count = sum(leaves[p].size * (uses if "/layers/" in p else 1) for p in kernels)
    head = {path: leaf.shape for path, leaf in leaves.items() if path.startswith("head/")}
    own = any(config.vocab_size in shape for shape in head.values() if len(shape) == 2)
    if (config.vocab_size,) in head.values() and not own:  # a bias over words: the tied table
        count += leaves["encoder/embeddings/word_embeddings/embedding"].size
    return count


# Any, since type checkers take Linen modules for unhashable.
_matmul_parameters: Any = functools.lru_cache(maxsize=8)(_count_matmul_parameters)
