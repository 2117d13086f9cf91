"""The demo's picture: how well each reader found sentences, and what one found in some papers."""

import pathlib
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from demo_task import LABELS
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from demo import Found

COLOURS = ("#e8e8e8", "#d95f02", "#3182bd", "#2ca25f")  # of LABELS
PAPERS = 6


def draw(found: "dict[str, Found]", chance: float, file: pathlib.Path) -> None:
    """Writes the picture to `file`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    bars(left, found, chance)
    strips(right, list(found.values())[-1])
    right.set_title(f"{list(found)[-1]}: sentences of {PAPERS} held-out papers")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def bars(axes: plt.Axes, found: "dict[str, Found]", chance: float) -> None:
    """Macro F1 before and after fine-tuning, by reader."""
    places = np.arange(len(found))
    before = [of.head_only["macro_f1"] for of in found.values()]
    after = [of.fine_tuned["macro_f1"] for of in found.values()]
    for offset, label, values, colour in (
        (-0.2, "head only", before, "#9ecae1"),
        (0.2, "fine-tuned", after, "#3182bd"),
    ):
        drawn = axes.bar(places + offset, values, 0.38, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.2f")
    axes.axhline(chance, color="gray", linestyle="--", linewidth=1)
    axes.text(-0.45, chance + 0.01, "guessing", color="#404040")
    top = 1.25 * max(before + after)
    axes.set(xticks=places, xticklabels=list(found), ylim=(0, top), ylabel="macro F1")
    axes.set_title("Sentences of challenge, approach and outcome found")
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def strips(axes: plt.Axes, of: "Found") -> None:
    """Two rows per paper, a square per sentence: what people marked, and what was found."""
    rows, names = [], []
    for number, (part, logits) in enumerate(zip(of.parts, of.logits, strict=True)):
        if number == PAPERS:
            break
        told = part.labels >= 0
        rows += [part.labels[told], logits.argmax(axis=-1)[told], []]
        names += [f"paper {number + 1}, people", "found", ""]
    picture = np.full((len(rows) - 1, max(len(row) for row in rows)), np.nan)
    for place, row in enumerate(rows[:-1]):
        picture[place, : len(row)] = row
    colours = ListedColormap(COLOURS)
    axes.imshow(picture, cmap=colours, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
    shown = [place for place, name in enumerate(names[:-1]) if name]
    axes.set(yticks=shown, yticklabels=[names[place] for place in shown], xlabel="sentence")
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    handles = [Patch(color=c, label=n) for c, n in zip(COLOURS, LABELS, strict=True)]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False
    )
