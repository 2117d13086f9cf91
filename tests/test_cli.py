"""The command line: what it writes, what it shows, and that errors are one message."""

import email.message
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import jax
import numpy as np
import pytest
import rich.table
import safetensors.numpy
from golden_data import GOLDEN, load

import lsg_flax
from lsg_flax import LSGConfig, cli, hub, training
from lsg_flax.cli import doctor, shared, train

SOURCE, LSG_SOURCE = GOLDEN / "bert_to_convert_512", GOLDEN / "bert_to_convert_lsg"


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def broken(tmp_path, name: str, value: float):
    """A copy of SOURCE with one number replaced in one tensor."""
    folder = tmp_path / "broken"
    shutil.copytree(SOURCE, folder)
    tensors = safetensors.numpy.load_file(folder / hub.WEIGHTS)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] = value
    safetensors.numpy.save_file(tensors, folder / hub.WEIGHTS)
    return folder


def test_convert_writes_what_convert_checkpoint_makes(capsys, tmp_path):
    code, out, err = run(
        capsys, "convert", SOURCE, tmp_path / "long", "--max-sequence-length", 1024, "--check"
    )
    assert (code, err) == (0, "")
    assert "1,024 tokens" in out and "wrote" in out and "128 local" not in out
    model, params = lsg_flax.from_pretrained(tmp_path / "long")
    expected = load("convert_bert_512_max1024")[2]
    embeddings = params["encoder"]["embeddings"]
    for name in ("position_embeddings", "global_embeddings"):
        table = np.asarray(embeddings[name]["embedding"])
        np.testing.assert_allclose(table, expected[name], rtol=1e-6, atol=1e-6)
    assert model.config.lsg == LSGConfig() and model.task == "masked_lm"
    assert hub.read_tokenizer(tmp_path / "long").model_max_length == 1024


def test_every_option_reaches_the_conversion(monkeypatch, capsys, tmp_path):
    seen = {}

    def convert(source, target, **options):
        seen.update(options, source=source, target=target)
        raise ValueError("stop")

    monkeypatch.setattr(lsg_flax, "convert_checkpoint", convert)
    given = {
        "max_sequence_length": 99,
        "num_global_tokens": 7,
        "task": "base",
        "block_size": 16,
        "sparse_block_size": 24,
        "sparsity_factor": 4,
        "sparsity_type": "lsh",
        "global_positional_stride": 32,
        "seed": 5,
    }
    flags = [part for name, v in given.items() for part in ("--" + name.replace("_", "-"), v)]
    switches = ["--random-global-init", "--keep-first-global-token", "--resize-lsg"]
    code, _, err = run(
        capsys, "convert", "a", tmp_path, *flags, *switches, "--no-token-ids", "--check"
    )
    assert code == 2 and err == "lsg-flax: error: stop\n"
    chosen = {"random_global_init", "keep_first_global_token", "resize_lsg", "check"}
    expected = given | dict.fromkeys(chosen, True) | {"use_token_ids": False}
    assert seen == expected | {"source": "a", "target": tmp_path}


@pytest.mark.filterwarnings("default:sparsity_type='stride' gives")  # the command shows it
def test_an_lsg_source_keeps_its_pattern_unless_told_otherwise(capsys, tmp_path):
    flags = ["--resize-lsg", "--max-sequence-length", 600, "--sparsity-type", "stride"]
    code, _, err = run(capsys, "convert", LSG_SOURCE, tmp_path / "t", *flags)
    assert code == 0 and "warning: --sparsity-type stride" in err and "File" not in err
    before = lsg_flax.from_pretrained(LSG_SOURCE)[0].config
    with pytest.warns(UserWarning, match="sparsity_type='stride'"):
        after = lsg_flax.from_pretrained(tmp_path / "t")[0].config
    assert after.lsg.block_size == before.lsg.block_size == 8
    assert (after.lsg.sparsity_type, after.max_position_embeddings) == ("stride", 600)


def test_inspect_shows_config_and_tensors(capsys):
    code, out, err = run(capsys, "inspect", LSG_SOURCE, "--check")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    pairs = dict(row for row in rows if len(row) == 2)
    assert pairs["attention"] == "LSG" and pairs["architectures"] == "LSGBertForMaskedLM"
    assert (pairs["block_size"], pairs["num_global_tokens"]) == ("8", "3")
    table = {row[0]: row[1:] for row in rows if len(row) == 4}
    tensors = safetensors.numpy.load_file(LSG_SOURCE / hub.WEIGHTS)
    assert table["bert.embeddings.global_embeddings.weight"] == ["[512, 3]", "float32", "1,536"]
    assert table["total"][-1] == f"{sum(t.size for t in tensors.values()):,}"
    assert "checked: the weights fit a masked_lm model and are finite" in out


