"""`lsg-flax doctor`: shows what is installed, which devices JAX uses, and what is wrong."""

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

_DESCRIPTION = """Show versions, devices, missing extras, and packages that do not fit together.

Nothing is changed and no model is loaded. Paste the output into a bug report."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
EXTRAS = {  # extra of pyproject.toml -> the commands that need it, and for what
    "torch": "all that load weights: PyTorch's .bin",
    "sentencepiece": "all that read texts: tokenizers that are only a sentencepiece model",
    "data": "data, train, evaluate, predict, embed: .parquet, hub datasets",
    "metrics": "train, evaluate: F1 of entities",
    "summarization": "train, evaluate: ROUGE of generated texts",
    "tensorboard": "train: --tensorboard",
    "plots": "train, evaluate, plan: pictures",
    "plan": "plan: TPUs",
    "export": "lsg_flax.inference.export_model and export_texts",
    "faiss": "lsg_flax.open_qa.faiss_search",
}
# JAX's platform -> where the system lists such devices, and the extra of jax that supports them.
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
        platforms = os.getenv("JAX_PLATFORMS")
        devices, problems = {}, [f"JAX_PLATFORMS={platforms} is not available here. {error}"]
    for (kind, on, memory), count in devices.items():
        size = f", {memory / GIB:.1f} GiB for JAX" if memory else ""
        out.print(f"devices: {count} x {kind} ({on}){size}")
    problems += _unused_devices({on for _, on, _ in devices})
    try:
        package = metadata.metadata("lsg-flax")
    except metadata.PackageNotFoundError:
        problems.append("lsg-flax is not installed: run pip install -e . in its clone")
    else:
        needed = [Requirement(line) for line in package.get_all("Requires-Dist", [])]
        for r in _unmet(needed):
            problems.append(f"{r.name} is {_installed(r.name) or 'missing'}: pip install '{r}'")
        out.print(_extras(needed, package.get_all("Provides-Extra", [])))
    for problem in problems:
        out.print(f"problem: {problem}")
    out.print(f"problems: {len(problems) or 'none'}")


def _kind(device: Any) -> tuple[str, str, int | None]:
    """Returns a device's name, its platform, and the bytes that JAX may use of it, if known."""
    stats = device.memory_stats() or {}
    return device.device_kind, device.platform, stats.get("bytes_limit")


def _extras(needed: list[Requirement], known: list[str]) -> Table:
    """Returns the state of each extra; `known` are the extras of the installed lsg-flax."""
    table = Table("extra", "for", "state", title="extras", title_justify="left")
    for extra, about in EXTRAS.items():
        missing = ", ".join(r.name for r in _unmet(needed, extra))
        missing = missing if extra in known else "all of it, newer than this installation"
        state = f"missing {missing}: pip install 'lsg-flax[{extra}]'" if missing else "installed"
        table.add_row(extra, about, state)
    return table


def _installed(name: str) -> str:
    """Returns the version of a package; empty if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _unmet(needed: list[Requirement], extra: str = "") -> Iterator[Requirement]:
    """Yields the requirements, of an extra or always needed, that are missing or in a wrong
    version."""
    for r in needed:
        plain, asked = (r.marker is None or r.marker.evaluate({"extra": e}) for e in ("", extra))
        found = _installed(r.name)
        fits = found and r.specifier.contains(found, prereleases=True)
        if asked and not (extra and plain) and not fits:
            yield r


def _unused_devices(used: set[str]) -> Iterator[str]:
    """Yields a problem for devices that the system lists and JAX does not use."""
    for on, (files, kind) in _SEEN.items():
        there = [] if on in used else sorted(glob.glob(files))
        remedy = f"pip install 'jax[{kind}]=={jax.__version__}'"
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            remedy = "JAX_PLATFORMS=cpu hides them, unset it"
        if there:
            yield f"{', '.join(there)}: JAX uses only {', '.join(used) or 'nothing'}; {remedy}"
