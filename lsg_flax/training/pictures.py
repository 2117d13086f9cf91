"""Pictures of runs and scores, drawn by matplotlib; without it a warning says what is missing.

Axes: O rows, Y labels.
"""

import pathlib
import warnings
from typing import Any

import numpy as np
from jaxtyping import Int

from lsg_flax.figures import new_figure
from lsg_flax.files import Json
from lsg_flax.training.log import SCORED, read_log

RUN = "run.png"
_MOST_NAMES = 40  # labels; a larger matrix is drawn without names
_PLAIN = {"step", "seconds", "loss", "learning_rate", f"{SCORED}loss"}


def _figure(size: tuple[float, float], file: pathlib.Path) -> Any:
    """Returns an empty figure; None, and a warning, without matplotlib."""
    try:
        return new_figure(size, file)
    except ImportError as error:
        warnings.warn(str(error), stacklevel=3)
        return None


def run_figure(
    log: pathlib.Path, lengths: dict[str, Int[np.ndarray, "O"]], buckets: tuple[int, ...]
) -> Any:
    """Returns the figure of a run: the loss, the scores, the learning rate and the lengths.

    Args:
        log: folder with metrics.jsonl.
        lengths: numbers of tokens of the training rows by stream, the inputs first.
        buckets: the lengths that inputs are padded to.

    Returns:
        A figure of matplotlib; None, and a warning, without matplotlib.
    """
    records = read_log(log)
    figure = _figure((10.0, 7.0), log / RUN)
    if figure is None:
        return None
    (loss, score), (rate, length) = figure.subplots(2, 2)
    _curve(loss, records, "loss", label="training")
    _curve(loss, records, f"{SCORED}loss", label="evaluation", marker="o")
    names = sorted({name for record in records for name in record} - _PLAIN)
    names = [name for name in names if name.startswith(SCORED)]
    for name in names:
        _curve(score, records, name, label=name.removeprefix(SCORED), marker="o")
    _curve(rate, records, "learning_rate")
    longest = max(int(of.max()) for of in lengths.values())
    colors = ["C0", "C2", "C3"][: len(lengths)]
    length.hist(
        [*lengths.values()], min(40, max(longest, 1)), stacked=True, color=colors, label=[*lengths]
    )
    for bucket in buckets:
        length.axvline(bucket, color="C1", linewidth=1)
    several = len(lengths) > 1
    tokens = "tokens of a text; buckets of inputs" if several else "tokens of a row; buckets"
    titles = ("loss", "scores on held-out data", "learning rate", tokens)
    for axes, title in zip((loss, score, rate, length), titles, strict=True):
        axes.set_title(title)
        if axes is not length:
            axes.set_xlabel("step")
    for axes, labelled in ((loss, True), (score, names), (length, several)):
        if labelled:
            axes.legend()
    return figure


def draw_run(
    log: pathlib.Path, lengths: dict[str, Int[np.ndarray, "O"]], buckets: tuple[int, ...]
) -> pathlib.Path | None:
    """Draws a run as `run_figure` to run.png in the folder of its log.

    Returns:
        The file of the picture; None, and a warning, without matplotlib.
    """
    figure = run_figure(log, lengths, buckets)
    if figure is None:
        return None
    figure.savefig(log / RUN, dpi=100)
    return log / RUN


def _curve(axes: Any, records: list[Json], name: str, **style: Any) -> None:
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def draw_confusion(
    file: pathlib.Path, names: tuple[str, ...], confusion: Int[np.ndarray, "Y Y"]
) -> bool:
    """Draws a confusion matrix (rows: labels, columns: predictions), shaded by the share of the
    row; returns False without matplotlib."""
    side = 2.5 + 0.45 * min(len(names), _MOST_NAMES)
    figure = _figure((side + 1, side), file)
    if figure is None:
        return False
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.savefig(file, dpi=100)
    return True
