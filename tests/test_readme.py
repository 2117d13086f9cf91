"""The Python of the README, and all blocks of the pages of docs/ that are named here, run as they
stand, on tiny checkpoints and files in place of the reader's."""

import json
import pathlib
import re
import shlex
import shutil

import pytest
from golden_data import GOLDEN
from tiny_tokenizers import write_words

from lsg_flax import cli

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore:weights for task")
def test_readme_block(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/bert")
    exec(compile(block, str(README), "exec"), {})


def files_of_summarization():
    """A plain BART, two papers, and pairs of articles and abstracts."""
    write_words(shutil.copytree(GOLDEN / "bart_plain_conditional_generation", "path/to/bart"))
    papers = pathlib.Path("papers")
    papers.mkdir()
    for name in ("one.txt", "two.txt"):
        (papers / name).write_text("w5 w6 w7\nw8 " * 50)
    for name in ("train.jsonl", "eval.jsonl"):
        row = {"article": "w5 w6 w7 w8 " * 9, "abstract": "w5 w6 w7"}
        pathlib.Path(name).write_text(f"{json.dumps(row)}\n" * 8)


PAGES = {"summarization.md": files_of_summarization, "long_models.md": lambda: None}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page(page, tmp_path, monkeypatch):
    """Its blocks one after the other, each with what those before it have made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    PAGES[page]()
    text = (README.parent / "docs" / page).read_text()
    blocks, names = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL), {}
    assert {language for language, _ in blocks} == {"python", "sh"}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, page, "exec"), names)
        for line in block.splitlines() if language == "sh" else ():
            program, *arguments = shlex.split(line)
            assert (program, cli.main(arguments)) == ("lsg-flax", 0), line


def test_map_names_every_part():
    """Each file and folder of the package by its name."""
    text, package = README.read_text(), README.parent / "lsg_flax"
    parts = {p.name for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    missing = [part for part in sorted(parts - {"__init__.py"}) if f"`{part}" not in text]
    assert not [part for part in missing if f"lsg_flax/{part}" not in text]
