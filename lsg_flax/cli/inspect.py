"""`lsg-flax inspect`: shows the config and the tensors of a checkpoint."""

import argparse
import json
import math
import re
from dataclasses import fields

from rich.table import Table

from lsg_flax import hub
from lsg_flax.cli.shared import Commands, add_command, add_switch, console, pattern_in_words
from lsg_flax.models import family_of

_DESCRIPTION = """Show the config and the tensors of a checkpoint: plain, LSG, or saved by lsg_flax.

Only the headers of safetensors files are read, unless --check is given."""


def add(commands: Commands) -> None:
    """Declares the command and its options."""
    command = add_command(commands, "inspect", _DESCRIPTION, run)
    command.add_argument("path", metavar="PATH", help="folder, or id on the Hugging Face hub")
    add_switch(command, "--check", "also load the weights and check that they fit and are finite")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    checkpoint = hub.open_checkpoint(arguments.path)
    tensors = checkpoint.tensors
    out = console()
    out.print(_config_table(checkpoint))
    if checkpoint.config.lsg:
        out.print(pattern_in_words(checkpoint.config.lsg))
    out.print(_tensor_table(tensors))
    if arguments.check:
        with out.status("checking the weights"):
            model, _ = checkpoint.load(check=True)
        out.print(f"checked: the weights fit a {model.task} model and are finite")


def _config_table(checkpoint: hub.Checkpoint) -> Table:
    config = checkpoint.config
    table = Table(title=f"config of {checkpoint.folder}", title_justify="left")
    table.add_column("field")
    table.add_column("value", overflow="fold")
    classes = checkpoint.architectures or ("none: loads as the base model",)
    table.add_row("architectures", ", ".join(classes))
    table.add_row("tasks", ", ".join(family_of(config.model_type).heads))
    table.add_row("in PyTorch", hub.in_pytorch(checkpoint))
    table.add_row("attention", config.attention)
    for f in fields(config):
        if f.name not in ("lsg", "extra", "labels"):
            table.add_row(f.name, _shown(getattr(config, f.name)))
    extra = json.loads(config.extra)
    read = {"architectures"} | config.dialect.others.keys()  # beside our fields
    for name in sorted(extra.keys() & config.dialect.others.keys()):
        table.add_row(name, _shown(extra[name]))
    table.add_row("labels", ", ".join(config.labels))
    if config.lsg:
        table.add_section()
        for f in fields(config.lsg):
            table.add_row(f.name, _shown(getattr(config.lsg, f.name)))
    others = sorted(extra.keys() - read)
    if others:
        table.add_section()
        table.add_row("kept, not used", ", ".join(others))
    return table


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def _tensor_table(tensors: hub.Tensors) -> Table:
    """Returns a table with one row for tensors that differ only by the layer's number."""
    rows: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for name, stored in tensors.items():
        pattern = re.sub(r"\.(\d+)\.", ".*.", name, count=1)
        rows.setdefault((pattern, stored.shape, str(stored.dtype)), []).append(name)
    table = Table(title=f"{len(tensors)} tensors", title_justify="left", show_footer=True)
    counts = [math.prod(stored.shape) for stored in tensors.values()]
    table.add_column("path (* is the layer)", "total", overflow="fold")
    table.add_column("shape")
    table.add_column("dtype", ", ".join(sorted({str(t.dtype) for t in tensors.values()})))
    table.add_column("parameters", f"{sum(counts):,}", justify="right")
    for (pattern, shape, dtype), names in sorted(rows.items(), key=lambda row: _order(row[0][0])):
        path = names[0] if len(names) == 1 else pattern
        layers = f"{len(names)} x " if len(names) > 1 else ""
        table.add_row(path, f"{layers}{list(shape)}", dtype, f"{len(names) * math.prod(shape):,}")
    return table


def _order(path: str) -> tuple[int, str]:
    """Sorts embeddings first, then layers, then the rest."""
    return (0 if "embeddings" in path else 1 if "*" in path else 2), path
