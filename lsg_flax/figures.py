"""Figures of matplotlib, which is an optional package."""

import pathlib
from typing import Any


def new_figure(size: tuple[float, float], file: pathlib.Path) -> Any:
    """Returns an empty figure of (width, height) inches that is going to be saved as `file`.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{file} is not drawn: it needs matplotlib, pip install 'lsg-flax[plots]'."
        ) from error
    return Figure(figsize=size, layout="constrained")
