"""Times lsg_flax beside the PyTorch reference on this machine: same weights, same tokens, in turn,
in one run.

    make bench            # or: python benchmarks/vs_reference.py --reference-python PATH

For each length and each of forward and training step (AdamW, BERT's own dropout of 0.1; at 4,096
tokens also without), a PyTorch process and lsg_flax processes (LSG, and the same model with full
attention) stay alive side by side and are timed in turn, so that a slow moment of the machine hits
all of them. Full attention trains up to 4,096 tokens only. Memory is the process's peak resident
size after compilation and warm-up. Prints a table; writes docs/vs_reference.{json,png}.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile

from plots import Panel, save_picture
from workers import ask, serve, start, turn

MODEL = {
    "vocab_size": 8192, "hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12,
    "intermediate_size": 3072, "block_size": 128, "sparse_block_size": 128, "sparsity_factor": 2,
    "sparsity_type": "norm", "base_model_prefix": "lsg", "model_type": "bert",
}  # fmt: skip
LABELS = {
    "reference": "PyTorch LSG (reference)",
    "lsg_flax": "lsg_flax, LSG",
    "full attention": "lsg_flax, full attention",
}
RIVALS = tuple(LABELS)
LONGEST_FULL_TRAINING = 4096  # beyond, one step takes minutes
DROPOUT = 0.1


def flax_step(folder: str, mode: str, length: int, *, full: bool, dropout: float):
    """A function that runs one step of lsg_flax and returns a number to compare."""
    import jax
    import numpy as np
    import optax

    import lsg_flax
    from lsg_flax.models import Model

    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model, params = lsg_flax.from_pretrained(folder, **rates)
    if full:
        model = Model(model.config.with_overrides(lsg=None))
        params["encoder"]["embeddings"].pop("global_embeddings")
    ids, mask = tokens(length, np)

    @jax.jit
    def forward(params):
        return model.apply({"params": params}, ids, mask).last_hidden_state

    optimizer = optax.adamw(1e-5)

    def loss(params, key):
        out = model.apply({"params": params}, ids, mask, train=dropout > 0, rngs={"dropout": key})
        return (out.last_hidden_state**2).mean()

    def train(params, state, key):
        key, used = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(params, used)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, key, value

    if mode == "forward":
        return lambda: float(abs(np.asarray(forward(params))).mean())
    carry = [params, optimizer.init(params), jax.random.key(0)]
    compiled = jax.jit(train, donate_argnums=(0, 1, 2))

    def step():
        *carry[:], value = compiled(*carry)
        return float(value)

    return step


def torch_step(folder: str, mode: str, length: int, *, dropout: float):
    """The same with the reference."""
    import numpy as np
    import torch
    from lsg_converter.bert.modeling_lsg_bert import LSGBertModel

    torch.set_num_threads(os.cpu_count() or 1)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = LSGBertModel.from_pretrained(folder, **rates).train(mode == "train" and dropout > 0)
    ids, mask = (torch.tensor(x) for x in tokens(length, np))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def forward():
        with torch.no_grad():
            return float(model(ids, mask).last_hidden_state.abs().mean())

    def train():
        optimizer.zero_grad()
        value = (model(ids, mask).last_hidden_state ** 2).mean()
        value.backward()
        optimizer.step()
        return float(value)

    return forward if mode == "forward" else train


def tokens(length: int, np):
    """The ids and mask that every rival gets."""
    ids = np.random.default_rng(length).integers(5, MODEL["vocab_size"], (1, length))
    return ids, np.ones_like(ids)


def work(rival: str, folder: str, mode: str, length: int, dropout: float) -> None:
    """A rival's process: warms up, then runs one step for each line on standard input."""
    if rival == "reference":
        step = torch_step(folder, mode, length, dropout=dropout)
    else:
        step = flax_step(folder, mode, length, full=rival == "full attention", dropout=dropout)
    values = [step()]
    if rival != "full attention":  # its step is long, and once is enough to compile
        step()
    serve(step, {"value": values[0]})


