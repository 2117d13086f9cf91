"""Lines are read alike for training, prediction and embedding; a file appears whole or not."""

import argparse
import errno
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from golden_data import GOLDEN
from tiny_tokenizers import write_words

from lsg_flax import cli
from lsg_flax.cli.shared import check_result
from lsg_flax.data.files import Problems, open_source
from lsg_flax.files import check_output, read_json, write_aside, written_aside
from lsg_flax.hub import Checkpoint, open_checkpoint
from lsg_flax.locks import PlaceTaken, holds, locked, locked_file
from lsg_flax.pipelines import Embedder
from lsg_flax.pipelines.documents import DocumentFile
from lsg_flax.pipelines.embeddings import read_texts


def to_train(file: pathlib.Path) -> list[str]:
    rows = open_source(file, subset=None, split="train").rows(Problems("raise"))
    return [row.values["text"] for row in rows]


def to_predict(file: pathlib.Path) -> list[str]:
    return [document.content["text"] for document in DocumentFile(file)]


def to_embed(file: pathlib.Path) -> list[str]:
    return read_texts(file)[1]


READERS = (to_train, to_predict, to_embed)
LONG = "word " * 500_000


@pytest.mark.parametrize("read", READERS)
def test_what_all_readers_make_of_lines(tmp_path, read):
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in ("é\u2028b", LONG, "c")]
    file = tmp_path / "in.jsonl"
    file.write_bytes("\r\n".join(["\ufeff" + rows[0], "", *rows[1:], " ", ""]).encode())
    assert read(file) == ["é\u2028b", LONG, "c"]  # a blank line is no row
    file = tmp_path / "in.txt"
    file.write_bytes(f"\ufeffa\x0cb\r\n\n{LONG}\n\n".encode())
    expected = ["a\x0cb", "", LONG, ""]  # an output belongs to each line: an empty text
    assert read(file) == ([text for text in expected if text] if read is to_train else expected)
    file.write_bytes(b"")
    assert read(file) == []


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        (".jsonl", b'{"text": "a', "not valid JSON: Unterminated string"),
        (".jsonl", b"[" * 100_000, "not valid JSON: maximum recursion depth"),
        (".jsonl", b'["a"]', r'a line must be a JSON object, got \["a"\]'),
        (".jsonl", b'{"text": "a\xff"}', "not valid UTF-8 at character 11"),
        (".txt", b"ab\xff", "not valid UTF-8 at character 2"),
    ],
)
def test_what_all_readers_say_of_a_broken_line(tmp_path, read, kind, line, message):
    file = tmp_path / f"in{kind}"
    file.write_bytes((b'{"text": "a"}' if kind == ".jsonl" else b"a") + b"\n\n" + line)
    with pytest.raises(ValueError, match=rf"{file}:3: {message}"):
        read(file)


