"""Runs processes that stay alive side by side and take turns, so that a slow moment of the machine
hits all of them."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable


def make_parser(about: str | None, repeats: int, arguments: int) -> argparse.ArgumentParser:
    """Options of a comparison with PyTorch, whose workers have so many arguments."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference-python", default=".venv-reference/bin/python")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--worker", nargs=arguments, help=argparse.SUPPRESS)
    return parser


def start(python: str, script: str, *arguments) -> subprocess.Popen:
    """A worker: `script --worker ...`, ready when it has printed its first line."""
    command = [python, "-W", "ignore", script, "--worker", *map(str, arguments)]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=environment,
    )  # fmt: skip


def ask(process: subprocess.Popen) -> dict:
    """The next line of a worker."""
    line = process.stdout.readline()
    if not line:
        command = " ".join(map(str, process.args))
        raise RuntimeError(f"a worker stopped; this command shows why: {command}")
    return json.loads(line)


def turn(process: subprocess.Popen) -> dict:
    """One step of a worker: what `serve` measures."""
    process.stdin.write("go\n")
    process.stdin.flush()
    return ask(process)


def stop(process: subprocess.Popen) -> None:
    """Ends a worker."""
    process.kill()
    process.communicate()


def serve(step: Callable[[], object], first: dict) -> None:
    """A worker's life, warm already: says `first`, then runs a step for each line on standard
    input and tells its seconds, its seconds of all processors, and the process's peak resident
    MiB since it was warm."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    print(json.dumps(first), flush=True)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        step()
        measured = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}
        status = pathlib.Path("/proc/self/status").read_text()
        peak = int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1])
        print(json.dumps(measured | {"mib": peak / 1024}), flush=True)


def compare(script: str, pythons: dict[str, str], arguments: tuple, repeats: int) -> str:
    """What PyTorch and lsg_flax take, and the medians of the ratios of neighbouring runs. Both
    say {"value": a number} first, which must agree."""
    workers = {rival: start(python, script, rival, *arguments) for rival, python in pythons.items()}
    try:
        values = {rival: ask(worker)["value"] for rival, worker in workers.items()}
        if abs(values["PyTorch"] / values["lsg_flax"] - 1) > 1e-4:
            raise AssertionError(f"the rivals compute different things: {values}")
        runs = [{rival: turn(worker) for rival, worker in workers.items()} for _ in range(repeats)]
    finally:
        for worker in workers.values():
            stop(worker)
    parts = []
    for what, said in (("seconds", "s"), ("cpu", "CPU s"), ("mib", "MiB at the peak")):
        theirs, ours = ([run[rival][what] for run in runs] for rival in ("PyTorch", "lsg_flax"))
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        medians = f"{statistics.median(theirs):.4g} -> {statistics.median(ours):.4g}"
        parts.append(f"{medians} {said}, {ratio:.2f} x")
    return "PyTorch -> lsg_flax: " + "; ".join(parts)
