"""`lsg-flax predict`: writes an answer for each document of a file."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

import jax.numpy as jnp

from lsg_flax import hub
from lsg_flax.cli import shared
from lsg_flax.cli.shared import add_choice, add_number, add_switch, add_task
from lsg_flax.files import check_apart, check_output
from lsg_flax.models import TASKS, Model, ModelOutput
from lsg_flax.pipelines import (
    ANSWERS,
    DocumentFile,
    PipelineTask,
    check_fields,
    predict_file,
)
from lsg_flax.progress import count_of
from lsg_flax.sharding import AXES, make_mesh
from lsg_flax.training import Precision, check_names

_DESCRIPTION = """Write an answer for each document of a file.

INPUT is a .txt with one text per line, a folder of .txt files with one text each, a .jsonl, .csv or
.parquet (a file, a folder or a pattern), or a hub dataset (--split). Its columns are "text" (and
optionally "text_pair"), "question" and "context", or "input_ids", and optionally "id"; --columns
gives other names. OUTPUT gets one line of JSON per document: {"id", "answer"} with answers as in
transformers' pipelines, or the model's outputs (--outputs). It appears under its name once it is
complete. Run a stopped command again to resume it.

  lsg-flax predict ./areas documents.jsonl answers.jsonl --batch-size 32 --mesh data=8"""
SPELLED = {
    'unfinished="replace"': "--restart",
    "a text needs tokenizer=": "a text needs a tokenizer in MODEL",
    "fields=": "outputs=",
    **shared.READING_SPELLED,
}
_LINES = ("answer", *(field.name for field in fields(ModelOutput)))  # what they have beside "id"
_READING = ("truncation", "batch_size", "buckets")  # arguments of predict_file


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "predict", _DESCRIPTION, run, SPELLED)
    add_files(command)
    add_task(command, "head (default: that of MODEL)", TASKS)
    _add_what(command.add_argument_group("what is written"))
    add_how(command.add_argument_group("how it is computed"))


def add_files(command: argparse.ArgumentParser) -> None:
    """Declares MODEL, INPUT and OUTPUT."""
    command.add_argument("model", metavar="MODEL", help="folder, or id on the Hugging Face hub")
    command.add_argument(
        "input",
        metavar="INPUT",
        help=".jsonl, .csv, .parquet, .txt, a folder or pattern of them, or a hub dataset",
    )
    command.add_argument("output", metavar="OUTPUT", help="file for lines of JSON")


def add_reading(group: shared.Options) -> None:
    """Declares how long texts, broken lines and a partial OUTPUT are treated."""
    group.add_argument(
        "--truncation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="truncate texts that are too long and say how many, or fail (default: truncate)",
    )
    shared.add_on_error(group)
    add_switch(group, "--restart", "discard a partial OUTPUT and start over")


def _add_what(group: shared.Options) -> None:
    options = "; ".join(f"{task}: {', '.join(_options(task))}" for task in ANSWERS)
    group.add_argument(
        "--answers",
        type=shared.name_values,
        metavar="NAME=VALUE,...",
        help=f"options of answers, as in lsg_flax.pipeline: {options}",
    )
    group.add_argument(
        "--outputs",
        nargs="*",
        metavar="NAME",
        help="write these outputs of the model, such as logits, not answers; without NAME all",
    )
    shared.add_columns(group)
    shared.add_dataset(group)
    about = "maximum tokens of a text (default: the model's own limit)"
    add_number(group, "--max-length", about)
    add_reading(group)


def add_how(group: shared.Options) -> None:
    """Declares options for batches, devices and precision."""
    add_number(group, "--batch-size", "rows at once", 8)
    group.add_argument(
        "--buckets",
        type=int,
        nargs="+",
        metavar="N",
        help="lengths that rows are padded to (default: powers of two from 512)",
    )
    group.add_argument(
        "--mesh",
        type=shared.mesh_axes,
        metavar="AXIS=N,...",
        help=f"devices along the axes {', '.join(AXES)} (default: one device)",
    )
    add_choice(group, "--dtype", "dtype of the computation", get_args(Precision), "float32")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    shared.check_positive(arguments, "max_length")
    checkpoint = hub.open_checkpoint(arguments.model)
    task = arguments.task or checkpoint.task
    checkpoint.require_head(task)
    answers = _answers(task, arguments)
    if arguments.outputs:
        check_fields(Model(checkpoint.config_for(task), task), arguments.outputs)
    reading = {"max_length": arguments.max_length, "columns": arguments.columns or {}}
    reading["fields"] = arguments.outputs or None
    write_answers(arguments, checkpoint, task, answers, lines=_LINES, **reading)


def write_answers(
    arguments: argparse.Namespace,
    checkpoint: hub.Checkpoint,
    task: str,
    answers: PipelineTask | None,
    *,
    lines: Sequence[str],
    **reading: Any,
) -> None:
    """Writes OUTPUT from INPUT; `lines` are the names that its lines may have beside "id", and
    `reading` further arguments of `predict_file`."""
    # Everything is checked before the weights are read.
    shared.check_positive(arguments, "batch_size", "buckets")
    mesh = None if arguments.mesh is None else make_mesh(**arguments.mesh)
    named = {name: reading[name] for name in ("text_column", "columns") if name in reading}
    source = shared.source_of(arguments)
    DocumentFile(source, **named)
    check_output(arguments.output, arguments.input)
    check_apart(arguments.output, checkpoint.root)
    done = shared.check_result(arguments, *lines, some=True)
    tokenizer = checkpoint.tokenizer
    if answers is not None and task in answers.heads:
        answers.program(Model(checkpoint.config_for(task), task), tokenizer)
    dtype = jnp.dtype(arguments.dtype).type
    model, params = checkpoint.load(task, dtype=dtype, mesh=mesh)
    written = predict_file(
        source,
        arguments.output,
        model,
        params,
        tokenizer=tokenizer,
        answers=answers,
        mesh=mesh,
        broken_lines=arguments.on_error,
        **{name: getattr(arguments, name) for name in _READING},
        **reading,
        unfinished="replace" if arguments.restart else "continue",
    )
    before = written.documents - written.computed
    known = f", {before:,} done before" if before else ""
    documents = count_of(written.documents, "document")
    shared.console().print(f"{done} {arguments.output}: {documents}{known}")


def _answers(task: str, arguments: argparse.Namespace) -> PipelineTask | None:
    """Returns how to answer; None if the model's outputs are written."""
    if arguments.outputs is not None:
        if arguments.answers:
            raise ValueError("--answers and --outputs exclude each other; give one of them.")
        return None
    if task not in ANSWERS:
        raise ValueError(
            f"a model for {task} has no answers, only outputs: add --outputs for all of them, or "
            f"--outputs NAME. Tasks with answers (--task): {', '.join(ANSWERS)}."
        )
    given = arguments.answers or {}
    check_names("--answers", given, _options(task))
    values = {name: _value(text) for name, text in given.items()}
    if "ignore_labels" in values:  # a list, but one label can be given
        values["ignore_labels"] = (given["ignore_labels"],)
    try:
        return ANSWERS[task].with_options(**values)
    except ValueError as error:
        raise ValueError(f"--answers: {error}") from error


def _options(task: str) -> list[str]:
    return ANSWERS[task].option_names


def _value(text: str) -> object:
    """Returns the value of a JSON text such as 3, true or null; other words stay texts."""
    try:
        return json.loads(text)
    except ValueError:
        return text