@pytest.mark.parametrize("read", [to_predict, to_embed])
def test_half_a_character_in_json_is_found_before_the_tokenizer_reads_it(tmp_path, read):
    (tmp_path / "in.jsonl").write_bytes(rb'{"text": "a\ud800"}')
    with pytest.raises(
        ValueError, match=r"in.jsonl:1: a lone surrogate \(half of a character, .ud800\) at"
    ):
        read(tmp_path / "in.jsonl")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    write_aside(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_aside(file, b"new")
    assert file.read_bytes() == b"old" and [*tmp_path.iterdir()] == [file]
    (tmp_path / ".lsg-flax-unfinished-settings.json").write_bytes(b"what a kill left")
    write_aside(file, b"new")
    assert file.read_bytes() == b"new" and [*tmp_path.iterdir()] == [file]


def test_broken_lines_of_texts_are_skipped_on_request(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(rb"""{"text": "a", "id": "x"}
{"text": "a", "id": -Infinity}
{"text": "\ud83d"}
{"text": "b", "text": "c"}

{"text": "d"}""")
    with pytest.raises(
        ValueError, match=r"in.jsonl:2: its id -inf has NaN or inf.*Mend it, or pass"
    ):
        read_texts(file)
    with pytest.warns(UserWarning, match=r"3 broken lines of .*in.jsonl were skipped: 2, 3, 4"):
        read = read_texts(file, broken_lines="skip")
    assert read == (["x", 5], ["a", "d"], [f"{file}:1", f"{file}:6"])


def test_a_plan_is_not_written_over_its_source(tmp_path, capsys):
    source = tmp_path / "config.json"
    source.write_text("{}")
    for given, says in ((source, "is the input"), (tmp_path, "is a file in the folder of the")):
        line = ["plan", given, "--json", source, "--topology", "cpu:8", "--batch-size", 8]
        assert cli.main([str(part) for part in line]) == 2
        assert f"{source} {says}" in capsys.readouterr().err
    assert source.read_text() == "{}"


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("command", ["predict", "embed", "generate"])
def test_an_input_is_never_the_output(tmp_path, capsys, command, linked):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "w5"}\n')
    if linked:
        target.symlink_to(source)
    name = "bert_causal_lm" if command == "generate" else "bert_sequence_classification"
    output = target if linked else source
    assert cli.main([command, str(GOLDEN / name), str(source), str(output)]) == 2
    assert f"{output} is the input {source}; give another file" in capsys.readouterr().err
    assert source.read_text() == '{"text": "w5"}\n'
    target = tmp_path / "other.jsonl"
    with locked_file(target):
        assert cli.main([command, str(GOLDEN / name), str(source), str(target)]) == 2
    assert f"another process writes {target}: process" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if not p.is_symlink()) == ["in.jsonl"]


@pytest.mark.parametrize("command", ["predict", "embed", "generate", "plan"])
def test_a_file_of_the_model_is_never_the_output(tmp_path, capsys, monkeypatch, command):
    source, model = tmp_path / "in.txt", tmp_path / "m"
    source.write_text("w5")
    name = "bert_causal_lm" if command == "generate" else "bert_to_convert_512"
    shutil.copytree(GOLDEN / name, model)
    for file in (GOLDEN / "bert_to_convert_512").iterdir():
        if not (model / file.name).exists():
            shutil.copy(file, model)
    target = model / ("scores.jsonl" if command == "embed" else "vocab.txt")
    target.write_text((model / "vocab.txt").read_text())
    before = {file: file.read_bytes() for file in model.iterdir()}
    (tmp_path / "link").symlink_to(target)
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(Embedder, "from_pretrained", lambda m, **_: Opened(open_checkpoint(m)))
    for output in (target, tmp_path / "link") if command != "embed" else (target,):
        line = [command, model, source, output, *{"predict": ["--outputs"]}.get(command, [])]
        if command == "plan":
            line = [command, model, "--json", output, "--topology", "cpu:8", "--batch-size", 8]
        assert cli.main([*map(str, line)]) == 2
        assert f"{output} is a file in the folder of the model, {model}" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in model.iterdir()} == before


TEXTS = '{"text": "a", "positive": "b"}'
FOREIGN = [
    ("predict --outputs", "id,text", "its first line is no JSON"),
    ("predict --outputs", "\udcff", "its first line is no JSON"),
    ("predict --outputs", TEXTS, "its first line has text, positive"),
    ("predict --outputs", '{"id": 1, "input_ids": [2]}', "its first line has id, input_ids"),
    ("predict --outputs", '{"id": 1}', "its first line has id"),
    ("predict --outputs", '{"answer": 1}', "its first line has answer"),
    ("embed --pooling mean", TEXTS, "its first line has text, positive"),
    ("generate", TEXTS, "its first line has text, positive"),
    ("generate", '{"id": "a", "text": "b"}', "its first line has id, text"),
    ("summarize", '{"id": 1, "text": "a"}', "its first line has id, text"),
]
RESULTS = [
    ("predict --outputs", ""),
    ("predict --outputs", '{"id": 1, "answer": []}\n{"no": 1}'),
    ("predict --outputs", '{"id": 1, "logits": [1.0], "pooler_output": [1.0]}'),
    ("embed --pooling mean", '{"id": null, "embedding": [1.0]}'),
    ("generate", '{"id": "a", "text": "b", "finish_reason": "stop"}'),
    ("summarize", '{"id": "a", "summary": "b"}'),
]


