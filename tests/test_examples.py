"""The short examples run as they stand, in a tiny setting. The demo: test_demo.py."""

import glob
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import compiling
import nbformat
import numpy as np
import pytest
from golden_data import GOLDEN
from nbclient import NotebookClient

import lsg_flax
from lsg_flax import LSGConfig, cli, hub

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:weights for task"),  # heads that are drawn
]


def test_attention_patterns_are_drawn_as_the_attention_computes_them(script, tmp_path):
    module = script("attention_patterns")
    module.main(["--tokens", "48", "--output", str(tmp_path / "patterns.png")])
    assert (tmp_path / "patterns.png").read_bytes().startswith(b"\x89PNG")
    kinds = module.seen(LSGConfig(block_size=8, sparsity_type="none", num_global_tokens=2), 48)
    assert (kinds[:2] == 3).all() and (kinds[:, :2] == 3).all()
    assert [set(row) for row in (kinds[10, 2:26], kinds[10, 26:])] == [{2}, {0}]


def test_fill_mask_learns_its_sentences_and_converts(script, capsys):
    words = script("fill_mask").main(["--steps", "120"])
    assert words[0]["token_str"] == "capital"
    assert words[0]["sequence"] == "paris is the capital of france."
    assert "a toy model, 120 steps on 12 sentences" in capsys.readouterr().out


def test_fill_mask_takes_a_checkpoint(script):
    source = str(GOLDEN / "bert_to_convert_512")
    words = script("fill_mask").main(["--checkpoint", source, "--text", "w5 [MASK] w7 [MASK]"])
    assert [len(place) for place in words] == [5, 5]


def test_training_global_tokens_moves_the_held_out_loss(script, capsys):
    arguments = ["--checkpoint", str(GOLDEN / "bert_to_convert_512"), "--steps", "2"]
    loss = script("train_global_tokens").main([*arguments, "--length", "64"])
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
    script, capsys, monkeypatch, tmp_path, name, scores
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["--model", str(GOLDEN / "bert_to_convert_512"), "--rows", "20", "--steps", "1"]
    result = script(f"finetune_{name}").main([*arguments, "--max-length", "64"])
    assert result.step == 1 and result.scores.keys() == {f"eval_{s}" for s in {*scores, "loss"}}
    assert np.isfinite(list(result.scores.values())).all()
    assert "after step 1" in capsys.readouterr().out


