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


def a_bert():
    """A plain BERT with a tokenizer."""
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/bert")


PAGES = {
    "index.md": lambda: None,
    "install.md": lambda: None,
    "convert.md": a_bert,
    "from_pytorch.md": a_bert,
    "summarization.md": files_of_summarization,
    "long_models.md": lambda: None,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights for task")
@pytest.mark.parametrize("page", PAGES)
def test_page(page, tmp_path, monkeypatch):
    """Its blocks one after the other, each with what those before it have made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    PAGES[page]()
    text = (README.parent / "docs" / page).read_text()
    blocks, names = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL), {}
    blocks = [b for b in blocks if "lsg_converter" not in b[1]]  # run where PyTorch is
    assert {"python", "sh"} & {language for language, _ in blocks}
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


def test_messages_of_troubleshooting_are_those_of_the_package():
    """Words in capitals stand for values."""
    package = README.parent / "lsg_flax"
    source = "".join(path.read_text() for path in sorted(package.rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines
    page = (README.parent / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    parts = [part.strip() for m in messages for part in re.split(r"\b[A-Z]{2,}\b", m)]
    assert len(messages) > 10 and not [part for part in parts if part not in source]


def test_every_page_is_on_the_site():
    """Named by a table of contents, and each task of tasks.md leads to one."""
    docs = README.parent / "docs"
    contents = (docs / "index.md").read_text() + (docs / "api/index.md").read_text()
    listed = set(re.findall(r"^(?:api/)?(\w+)$", contents, flags=re.MULTILINE))
    pages = {p.stem for p in docs.rglob("*.md") if "site" not in p.parts} - {"index"}
    assert not pages - listed
    rows = [r for r in (docs / "tasks.md").read_text().splitlines() if r.startswith("| I ")]
    assert len(rows) >= 10 and all("](" in row for row in rows)