@pytest.mark.parametrize(("command", "text", "says"), [*FOREIGN, *((*r, None) for r in RESULTS)])
def test_only_a_result_of_the_command_is_replaced(
    tmp_path, capsys, monkeypatch, command, text, says
):
    """Data named as OUTPUT by mistake is refused before weights are read, and stays."""
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("w5")
    target.write_bytes(text.encode(errors="surrogateescape"))
    name, *flags = command.split()
    model = {"generate": "bert_causal_lm", "summarize": "bart_conditional_generation"}.get(name)
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(Embedder, "from_pretrained", lambda *_, **__: (None, None))
    line = [name, str(GOLDEN / (model or "bert_to_convert_512")), str(source), str(target)]
    assert cli.main([*line, *flags]) == 2
    err = capsys.readouterr().err
    if says is None:
        assert "is no result" not in err
    else:
        assert f"{target} exists and is no result of lsg-flax {name}: {says}. It is not" in err
        assert "give another OUTPUT, or remove it." in err
    assert target.read_bytes() == text.encode(errors="surrogateescape")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((2, 3), np.float32), None),
        (np.zeros((0, 3), np.float32), None),
        (np.zeros(3, np.float32), "it is an array of float32 [3]"),
        (np.zeros((2, 3), np.int64), "it is an array of int64 [2, 3]"),
        (np.array([None]), "it is no array of numbers"),
        (None, "it is no array of numbers"),
    ],
)
def test_only_an_array_of_vectors_is_replaced(tmp_path, values, says):
    file = tmp_path / "out.npy"
    file.write_bytes(b"mine") if values is None else np.save(file, values)
    parser = argparse.ArgumentParser("lsg-flax embed")
    arguments = argparse.Namespace(output=str(file), command=parser)
    if says is None:
        assert check_result(arguments, "embedding") == "replaced"
        return
    with pytest.raises(ValueError, match=re.escape(f"no result of lsg-flax embed: {says}. It")):
        check_result(arguments, "embedding")


@pytest.mark.parametrize("command", ["predict", "summarize", "embed", "generate"])
@pytest.mark.filterwarnings("always:.*has no documents")  # the command shows it
def test_an_input_without_documents_is_said(tmp_path, capsys, command):
    """A file may be empty, among many files; a folder or a pattern without files is a mistake."""
    names = {"generate": "bert_causal_lm", "summarize": "bart_plain_conditional_generation"}
    model, target = tmp_path / "m", tmp_path / "out.jsonl"
    shutil.copytree(GOLDEN / names.get(command, "bert_to_convert_512"), model)
    if command == "summarize":
        write_words(model)
    elif command == "generate":
        for file in ("vocab.txt", "tokenizer_config.json"):
            shutil.copy(GOLDEN / "bert_to_convert_512" / file, model)
    more = {"predict": ["--outputs"], "embed": ["--pooling", "mean"]}.get(command, [])
    (tmp_path / "in.jsonl").touch()
    (tmp_path / "in.csv").write_text("id,text\n")
    (tmp_path / "none").mkdir()
    for source in ("in.jsonl", "in.csv", "none", "*.parquet"):
        code = cli.main([command, *map(str, (model, tmp_path / source, target)), *more])
        said = capsys.readouterr().err
        if "." not in source or "*" in source:
            assert code == 2 and f"{source} is not a file, nor a folder or pattern with f" in said
            continue
        assert code == 0 and target.read_bytes() == b""
        assert f"warning: {tmp_path / source} has no documents, so the result is empty." in said
        target.unlink()


