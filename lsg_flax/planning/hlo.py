"""Reads the work of a compiled program from its text: matrix FLOPs, bytes to and from main memory,
collectives, and the compiler's own cycle estimates.

XLA's `cost_analysis` counts the body of a loop only once, but the layers of our models are a loop,
with a loop over blocks inside. Here every instruction counts as often as the loops around it run.
All numbers are those of one chip.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lsg_flax.planning.custom_calls import (
    KernelWork,
    is_kernel,
    is_own_kernel,
    target_of,
    work_of,
)
from lsg_flax.planning.hlo_text import (
    Computation,
    Instruction,
    arrays_of,
    called_by,
    conditions_of,
    parse,
    rounds_of,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)
# Instructions that name or arrange data, or only wait for it.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"}
_FREE |= {"conditional", "call", "partition-id", "replica-id", "opt-barrier", "async-start"}
_FREE |= {"async-update", "async-done"}
_VIEWS = {"bitcast", "reshape", "copy", "transpose", "convert"}
_PARTIAL = {"dynamic-slice", "slice", "gather"}
_SORTS = ("TopK", "__gpu$TopK", "__cub$", "xla.gpu.ext.cub_sort")


class Collective(NamedTuple):
    """All collectives of one kind, group size and payload.

    Attributes:
        kind: one of `COLLECTIVES`.
        runs: how often it runs in a step.
        bytes: payload of one run on one chip: the size of its input or output, whichever is larger.
        group: number of chips that take part.
    """

    kind: str
    runs: int
    bytes: int
    group: int

    @property
    def wire_bytes(self) -> float:
        """The bytes that one chip sends in a step, with a ring algorithm."""
        share = (self.group - 1) / self.group if self.group > 1 else 0.0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.runs * self.bytes * factor


class ProgramReport(NamedTuple):
    """The work of one chip in one step.

    Attributes:
        flops: FLOPs of matrix products and convolutions; a multiplication and an addition count as
            two.
        bytes: bytes read from and written to the chip's main memory, without those that stay in
            on-chip memory or inside a fusion.
        collectives: the collectives, the largest total first.
        cycles: sum of the compiler's estimates (TPU); 0 if it gives none.
        kernels: how often custom (Pallas) kernels run.
        unknown_kernels: how often kernels of unknown work run, those of libraries included: they
            count no FLOPs, and their arrays as read and written once.
        unknown_loops: number of loops with an unknown number of rounds; they count as one round.
        sorts, gathers, scatters: how often these run. A compiler's cycles do not include them.
        kernel_flops, kernel_bytes: the custom kernels' share of `flops` and `bytes`; 0 in reports
            of earlier versions.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    cycles: float
    kernels: int
    unknown_kernels: int
    unknown_loops: int
    sorts: int
    gathers: int
    scatters: int
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0


