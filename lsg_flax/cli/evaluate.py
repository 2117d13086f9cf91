"""`lsg-flax evaluate`: scores a checkpoint on data files."""

import argparse
import pathlib
from collections.abc import Sequence

import jax
from rich.table import Table

from lsg_flax import hub
from lsg_flax.cli import shared, train
from lsg_flax.files import check_folder
from lsg_flax.models import TASKS
from lsg_flax.progress import count_of, say
from lsg_flax.training import EvaluationReport, Settings, evaluate_files, trained_tasks

_DESCRIPTION = """Score MODEL on DATA: loss, scores of the task and of each class, confusion matrix.

DATA is read as by `lsg-flax train`: .jsonl, .csv, .parquet or .txt files, a folder, a pattern, or a
hub dataset, with the same columns. FOLDER (--output) gets evaluation.json and confusion.png.

  lsg-flax evaluate ./areas held_out.csv --output ./scores --columns text=body,label=area

A sentence-transformers folder gets retrieval scores: in rows with "text" and "positive", how well
each text finds its own positive among those of all rows."""
# Settings of training that say how data is read and how the model is run.
_READING = (
    *("columns", "labels", "problem_type", "max_length", "max_target_length", "stride", "pack"),
    *("packing", "text_unit", "on_error", "subset", "eval_split", "cache", "src_lang", "tgt_lang"),
    *("pooling", "teacher", "teacher_length"),
)
_RUNNING = ("batch_size", "buckets", "target_buckets", "dtype", "mesh", "devices")
_WRITTEN = ("predict_with_generate", "generation", "generation_rows")
_MOST_CLASSES = 12  # a larger confusion matrix is not printed


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "evaluate", _DESCRIPTION, run, shared.DEVICES_SPELLED)
    command.add_argument("model", metavar="MODEL", help="folder, or id on the Hugging Face hub")
    command.add_argument(
        "data", metavar="DATA", nargs="+", help="held-out data, as for lsg-flax train"
    )
    about = "folder for evaluation.json and confusion.png"
    command.add_argument("--output", metavar="FOLDER", help=about)
    shared.add_task(command, "task to score (default: MODEL's)", trained_tasks())
    train.add_settings(command.add_argument_group("how DATA is read"), _READING)
    train.add_settings(command.add_argument_group("how it is computed"), _RUNNING)
    about = "tasks that generate text, such as summarization (default: ROUGE of all rows)"
    train.add_settings(command.add_argument_group(about), _WRITTEN)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    checkpoint = hub.open_checkpoint(arguments.model)
    if arguments.output is not None:
        check_folder("output", arguments.output)
    given = {name: getattr(arguments, name) for name in (*_READING, *_RUNNING, *_WRITTEN)}
    values = {name: value for name, value in given.items() if value is not None}
    task = arguments.task or ("embedding" if checkpoint.modules else checkpoint.task)
    if TASKS[task].examples == "text_to_text":
        values.setdefault("predict_with_generate", True)
    data = tuple(arguments.data)
    settings = Settings.for_data(model=arguments.model, task=task, data=data, **values)
    report = evaluate_files(settings)
    if jax.process_index() == 0:
        _show(report, arguments.output)


def _show(report: EvaluationReport, folder: str | None) -> None:
    if cut := report.cut.words(report.max_length):
        say(cut)
    out = shared.console()
    scores = [(name, f"{value:.4f}") for name, value in report.scores.items()]
    out.print(f"{report.model} on {count_of(report.rows, 'row')}:")
    out.print(_table(("score", "value"), scores))
    classes, names, confusion = report.by_class
    if classes:
        rows = [
            (found.name, *(f"{score:.4f}" for score in found[1:4]), f"{found.support:,}")
            for found in classes
        ]
        out.print(_table(("class", *classes[0]._fields[1:]), rows))
    if confusion is not None and len(names) <= _MOST_CLASSES:
        counts = [map("{:,}".format, row) for row in confusion.tolist()]
        rows = [(name, *row) for name, row in zip(names, counts, strict=True)]
        out.print(_table((r"true \ predicted", *names), rows))
    if folder is not None:
        written = report.save(pathlib.Path(folder))
        out.print(f"wrote {', '.join(map(str, written))}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table with names aligned left and numbers aligned right."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
