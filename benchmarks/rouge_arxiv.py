"""Scores summaries of arXiv papers by a published LSG-BART beside the numbers on its model card.

    python benchmarks/rouge_arxiv.py --variant local-128 [--documents 200] [--output rouge_arxiv]
    python benchmarks/rouge_arxiv.py --model FOLDER --data arxiv_test.jsonl    # without a network

The model is ccdv/lsg-bart-base-4096-arxiv, the data the test split of ccdv/arxiv-summarization
(6,440 papers; pip install 'lsg-flax[data,summarization]'), or a .jsonl that has --text-column
and --summary-column. Summaries are kept in --output, where an interrupted run resumes. The beam
search has the card's settings (5 beams, 32 to 320 tokens, length penalty 2); all others are the
checkpoint's.

A published score agrees if it lies within the 95 % interval of the one measured here, by bootstrap
over the papers; the exit status is 1 if one does not. With 200 papers that is about 1 point to
either side.
"""

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import lsg_flax
from lsg_flax import hub
from lsg_flax.files import read_lines
from lsg_flax.models import Model, Params
from lsg_flax.pipelines import Summarization, predict_file
from lsg_flax.training import ROUGE, rouge_scores

MODEL, DATA = "ccdv/lsg-bart-base-4096-arxiv", "ccdv/arxiv-summarization"
BEAM_SEARCH = {"num_beams": 5, "max_length": 320, "min_length": 32, "length_penalty": 2.0}
RESAMPLES = 1000


class Published(NamedTuple):
    """A row of the cards of lsg-bart-base-4096-arxiv and -16384-arxiv: how the checkpoint is run
    without training it anew, and ROUGE-1, -2, -L and -Lsum in points."""

    tokens: int
    attention: Mapping[str, Any]
    scores: tuple[float, float, float, float]


def _sparse(kind: str) -> dict[str, Any]:
    blocks = {"block_size": 128, "sparse_block_size": 128 if kind != "none" else 0}
    return blocks | {"sparsity_factor": 4 if kind != "none" else 0, "sparsity_type": kind}


PUBLISHED = {
    "local-256": Published(
        4096, _sparse("none") | {"block_size": 256}, (46.65, 18.91, 26.90, 42.18)
    ),
    "local-128": Published(4096, _sparse("none"), (46.18, 18.57, 26.71, 41.69)),
    "pooling": Published(4096, _sparse("pooling"), (46.27, 18.68, 26.87, 41.82)),
    "stride": Published(4096, _sparse("stride"), (46.34, 18.64, 26.69, 41.87)),
    "block_stride": Published(4096, _sparse("block_stride"), (46.23, 18.62, 26.62, 41.80)),
    "norm": Published(4096, _sparse("norm"), (45.96, 18.46, 26.52, 41.51)),
    "lsh": Published(4096, _sparse("lsh"), (46.19, 18.72, 26.89, 41.76)),
    "16384": Published(16384, _sparse("none") | {"block_size": 256}, (47.03, 20.19, 28.26, 42.69)),
}


def rows_of(options: argparse.Namespace) -> Iterator[Mapping[str, str]]:
    """The papers as they are given.

    Raises:
        SystemExit: if they are to come from the hub and do not.
    """
    if options.data is not None:
        for line in read_lines(options.data, blank=False):
            try:
                yield line.json_object()
            except ValueError as error:
                raise SystemExit(f"{line.place}: {error}") from error
        return
    try:
        from datasets import load_dataset

        yield from load_dataset(DATA, split="test")
    except Exception as error:  # each version of datasets has other errors for what it cannot get
        reason = str(error).splitlines()[0]
        raise SystemExit(
            f"{DATA} could not be loaded ({type(error).__name__}: {reason}). It needs a network to "
            "the hub and pip install 'lsg-flax[data]'; without them give --data FILE.jsonl."
        ) from error


