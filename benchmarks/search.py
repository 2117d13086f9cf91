"""Times the search for the largest inner products beside NumPy's, or compiles it for a TPU slice.

    python benchmarks/search.py [--blocks 1000000] [--questions 32] [--beam 5 5000]
    PYTHONPATH=.libtpu python benchmarks/search.py --plan v5e:2x4 [--blocks 13353718]

The first times `device_search` in float32 and NumPy's matmul with argpartition in turn, on vectors
of 128 numbers, and compares what they find. The second compiles the search for chips that the
machine does not have, with embeddings in bfloat16 sharded over all of them, and prints bytes per
chip.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lsg_flax.chips import parse_topology
from lsg_flax.open_qa import best_blocks, device_search
from lsg_flax.sharding import AXES, make_mesh
from lsg_flax.topologies import devices_of, environment_for

WIDTH, MIB = 128, 2**20
PUBLISHED = 13_353_718  # blocks of Wikipedia in REALM's index


def seconds(function, *arguments) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def compare(blocks: int, questions: int, beams: list[int], times: int) -> None:
    """Times both in turn; prints medians."""
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((blocks, WIDTH), np.float32)
    queries = generator.standard_normal((questions, WIDTH), np.float32)
    search = device_search(embeddings)

    def with_numpy(beam: int) -> np.ndarray:
        return np.argpartition(queries @ embeddings.T, -beam, axis=1)[:, -beam:]

    print("| beam | NumPy | lsg_flax | ratio |\n|---|---|---|---|")
    for beam in beams:
        same = np.sort(with_numpy(beam)) == np.sort(search(queries, beam).blocks)
        assert same.mean() > 0.999, same.mean()  # scores that round alike may change places
        taken = [(seconds(with_numpy, beam), seconds(search, queries, beam)) for _ in range(times)]
        theirs, ours = map(statistics.median, zip(*taken, strict=True))
        print(f"| {beam:,} | {theirs:.3f} s | {ours:.3f} s | {ours / theirs:.2f} x |", flush=True)


def plan(topology: str, blocks: int, questions: int, beams: list[int]) -> None:
    """Compiles and prints what the compiler says."""
    mesh = make_mesh(devices=devices_of(parse_topology(topology)))
    rows = -(-blocks // mesh.size) * mesh.size

    def placed(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    print(f"{blocks:,} x {WIDTH} in bfloat16 over {topology}, {questions} question(s)")
    print("| search | embeddings | temporaries | peak | reads |\n|---|---|---|---|---|")
    for beam in beams:
        for recall in (None, 0.95):
            arguments = (
                placed((rows, WIDTH), jnp.bfloat16, AXES),
                placed((questions, WIDTH), jnp.float32),
            )
            compiled = best_blocks(mesh, blocks, beam, recall).lower(*arguments).compile()
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
            sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
            sizes += (memory.peak_memory_in_bytes, cost["bytes accessed"])
            shown = " | ".join(f"{size / MIB:,.1f} MiB" for size in sizes)
            kind = "exact" if recall is None else f"recall {recall}"
            print(f"| {beam:,} best, {kind} | {shown} |", flush=True)


def main() -> None:
    """Prints a table; a plan is made in a process that looks for no device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--beam", type=int, nargs="+", default=[5, 5000])
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--plan", metavar="TOPOLOGY")
    options = parser.parse_args()
    if options.plan is None:
        compare(options.blocks or 1_000_000, options.questions or 32, options.beam, options.times)
    elif os.environ.get("TPU_WORKER_HOSTNAMES") or options.plan.startswith("cpu"):
        plan(options.plan, options.blocks or PUBLISHED, options.questions or 1, options.beam)
    else:
        environment = environment_for(parse_topology(options.plan))
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


if __name__ == "__main__":
    main()