@pytest.mark.parametrize(
    ("architectures", "shown"),
    [
        ("LSGBertForMaskedLM", "LSGBertForMaskedLM"),  # as the reference's converter leaves it
        (["BertModel", "BertForMaskedLM"], "BertModel, BertForMaskedLM"),
        (None, "none: loads as the base model"),
    ],
)
def test_inspect_shows_the_names_of_classes(capsys, tmp_path, architectures, shown):
    shutil.copytree(LSG_SOURCE, tmp_path, dirs_exist_ok=True)
    values = json.loads((LSG_SOURCE / hub.CONFIG).read_text()) | {"architectures": architectures}
    (tmp_path / hub.CONFIG).write_text(json.dumps(values))
    code, out, _ = run(capsys, "inspect", tmp_path)
    row = next(line for line in out.splitlines() if " architectures " in line)
    assert code == 0 and row.split("│")[2].strip() == shown


def test_inspect_counts_layers_once_and_reads_shards(capsys, tmp_path):
    source = GOLDEN / "bert_masked_lm"
    tensors = safetensors.numpy.load_file(source / hub.WEIGHTS)
    shutil.copy(source / hub.CONFIG, tmp_path)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        safetensors.numpy.save_file({n: tensors[n] for n in part}, tmp_path / file)
    places = {n: file for file, part in shards.items() for n in part}
    (tmp_path / hub.INDEX).write_text(json.dumps({"weight_map": places}))
    whole, sharded = (run(capsys, "inspect", folder)[1] for folder in (source, tmp_path))
    assert whole.split(" tensors ")[1] == sharded.split(" tensors ")[1]
    line = next(x for x in whole.splitlines() if "layer.*.intermediate.dense.weight" in x)
    assert "2 x [24, 12]" in line and "576" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "./nowhere", "out"], "./nowhere is not a folder"),
        (["inspect", "./nowhere"], "./nowhere is not a folder"),
        (["convert", SOURCE, SOURCE / "config.json"], "is a file; give a folder"),
        (["convert", SOURCE, SOURCE], "or inside it, where nothing is written"),
        (["convert", SOURCE, SOURCE / "new"], "or inside it, where nothing is written"),
        (["convert", SOURCE, "out", "--resize-lsg"], "--resize-lsg needs an LSG checkpoint"),
        (["convert", SOURCE, "out", "--block-size", "12", "--sparsity-factor", "5"], "divisible"),
        (["convert", SOURCE, "out", "--num-global-tokens", "513"], "outside 1..512"),
        (["convert", SOURCE, "out", "--max-sequence-length", "0"], "must be at least 1"),
        (["convert", SOURCE, "out", "--global-positional-stride", "3"], "choose one of [1, 2,"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith("lsg-flax: error: ") and says in err and err.count("\n") == 1
    assert contents(tmp_path) == {} and "Traceback" not in err


def test_check_refuses_weights_that_are_not_finite(capsys, tmp_path):
    name = "bert.encoder.layer.0.output.dense.weight"
    folder = broken(tmp_path, name, np.nan)
    for arguments in (["inspect", folder], ["convert", folder, tmp_path / "out"]):
        code, _, err = run(capsys, *arguments, "--check")
        assert code == 2 and "NaN or infinity in 1 of" in err and "mlp_down/kernel" in err
    assert not (tmp_path / "out").exists()
    assert run(capsys, "convert", folder, tmp_path / "out")[0] == 0  # only on request


def test_a_failed_conversion_leaves_the_old_target(capsys, tmp_path, monkeypatch):
    target = tmp_path / "t"
    assert run(capsys, "convert", SOURCE, target, "--max-sequence-length", 600)[0] == 0
    before = contents(target)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        code, _, err = run(capsys, "convert", SOURCE, target)
    assert code == 2 and "No space left on device" in err
    assert contents(target) == before
    code, out, _ = run(capsys, "convert", SOURCE, target, "--max-sequence-length", 700)
    assert code == 0 and out.startswith("replaced") and contents(target) != before


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cli.main(["inspect", "./nowhere", "--debug"])


def test_an_unexpected_error_is_named(capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("surprise")

    monkeypatch.setattr(hub, "open_checkpoint", fail)
    code, _, err = run(capsys, "inspect", SOURCE)
    assert code == 2
    assert err == "lsg-flax: error: unexpected RuntimeError: surprise (--debug shows where)\n"


FLAGS = [
    ("predict", '3: [1]. Mend it, or pass broken_lines="skip".', "or pass --on-error skip."),
    ("predict", 'pass unfinished="replace" to', "pass --restart to"),
    ("predict", "buckets=(16, 32) must be", "--buckets 16 32 must be"),
    ("predict", "fields=('x',) are not all", "--outputs x are not all"),
    (
        "predict",
        "truncate it (truncation=True, max_length=...)",
        "(--truncation, --max-length ...)",
    ),
    ("predict", "use f(a, max_length=600, g(buckets=1))", "use f(a, max_length=600, g(buckets=1))"),
    (
        "predict",
        "lsg_flax.convert_checkpoint(source, target, max_sequence_length=12, resize_lsg=True).",
        "lsg-flax convert SOURCE TARGET --max-sequence-length 12 --resize-lsg.",
    ),
    ("embed", "any checkpoint with pooling=, not task='base'", "with --pooling, not task='base'"),
    (
        "generate",
        "temperature=0.0 is; do_sample=False is greedy",
        "--temperature 0.0 is; no --do-sam",
    ),
    ("train", "1: bad (on_error='skip' leaves)", "(--on-error skip leaves)"),
    ("train", "mesh.data=-3, lsg.block_size='big'", "--mesh data=-3, --block-size big"),
    (
        "train",
        "columns={'a': 'b'}; pack=False; give labels=, the",
        "--columns a=b; --no-pack; give --la",
    ),
    ("train", "output=./x is a file", "--output ./x is a file"),
    (
        "train --config FILE --epochs 3",
        "on_error='skip' and epochs=3",
        "on_error='skip' and --epochs 3",
    ),
]


@pytest.mark.parametrize(("command", "message", "shown"), FLAGS)
def test_messages_say_flags_where_flags_were_typed(
    capsys, monkeypatch, tmp_path, command, message, shown
):
    def fail(*_, **__):
        raise ValueError(message)

    monkeypatch.setattr(hub, "open_checkpoint", fail)
    monkeypatch.setattr(train, "read_settings", fail)
    (tmp_path / "in.txt").write_text("w5")
    name, *flags = command.split()
    files = [] if name == "train" else ["m", tmp_path / "in.txt", tmp_path / "out.jsonl"]
    code, _, err = run(capsys, name, *files, *flags)
    assert code == 2 and shown in err


@pytest.mark.parametrize("command", ["predict", "summarize", "embed", "generate"])
def test_an_old_flag_works_and_says_the_new_one(capsys, command):
    given = [command, "m", "in.jsonl", "out.jsonl", "--broken-lines", "skip"]
    arguments = cli._parser().parse_args(given)
    assert arguments.on_error == "skip"
    said = "lsg-flax: warning: --broken-lines is deprecated: use --on-error skip\n"
    assert capsys.readouterr().err == said
    shown = arguments.command.format_help()
    assert "--on-error" in shown and "--columns" in shown
    assert "--broken-lines" not in shown and "--text-column" not in shown


WRITER = """
import resource, sys
from lsg_flax import cli
limit = int(sys.argv[1])
if limit >= 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[2:]))
"""
WRITES = {
    "predict": ["--outputs", "--truncation"],
    "embed": ["--pooling", "mean"],
    "convert": ["--max-sequence-length", "1024"],
    "train": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITES)
def test_files_that_may_not_be_large_enough(tmp_path, command):
    """`ulimit -f` and a full disk are alike: one message, nothing half written, and on we go."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "w5 w6", "label": "a"}\n{"text": "w7", "label": "b"}\n' * 99)
    given = source.read_bytes()
    line = [SOURCE, target] if command == "convert" else [SOURCE, source, target]
    if command == "train":
        line = ["--model", SOURCE, "--train-data", source, "--output", target, "--devices", 1]
        line += ["--task", "sequence_classification", "--steps", 2, "--batch-size", 2]
        line += ["--max-length", 64, "--cache", tmp_path.with_name(f"{tmp_path.name}-cache")]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    for limit, status in ((300, 2), (-1, 0)):
        words = [str(limit), command, *WRITES[command], *map(str, line)]
        done = subprocess.run(
            [sys.executable, "-c", WRITER, *words], capture_output=True, text=True, env=environment
        )
        assert done.returncode == status, done.stderr
        assert source.read_bytes() == given
        if status:
            last = done.stderr.splitlines()[-1]
            assert "Traceback" not in done.stderr and "unexpected" not in last
            assert "too large" in last and "run again" in last
            assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["inspect", ""],
            "the model is '', which is empty; give a folder ('.' is the current one)",
        ),
        (["convert", "", "new"], "the model is '', which is empty"),
        (["convert", SOURCE, ""], "'' is not a name; give a folder"),
        (
            ["predict", SOURCE, "in.txt", "", "--outputs"],
            "'' is not a name; give the name of a file",
        ),
        (["predict", "", "in.txt", "o", "--outputs"], "the model is '', which is empty"),
    ],
)
def test_a_name_that_is_empty(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(shutil.copytree(SOURCE, tmp_path / "m"))
    pathlib.Path("in.txt").write_text("w5")
    code, _, err = run(capsys, *arguments)
    assert code == 2 and says in err


def test_a_name_that_is_no_text_is_printed(tmp_path):
    """Of a file system that knows bytes alone."""
    odd = os.fsencode(tmp_path / "m") + b"\xff"
    try:
        shutil.copytree(os.fsencode(SOURCE), odd)
    except OSError:
        pytest.skip("this file system has only names that are texts")
    done = subprocess.run(
        [sys.executable, "-m", "lsg_flax.cli", "inspect", odd], capture_output=True, check=False
    )
    assert done.returncode == 0 and b"udcff" in done.stdout, done.stderr


@pytest.mark.parametrize("error", [training.SaveError("no room"), FloatingPointError("no room")])
def test_what_a_run_may_meet_is_no_surprise(capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(hub, "open_checkpoint", fail)
    assert run(capsys, "inspect", SOURCE)[::2] == (2, "lsg-flax: error: no room\n")


def test_a_damaged_header_is_reported(capsys, tmp_path):
    shutil.copytree(SOURCE, tmp_path, dirs_exist_ok=True)
    (tmp_path / hub.WEIGHTS).write_bytes((SOURCE / hub.WEIGHTS).read_bytes()[:100])
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and "is damaged or truncated" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none"], "invalid choice: 'none'"),
        (["convert", "a"], "TARGET"),
        (["convert", "a", "b", "--task", "x"], "invalid choice: 'x'"),
    ],
)
def test_wrong_usage_exits_with_2(capsys, arguments, says):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2 and says in capsys.readouterr().err


def test_the_program_alone_lists_the_commands(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert not out and {*ASKS_FOR} == {*re.findall(r"^    ([a-z]+)\b", err, re.MULTILINE)}


ASKS_FOR = {  # what must be given, in this order
    "convert": "SOURCE TARGET",
    "inspect": "PATH",
    "data": "--model --task --train-data",
    "train": "--model --train-data --output --task",
    "evaluate": "MODEL DATA",
    "predict": "MODEL INPUT OUTPUT",
    "summarize": "MODEL INPUT OUTPUT",
    "embed": "MODEL INPUT OUTPUT",
    "generate": "MODEL INPUT OUTPUT",
    "plan": "SOURCE --topology --batch-size",
    "index": "MODEL CORPUS FOLDER",
    "ask": "FOLDER QUESTION",
    "doctor": "",
}
SCREEN = 24  # lines of 80 characters


def help_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_command_has_a_line_in_the_list_of_what_is_asked_for(capsys):
    commands = re.findall(r"^    ([a-z]+)\b", help_of(capsys), re.MULTILINE)
    assert commands == list(ASKS_FOR)


@pytest.mark.parametrize("command", ASKS_FOR)
def test_help_has_what_is_required_first_and_on_one_screen(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    shown, asked = help_of(capsys, command), ASKS_FOR[command].split()
    usage, _, _ = shown.partition("\n\n")
    assert all(name in usage for name in asked) and usage.endswith("[options]")
    assert len(re.findall(r"--[a-z]", usage)) == ASKS_FOR[command].count("--")
    places = [
        (name, number)
        for number, line in enumerate(shown.splitlines())
        for name in re.findall(r"^  (--[a-z]\S+|[A-Z]+|-h)\b", line)
    ]
    assert [name for name, _ in places[: len(asked) + 1]] == [*asked, "-h"]
    assert places[len(asked)][1] < SCREEN, shown  # all that is said of them stands above


PROJECT = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())


def installed_with(extras: list[str], *more: str) -> email.message.Message:
    """The metadata of lsg-flax as pyproject.toml has it, with these extras alone."""
    package, optional = email.message.Message(), PROJECT["project"]["optional-dependencies"]
    for line in (*PROJECT["project"]["dependencies"], *more):
        package["Requires-Dist"] = line
    for extra in extras:
        package["Provides-Extra"] = extra
        for line in optional[extra]:
            name, _, marker = line.partition(";")
            system = f"({marker}) and " if marker else ""
            package["Requires-Dist"] = f"{name}; {system}extra == '{extra}'"
    return package


def test_doctor_says_what_is_here_and_what_is_missing(capsys, monkeypatch):
    of_users = PROJECT["project"]["optional-dependencies"].keys() - {
        "demo",
        "docs",
        "check",
        "test",
        "dev",
    }
    assert doctor.EXTRAS.keys() == of_users
    package = installed_with(sorted(of_users - {"plots"}), "numpy>=99", "no-such-package>=1")
    versions = {"torch": None, "pyarrow": "1.0", "libtpu": None}

    def version(name):
        found = versions[name] if name in versions else find(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    find = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "metadata", lambda name: package)
    monkeypatch.setattr(doctor.glob, "glob", lambda files: ["/dev/nvidia0"] * ("nvidia" in files))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    shown = {row[0]: row[1] for row in rows if len(row) == 2}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy"):
        assert shown[name] == find(name)
    assert shown["lsg_flax"].startswith(lsg_flax.__version__) and "python" in shown
    states = {row[0]: row[2] for row in rows if len(row) == 3 and row[0]}
    assert states["torch"] == "missing torch: pip install 'lsg-flax[torch]'"
    assert states["data"] == "missing pyarrow: pip install 'lsg-flax[data]'"
    assert states["plots"].startswith("missing all of it, newer than this installation")
    assert states["metrics"] == states["export"] == "installed"
    assert f"devices: {jax.device_count()} x cpu (cpu)\n" in out
    remedy = f"pip install 'jax[cuda12]=={jax.__version__}'"
    assert out.splitlines()[-4:] == [
        f"problem: /dev/nvidia0: JAX uses only cpu; {remedy}",
        f"problem: numpy is {np.__version__}: pip install 'numpy>=99'",
        "problem: no-such-package is missing: pip install 'no-such-package>=1'",
        "problems: 3",
    ]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX uses only cpu; JAX_PLATFORMS=cpu hides" in run(capsys, "doctor")[1]


def test_doctor_says_that_no_device_was_found(capsys, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'nonsense'.")

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    code, out, _ = run(capsys, "doctor")
    assert (
        code == 0
        and "JAX_PLATFORMS=nonsense is not available here. Unable to initialize backend 'nonsense'."
        in out
    )


def test_help_and_version_in_a_process_of_their_own():
    """The whole program, as a user starts it."""
    command = [sys.executable, "-m", "lsg_flax.cli"]
    environment = os.environ | {"COLUMNS": "100"}
    shown = {
        flag: subprocess.run(
            [*command, *flag.split()], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for flag in ("--version", "convert --help")
    }
    assert shown["--version"].startswith(f"lsg-flax {lsg_flax.__version__} (jax ")
    for option in ("--max-sequence-length", "--num-global-tokens", "--check", "--debug"):
        assert option in shown["convert --help"]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("ner", "token_classification"),
        ("sentiment-analysis", "sequence_classification"),
        ("summarization", "conditional_generation"),
        ("masked_lm", "masked_lm"),
    ],
)
def test_commands_take_the_tasks_of_pipelines(name, head):
    """Those that have --task."""
    needed = {"evaluate": ["m", "d"], "predict": ["m", "i", "o"], "convert": ["s", "t"]}
    needed |= {"train": [], "data": [], "plan": ["m", "--topology", "cpu:1", "--batch-size", "1"]}
    parser = cli._parser()
    for command, rest in needed.items():
        if command == "data":
            rest = ["--model", "m", "--train-data", "d"]
        if command == "evaluate" and head == "masked_lm":
            continue
        assert parser.parse_args([command, *rest, "--task", name]).task == head
    with pytest.raises(SystemExit):
        parser.parse_args(["predict", "m", "i", "o", "--task", "named-entities"])


def test_lines_of_text_stay_whole_and_tables_fit_the_console(capsys):
    """Where there is no terminal, as in a file or a pipe."""
    table = rich.table.Table("name")
    table.add_row("word " * 60)
    shared.console().print("word " * 60)
    shared.console().print(table)
    first, *rest = capsys.readouterr().out.splitlines()
    assert len(first) == 300 and {len(line) for line in rest} == {120}
