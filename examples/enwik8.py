"""Trains a LocalTransformer on bytes as lucidrains' script for local-attention does, and writes.

    python examples/enwik8.py --data enwik8.gz          # the script's sizes: 100,000 steps
    python examples/enwik8.py --small [--reformer]      # minutes on 2 CPU cores; or a Reformer

The script's settings: 90 million bytes of enwik8 to train on and 5 million to validate on, random
stretches, batches of 4 in 4 microbatches, Adam at 2e-4, gradients clipped to a norm of 0.5. Without
a file the bytes are those of Python's sources and, if aclsum is installed, of its papers. Every
twentieth text is held out.

Measured with --small --steps 450, in 13 minutes on 2 CPU cores that others used too: 2.33 bits per
byte in stretches of 256 bytes. zlib compresses the held-out text to 2.31, lzma to 2.03. A model
that beats these must be larger, and trained for longer.
"""

import argparse
import lzma
import pathlib
import time
import zlib

import jax
import numpy as np
import optax
from enwik8_data import read_bytes, stretches

from lsg_flax import Model, training
from lsg_flax.generation import generate
from lsg_flax.models import read_config

BYTES = {"model_type": "local-transformer", "num_tokens": 256}
SCRIPT = {"dim": 512, "depth": 6, "local_attn_window_size": 256, "max_seq_len": 2048}
SCRIPT |= {"use_dynamic_pos_bias": True}
SMALL = {"dim": 128, "depth": 4, "heads": 4, "dim_head": 32, "local_attn_window_size": 64}
SMALL |= {"max_seq_len": 256, "use_dynamic_pos_bias": True}
REFORMER = {"model_type": "reformer", "vocab_size": 256, "is_decoder": True, "num_hashes": 2}
REFORMER |= dict.fromkeys(("hidden_dropout_prob", "lsh_attention_probs_dropout_prob"), 0.0)
REFORMER |= {"local_attention_probs_dropout_prob": 0.0, "axial_pos_shape": (32, 64)}
REFORMER |= {"hidden_size": 512, "feed_forward_size": 2048, "axial_pos_embds_dim": (256, 256)}
REFORMER |= {"num_attention_heads": 8, "max_position_embeddings": 2048, "num_buckets": 64}
LITTLE = {"hidden_size": 128, "feed_forward_size": 512, "axial_pos_embds_dim": (64, 64)}
LITTLE |= {"num_attention_heads": 4, "attention_head_size": 32, "axial_pos_shape": (16, 16)}
LITTLE |= {"attn_layers": ("local", "lsh") * 2, "max_position_embeddings": 256, "num_buckets": 8}
ROWS, MICROBATCHES, PRIME = 4, 4, 128


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints and returns bits per byte of the held-out text, also of general compressors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, help="enwik8.gz, or another file")
    parser.add_argument("--small", action="store_true", help="a small model that reads 256 bytes")
    parser.add_argument("--reformer", action="store_true", help="train a Reformer instead")
    parser.add_argument("--steps", type=int, help="100,000 by default, with --small 300")
    parser.add_argument("--rate", type=float, help="2e-4 by default, with --small 2e-3")
    parser.add_argument("--written", type=int, default=512, help="bytes to write at the end")
    options = parser.parse_args(arguments)
    steps = options.steps or (300 if options.small else 100_000)
    if options.reformer:  # trained on as many bytes as its positions have rows and columns
        config = read_config(REFORMER | (LITTLE if options.small else {}))
    else:
        config = read_config(BYTES | (SMALL if options.small else SCRIPT))
    model = Model(config, "causal_lm")
    length = model.max_length + (not options.reformer)  # the last one is a label alone
    train, held = read_bytes(options.data)
    checked = stretches(held, length, (16, ROWS), seed=0)
    checked = [({n: x[i] for n, x in checked.items()}, np.arange(ROWS)) for i in range(16)]

    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    rate = options.rate or (2e-3 if options.small else 2e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate))
    state = training.init_state(params, optimizer, jax.random.key(1))
    shape, start = (MICROBATCHES, ROWS), time.perf_counter()
    batches = training.BatchesAt(lambda step: stretches(train, length, shape, seed=step + 1))
    step = training.make_train_step(model, optimizer, MICROBATCHES)
    score = lambda state: training.evaluate(model, state.params, checked)  # noqa: E731
    run = {"steps": steps, "evaluation": training.Evaluation(score, every=max(steps // 5, 1))}
    state, history = training.fit(step, state, batches, **run)
    for record in history:
        if "eval_loss" in record:
            bits = record["eval_loss"] / np.log(2)
            print(f"step {record['step']:6}: {bits:.3f} bits per byte", flush=True)
    kinds = {"zlib": lambda text: zlib.compress(text, 9), "lzma": lzma.compress}
    found = {"model": bits} | {n: 8 * len(f(held.tobytes())) / len(held) for n, f in kinds.items()}
    print(
        f"{time.perf_counter() - start:.0f} s; held-out text of {len(held):,} bytes, bits of each:"
    )
    print(", ".join(f"{name} {value:.2f}" for name, value in found.items()))

    prime = held[:PRIME][None].astype(np.int32)
    sampled = {"do_sample": True, "filter_thres": 0.9, "key": jax.random.key(2)}
    room = options.written if model.rolls else model.max_length - PRIME  # a Reformer's positions
    count = min(options.written, room)
    ids = generate(model, state.params, prime, max_new_tokens=count, **sampled)
    print(bytes(ids[0].astype(np.uint8)).decode(errors="replace"))
    return found


if __name__ == "__main__":
    main()
