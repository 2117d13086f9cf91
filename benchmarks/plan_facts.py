"""The tables of docs/plan.md: what fits v5e chips and what they do, by compiling for them on this
machine.

    pip install 'lsg-flax[plan]'
    python benchmarks/plan_facts.py [--remat full | --generation | --report [CHIP ...]]

The largest batch per chip of RoBERTa-base at 4,096 tokens, with LSG and with full attention, and
one sequence of 1,048,576 tokens over all eight. A compilation takes one to three minutes on 2 CPU
cores, the more the closer to the limit; the whole runs for most of an hour. With --generation, in a
few minutes: what a step of beam search moves with LSG-BART-base.

With --report (`make tpu-report`), in five to fifteen minutes a chip: LSG attention of one layer,
its gradient, and a whole training step, on each chip as it stands in the compiled program. Beside
attention runs JAX's splash attention with the same pattern as one mask over tokens,
representatives and global tokens: it selects none, and has no rows for the global tokens.

Axes: B batch, T tokens, N heads, H head width.
"""

import argparse
import functools
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import SingleDeviceSharding

from lsg_flax import LSGConfig, lsg_attention
from lsg_flax.chips import parse_topology
from lsg_flax.models import Remat
from lsg_flax.planning import Plan, PlanSettings, largest_batch, plan
from lsg_flax.planning.hlo import ProgramReport, read_program
from lsg_flax.topologies import devices_of, environment_for

CONFIGS = pathlib.Path(__file__).parent / "configs"
CONFIG = str(CONFIGS / "roberta-base.json")
COMMON = {"source": CONFIG, "topology": "v5e:2x4", "task": "sequence_classification"}
FIRST = {"none": 4, "dots": 6, "full": 16}  # rows per chip, where the search begins
GIB = 2**30
# Eight documents of 4,096 tokens, four beams each, on one chip.
GENERATION = {
    "source": str(CONFIGS / "bart-base.json"),
    "topology": "v5e:1x1",
    "mode": "generate",
    "batch_size": 8,
    "num_beams": 4,
    "param_dtype": "bfloat16",
}

# One chip to attend on, four to train on; an attention's rows are those of a chip in training.
REPORTED = {
    "v5e": ("v5e:1x1", "v5e:2x2"),
    "v5p": ("v5p:2x2x1", "v5p:2x2x1"),
    "v6e": ("v6e:1x1", "v6e:2x2"),
}
ROWS, HEADS, WIDTH, TILE = 4, 12, 64, 512
PATTERN = LSGConfig(block_size=128, sparse_block_size=128, sparsity_factor=2, sparsity_type="norm")


def shown(found: Plan) -> str:
    """Cells: memory per chip, the least step time and XLA's own estimate, the compile time."""
    took = f"{found.compile_seconds:.0f} s"
    if not found.fits:
        return f"at least {found.needed / GIB:.2f} GiB: does not fit | | | {took}"
    bound, own = (1e3 * seconds for seconds in (found.roofline or 0.0, found.times["compiler"]))
    return f"{found.needed / GIB:.2f} GiB | {bound:,.0f} ms | {own:,.0f} ms | {took}"


