"""What long work tells of itself where stderr is no terminal."""

import dataclasses
import itertools
import json
import pathlib
import re
import time

import pytest
from golden_data import GOLDEN
from tiny_run import save_tiny

from lsg_flax import cli, progress
from lsg_flax.hub.checkpoint import Checkpoint
from lsg_flax.training import Settings, finetune, log

LINE = (
    r"lsg-flax: outer, 0:\d\d so far; reading: 3 of 9 things, \d\S* per second, 0:\d\d left, fine;"
)


def wait_for(capsys, pattern: str) -> str:
    """What stderr has got when it holds the pattern."""
    found, end = "", time.monotonic() + 20
    while not re.search(pattern, found) and time.monotonic() < end:
        time.sleep(0.01)
        found += capsys.readouterr().err
    assert re.search(pattern, found), found
    return found


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)


def test_lines_say_what_goes_on_how_far_and_how_long(capsys):
    with progress.told("outer"):
        with progress.Bar("things", total=9, about="reading", shown=True) as bar:
            said = wait_for(capsys, r"; reading: 0 of 9 things, 0:\d\d so far\n")
            bar.update(1)
            bar.update(2, "fine")
            with progress.Compiled().call({"input_ids": [[0] * 1024]}):
                said += wait_for(capsys, LINE + r" compiling for 1,024 tokens, 0:\d\d so far\n")
        wait_for(capsys, r"outer, 0:\d\d so far\n")
    assert "\r" not in said and "\x1b" not in said
    time.sleep(0.05)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""  # and no thread is left that speaks


def test_a_count_and_its_noun_agree():
    shown = [progress.count_of(number, "step") for number in (0, 1, 2000)]
    assert shown == ["0 steps", "1 step", "2,000 steps"]


def test_who_has_not_asked_is_told_nothing(capsys):
    with progress.Bar("things", shown=False) as bar, progress.doing("something"):
        bar.update(1)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_shape_is_compiled_once():
    compiled, seen = progress.Compiled(), []
    with progress.told("outer"):
        for length in (4, 8, 4):
            with compiled.call({"input_ids": [[0] * length]}):
                seen.append(len(progress._lines._works))
    assert seen == [2, 2, 1]


@pytest.mark.filterwarnings("default:weights for task")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("predict", ["in.txt", "out.jsonl", "--outputs", "--task", "base"]),
        ("embed", ["in.txt", "out.jsonl", "--pooling", "mean"]),
        ("convert", ["long"]),
    ],
)
def test_a_command_tells_that_it_reads_weights(capsys, tmp_path, monkeypatch, command, arguments):
    load, said = Checkpoint.tensors.fget, []

    def tensors(self):
        said.append(wait_for(capsys, rf"{command}, 0:\d\d so far; reading the weights"))
        return load(self)

    monkeypatch.setattr(Checkpoint, "tensors", property(tensors))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("w5 w6\n")
    assert cli.main([command, str(GOLDEN / "bert_to_convert_512"), *arguments]) == 0 and said


def test_a_bar_says_where_it_goes_on_and_how_far_it_is(capsys):
    with progress.Bar("steps", total=9, initial=3, shown=True) as bar:
        bar.update(3, "loss 0.5")
        bar.tell()
    with progress.Bar("steps", total=9, initial=3, shown=False) as bar:
        bar.tell()
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "lsg-flax: resumes after 3 of 9 steps, which were done before"
    assert any(re.fullmatch(r"lsg-flax: 6 of 9 steps, .*, loss 0\.5", line) for line in told[1:])


def test_tokens_per_second_are_those_of_the_last_ten_seconds(monkeypatch):
    """Not of the last step, which ran while the one before it was read."""
    now = 0.0
    monkeypatch.setattr(log.time, "perf_counter", lambda: now)
    counter = log.CompilationCounter(lambda: None)
    with log.RunLog(log.Logging(progress=False), steps=5) as out:
        told = log.StepRecorder(out, counter)
        for step, moment in enumerate((7.0, 11.0, 16.0, 20.9, 21.0), 1):
            told.add(step, {"loss": 1.0, "tokens": 100.0, "targets": 1.0}, None)
            now = moment
            told.read()
            told.finish({})
    rates = [record["tokens_per_second"] for record in told.history]
    assert rates == pytest.approx([100 / 7, 200 / 11, 300 / 16, 300 / 13.9, 300 / 10])


TRAINING_PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "training.md").read_text()
REFINEMENTS = TRAINING_PAGE.partition("\n## Refinements\n")[2].partition("\n## ")[0]


def shown_and_said(start: str, err: str) -> list[str]:
    """The line of the page and the line of a run that begin so, and behind that without their
    numbers, which differ."""
    lines = [re.findall(f"^{start}(.*)$", text, re.MULTILINE) for text in (TRAINING_PAGE, err)]
    return [re.sub(r"\d[\d,.]*(e-\d+)?", "N", line) for (line,) in lines]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights for task")
def test_the_documented_refinements_are_trained_and_say_what_the_page_shows(
    tmp_path, monkeypatch, capsys
):
    """The settings of all examples in one run, which stops early and resumes with more patience."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(progress, "INTERVAL", 600.0)  # no lines but those at evaluations
    (tmp_path / "bert-4096").mkdir()
    save_tiny(tmp_path / "bert-4096")
    rows = [{"text": "w5 w6 " * n, "label": "rare" if n == 3 else "usual"} for n in range(1, 9)]
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first, *blocks = re.findall(r"```python\n(.*?)```", REFINEMENTS, re.DOTALL)
    names, found, together = {}, [], {}
    exec(first, names)
    for block in blocks:
        exec(block, names | {"finetune": found.append}, made := {})
        found += [made["settings"]] if "settings" in made else []
    plain = Settings(**names["run"])
    for settings, field in itertools.product(found, dataclasses.fields(Settings)):
        if (value := getattr(settings, field.name)) != getattr(plain, field.name):
            together[field.name] = value
    assert len(found) == 6 and {"lora_r", "ema_decay", "report_to", "run_name"} < together.keys()
    settings = dataclasses.replace(plain, **together, devices=1, learning_rate=1e-5)
    assert finetune(settings).step == 40
    start = "lsg-flax: stopping early, after 40 of 300 steps: eval_loss did not improve in 3 evalu"
    shown, said = shown_and_said(start, capsys.readouterr().err)
    assert shown == said
    patient = dataclasses.replace(settings, early_stopping_patience=99, evaluate_every=300)
    assert finetune(patient).step == 300
    err = capsys.readouterr().err
    for start in ("lsg-flax: resumes after 40 of 300 steps, ", "lsg-flax: 300 of 300 steps, "):
        shown, said = shown_and_said(start, err)
        assert shown == said
    assert len([*pathlib.Path(plain.output, "log").glob("events*")]) == 2
