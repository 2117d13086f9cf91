"""`lsg-flax train`: fine-tunes a checkpoint on files; its options are the fields of `Settings`."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
from rich.table import Table

from lsg_flax.cli.shared import (
    DEVICES_SPELLED,
    NEEDED,
    add_command,
    add_pattern,
    add_switch,
    console,
    given_pattern,
    mesh_axes,
    name_values,
    say,
    yaml_values,
)
from lsg_flax.pipelines import ANSWERS, head_named
from lsg_flax.progress import count_of
from lsg_flax.training import (
    REQUIRED,
    DataSurvey,
    Finetuned,
    Group,
    Help,
    RunSurvey,
    Settings,
    finetune,
    read_settings,
    survey,
)

_DESCRIPTION = """Fine-tune a checkpoint on data files, or resume a stopped run.

Settings come from flags, a YAML file with the same names (learning_rate: 1e-4), or both; flags
override the file. OUTPUT gets the model and its tokenizer, OUTPUT/best the best model, OUTPUT/log
one line per step. Run the same command again to resume a run that was stopped (Ctrl-C, SIGTERM, a
crash).

  lsg-flax train --model ./bert-4096 --task sequence_classification --train-data train.jsonl \\
      --eval-data eval.jsonl --output ./areas --batch-size 32 --accumulate 4 --dtype bfloat16

Rows of data, by task (--columns gives other names):
  sequence_classification  {"text": ..., "label": ...}, optionally "text_pair"
  token_classification     {"tokens": [...], "tags": [...]}
  question_answering       {"question": ..., "context": ..., "answers": {"text": [...],
                           "answer_start": [...]}}
  multiple_choice          {"text": ..., "choices": [...], "label": 0}
  masked_lm, causal_lm     {"text": ...}, or a .txt file
  conditional_generation   {"text": ..., "target": ...}
  embedding                {"text": ..., "positive": ...}, optionally "negative"; with
                           --teacher {"text": ...}"""
_HINTS = typing.get_type_hints(Settings, include_extras=True)
_METAVARS = {int: "N", float: "X", str: "NAME"}
_PATHS = {"model": "PATH", "train_data": "PATH", "eval_data": "PATH", "teacher": "PATH"}
_PATHS |= {"output": "FOLDER", "cache": "FOLDER", "frozen": "REGEX", "push_to_hub": "REPO"}


def add(commands: Any) -> None:
    """Declares the command and its options."""
    command = add_command(commands, "train", _DESCRIPTION, run, DEVICES_SPELLED)
    fields = [f.name for f in dataclasses.fields(Settings) if f.name != "lsg"]
    needed = [name for name in fields if name in REQUIRED]
    add_settings(command, needed)
    command.add_argument("--config", metavar="FILE", help="YAML file with settings")
    add_switch(command, "--dry-run", "only show rows, lengths, labels and buckets; train nothing")
    for group in get_args(Group):
        options = command.add_argument_group(group)
        of_group = [name for name in fields if _about(name)[1].group == group]
        add_settings(options, [name for name in of_group if name not in needed])
        if group == "devices":
            options.add_argument(
                "--distributed",
                nargs="?",
                const="auto",
                metavar="HOST:PORT,COUNT,INDEX",
                help="this is one of several processes: address of the first process, number of "
                "processes, index of this one; detected if no value follows (TPU pods, Slurm)",
            )
    add_pattern(command)


def _about(name: str) -> tuple[Any, Help]:
    """Returns the type and the help of a setting."""
    hint, about = get_args(_HINTS[name])
    return hint, about


def add_settings(options: Any, names: Sequence[str], *, required: bool = False) -> None:
    """Declares a flag for each of these fields of `Settings`."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for name in names:
        _add_option(options, fields[name], *_about(name), needed=required)


