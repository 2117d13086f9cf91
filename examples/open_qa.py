"""Answers questions on Python's documentation with a REALM that is made from MiniLM.

    python examples/open_qa.py [--steps 200] [--output open_qa_output]

open_qa_data.py makes index and questions, open_qa_start.py the model that training starts from.
Expected, with some 500 s of CPU time: the best 1, 5 and 20 of 898 blocks have the answer for this
share of 183 held-out questions:

    BM25                      40 %   68 %   81 %
    MiniLM's own vectors      36 %   68 %   81 %
    REALM, before training    34 %   64 %   83 %
    REALM, trained            40 %   74 %   91 %   and 15 % of 60 are answered exactly, before none

So the retriever is better than BM25 except for the best block, and the reader has only begun to
learn. The last printed line is a command that asks the resulting folder more questions.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import numpy as np
import optax
from at_hand import minilm
from open_qa_data import corpus
from open_qa_scores import Scores, bm25_scores, hits, measure
from open_qa_start import embedding_head, realm_of, states
from rich.console import Console
from rich.table import Table

from lsg_flax.open_qa import BlockEmbedder, device_search, finetune

RATES = {"embedder": 2e-5, "reader": 1e-4, "reader/head": 1e-3, "frozen": 0.0}


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with a rate for each part; tables of words and places stay as they are."""

    def part(path, _) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        frozen = "_embeddings/" in name
        return "frozen" if frozen else max((p for p in RATES if name.startswith(p)), key=len)

    def adam(rate: float) -> optax.GradientTransformation:
        rates = optax.warmup_cosine_decay_schedule(0.0, rate, max(steps // 10, 1), steps + 1)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates))

    parts = {name: adam(rate) if rate else optax.set_to_zero() for name, rate in RATES.items()}
    return optax.multi_transform(parts, lambda p: jax.tree_util.tree_map_with_path(part, p))


def main(arguments: list[str] | None = None) -> dict[str, Scores]:
    """Runs all; prints and returns the table: hits at 1, 5 and 20, exact match."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="folder of a BERT; MiniLM by default")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("open_qa_output"))
    parser.add_argument("--blocks", type=int, default=1000, help="of the corpus, at most")
    parser.add_argument("--steps", type=int, default=200, help="with one question each")
    parser.add_argument("--asked", type=int, default=60, help="held-out questions to answer")
    parser.add_argument("--refresh-every", type=int, help="steps; a thread embeds blocks again")
    options = parser.parse_args(arguments)
    begun, source = time.perf_counter(), options.model or minilm()

    blocks, questions = corpus(options.blocks)
    known, held = ([q for q in questions if q.held_out is part] for part in (False, True))
    print(f"{len(blocks)} blocks; questions: {len(known)} to train on, {len(held)} held out")
    first, mean = states(source, [*blocks, *(q.text for q in known), *(q.text for q in held)])
    rows = {"BM25": hits(bm25_scores(blocks, [q.text for q in held]), held)}
    rows["MiniLM's own vectors"] = hits(mean[-len(held) :] @ mean[: len(blocks)].T, held)
    qa = realm_of(source, embedding_head(first[: -len(held)], mean[: -len(held)]), blocks)
    rows["REALM, before training"] = measure(qa, held, options.asked)

    print(f"{options.steps} steps", flush=True)
    order, steps = np.random.default_rng(0).permutation(len(known)), options.steps
    examples = [(known[i].text, [known[i].answer]) for i in order]
    run = {"steps": steps, "refresh_every": options.refresh_every}
    qa, losses = finetune(qa, examples, make_optimizer(steps), **run)
    quarters = np.array_split(losses, min(4, len(losses)))
    print("mean losses of each quarter:", *(f"{np.mean(part):.2f}" for part in quarters))
    embeddings = BlockEmbedder(qa.embedder, qa.params["embedder"], qa.tokenizer)(blocks)
    qa = dataclasses.replace(qa, embeddings=embeddings, search=device_search(embeddings))
    qa.save_pretrained(options.output)
    rows["REALM, trained"] = measure(qa, held, options.asked)

    table = Table("", "hits at 1", "5", "20", "exact match", title="Held-out questions")
    for name, scores in rows.items():
        table.add_row(name, *(f"{100 * score:.0f} %" for score in scores))
    Console().print(table)
    for question in held[:: max(len(held) // 4, 1)]:
        answer, score, _, text = qa.answer(question.text)
        print(f"{question.text}\n  {answer} ({score:.1f}; right: {question.answer})\n  {text:.90}")
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes. Ask on:")
    print(f'lsg-flax ask {options.output} "What is it: wake up waiting threads?"')
    return rows


if __name__ == "__main__":
    main()
