"""`lsg-flax embed`: writes the embeddings of texts."""

import argparse
import pathlib
from typing import get_args

from lsg_flax.cli import shared
from lsg_flax.cli.shared import add_choice, add_number
from lsg_flax.files import check_apart, check_output
from lsg_flax.locks import locked_file
from lsg_flax.models import Pooling
from lsg_flax.pipelines import (
    TEXTS,
    VECTORS,
    Embedder,
    TextLines,
    check_suffix,
    read_texts,
    warn_of_none,
    write_vectors,
)
from lsg_flax.progress import count_of

_DESCRIPTION = """Write the embedding (a vector) of each text of INPUT.

INPUT is a .txt with one text per line, a folder of .txt files with one text each, a .jsonl, .csv or
.parquet (a file, a folder or a pattern), or a hub dataset (--split). Its columns are "text" and
optionally "id"; --columns gives other names.
OUTPUT is a .npy array [texts, width], or a .jsonl of objects with "id" and "embedding"; it appears
under its name once it is complete. MODEL is a sentence-transformers folder, converted or not; with
--pooling any base checkpoint."""


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "embed", _DESCRIPTION, run, shared.READING_SPELLED)
    command.add_argument("model", metavar="MODEL", help="folder, or id on the Hugging Face hub")
    command.add_argument("input", metavar="INPUT", help=" or ".join((*TEXTS, "a dataset")))
    command.add_argument("output", metavar="OUTPUT", help=" or ".join(VECTORS))
    add_choice(command, "--pooling", "pooling, instead of MODEL's own", get_args(Pooling))
    command.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale vectors to length 1, or not (default: as in MODEL)",
    )
    shared.add_columns(command)
    shared.add_dataset(command)
    about = "maximum tokens of a text; longer texts are truncated (default: as in MODEL)"
    add_number(command, "--max-length", about)
    add_number(command, "--batch-size", "texts at once", 8)
    shared.add_on_error(command)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    shared.check_positive(arguments, "batch_size", "max_length")
    check_suffix(arguments.output, VECTORS)  # fails before the long work
    check_output(arguments.output, arguments.input)
    check_apart(arguments.output, arguments.model)
    done = shared.check_result(arguments, "embedding")
    columns = arguments.columns or {}
    source = shared.source_of(arguments)
    lines = read_texts(source, broken_lines=arguments.on_error, columns=columns)
    with locked_file(pathlib.Path(arguments.output)):
        _embed(lines, arguments, done)


def _embed(lines: TextLines, arguments: argparse.Namespace, done: str) -> None:
    embedder = Embedder.from_pretrained(
        arguments.model,
        pooling=arguments.pooling,
        normalize=arguments.normalize,
        max_length=arguments.max_length,
    )
    rows = min(arguments.batch_size, max(len(lines.texts), 1))  # padding rows cost memory
    vectors = embedder.embed(lines.texts, batch_size=rows)
    write_vectors(arguments.output, lines.names, vectors)
    warn_of_none(len(vectors), arguments.input)
    shared.console().print(
        f"{done} {arguments.output}: {count_of(len(vectors), 'embedding')} of "
        f"width {vectors.shape[1]} (texts longer than {embedder.max_length:,} tokens are "
        "truncated)",
    )
