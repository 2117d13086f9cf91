"""What long work tells of itself where stderr is no terminal."""

import re
import time

import pytest
from golden_data import GOLDEN

from lsg_flax import cli, progress
from lsg_flax.hub.checkpoint import Checkpoint
from lsg_flax.training import log

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
    ("command", "options"),
    [("predict", ["--outputs", "--task", "base"]), ("embed", ["--pooling", "mean"])],
)
def test_a_command_tells_that_it_reads_weights(capsys, tmp_path, monkeypatch, command, options):
    load, said = Checkpoint.tensors.fget, []

    def tensors(self):
        said.append(wait_for(capsys, rf"{command}, 0:\d\d so far; reading the weights"))
        return load(self)

    monkeypatch.setattr(Checkpoint, "tensors", property(tensors))
    (tmp_path / "in.txt").write_text("w5 w6\n")
    files = [tmp_path / "in.txt", tmp_path / "out.jsonl"]
    arguments = [command, GOLDEN / "bert_to_convert_512", *files, *options]
    assert cli.main([str(a) for a in arguments]) == 0 and said


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