def generation() -> None:
    """Prints what a step of beam search moves, by the number of tokens that are written."""
    columns = ["new tokens", "weights", "encoder's keys and values", "cache of the beams"]
    columns += ["together, MB", "a step moves, MB", "of these", "memory", "a step takes at least"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for count in (64, 128, 256):
        found = plan(PlanSettings(**GENERATION, max_new_tokens=count))
        assert found.generation and found.program and found.roofline
        reads, moved = found.generation.reads, found.program.bytes
        sizes = (reads.weights, reads.cross_cache, reads.self_cache, reads.total, moved)
        cells = [f"{count}", *(f"{size / 1e6:,.0f}" for size in sizes)]
        cells += [f"{moved / reads.total:.2f} x", f"{found.needed / GIB:.2f} GiB"]
        print(f"| {' | '.join(cells)} | {1e3 * found.roofline:.2f} ms |", flush=True)


def splash_mask(tokens: int) -> np.ndarray:
    """What each of the tokens sees of tokens, representatives and a global one, [T, keys], in whole
    tiles: its block and its neighbours, and the representatives of the next blocks but one on
    either side, as far as `sparse_block_size` of them reach."""
    block, factor = PATTERN.block_size, PATTERN.sparsity_factor
    reach = 1 + PATTERN.sparse_block_size * factor // block
    own = np.arange(tokens)[:, None] // block
    away = np.abs(own - np.arange(tokens) // block)
    chosen = np.abs(own - np.arange(0, tokens, factor) // block)
    seen = [away <= 1, (chosen > 1) & (chosen <= reach), np.ones((tokens, 1), bool)]
    mask = np.concatenate(seen, axis=1)
    return np.pad(mask, ((0, 0), (0, -mask.shape[1] % TILE)))


def gradient_of(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Forward and backward pass, for a cotangent that comes last."""

    def run(*arguments: jax.Array) -> Any:
        context, pull = jax.vjp(attend, *arguments[:-1])
        return context, pull(arguments[-1])

    return run


def attentions(chip: str, tokens: int) -> None:
    """Prints the rows of attention, in a process that is started for the chip."""
    device = devices_of(parse_topology(REPORTED[chip][0]))[0]

    def arrays(*lengths: int, heads_first: bool = False) -> list[jax.ShapeDtypeStruct]:
        shapes = [(HEADS, n, WIDTH) if heads_first else (n, HEADS, WIDTH) for n in lengths]
        place = SingleDeviceSharding(device)
        return [jax.ShapeDtypeStruct((ROWS, *s), jnp.bfloat16, sharding=place) for s in shapes]

    lsg = functools.partial(lsg_attention, config=PATTERN)
    report(chip, "LSG attention, forward", lsg, arrays(*[tokens + 1] * 3))
    report(chip, "with its gradient", gradient_of(lsg), arrays(*[tokens + 1] * 4))
    mask = splash_mask(tokens)
    # The backward kernels of q apart, as in the fused one gradients of q are summed in main memory.
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash_attention.BlockSizes(**{f"block_{name}": TILE for name in names})
    heads = splash_attention.MultiHeadMask([splash_attention.NumpyMask(mask)] * HEADS)
    kernel = splash_attention.make_splash_mha_single_device(mask=heads, block_sizes=sizes)
    keys = mask.shape[1]
    given = arrays(tokens, keys, keys, tokens, heads_first=True)
    report(chip, "splash attention, forward", jax.vmap(kernel), given[:3])
    report(chip, "with its gradient", gradient_of(jax.vmap(kernel)), given)


def report(chip: str, what: str, function: Callable[..., Any], arguments: list[Any]) -> None:
    """Compiles a function, and prints its row."""
    lowered, start = jax.jit(function).lower(*arguments), time.perf_counter()
    compiled = lowered.compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    print_row(
        chip, what, read_program(compiled.as_text()), memory.peak_memory_in_bytes - kept, seconds
    )


def print_row(
    chip: str, what: str, program: ProgramReport, temporaries: int, seconds: float
) -> None:
    """Prints a row of the report."""
    cells = [chip, what, f"{program.flops / 1e12:.3f}", f"{program.bytes / 1e9:.3f}"]
    cells += [f"{temporaries / 1e6:,.0f}", f"{program.cycles / 1e6:,.1f}"]
    counts = (program.sorts, program.gathers, program.scatters)
    cells += [f"{count:,}" for count in (*counts, program.kernels, program.unknown_kernels)]
    print(f"| {' | '.join(cells)} | {seconds:.0f} s |", flush=True)


def reports(chips: list[str], tokens: int) -> None:
    """Prints what the compilers of these chips make of attention, and of a training step."""
    columns = ["chip", "what", "TFLOP", "moved, GB", "temporaries, MB", "XLA's cycles, M", "sorts"]
    columns += ["gathers", "scatters", "kernels", "of unknown work", "compile time"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for chip in chips:
        where = parse_topology(REPORTED[chip][0])
        command = [sys.executable, __file__, "--attentions", chip, "--tokens", f"{tokens}"]
        subprocess.run(command, env=environment_for(where), check=True)
        step = COMMON | {"topology": REPORTED[chip][1], "max_length": tokens}
        found = plan(PlanSettings(**step, batch_size=4 * ROWS))
        if found.program is None:
            raise RuntimeError(f"the step does not fit {chip}: {found.refusal}")
        temporaries, seconds = found.memory.temporaries, found.compile_seconds
        print_row(chip, "training step", found.program, temporaries, seconds)


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remat", choices=get_args(Remat), help="this one only")
    parser.add_argument("--generation", action="store_true", help="the table of generation")
    parser.add_argument("--report", nargs="*", choices=REPORTED, metavar="CHIP", help="its table")
    parser.add_argument("--tokens", type=int, default=4096, help="of the report's rows")
    parser.add_argument("--attentions", choices=REPORTED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generation:
        return generation()
    if arguments.attentions:
        return attentions(arguments.attentions, arguments.tokens)
    if arguments.report is not None:
        return reports(arguments.report or list(REPORTED), arguments.tokens)
    chosen = arguments.remat
    policies = [chosen] if chosen else list(get_args(Remat))
    head = "memory per chip | a step takes at least | XLA's own estimate | compile time |"
    print(f"| attention | remat | largest batch per chip | {head}\n|---|---|---|---|---|---|---|")
    for remat in policies:
        for attention in ("lsg", "full"):
            first = PlanSettings(
                **COMMON,
                max_length=4096,
                batch_size=8 * FIRST[remat],
                attention=attention,
                remat=remat,
            )
            best, _ = largest_batch(plan(first), plan, max_compiles=12)
            cells = "none |" if best is None else f"{best.settings.batch_size // 8} | {shown(best)}"
            print(f"| {attention} | {remat} | {cells} |", flush=True)
    print(f"\n| one sequence of 1,048,576 tokens, remat | {head}\n|---|---|---|---|---|")
    for remat in policies:
        long = {"max_length": 2**20, "batch_size": 1, "mesh": {"sequence": 8}, "remat": remat}
        print(f"| {remat} | {shown(plan(PlanSettings(**COMMON, **long)))} |", flush=True)


if __name__ == "__main__":
    main()
