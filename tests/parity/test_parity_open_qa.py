"""Open-domain question answering, live: PyTorch's RealmForOpenQA made anew and read here, written
here and read by PyTorch."""

import os
import pathlib
import subprocess

import numpy as np
import pytest
from test_open_qa import assert_recorded

from lsg_flax.open_qa import OpenQA, build_index, open_records

RECORDER = pathlib.Path(__file__).resolve().parents[1] / "reference" / "record_open_qa.py"


def answers_of(folder: pathlib.Path, *options: str | pathlib.Path) -> dict[str, np.ndarray]:
    """What the reference answers."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["LSG_REFERENCE_PYTHON"], RECORDER, "--out", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "answers.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_qa") / "torch"
    return folder, answers_of(folder, "--seed", "11")


def test_answers_to_pytorchs_questions(made):
    folder, found = made
    qa = OpenQA.from_pretrained(folder)
    for number in range(7):
        assert_recorded(qa, found, number)


@pytest.mark.parametrize("way", ("saved", "indexed"))
def test_pytorch_answers_from_our_folders(made, tmp_path, way):
    """Nothing is missing there and nothing left over, which the recorder asserts."""
    folder, ours = made[0], tmp_path / way
    if way == "saved":
        OpenQA.from_pretrained(folder).save_pretrained(ours)
    else:
        build_index(folder, open_records(folder), ours, progress=False)
    found, qa = answers_of(tmp_path / "answers", "--model", ours), OpenQA.from_pretrained(ours)
    for number in range(7):
        assert_recorded(qa, found, number)
    changed = [n for n in made[1] if not np.array_equal(made[1][n], found[n])]
    assert bool(changed) == (way == "indexed")
