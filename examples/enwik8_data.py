"""Reads the bytes of enwik8, or of local texts, and takes random stretches of them."""

import gzip
import pathlib

import numpy as np
from aclsum_papers import read_papers
from at_hand import sources

from lsg_flax.models import Batch

TRAINED, HELD_OUT = 90_000_000, 5_000_000  # bytes of enwik8


def read_bytes(file: pathlib.Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on and the held-out ones."""
    if file is not None:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            text = stream.read(TRAINED + HELD_OUT)
        cut = len(text) * TRAINED // (TRAINED + HELD_OUT)
        return np.frombuffer(text[:cut], np.uint8), np.frombuffer(text[cut:], np.uint8)
    texts = [row["text"] for row in sources()]
    try:
        texts += [paper.text for split in ("train", "test") for paper in read_papers(split)]
    except SystemExit:
        print("without the papers of aclsum, which is not installed: Python's sources alone")
    parts = (texts[1::20], [text for place, text in enumerate(texts) if place % 20 != 1])
    held, train = (np.frombuffer("\n".join(part).encode(), np.uint8) for part in parts)
    return train, held


def stretches(text: np.ndarray, length: int, shape: tuple[int, ...], seed: int) -> Batch:
    """Random stretches of so many bytes, each with the one behind it as its label."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length + 1, (*shape, 1))
    ids = text[starts + np.arange(length)].astype(np.int32)
    return {"input_ids": ids, "labels": ids}
