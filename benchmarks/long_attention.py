"""Compares language models of bytes that differ in their attention: the cost of a training step by
length, and how well they predict after the same budget.

    python benchmarks/long_attention.py [--lengths 1024 4096] [--rivals LSG full] [--output docs]

All are causal, 4 layers, 128 wide, 4 heads of 32, feed-forward parts of as many weights, float32,
no dropout, and one text at a time. Full, LSG and local attention are one BERT-like decoder; local
is LSG without its sparse tokens. A token of these sees all before it, or those of its block of 128
and the block before, and of LSG 128 representatives of the 512 tokens before those.
LocalTransformer has the same windows in a body of its own. Reformer has layers of local and of LSH
attention in turn, chunks of 128 of which a token sees its own and the one before, in LSH layers of
tokens sorted by one round of hashing; its positions are axial, and its layers reversible.

The cost is that of a loss with the gradients of all parameters. Each rival has a process of its
own, and those of a length take turns. A rival whose first run, compilation included, takes longer
than --limit seconds is stopped, and not tried on longer texts. Memory is the process's peak
resident size after warm-up.

Then each trains alone on the texts of examples/enwik8.py, until it has had both budgets, that of
tokens and that of seconds (without compilation and measuring), at a constant learning rate after
some warm-up. Bits per byte are those of held-out texts, every twentieth. Prints a table; writes
long_attention.{json,png}.
"""

import argparse
import functools
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
from plots import Curves, Panel, save_picture
from workers import ask, serve, start, stop, turn

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
from enwik8_data import read_bytes, stretches

