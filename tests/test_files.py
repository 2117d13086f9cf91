"""Lines are read alike for training, prediction and embedding; a file appears whole or not."""

import json
import os
import pathlib

import pytest
from golden_data import GOLDEN

from lsg_flax import cli
from lsg_flax.data.files import Problems, open_source
from lsg_flax.files import write_aside
from lsg_flax.pipelines.embeddings import read_texts
from lsg_flax.pipelines.files import DocumentFile


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
    with pytest.raises(ValueError, match=r"in.jsonl:1: not valid UTF-8 at character 1"):
        read(tmp_path / "in.jsonl")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    write_aside(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_aside(file, b"new")
    assert file.read_bytes() == b"old" and [*tmp_path.iterdir()] == [file]
    (tmp_path / "settings.json.new").write_bytes(b"what a kill left")
    write_aside(file, b"new")
    assert file.read_bytes() == b"new" and [*tmp_path.iterdir()] == [file]


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