def compare(
    pythons: dict[str, str], folder: str, mode: str, length: int, repeats: int, dropout: float
):
    """Seconds and MiB of every rival for one length and mode."""
    too_long = mode == "train" and length > LONGEST_FULL_TRAINING
    rivals = [rival for rival in RIVALS if not (rival == "full attention" and too_long)]
    processes = {
        rival: start(pythons[rival], __file__, rival, folder, mode, length, dropout)
        for rival in rivals
    }
    try:
        values = {rival: ask(process)["value"] for rival, process in processes.items()}
        if not dropout and abs(values["reference"] / values["lsg_flax"] - 1) > 1e-4:
            raise AssertionError(f"the rivals compute different things: {values}")
        runs: dict[str, list[dict]] = {rival: [] for rival in rivals}
        for repeat in range(repeats):
            for rival, process in processes.items():
                if rival == "full attention" and repeat:  # slow, and for scale only
                    continue
                runs[rival].append(turn(process))
    finally:
        for process in processes.values():
            process.kill()
    return {
        rival: {
            "seconds": statistics.median(run["seconds"] for run in of_rival),
            "mib": max(run["mib"] for run in of_rival),
        }
        for rival, of_rival in runs.items()
    }


def make_checkpoint(folder: str, longest: int, fields: dict) -> None:
    """Random weights that both sides load; `fields` of config.json."""
    import jax

    import lsg_flax
    from lsg_flax.models import Model, read_config

    model = Model(read_config(fields | {"max_position_embeddings": longest}))
    params = model.init(jax.random.key(0), **model.example_inputs())["params"]
    lsg_flax.save_pretrained(folder, model, params)


def report(rows: list[dict], target: pathlib.Path) -> None:
    """Table, JSON and plot."""
    header = f"{'mode':8}{'tokens':>7}{'dropout':>8} |" + "".join(f"{r:>16}" for r in RIVALS)
    print(f"\n{header} s | time ratio | memory ratio   (lsg_flax / reference)")
    for row in rows:
        seconds = "".join(
            f"{row[rival]['seconds']:16.2f}" if rival in row else f"{'-':>16}" for rival in RIVALS
        )
        ours, theirs = row["lsg_flax"], row["reference"]
        print(
            f"{row['mode']:8}{row['tokens']:7d}{row['dropout']:8.1f} |{seconds}   |"
            f" {ours['seconds'] / theirs['seconds']:10.2f} | {ours['mib'] / theirs['mib']:8.2f}"
            f"   ({ours['mib']:.0f} / {theirs['mib']:.0f} MiB)"
        )
    for mode in ("forward", "train"):
        drawn = drawn_rows(rows, mode)
        by_length = {row["tokens"]: row["lsg_flax"]["seconds"] for row in drawn}
        if {4096, 8192} <= by_length.keys():
            print(f"{mode}: 8,192 tokens cost {by_length[8192] / by_length[4096]:.2f} x 4,096")
    plot(rows, target / "vs_reference.png")


def drawn_rows(rows: list[dict], mode: str) -> list[dict]:
    """The rows of a mode that belong to one curve over lengths."""
    return [
        row for row in rows if row["mode"] == mode and bool(row["dropout"]) == (mode == "train")
    ]


def plot(rows: list[dict], file: pathlib.Path) -> None:
    """Seconds over length, forward and training step."""
    panels = []
    for mode, title in (("forward", "forward"), ("train", "training step")):
        drawn = drawn_rows(rows, mode)
        curves = {
            rival: [(row["tokens"], row[rival]["seconds"]) for row in drawn if rival in row]
            for rival in RIVALS
        }
        panels.append(Panel(title, "seconds", curves))
    save_picture(file, "4 layers, 768 wide, batch 1, float32, CPU", panels, LABELS)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference-python", default=".venv-reference/bin/python")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--modes", nargs="+", default=["forward", "train"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs"))
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rival, folder, mode, length, dropout = options.worker
        work(rival, folder, mode, int(length), float(dropout))
        return
    pythons = dict.fromkeys(RIVALS, sys.executable) | {"reference": options.reference_python}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, max(options.lengths), MODEL)
        dropouts = {"forward": 0.0, "train": DROPOUT}
        cases = [
            (mode, length, dropouts[mode]) for mode in options.modes for length in options.lengths
        ]
        if "train" in options.modes and 4096 in options.lengths:
            cases.append(("train", 4096, 0.0))
        for mode, length, dropout in cases:
            print(f"{mode}, {length} tokens, dropout {dropout} ...", flush=True)
            result = compare(pythons, folder, mode, length, options.repeats, dropout)
            rows.append({"mode": mode, "tokens": length, "dropout": dropout} | result)
            options.output.mkdir(exist_ok=True)  # kept as it goes: the long lengths take minutes
            (options.output / "vs_reference.json").write_text(json.dumps(rows, indent=1) + "\n")
    report(rows, options.output)


if __name__ == "__main__":
    main()
