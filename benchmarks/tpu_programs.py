"""Compiles programs for a chip on this machine, each in a process of its own, and reads their text
and the schedules of their kernels.

A script that measures with `measure_apart` runs itself with `--one` and compiles with
`compile_for` there. Both sides need the package; the process may be another Python's.
"""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from lsg_flax.chips import parse_topology
from lsg_flax.topologies import environment_for

TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}


def compile_for(chip: str, function: Callable[..., Any], shapes: list[Any]) -> dict[str, float]:
    """What one chip does in a run of a function of arrays of these shapes (trees are welcome), in
    a process that was started by `measure_apart`.

    Returns:
        gigabytes to and from main memory, flops of products, MB of main memory for temporaries,
        cycles of XLA's own estimate, seconds of compilation; how many sorts, gathers, scatters and
        kernels run.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from lsg_flax.planning.hlo import read_program
    from lsg_flax.sharding import make_mesh
    from lsg_flax.topologies import devices_of

    mesh = make_mesh(devices=devices_of(parse_topology(TOPOLOGIES[chip]))[:1])
    here = NamedSharding(mesh, PartitionSpec())

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*jax.tree.map(placed, shapes))
        start = time.perf_counter()
        compiled = lowered.compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    assert memory is not None
    # The peak would count what lies in vector memory too.
    return facts_of(read_program(compiled.as_text()), memory.temp_size_in_bytes, seconds)


def facts_of(program, temporaries: int, seconds: float) -> dict[str, float]:
    """The numbers of a report that was read from a program's text."""
    return {
        "gigabytes": program.bytes / 1e9,
        "flops": program.flops,
        "temporaries": temporaries / 1e6,
        "xla_cycles": program.cycles,
        "sort": program.sorts,
        "gather": program.gathers,
        "scatter": program.scatters,
        "kernels": program.kernels,
        "seconds": seconds,
    }


@contextlib.contextmanager
def schedules() -> Iterator[tuple[dict[str, str], pathlib.Path]]:
    """Settings of a process whose compiler writes its final schedules into the folder."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=^final_bundles$"
        # A program that is found in the cache has no schedule.
        settings = {"LIBTPU_INIT_ARGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        yield settings, pathlib.Path(folder)


def loop_bundles(folder: pathlib.Path, name: str, depth: int) -> list[list[int]]:
    """Of each schedule whose name has this one in it: the bundles, about a cycle each, of the loops
    that have so many around a bundle of theirs, each once however often it runs."""
    files = sorted(folder.glob(f"*{name}*[0-9]-final_bundles.txt"))
    return [_loops(file.read_text(), depth) for file in files]


def _loops(schedule: str, wanted: int) -> list[int]:
    first, last, found = None, 0, []
    for address, mark, depth in re.findall(r"^ *0x(\w+) *(\w\w)?: (>*)", schedule, re.MULTILINE):
        # Empty bundles have no mark of their depth: the last one that has is a loop's end.
        if mark == "LB" and len(depth) <= wanted:
            found += [] if first is None else [last - first + 1]
            first = int(address, 16) if len(depth) == wanted else None
        if len(depth) >= wanted:
            last = int(address, 16)
    return found + ([] if first is None else [last - first + 1])


def measure_apart(
    script: str, chip: str, *arguments: Any, python: str, settings: dict[str, str] | None = None
) -> dict[str, float]:
    """What `script --one chip ...` prints as its last line, a record in JSON.

    Raises:
        RuntimeError: with the last words of a process that failed.
    """
    command = [python, script, "--one", chip, *map(str, arguments)]
    environment = environment_for(parse_topology(TOPOLOGIES[chip])) | (settings or {})
    package = str(pathlib.Path(__file__).parent.parent)
    paths = [package, environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(map(str, arguments))
        raise RuntimeError(f"{said}, for {chip}, by {python}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