class Opened(NamedTuple):
    source: Checkpoint


HOLDER = """
import pathlib, sys
from lsg_flax.locks import locked, locked_file
with (locked if sys.argv[1] == "folder" else locked_file)(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_one_process_writes_and_a_dead_one_blocks_nobody(tmp_path, kind):
    place, lock = tmp_path / "deep" / "place", locked if kind == "folder" else locked_file
    command = [sys.executable, "-c", HOLDER, kind, str(place)]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(cli.__file__).parents[2])}
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment) as holder:
        assert holder.stdout.readline() == b"held\n"
        said = rf"another process writes {place}: process {holder.pid} on {socket.gethostname()}, s"
        lock_file = place / ".lock" if kind == "folder" else place.with_name("place.lock")
        for _ in range(2):  # the first has not wiped out who it is
            with pytest.raises(PlaceTaken, match=said), lock(place):
                pass
        holder.kill()
    assert lock_file.read_bytes()[:2] == b'{"'
    with lock(place), pytest.raises(PlaceTaken, match=f"process {os.getpid()} "), lock(place):
        pass
    assert not list(tmp_path.rglob("*lock")) and place.exists() == (kind == "folder")


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with locked(tmp_path / "new"):
        assert holds(tmp_path / "new")
    assert not (tmp_path / "new").exists() and not holds(tmp_path / "new")
    (tmp_path / "file").touch()
    says = pytest.raises(NotADirectoryError, match="file is a file; give a folder")
    with says, written_aside(tmp_path / "file"):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe", "text", "json", "list"])
def test_what_is_no_lock_of_ours_stays(tmp_path, kind):
    lock, data = tmp_path / "out.jsonl.lock", tmp_path / "data"
    data.write_text("precious")
    if kind in ("link", "dangling"):
        lock.symlink_to(data if kind == "link" else tmp_path / "none")
    elif kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.write_text({"text": "precious", "json": '{"process": 1}', "list": "[]"}[kind])
    before = os.lstat(lock)
    says = pytest.raises(
        FileExistsError, match=f"{lock} is needed as a lock.*move it away, or give"
    )
    with says, locked_file(tmp_path / "out.jsonl"):
        pass
    after = os.lstat(lock)
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert data.read_text() == "precious" and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["out.txt.new", ".unfinished-x/a", "out.txt.unfinished"])
def test_only_names_of_ours_are_taken_on_the_way(tmp_path, name):
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    write_aside(tmp_path / "out.txt", b"new")
    with written_aside(tmp_path) as aside:
        (aside / "b").write_text("new")
    assert place.read_text() == "mine"


def test_a_link_in_the_place_of_an_unfinished_file_is_not_followed(tmp_path):
    (tmp_path / "data").write_text("mine")
    (tmp_path / ".lsg-flax-unfinished-out").symlink_to(tmp_path / "data")
    write_aside(tmp_path / "out", b"new")
    assert (tmp_path / "data").read_text() == "mine" and (tmp_path / "out").read_text() == "new"


def test_a_place_without_locks_is_told_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    says = pytest.warns(UserWarning, match="cannot be locked .*No locks.*make sure that no other")
    with says, locked(tmp_path):
        pass


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    (tmp_path / ".lsg-flax-unfinished-x" / "new").mkdir(parents=True)
    with written_aside(tmp_path) as aside:
        (aside / "a").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("limit", [0, 4096])
def test_a_file_that_is_too_large_leaves_the_old_one(tmp_path, limit):
    file = tmp_path / "a.json"
    write_aside(file, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"nothing is written; allow larger files .ulimit.*a.js"):
            write_aside(file, b"new" * 4096)
        says = pytest.raises(OSError, match=r"nothing is written; allow larger")
        with says, written_aside(tmp_path) as aside:
            (aside / "b").write_bytes(b"new" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_bytes() == b"old" and [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/null", "/dev/fd/1", "folder", "pipe"])
def test_what_is_no_file_is_never_replaced(tmp_path, place):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="give the name of a file"):
        check_output(tmp_path / place, tmp_path / "in.jsonl")
    with pytest.raises(OSError, match="give the name of a file"):
        write_aside(tmp_path / place, b"")


@pytest.mark.parametrize(
    "name", ["in.txt", "in.txt.partial", "in.txt.partial.journal", ".lsg-flax-unfinished-in.txt"]
)
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_an_input_is_no_place_on_the_way_to_the_output(tmp_path, name, link):
    source = tmp_path / ("data" if link else name)
    source.write_text("precious")
    if link:
        link(source, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is the input {source}; give another file"):
        check_output(tmp_path / "in.txt", tmp_path / "no.txt", source)


def test_what_a_library_in_rust_says_of_a_full_disk(tmp_path):
    class RustError(Exception):
        pass

    says = pytest.raises(OSError, match=r"No space left.*free disk space.*out'")
    with says, written_aside(tmp_path / "out"):
        raise RustError("Error while serializing: I/O error: No space left (os error 28)")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, pathlib, sys
from lsg_flax.files import write_aside, written_aside

def write_folder(place, text):
    with written_aside(place) as aside:
        for name in ("a", "b", "c"):
            (aside / name).write_text(text)

def write_file(place, text):
    write_aside(place / "a", text.encode())

def read(place):
    return {p.name: p.read_text() for p in place.iterdir() if not p.name.startswith(".")}

def killing(real, step, count=[0]):
    def call(*arguments, **options):
        count[0] += 1
        return os._exit(9) if count[0] == step else real(*arguments, **options)
    return call

for write in (write_file, write_folder):
    for step in range(1, 100):
        place = pathlib.Path(sys.argv[1]) / f"{write.__name__}{step}"
        place.mkdir()
        write(place, "old")
        names = {*read(place)}
        child = os.fork()
        if not child:
            for name in ("open", "fsync", "replace", "unlink", "rmdir", "mkdir", "link", "write"):
                setattr(os, name, killing(getattr(os, name), step))
            write(place, "new")
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = {name: text for name, text in read(place).items() if name in names}
        assert left.keys() == names and {*left.values()} <= {"old", "new"}, left
        write(place, "next")  # nobody is in the way, and nothing stays
        assert {p.name for p in place.iterdir()} == names, [*place.iterdir()]
        assert {*read(place).values()} == {"next"}
        if not ended:
            break
    assert step > 5
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_touch_of_the_disk(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(cli.__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"", "config.json is not valid JSON: Expecting value"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "not valid JSON: the name 'c' is there twice; remove"),
        (b"[" * 100_000, "not valid JSON: maximum recursion depth"),
        (b'{"a": ' * 101 + b"1" + b"}" * 101, "is nested deeper than the 100 allowed levels"),
        (b'{"a": "\xff"}', "not valid JSON: 'utf-8' codec can't decode byte 0xff in position 7"),
        (
            b"{" + b",".join(b'"%d": 1' % n for n in [*range(50_000), 7]) + b"}",
            "'7' is there twice",
        ),
        (b"version https://git-lfs.github.com/spec/v1", "config.json is a git-lfs pointer, not"),
        (b"[1]", "must contain an object, but contains a list"),
        (b"7" * 5000, "not valid JSON: Exceeds the limit"),
    ],
)
def test_a_damaged_json_file_is_named(tmp_path, contents, says):
    file = tmp_path / "config.json"
    file.write_bytes(contents)
    with pytest.raises(ValueError, match=says):
        read_json(file)


def test_json_as_some_editors_save_it(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(file) == {"a": "é"}
    file.write_bytes(b'{"a": ' * 100 + b"1" + b"}" * 100)
    assert json.loads(json.dumps(read_json(file), indent=2)) == read_json(file)
