"""Fine-tunes a classifier of long texts: which package of Python's library is a source from?

    python examples/finetune_classification.py [--max-length 256] [--steps 40] [--rows 400]
        [--train-data train.jsonl --eval-data eval.jsonl] [--model FOLDER]

Your own data has a "text" and a "label" (a name or a number) per row. Expected without it, in 4
minutes on 2 busy CPU cores: 96 % of 80 held-out pieces are right (guessing gives 25 %).
"""

import pathlib
import tempfile

from finetune_data import parse, settings_of

import lsg_flax
from lsg_flax.training import Finetuned, finetune

AREAS = ("email", "asyncio", "unittest", "xml")


def pieces(lines: int):
    """Rows of so many lines of source, and the package they are from."""

    def rows(sources):
        for name, text in sources:
            area, source = name.split("/")[0], text.splitlines()
            if area in AREAS:
                for start in range(0, len(source) - lines, lines):
                    yield {"text": "\n".join(source[start : start + lines]), "label": area}

    return rows


def main(arguments: list[str] | None = None) -> Finetuned:
    """Trains, and shows what the best model says of three held-out texts."""
    options = parse(
        __doc__, arguments, max_length=256, steps=40, batch_size=8, learning_rate=2e-4, seed=0
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(
            options,
            pieces(max(options.max_length // 10, 5)),
            pathlib.Path(folder),
            task="sequence_classification",
            best="eval_accuracy",
            evaluate_every=max(options.steps // 2, 1),
        )
        result = finetune(settings)
        print(f"after step {result.step}, with {len(result.model.config.labels)} labels:")
        print(", ".join(f"{name} {value:.3f}" for name, value in result.scores.items()))
        classify = lsg_flax.pipeline("text-classification", str(result.output / "best"))
        texts = ["message['Subject'] = header", "await loop.run_in_executor(None, f)"]
        for text, answer in zip(texts, classify(texts), strict=True):
            print(f"{text!r}: {answer['label']} ({answer['score']:.2f})")
    return result


if __name__ == "__main__":
    main()
