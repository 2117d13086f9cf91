"""Lines that survive: killed at every touch of the disk, on a full disk, with other inputs."""

import contextlib
import json
import pathlib
import resource
import subprocess
import sys

import pytest

from lsg_flax.inference.lines import Document, ResumableLines

SETTINGS = {"model": {"layers": 2}, "fields": None}


def documents(count=10, **others):
    texts = {i: f"text {i}" for i in range(count)} | others
    return [
        Document(n, t.encode(), f"in.jsonl, line {i}", t) for i, (n, t) in enumerate(texts.items())
    ]


def run(path, docs, *, settings=SETTINGS, window=3, fail_at=None, keeps=0, **options):
    """Writes each document's text in capitals, from the last of a window to the first, and keeps
    the first `keeps` lines that are finished; returns how many were made now."""
    made, left = 0, iter(docs)
    with ResumableLines(path, settings, **options) as file:
        file.skip(left)
        for start in range(file.finished, len(docs), window):
            part = [next(left) for _ in docs[start : start + window]]
            if fail_at is not None and start >= fail_at:
                raise RuntimeError("stop")
            lines = file.ahead(part)
            for place in reversed(range(len(part))):
                if place in lines:
                    continue
                d, made = part[place], made + 1
                lines[place] = json.dumps({"id": d.name, "is": d.content.upper()})
                if len(lines) <= keeps:
                    file.keep(part, lines)
            file.write(part, lines)
    return made


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def half(tmp_path):
    """A run that stopped after six of ten documents."""
    path = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="stop") as caught:
        run(path, documents(), fail_at=6)
    assert "6 finished documents are kept" in caught.value.__notes__[0]
    return path


def test_a_run_continues_and_leaves_one_file(half):
    assert not half.exists()
    with half.with_name("out.jsonl.partial").open("ab") as file:
        file.write(b'{"id": 6, "is": "TE')  # a line that a kill cut off
    assert run(half, documents()) == 4
    assert lines(half) == [{"id": i, "is": f"TEXT {i}"} for i in range(10)]
    assert [p.name for p in half.parent.iterdir()] == ["out.jsonl"]
    assert run(half, documents(4)) == 4 and len(lines(half)) == 4  # the old file is replaced


KILLED = """
import os, pathlib, random, stat, sys
sys.path.insert(0, {tests!r})
import test_resumable_lines as t

folder, done = pathlib.Path({folder!r}), 0
for step in range(1, 100):
    path, count = folder / f"{{step}}.jsonl", 0
    path.write_text("the file of before")

    def killing(real, lose):
        def call(*arguments, **options):
            global count
            count += 1
            if count == step:
                if lose and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                    size = os.fstat(arguments[0]).st_size  # a line not yet flushed, or a part of it
                    os.ftruncate(arguments[0], max(size - random.Random(step).randrange(25), 0))
                os._exit(9)
            return real(*arguments, **options)
        return call

    child = os.fork()
    if not child:
        os.fsync, os.replace = killing(os.fsync, True), killing(os.replace, False)
        os.unlink, os.open = killing(os.unlink, False), killing(os.open, False)
        t.run(path, t.documents(), keeps={keeps})
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert killed in (0, 9), killed
    if not killed:
        break
    partial = path.with_name(path.name + ".partial")
    before = partial.read_bytes().count(b"\\n") if partial.exists() else 0
    journal = path.with_name(path.name + ".partial.journal")
    named = path.read_text() != "the file of before" and journal.exists()
    made = t.run(path, t.documents(), keeps={keeps})
    print(step, before, named, made)
"""


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [0, 2])
def test_killed_at_every_touch_of_the_disk(tmp_path, keeps):
    """Each step of a run in turn is its last one, and loses what the disk need not have yet; then
    the run is started again."""
    folder = tmp_path / "killed"
    folder.mkdir()
    code = KILLED.format(tests=str(pathlib.Path(__file__).parent), folder=str(folder), keeps=keeps)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run(tmp_path / "whole.jsonl", documents())
    whole = (tmp_path / "whole.jsonl").read_bytes()
    steps = [line.split() for line in done.stdout.splitlines()]
    assert len(steps) > 12, done.stdout
    for step, before, named, made in steps:
        assert (folder / f"{step}.jsonl").read_bytes() == whole, step
        assert int(made) <= 10 - max(int(before) - 3, 0), step  # up to a window again
        assert named == "False" or made == "0", step
    again = {*range(11)} if keeps else {10, 7, 4, 1, 0}
    assert {int(made) for *_, made in steps} >= again
    assert any(named == "True" for _, _, named, _ in steps)
    assert not list(folder.glob("*.partial*"))