SIZES = {
    "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
BLOCK = 128
RIVALS = {name: name for name in ("full", "LSG", "local", "LocalTransformer", "Reformer")}
RATE, WARM_UP = 1e-3, 10  # of learning; steps
HELD_OUT, MARKS = 4, 6  # texts; how often it is measured in the time there is
SLOW = 10.0  # seconds of a step, beyond which it is run once


def make_model(rival: str, length: int):
    """The rival that reads so many tokens, a power of two."""
    from lsg_flax import EncoderConfig, LSGConfig, Model
    from lsg_flax.models import LocalTransformerConfig, ReformerConfig

    sizes = SIZES | {"max_position_embeddings": length}
    width, head = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    mlp = {"intermediate_size": 4 * width}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "is_decoder": True}
    bert = functools.partial(EncoderConfig, **sizes, **mlp, **plain, type_vocab_size=1)
    match rival:
        case "full":
            config = bert()
        case "LSG":
            pattern = LSGConfig(block_size=BLOCK, sparse_block_size=BLOCK, sparsity_factor=4)
            config = bert(lsg=pattern)
        case "local":
            config = bert(lsg=LSGConfig(block_size=BLOCK, sparsity_type="none"))
        case "LocalTransformer":
            window = {"local_attn_window_size": BLOCK, "exact_windowsize": False}
            config = LocalTransformerConfig(
                **sizes, **window, dim_head=head, num_residual_streams=1
            )
        case _:
            layers = ("local", "lsh") * (sizes.pop("num_hidden_layers") // 2)
            rows = 2 ** (length.bit_length() // 2)
            config = ReformerConfig(
                **sizes, **mlp, **plain,
                attn_layers=layers,
                attention_head_size=head,
                local_attn_chunk_length=BLOCK,
                lsh_attn_chunk_length=BLOCK,
                axial_pos_shape=(rows, length // rows),
                axial_pos_embds_dim=(width // 2, width // 2),
                axial_norm_std=0.02,  # as the other tables
            )  # fmt: skip
    return Model(config, "causal_lm")


def make_params(model):
    """Weights drawn from a seed."""
    import jax

    return jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]


def cost_step(rival: str, length: int):
    """A function that computes a loss with its gradients and returns the loss."""
    import jax

    from lsg_flax import training

    model, batch = make_model(rival, length), stretches(read_bytes(None)[0], length, (1,), seed=0)
    params = make_params(model)

    def loss(params, batch):
        return training.loss_fn(model, params, batch, jax.random.key(1))[0]

    compiled = jax.jit(jax.value_and_grad(loss))
    return lambda: float(jax.block_until_ready(compiled(params, batch))[0])


def train(rival: str, length: int, budget: dict[str, float]) -> list[dict[str, float]]:
    """Bits per held-out byte, by the tokens and seconds of training before."""
    import jax

    from lsg_flax import training

    model, (text, held_out) = make_model(rival, length), read_bytes(None)
    schedule = {"total_steps": 2**30, "warmup_steps": WARM_UP, "schedule": "constant"}
    optimizer = training.make_optimizer(RATE, **schedule)
    state = training.init_state(make_params(model), optimizer, jax.random.key(1))
    step = training.make_train_step(model, optimizer)
    step = step.lower(state, stretches(text, length, (1,), seed=0)).compile()
    asked = stretches(held_out, length, (HELD_OUT,), seed=0)
    loss = jax.jit(lambda params: training.loss_fn(model, params, asked)[0])
    marks: list[dict[str, float]] = []
    had = {"tokens": 0, "seconds": 0.0}
    due = [("seconds", budget["seconds"] * part / MARKS) for part in range(MARKS + 1)]
    due.append(("tokens", budget["tokens"]))
    while True:
        left = [(what, amount) for what, amount in due if had[what] < amount]
        if len(left) < len(due):
            marks.append(had | {"bits": float(loss(state.params) / np.log(2))})
        if not (due := left):
            return marks
        batch = stretches(text, length, (1,), seed=had["tokens"])
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        passed = time.perf_counter() - began
        had = {"tokens": had["tokens"] + length, "seconds": had["seconds"] + passed}


def work(what: str, rival: str, length: str, *numbers: str) -> None:
    """A rival's process: it trains, or warms up and then runs once for each line on standard
    input."""
    if what == "train":
        budget = dict(zip(("tokens", "seconds"), map(float, numbers), strict=True))
        print(json.dumps({"marks": train(rival, int(length), budget)}))
        return
    signal.alarm(int(numbers[0]))  # which ends the process
    step = cost_step(rival, int(length))
    first = {"value": step()}
    signal.alarm(0)
    serve(step, first)


def measure_cost(
    rivals: list[str], length: int, limit: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds and MiB of each rival that keeps to the limit."""
    processes: dict[str, subprocess.Popen] = {}
    try:
        for rival in rivals:
            process = start(sys.executable, __file__, "cost", rival, length, limit)
            processes[rival] = process
            try:
                ask(process)
            except RuntimeError:
                if process.wait() != -signal.SIGALRM:
                    raise
                stop(processes.pop(rival))
        runs = {rival: [turn(process)] for rival, process in processes.items()}
        for _ in range(repeats - 1):
            for rival, of_rival in runs.items():
                if of_rival[0]["seconds"] < SLOW:
                    of_rival.append(turn(processes[rival]))
    finally:
        for process in processes.values():
            stop(process)
    return {
        rival: {
            "seconds": statistics.median(run["seconds"] for run in of_rival),
            "mib": max(run["mib"] for run in of_rival),
        }
        for rival, of_rival in runs.items()
    }


def measure_training(rival: str, length: int, tokens: int, seconds: float) -> list[dict]:
    """What `train` finds, in a process of its own."""
    process = start(sys.executable, __file__, "train", rival, length, tokens, seconds)
    try:
        return ask(process)["marks"]
    finally:
        stop(process)


def after(marks: list[dict], budget: str, amount: float) -> dict[str, float]:
    """The measurement that came when so much of a budget had been used."""
    return next(mark for mark in marks if mark[budget] >= amount)


def report(found: dict, limit: int) -> None:
    """The tables, as Markdown."""
    rivals, lengths = list(found["training"]), found["cost"]
    print(f"\n| tokens | {' | '.join(rivals)} |\n|{'---|' * (len(rivals) + 1)}")
    for length, costs in lengths.items():
        cells = [
            f"{costs[rival]['seconds']:.2f} s, {costs[rival]['mib']:,.0f} MiB"
            if rival in costs
            else f"over {limit} s"
            for rival in rivals
        ]
        print(f"| {length:,} | {' | '.join(cells)} |")
    print(f"\n| bits per byte after | {' | '.join(rivals)} |\n|{'---|' * (len(rivals) + 1)}")
    for budget, other in (("tokens", "seconds"), ("seconds", "tokens")):
        amount = found[budget]
        marks = [after(found["training"][rival], budget, amount) for rival in rivals]
        cells = [f"{mark['bits']:.2f} ({mark[other]:,.0f} {other})" for mark in marks]
        print(f"| {amount:,.0f} {budget} | {' | '.join(cells)} |")


def draw(found: dict, file: pathlib.Path) -> None:
    """The picture."""
    rivals = list(found["training"])

    def by_length(key: str) -> Curves:
        costs = found["cost"].items()
        return {r: [(n, of[r][key]) for n, of in costs if r in of] for r in rivals}

    learned = {
        rival: [(mark["seconds"], mark["bits"]) for mark in marks]
        for rival, marks in found["training"].items()
    }
    panels = [
        Panel("a loss with its gradients", "seconds", by_length("seconds")),
        Panel("peak memory", "MiB", by_length("mib")),
        Panel(
            f"training on {found['length']:,} tokens", "bits per byte", learned, "seconds", False
        ),
    ]
    save_picture(file, "4 layers, 128 wide, batch 1, float32, CPU", panels, RIVALS)


def main(arguments: list[str] | None = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=[*RIVALS])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 17)])
    parser.add_argument("--limit", type=int, default=60, help="seconds that a first run may take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--training-length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=300_000, help="to train on")
    parser.add_argument("--seconds", type=float, default=150, help="to train for")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs"))
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(*options.worker)
        return
    cost, quick = {}, list(options.rivals)
    for length in options.lengths:
        print(f"{length} tokens ...", flush=True)
        cost[length] = measure_cost(quick, length, options.limit, options.repeats)
        quick = [rival for rival in quick if rival in cost[length]]
    training = {}
    for rival in options.rivals:
        print(f"{rival} trains ...", flush=True)
        budget = options.training_length, options.tokens, options.seconds
        training[rival] = measure_training(rival, *budget)
    names = ("length", "tokens", "seconds")
    found = dict(zip(names, budget, strict=True)) | {"cost": cost, "training": training}
    (options.output / "long_attention.json").write_text(json.dumps(found, indent=1) + "\n")
    report(found, options.limit)
    draw(found, options.output / "long_attention.png")


if __name__ == "__main__":
    main()
