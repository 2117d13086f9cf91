"""`lsg-flax summarize`: writes a summary of each document of a file or folder."""

import argparse

from lsg_flax import hub
from lsg_flax.cli import predict, shared
from lsg_flax.cli.shared import add_number
from lsg_flax.pipelines import Summarization

_DESCRIPTION = """Write a summary of each document.

INPUT is a .jsonl, .csv or .parquet (a file, a folder or a pattern) or a hub dataset (--split) with
"text" and optionally "id" (--columns gives other names), a folder of .txt files with one document
each, or a .txt with one document per line. OUTPUT gets one line of JSON per document,
{"id", "summary"}, and appears under its name once it is complete. Run a stopped command again to
resume it. Defaults of --num-beams to --no-repeat-ngram-size come from the checkpoint.

  lsg-flax summarize ./lsg-bart-arxiv papers/ summaries.jsonl --num-beams 4"""
_WINDOW = 4  # batches that are sorted and written together
_WRITTEN = ("num_beams", "max_length", "min_length", "length_penalty", "no_repeat_ngram_size")


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "summarize", _DESCRIPTION, run, predict.SPELLED)
    predict.add_files(command)
    what = command.add_argument_group("what is written")
    add_number(what, "--num-beams", "beams of the search")
    about = "maximum tokens of a summary (20 if the checkpoint does not say)"
    add_number(what, "--max-length", about)
    add_number(what, "--min-length", "fewest tokens of a summary")
    about = "above 0 for longer summaries; with beams"
    what.add_argument("--length-penalty", type=float, metavar="X", help=about)
    add_number(what, "--no-repeat-ngram-size", "no sequence of N tokens occurs twice")
    shared.add_columns(what, ("id", "text"))
    shared.add_deprecated(what, "--text-column", "--columns text={}")
    shared.add_dataset(what)
    predict.add_reading(what)
    predict.add_how(command.add_argument_group("how it is computed"))


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    checkpoint = hub.open_checkpoint(arguments.model)
    task = checkpoint.task
    if task not in Summarization.heads:
        raise ValueError(
            f"{checkpoint.folder} is a {task} checkpoint, which cannot write summaries: give a "
            f"checkpoint for {' or '.join(Summarization.heads)}, such as BART, mBART or Pegasus."
        )
    given = {name: getattr(arguments, name) for name in _WRITTEN}
    options = {name: value for name, value in given.items() if value is not None}
    columns = dict(arguments.columns or {})
    text = columns.pop("text", arguments.text_column)  # then no other column is read as one
    predict.write_answers(
        arguments,
        checkpoint,
        task,
        Summarization().with_options(**options),
        lines=("summary",),
        text_column=text,
        columns=columns,
        window=_WINDOW * max(arguments.batch_size, 1),
    )
