"""Times the fused attention kernels on the GPU of this machine, beside XLA's program of the same
attention and beside cuDNN's flash attention of all tokens to all.

    python benchmarks/gpu_kernels.py [--tokens 4096 16384] [--rows 4] [--json]

12 heads of 64, bfloat16, forward and with all gradients; LSG attention with a global and blocks of
128. The kernels are first compared with XLA's numbers. Times are medians of consecutive calls; all
rows are of one run.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lsg_flax import LSGConfig, lsg_attention

HEADS, WIDTH, CALLS = 12, 64, 20
KINDS = ("pallas", "xla", "cudnn")


def attention(kind: str, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """LSG attention by an implementation, or full attention by cuDNN."""
    if kind == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    implementation = "pallas" if kind == "pallas" else "xla"
    options = {"config": LSGConfig(), "global_tokens": "first_token"}
    return lsg_attention(query, key, value, implementation=implementation, **options)


def with_gradients(kind: str, gradient: jax.Array, *arrays: jax.Array):
    """The context and all gradients."""
    context, transpose = jax.vjp(functools.partial(attention, kind), *arrays)
    return context, transpose(gradient)


def seconds(function: Callable, *arrays: jax.Array) -> float:
    """The median time of a call, compiled before."""
    jax.block_until_ready(function(*arrays))
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(rows: int, tokens: int) -> list[dict[str, float | str]]:
    """A row for each kind of attention."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (rows, tokens, HEADS, WIDTH)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    found, contexts = [], {}
    for kind in KINDS:
        forward = jax.jit(functools.partial(attention, kind))
        both = jax.jit(functools.partial(with_gradients, kind))
        contexts[kind] = both(*arrays)
        times = {"forward": seconds(forward, *arrays[1:]), "both": seconds(both, *arrays)}
        found.append({"tokens": tokens, "kind": kind} | times)
    pairs = zip(*(jax.tree.leaves(contexts[kind]) for kind in KINDS[:2]), strict=True)
    found[0]["largest difference from XLA"] = max(
        float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()) for x, y in pairs
    )
    return found


def main() -> None:
    """Prints a table, or one line of JSON for each row of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    given = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(
            f"jax runs on {jax.default_backend()!r} here, and these kernels are timed on an NVIDIA "
            "GPU; install jax[cuda12] where there is one. What they compile to without one: "
            "make gpu-plan."
        )
    if not given.json:
        print(f"{jax.devices()[0].device_kind}, {given.rows} rows, milliseconds\n")
        print("| tokens | attention | forward | with gradients | largest difference from XLA |")
        print("|---|---|---|---|---|")
    for tokens in given.tokens:
        for row in measure(given.rows, tokens):
            if given.json:
                print(json.dumps(row), flush=True)
                continue
            times = " | ".join(f"{1e3 * float(row[name]):.2f}" for name in ("forward", "both"))
            difference = row.get("largest difference from XLA", "")
            print(f"| {tokens} | {row['kind']} | {times} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
