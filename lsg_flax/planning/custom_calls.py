"""The work of kernels that XLA cannot look into: matrix products of NVIDIA's libraries, and custom
(Pallas) kernels.

A kernel's FLOPs and bytes come from its formula in `FORMULAS`, or else from what it declared:
`pallas_call(cost_estimate=...)` is in the program of a TPU, but not of a GPU;
`pallas_call(metadata=...)`, with the same names, is in the program of a GPU.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lsg_flax.planning.hlo_text import Array, Instruction, arrays_of

# Prefixes of the targets of kernels; other custom calls allocate, place and sort.
_PALLAS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu")
_LIBRARIES = ("__cublas$", "__cudnn$")
_QUOTE = r'(?:"|\\22)'  # the second form is printed inside strings


class KernelCall(NamedTuple):
    """One call of a kernel.

    Attributes:
        operands, results: its arrays.
        attributes: the printed attributes of the instruction.
    """

    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    attributes: str


class KernelWork(NamedTuple):
    """The work of one call: matrix FLOPs, and bytes of main memory that it reads and writes."""

    flops: float
    bytes: int


Formula = Callable[[KernelCall], KernelWork]


def target_of(instruction: Instruction) -> str:
    """Returns the target of a custom call; empty for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a kernel: a custom one, or one of a library."""
    return target_of(instruction).startswith(_PALLAS + _LIBRARIES)


def is_own_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a custom kernel."""
    return target_of(instruction).startswith(_PALLAS)


def name_of(instruction: Instruction) -> str:
    """Returns the name of a kernel (`pallas_call(name=...)`), without transformations such as
    `transpose(jvp(...))`; or the name of a library's kernel."""
    given = re.search(r'op_name="(?:[^"]*[/(])?([^"/()]+)\)*/pallas_call', instruction.attributes)
    return given[1] if given else target_of(instruction)


def work_of(instruction: Instruction, operands: tuple[Array, ...]) -> KernelWork | None:
    """Returns the work of one call of a kernel; None if it is unknown.

    Args:
        instruction: the call.
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
    """The work of a product by cuBLAS. The last of several results is its workspace, which does not
    count."""
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    contracted = [int(axis) for axis in re.findall(r"\d+", axes[1])] if axes else []
    left, results = call.operands[0], call.results[:-1] or call.results
    flops = 2.0 * math.prod(results[0].dims) * math.prod(left.dims[axis] for axis in contracted)
    return KernelWork(flops, sum(a.bytes for a in (*call.operands, *results) if a.in_memory))


def _lsg(products: int, call: KernelCall) -> KernelWork:
    """The work of the fused kernels of `kernels/tpu.py`: `products` matrix products over all
    scores. The scores are of queries [B, T, D] and the keys that each block of them sees,
    [B, #N, blocks, W]; heads and block size are those of the log-normalisers, [B, N, _, Q]. Queries
    after these blocks see all keys. The kernels do not declare their work, because XLA would then
    keep less in on-chip memory."""
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
    """The work of JAX's full attention: `products` matrix products over the blocks of scores. The
    shape of the first operand has the numbers of blocks, [_, of queries, of keys]; the third and
    fourth operands are queries [*B, N, H, T] and keys; a causal call has one operand more. Each
    block of queries reads all keys and values, or (`by_keys`) each block of keys all queries and
    gradients."""
    (_, *blocks), query, key = call.operands[0].dims, *call.operands[2:4]
    causal = len(call.operands) > (7 if products == 2 else 10)
    share = (blocks[0] + 1) / (2 * blocks[0]) if causal else 1.0
    flops = 2.0 * products * math.prod(query.dims) * key.dims[-1] * share
    moved = sum(a.bytes for a in (*call.operands, *call.results) if a.in_memory)
    again, count = (query, blocks[1]) if by_keys else (key, blocks[0])
    return KernelWork(flops, moved + round(2 * again.bytes * max(0.0, count * share - 1)))


# By a kernel's name; Pallas kernels are here if they declare no work, as on GPUs.
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
