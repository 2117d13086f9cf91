"""Draws which keys each query sees, for every selection: docs/patterns.png.

    python examples/attention_patterns.py [--output docs/patterns.png] [--tokens 96]

Values are the rows of the identity matrix, so the context of a query is its attention weights. A
representative that is a mean shares its weight among the tokens of its group. Global tokens come
first. It takes seconds and needs `pip install 'lsg-flax[plots]'`.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from lsg_flax import LSGConfig, lsg_attention

SELECTIONS = ("norm", "pooling", "lsh", "bos_pooling", "stride", "block_stride", "none")
KINDS = {"not seen": "#eef0f6", "sparse": "#f2a541", "local": "#3f51b5", "global": "#c2185b"}
COLOURS = ListedColormap(list(KINDS.values()))


def seen(config: LSGConfig, tokens: int) -> np.ndarray:
    """[G + tokens, G + tokens]: how a query (row) sees a key (column), by its number in KINDS."""
    globals_, block = config.num_global_tokens, config.block_size
    length = globals_ + tokens
    query, key = jax.random.normal(jax.random.key(0), (2, 1, length, 1, length))
    value = jnp.eye(length)[None, :, None]
    weights = lsg_attention(0.01 * query, key, value, config=config)[0, :, 0]
    block_of = np.concatenate([np.full(globals_, -9), np.arange(tokens) // block])
    near = np.abs(block_of[:, None] - block_of) <= 1
    kinds = np.where(near, 2, 1)
    kinds[:globals_] = kinds[:, :globals_] = 3
    return np.where(np.asarray(weights) > 1e-6, kinds, 0)


def legend() -> list[Patch]:
    """What the colours mean."""
    return [Patch(facecolor=colour, label=kind) for kind, colour in list(KINDS.items())[1:]]


def draw(path: pathlib.Path, tokens: int) -> None:
    """One square per selection; rows are queries, columns are keys."""
    sizes = {"block_size": 8, "sparse_block_size": 8, "sparsity_factor": 4, "num_global_tokens": 2}
    figure, axes = plt.subplots(2, 4, figsize=(11, 6.2), layout="constrained")
    *squares, last = axes.flat
    for axis, name in zip(squares, SELECTIONS, strict=True):
        kinds = seen(LSGConfig(sparsity_type=name, **sizes), tokens)
        axis.imshow(kinds, cmap=COLOURS, vmin=0, vmax=3, interpolation="nearest")
        axis.set_title(f'"{name}" reaches {(kinds > 0).mean():.0%} of the pairs', fontsize=9)
        axis.set(xticks=[], yticks=[])
    last.axis("off")
    last.legend(handles=legend(), loc="center", frameon=False, fontsize=12)
    figure.suptitle(f"Keys (columns) that queries (rows) see: {tokens} tokens, 2 globals")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/patterns.png"))
    parser.add_argument("--tokens", type=int, default=96, help="a multiple of 8")
    options = parser.parse_args(arguments)
    draw(options.output, options.tokens)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
