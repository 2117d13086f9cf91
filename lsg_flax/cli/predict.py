"""`lsg-flax predict`: a file of documents in, a file of answers out."""

import argparse
import dataclasses
import json
import sys
from typing import Any, get_args

import jax.numpy as jnp

from lsg_flax import hub
from lsg_flax.cli.shared import add_command, console, mesh_axes, name_values
from lsg_flax.models import TASKS
from lsg_flax.pipelines import ANSWERS, BrokenLines, predict_file
from lsg_flax.sharding import AXES, make_mesh
from lsg_flax.training import Precision, check_names

_DESCRIPTION = """Write an answer for each document of a file.

INPUT is a .txt with one text per line, or a .jsonl of objects with "text" (and maybe "text_pair"),
"question" and "context", or "input_ids", and maybe "id". OUTPUT gets one line of JSON for each:
{"id", "answer"} as the pipelines of transformers answer, or the model's outputs (--outputs). It
gets its name when it is complete; a command that was stopped goes on when it is given again.

  lsg-flax predict ./areas documents.jsonl answers.jsonl --batch-size 32 --mesh data=8"""


def add(commands: Any) -> None:
    """Declares the command and its options."""
    command = add_command(commands, "predict", _DESCRIPTION, run)
    command.add_argument("model", metavar="MODEL", help="folder, or id on the Hugging Face hub")
    command.add_argument("input", metavar="INPUT", help=".jsonl or .txt")
    command.add_argument("output", metavar="OUTPUT", help="lines of JSON")
    command.add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"head (default: that of MODEL); one of {', '.join(TASKS)}",
    )
    _add_what(command.add_argument_group("what is written"))
    _add_how(command.add_argument_group("how it is computed"))


def _add_what(group: Any) -> None:
    group.add_argument(
        "--answers",
        type=name_values,
        metavar="NAME=VALUE,...",
        help="options of the answers, those of lsg_flax.pipeline: "
        + "; ".join(f"{task}: {', '.join(_options(task))}" for task in ANSWERS),
    )
    group.add_argument(
        "--outputs",
        nargs="*",
        metavar="NAME",
        help="write the model's outputs in place of answers, such as logits; all without a NAME",
    )
    group.add_argument("--max-length", type=int, metavar="N", help="tokens (default: the model's)")
    group.add_argument("--truncation", action="store_true", help="cut texts that are longer")
    group.add_argument(
        "--broken-lines",
        choices=get_args(BrokenLines),
        default="raise",
        metavar="NAME",
        help=f"what they do: {', '.join(get_args(BrokenLines))} (default: %(default)s)",
    )
    group.add_argument(
        "--restart", action="store_true", help="begin anew where a part of OUTPUT is there"
    )


def _add_how(group: Any) -> None:
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="rows at once (default: %(default)s)"
    )
    group.add_argument(
        "--buckets",
        type=int,
        nargs="+",
        metavar="N",
        help="lengths that rows are padded to (default: powers of two from 512)",
    )
    group.add_argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXIS=N,...",
        help=f"devices along {', '.join(AXES)} (default: one device)",
    )
    group.add_argument(
        "--dtype",
        choices=get_args(Precision),
        default="float32",
        metavar="NAME",
        help=f"of the computation: {', '.join(get_args(Precision))} (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    mesh = None if arguments.mesh is None else make_mesh(**arguments.mesh)
    folder = hub.resolve(arguments.model)
    dtype = jnp.dtype(arguments.dtype).type
    model, params = hub.from_pretrained(folder, arguments.task, dtype=dtype, mesh=mesh)
    written = predict_file(
        arguments.input,
        arguments.output,
        model,
        params,
        tokenizer=hub.read_tokenizer(folder),
        answers=_answers(model.task, arguments),
        fields=arguments.outputs or None,
        max_length=arguments.max_length,
        truncation=arguments.truncation,
        batch_size=arguments.batch_size,
        buckets=arguments.buckets,
        mesh=mesh,
        broken_lines=arguments.broken_lines,
        unfinished="replace" if arguments.restart else "continue",
        progress=sys.stderr.isatty(),
    )
    before = written.documents - written.computed
    known = f", {before:,} of them before" if before else ""
    console().print(f"wrote {arguments.output}: {written.documents:,} documents{known}")


def _answers(task: str, arguments: argparse.Namespace) -> Any:
    """The answers wanted; None where the outputs are."""
    if arguments.outputs is not None:
        if arguments.answers:
            raise ValueError("give either --answers or --outputs.")
        return None
    if task not in ANSWERS:
        raise ValueError(
            f"a model for {task} has no answers, only outputs: add --outputs NAME, such as "
            f"--outputs logits. Answers have {', '.join(ANSWERS)}."
        )
    given = arguments.answers or {}
    check_names("--answers", given, _options(task))
    values = {name: _value(text) for name, text in given.items()}
    if "ignore_labels" in values:  # one is a list of one
        values["ignore_labels"] = (given["ignore_labels"],)
    return dataclasses.replace(ANSWERS[task], **values)


def _options(task: str) -> list[str]:
    return [field.name for field in dataclasses.fields(ANSWERS[task])]


def _value(text: str) -> Any:
    """3, true and null as JSON says them; other words are texts."""
    try:
        return json.loads(text)
    except ValueError:
        return text
