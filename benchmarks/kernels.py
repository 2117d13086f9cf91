"""Measures what the fused LSG kernels cost on TPUs, by compiling for them on this machine.

    pip install 'lsg-flax[plan]'
    python benchmarks/kernels.py [--chips v5e v5p v6e] [--json]

Attention of 4 rows of 4,096 tokens and a global, 12 heads of 64, bfloat16, forward and with all
gradients. "layer" is what a model's layer calls between its projections; its arrays [rows, tokens +
global, heads * width] have the global behind the tokens. The other rows are the whole of
`lsg_attention`, which has it in front, by the kernels and by XLA.

Bytes are those to and from the chip's main memory. Cycles of a kernel are the bundles of its loops'
bodies in the compiler's final schedule times their rounds; those of XLA are its own estimate.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from tpu_programs import (
    TOPOLOGIES,
    compile_for,
    loop_bundles,
    measure_apart,
    schedules,
)

ROWS, TOKENS, HEADS, WIDTH, BLOCK = 4, 4096, 12, 64, 128
FILLER = 15  # places behind tokens and global that fill up a tile
# Of a kernel's loops, for one group of heads: over blocks that are brought into the chip, over
# blocks of queries, over the keys of globals, and over blocks of which gradients are written.
BLOCKS, RUNS = TOKENS // BLOCK, TOKENS // BLOCK // 16
ROUNDS = {"forward": (BLOCKS, BLOCKS, RUNS), "backward": (BLOCKS, BLOCKS, RUNS, BLOCKS)}
COPY = 64  # bundles at most of a loop that copies what is less than a tile, in a round or two
OPERATIONS = ("sort", "gather", "scatter")
CASES = [(what, passes) for what in ("layer", "pallas", "xla") for passes in ("forward", "both")]


def layer(implementation: str, tokens: int):
    """What a model's layer calls between its projections, and the shapes of what these write."""
    import jax
    import jax.numpy as jnp

    from lsg_flax import LSGConfig
    from lsg_flax.kernels import Source
    from lsg_flax.patterns import LSG, Runtime, attention

    def features_first(x):
        return x.reshape(ROWS, -1, HEADS, WIDTH).transpose(0, 2, 3, 1)

    def attend(mask, query, key, value):
        query, key, value = map(features_first, (query, key, value))
        run = Runtime(implementation=implementation)
        pattern = LSG(LSGConfig(), filler=FILLER)
        context = attention(pattern, query, Source(key, value, mask[:, None]), run)
        return context.transpose(0, 3, 1, 2).reshape(ROWS, tokens + 1 + FILLER, -1)

    shape = (ROWS, tokens + 1 + FILLER, HEADS * WIDTH)
    return attend, [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3


def whole(implementation: str, tokens: int):
    """`lsg_attention`, and the shapes of what it is given."""
    import jax
    import jax.numpy as jnp

    from lsg_flax import LSGConfig, lsg_attention

    def attend(mask, query, key, value):
        options = {"config": LSGConfig(), "implementation": implementation}
        return lsg_attention(query, key, value, mask, **options)

    shape = (ROWS, 1 + tokens, HEADS, WIDTH)
    return attend, [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3


def compile_one(chip: str, what: str, passes: str, tokens: str) -> dict[str, float]:
    """Compiles in this process, which was started for it."""
    import jax
    import jax.numpy as jnp

    length = int(tokens)
    attend, shapes = layer("pallas", length) if what == "layer" else whole(what, length)
    mask = jax.ShapeDtypeStruct(shapes[0].shape[:2], jnp.bool_)
    return compile_passes(chip, passes, attend, mask, shapes)


def compile_passes(chip: str, passes: str, attend, mask, shapes: list) -> dict[str, float]:
    """Attention of (mask, query, ...), and with the gradients of all but the mask if `passes` is
    "both"; the context has the query's shape."""
    if passes == "forward":
        return compile_for(chip, attend, [mask, *shapes])

    def both(cotangent, mask, *arrays):
        import jax

        context, pull = jax.vjp(lambda *x: attend(mask, *x), *arrays)
        return context, pull(cotangent)

    return compile_for(chip, both, [shapes[0], mask, *shapes])


def kernel_cycles(folder: pathlib.Path, tokens: int) -> dict[str, int]:
    """Of the kernels whose schedules are there, for 4,096 tokens; of others the rounds differ."""
    if tokens != TOKENS:
        return {}
    groups, found = ROWS * HEADS * WIDTH // 128, {}
    for kernel, rounds in ROUNDS.items():
        if schedules_found := loop_bundles(folder, f"lsg_{kernel}", 2):
            bundles = max(schedules_found, key=sum)  # of copies for it, too
            large = [size for size in bundles if size > COPY]
            found[kernel] = groups * sum(n * each for n, each in zip(large, rounds, strict=True))
    return found


def measure(chip: str, what: str, passes: str, tokens: int = TOKENS) -> dict[str, Any]:
    """Compiles in a process of its own, and reads the schedules that it leaves."""
    with schedules() as (settings, folder):
        given = (chip, what, passes, tokens)
        settings = {} if what == "xla" else settings
        found = measure_apart(__file__, *given, python=sys.executable, settings=settings)
        found |= kernel_cycles(folder, tokens)
    return {"chip": chip, "what": what, "passes": passes, "tokens": tokens} | found


def main() -> None:
    """Prints a table, or one line of JSON for each row of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=["v5e"])
    parser.add_argument("--what", nargs="+", choices=["layer", "pallas", "xla"])
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
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
