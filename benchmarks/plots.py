"""Draws one picture of several panels, in which each rival has its colour."""

import pathlib
from typing import NamedTuple

Curves = dict[str, list[tuple[float, float]]]  # by the rivals' names


class Panel(NamedTuple):
    """Curves over numbers of tokens, or, if they are not logarithmic, over something else."""

    title: str
    ylabel: str
    curves: Curves
    xlabel: str = "tokens"
    logarithmic: bool = True


def save_picture(file: pathlib.Path, title: str, panels: list[Panel], labels: dict[str, str]):
    """Draws the panels side by side; a rival's label is that of its curve in the legend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    size = (5 * len(panels), 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, constrained_layout=True)
    palette = ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red")
    colours = dict(zip(labels, palette[: len(labels)], strict=True))
    for axis, panel in zip(axes, panels, strict=True):
        for rival, points in panel.curves.items():
            if points:
                style = {"color": colours[rival], "label": labels[rival]}
                axis.plot(*zip(*points, strict=True), "o-", markersize=4, **style)
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.logarithmic:
            axis.set(xscale="log", yscale="log")
            lengths = sorted({x for points in panel.curves.values() for x, _ in points})
            axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,g}")
        axis.grid(alpha=0.3)
    next((axis for axis in axes if axis.lines), axes[0]).legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    print(f"plot: {file}")
