"""The tables of docs/plan.md: what fits eight v5e chips, by compiling for them on this machine.

    pip install 'lsg-flax[plan]'
    python benchmarks/plan_facts.py [--remat full]

The largest batch per chip of RoBERTa-base at 4,096 tokens, with LSG and with full attention, and
one sequence of 1,048,576 tokens over all eight. A compilation takes one to three minutes on 2 CPU
cores, the more the closer to the limit; the whole runs for most of an hour.
"""

import argparse
import pathlib
from typing import get_args

from lsg_flax.models import Remat
from lsg_flax.planning import Plan, PlanSettings, largest_batch, plan

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "roberta-base.json")
COMMON = {"source": CONFIG, "topology": "v5e:2x4", "task": "sequence_classification"}
FIRST = {"none": 4, "dots": 6, "full": 16}  # rows per chip, where the search begins
GIB = 2**30


def shown(found: Plan) -> str:
    """Cells: memory per chip, the least step time and XLA's own estimate, the compile time."""
    took = f"{found.compile_seconds:.0f} s"
    if not found.fits:
        return f"at least {found.needed / GIB:.2f} GiB: does not fit | | | {took}"
    bound, own = (1e3 * seconds for seconds in (found.roofline or 0.0, found.times["compiler"]))
    return f"{found.needed / GIB:.2f} GiB | {bound:,.0f} ms | {own:,.0f} ms | {took}"


def main() -> None:
    """Prints both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remat", choices=get_args(Remat), help="this one only")
    chosen = parser.parse_args().remat
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
