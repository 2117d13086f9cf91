"""Reads the data that tests/reference/record_golden.py recorded from the PyTorch reference."""

import functools
import json
import pathlib
from typing import Any

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    return json.loads((GOLDEN / "golden.json").read_text())


def cases(kind: str, prefix: str = "") -> list[str]:
    return [
        name
        for name, case in manifest().items()
        if case["kind"] == kind and name.startswith(prefix)
    ]


@functools.cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / file) as archive:
        return dict(archive)


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The case, its inputs and its outputs."""
    case = manifest()[name]
    stored = _arrays(case["file"])
    return case, *(
        {key: stored[place] for key, place in case[part].items()} for part in ("inputs", "outputs")
    )


def lsh_rotations(*shape: int) -> np.ndarray:
    """The rotations that the recorder put in place of the reference's random ones: a function of
    [heads, width, buckets // 2]."""
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)
