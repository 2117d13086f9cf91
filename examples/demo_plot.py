"""The demo's picture: what each reader found, and who sees whom in LSG attention."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from attention_patterns import COLOURS, legend, seen

from lsg_flax import LSGConfig


def draw(results: dict[str, dict[str, Any]], chance: float, file: pathlib.Path) -> None:
    """Writes the picture to `file`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    names = list(results)
    places = np.arange(len(names))
    for offset, stage, colour in ((-0.2, "head only", "#9ecae1"), (0.2, "fine-tuned", "#3182bd")):
        values = [results[name][stage]["found"] for name in names]
        bars = left.bar(places + offset, values, 0.38, color=colour, label=stage)
        left.bar_label(bars, fmt="%.2f")
    left.axhline(chance, color="gray", linestyle="--", linewidth=1)
    left.text(-0.45, chance + 0.01, "guessing", color="gray")
    left.set(xticks=places, xticklabels=names, ylim=(0, 1), ylabel="share of areas found")
    left.set_title("Areas found in held-out bundles of source files")
    left.legend(frameon=False, loc="upper left")
    left.spines[["top", "right"]].set_visible(False)
    config = LSGConfig(block_size=8, sparse_block_size=8, sparsity_factor=2, num_global_tokens=3)
    kinds = seen(config, 96)
    right.imshow(kinds, cmap=COLOURS, vmin=0, vmax=3, interpolation="nearest")
    right.set(xlabel="key", ylabel="query", title="Who sees whom (blocks of 8, 3 globals)")
    right.legend(handles=legend(), loc="upper right", framealpha=1)
    figure.savefig(file, dpi=130)
    plt.close(figure)
