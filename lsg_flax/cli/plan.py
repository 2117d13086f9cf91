"""`lsg-flax plan`: shows what a run needs on TPUs or GPUs that this machine does not have."""

import argparse
import dataclasses
import json
import pathlib
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from lsg_flax.chips import CHIPS, GIB
from lsg_flax.cli.shared import (
    add_command,
    add_number,
    add_pattern,
    add_task,
    console,
    given_pattern,
    mesh_axes,
    say,
)
from lsg_flax.files import check_apart, check_output, write_aside
from lsg_flax.hub import CONFIG
from lsg_flax.models import TASKS, Remat
from lsg_flax.planning import (
    TARGET_LENGTH,
    AttentionKind,
    GenerationPlan,
    Plan,
    PlanSettings,
    RunKind,
    StepReads,
    check_roofline,
    draw_roofline,
    largest_batch,
    least_time,
    nearest_that_fits,
    plan,
)
from lsg_flax.progress import doing
from lsg_flax.sharding import AXES
from lsg_flax.training import Precision

_DESCRIPTION = """Compile training, inference or generation for TPUs or GPUs without having them.

SOURCE is a checkpoint's folder, a hub id, or a config.json; weights are not read. A checkpoint with
full attention, or with fewer positions than --max-length, is planned as `lsg-flax convert` would
make it. The output has the memory per chip and its capacity, FLOPs, memory traffic, collectives and
the least time that a step can take; if the run does not fit, also the nearest setting that does.
With --mode generate a step generates one more token of every text; its memory traffic is compared
with what it must read at least: the weights of decoder and head, and the caches.

  lsg-flax plan ./lsg-bart --mode generate --num-beams 4 --max-new-tokens 128 --batch-size 8 \\
      --topology v5e:1x1"""
_KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "outputs": "outputs",
    "temporaries": "temporaries",
    "code": "program",
    "padding": "layout of the arguments",
}
_TIMES = {
    "compute": "FLOPs at the chip's peak",
    "memory": "memory traffic at peak bandwidth",
    "communication": "collectives, by rings over all links",
    "compiler": "XLA's cycle estimates; sorts, gathers, scatters, kernels count 0",
}
_WHAT = {False: "the nearest setting that fits", True: "the largest batch that fits"}
_UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
_LISTED = 8  # collectives


def add(commands: Any) -> None:
    """Declares the command and its options."""
    command = add_command(commands, "plan", _DESCRIPTION, run)
    command.add_argument("source", metavar="SOURCE", help="folder, hub id, or a config.json")
    command.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help=f"chips and their layout, such as v5e:2x4 or h100:8; chips: {', '.join(CHIPS)}; "
        "cpu:8 for devices on this machine",
    )
    command.add_argument(
        "--mesh",
        type=mesh_axes,
        default={},
        metavar="AXIS=N,...",
        help=f"chips along the axes {', '.join(AXES)}; -1 takes the remaining ones (default: all "
        "along data)",
    )
    command.add_argument(
        "--batch-size",
        type=int,
        required=True,
        metavar="N",
        help="rows per step, over all chips and microbatches together",
    )
    command.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens per row (default: what an LSG SOURCE reads, otherwise 4096)",
    )
    add_task(command, "head (default: that of SOURCE)", TASKS)
    _add_choices(command)
    _add_written(command)
    add_pattern(command)
    _add_search(command)
    about = "also write the plan to this file"
    command.add_argument("--json", type=pathlib.Path, metavar="FILE", help=about)
    about = "also draw the step below the chip's roofline: .png, .svg or .pdf"
    command.add_argument("--picture", type=pathlib.Path, metavar="FILE", help=about)


def _add_written(command: argparse.ArgumentParser) -> None:
    written = command.add_argument_group("texts that are written")
    about = f"training: tokens of the decoder per row (default: {TARGET_LENGTH})"
    add_number(written, "--max-target-length", about)
    about = f"--mode generate: tokens to generate per text (default: {TARGET_LENGTH})"
    add_number(written, "--max-new-tokens", about)
    about = "--mode generate: beams per row (default: as in SOURCE, otherwise 1)"
    add_number(written, "--num-beams", about)


