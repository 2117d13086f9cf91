"""A real task on papers: MiniLM on 512 tokens against its LSG conversion, with spread.

    python benchmarks/paper_sentences.py [--seeds 3] [--epochs 2] [--split test]

Which sentences of a paper tell its challenge, approach and outcome (examples/demo_task.py)? Three
readers learn it from the 100 training papers: the first 512 tokens of a paper, all parts of 512
tokens, and LSG on all at once, for as many epochs and about as many steps. The learning rate is
the better of two on the 50 validation papers, for LSG as for parts. Prints F1 on the 100 test
papers: means over seeds, which decide the order of training, and standard deviations. Takes 20
minutes on 2 CPU cores.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
import warnings

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import demo
from at_hand import minilm
from demo_task import CLASSES, read_papers

import lsg_flax

console = Console(highlight=False, width=100)  # the whole table, in a file too


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if values[1:] else "")


def report(found: dict[str, list[demo.Found]], chance: float) -> None:
    """The one table."""
    table = Table(title="F1 on held-out papers")
    for column in ("reader", "head only", "macro F1", *CLASSES):
        table.add_column(column, justify="left" if column == "reader" else "right", no_wrap=True)
    for name, runs in found.items():
        cells = [f"{runs[0].head_only['macro_f1']:.3f}"]
        cells += [spread([r.fine_tuned[key] for r in runs]) for key in ("macro_f1", *CLASSES)]
        table.add_row(name, *cells)
    table.add_row("guessing", "", f"{chance:.3f}", "", "", "")
    console.print(table)


def main(arguments: list[str] | None = None) -> dict[str, list[demo.Found]]:
    """Trains and scores each reader with each seed; returns what they found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--papers", type=int, default=100, help="of training, at most 100")
    parser.add_argument("--held-out", type=int, default=100, help="papers to be asked about")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--json", type=pathlib.Path, help="file for the scores of each run")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    papers = read_papers("train", options.papers), read_papers(options.split, options.held_out)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)  # seeds compile the same programs
        long = pathlib.Path(folder) / "minilm-lsg-4096"
        lsg_flax.convert_checkpoint(minilm(), long, task="base", num_global_tokens=7)
        for name, reader in demo.readers(minilm(), long).items():
            console.rule(f"{name}, seeds 0 to {options.seeds - 1}")
            seeds = range(options.seeds)
            found[name] = demo.compare(reader, papers, epochs=options.epochs, seeds=seeds)
    report(found, demo.guessing(papers[1]))
    console.print(f"{(time.perf_counter() - start) / 60:.0f} minutes in all")
    if options.json:
        runs = {name: [r.fine_tuned for r in of] for name, of in found.items()}
        options.json.write_text(json.dumps(runs, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
