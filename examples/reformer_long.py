"""Runs one sequence of 65,536 tokens through a reversible Reformer, forward and backward.

    python examples/reformer_long.py [--tokens 65536] [--layers 2 12] [--width 64]
    PYTHONPATH=.libtpu python examples/reformer_long.py --topology v5e:1x1

Measures a quarter of the tokens and all of them, each in a process of its own. A layer's inputs are
computed back from its outputs, so memory does not grow with depth. The second command compiles for
a TPU that the machine does not have; `make tpu` installs what it needs.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import pathlib
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from enwik8_data import read_bytes, stretches

MIB = 2**20


def config_of(tokens: int, layers: int, width: int) -> dict[str, Any]:
    """config.json of a Reformer whose positions are a grid, a square where tokens are one."""
    rows = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    config = {"model_type": "reformer", "architectures": ["ReformerModelWithLMHead"]}
    config |= {"is_decoder": True, "attn_layers": ["local", "lsh"] * (layers // 2)}
    config |= {"vocab_size": 256, "hidden_size": width, "feed_forward_size": 4 * width}
    config |= {"num_attention_heads": 2, "attention_head_size": width // 2}
    config |= {"max_position_embeddings": tokens, "axial_pos_shape": [rows, tokens // rows]}
    return config | {"axial_pos_embds_dim": [width // 4, width - width // 4]}


def measure(tokens: int, layers: int, width: int) -> dict[str, float]:
    """Loss, seconds of its gradients and MiB, of the program's temporaries and of this process."""
    import jax

    from lsg_flax import Model, models, training

    model = Model(models.read_config(config_of(tokens, layers, width)), "causal_lm")
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    batch = stretches(read_bytes(None)[0], tokens, (1,), seed=0)

    def loss(params):
        return training.loss_fn(model, params, batch, jax.random.key(1))[0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    began = time.perf_counter()
    value, _ = jax.block_until_ready(compiled(params))
    seconds = time.perf_counter() - began
    temporaries = compiled.memory_analysis().temp_size_in_bytes / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"loss": float(value), "seconds": seconds, "temporaries": temporaries, "peak": peak}


def plan(tokens: int, layers: int, width: int, topology: str) -> dict[str, float]:
    """MiB of a training step's temporaries on a chip, and the least milliseconds that it takes."""
    from lsg_flax import planning

    with tempfile.TemporaryDirectory() as folder:
        config = json.dumps(config_of(tokens, layers, width))
        pathlib.Path(folder, "config.json").write_text(config)
        settings = planning.PlanSettings(folder, topology, max_length=tokens, batch_size=1)
        found = planning.plan(settings)
    if not found.fits:
        raise SystemExit(f"{layers} layers do not fit: {found.refusal}")
    least = 1e3 * (found.roofline or math.nan)
    return {"temporaries": found.memory.temporaries / MIB, "all": found.needed / MIB, "ms": least}


def main(arguments: list[str] | None = None) -> dict[tuple[int, int], dict[str, float]]:
    """Prints a table; returns its numbers by tokens and layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 12])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--topology", help="compile for it instead of running, such as v5e:1x1")
    options = parser.parse_args(arguments)
    lengths = [options.tokens] if options.topology else [options.tokens // 4, options.tokens]
    found: dict[tuple[int, int], dict[str, float]] = {}
    for tokens, layers in itertools.product(lengths, options.layers):
        size = (tokens, layers, options.width)
        if options.topology:
            row = plan(*size, options.topology)
        else:  # a peak is that of a process
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(measure, *size).result()
        found[tokens, layers] = row
        told = ", ".join(f"{name} {value:,.2f}" for name, value in row.items())
        print(f"{tokens:,} tokens, {layers} layers: {told}", flush=True)
    return found


if __name__ == "__main__":
    main()