def write_papers(target: pathlib.Path, options: argparse.Namespace) -> list[str]:
    """Writes what is to be summarised; returns the references."""
    columns = options.text_column, options.summary_column
    lines, references = [], []
    for place, row in enumerate(itertools.islice(rows_of(options), options.documents)):
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in columns):
            raise SystemExit(
                f"paper {place} (from 0) has no text as {columns[0]!r} and {columns[1]!r}, but "
                f"{sorted(row)}; take it out, or name --text-column and --summary-column."
            )
        lines.append(json.dumps({"id": place, "text": row[columns[0]]}) + "\n")
        references.append(row[columns[1]])
    target.write_text("".join(lines))
    return references


def load_model(name: str, published: Published) -> tuple[Model, Params]:
    """The checkpoint, run as the row of the table says."""
    try:
        config = hub.open_checkpoint(name).config_for("conditional_generation")
        if config.max_position_embeddings >= published.tokens:
            return lsg_flax.from_pretrained(name, **published.attention)
        return lsg_flax.convert_checkpoint(
            name, max_sequence_length=published.tokens, **published.attention
        )
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{reason}\nWithout a network to the hub give --model FOLDER.") from error


def scores_of(summaries: pathlib.Path, references: list[str]) -> np.ndarray:
    """ROUGE of each paper in points, [papers, 4]."""
    written = [line.json_object()["summary"] for line in read_lines(summaries)]
    each = [rouge_scores([w], [r]) for w, r in zip(written, references, strict=True)]
    return 100 * np.array([[scores[name] for name in ROUGE] for scores in each])


def interval(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between what the mean of as many papers lies in 95 of 100 draws of them, each [4]."""
    draws = np.random.default_rng(0).integers(len(scores), size=(RESAMPLES, len(scores)))
    means = np.stack([scores[draw].mean(axis=0) for draw in draws])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def compare(variant: str, scores: np.ndarray) -> bool:
    """Prints measured and published scores; whether all of them agree."""
    low, high = interval(scores)
    table = Table(title=f"{variant}, {len(scores):,} papers")
    for column in ("", "measured", "95 % interval", "published", ""):
        table.add_column(column)
    rows = zip(ROUGE, scores.mean(axis=0), low, high, PUBLISHED[variant].scores, strict=True)
    agreed = []
    for name, mean, least, most, published in rows:
        agreed.append(bool(least <= published <= most))
        verdict = "agrees" if agreed[-1] else "differs"
        between = f"{least:.2f} to {most:.2f}"
        table.add_row(name, f"{mean:.2f}", between, f"{published:.2f}", verdict)
    Console(highlight=False, width=100).print(table)
    return all(agreed)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What is given, and defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=PUBLISHED, default="local-128")
    parser.add_argument("--model", default=MODEL, help="folder or hub id")
    parser.add_argument("--data", type=pathlib.Path, help=f"a .jsonl; {DATA} by default")
    parser.add_argument("--text-column", default="article")
    parser.add_argument("--summary-column", default="abstract")
    parser.add_argument("--documents", type=int, help="only the first ones; all by default")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("rouge_arxiv"))
    for name, value in BEAM_SEARCH.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data {options.data} is no file; give a .jsonl with a paper per line")
    return options


def main(arguments: list[str] | None = None) -> bool:
    """Summarises, scores, compares."""
    options = parse(arguments)
    published = PUBLISHED[options.variant]
    model, params = load_model(options.model, published)
    options.output.mkdir(parents=True, exist_ok=True)
    papers, summaries = (options.output / f"{n}.jsonl" for n in ("papers", options.variant))
    references = write_papers(papers, options)
    search = {name: getattr(options, name) for name in BEAM_SEARCH}
    predict_file(
        papers,
        summaries,
        model,
        params,
        tokenizer=hub.open_checkpoint(options.model).tokenizer,
        answers=Summarization().with_options(**search),
        max_length=published.tokens,
        truncation=True,
        batch_size=options.batch_size,
        window=8 * options.batch_size,
    )
    return compare(options.variant, scores_of(summaries, references))


if __name__ == "__main__":
    sys.exit(not main())
