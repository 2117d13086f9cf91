"""`lsg-flax doctor`: says what is installed here, what JAX computes on, and what is amiss."""

import argparse
import collections
import glob
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
from packaging.requirements import Requirement
from rich.table import Table

import lsg_flax
from lsg_flax.chips import GIB
from lsg_flax.cli.shared import Commands, add_command, console

_DESCRIPTION = """Show versions, devices, what extras are missing, and what does not go together.

Nothing is changed and nothing is loaded. Paste what it prints into a report of a fault."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
EXTRAS = {  # of pyproject.toml -> the commands that miss it, and for what
    "torch": "all that load weights: PyTorch's .bin",
    "sentencepiece": "all that read texts: tokenizers that are a sentencepiece model alone",
    "data": "data, train, evaluate, predict, embed: .parquet, names of datasets",
    "metrics": "train, evaluate: F1 of entities",
    "summarization": "train, evaluate: ROUGE of what is written",
    "tensorboard": "train: --tensorboard",
    "plots": "train, evaluate: pictures",
    "plan": "plan: TPUs",
    "export": "lsg_flax.inference.export_model and export_texts",
    "faiss": "lsg_flax.open_qa.faiss_search",
}
# JAX's platform -> where the system shows such devices, the extra of jax that computes on them.
_SEEN = {"gpu": ("/dev/nvidia[0-9]*", "cuda12"), "tpu": ("/dev/accel[0-9]*", "tpu")}


def add(commands: Commands) -> None:
    """Declares the command."""
    add_command(commands, "doctor", _DESCRIPTION, run)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    out, problems = console(), []
    versions = Table("package", "version", title="versions", title_justify="left")
    versions.add_row("python", f"{platform.python_version()}, {platform.platform()}")
    versions.add_row("lsg_flax", f"{lsg_flax.__version__}, {lsg_flax.__path__[0]}")
    for name in _PACKAGES:
        versions.add_row(name, _installed(name))
    out.print(versions)
    try:
        devices = collections.Counter(map(_kind, jax.devices()))
    except (RuntimeError, AssertionError) as error:  # JAX has no message for JAX_PLATFORMS=cuda
        devices, problems = {}, [f"no JAX_PLATFORMS={os.getenv('JAX_PLATFORMS')} here. {error}"]
    for (kind, on, memory), count in devices.items():
        size = f", {memory / GIB:.1f} GiB for JAX" if memory else ""
        out.print(f"devices: {count} x {kind} ({on}){size}", soft_wrap=True)
    problems += _unused_devices({on for _, on, _ in devices})
    try:
        package = metadata.metadata("lsg-flax")
    except metadata.PackageNotFoundError:
        problems.append("lsg-flax is not installed: pip install -e . in its clone")
    else:
        needed = [Requirement(line) for line in package.get_all("Requires-Dist", [])]
        for r in _unmet(needed):
            problems.append(f"{r.name} is {_installed(r.name) or 'missing'}: pip install '{r}'")
        out.print(_extras(needed, package.get_all("Provides-Extra", [])))
    for problem in problems:
        out.print(f"problem: {problem}", soft_wrap=True)
    out.print(f"problems: {len(problems) or 'none'}")


def _kind(device: Any) -> tuple[str, str, int | None]:
    """Its name, its platform, and the bytes that JAX takes of it, where it says so."""
    stats = device.memory_stats() or {}
    return device.device_kind, device.platform, stats.get("bytes_limit")


def _extras(needed: list[Requirement], known: list[str]) -> Table:
    """What is there of each extra; `known` are those of the lsg-flax that was installed."""
    table = Table("extra", "for", "state", title="extras", title_justify="left")
    for extra, about in EXTRAS.items():
        missing = ", ".join(r.name for r in _unmet(needed, extra))
        missing = missing if extra in known else "all of it, newer than this installation"
        state = f"missing {missing}: pip install 'lsg-flax[{extra}]'" if missing else "there"
        table.add_row(extra, about, state)
    return table


def _installed(name: str) -> str:
    """Its version; empty if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _unmet(needed: list[Requirement], extra: str = "") -> Iterator[Requirement]:
    """What is missing, or is there in another version: of an extra, or of what all need."""
    for r in needed:
        plain, asked = (r.marker is None or r.marker.evaluate({"extra": e}) for e in ("", extra))
        found = _installed(r.name)
        fits = found and r.specifier.contains(found, prereleases=True)
        if asked and not (extra and plain) and not fits:
            yield r


def _unused_devices(used: set[str]) -> Iterator[str]:
    """Those that the system knows and JAX does not."""
    for on, (files, kind) in _SEEN.items():
        there = [] if on in used else sorted(glob.glob(files))
        remedy = f"pip install 'jax[{kind}]=={jax.__version__}'"
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            remedy = "JAX_PLATFORMS=cpu keeps it from them, unset it"
        if there:
            yield f"{', '.join(there)}: JAX computes on {', '.join(used) or 'nothing'}; {remedy}"
