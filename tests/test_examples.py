"""The short examples run as they stand, in a tiny setting. The demo has `make demo`."""

import importlib
import pathlib
import sys

import numpy as np
import pytest
from golden_data import GOLDEN

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def test_fill_mask_learns_its_sentences_and_converts(example, capsys):
    words = example("fill_mask").main(["--steps", "120"])
    assert words[0]["token_str"] == "capital"
    assert words[0]["sequence"] == "paris is the capital of france."
    assert "a toy model, 120 steps on 12 sentences" in capsys.readouterr().out


def test_fill_mask_takes_a_checkpoint(example):
    source = str(GOLDEN / "bert_to_convert_512")
    words = example("fill_mask").main(["--checkpoint", source, "--text", "w5 [MASK] w7 [MASK]"])
    assert [len(place) for place in words] == [5, 5]


def test_training_global_tokens_moves_the_held_out_loss(example, capsys):
    arguments = ["--checkpoint", str(GOLDEN / "bert_to_convert_512"), "--steps", "2"]
    loss = example("train_global_tokens").main([*arguments, "--length", "64"])
    assert np.isfinite([loss["before"], loss["after"]]).all() and loss["before"] != loss["after"]
    assert "right" in capsys.readouterr().out


def test_every_short_example_is_at_most_100_lines():
    files = [f for f in EXAMPLES.glob("*.py") if not f.name.startswith("demo")]
    assert {f.name for f in files} >= {"fill_mask.py", "train_global_tokens.py"}
    for file in files:
        assert len(file.read_text().splitlines()) <= 100, file
