"""The Python of the README, and all blocks of the pages of docs/ that are named here, run as they
stand, on tiny checkpoints and files in place of the reader's."""

import ast
import doctest
import json
import pathlib
import re
import shlex
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from golden_data import GOLDEN
from tiny_tokenizers import write_words

import lsg_flax
from lsg_flax import cli, hub
from lsg_flax.pipelines import Embedder

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


def files_of_commands():
    """A plain BERT, a plain BART, a decoder, and texts with labels."""
    shutil.copytree(GOLDEN / "bert_to_convert_512", "bert")
    write_words(shutil.copytree(GOLDEN / "bart_plain_conditional_generation", "bart"))
    write_words(shutil.copytree(GOLDEN / "bart_causal_lm", "writer"))
    texts = (" ".join(["w5 w6 w7"] * (1 if n % 2 else 7)) for n in range(8))
    rows = [f"{text},{'ab'[n % 2]}\n" for n, text in enumerate(texts)]
    for name in ("train.csv", "held_out.csv"):
        pathlib.Path(name).write_text("body,area\n" + "".join(rows))
    papers = pathlib.Path("papers")
    papers.mkdir()
    (papers / "one.txt").write_text("w5 w6 w7\nw8 " * 9)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:weights for task")  # the command shows it
def test_each_command_says_what_its_example_shows(tmp_path, monkeypatch, capsys):
    """Its lines one after the other, each with the files of those before it; where the page has
    dots anything may stand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files_of_commands()
    text = (README.parent / "docs" / "commands.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```\n\n```\n(.*?)```", text, flags=re.DOTALL)
    shown = set()
    for command, expected in blocks:
        program, *arguments = shlex.split(command.replace("\\\n", ""))
        assert (program, cli.main(arguments)) == ("lsg-flax", 0), command
        said = capsys.readouterr()
        same = doctest.OutputChecker().check_output(expected, said.out, doctest.ELLIPSIS)
        assert same, f"{command}{said.out}"
        shown |= {arguments[0]} | {"--dry-run"} & {*arguments}
    assert shown >= {
        *("doctor", "convert", "inspect", "data", "--dry-run", "train", "evaluate", "predict"),
        *("embed", "summarize", "generate", "plan"),
    }


def files_of_inference():
    """A classifier, a BART, a decoder, and texts for each."""
    plain = GOLDEN / "bert_to_convert_512"
    model, params = lsg_flax.from_pretrained(plain, "sequence_classification")
    lsg_flax.save_pretrained("areas", model, params, hub.read_tokenizer(plain))
    bart = write_words(shutil.copytree(GOLDEN / "bart_plain_conditional_generation", "bart"))
    lsg_flax.convert_checkpoint(bart, "lsg-bart-arxiv", max_sequence_length=512)
    writer, params = lsg_flax.from_pretrained(GOLDEN / "bert_causal_lm")
    lsg_flax.save_pretrained("writer", writer, params, hub.read_tokenizer(plain))
    for folder in ("data", "papers"):
        pathlib.Path(folder).mkdir()
    pathlib.Path("data/one.csv").write_text("body\nw5 w6\n")
    pathlib.Path("papers/one.txt").write_text("w5 w6 w7 w8 " * 9)
    pathlib.Path("prompts.jsonl").write_text('{"text": "w5 w6"}\n')


def files_of_checkpoints():
    """A plain checkpoint."""
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/roberta")


OF_COMMANDS = {  # pages whose Python goes on from models of the reader's, and what commands write
    "inference.md": (
        files_of_inference,
        ["answers.jsonl", "summaries.jsonl", "continuations.jsonl"],
    ),
    "checkpoints.md": (files_of_checkpoints, ["roberta-4096/config.json"]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights for task")
@pytest.mark.parametrize("page", OF_COMMANDS)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files, written = OF_COMMANDS[page]
    make_files()
    text = (README.parent / "docs" / page).read_text()
    lines = re.findall(
        r"^lsg-flax .*", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)), re.M
    )
    assert len(lines) >= len(written)
    for line in lines:
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line
    assert all(pathlib.Path(name).stat().st_size for name in written)


def a_bert():
    """A plain BERT with a tokenizer."""
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/bert")


def files_of_embeddings():
    """A dense sentence model, documents, pairs and texts."""
    source = GOLDEN / "bert_to_convert_512"
    Embedder.from_pretrained(source, pooling="mean").save_pretrained("path/to/all-MiniLM-L6-v2")
    rows = [{"text": f"w{5 + i} w6", "positive": f"w{5 + i} w9 " * 4} for i in range(16)]
    for name in ("pairs.jsonl", "held_out.jsonl", "texts.jsonl", "documents.jsonl"):
        pathlib.Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pathlib.Path("data").mkdir()
    table = pyarrow.table({"body": [row["positive"] for row in rows], "key": [*range(16)]})
    pyarrow.parquet.write_table(table, "data/one.parquet")


PAGES = {
    "index.md": lambda: None,
    "install.md": lambda: None,
    "convert.md": a_bert,
    "from_pytorch.md": a_bert,
    "summarization.md": files_of_summarization,
    "long_models.md": lambda: None,
    "embeddings.md": files_of_embeddings,
    "troubleshooting.md": lambda: None,
    "api/index.md": lambda: None,
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
        for line in block.replace("\\\n", " ").splitlines() if language == "sh" else ():
            program, *arguments = shlex.split(line, comments=True)
            assert (program, cli.main(arguments)) == ("lsg-flax", 0), line


def test_the_rows_of_a_new_family_are_rows():
    """The block of docs/adding_a_family.md that needs no PyTorch."""
    text = (README.parent / "docs/adding_a_family.md").read_text()
    blocks = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Row(" in b]
    found = {}
    exec(compile("\n".join(blocks), "adding_a_family.md", "exec"), found)
    assert found["rows"] and all(isinstance(row, found["Row"]) for row in found["rows"])


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


def test_every_public_name_is_in_the_api_reference():
    """What the faces of folders list, by whichever of them documents it."""
    package, pages = README.parent / "lsg_flax", README.parent / "docs/api"
    text = "".join(page.read_text() for page in sorted(pages.glob("*.md")))
    documented = set(re.findall(r"auto(?:class|function):: lsg_flax\.(?:\w+\.)*(\w+)$", text, re.M))
    documented |= {
        n for row in re.findall(r"^\| (`.*`) \|", text, re.M) for n in re.findall(r"\w+", row)
    }
    for module in re.findall(r"automodule:: lsg_flax\.(\w+)$", text, re.M):
        documented |= set(
            re.findall(
                r"^(?:def|class) ([A-Za-z]\w*)", (package / f"{module}.py").read_text(), re.M
            )
        )
    faces = [path for path in package.rglob("__init__.py") if path.parent.name != "cli"]
    imports = [
        n for f in faces for n in ast.parse(f.read_text()).body if isinstance(n, ast.ImportFrom)
    ]
    names = {alias.name for node in imports for alias in node.names if alias.asname == alias.name}
    assert len(names) > 100 and not names - documented
