"""Reads whole papers and their abstracts: the 250 papers of aclsum, from the ACL Anthology.

    pip install --no-deps aclsum==0.1.2    # MIT licence; its one dependency is not needed here

A paper's text is the body that Grobid found in its PDF, one paragraph per line, without headings,
tables, references and abstract. It has 1,600 to 19,000 words (4,394 at the median), an abstract 121
(median). In about ten papers the introduction repeats sentences of the abstract.
"""

import json
from typing import Any, NamedTuple

from at_hand import package_folder

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # 100, 50 and 100 papers


class Paper(NamedTuple):
    """A paper by its name in the Anthology, such as P14-1130."""

    name: str
    title: str
    text: str
    abstract: str

    @property
    def row(self) -> dict[str, str]:
        """A line of JSONL, as `lsg-flax train` and `lsg-flax summarize` read it."""
        return {"id": self.name, "text": self.text, "summary": self.abstract}


def read_papers(split: str, count: int | None = None) -> list[Paper]:
    """The first `count` papers of a split, all of them by default.

    Raises:
        ValueError: for another split.
        SystemExit: if aclsum is not installed.
    """
    names = [line["id"] for line in _lines(split, count)]
    folder = package_folder("aclsum", "aclsum==0.1.2") / "dataset"
    parsed = ((folder / "paper_jsons" / f"{name}.json").read_text("utf-8") for name in names)
    return [_paper(name, json.loads(text)) for name, text in zip(names, parsed, strict=True)]


def _lines(split: str, count: int | None) -> list[dict[str, Any]]:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    folder = package_folder("aclsum", "aclsum==0.1.2") / "dataset"
    lines = (folder / f"{SPLITS[split]}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def read_summaries(split: str, count: int | None = None) -> list[list[str]]:
    """Of each of these papers what people wrote of its challenge, its approach and its outcome, a
    sentence each; raises as `read_papers`."""
    return [[*line["summary"].values()] for line in _lines(split, count)]


def _paper(name: str, parsed: dict[str, Any]) -> Paper:
    paragraphs = (_one_line(part["text"]) for part in parsed["pdf_parse"]["body_text"])
    text = "\n".join(paragraph for paragraph in paragraphs if paragraph)
    return Paper(name, _one_line(parsed["title"]), text, _one_line(parsed["abstract"]))


def _one_line(text: str) -> str:
    return " ".join(text.split())
