"""The short examples run as they stand, in a tiny setting. The demo has `make demo`."""

import importlib
import pathlib
import sys

import numpy as np
import pytest
from golden_data import GOLDEN

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:weights for task"),  # heads that are drawn
]


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


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("classification", {"accuracy", "macro_f1"}),
        ("token_classification", {"accuracy", "precision", "recall", "f1"}),
        ("question_answering", {"exact_match", "f1"}),
    ],
)
def test_fine_tuning_examples_train_on_the_standard_library(
    example, capsys, monkeypatch, tmp_path, name, scores
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["--model", str(GOLDEN / "bert_to_convert_512"), "--rows", "20", "--steps", "1"]
    result = example(f"finetune_{name}").main([*arguments, "--max-length", "64"])
    assert result.step == 1 and result.scores.keys() == {f"eval_{s}" for s in {*scores, "loss"}}
    assert np.isfinite(list(result.scores.values())).all()
    assert "after 1 steps" in capsys.readouterr().out


def test_fine_tuning_examples_take_files(example, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "train.csv"
    file.write_text("text,label\nw5 w6,good\nw7 w8,bad\nw9,fair\n")
    arguments = ["--model", str(GOLDEN / "bert_to_convert_512"), "--steps", "1"]
    arguments += ["--train-data", str(file), "--eval-data", str(file), "--max-length", "16"]
    result = example("finetune_classification").main(arguments)
    assert result.model.config.labels == ("bad", "fair", "good")


def test_every_short_example_is_at_most_100_lines():
    files = [f for f in EXAMPLES.glob("*.py") if not f.name.startswith("demo")]
    assert {f.name for f in files} >= {
        "fill_mask.py",
        "train_global_tokens.py",
        "finetune_classification.py",
    }
    for file in files:
        assert len(file.read_text().splitlines()) <= 100, file
