"""The static plan of a fused call of LSG attention on a TPU: its geometry, the on-chip memory that
it needs, and which cases the kernels support.

Axes: B batch, N heads, H head width, T tokens, R representatives, Q queries of a block, W keys of a
block's windows.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from lsg_flax.kernels.spec import EVERYTHING, Rule

LANES = 128  # of a register: this many features of neighbouring heads are computed together
GROUP = 8  # blocks of queries in a step of the grid: their log-normalisers fill a tile
BLOCKS, WIDTHS, DTYPES = (64, 128, 256), (32, 64, 128), ("float32", "bfloat16")
MIB = 2**20
# Bytes of vector memory that a kernel may use, by a part of `device_kind`: the size that libtpu
# 0.0.42 states when it refuses a program, less 1/16 that it keeps for spilled registers.
VECTOR_MEMORY = {"v5p": 60 * MIB, "v5 lite": 120 * MIB, "v5e": 120 * MIB, "v6": 120 * MIB}
_LEAST_MEMORY = 15 * MIB
MOST_GROWTH = 40.0  # the largest logarithm of xpos' factors with which nothing overflows


@dataclass(frozen=True)
class Selecting:
    """The sparse part of a pattern.

    Attributes:
        kind: how a block's representatives are chosen: "norm", "pooling", "stride", "block_stride",
            "none", or "given" if they are chosen outside the kernel.
        step: representatives per block.
        width: how many of them a query sees on each side.
        right: representatives from a block's first one to the start of its right-hand window.
        chunk: number of tokens from which "norm" takes the keys with the largest norms.
    """

    kind: str = "none"
    step: int = 0
    width: int = 0
    right: int = 0
    chunk: int = 0

    @property
    def reach(self) -> int:
        """The number of blocks before a query's own that it sees, and after it."""
        return max(1, -(-(self.width + self.step) // self.step)) if self.step else 0


@dataclass(frozen=True)
class Near:
    """The tokens that a query sees, by whole blocks.

    Attributes:
        window: number of blocks of a window, whose queries see the same blocks.
        before, after: how many windows before and after its own a query sees (none after it if
            causal).
        rule: which of these tokens a query sees, by position.
    """

    window: int = 1
    before: int = 1
    after: int = 1
    rule: Rule = EVERYTHING


@dataclass(frozen=True)
class Turn:
    """Rotary positions.

    Attributes:
        angles: radians by which the features h and h + H / 2 of a head rotate from one position
            to the next.
        growth: logarithm of the factor by which queries grow, and keys shrink, per position.
        ahead: how many positions after its own a query is rotated to.
    """

    angles: tuple[float, ...]
    growth: tuple[float, ...]
    ahead: int = 0


@dataclass(frozen=True)
class FusedSpec:
    """A pattern for the kernels: Q = `block` queries see their own block and its neighbours,
    representatives and the shared keys.

    Attributes:
        dropout_rate: probability of dropping an attention weight.
        scale: factor of the scores; by default H ** -0.5.
    """

    block: int
    selecting: Selecting = Selecting()
    causal: bool = False
    dropout_rate: float = 0.0
    near: Near = Near()
    scale: float | None = None
    turn: Turn | None = None

    @property
    def rule(self) -> Rule:
        """Which of the tokens in the blocks that it sees a query sees."""
        return replace(self.near.rule, after=0) if self.causal else self.near.rule


@dataclass(frozen=True)
class FusedPlan:
    """The static plan of a call: the pattern, and the sizes of its arrays.

    Attributes:
        blocks: number of blocks of queries in a range.
        shared: number of keys that all queries see, padded to a whole tile.
        behind: how many of these come after the tokens in all arrays, and are queries too, which
            see everything; 0 if shared keys have their own arrays.
        heads: number of heads, padded to whole groups.
        all_heads: number of heads of all shards.
        width: features per head.
        row_axes, head_axes: mesh axes over which rows of the batch and heads are sharded.
        extended: whether keys and given representatives include those of `before` blocks before and
            `after` blocks after them, as for a shard.
        ranges: number of ranges, of `blocks` each, into which the tokens are first split, as if
            they were shards.
        interpret: whether to run without a TPU, slowly.
    """

    spec: FusedSpec
    blocks: int
    shared: int
    heads: int
    all_heads: int
    width: int
    dtype: str
    row_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()
    extended: bool = False
    ranges: int = 1
    interpret: bool = False
    behind: int = 0

    @property
    def block(self) -> int:
        """Number of queries of a block."""
        return self.spec.block

    @property
    def selecting(self) -> Selecting:
        """How representatives are selected."""
        return self.spec.selecting

    @property
    def group_heads(self) -> int:
        """Number of heads that share the lanes."""
        return LANES // self.width

    @property
    def before(self) -> int:
        """Blocks of keys in front of the first query's."""
        return max(self.near_before, self.selecting.reach)

    @property
    def after(self) -> int:
        """Blocks of keys behind the last query's."""
        return 0 if self.spec.causal else max(self.near_after, self.selecting.reach)

    @property
    def near_before(self) -> int:
        """Blocks before a query's own of which it may see tokens."""
        near = self.spec.near
        return (near.before + 1) * near.window - 1

    @property
    def near_after(self) -> int:
        """Blocks after a query's own of which it may see tokens."""
        near = self.spec.near
        return 0 if self.spec.causal else (near.after + 1) * near.window - 1

    @property
    def has_rule(self) -> bool:
        """Whether not all queries of a block see the same tokens of the blocks around it."""
        return self.spec.rule != EVERYTHING or self.spec.near.window > 1

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.width**-0.5 if self.spec.scale is None else self.spec.scale

    @property
    def scratch_blocks(self) -> int:
        """Blocks of keys that the queries of a range see."""
        return self.before + self.blocks + self.after

    @property
    def key_blocks(self) -> int:
        """Blocks of keys that a call has."""
        return self.scratch_blocks if self.extended else self.blocks

    @property
    def first_key_block(self) -> int:
        """The block on the chip at which these begin."""
        return 0 if self.extended else self.before

    @property
    def growth(self) -> float:
        """The largest logarithm of the factors that rotary positions multiply by."""
        turn = self.spec.turn
        if turn is None:
            return 0.0
        places = (self.blocks / 2 + max(self.before, self.after)) * self.block + turn.ahead
        return places * max(map(abs, turn.growth))

    @property
    def near(self) -> int:
        """Tokens of the blocks around a query."""
        return (self.near_before + 1 + self.near_after) * self.block

    @property
    def window(self) -> int:
        """Keys that a block of queries sees."""
        sides = 1 if self.spec.causal else 2
        return self.near + sides * self.selecting.width + self.shared

    @property
    def blocks_behind(self) -> int:
        """Blocks of queries after those of tokens; the last may be short."""
        return -(-self.behind // self.block)

    @property
    def steps(self) -> int:
        """Steps of the grid for one group of heads."""
        return -(-(self.blocks + self.blocks_behind) // GROUP)

    @property
    def key_rows(self) -> int:
        """Number of keys that a step of the grid reads."""
        return self.key_blocks * self.block + (self.shared if self.behind else 0)

    @property
    def shared_row(self) -> int:
        """The row on the chip at which the shared keys begin, behind all tokens."""
        return self.scratch_blocks * self.block

    def memory(self, backward: bool) -> int:
        """Returns the bytes of vector memory; arrays that are loaded while others of their kind are
        in use count twice."""
        size, row = jnp.dtype(self.dtype).itemsize, LANES
        chosen = self.key_blocks * self.selecting.step
        scratch = self.scratch_blocks * (self.block + self.selecting.step) + self.shared
        moved = 2 * self.key_rows + 2 * GROUP * self.block
        moved += 0 if self.behind else 2 * self.shared
        if self.selecting.kind == "given":
            moved += 2 * chosen
        total = 2 * scratch * row * size
        if backward:
            moved += moved + GROUP * self.block
            total += 2 * scratch * row * 4 + self.scratch_blocks * self.group_heads * self.block * 4
        total += 2 * moved * row * size + 2 * self.key_blocks * self.block * 4
        hidden = GROUP * self.group_heads * (-(-self.window // LANES) * LANES) * 4
        work = 6 * self.block * self.window * 4  # scores and arrays computed from them
        if self.spec.turn is not None:
            work += 8 * (self.block + self.scratch_blocks) * row * 4
        return total + 2 * hidden + work


class FusedArrays(NamedTuple):
    """The arrays that both kernels read, None if a call has no such array; inside a kernel they are
    references. Heads are concatenated, D = N * H; S keys and T queries are the tokens and the
    globals after them; R representatives.

    Attributes:
        seeds: seeds of dropout, and the number of the first row among those of all shards.
        numbers: numbers of the heads among those of all shards.
        real: 1 for keys that may be seen, else 0, in blocks.
        hidden: added to the scores of the keys that a block sees: 0, or a very low number that
            hides a key; one row for all heads or one per head.
        shared: keys and values that all queries see, if they are not after the tokens.
        given: representatives chosen outside the kernel.
        turns: `tpu_turn.Tables` of queries and of keys.
    """

    seeds: Any  # [3]
    numbers: Any  # [N]
    query: Any  # [B, T, D]
    key: Any  # [B, T, D]
    value: Any  # [B, T, D]
    real: Any  # [B, S / Q, Q]
    hidden: Any  # [B, #N, blocks of tokens, W]
    shared: tuple[Any, Any] | None  # [B, G, D]
    given: tuple[Any, Any] | None  # [B, R, D]
    turns: tuple[Any, Any] | None = None


class OnChip(NamedTuple):
    """Arrays [tokens or representatives, 128] of a group of heads that stay on the chip, extended
    at both ends by the rows that queries see there, with the shared keys after the tokens; or their
    gradients."""

    keys: Any
    values: Any
    chosen_keys: Any = None
    chosen_values: Any = None


def tile(dtype: str) -> int:
    """Returns the rows of a tile: slices of rows may start at multiples of it."""
    return 32 // jnp.dtype(dtype).itemsize


def refusal(plan: FusedPlan, chip: str | None) -> str | None:
    """Returns why the kernels cannot compute a call (what is given, what is allowed, what to do);
    None if they can.

    Args:
        chip: `device_kind` of the TPU; None for another device, whose memory is not checked.
    """
    spec, sparse = plan.spec, plan.selecting
    other = "or use implementation='xla'"
    if plan.dtype not in DTYPES:
        return f"dtype {plan.dtype} is none of {', '.join(DTYPES)}; cast the inputs, {other}."
    if plan.block not in BLOCKS:
        return f"block_size={plan.block} is none of {_listed(BLOCKS)}; use one of them, {other}."
    if plan.width not in WIDTHS:
        return f"head width {plan.width} is none of {_listed(WIDTHS)}; {other[3:]}."
    rows = tile(plan.dtype)
    if sparse.step % rows or sparse.width % rows:
        return (
            f"{sparse.step} representatives per block (block_size / sparsity_factor) and "
            f"sparse_block_size={sparse.width} must both be multiples of {rows} in {plan.dtype}; "
            f"change these settings, {other}."
        )
    if sparse.kind == "norm" and plan.block % sparse.chunk:
        return (
            f"sparse_block_size={sparse.width} must divide block_size={spec.block}, or be larger, "
            f"for sparsity_type='norm'; change it, {other}."
        )
    if plan.growth > MOST_GROWTH:
        return (
            f"use_xpos scales by up to e ** {plan.growth:.0f} over {plan.blocks * plan.block} "
            f"tokens, but at most e ** {MOST_GROWTH:.0f} is allowed; use a larger xpos_scale_base, "
            f"shorter texts, {other}."
        )
    return None if chip is None else _too_large(plan, chip, other)


def _too_large(plan: FusedPlan, chip: str, other: str) -> str | None:
    allowed, needed = vector_memory(chip), plan.memory(backward=True)
    if needed <= allowed:
        return None
    return (
        f"{plan.blocks} blocks of {plan.block} tokens need {needed / MIB:.0f} MiB of vector "
        f"memory, but a kernel may use {allowed / MIB:.0f} MiB on {chip}; use smaller blocks, "
        f"{other}."
    )


def cut_to_fit(plan: FusedPlan, chip: str) -> FusedPlan:
    """Splits the blocks of a plan into the fewest ranges that fit the chip; returns the plan
    unchanged if no split fits."""
    for count in range(1, plan.blocks + 1):
        window = plan.spec.near.window
        blocks = -(-plan.blocks // (count * window)) * window
        cut = replace(plan, blocks=blocks, ranges=count)
        if count > 1:
            cut = replace(cut, extended=True, behind=0)
        if cut.memory(backward=True) <= vector_memory(chip):
            return replace(cut, extended=plan.extended)
    return plan


def vector_memory(chip: str) -> int:
    """Returns the bytes of on-chip memory that a kernel may use on a `device_kind`."""
    kind = chip.lower()
    if kind.endswith("v5"):  # JAX's name of v5p
        return VECTOR_MEMORY["v5p"]
    return next((size for name, size in VECTOR_MEMORY.items() if name in kind), _LEAST_MEMORY)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def padded_heads(heads: int, width: int) -> int:
    """Returns the number of heads, padded to whole groups."""
    group = max(1, LANES // width)
    return math.ceil(heads / group) * group
