"""`lsg-flax convert`: converts checkpoints to LSG attention, so that they read long documents."""

import argparse
import pathlib
from dataclasses import fields

import jax

import lsg_flax
from lsg_flax import hub
from lsg_flax.cli import shared
from lsg_flax.cli.shared import add_number, add_switch, add_task
from lsg_flax.files import check_folder
from lsg_flax.hub import LSGOptions
from lsg_flax.models import TASKS

_DEFAULTS = LSGOptions()

_DESCRIPTION = """Convert SOURCE to LSG attention: it reads long documents with the same weights.

Nothing is trained: positions repeat, and global tokens start as [CLS] and [MASK]. The result is
written to TARGET in Hugging Face's format, for lsg_flax.from_pretrained and for PyTorch's LSG
classes. The tokenizer and other files of the model are copied unchanged. SOURCE is not changed. If
anything fails, existing files in TARGET stay unchanged."""


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "convert", _DESCRIPTION, run)
    command.add_argument("source", metavar="SOURCE", help="folder, or id on the Hugging Face hub")
    command.add_argument("target", metavar="TARGET", help="folder for the result")
    length = _DEFAULTS.max_sequence_length
    add_number(command, "--max-sequence-length", "maximum tokens that the result reads", length)
    add_task(command, "head of the result (default: that of SOURCE)", TASKS)
    shared.add_pattern(command)
    _add_global_options(command.add_argument_group("global tokens and positions"))
    add_switch(command, "--check", "fail if weights have NaN or infinity")
    about = "hub repository, such as me/bert-4096, to push the result to"
    command.add_argument("--push-to-hub", metavar="REPO", help=about)


def _add_global_options(group: shared.Options) -> None:
    for flag, about in (
        (
            "--random-global-init",
            "draw global tokens from the distribution of word embeddings, instead of [MASK]",
        ),
        ("--keep-first-global-token", "keep the first global token (only for an LSG SOURCE)"),
        ("--resize-lsg", "change only the positions (only for an LSG SOURCE)"),
    ):
        add_switch(group, flag, about)
    about = "distance between the positions of neighbouring global tokens"
    add_number(group, "--global-positional-stride", about, _DEFAULTS.global_positional_stride)
    group.add_argument(
        "--no-token-ids",
        dest="use_token_ids",
        action="store_false",
        help="do not add the embedding of segment 0 to the global tokens",
    )
    add_number(group, "--seed", "seed of random draws", _DEFAULTS.seed)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    check_folder("target", arguments.target)  # an empty Path would be the current folder
    target, repository = pathlib.Path(arguments.target), arguments.push_to_hub
    if repository is not None:
        hub.check_push(repository)
    replaces = (target / hub.CONFIG).exists()
    out = shared.console()
    with out.status(f"converting {arguments.source}"):
        model, params = lsg_flax.convert_checkpoint(
            arguments.source,
            target,
            task=arguments.task,
            check=arguments.check,
            **{f.name: getattr(arguments, f.name) for f in fields(LSGOptions)},
            **shared.given_pattern(arguments),
        )
    config = model.config
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = arguments.max_sequence_length
    out.print(
        f"{'replaced' if replaces else 'wrote'} {target}: {config.model_type} for {model.task}, "
        f"{tokens:,} tokens, {count:,} parameters"
    )
    if config.lsg:
        out.print(shared.pattern_in_words(config.lsg))
    out.print(f"next: lsg_flax.from_pretrained({str(target)!r}), or lsg-flax inspect {target}")
    out.print(f"in PyTorch: {hub.in_pytorch(hub.open_checkpoint(target))}")
    if repository is not None:
        with out.status(f"pushing {target} to {repository}"):
            address = hub.push_folder(target, repository)
        out.print(f"pushed to {address}")
