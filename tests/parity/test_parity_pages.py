"""The PyTorch of the pages runs as it stands, and lsg_flax's side gives its numbers; the benchmark
of docs/speed.md compares and times one short case."""

import ast
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from golden_data import GOLDEN
from pages import ROOT, blocks_of
from tiny_tokenizers import tiny_model, write_tokenizer

import lsg_flax
from lsg_flax import cli
from lsg_flax.training import Settings

SHOW = "\nimport numpy; numpy.save('pytorch.npy', logits.numpy())\n"
NAMES = """
import dataclasses, inspect, json, transformers
arguments = dataclasses.fields(transformers.Seq2SeqTrainingArguments)
trainer = inspect.signature(transformers.Trainer).parameters
print(json.dumps({"TrainingArguments": [f.name for f in arguments], "Trainer": [*trainer]}))
"""


def run_pytorch(code: str) -> str:
    """What the code prints, in the reference environment and the working directory."""
    python = str((ROOT / os.environ["LSG_REFERENCE_PYTHON"]).absolute())
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def block_with(page: str, words: str) -> str:
    """The one block of a page that has these words."""
    (block,) = (block.text for block in blocks_of(page) if words in block.text)
    return block


@pytest.mark.filterwarnings("ignore:weights for task")
def test_both_sides_of_the_page_agree(tmp_path, monkeypatch):
    """PyTorch converts and runs; what lsg_flax reads of its folder gives the same logits, by the
    lines beside PyTorch's and by those beside torchax's."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/bert")
    page = "docs/from_pytorch.md"
    run_pytorch(block_with(page, "LSGConverter(") + block_with(page, "torch.no_grad()") + SHOW)
    ours = [b.text for b in blocks_of(page) if "lsg_flax.from_pretrained(" in b.text]
    assert len(ours) == 2
    for block in ours:
        names = {"lsg_flax": lsg_flax}
        exec(compile(block, page, "exec"), names)
        np.testing.assert_allclose(names["logits"], np.load("pytorch.npy"), atol=1e-5)


def test_names_of_trainer_exist():
    """Those in the code and the table of docs/from_pytorch.md, and those of Settings beside them.
    Trainer itself does not run: the reference environment has no accelerate."""
    known = {name: {*names} for name, names in json.loads(run_pytorch(NAMES)).items()}
    code = ast.parse(block_with("docs/from_pytorch.md", "TrainingArguments("))
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
    given = {ast.unparse(c.func): {k.arg for k in c.keywords} for c in calls}
    assert all(given[name] and given[name] <= known[name] for name in known)
    table = (ROOT / "docs/from_pytorch.md").read_text().partition("| TrainingArguments |")[2]
    rows = [row.split("|")[1:3] for row in table.partition("\n\n")[0].splitlines()[2:]]
    theirs, ours = (
        re.findall(r"`(\w+)(?:=[^`]*)?`", "".join(side)) for side in zip(*rows, strict=True)
    )
    assert len(theirs) > 20 and not {*theirs} - known["TrainingArguments"]
    assert len(ours) > 20 and not {*ours} - {f.name for f in dataclasses.fields(Settings)}


def test_the_pytorch_of_other_pages_runs(tmp_path, monkeypatch):
    """docs/adding_a_family.md prints names and shapes; the class of docs/checkpoints.md reads what
    that page's command has converted, and gives the numbers that lsg_flax reads from it."""
    monkeypatch.chdir(tmp_path)
    printed = run_pytorch(block_with("docs/adding_a_family.md", "from transformers"))
    assert "'distilbert.transformer.layer.1.attention.q_lin.weight': (12, 12)" in printed
    model, _ = tiny_model("roberta")
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    source = pathlib.Path("path/to/roberta")
    lsg_flax.save_pretrained(source, model, params)
    write_tokenizer(source, "roberta")
    command = block_with("docs/checkpoints.md", "lsg-flax convert").splitlines()[0]
    assert cli.main(command.split()[1:]) == 0
    ids = [[0, *range(5, 60), 2]]
    code = f"logits = model.eval()(torch.tensor({ids})).logits.detach()"
    run_pytorch("import torch\n" + block_with("docs/checkpoints.md", "LSGRoberta") + code + SHOW)
    model, params = lsg_flax.from_pretrained("./roberta-4096")
    ours = jax.jit(model.apply)({"params": params}, np.array(ids)).logits
    np.testing.assert_allclose(ours, np.load("pytorch.npy"), atol=1e-5)


def test_the_benchmark_of_the_page_on_speed(tmp_path):
    file = ROOT / "benchmarks/vs_reference.py"
    options = ["--lengths", "512", "--modes", "forward", "--repeats", "1", "--output", tmp_path]
    rival = ["--reference-python", os.environ["LSG_REFERENCE_PYTHON"]]
    done = subprocess.run([sys.executable, file, *options, *rival], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "vs_reference.json").read_text())
    assert (row["mode"], row["tokens"]) == ("forward", 512)
    assert min(row[rival]["seconds"] for rival in ("reference", "lsg_flax", "full attention")) > 0
    assert (tmp_path / "vs_reference.png").stat().st_size > 1000