class _Run(NamedTuple):
    """An instruction and how often it runs; `fused` ones do not access memory themselves."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool
    within: str  # the name of the fusion
    unbounded: bool  # whether it is, or is inside, a loop with an unknown number of rounds


def read_program(text: str) -> ProgramReport:
    """Reads a program's text, `compiled.as_text()`.

    Raises:
        ValueError: if the text is not that of a compiled program.
    """
    computations, entry = parse(text)
    return _report(list(_walk(computations, entry)), computations)


def read_loop(text: str) -> tuple[ProgramReport, ProgramReport]:
    """Reads a program around a loop with an unknown number of rounds, such as generation; returns
    the work outside the loop, and that of one round.

    Raises:
        ValueError: if the text is not that of a compiled program, or has no such loop.
    """
    computations, entry = parse(text)
    runs = list(_walk(computations, entry))
    once, inside = ([r for r in runs if r.unbounded is within] for within in (False, True))
    if not inside:
        raise ValueError(
            "this program has no loop with an unknown number of rounds; use read_program for it."
        )
    a_round = _report(inside, computations)
    return _report(once, computations), a_round._replace(unknown_loops=a_round.unknown_loops - 1)


def _report(runs: list[_Run], computations: dict[str, Computation]) -> ProgramReport:
    counts: collections.Counter = collections.Counter()
    for run in runs:
        if kind := _collective_kind(run):
            size, group = _payload(run), _group_size(run.instruction.attributes)
            counts[kind, size, group] += run.times
    found = (Collective(kind, n, size, group) for (kind, size, group), n in counts.items())
    kernels = [r for r in runs if is_kernel(r.instruction)]
    own = [r for r in kernels if is_own_kernel(r.instruction)]
    works = [(r.times, work) for r in own if (work := _work(r))]
    loops = [r.instruction for r in runs if r.instruction.opcode == "while"]
    return ProgramReport(
        flops=float(sum(r.times * _flops(r) for r in runs)),
        bytes=float(sum(r.times * _moved(r, computations) for r in runs if not r.fused)),
        collectives=tuple(sorted(found, key=lambda c: -c.runs * c.bytes)),
        cycles=float(sum(r.times * _cycles(r.instruction) for r in runs if not r.fused)),
        kernels=sum(r.times for r in own),
        unknown_kernels=sum(r.times for r in kernels if _work(r) is None),
        unknown_loops=sum(rounds_of(loop, computations) is None for loop in loops),
        sorts=sum(r.times for r in runs if _sorts(r.instruction)),
        gathers=sum(r.times for r in runs if r.instruction.opcode == "gather"),
        scatters=sum(r.times for r in runs if r.instruction.opcode == "scatter"),
        kernel_flops=float(sum(times * work.flops for times, work in works)),
        kernel_bytes=float(sum(times * work.bytes for times, work in works)),
    )


def _walk(
    computations: dict[str, Computation],
    name: str,
    times: int = 1,
    *,
    fused: bool = False,
    within: str = "",
    unbounded: bool = False,
) -> Iterator[_Run]:
    """Yields every instruction that runs, with the product of the rounds of the loops around it."""
    for instruction in computations[name].values():
        loop = instruction.opcode == "while"
        rounds = rounds_of(instruction, computations) if loop else 1
        without_end = unbounded or rounds is None
        yield _Run(instruction, computations[name], times, fused, within, without_end)
        if instruction.opcode not in ("while", "fusion", "call", "conditional", "async-start"):
            continue  # others only call scalar functions, such as a reduction's
        turns = times * (rounds or 1)
        if loop:  # a condition may have collectives, but no memory traffic
            for condition in conditions_of(instruction):
                yield from _walk(computations, condition, turns, fused=True, unbounded=without_end)
        inside = fused or instruction.opcode == "fusion"
        label = f"{within} {instruction.name}" if inside else within
        for called in called_by(instruction):
            yield from _walk(
                computations,
                called,
                turns,
                fused=inside,
                within=label,
                unbounded=without_end,
            )


# Sizes


def _size(shape: str, *, everywhere: bool = False) -> int:
    """Returns the bytes of a shape in main memory, or `everywhere`."""
    return sum(a.bytes for a in arrays_of(shape) if a.in_memory or everywhere)


# FLOPs and cycles


def _flops(run: _Run) -> float:
    instruction = run.instruction
    if instruction.opcode == "dot":
        return _dot_flops(run)
    if instruction.opcode == "convolution":
        return _convolution_flops(run)
    work = _work(run) if is_kernel(instruction) else None
    return work.flops if work else 0.0


def _work(run: _Run) -> KernelWork | None:
    """The work of a kernel."""
    shapes = (run.computation[o].shape for o in run.instruction.operands)
    return work_of(run.instruction, tuple(a for shape in shapes for a in arrays_of(shape)))


def _sorts(instruction: Instruction) -> bool:
    return instruction.opcode == "sort" or target_of(instruction).startswith(_SORTS)


def _operand_dims(run: _Run) -> list[tuple[int, ...]]:
    return [arrays_of(run.computation[o].shape)[0].dims for o in run.instruction.operands]


def _dot_flops(run: _Run) -> float:
    left = _operand_dims(run)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", run.instruction.attributes)
    axes = [int(a) for a in contracted[1].split(",") if a] if contracted else []
    out = arrays_of(run.instruction.shape)[0].dims
    return 2.0 * math.prod(out) * math.prod(left[a] for a in axes)


def _convolution_flops(run: _Run) -> float:
    """Returns the FLOPs of a convolution. On TPU every product is a convolution, and a batch of
    products has a dilated axis: only pairs of output and kernel positions that meet a real element
    count."""
    attributes, (left, right) = run.instruction.attributes, _operand_dims(run)[:2]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None, run.instruction
    out = arrays_of(run.instruction.shape)[0].dims
    axes = sorted(label for label in labels[3] if label.isdigit())
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _braces(attributes, "window=")))
    parts = {name: value.split("x") for name, value in window.items()}
    pairs = 1
    for place, axis in enumerate(axes):
        low = parts["pad"][place].split("_")[0] if "pad" in parts else 0
        stride, base, kernel = (
            int(parts[name][place]) if name in parts else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pairs *= _meeting(
            left[labels[1].index(axis)],
            right[labels[2].index(axis)],
            out[labels[3].index(axis)],
            (int(low), stride, base, kernel),
        )
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    batch = left[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    features = right[labels[2].index("i")] * right[labels[2].index("o")]
    return 2.0 * batch * features * pairs


@functools.lru_cache
def _meeting(size: int, kernel: int, out: int, window: tuple[int, int, int, int]) -> int:
    """Returns how many (output, kernel) positions of an axis meet an element, no padding or gap."""
    low, stride, base, dilation = window
    starts = np.arange(out) * stride - low
    count = 0
    for place in range(kernel):
        at = starts + place * dilation
        count += int(((at >= 0) & (at <= (size - 1) * base) & (at % base == 0)).sum())
    return count


def _cycles(instruction: Instruction) -> float:
    estimate = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
    return float(estimate[1]) if estimate else 0.0


def _braces(text: str, name: str) -> str:
    found = re.search(rf"{name}\{{([^}}]*)\}}", text)
    return found[1] if found else ""


# Memory traffic


def _moved(run: _Run, computations: dict[str, Computation]) -> int:
    """Returns the bytes that an instruction reads from and writes to main memory."""
    instruction, own = run.instruction, run.computation
    allocates = "AllocateBuffer" in instruction.attributes
    if allocates or instruction.opcode in _FREE or instruction.opcode.endswith("-start"):
        return 0
    if instruction.opcode.endswith("-done"):  # a copy or slice is counted here, not at its start
        return _size(instruction.shape, everywhere=True)
    if instruction.opcode in _PARTIAL:
        return 2 * _size(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(own[instruction.operands[1]].shape)
    if instruction.opcode == "fusion":
        return _fusion_bytes(run, computations)
    if is_kernel(instruction) and (work := _work(run)):
        return work.bytes
    return _size(instruction.shape) + sum(_size(own[o].shape) for o in instruction.operands)


def _fusion_bytes(run: _Run, computations: dict[str, Computation]) -> int:
    """Returns the bytes that a fusion reads of its operands (often a slice) and writes (often in
    place)."""
    inner = called_by(run.instruction)[0]
    read = sum(
        _used(computations, inner, place, _size(run.computation[operand].shape))
        for place, operand in enumerate(run.instruction.operands)
    )
    body = computations[inner]
    root = next(i for i in body.values() if i.is_root)
    arrays = arrays_of(run.instruction.shape)
    # A root that is not a tuple may still have several arrays, as a reduction of pairs.
    tuples = root.opcode == "tuple"
    roots = [body[o] for o in root.operands] if tuples else [root] * len(arrays)
    written = 0
    for array, made in zip(arrays, roots, strict=True):
        while made.opcode in _VIEWS and made.operands:
            made = body[made.operands[0]]
        update = made.opcode == "dynamic-update-slice"
        size = _size(body[made.operands[1]].shape, everywhere=True) if update else array.bytes
        written += size if array.in_memory else 0
    return read + written


def _used(computations, name: str, place: int, whole: int) -> int:
    """Returns how many of the `whole` bytes of its parameter `place` a computation reads."""
    if not whole:
        return 0
    body = computations[name]
    sources = {
        i.name for i in body.values() if i.opcode == "parameter" and i.arguments == str(place)
    }
    used = 0
    for i in body.values():
        where = [n for n, o in enumerate(i.operands) if o in sources]
        if not where:
            continue
        if i.opcode in ("bitcast", "reshape"):
            sources.add(i.name)
        elif i.opcode in _PARTIAL and where == [0]:
            used += _size(i.shape, everywhere=True)
        elif i.opcode == "fusion":
            used += sum(_used(computations, called_by(i)[0], n, whole) for n in where)
        elif i.opcode != "dynamic-update-slice" or where != [0]:
            return whole
    return min(used, whole)


# Collectives


def _collective_kind(run: _Run) -> str | None:
    opcode = run.instruction.opcode.removesuffix("-start")
    if opcode == "all-reduce" and "all-reduce-scatter" in run.within:  # TPU's reduce-scatter
        return "reduce-scatter"
    return opcode if opcode in COLLECTIVES else None


def _payload(run: _Run) -> int:
    shapes = [run.computation[o].shape for o in run.instruction.operands]
    given = sum(_size(s, everywhere=True) for s in shapes)
    made = _size(run.instruction.shape, everywhere=True)
    if run.instruction.opcode.endswith("-start"):  # its result includes the operand
        made -= given
    return max(given, made)


def _group_size(attributes: str) -> int:
    """Returns the chips per group, for all forms in which XLA writes groups; 2 for a permute."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    pairs = _braces(attributes.replace("},{", ";"), "source_target_pairs=")
    return 2 if pairs else 1
