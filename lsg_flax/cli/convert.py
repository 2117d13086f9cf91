"""`lsg-flax convert`: makes checkpoints that read long documents."""

import argparse
import os
import pathlib
from dataclasses import fields
from typing import Any

import jax

import lsg_flax
from lsg_flax import hub
from lsg_flax.cli.shared import add_command, add_pattern, console, given_pattern, pattern_in_words
from lsg_flax.hub import LSGOptions
from lsg_flax.models import TASKS, EncoderConfig

_DEFAULTS = LSGOptions()

_DESCRIPTION = """Make an LSG checkpoint of SOURCE that reads long documents with the same weights.

Nothing is trained: positions repeat, and global tokens start as [CLS] and [MASK]. The result is
written to TARGET in Hugging Face's format, for lsg_flax.from_pretrained and for PyTorch's LSG
classes. If anything fails, files that were in TARGET stay as they were."""


def add(commands: Any) -> None:
    """Declares the command and its options."""
    command = add_command(commands, "convert", _DESCRIPTION, run)
    command.add_argument("source", metavar="SOURCE", help="folder, or id on the Hugging Face hub")
    command.add_argument("target", metavar="TARGET", help="folder for the result")
    command.add_argument(
        "--max-sequence-length",
        type=int,
        default=_DEFAULTS.max_sequence_length,
        metavar="N",
        help="tokens that the result reads (default: %(default)s)",
    )
    command.add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"head of the result (default: that of SOURCE); one of {', '.join(TASKS)}",
    )
    add_pattern(command)
    _add_global_options(command.add_argument_group("global tokens and positions"))
    command.add_argument(
        "--check", action="store_true", help="refuse weights with NaN or infinity in them"
    )


def _add_global_options(group) -> None:
    group.add_argument(
        "--random-global-init",
        action="store_true",
        help="draw globals from the distribution of the word embeddings, not from [MASK]",
    )
    group.add_argument(
        "--global-positional-stride",
        type=int,
        default=_DEFAULTS.global_positional_stride,
        metavar="N",
        help="distance between the positions of neighbouring globals (default: %(default)s)",
    )
    group.add_argument(
        "--keep-first-global-token",
        action="store_true",
        help="leave the first global as it is (LSG SOURCE only)",
    )
    group.add_argument(
        "--resize-lsg", action="store_true", help="change the positions only (LSG SOURCE only)"
    )
    group.add_argument(
        "--no-token-ids",
        dest="use_token_ids",
        action="store_false",
        help="do not add the embedding of segment 0 to the globals",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=_DEFAULTS.seed,
        metavar="N",
        help="of the random draws (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    target = pathlib.Path(arguments.target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"TARGET {target} is a file; give a folder, or a new name for one.")
    if target.is_dir() and os.path.isdir(arguments.source) and target.samefile(arguments.source):
        raise ValueError(f"SOURCE and TARGET are both {target}; give another folder as TARGET.")
    replaces = (target / hub.CONFIG).exists()
    out = console()
    with out.status(f"converting {arguments.source}"):
        model, params = lsg_flax.convert_checkpoint(
            arguments.source,
            target,
            task=arguments.task,
            check=arguments.check,
            **{f.name: getattr(arguments, f.name) for f in fields(LSGOptions)},
            **given_pattern(arguments),
        )
    config: EncoderConfig = model.config
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = arguments.max_sequence_length
    out.print(
        f"{'replaced' if replaces else 'wrote'} {target}: {config.model_type} for {model.task}, "
        f"{tokens:,} tokens, {count:,} parameters"
    )
    if config.lsg:
        out.print(pattern_in_words(config.lsg))
    out.print(f"next: lsg_flax.from_pretrained({str(target)!r}), or lsg-flax inspect {target}")