def _add_search(command: argparse.ArgumentParser) -> None:
    search = command.add_argument_group("search")
    search.add_argument(
        "--find-batch", action="store_true", help="search for the largest batch that fits"
    )
    search.add_argument(
        "--no-search",
        dest="search",
        action="store_false",
        help="do not search for a setting that fits if this one does not",
    )
    search.add_argument(
        "--max-compiles",
        type=int,
        default=8,
        metavar="N",
        help="most compilations of a search (default: %(default)s)",
    )


def _add_choices(command: argparse.ArgumentParser) -> None:
    for name, kind, text in (
        ("--mode", RunKind, "what runs"),
        ("--attention", AttentionKind, "attention; local and lsh only where there is no other"),
        ("--remat", Remat, "what the backward pass recomputes to save memory"),
        ("--dtype", Precision, "dtype of the computation"),
        ("--param-dtype", Precision, "dtype of parameters and optimizer state"),
    ):
        field = name[2:].replace("-", "_")
        default = getattr(PlanSettings, field)
        choices = get_args(kind)
        command.add_argument(
            name,
            choices=choices,
            default=default,
            metavar="NAME",
            help=f"{text}: {', '.join(choices)} (default: %(default)s)",
        )
    command.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="M",
        help="microbatches that a step's rows are split into (default: %(default)s)",
    )
    about = "train adapters of this rank (LoRA) and the head, instead of all (default: none)"
    add_number(command, "--lora-r", about)
    about = "projections that get adapters (default: as in training)"
    command.add_argument("--lora-target-modules", nargs="+", metavar="NAME", help=about)
    about = "keep a moving average of the trainable parameters (default: none)"
    command.add_argument("--ema-decay", type=float, metavar="X", help=about)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    _check_files(arguments)
    out, tried = console(), []
    with out.status("compiling") as status:

        def planner(settings: PlanSettings) -> Plan:
            status.update(f"compiling {_in_words(settings)}")
            with doing(f"compiling {_in_words(settings)}"):
                tried.append(plan(settings))
            say(f"{_in_words(tried[-1].settings)}: {_verdict(tried[-1])}")
            return tried[-1]

        shown, others = planner(_settings(arguments)), []
        limit = arguments.max_compiles
        if arguments.find_batch:
            largest = largest_batch(shown, planner, max_compiles=limit)[0]
            others = [largest] if largest and largest is not shown else []
        elif arguments.search and not shown.fits:
            nearest = nearest_that_fits(shown, planner, max_compiles=limit)[0]
            others = [nearest] if nearest else []
    _show(shown, out)
    for other in others:
        out.print(f"{_WHAT[arguments.find_batch]}: {_in_words(other.settings)}")
        _show(other, out)
    if not others and not shown.fits:
        out.print(f"no setting that fits was found in {len(tried)} compilations")
    if arguments.json:
        _write(arguments.json, [shown, *others], tried)
    if arguments.picture:
        draw_roofline(arguments.picture, {_in_words(p.settings): p for p in (shown, *others)})
        out.print(f"wrote {arguments.picture}")


def _check_files(arguments: argparse.Namespace) -> None:
    """Raises for files that cannot be written, before anything is compiled."""
    source = pathlib.Path(arguments.source)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--json {arguments.json}: {arguments.json.parent} is not a folder; give a file in an "
            "existing folder."
        )
    for file in filter(None, (arguments.json, arguments.picture)):
        if source.is_dir():
            check_apart(file, source)
        check_output(file, source, source / CONFIG)
    if arguments.picture:
        check_roofline(arguments.topology, arguments.picture)
        if arguments.json and arguments.json.absolute() == arguments.picture.absolute():
            raise ValueError(f"--json and --picture both name {arguments.json}; give two files.")


def _settings(arguments: argparse.Namespace) -> PlanSettings:
    names = {f.name for f in dataclasses.fields(PlanSettings)} & vars(arguments).keys()
    values = {name: getattr(arguments, name) for name in names}
    return PlanSettings(**values, lsg=given_pattern(arguments))


def _in_words(settings: PlanSettings) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in settings.mesh.items() if size != 1)
    rows = f"batch {settings.batch_size}"
    rows += f" x {settings.num_beams} beams" if settings.num_beams else ""
    rows += f" in {settings.accumulate} microbatches" if settings.accumulate > 1 else ""
    remat = f", remat {settings.remat}" if settings.mode == "train" else ""
    remat += f", LoRA of rank {settings.lora_r}" if settings.lora_r else ""
    remat += ", with an average" if settings.ema_decay else ""
    place = f"{settings.topology} {mesh or 'data'}"
    return f"{place}, {rows}{remat}, {settings.attention} attention"


