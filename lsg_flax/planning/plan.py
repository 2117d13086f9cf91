"""Plans a run before the machine is rented: compiles the real training step or inference program
for a described topology, and reports the memory, arithmetic and communication that it needs.

No weights are read and nothing runs. A compiler's settings must be in the environment before jax is
imported, so `plan` compiles in a separate process (`python -m lsg_flax.planning`), which also
isolates crashes of the compiler; `compile_plan` compiles in this process.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from lsg_flax.chips import parse_topology
from lsg_flax.planning.compile import compile_plan
from lsg_flax.planning.settings import Plan, PlanSettings
from lsg_flax.topologies import check_compiler, environment_for


def plan(settings: PlanSettings) -> Plan:
    """Compiles the program of a run for a topology, in a separate process, and returns what it
    needs.

    Args:
        settings: the run and the topology.

    Raises:
        ValueError: for settings that do not fit the model, the mesh or the topology.
        FileNotFoundError: if there is no checkpoint.
        ImportError: if the compiler that the topology needs is missing.
        RuntimeError: if the compiler crashed; the message has the end of its output.
    """
    topology = parse_topology(settings.topology)
    check_compiler(topology)
    package = str(pathlib.Path(__file__).parents[2])
    environment = environment_for(topology)
    environment["PYTHONPATH"] = os.pathsep.join(
        [package, *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-m", "lsg_flax.planning"],
        input=json.dumps(dataclasses.asdict(settings)),
        capture_output=True,
        text=True,
        env=environment,
    )
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    if done.returncode == 0:
        return Plan.from_json(last)
    try:
        error = json.loads(last)
    except ValueError:
        raise RuntimeError(
            f"compiling for {settings.topology} ended with exit code {done.returncode}: "
            f"{done.stderr.strip()[-2000:]}"
        ) from None
    kinds = {"FileNotFoundError": FileNotFoundError, "ImportError": ImportError}
    raise kinds.get(error["kind"], ValueError)(error["message"])


def main() -> int:
    """Runs in the separate process: reads settings as JSON from stdin, and prints the plan or the
    error as the last line of stdout."""
    try:
        print(compile_plan(PlanSettings(**json.load(sys.stdin))).to_json())
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(json.dumps({"kind": type(error).__name__, "message": str(error)}))
        return 1
    return 0