@pytest.mark.parametrize(
    ("docs", "settings", "message"),
    [
        (documents(), {"model": {"layers": 4}, "fields": None}, r"model.layers: it was 2 and is 4"),
        (documents(), {**SETTINGS, "more": [1]}, r"more: it was None and is \[1\]"),
        (documents(5), SETTINGS, "the input ends after 5 documents"),
        ([*documents()[:2], *documents()[3:]], SETTINGS, "in.jsonl, line 3 is 3 and was 2"),
        (
            [documents()[0]._replace(raw=b"other"), *documents()[1:]],
            SETTINGS,
            "the ids are the same, but not what the finished documents say",
        ),
    ],
)
def test_another_run_is_not_continued(half, docs, settings, message):
    kept = half.with_name("out.jsonl.partial").read_bytes()
    with pytest.raises(ValueError, match=f'(?s){message}.*unfinished="replace"'):
        run(half, docs, settings=settings)
    assert half.with_name("out.jsonl.partial").read_bytes() == kept
    run(half, docs, settings=settings, unfinished="replace")
    assert [line["id"] for line in lines(half)] == [d.name for d in docs]
    assert [p.name for p in half.parent.iterdir()] == ["out.jsonl"]


def test_finished_documents_of_a_window_are_kept(tmp_path):
    path, docs = tmp_path / "out.jsonl", documents()
    ahead = tmp_path / "out.jsonl.partial.ahead"

    def stops(settings=SETTINGS):
        with ResumableLines(path, settings) as file:
            file.ahead(docs[:3])
            file.keep(docs[:3], {2: "c"})
            file.keep(docs[:3], {2: "c", 0: "a"})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop") as caught:
        stops()
    assert "2 finished documents are kept" in caught.value.__notes__[0]
    kept = ahead.read_bytes()
    with pytest.raises(ValueError, match=r"(?s)fields: it was None and is 1.*unfinished=.replace"):
        run(path, docs, settings=SETTINGS | {"fields": 1})
    with ahead.open("ab") as file:
        file.write(b'[1, "b')  # a line that a kill cut off
    with ResumableLines(path, SETTINGS) as file:
        assert file.ahead(docs[:3]) == {2: "c", 0: "a"} and file.ahead(docs[3:]) == {}
        assert file.restored == 2 and ahead.read_bytes() == kept
        file.write(docs[:3], ["a", "b", "c"])
        assert not ahead.exists()
    with pytest.raises(RuntimeError, match="stop"):
        stops()
    others = [docs[0]._replace(raw=b"mended"), *docs[1:]]
    assert run(path, others) == 10 and not ahead.exists()  # what the documents say has changed
    for damaged in (b"", b"[]\n", b"{}\n", kept[:30], kept.splitlines()[0] + b'\n[0, "a'):
        with pytest.raises(RuntimeError, match="stop"):
            stops()
        ahead.write_bytes(damaged)
        assert run(path, docs) == 10, damaged
        assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_more_documents_than_before_are_welcome(half):
    assert run(half, documents(12)) == 6 and len(lines(half)) == 12


def test_damaged_files_are_named(half):
    partial, journal = (half.with_name(f"out.jsonl.partial{end}") for end in ("", ".journal"))
    data, entries = partial.read_bytes(), journal.read_bytes()
    partial.write_bytes(data[:20])
    with pytest.raises(ValueError, match="it has 20 bytes and must have at least"):
        run(half, documents())
    partial.write_bytes(data)
    journal.write_bytes(b"{" + entries)
    with pytest.raises(ValueError, match="journal is damaged"):
        run(half, documents())
    journal.unlink()
    with pytest.raises(ValueError, match="has no journal beside it"):
        run(half, documents())
    with pytest.raises((ValueError, TypeError), match="append"):
        run(half, documents(), unfinished="append")
    journal.write_bytes(entries)
    assert run(half, documents()) == 4


def test_one_process_at_a_time(half):
    with ResumableLines(half, SETTINGS) as file:
        with pytest.raises(OSError, match="another process writes"):
            run(half, documents())
        left = iter(documents())
        file.skip(left)
        part = list(left)
        file.write(part, [json.dumps({"id": d.name, "is": d.content.upper()}) for d in part])
    assert len(lines(half)) == 10


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_is_finished(tmp_path):
    path = tmp_path / "out.jsonl"
    docs = [d._replace(content="long text " * 50) for d in documents()]
    with files_of_at_most(4000), pytest.raises(OSError, match="6 finished documents are kept in"):
        run(path, docs)
    assert not path.exists()
    assert run(path, docs) == 4 and len(lines(path)) == 10


def test_targets_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"nothing is written.*file"):
        run(tmp_path / "file" / "out.jsonl", documents())
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        run(tmp_path, documents())
    with files_of_at_most(0), pytest.raises(OSError, match="nothing is written"):
        run(tmp_path / "out.jsonl", documents())
    assert run(tmp_path / "out.jsonl", documents()) == 10


def test_a_run_that_has_finished_nothing_holds_nobody_to_its_settings(tmp_path):
    """As a kill in the first window leaves it."""
    path = tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.partial.journal"
    journal.write_text(json.dumps({"max_length": 8}) + "\n" + '{"documents": 3, "byt')
    (tmp_path / "out.jsonl.partial").write_text('{"id": 0, "is": "TE')
    with ResumableLines(path, SETTINGS) as file:
        assert file.finished == 0 and json.loads(journal.read_text()) == SETTINGS
        file.write(documents(1), ['{"id": 0}'])
    assert path.read_text() == '{"id": 0}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
