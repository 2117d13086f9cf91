"""The work of kernels that XLA sees from outside: products of NVIDIA's libraries, and kernels of
one's own (Pallas).

A kernel's FLOPs and bytes come from its formula in `FORMULAS`, else from what it declared when it
was called: `pallas_call(cost_estimate=...)` reaches a TPU's program, not a GPU's, and
`pallas_call(metadata=...)`, with the same names, a GPU's.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lsg_flax.planning.hlo_text import Array, Instruction, arrays_of

# What the targets of kernels begin with; other custom calls allocate, place and sort.
_PALLAS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu")
_LIBRARIES = ("__cublas$", "__cudnn$")
_QUOTE = r'(?:"|\\22)'  # or as it is printed within a string


class KernelCall(NamedTuple):
    """One kernel's call.

    Attributes:
        operands, results: the arrays as the program has them.
        attributes: as they are printed.
    """

    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    attributes: str


class KernelWork(NamedTuple):
    """Of one call: matrix FLOPs, and bytes of main memory that it reads and writes."""

    flops: float
    bytes: int


Formula = Callable[[KernelCall], KernelWork]


def target_of(instruction: Instruction) -> str:
    """What a custom call runs; empty for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a kernel of one's own, or one of a library."""
    return target_of(instruction).startswith(_PALLAS + _LIBRARIES)


def is_own_kernel(instruction: Instruction) -> bool:
    """Whether it is a kernel of one's own."""
    return target_of(instruction).startswith(_PALLAS)


def name_of(instruction: Instruction) -> str:
    """The name that a kernel was given (`pallas_call(name=...)`), within the names of derivatives
    such as `transpose(jvp(...))`, or that of the library's."""
    given = re.search(r'op_name="(?:[^"]*[/(])?([^"/()]+)\)*/pallas_call', instruction.attributes)
    return given[1] if given else target_of(instruction)


def work_of(instruction: Instruction, operands: tuple[Array, ...]) -> KernelWork | None:
    """The work of one call of a kernel; None where nobody says it.

    Args:
        operands: its arrays.
    """
    call = KernelCall(operands, tuple(arrays_of(instruction.shape)), instruction.attributes)
    if formula := FORMULAS.get(name_of(instruction)):
        return formula(call)
    declared = {
        name: re.search(rf"{_QUOTE}{name}{_QUOTE}: ?{_QUOTE}?(\d+)", instruction.attributes)
        for name in ("flops", "bytes_accessed")
    }
    flops, moved = declared.values()
    if flops is None or moved is None:
        return None
    return KernelWork(float(flops[1]), int(moved[1]))


def _product(call: KernelCall) -> KernelWork:
    """cuBLAS: the last of several results is its workspace, of which nothing comes or stays."""
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    contracted = [int(axis) for axis in re.findall(r"\d+", axes[1])] if axes else []
    left, results = call.operands[0], call.results[:-1] or call.results
    flops = 2.0 * math.prod(results[0].dims) * math.prod(left.dims[axis] for axis in contracted)
    return KernelWork(flops, sum(a.bytes for a in (*call.operands, *results) if a.in_memory))


def _lsg(products: int, call: KernelCall) -> KernelWork:
    """The fused kernels of `kernels/tpu.py`: so many products over all scores, of queries [B, T, D]
    with the keys that a block of them sees, [B, #N, blocks, W], in as many heads and blocks of as
    many tokens as log-normalisers have, [B, N, _, Q]; queries behind these blocks see all. What
    they are told of their work would move XLA to keep less on the chip."""
    by_rank = [[a for a in arrays if len(a.dims) == 4] for arrays in (call.operands, call.results)]
    seen, normalisers = by_rank[0][0], (by_rank[0] + by_rank[1])[-1]
    query = next(a for a in call.operands if len(a.dims) == 3)
    (rows, places, features), (*_, blocks, window) = query.dims, seen.dims
    tokens = blocks * normalisers.dims[-1]
    scores = rows * (tokens * window + (places - tokens) * places)
    flops = 2.0 * products * scores * features
    moved = sum(a.bytes for a in (*call.operands, *call.results) if a.in_memory)
    return KernelWork(flops, moved)


def _splash(products: int, by_keys: bool, call: KernelCall) -> KernelWork:
    """JAX's full attention: so many products over the blocks of scores. The first operand has their
    numbers, [_, of queries, of keys]; the third and fourth are queries [*B, N, H, T] and keys; a
    causal call has one operand more. Blocks of queries read all keys and values, or those of keys
    all queries and gradients."""
    (_, *blocks), query, key = call.operands[0].dims, *call.operands[2:4]
    causal = len(call.operands) > (7 if products == 2 else 10)
    share = (blocks[0] + 1) / (2 * blocks[0]) if causal else 1.0
    flops = 2.0 * products * math.prod(query.dims) * key.dims[-1] * share
    moved = sum(a.bytes for a in (*call.operands, *call.results) if a.in_memory)
    again, count = (query, blocks[1]) if by_keys else (key, blocks[0])
    return KernelWork(flops, moved + round(2 * again.bytes * max(0.0, count * share - 1)))


# By a kernel's name; of Pallas kernels, those that declare nothing, as on GPUs.
FORMULAS: dict[str, Formula] = {
    "lsg_forward": partial(_lsg, 2),
    "lsg_backward": partial(_lsg, 5),
    "splash_mha_fwd_segmented_no_residuals": partial(_splash, 2, False),
    "splash_mha_fwd_segmented_residuals": partial(_splash, 2, False),
    "splash_mha_dq_segmented_no_residuals": partial(_splash, 3, False),
    "splash_mha_dkv_segmented_no_residuals": partial(_splash, 4, True),
    "__cublas$gemm": _product,
    "__cublas$lt$matmul": _product,
    "__cublas$lt$matmul$f8": _product,
}
