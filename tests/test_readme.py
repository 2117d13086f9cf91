"""Every block of README.md, CONTRIBUTING.md and docs/ runs as it stands, on tiny checkpoints and
files in place of the reader's, or another test runs it (`pages.py`)."""

import argparse
import ast
import doctest
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
from fake_hub import fake_hub
from golden_data import GOLDEN
from pages import (
    ELSEWHERE,
    INSTALLS,
    NOWHERE,
    PAGES,
    ROOT,
    TARGETS,
    WITHOUT,
    Block,
    Names,
    blocks_of,
    pages,
)
from tiny_tokenizers import write_words

import lsg_flax
from lsg_flax import cli, open_qa, topologies
from lsg_flax.training import read_settings

README = ROOT / "README.md"


def run_line(line: str) -> None:
    """Runs a command of ours, and lets make say what it would run for a target."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        subprocess.run(["make", "-n", "-C", ROOT, *arguments], check=True, capture_output=True)
    elif program not in INSTALLS:
        assert (program, cli.main(arguments)) == ("lsg-flax", 0), line


def run_block(block: Block, page: str, names: Names) -> None:
    """Runs it in the working directory; output of commands is nothing to run."""
    if block.language == "python":
        exec(compile(block.text, page, "exec"), names)
    elif block.language == "sh":
        for line in block.text.replace("\\\n", " ").splitlines():
            run_line(line)
    elif block.language == "yaml":
        pathlib.Path("run.yaml").write_text(block.text)
        needed = ("model", "train_data", "output")
        read_settings("run.yaml", {n: n for n in needed if f"{n}: " not in block.text})
    elif block.language:
        assert block.language == "json" and json.loads(block.text)


def own_blocks(page: str) -> list[Block]:
    """Those that no other test runs."""
    others = {**ELSEWHERE.get(page, {}), **NOWHERE.get(page, {})}
    return [b for b in blocks_of(page) if not any(words in b.text for words in others)]


@pytest.mark.filterwarnings("ignore:weights for task", "ignore:weights for .*global_layers")
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[] if p == "README.md" else pytest.mark.slow) for p in PAGES]
)
def test_page(page, tmp_path, monkeypatch):
    """Its blocks one after the other, each with what those before it have made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    PAGES[page].make_files()
    names: Names = {}
    for block in own_blocks(page):
        run_block(block, page, names)
    PAGES[page].check(names)


def source_of(test: str) -> str:
    """The file of a test, whose name is file::function."""
    return (ROOT / test.partition("::")[0]).read_text()


def is_a_test(name: str) -> bool:
    return f"def {name.partition('::')[2]}(" in source_of(name)


def test_every_block_of_every_page_is_run():
    """Here or by the test that is named. A new page or block has to say by which."""
    unknown = {*pages()} ^ {*PAGES, *ELSEWHERE, *WITHOUT}
    assert not unknown, f"tests/pages.py has to say how the blocks of {unknown} are run"
    for page in pages():
        languages = [block.language for block in blocks_of(page) if block.language]
        assert bool(languages) != (page in WITHOUT), page
        assert {*languages} <= {"python", "sh", "yaml", "json"}, page
        lines = "".join(block.text for block in blocks_of(page) if block.language).splitlines()
        assert not [line for line in lines if len(line) > 100], f"{page}: too wide for the site"
        output = [block.text for block in blocks_of(page) if not block.language]
        assert not re.search(r"^(lsg-flax|make|pip|python) ", "".join(output), re.MULTILINE), page
        left = [block for block in own_blocks(page) if block.language]
        assert page in PAGES or not left, f"no test runs these blocks of {page}: {left}"
        for test in ELSEWHERE.get(page, {}).values():
            assert is_a_test(test) and pathlib.Path(page).name in source_of(test), test
        for words in (*ELSEWHERE.get(page, {}), *NOWHERE.get(page, {})):
            assert any(words in block.text for block in blocks_of(page)), f"{page}: {words}"