def _add_option(
    options: Any, field: dataclasses.Field, hint: Any, about: Help, *, needed: bool
) -> None:
    """Declares the flag of a field; unset flags are None, so that values of a YAML file stay."""
    kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
    united = typing.get_origin(hint) in (types.UnionType, typing.Union)  # the latter of a Literal
    kind = kinds[-1] if united else hint
    origin, parts = typing.get_origin(kind) or kind, get_args(kind)
    unset = about.unset if field.default in (None, dataclasses.MISSING) else field.default
    required = field.default is field.default_factory is dataclasses.MISSING
    choices = parts if origin is Literal else about.choices and about.choices()
    text = about.about + (": " + ", ".join(choices) if choices else "")
    shape: dict[str, Any] = {"metavar": _PATHS.get(field.name, _METAVARS.get(origin, "NAME"))}
    if choices:
        shape |= {"choices": choices} | ({"nargs": "+"} if origin is tuple else {})
        shape |= {"type": head_named} if field.name == "task" else {}
    elif origin is bool:
        shape = {"action": argparse.BooleanOptionalAction}
        unset = "yes" if unset else "no"
    elif origin is tuple:
        shape |= {"nargs": "+", "type": parts[0]}
        shape["metavar"] = _PATHS.get(field.name, _METAVARS[parts[0]])
    elif origin is dict:
        sizes = parts[1] is int
        shape = {"type": {int: mesh_axes, str: name_values}.get(parts[1], yaml_values)}
        shape["metavar"] = "AXIS=N,..." if sizes else "NAME=VALUE,..."
    else:
        shape["type"] = origin
    needs = f"{NEEDED})" if needed else f"{NEEDED}, or in FILE)"
    shape["help"] = f"{text} {needs if required else f'(default: {unset})'}".replace("%", "%%")
    flag = "--" + field.name.replace("_", "-")
    options.add_argument(flag, default=None, **shape, **({"required": True} if needed else {}))


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    names = [f.name for f in dataclasses.fields(Settings) if f.name != "lsg"]
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if lsg := given_pattern(arguments):
        given["lsg"] = lsg
    settings = read_settings(arguments.config, given)
    if arguments.dry_run:
        show_survey(survey(settings))
        return
    if arguments.distributed:
        _join(arguments.distributed)
    first = jax.process_index() == 0

    def begins() -> None:
        if first:
            say(f"metrics are written to {settings.output}/log/metrics.jsonl")

    result = finetune(settings, begins=begins)
    if first:
        _show(result)


def _join(text: str) -> None:
    """Joins this process to the others; must run before anything asks JAX for devices."""
    options: dict[str, Any] = {}
    if text != "auto":
        try:
            address, count, index = text.split(",")
            options = {"coordinator_address": address, "num_processes": int(count)}
            options["process_id"] = int(index)
        except ValueError:
            raise ValueError(
                f"--distributed {text} is not HOST:PORT,COUNT,INDEX, as in 10.0.0.1:1234,2,0."
            ) from None
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {error} If the cluster is not detected, give HOST:PORT,COUNT,INDEX."
        ) from error


def show_survey(found: RunSurvey) -> None:
    """Prints the survey of a run's data."""
    out = console()
    for name, part in (("training", found.train), ("evaluation", found.held_out)):
        if part is not None:
            for line in _survey_lines(name, part):
                out.print(line)
    out.print(f"steps: {found.steps:,}, {found.epoch:,} per epoch")


def _survey_lines(name: str, part: DataSurvey) -> list[str]:
    skipped = f", {part.skipped:,} broken ones left out" if part.skipped else ""
    total = max(sum(part.labels.values()), 1)
    labels = [f"{label} {n:,} ({n / total:.0%})" for label, n in part.labels.items()]
    shown = labels[:20] + [f"and {len(labels) - 20:,} more"] * (len(labels) > 20)
    buckets = ", ".join(f"{length:,}: {n:,} rows" for length, n in part.buckets.items())
    rows = f"buckets: {buckets}"
    if part.packed:
        ((length, n),) = part.buckets.items()
        rows = f"packed: {n:,} rows of {length:,} tokens (--buckets sets another length)"
    return [
        f"{name}: {part.rows:,} rows{skipped}",
        f"  tokens: {_of_lengths(part.lengths)}",
        *(f"  tokens of the {of}: {_of_lengths(found)}" for of, found in part.others.items()),
        f"  truncated: {part.cut or 'nothing'}",
        *([f"  labels: {', '.join(shown)}"] if labels else []),
        f"  {rows}; {part.real:.0%} of their positions are not padding",
    ]


def _of_lengths(lengths: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in lengths.items())


def _show(result: Finetuned) -> None:
    out, writes = console(), result.model.task_record.generates
    embeds = result.model.task == "base"
    task = "embedding" if embeds else result.model.task
    out.print(f"wrote {result.output}: {task} after {count_of(result.step, 'step')}")
    if result.best is not None:
        best = count_of(result.best, "step")
        out.print(f"wrote {result.output / 'best'}: the best, after {best}")
    if result.scores:
        out.print("on the evaluation data, last step:")
        table = Table()
        table.add_column("score")
        table.add_column("value", justify="right")
        for name, value in result.scores.items():
            table.add_row(name.removeprefix("eval_"), f"{value:.4f}")
        out.print(table)
    log = result.output / "log"
    out.print(f"log: {', '.join(sorted(str(file) for file in log.iterdir()))}")
    out.print(f"checkpoints, to resume from: {result.output / 'checkpoints'}")
    writer = "summarize" if result.model.has_two_stacks else "generate"
    if result.pushed:
        out.print(f"pushed to {result.pushed}")
    reader = "embed" if embeds else writer if writes else "predict"
    unanswered = "" if embeds or writes or result.model.task in ANSWERS else " --outputs"
    command = f"{reader} {result.output} INPUT OUTPUT{unanswered}"
    out.print(f"next: lsg-flax {command}")
