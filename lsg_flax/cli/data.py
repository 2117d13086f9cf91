"""`lsg-flax data`: shows the data of a run before any training."""

import argparse

from lsg_flax.cli import shared, train
from lsg_flax.training import read_settings, survey

_DESCRIPTION = """Show rows, lengths, truncation, labels and buckets of data, before any training.

Rows are read and tokenized as in `lsg-flax train`, which then finds them in the cache. No weights
are read and nothing is trained. `lsg-flax train --dry-run` does the same with a run's settings.

  lsg-flax data --model ./areas --task sequence_classification --train-data held_out.csv \\
      --columns text=body,label=area --max-length 8"""
_NEEDED = ("model", "task", "train_data")
_READING = (
    *("eval_data", "columns", "labels", "problem_type", "max_length", "max_target_length"),
    *("buckets", "target_buckets", "stride", "pack", "packing", "text_unit", "on_error", "subset"),
    *("train_split", "eval_split", "cache", "convert", "batch_size", "accumulate", "epochs"),
    *("pooling", "teacher", "teacher_length"),
)


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "data", _DESCRIPTION, run, shared.DEVICES_SPELLED)
    train.add_settings(command, _NEEDED, required=True)
    train.add_settings(command.add_argument_group("how data is read"), _READING)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    given = {name: getattr(arguments, name) for name in (*_NEEDED, *_READING)}
    values = {name: value for name, value in given.items() if value is not None}
    train.show_survey(survey(read_settings(None, values | {"output": "."})))
