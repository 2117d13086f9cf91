"""The demo's task: which sentences of a scientific paper tell its challenge, approach and outcome?

    pip install --no-deps aclsum==0.1.2    # MIT licence; its one dependency is not needed here

People marked such sentences in the abstract, introduction and conclusion of 250 papers of the ACL
Anthology. These have 1,137 tokens (median of the training papers) and some 40 sentences together. A
model reads a paper, and a sentence has the class whose logit, averaged over the sentence's tokens,
is the highest. A model of 512 tokens reads the first 512 of a paper, or one part after another.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from at_hand import package_folder

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # 100, 50 and 100 papers
CLASSES = ("challenge", "approach", "outcome")
LABELS = ("none", *CLASSES)
SECTIONS = ("abstract", "introduction", "conclusion")
HEADING = -1  # in place of a label


class Sentence(NamedTuple):
    """Its words, and its place in LABELS, or HEADING."""

    words: list[str]
    label: int


class Part(NamedTuple):
    """Neighbouring sentences of a paper that are read together."""

    paper: int
    sentences: Sequence[Sentence]

    @property
    def labels(self) -> np.ndarray:
        """The labels of its sentences, [S]."""
        return np.array([sentence.label for sentence in self.sentences])


def read_papers(split: str, count: int | None = None) -> list[list[Sentence]]:
    """The first `count` papers of a split. A sentence with several marks has the first class of
    CLASSES among them."""
    folder = package_folder("aclsum", "aclsum==0.1.2") / "dataset"
    lines = (folder / f"{SPLITS[split]}.jsonl").read_text("utf-8").splitlines()
    return [_paper(json.loads(line)) for line in lines[:count]]


def _paper(record: dict[str, Any]) -> list[Sentence]:
    sentences = []
    for section in SECTIONS:
        sentences.append(Sentence([section.capitalize()], HEADING))
        for place, text in enumerate(record["sentences"][section]):
            marks = [record["highlights"][name][section][place] for name in CLASSES]
            if words := text.split():
                sentences.append(Sentence(words, 1 + marks.index(1) if 1 in marks else 0))
    return sentences


def parts_of(papers: Sequence[list[Sentence]], tokenizer: Any, limit: int) -> Iterator[Part]:
    """Papers cut between sentences into parts that fit `limit` tokens with [CLS] and [SEP]."""
    for number, paper in enumerate(papers):
        texts = [" ".join(sentence.words) for sentence in paper]
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
        taken, used = [], 2
        for sentence, length in zip(paper, lengths, strict=True):
            if taken and used + length > limit:
                yield Part(number, taken)
                taken, used = [], 2
            taken.append(sentence)
            used += length
        yield Part(number, taken)


def first_parts(parts: Sequence[Part]) -> list[Part]:
    """The first part of each paper."""
    return list({part.paper: part for part in reversed(parts)}.values())[::-1]


def scores(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """F1 of each of CLASSES and their mean, `macro_f1`, from the labels [S] of sentences."""
    of_class = {}
    for number, name in enumerate(CLASSES, start=1):
        hits = ((found == number) & (truth == number)).sum()
        of_class[name] = float(2 * hits / max((found == number).sum() + (truth == number).sum(), 1))
    return {"macro_f1": float(np.mean([*of_class.values()]))} | of_class