def test_fine_tuning_examples_take_files(script, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "train.csv"
    file.write_text("text,label\nw5 w6,good\nw7 w8,bad\nw9,fair\n")
    arguments = ["--model", str(GOLDEN / "bert_to_convert_512"), "--steps", "1"]
    arguments += ["--train-data", str(file), "--eval-data", str(file), "--max-length", "16"]
    result = script("finetune_classification").main(arguments)
    assert result.model.config.labels == ("bad", "fair", "good")


def test_questions_of_the_documentation_find_their_blocks_and_an_index_is_left(
    script, capsys, tmp_path
):
    arguments = ["--model", str(GOLDEN / "bert_to_convert_512"), "--output", str(tmp_path / "qa")]
    arguments += ["--blocks", "24", "--steps", "3", "--asked", "2"]
    rows = script("open_qa").main(arguments)
    assert [len(scores) for scores in rows.values()] == [3, 3, 4, 4]
    assert all(one <= five <= twenty for one, five, twenty, *_ in rows.values())
    assert rows["BM25"][1] > 0.8 > rows["BM25"][0]
    asked = capsys.readouterr().out.splitlines()[-1].split(" ", 3)
    assert asked[:3] == ["lsg-flax", "ask", str(tmp_path / "qa")]
    assert cli.main([*asked[1:3], asked[3].strip('"')]) in (None, 0)
    assert json.loads(capsys.readouterr().out)["text"]


def test_the_documentation_has_blocks_of_one_place_and_one_for_each_question(script):
    blocks, questions = script("open_qa_data").corpus(60)
    assert len(blocks) == 60 and len({q.answer for q in questions}) == len(questions)
    for question in questions:
        block, asked = blocks[question.block], question.text.removeprefix("What is it: ")
        assert question.answer in block and asked.rstrip("?") not in block
        assert [other for other in blocks if f"{question.answer}(" in other][:1] in ([block], [])


@pytest.mark.parametrize("flags", [[], ["--reformer"]], ids=str)
def test_bytes_are_learned_and_written(script, capsys, tmp_path, flags):
    """Of a file a nineteenth is held out; compressors are told beside it."""
    file = tmp_path / "bytes"
    file.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    arguments = ["--data", str(file), "--small", "--steps", "4", "--written", "8", *flags]
    found = script("enwik8").main(arguments)
    out = capsys.readouterr().out
    assert found.keys() == {"model", "zlib", "lzma"} and found["zlib"] < 2
    bits = [float(line.split()[2]) for line in out.splitlines() if line.startswith("step ")]
    assert len(bits) == 4 and 8.5 > bits[0] > bits[-1] > 0
    assert "the quick brown fox jumps over the lazy dog." in out


NOTEBOOK = EXAMPLES / "long_classifier.ipynb"
SMALL = """
MAX_LENGTH, STEPS, BATCH_SIZE = 512, 1, 2
MOST_DOCUMENTS = {"train": 4, "held_out": 2}
"""


def test_the_notebook_runs_as_it_stands(tmp_path, monkeypatch):
    """On one CPU device, with small numbers behind its cell of sizes, and without installing."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (sizes,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    sizes.source += SMALL
    monkeypatch.setenv("XLA_FLAGS", compiling.xla_flags(1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), *sys.path]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # installing anything fails
    monkeypatch.chdir(tmp_path)
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
    said = {
        cell.id: "".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert said["parameters"].startswith("1 x cpu, float32, ")
    assert "reads 512 tokens" in said["convert"] and "train: 4 documents" in said["documents"]
    assert "after step 1: {'eval_loss'" in said["finetune"] and "answered: [{" in said["predict"]
    (picture,) = next(c.outputs for c in notebook.cells if c.id == "picture")
    assert "image/png" in picture.data
    exported = tmp_path / "long_classifier" / "for_pytorch"
    assert "classifier.weight" in said["export"]
    assert lsg_flax.pipeline("text-classification", str(exported))("import email")[0]["label"]


@pytest.mark.parametrize(
    ("devices", "build"),
    [
        (["/dev/vfio/0"], "jax[tpu]"),
        (["/dev/accel0"], "jax[tpu]"),
        (["/dev/nvidia0"], "jax[cuda12]"),
        ([], "jax"),
    ],
)
@pytest.mark.parametrize("source", ["clone", "wheel", "PyPI"])
def test_the_notebook_installs_what_its_device_needs(tmp_path, monkeypatch, devices, build, source):
    ran = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(glob, "glob", lambda pattern: [d for d in devices if fnmatch(d, pattern)])
    monkeypatch.chdir(EXAMPLES if source == "clone" else tmp_path)
    wheel = tmp_path / "lsg_flax-9.0-py3-none-any.whl"
    places = {"clone": EXAMPLES.parent, "wheel": wheel}
    if source == "wheel":
        wheel.touch()
    run_install_cell(monkeypatch, lambda command: ran.append(command) or True)
    where = f" @ {places[source].resolve().as_uri()}" if source in places else ""
    ((option, _, *packages),) = ran
    assert option == "--constraint" and packages == [build, f"lsg-flax[plots]{where}"]


def run_install_cell(monkeypatch, pip):
    """Runs the notebook's first cell; `pip` gets what pip would install and says if it succeeds."""
    cell = next(c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.id == "install")

    def run(command, check, capture_output):
        assert command[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
        assert capture_output != check
        return SimpleNamespace(returncode=0 if pip(command[5:]) else 1)

    monkeypatch.setattr(subprocess, "run", run)
    exec(cell.source, {})


def test_the_notebook_keeps_imported_packages_or_asks_for_a_restart(monkeypatch):
    """Hosted runtimes import numpy before the first cell; a newer numpy below it breaks scipy."""
    loaded = f"numpy=={np.__version__}"
    find_spec = importlib.util.find_spec
    absent = "lsg_flax"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name)
    )
    kept = []

    def keeps(what):
        kept.extend(pathlib.Path(what[1]).read_text().split())
        return True

    run_install_cell(monkeypatch, keeps)
    assert loaded in kept

    version = importlib.metadata.version
    ran = []

    def replaces(what):
        ran.append(what)
        if what[0] == "--constraint":
            return False
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "9" if name == "numpy" else version(name)
        )
        return True

    with pytest.raises(RuntimeError, match=rf"Restart this runtime.*: {loaded} had been imported"):
        run_install_cell(monkeypatch, replaces)
    assert ran[1] == ran[0][2:]


def test_a_notebook_carries_the_package(script, tmp_path, monkeypatch):
    wheel, notebook = tmp_path / "lsg_flax-9.0-py3-none-any.whl", tmp_path / "made" / "new.ipynb"
    wheel.write_bytes(bytes(range(256)))
    notebook.parent.mkdir()
    script("standalone_notebook").main([str(wheel), str(notebook)])
    carrying = nbformat.read(notebook, as_version=4)
    nbformat.validate(carrying)
    assert [c.id for c in carrying.cells[:3]] == ["title", "wheel", "install"]
    assert carrying.cells[:1] + carrying.cells[2:] == nbformat.read(NOTEBOOK, as_version=4).cells
    monkeypatch.chdir(notebook.parent)
    exec(carrying.cells[1].source, {})
    assert (notebook.parent / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_a_dense_embedder_teaches_its_conversion(script, tmp_path, capsys):
    module = script("distill_embeddings")
    sizes = ["--steps", "2", "--papers", "2", "--texts", "5", "--length", "64"]
    source, teacher = GOLDEN / "bert_to_convert_512", str(tmp_path / "teacher")
    pooled = hub.SentenceSettings("mean", True, 512)
    read = (*lsg_flax.from_pretrained(source, "base"), hub.read_tokenizer(source))
    hub.save_sentence_model(teacher, *read, pooled)
    found = module.main([*sizes, "--teacher", teacher, "--folder", str(tmp_path)])
    before, result, scores = found
    assert result.step == 2 and before != result.scores["eval_cosine"]
    averaged, converted, taught = scores.values()
    assert averaged.keys() == converted.keys() == taught.keys() >= {"mrr@10", "recall@1"}
    assert "LSG, taught, whole" in capsys.readouterr().out
    again = module.main([*sizes, "--teacher", teacher, "--folder", str(tmp_path)])[1]
    assert again.scores == result.scores  # nothing is trained twice


def test_every_short_example_is_at_most_100_lines():
    files = [f for f in EXAMPLES.glob("*.py") if not f.name.startswith("demo")]
    assert {f.name for f in files} >= {
        "fill_mask.py",
        "train_global_tokens.py",
        "finetune_classification.py",
    }
    for file in files:
        assert len(file.read_text().splitlines()) <= 100, file
