"""Fine-tunes summarisation: an LSG-BART learns to write the abstract of a whole paper.

    python examples/finetune_summarization.py
    python examples/finetune_summarization.py --model FOLDER_OR_HUB_ID --learning-rate 8e-5

With a --model that reads 4,096 tokens, such as ccdv/lsg-bart-base-4096, this is the recipe for a
summariser of your own. Without it a small model with random weights is trained on the 100 training
papers of aclsum. That shows only that data, training, evaluation, generation and ROUGE work
together: 100 papers teach nobody English. Its summaries score no better than those of other papers,
and worse than summaries that need no training.
"""

import argparse
import pathlib
import tempfile
from dataclasses import replace

from aclsum_papers import Paper, read_papers
from at_hand import write_jsonl
from small_bart import write_small_bart
from summary_baselines import baselines, show

import lsg_flax
from lsg_flax.training import Settings, finetune

WRITTEN = {"num_beams": 2, "no_repeat_ngram_size": 3}
DEFAULTS: dict[str, int | float] = {
    **{"short_steps": 200, "steps": 40, "batch_size": 4, "max_length": 4096, "target_length": 192},
    **{"train": 100, "validation": 50, "test": 100, "written": 10, "width": 128},
    **{"learning_rate": 3e-3, "seed": 0},
}


def train(options: argparse.Namespace, papers: dict[str, list[Paper]], folder: pathlib.Path):
    """Fine-tunes `options.model` and keeps the best. A small model that is made here learns on the
    beginnings of the papers first, many at once."""
    files = {n: write_jsonl(folder / f"{n}.jsonl", (p.row for p in of)) for n, of in papers.items()}
    model = options.model
    if not model:
        texts = [text for paper in papers["train"] for text in (paper.text, paper.abstract)]
        sizes = {"width": options.width, "length": options.max_length}
        model = str(write_small_bart(folder / "small", texts, **sizes))
        short = {"batch_size": 4 * options.batch_size, "max_length": options.max_length // 8}
        run = run_of(options, model, files["train"], folder / "short", **short)
        model = str(finetune(replace(run, steps=options.short_steps)).output)
    return finetune(
        replace(
            run_of(options, model, files["train"], options.output or folder / "output"),
            eval_data=files["validation"],
            evaluate_every=max(options.steps // 2, 1),
            predict_with_generate=True,  # ROUGE of what it writes, besides the loss
            generation=WRITTEN,
            generation_rows=options.written,
        )
    )


def run_of(options: argparse.Namespace, model: str, data: str, output: pathlib.Path, **sizes):
    """The settings of a run that evaluates nothing."""
    given = ("steps", "batch_size", "max_length", "learning_rate", "seed")
    values = {name: getattr(options, name) for name in given} | sizes
    return Settings(
        model=model,
        task="conditional_generation",
        train_data=data,
        columns={"target": "summary"},
        output=str(output),
        buckets=(values["max_length"],),
        max_target_length=options.target_length,
        target_buckets=(options.target_length,),
        devices=1,
        **values,
    )


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, scores on the test papers beside the baselines, and shows one summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a small one is made by default")
    parser.add_argument("--output", type=pathlib.Path, help="nothing is kept by default")
    for name, value in DEFAULTS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"by default {value}")
    options = parser.parse_args(arguments)
    papers = {n: read_papers(n, getattr(options, n)) for n in ("train", "validation", "test")}
    with tempfile.TemporaryDirectory() as folder:
        result = train(options, papers, pathlib.Path(folder))
        best, reads = str(result.output / "best"), (options.max_length,)
        write = lsg_flax.pipeline("summarization", best, truncation=True, buckets=reads, **WRITTEN)
        answers = write([p.text for p in papers["test"]], max_length=options.target_length)
    written = [answer["summary_text"] for answer in answers]
    kinds = f"LSG-BART after {result.step} steps", "the same, each of another paper"
    summaries = dict(zip(kinds, (written, written[1:] + written[:1]), strict=True))
    scores = show(summaries | baselines(papers["train"], papers["test"]), papers["test"])
    print(f"{papers['test'][0].title}:\n{written[0]}")
    return scores


if __name__ == "__main__":
    main()