def _verdict(found: Plan) -> str:
    needed = f"{_bytes(found.needed)} per chip"
    if found.capacity is None:
        return f"{needed}, {found.compile_seconds:.0f} s to compile"
    word = "fits" if found.fits else "does not fit"
    at_least = "at least " if found.refusal else ""
    room = f"{_bytes(found.capacity)} usable"
    return f"{word}: {at_least}{needed}, {room}; {found.compile_seconds:.0f} s to compile"


def _show(found: Plan, out: Console) -> None:
    settings = found.settings
    written = settings.max_target_length or settings.max_new_tokens
    tokens = f"{settings.max_length:,} tokens{f', {written:,} written' if written else ''}"
    out.print(f"{settings.task}, {settings.mode}, {tokens}: {_in_words(settings)}")
    table = Table()
    table.add_column("per chip and step")
    table.add_column("", justify="right")
    for kind, size in dataclasses.asdict(found.memory).items():
        if size and (found.program or kind in ("parameters", "optimizer", "batch")):
            table.add_row(_KINDS[kind], _bytes(size))
    table.add_row("memory in all", _bytes(found.needed))
    if found.generation:
        _add_caches(table, found.generation.reads)
    table.add_section()
    if found.program:
        _add_work(table, found)
    table.add_row("compile time", f"{found.compile_seconds:.1f} s")
    out.print(table)
    for note in found.notes:
        out.print(f"note: {note}")
    out.print(_verdict(found))


def _add_work(table: Table, found: Plan) -> None:
    program = found.program
    assert program is not None
    table.add_row("matrix FLOPs", f"{program.flops:.3g}")
    table.add_row("memory traffic", _bytes(program.bytes))
    if found.generation:
        least = found.generation.reads.total
        table.add_row("weights and caches", _bytes(least))
        table.add_row("memory traffic by these", f"{program.bytes / least:.2f} x")
    for c in program.collectives[:_LISTED]:
        runs = f"{c.runs:,} x " if c.runs > 1 else ""
        table.add_row(f"{c.kind} among {c.group}", f"{runs}{_bytes(c.bytes)}")
    rest = program.collectives[_LISTED:]
    if rest:
        total = _bytes(sum(c.runs * c.bytes for c in rest))
        table.add_row(f"{sum(c.runs for c in rest):,} smaller collectives", total)
    if program.kernels:
        table.add_row("custom kernels", f"{program.kernels:,}")
    if program.unknown_kernels:
        table.add_row("kernels of unknown work, no FLOPs counted", f"{program.unknown_kernels:,}")
    if program.unknown_loops:
        table.add_row("loops of unknown length, counted once", f"{program.unknown_loops}")
    table.add_section()
    for name, seconds in found.times.items():
        table.add_row(_TIMES[name], f"{1e3 * seconds:.2f} ms")
    if found.roofline is not None:
        table.add_row("the largest: a step takes at least", f"{1e3 * found.roofline:.2f} ms")
        if found.generation:
            _add_prefill(table, found.generation, found.roofline, found.settings)


def _add_caches(table: Table, reads: StepReads) -> None:
    table.add_row("among them: cache of the texts, for each beam", _bytes(reads.self_cache))
    if reads.cross_cache:
        table.add_row("encoder's keys and values, for each row", _bytes(reads.cross_cache))


def _add_prefill(
    table: Table, generation: GenerationPlan, step: float, settings: PlanSettings
) -> None:
    first = least_time(generation.prefill_times) or 0.0
    table.add_row("before the first step at least", f"{1e3 * first:.2f} ms")
    steps = (settings.max_new_tokens or 1) - 1
    table.add_row(f"with all {steps:,} steps", f"{1e3 * (first + steps * step):,.0f} ms")


def _bytes(size: int | float) -> str:
    unit, name = next((u, n) for u, n in _UNITS if size >= u or u == 1)
    return f"{size / unit:,.0f} {name}" if unit == 1 else f"{size / unit:,.2f} {name}"


def _write(file: pathlib.Path, shown: list[Plan], tried: list[Plan]) -> None:
    values = {
        name: [json.loads(p.to_json()) for p in plans]
        for name, plans in (("shown", shown), ("tried", tried))
    }
    write_aside(file, f"{json.dumps(values, indent=2)}\n".encode())
