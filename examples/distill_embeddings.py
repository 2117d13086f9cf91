"""A dense embedder teaches its LSG conversion, so that long texts have vectors in its space.

    python examples/distill_embeddings.py [--steps 120] [--papers 20] [--folder FOLDER]

Prints how near student and teacher are on held-out texts of at most 512 tokens, and how well
people's sentences on whole papers (of aclsum) find these: by averaged parts of 512 tokens, by the
conversion, by the student. With --folder a stopped run resumes.
"""

import argparse
import pathlib
import tempfile

import numpy as np
from aclsum_papers import read_papers, read_summaries
from at_hand import minilm, write_jsonl

import lsg_flax
from lsg_flax import training
from lsg_flax.pipelines import Embedder
from lsg_flax.training import Finetuned, Settings

LONGEST, PART = 4096, 512  # tokens of a paper, and of what the teacher reads


def texts(split: str, count: int, *, long: int) -> list[dict[str, str]]:
    """Of each paper a title, an abstract and a stretch of up to 160 words; of the first `long` ones
    a stretch of 700 words too."""
    generator, rows = np.random.default_rng(0), []
    for number, paper in enumerate(read_papers(split, count)):
        words = paper.text.split()
        sizes = [int(generator.integers(10, 160)), *([700] if number < long else [])]
        starts = [int(generator.integers(max(len(words) - size, 1))) for size in sizes]
        rows += [paper.title, paper.abstract]
        rows += [" ".join(words[a : a + size]) for a, size in zip(starts, sizes, strict=True)]
    return [{"text": text} for text in rows]


def averaged_parts(teacher: Embedder, papers: list[str]) -> np.ndarray:
    """Vectors of papers as means of those of their parts."""
    means = []
    for text in papers:
        ids = teacher.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:LONGEST]
        size = teacher.max_length - 2
        parts = [teacher.tokenizer.decode(ids[i : i + size]) for i in range(0, len(ids), size)]
        means.append(teacher.embed(parts, progress=False).mean(axis=0))
    return np.stack(means)


def compare(readers: dict[str, Embedder], count: int) -> dict[str, dict[str, float]]:
    """The scores of retrieval by reader among test papers, of which the first one reads parts."""
    papers = [paper.text for paper in read_papers("test", count)]
    queries = [(text, i) for i, of in enumerate(read_summaries("test", count)) for text in of]
    found = {}
    for name, reader in readers.items():
        asked = reader.embed([text for text, _ in queries], progress=False)
        whole = averaged_parts(reader, papers) if not found else reader.embed(papers, batch_size=1)
        found[name] = training.retrieval_scores(asked, whole, [[p] for _, p in queries], scale=20.0)
        print(name, {score: round(value, 3) for score, value in found[name].items()}, flush=True)
    return found


def main(arguments: list[str] | None = None) -> tuple[float, Finetuned, dict]:
    """Trains and compares; returns the cosine before, the run, and the scores of retrieval."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default=str(minilm()))
    parser.add_argument("--folder", type=pathlib.Path)
    for name, value in {"steps": 120, "papers": 20, "texts": 100, "length": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary)
        lsg, few = folder / "lsg", options.texts // 5
        if not (lsg / "config.json").exists():
            lsg_flax.convert_checkpoint(options.teacher, lsg, max_sequence_length=LONGEST)
        taught = {"task": "embedding", "teacher": options.teacher, "cache": str(folder / "cache")}
        taught |= {"teacher_length": PART, "max_length": options.length, "batch_size": 16}
        taught |= {"buckets": (64, 256, options.length)}
        held = write_jsonl(folder / "held.jsonl", texts("test", few, long=0))
        train = write_jsonl(folder / "train.jsonl", texts("train", options.texts, long=few))
        before = training.evaluate_files(Settings.for_data(model=str(lsg), data=held, **taught))
        print(f"cosine with the teacher before: {before.scores['cosine']:.4f}", flush=True)
        taught |= {"model": str(lsg), "output": str(folder / "student"), "learning_rate": 1e-4}
        taught |= {"steps": options.steps, "evaluate_every": options.steps, "accumulate": 2}
        # Batches of long texts have larger gradients, after which short texts would get worse.
        taught["max_grad_norm"] = 0.05
        result = training.finetune(Settings(**taught, train_data=train, eval_data=held))
        print(f"after step {result.step}: {result.scores['eval_cosine']:.4f}", flush=True)
        read = Embedder.from_pretrained
        readers = {
            f"teacher, parts of {PART}, averaged": read(options.teacher, max_length=PART),
            "LSG, converted, whole": read(lsg),
            "LSG, taught, whole": read(folder / "student", max_length=LONGEST),
        }
        compared = compare(readers, options.papers) if options.papers else {}
        return before.scores["cosine"], result, compared


if __name__ == "__main__":
    main()
