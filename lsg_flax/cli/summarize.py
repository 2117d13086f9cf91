"""`lsg-flax summarize`: a file or folder of documents in, a file of summaries out."""

import argparse

from lsg_flax import hub
from lsg_flax.cli import predict, shared
from lsg_flax.cli.shared import add_number
from lsg_flax.pipelines import Summarization

_DESCRIPTION = """Write a summary of each document.

INPUT is a .jsonl, .csv or .parquet (a file, a folder or a pattern) or the name of a dataset
(--split) with "text" (--text-column) and maybe "id", a folder of .txt files, a document each, or a
.txt with a document per line. OUTPUT gets one line of JSON for each, {"id", "summary"}, and its
name when it is complete; a command that was stopped goes on when it is given again. What is not
given of --num-beams to --no-repeat-ngram-size is as the checkpoint says.

  lsg-flax summarize ./lsg-bart-arxiv papers/ summaries.jsonl --num-beams 4"""
_WINDOW = 4  # batches that are sorted and written together, and lost by a kill at most
_WRITTEN = ("num_beams", "max_length", "min_length", "length_penalty", "no_repeat_ngram_size")


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "summarize", _DESCRIPTION, run, predict.SPELLED)
    predict.add_files(command)
    what = command.add_argument_group("what is written")
    add_number(what, "--num-beams", "summaries that are searched at once")
    add_number(what, "--max-length", "tokens of a summary at most (without a checkpoint's: 20)")
    add_number(what, "--min-length", "tokens of a summary at least")
    about = "over 0 for longer summaries; with beams"
    what.add_argument("--length-penalty", type=float, metavar="X", help=about)
    add_number(what, "--no-repeat-ngram-size", "so many tokens do not come twice in a row")
    about = 'entry or column that is the document (default: "text")'
    what.add_argument("--text-column", metavar="NAME", help=about)
    shared.add_dataset(what)
    predict.add_reading(what)
    predict.add_how(command.add_argument_group("how it is computed"))


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    checkpoint = hub.open_checkpoint(arguments.model)
    task = checkpoint.task
    if task not in Summarization.heads:
        raise ValueError(
            f"{checkpoint.folder} is a {task} checkpoint, which writes no summaries: give a "
            f"{' or '.join(Summarization.heads)}, such as BART, mBART and Pegasus have."
        )
    given = {name: getattr(arguments, name) for name in _WRITTEN}
    options = {name: value for name, value in given.items() if value is not None}
    predict.write_answers(
        arguments,
        checkpoint,
        task,
        Summarization().with_options(**options),
        text_column=arguments.text_column,
        window=_WINDOW * max(arguments.batch_size, 1),
    )
