"""Measures real tokens per second of training on texts of 200 to 2,000 tokens: padded to 4,096,
padded to buckets of lengths, and packed into rows of 4,096 with several texts each.

    python benchmarks/packing.py

All steps have the same number of positions, 4,096. A step of each shape is timed in turn; the time
of a pass over the texts follows from the number of steps of each shape.
"""

import argparse
import collections
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.data import Packing, pack_rows
from lsg_flax.models import EncoderConfig
from lsg_flax.training import init_state, make_optimizer, make_train_step

ROW, BUCKETS = 4096, (512, 1024, 2048, 4096)
TASKS = {"classification": "sequence_classification", "masked_lm": "masked_lm"}


def make_model(arguments: argparse.Namespace) -> lsg_flax.Model:
    """A BERT of a few layers with LSG attention."""
    config = EncoderConfig(
        vocab_size=8192,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        intermediate_size=4 * arguments.width,
        max_position_embeddings=ROW,
        lsg=LSGConfig(block_size=arguments.block, sparse_block_size=arguments.block),
    )
    return lsg_flax.Model(config, TASKS[arguments.task])


def padded(model: lsg_flax.Model, length: int) -> dict[str, np.ndarray]:
    """A batch of ROW places, in rows of a length; what they hold changes no time."""
    rows = ROW // length
    ids = np.random.default_rng(0).integers(5, 8192, (rows, length)).astype(np.int32)
    labels = ids if model.task == "masked_lm" else np.zeros(rows, np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}


def packed(model: lsg_flax.Model, packing: Packing, lengths, texts) -> dict[str, np.ndarray]:
    """The batch of one row that these texts share, -1 for none."""
    batch = padded(model, ROW)
    segments, begin = np.zeros((1, ROW), np.int32), 0
    for number, length in enumerate(lengths[texts[texts >= 0]].tolist(), 1):
        segments[0, begin : begin + length] = number
        begin += int(packing.room(np.int64(length)))
    if model.task != "masked_lm":
        batch["labels"] = np.where(texts < 0, -100, 0).astype(np.int32)[None]
    return batch | {"segment_ids": segments, "segment_rows": texts[None].astype(np.int32)}


def seconds_of_steps(model, batches: dict[str, dict], repeats: int) -> dict[str, float]:
    """The median time of a training step on each batch, taken in turn."""
    optimizer = make_optimizer(1e-4, total_steps=1000)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    state, step = (
        init_state(params, optimizer, jax.random.key(1)),
        make_train_step(model, optimizer),
    )
    times = collections.defaultdict(list)
    for turn in range(repeats + 1):
        for name, batch in batches.items():
            start = time.perf_counter()
            state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
            metrics["loss"].block_until_ready()
            if turn:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Times the steps and prints the three ways beside each other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--task", choices=TASKS, default="classification")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    lengths = np.random.default_rng(0).integers(200, 2001, arguments.texts)
    packing, model = Packing(ROW, arguments.block), make_model(arguments)
    rows = pack_rows(lengths, packing)
    fullest = rows[np.argmax((rows >= 0).sum(axis=1))]
    found = np.array(BUCKETS)[np.searchsorted(BUCKETS, lengths)]
    steps = {  # of a pass over the texts, by shape
        "padded to 4,096": {f"{ROW}": len(lengths)},
        "buckets": {f"{n}": -(-int((found == n).sum()) * n // ROW) for n in np.unique(found)},
        "packed": {"packed": len(rows)},
    }
    batches = {name: padded(model, int(name)) for part in [*steps.values()][:2] for name in part}
    batches["packed"] = packed(model, packing, lengths, fullest)
    seconds = seconds_of_steps(model, batches, arguments.repeats)

    print(
        f"{len(lengths):,} texts of {lengths.min()} to {lengths.max():,} tokens, {jax.devices()[0]}"
    )
    sizes = f"{arguments.layers} layers of {arguments.width}, blocks of {arguments.block}"
    print(f"{arguments.task}, {sizes}")
    print(f"at most {rows.shape[1]} texts in a row; seconds of a step: {seconds}")
    speeds = {}
    for name, part in steps.items():
        taken = sum(count * seconds[shape] for shape, count in part.items())
        share = lengths.sum() / (sum(part.values()) * ROW)
        speeds[name] = lengths.sum() / taken
        print(
            f"{name:16} {sum(part.values()):5} steps, {share:4.0%} of places real, "
            f"{speeds[name]:8,.0f} real tokens/s"
        )
    for name in ("padded to 4,096", "buckets"):
        print(f"packed is {speeds['packed'] / speeds[name]:.2f} x {name}")


if __name__ == "__main__":
    main()