def test_every_target_of_a_page_is_run_by_ci():
    """Or what it does is run by the test that is named."""
    blocks = [b for page in pages() for b in blocks_of(page) if b.language == "sh"]
    named = {t for b in blocks for t in re.findall(r"^make ([\w-]+)", b.text, re.MULTILINE)}
    by_ci = set(re.findall(r"^make (.+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert named - by_ci == {*TARGETS}
    assert all(is_a_test(test) for test in TARGETS.values() if "::" in test)


def test_tests_that_prove_claims_exist():
    """Those that docs/proven.md names."""
    named = re.findall(r"`(tests/[\w/]+\.py)(::\w+)?`", (ROOT / "docs/proven.md").read_text())
    assert len(named) > 40
    for file, function in named:
        assert is_a_test(file + function) if function else (ROOT / file).exists(), file + function


COMMANDS = (README.parent / "docs" / "commands.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", COMMANDS, re.MULTILINE | re.DOTALL))
EXAMPLES = re.compile(r"```sh\n(.*?)```\n\n```\n(.*?)```", re.DOTALL)  # a command, its output
HUB = "https://huggingface.co"


def files_of_commands():
    """A plain BERT, a plain BART, a decoder, a REALM, texts with labels, pairs, and a corpus."""
    shutil.copytree(GOLDEN / "bert_to_convert_512", "bert")
    write_words(shutil.copytree(GOLDEN / "bart_plain_conditional_generation", "bart"))
    write_words(shutil.copytree(GOLDEN / "bart_causal_lm", "writer"))
    shutil.copytree(GOLDEN / "realm_plain_open_qa", "realm")
    records = open_qa.open_records("realm/block_records.npy")
    pathlib.Path("corpus.txt").write_text("\n".join(records.texts(range(len(records)))))
    for name, times in (("train", (7, 1)), ("held_out", (7, 1)), ("articles", (80, 40) * 2)):
        texts = [" ".join(["w5 w6 w7"] * n) for n in times * 4]
        header = "text,label\n" if name == "articles" else "body,area\n"
        rows = [f"{text},{'ab'[n % 2]}\n" for n, text in enumerate(texts)]
        pathlib.Path(f"{name}.csv").write_text(header + "".join(rows))
    rows = [{"text": f"w{5 + n} w6 " * 6, "positive": f"w{5 + n} w9"} for n in range(8)]
    for name, columns in (("pairs", ["text", "positive"]), ("texts", ["text"])):
        lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
        pathlib.Path(f"{name}.jsonl").write_text("\n".join(lines))
    papers = pathlib.Path("papers")
    papers.mkdir()
    (papers / "one.txt").write_text("w5 w6 w7\nw8 " * 9)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:weights for task")  # the command shows it
@pytest.mark.parametrize("section", SECTIONS)
def test_each_command_says_what_its_example_shows(section, tmp_path, monkeypatch, capsys):
    """The lines of a section one after the other, each with the files of those before it; where the
    page has dots anything may stand. stderr counts where the page shows a line of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files_of_commands()
    if section != next(iter(SECTIONS)):  # whose first command does it
        lsg_flax.convert_checkpoint("bert", "bert-4096", num_global_tokens=7)
    with fake_hub(monkeypatch) as fake:
        for command, expected in EXAMPLES.findall(SECTIONS[section]):
            program, *arguments = shlex.split(command.replace("\\\n", ""))
            if program == "lsg-flax":
                assert cli.main(arguments) == 0, command
            else:
                print(subprocess.check_output([program, *arguments], text=True), end="")
            said = capsys.readouterr()
            text = f"{said.err}{said.out}" if "lsg-flax: " in expected else said.out
            text = text.replace(fake.endpoint, HUB)
            same = doctest.OutputChecker().check_output(expected, text, doctest.ELLIPSIS)
            assert same, f"{command}{said.err}{said.out}"


SHOWN = {  # what an example shows beside each command: its words, and a line of its output
    "contrastive training": ("train --task embedding --pooling --eval-data", "mrr@10"),
    "distillation": ("train --task embedding --teacher", "cosine"),
    "packing": ("train --packing", "wrote packed"),
    "scores of packed texts": ("evaluate --packing", "accuracy"),
    "LoRA and others": (
        "train --lora-r --ema-decay --layerwise-lr-decay --class-weights --label-smoothing",
        "wrote refined",
    ),
    "early stop": ("train --early-stopping-patience --report-to tensorboard", "stopping early"),
    "resumed": ("train --early-stopping-patience --report-to tensorboard", "resumes after 2 of 4"),
    "finished": ("train --steps 2", "already finished after 2 steps"),
    "dry run": ("train --dry-run", "buckets"),
    "push": ("convert --push-to-hub", f"pushed to {HUB}"),
    "card": ("head README.md", "library_name: lsg_flax"),
}


def test_the_page_of_commands_shows_each_command():
    """Those of the parser, and the uses above; no command is without its output."""
    examples = EXAMPLES.findall(COMMANDS)
    assert len(examples) == COMMANDS.count("```sh") == COMMANDS.count("```\n\n```\n")
    (choices,) = [
        action.choices
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    begins = [shlex.split(command)[:2] for command, _ in examples]
    assert not {*choices} - {command for program, command in begins if program == "lsg-flax"}
    for use, (words, line) in SHOWN.items():
        assert any(
            line in output and not [word for word in words.split() if word not in command]
            for command, output in examples
        ), use


def files_of_plan():
    """Small configurations in place of those of base size, and a folder for the picture."""
    small = {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 2}
    roberta = json.loads((README.parent / "benchmarks/configs/roberta-base.json").read_text())
    bart = json.loads((GOLDEN / "bart_plain_conditional_generation/config.json").read_text())
    configs = {
        "benchmarks/configs/roberta-base.json": roberta | small | {"intermediate_size": 256},
        "roberta-base/config.json": roberta | small | {"intermediate_size": 256},
        "lsg-bart/config.json": bart,
    }
    for name, values in configs.items():
        pathlib.Path(name).parent.mkdir(parents=True)
        pathlib.Path(name).write_text(json.dumps(values))
    pathlib.Path("docs").mkdir()


def run_plans(chips: str, least: int, capsys):
    """Runs the page's commands for such chips; each prints a plan that fits."""
    text = (README.parent / "docs/plan.md").read_text().replace("\\\n", "")
    commands = [c for c in re.findall(r"lsg-flax plan .*--topology.*", text) if f" {chips}:" in c]
    assert len(commands) >= least
    files_of_plan()
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
        shown = capsys.readouterr().out
        assert "a step takes at least" in shown and "memory in all" in shown, shown


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make tpu")
def test_a_real_tpu_compilation_by_each_command_of_the_page_on_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_plans("v5e", 4, capsys)
    assert pathlib.Path("docs/roofline.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(not topologies.has_cuda_plugin(), reason="needs the plugin: make gpu-plan")
def test_the_command_for_gpus_of_the_page_on_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_plans("h100", 1, capsys)


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
    """Named by a table of contents; and each task of tasks.md leads to one page."""
    docs = README.parent / "docs"
    contents = (docs / "index.md").read_text() + (docs / "api/index.md").read_text()
    listed = set(re.findall(r"^(?:api/)?(\w+)$", contents, flags=re.MULTILINE))
    pages = {p.stem for p in docs.rglob("*.md") if "site" not in p.parts} - {"index"}
    assert not pages - listed
    _, *rows = re.findall(r"^\| \w.*", (docs / "tasks.md").read_text(), re.MULTILINE)
    assert len(rows) > 15 and all(row.count("](") == 1 for row in rows)


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
