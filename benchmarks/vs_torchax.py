"""Times lsg_flax beside the PyTorch reference run by torchax, in one process: the same weights,
tokens and compiler, forward and with the gradients of all parameters.

    make torchax      # or, by its Python: .venv-torchax/bin/python benchmarks/vs_torchax.py
    PYTHONPATH=.libtpu .venv-torchax/bin/python benchmarks/vs_torchax.py --chip v5e

The reference is lsg-converter's LSGBertModel as it stands, without dropout, which is its faster
setting; 768 wide, one row of tokens, float32. Before anything is timed, the outputs must agree
within 1e-4 and each gradient within 1e-4 of the largest. Then the two compiled programs run in
turn, so that a slow moment of the machine hits both: medians, and the median of the ratios of
neighbouring runs. Temporaries are those that the compiled program allocates.

With --chip both are compiled for one TPU instead, with 4 rows, in bfloat16, and nothing runs. XLA's
cycles count sorts, gathers, scatters and kernels as 0.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tpu_programs import TOPOLOGIES, compile_for, measure_apart
from vs_reference import MODEL, make_checkpoint

TOLERANCE, ROWS_OF_CHIP = 1e-4, 4
RIVALS = ("torchax", "lsg_flax")
MODES = ("forward", "gradient")
Function = Callable[..., Any]
Side = tuple[Any, Function]  # weights, and what makes last hidden states of (weights, ids, mask)


def torchax_side(folder: str, dtype: str) -> Side:
    """The reference by torchax."""
    import torch
    import torchax
    from lsg_converter.bert.modeling_lsg_bert import LSGBertModel

    model = LSGBertModel.from_pretrained(folder).eval().to(getattr(torch, dtype))
    states, run = torchax.extract_jax(model)
    fixed = {name: x for name, x in states.items() if not jnp.issubdtype(x.dtype, jnp.floating)}

    def apply(weights, ids, mask):
        return run(weights | fixed, (ids, mask))["last_hidden_state"]

    return {name: x for name, x in states.items() if name not in fixed}, apply


def flax_side(folder: str, dtype: str) -> tuple[Side, Callable[[Any], dict[str, np.ndarray]]]:
    """lsg_flax, and a function that gives its gradients PyTorch's names."""
    import lsg_flax
    from lsg_flax.convert_from_torch import params_to_torch

    model, params = lsg_flax.from_pretrained(folder, dtype=jnp.dtype(dtype))
    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def apply(weights, ids, mask):
        return model.apply({"params": weights}, ids, mask).last_hidden_state

    return (params, apply), functools.partial(params_to_torch, model=model)


def with_mode(apply: Function, mode: str) -> Function:
    """The states, or the gradients of the mean of their cubes by all weights."""

    def loss(*arguments):
        return (apply(*arguments).astype(jnp.float32) ** 3).mean()

    return jax.grad(loss) if mode == "gradient" else apply


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> float:
    """The largest of arrays by their names, relative to the largest number of `theirs`.

    Raises:
        AssertionError: if names or numbers differ.
    """
    if theirs.keys() != ours.keys():
        raise AssertionError(f"only one rival has {sorted(theirs.keys() ^ ours.keys())}")
    largest = max(float(np.abs(x).max()) for x in theirs.values())
    apart = max(float(np.abs(np.asarray(theirs[n]) - ours[n]).max()) for n in theirs) / largest
    if not apart < TOLERANCE:
        raise AssertionError(f"the rivals differ by {apart:.1e} of the largest number")
    return apart


def turns(programs: dict[str, Function], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, run in turn."""
    seconds: dict[str, list[float]] = {rival: [] for rival in programs}
    for _ in range(repeats):
        for rival, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[rival].append(time.perf_counter() - start)
    return seconds


def compare(folder: str, length: int, mode: str, repeats: int) -> str:
    """A row of the table, after a look at the numbers."""
    sides = {"torchax": torchax_side(folder, "float32")}
    sides["lsg_flax"], named = flax_side(folder, "float32")
    ids = np.random.default_rng(length).integers(5, MODEL["vocab_size"], (1, length))
    given = ids, np.ones_like(ids)
    compiled = {
        rival: jax.jit(with_mode(apply, mode)).lower(weights, *given).compile()
        for rival, (weights, apply) in sides.items()
    }
    programs = {
        rival: functools.partial(program, sides[rival][0], *given)
        for rival, program in compiled.items()
    }
    theirs, ours = (programs[rival]() for rival in RIVALS)
    if mode == "forward":
        apart = difference({"states": theirs}, {"states": np.asarray(ours)})
    else:
        apart = difference(theirs, named(ours))
    seconds = turns(programs, repeats)
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    old, new = (statistics.median(x) for x in seconds.values())
    sizes = [compiled[rival].memory_analysis().temp_size_in_bytes / 1e6 for rival in RIVALS]
    cells = [f"{length:,}", mode, f"{old:.2f} s", f"{new:.2f} s", f"{ratio:.2f} x"]
    cells += [*(f"{size:,.0f} MB" for size in sizes), f"{sizes[1] / sizes[0]:.2f} x"]
    return f"| {' | '.join(cells)} | {apart:.0e} |"


def compile_one(chip: str, rival: str, mode: str, folder: str, length: str) -> dict[str, float]:
    """Compiles in this process, which was started for it."""
    side = torchax_side if rival == "torchax" else (lambda *given: flax_side(*given)[0])
    weights, apply = side(folder, "bfloat16")
    ids = jax.ShapeDtypeStruct((ROWS_OF_CHIP, int(length)), jnp.int32)
    return compile_for(chip, with_mode(apply, mode), [weights, ids, ids])


def compare_compiled(folder: str, length: int, mode: str, chip: str) -> str:
    """Rows of the table of a chip."""
    rows = []
    for rival in RIVALS:
        given = (chip, rival, mode, folder, length)
        found = measure_apart(__file__, *given, python=sys.executable)
        counts = ", ".join(f"{found[name]:,}" for name in ("sort", "gather", "scatter"))
        cells = [f"{length:,}", mode, rival, f"{found['gigabytes']:.2f}"]
        cells += [f"{found['temporaries']:,.0f}", f"{found['xla_cycles'] / 1e6:,.1f}", counts]
        rows.append(f"| {' | '.join(cells)} | {found['kernels']} | {found['seconds']:.0f} s |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=MODEL["hidden_size"], help="heads have 64")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chip", choices=TOPOLOGIES, help="compile for it instead")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # with libtpu at hand it would look for a TPU
    if options.one:
        print(json.dumps(compile_one(*options.one)))
        return
    columns = ["tokens", "what", "torchax", "lsg_flax", "time", "temporaries of torchax"]
    columns += ["of lsg_flax", "temporaries", "largest difference"]
    if options.chip:
        columns = ["tokens", "what", "rival", "moved, GB", "temporaries, MB", "XLA's cycles, M"]
        columns += ["sorts, gathers, scatters", "kernels", "compile time"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    sizes = {"num_hidden_layers": options.layers, "hidden_size": options.width}
    sizes |= {"num_attention_heads": options.width // 64, "intermediate_size": 4 * options.width}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, max(options.lengths), MODEL | sizes)
        for length in options.lengths:
            for mode in options.modes:
                if options.chip:
                    print(compare_compiled(folder, length, mode, options.chip), flush=True)
                else:
                    print(compare(folder, length, mode, options.repeats), flush=True)


if __name__ == "__main__":
    main()
