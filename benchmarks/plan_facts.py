"""Makes the tables of docs/plan.md: what fits v5e chips and what a step costs there, by compiling
for them on this machine.

    pip install 'lsg-flax[plan]'
    python benchmarks/plan_facts.py [--remat full | --generation]

The largest batch per chip of RoBERTa-base at 4,096 tokens, with LSG and with full attention, and
one sequence of 1,048,576 tokens over all eight. A compilation takes one to three minutes on 2 CPU
cores, and longer near the limit; everything takes most of an hour. --generation instead measures
what a step of beam search moves with LSG-BART-base, in a few minutes.
"""

import argparse
import pathlib
from typing import get_args

from lsg_flax.models import Remat
from lsg_flax.planning import Plan, PlanSettings, largest_batch, plan

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


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remat", choices=get_args(Remat), help="this one only")
    parser.add_argument("--generation", action="store_true", help="the table of generation")
    arguments = parser.parse_args()
    if arguments.generation:
        return generation()
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
