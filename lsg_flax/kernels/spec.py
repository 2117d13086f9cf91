"""The contract of attention kernels: sources of keys, the windows of them that a block of queries
sees, and what is static about a call.

Axes: B batch, N heads, H head width, S keys of a source.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class Source(NamedTuple):
    """Keys that queries may attend to; `mask` False means never. The mask may have one head for
    all."""

    key: Float[Array, "B N H S"]
    value: Float[Array, "B N H S"]
    mask: Bool[Array, "B #N S"]


@dataclass(frozen=True)
class Window:
    """Block b sees the `width` keys from `offset + b * stride` of source number `source`; keys
    outside the source do not exist.

    `causal`: the last keys of the window are the block itself, and no query sees past its own
        place.
    """

    source: int
    offset: int
    stride: int
    width: int
    causal: bool = False


@dataclass(frozen=True)
class Spec:
    """What is static about a call: Q = `block` queries per block, the windows that each block sees.

    `blocks_per_step` trades memory for parallelism; 0 lets the device decide.
    """

    block: int
    windows: tuple[Window, ...] = ()
    shared_causal: bool = False
    blocks_per_step: int = 0
    dropout_rate: float = 0.0
