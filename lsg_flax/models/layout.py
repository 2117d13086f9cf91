"""How PyTorch and lsg_flax store the parameters of a module: the layouts of the families' rows.

Axes: D model width, F features of a projection, I its groups. The leading axes of our stacked
layers do not appear here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Storage:
    """How one array is stored in PyTorch and here.

    Attributes:
        says: name of the layout in error messages.
        rank: number of axes of our array; None for any number.
        torch_shape: returns PyTorch's shape for our shape.
        to_torch: returns PyTorch's array for our array.
        read: returns a part of our array, from PyTorch's tensor, the index of the part, and our
            shape; it reads no more of the file than needed.
    """

    says: str
    rank: int | None
    torch_shape: Callable[[Shape], Shape]
    to_torch: Callable[[np.ndarray], np.ndarray]
    read: Callable[[Any, Index, Shape], np.ndarray]


class Leaf(NamedTuple):
    """One tensor of a row: the ends of its two names, and how it is stored."""

    torch: str
    ours: str
    storage: Storage


def _grouped_to_torch(kernel: np.ndarray) -> np.ndarray:
    groups, inputs, outputs = kernel.shape  # [I, D/I, F/I]
    return kernel.swapaxes(1, 2).reshape(groups * outputs, inputs, 1)


def _read_grouped(tensor: Any, index: Index, shape: Shape) -> np.ndarray:
    groups, inputs, outputs = shape
    numbers = range(groups)[index[0]]
    parts = [tensor[g * outputs : (g + 1) * outputs, index[1], 0][index[2]].T for g in numbers]
    return np.stack(parts) if parts else np.empty((0, inputs, outputs), np.float32)


AS_IT_IS = Storage("as it is", None, tuple, lambda ours: ours, lambda tensor, i, _: tensor[i])
TRANSPOSED = Storage(
    "transposed",
    2,
    lambda shape: shape[::-1],
    lambda ours: ours.T,
    lambda tensor, index, _: tensor[index[::-1]].T,
)
GROUPED = Storage(  # [F, D/I, 1], the weight of a convolution over one token
    "grouped",
    3,
    lambda shape: (shape[0] * shape[2], shape[1], 1),
    _grouped_to_torch,
    _read_grouped,
)

_AXIAL_ROWS = Storage(  # [P, 1, E], spread over the columns
    "axial",
    2,
    lambda shape: (shape[0], 1, shape[1]),
    lambda ours: ours[:, None],
    lambda tensor, index, _: tensor[index[0], 0, index[1]],
)
_AXIAL_COLUMNS = Storage(
    "axial",
    2,
    lambda shape: (1, *shape),
    lambda ours: ours[None],
    lambda tensor, index, _: tensor[0, index[0], index[1]],
)

Layout = tuple[Leaf, ...]
_BIAS = Leaf(".bias", "/bias", AS_IT_IS)
DENSE: Layout = (Leaf(".weight", "/kernel", TRANSPOSED), _BIAS)
DENSE_WITHOUT_BIAS: Layout = (Leaf(".weight", "/kernel", TRANSPOSED),)
GROUPS: Layout = (Leaf(".weight", "/kernels", GROUPED), _BIAS)
NORM: Layout = (Leaf(".weight", "/scale", AS_IT_IS), _BIAS)
TABLE: Layout = (Leaf(".weight", "/embedding", AS_IT_IS),)
TENSOR: Layout = (Leaf("", "", AS_IT_IS),)
BUFFER: Layout = (Leaf("", "/buffer", AS_IT_IS),)
FIXED_TABLE: Layout = (Leaf(".weight", "/buffer", AS_IT_IS),)
AXIAL_ROWS: Layout = (Leaf("", "/embedding", _AXIAL_ROWS),)
AXIAL_COLUMNS: Layout = (Leaf("", "/embedding", _AXIAL_COLUMNS),)


def leaf_of(name: str, rank: int) -> Leaf:
    """Returns how to store a parameter of a user's module: parameters of Flax's usual layers with
    PyTorch's names and layouts, others unchanged."""
    usual = {"kernel": (2, DENSE[0]), "scale": (1, NORM[0]), "embedding": (2, TABLE[0])}
    wanted, leaf = usual.get(name, (None, None))
    return leaf if leaf and rank == wanted else Leaf(f".{name}", f"/{name}", AS_IT_IS)
