"""What the fused LSG kernels cost on TPUs, by compiling for them on this machine.

    pip install 'lsg-flax[plan]'
    python benchmarks/kernels.py [--chips v5e v5p v6e] [--json]

Attention of 4 rows of 4,096 tokens and a global, 12 heads of 64, bfloat16, forward and with all
gradients: "tokens", the kernels alone between arrays [rows, tokens, heads * width] as projections
write them; and the whole of `lsg_attention` with the global in front, by the kernels and by XLA.
Bytes are those to and from the chip's main memory. Cycles of a kernel are the bundles of its loops'
bodies in the compiler's final schedule times their rounds, those of XLA its own estimate.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from lsg_flax.chips import parse_topology
from lsg_flax.topologies import environment_for

TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
ROWS, TOKENS, HEADS, WIDTH, BLOCK = 4, 4096, 12, 64, 128
OPERATIONS = ("sort", "gather", "scatter")
CASES = [(what, passes) for what in ("tokens", "pallas", "xla") for passes in ("forward", "both")]


def tokens_only(implementation: str):
    """The kernels alone, and the shapes of what they are given."""
    import jax
    import jax.numpy as jnp

    from lsg_flax.kernels import FusedSpec, Selecting, Source, attend_fused, plan_fused

    spec = FusedSpec(BLOCK, Selecting("norm", BLOCK // 2, BLOCK, BLOCK, BLOCK))

    def features_first(x):
        return x.reshape(ROWS, -1, HEADS, WIDTH).transpose(0, 2, 3, 1)

    def attend(mask, query, key, value, first_key, first_value):
        query = features_first(query)
        source = Source(features_first(key), features_first(value), mask[:, None, 1:])
        first = features_first(first_key), features_first(first_value)
        shared = Source(*first, mask[:, None, :1])
        plan = plan_fused(spec, query, shared, implementation)
        assert plan is not None
        context = attend_fused(plan, query, source, shared)
        return context.transpose(0, 3, 1, 2).reshape(ROWS, TOKENS, -1)

    def shape(length):
        return jax.ShapeDtypeStruct((ROWS, length, HEADS * WIDTH), jnp.bfloat16)

    return attend, [*[shape(TOKENS)] * 3, *[shape(1)] * 2]


def whole(implementation: str):
    """`lsg_attention`, and the shapes of what it is given."""
    import jax
    import jax.numpy as jnp

    from lsg_flax import LSGConfig, lsg_attention

    def attend(mask, query, key, value):
        options = {"config": LSGConfig(), "implementation": implementation}
        return lsg_attention(query, key, value, mask, **options)

    shape = (ROWS, 1 + TOKENS, HEADS, WIDTH)
    return attend, [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3


def compile_one(topology: str, what: str, passes: str) -> dict[str, Any]:
    """Compiles in this process, which was started for it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from lsg_flax.planning.hlo import read_program
    from lsg_flax.sharding import make_mesh
    from lsg_flax.topologies import devices_of

    attend, shapes = tokens_only("pallas") if what == "tokens" else whole(what)

    def both(mask, gradient, *arrays):
        context, transpose = jax.vjp(lambda *x: attend(mask, *x), *arrays)
        return context, transpose(gradient)

    mesh = make_mesh(devices=devices_of(parse_topology(topology))[:1])
    mask = jax.ShapeDtypeStruct((ROWS, 1 + TOKENS), jnp.bool_)
    arguments = [mask, *shapes] if passes == "forward" else [mask, shapes[0], *shapes]
    here = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in arguments]
    with jax.set_mesh(mesh):
        lowered = jax.jit(attend if passes == "forward" else both).lower(*arguments)
        start = time.perf_counter()
        compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert memory is not None
    program = read_program(text)
    return {
        "gigabytes": program.bytes / 1e9,
        "flops": program.flops,
        "temporaries": memory.temp_size_in_bytes / 1e6,
        "seconds": time.perf_counter() - start,
        "xla_cycles": program.cycles,
    } | {name: len(re.findall(rf"= \S+ {name}\(", text)) for name in OPERATIONS}


def loops(schedule: str) -> list[int]:
    """The bundles of a kernel's innermost loops, which go over the blocks of a group of heads."""
    open_since, found, last = None, [], 0
    for address, mark, depth in re.findall(r"^ *0x(\w+) *(LB|PF)?: (>*)", schedule, re.MULTILINE):
        if open_since is not None and len(depth) < 2:
            found.append(last - open_since + 1)
            open_since = None
        if mark == "LB" and len(depth) == 2:
            open_since = int(address, 16)
        last = int(address, 16)
    return found


def measure(chip: str, what: str, passes: str) -> dict[str, Any]:
    """Compiles in a process of its own, and reads the schedules that it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, __file__, "--one", TOPOLOGIES[chip], what, passes]
        environment = environment_for(parse_topology(TOPOLOGIES[chip]))
        environment |= {"LIBTPU_INIT_ARGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{what}, {passes}, on {chip}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rounds = ROWS * HEADS * WIDTH // 128 * (TOKENS // BLOCK)
        for kernel in ("forward", "backward"):
            pattern = f"*lsg_{kernel}*[0-9]-final_bundles.txt"
            for file in pathlib.Path(folder).glob(pattern):
                found[kernel] = rounds * sum(loops(file.read_text()))
    return {"chip": chip, "what": what, "passes": passes} | found


def main() -> None:
    """Prints a table, or one line of JSON for each row of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=["v5e"])
    parser.add_argument("--what", nargs="+", choices=["tokens", "pallas", "xla"])
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compile_one(*arguments.one)))
        return
    columns = "GB | temporaries, MB | kernels' cycles, forward, backward | XLA's cycles"
    if not arguments.json:
        print(f"| chip | what | passes | {columns} | sorts, gathers, scatters | compiled in |")
        print("|---|---|---|---|---|---|---|---|---|")
    for chip in arguments.chips:
        for what, passes in CASES:
            if arguments.what and what not in arguments.what:
                continue
            row = measure(chip, what, passes)
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            kernels = ", ".join(f"{row[k] / 1e6:.2f}M" for k in ("forward", "backward") if k in row)
            counts = ", ".join(str(row[name]) for name in OPERATIONS)
            cells = [f"{row['gigabytes']:.3f}", f"{row['temporaries']:.0f}", kernels or "none"]
            cells += [f"{row['xla_cycles'] / 1e6:.1f}M", counts, f"{row['seconds']:.0f} s"]
            print(f"| {chip} | {what} | {passes} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
