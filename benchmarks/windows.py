"""Times local_attention beside lucidrains' LocalAttention: same arrays, in turn, on this CPU.

    python benchmarks/windows.py --reference-python .venv-reference/bin/python

8 heads of 64, float32, rotary positions; forward, and forward with gradients of query, key, value.
"""

import os
import sys

import numpy as np
from workers import compare, make_parser, serve

HEADS, WIDTH = 8, 64


def jax_step(arrays, window: int, *, causal: bool, gradients: bool):
    """A function that runs lsg_flax once and returns a number to compare."""
    import jax
    import jax.numpy as jnp

    import lsg_flax

    def attend(*x):
        return lsg_flax.local_attention(*x, window_size=window, causal=causal)

    given = [jnp.asarray(x).swapaxes(1, 2) for x in arrays]
    loss = jax.value_and_grad(lambda *x: jnp.square(attend(*x)).sum(), argnums=(0, 1, 2))
    program = jax.jit(loss if gradients else attend)
    return lambda: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(program(*given)))


def torch_step(arrays, window: int, *, causal: bool, gradients: bool):
    """The same with PyTorch."""
    import torch
    from local_attention import LocalAttention

    torch.set_num_threads(os.cpu_count() or 1)
    attend = LocalAttention(window, causal=causal, dim=WIDTH)
    given = [torch.tensor(x, requires_grad=gradients) for x in arrays]

    def run():
        if not gradients:
            with torch.no_grad():
                return float(attend(*given).abs().sum())
        loss = attend(*given).square().sum()
        found = torch.autograd.grad(loss, given)
        return float(loss + sum(x.abs().sum() for x in found))

    return run


def work(rival: str, length: str, window: str, causal: str, gradients: str) -> None:
    """A rival's process: warms up, then runs once for each line on standard input."""
    arrays = np.random.default_rng(0).standard_normal((3, 1, HEADS, int(length), WIDTH))
    options = {"causal": causal == "True", "gradients": gradients == "True"}
    make = torch_step if rival == "PyTorch" else jax_step
    step = make(list(arrays.astype(np.float32)), int(window), **options)
    step()
    serve(step, {"value": step()})


def main() -> None:
    """Runs the comparison and prints it."""
    parser = make_parser(__doc__, 7, 5)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    pythons = {"PyTorch": options.reference_python, "lsg_flax": sys.executable}
    print(
        f"{options.length} tokens, windows of {options.window}, medians of {options.repeats} runs"
    )
    for causal in (False, True):
        for gradients in (False, True):
            sizes = (options.length, options.window, causal, gradients)
            result = compare(__file__, pythons, sizes, options.repeats)
            told = (
                f"{'causal' if causal else 'both sides'}, {'gradients' if gradients else 'forward'}"
            )
            print(f"{told}: {result}", flush=True)


if __name__ == "__main__":
    main()
