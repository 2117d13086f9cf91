"""The static plan of a call of the GPU kernels: the windows that they go through, the tiles that
they compute, and which calls they support.

Axes: B batch, N heads, H head width, T tokens (queries), S keys, Q queries of a block, W keys of a
block's windows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from lsg_flax.kernels.spec import Biases, Queries, Source, Spec, Window
from lsg_flax.kernels.triton import is_there

WIDTHS, DTYPES = (32, 64, 128), ("float32", "bfloat16", "float16")
LEAST_TILE, QUERIES = 16, 64  # tiles are powers of two
# Programs that keep a GPU busy: several for each of its cores.
PROGRAMS = 1024


class TiledWindow(NamedTuple):
    """A window, or the shared keys as a window with stride 0.

    Attributes:
        view: number of the part of the softmax that it belongs to in the XLA implementation: that
            of all windows, or of the shared keys. Dropout depends on indices in these parts.
        first: index of its first key in that part.
        keys: number of keys of that part, W.
    """

    window: Window
    view: int
    first: int
    keys: int


class Tiles(NamedTuple):
    """Numbers of queries and keys that a program computes at once, and its warps."""

    queries: int
    keys: int
    warps: int


@dataclass(frozen=True)
class TiledPlan:
    """The static plan of a call.

    Attributes:
        windows: windows of all sources; the shared keys are the last source.
        heads: number of heads of all devices.
        width: features per head.
        interpret: whether to run without a GPU, slowly.
    """

    spec: Spec
    windows: tuple[TiledWindow, ...]
    length: int
    heads: int
    width: int
    dtype: str
    row_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()
    interpret: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.length // self.spec.block)

    @property
    def tiles(self) -> Tiles:
        """The sizes of tiles. In half precision registers are not spilled, and the shared memory of
        any GPU is enough: at most 64 KiB, of the 99 KiB of a program on an L4."""
        exact, block = self.dtype == "float32", self.spec.block
        divisor = block & -block  # the largest power of two in it
        queries = divisor if divisor >= LEAST_TILE else _tile_of(block)
        keys = QUERIES // (1 + exact) // (1 + (self.width == WIDTHS[-1]))
        return Tiles(min(QUERIES, queries), keys, 8 if exact else 4)

    @property
    def tiles_of_block(self) -> int:
        return -(-self.spec.block // self.tiles.queries)

    @property
    def query_tiles(self) -> int:
        return self.blocks * self.tiles_of_block

    def keys_of(self, width: int) -> int:
        """Returns the number of keys in a tile, for a window of `width` keys."""
        return min(self.tiles.keys, _tile_of(width))

    def windows_of(self, source: int) -> list[TiledWindow]:
        """Returns the windows of one source."""
        return [seen for seen in self.windows if seen.window.source == source]


def _tile_of(count: int) -> int:
    """Returns the smallest power of two that is at least `count` and LEAST_TILE."""
    return max(LEAST_TILE, 1 << (count - 1).bit_length())


class TiledArrays(NamedTuple):
    """The arrays that the kernels read; inside a kernel, references to the parts of one row and
    head.

    Attributes:
        rows, heads: numbers of rows and heads among those of all devices.
        seeds: seeds of dropout for each step and part of the softmax; None without dropout.
        sources: sources with tokens first, [B, S, N, H]; masks are integers.
    """

    rows: Any  # [B]
    heads: Any  # [N]
    seeds: Any  # [steps, views, 2]
    query: Any  # [B, T, N, H]
    sources: tuple[Source, ...]


def tiled_windows(
    spec: Spec, sources: tuple[Source, ...], shared: Source | None
) -> tuple[TiledWindow, ...]:
    """Returns the windows that every block of queries sees."""
    total, first, found = sum(w.width for w in spec.windows), 0, []
    for window in spec.windows:
        found.append(TiledWindow(window, 0, first, total))
        first += window.width
    if shared is not None:
        keys = shared.mask.shape[-1]
        whole = Window(len(sources), 0, 0, keys, spec.shared_rule)
        found.append(TiledWindow(whole, int(bool(spec.windows)), 0, keys))
    return tuple(found)


def refusal(queries: Queries, sources: tuple[Source, ...], biases: Biases) -> str | None:
    """Returns why the kernels cannot compute a call (what is given, what is allowed, what to do);
    None if they can.

    Args:
        sources: all sources of keys, the shared keys too.
    """
    dtype, width = queries.features.dtype.name, queries.features.shape[2]
    other = "or use implementation='xla'"
    if not is_there():
        return f"this version of JAX lacks Pallas' Triton backend; use an older version, {other}."
    if dtype not in DTYPES:
        return f"dtype {dtype} is none of {', '.join(DTYPES)}; cast the inputs, {other}."
    if width not in WIDTHS:
        return f"head width {width} is none of {', '.join(map(str, WIDTHS))}; {other[3:]}."
    if jax.tree.leaves(biases):
        return f"the GPU kernels add no biases to scores; {other[3:]}."
    if any(source.positions is not None for source in sources):
        return f"the GPU kernels do not support positions of keys; {other[3:]}."
    return None
