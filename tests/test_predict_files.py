"""From file to file: what lines say, killed runs, and what is refused."""

import functools
import json
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import transformers
from tiny_run import save_tiny

import lsg_flax
from lsg_flax import LSGConfig, cli, inference
from lsg_flax.data import DatasetPart
from lsg_flax.inference import ResumableLines
from lsg_flax.inference.program import Program
from lsg_flax.models import EncoderConfig, Model
from lsg_flax.pipelines.documents import DocumentFile
from lsg_flax.pipelines.files import ANSWERS, Written, predict_file
from lsg_flax.pipelines.tasks import FillMask, TextClassification

WORDS = "paris is the capital of france and a small town with long roads ##s ##er . , ?"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
TEXTS = ["Paris is the capital.", "A small town, " * 6, "Long roads?", "", "France. " * 20]
LIMIT, BUCKETS = 64, (64,)
OPTIONS = {"buckets": BUCKETS, "batch_size": 4, "progress": False}


@functools.cache
def make(task="sequence_classification"):
    lsg = LSGConfig(block_size=4, sparse_block_size=4, num_global_tokens=2)
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 8, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": LIMIT}
    model = Model(EncoderConfig(**sizes, initializer_range=1.0, lsg=lsg), task)
    return model, jax.jit(model.init)(jax.random.key(1), np.zeros((1, 3), np.int32))["params"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": LIMIT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder)


def write(path, documents):
    path.write_text("".join(f"{json.dumps(d)}\n" for d in documents))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(count):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, LIMIT, count)
    return [{"input_ids": generator.integers(5, 20, n).tolist()} for n in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_texts_in_answers_out(kind, tmp_path, tokenizer):
    source, target = tmp_path / f"in{kind}", tmp_path / "out.jsonl"
    texts = [*TEXTS[:3], "" if kind == ".txt" else "?", TEXTS[4]]  # no row of .jsonl is empty
    names = list(range(5)) if kind == ".txt" else ["a", 7, "c", None, "e"]
    if kind == ".txt":
        source.write_text("".join(f"{text}\n" for text in texts))
    else:
        write(source, [{"id": n, "text": t} for n, t in zip(names, texts, strict=True)])
    options = OPTIONS | {"tokenizer": tokenizer, "window": 2}
    for task in ("sequence_classification", "token_classification"):
        pair = make(task)
        done = predict_file(source, target, *pair, answers=ANSWERS[task], **options)
        assert done == Written(5, 5, ())
        name, choice = (
            ("text-classification", {"top_k": None})
            if task == "sequence_classification"
            else ("token-classification", {"aggregation_strategy": "simple"})
        )
        run = lsg_flax.pipeline(name, pair, tokenizer, buckets=BUCKETS, batch_size=4, **choice)
        assert [line["id"] for line in lines(target)] == names
        for line, expected in zip(lines(target), run(texts), strict=True):
            assert len(line["answer"]) == len(expected)
            for ours, theirs in zip(line["answer"], expected, strict=True):
                score, other = ours.pop("score"), theirs.pop("score")
                assert ours == theirs and score == pytest.approx(other, abs=1e-5)
    # TEXTS[4] has 42 tokens
    done = predict_file(source, target, *make(), **options, max_length=8, truncation=True)
    cut = [{"input_ids": tokenizer(t, truncation=True, max_length=8)["input_ids"]} for t in texts]
    for line, expected in zip(
        lines(target), inference.predict(*make(), cut, **OPTIONS), strict=True
    ):
        np.testing.assert_allclose(line["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=rf"in{kind}:2: .* more than 8.*truncation=True"):
        predict_file(source, tmp_path / "no.jsonl", *make(), **options, max_length=8)


def test_a_question_is_answered_over_windows(tmp_path, tokenizer):
    context = "Paris is the capital of France,  a small town. " * 12
    documents = [{"question": "Is Paris small?", "context": c} for c in (TEXTS[0], context)]
    source, target = write(tmp_path / "in.jsonl", documents), tmp_path / "out.jsonl"
    pair = make("question_answering")
    answers = ANSWERS["question_answering"]
    predict_file(source, target, *pair, tokenizer=tokenizer, answers=answers, **OPTIONS)
    run = lsg_flax.pipeline("question-answering", pair, tokenizer, buckets=BUCKETS, batch_size=4)
    for line, expected in zip(lines(target), run(documents), strict=True):
        assert line["answer"].pop("score") == pytest.approx(expected.pop("score"), abs=1e-5)
        assert line["answer"] == expected


KILLED = """
import pathlib
import pickle
from lsg_flax.pipelines import predict_file
with open({made!r}, "rb") as file:
    model, params, options = pickle.load(file)
print(predict_file({source!r}, {target!r}, model, params, **options).computed)
"""


@pytest.mark.slow
def test_a_killed_run_continues_and_makes_the_same_bytes(tmp_path):
    """SIGKILL at random moments after the first window, then once more to the end."""
    source, target = write(tmp_path / "in.jsonl", ids(2400)), tmp_path / "out.jsonl"
    whole, made = tmp_path / "whole.jsonl", tmp_path / "made"
    options = OPTIONS | {"window": 8, "buckets": (16, LIMIT)}
    model, params = make()
    assert predict_file(source, whole, model, params, **options).computed == 2400
    made.write_bytes(pickle.dumps((model, jax.tree.map(np.asarray, params), options)))
    partial = tmp_path / "out.jsonl.partial"
    code = KILLED.format(made=str(made), source=str(source), target=str(target))
    generator, before, kills = random.Random(0), 0, 0
    while kills < 3:
        with subprocess.Popen([sys.executable, "-c", code], env=os.environ) as process:
            while not partial.exists() or partial.read_bytes().count(b"\n") <= before:
                assert process.poll() is None
                time.sleep(0.005)
            time.sleep(generator.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        assert not target.exists() and process.returncode == -signal.SIGKILL
        kills, before = kills + 1, partial.read_bytes().count(b"\n")
    last = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert 2400 - before <= int(last.stdout) <= 2400 - before + 8
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("in.jsonl", "made", "out.jsonl", "whole.jsonl")
    ]


@pytest.mark.parametrize("task", ["sequence_classification", "question_answering"])
def test_a_run_that_dies_in_its_first_window_goes_on_there(tmp_path, tokenizer, monkeypatch, task):
    """With the batches that are left, and the same bytes; a question may have rows in several."""
    context = "Paris is the capital of France,  a small town. "
    asked = [{"question": "Is Paris small?", "context": n * context} for n in (1, 9, 2, 14, 1, 5)]
    documents = asked if task == "question_answering" else ids(17)
    source, target = write(tmp_path / "in.jsonl", documents), tmp_path / "out.jsonl"
    options = OPTIONS | {"tokenizer": tokenizer, "answers": ANSWERS[task], "buckets": (16, LIMIT)}
    whole, batches, start = tmp_path / "whole.jsonl", [], Program.start

    def starting(self, params, batch):
        batches.append(batch["input_ids"].tobytes())
        return start(self, params, batch)

    monkeypatch.setattr(Program, "start", starting)
    assert predict_file(source, whole, *make(task), **options).computed == len(documents)
    every = batches.copy()
    monkeypatch.setattr("lsg_flax.inference.lines.KEPT_EVERY", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableLines, "write", dies_behind(0))
        predict_file(source, target, *make(task), **options)
    batches.clear()
    written = predict_file(source, target, *make(task), **options)
    assert batches == [batch for batch in every if batch in batches]  # in order, and no others
    assert 0 < len(batches) < len(every) and 0 < written.computed < written.documents
    assert target.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "whole.jsonl"}


def test_what_was_finished_belongs_to_one_model_and_source(tmp_path):
    source, target = write(tmp_path / "in.jsonl", [*ids(6), {"input_ids": [99]}]), tmp_path / "out"
    model, params = make()
    run = functools.partial(predict_file, source, target, **OPTIONS | {"window": 1})
    with pytest.raises(ValueError, match=r"in.jsonl:7 has input_ids in 99\.\.99") as caught:
        run(model, params)
    finished = int(caught.value.__notes__[0].split()[0])
    assert 6 - inference.IN_FLIGHT - 1 <= finished <= 6
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(ValueError, match=r"parameters: it was '.*' and is"):
        run(model, other)
    with pytest.raises(ValueError, match=r"buckets: it was .* and is \[16, 64\]"):
        run(model, params, buckets=(16, 64))
    with pytest.raises(ValueError, match=r"answers: it was None and is .TextClassification\("):
        run(model, params, answers=TextClassification())
    write(source, ids(6))
    assert run(model, params, batch_size=2) == Written(6, 6 - finished, ())


def test_broken_lines_are_named_and_skipped_on_request(tmp_path, tokenizer):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    broken = {
        2: (b'{"text": "Par', "not valid JSON"),
        3: (b'{"text": "\xff"}', "not valid UTF-8"),
        5: (b"[1]", "a line must be a JSON object"),
        6: (
            b'{"id": 1, "label": 2}',
            r"it has \['id', 'label'\] and must have text, or question and context",
        ),
        7: (b'{"text": 3}', "its text must be a text, got 3"),
        18: (b'{"id": [NaN], "text": "a"}', r"its id \[nan\] has NaN or infinity"),
        19: (b'{"id": 1e999, "text": "a"}', "its id inf has NaN or infinity"),
        8: (b'{"input_ids": [1, "2"]}', "its input_ids must be a list of integers"),
        9: (rb'{"text": "\ud800"}', "a lone surrogate"),
        12: (rb'{"text": " \u200b\ufeff\n"}', "its text is empty"),
        13: (b'{"text": "a", "text_pair": " "}', "its text_pair is empty"),
        14: (b'{"question": "", "context": "a"}', "its question is empty"),
        15: (b'{"question": "a", "context": ""}', "its context is empty"),
        16: (b'{"input_ids": [1], "attention_mask": [0]}', "its attention_mask is 0 everywhere"),
        17: (b'{"input_ids": [[1], [2]], "attention_mask": [[1], [0]]}', "its attention_mask is 0"),
    }
    good = {
        1: b'{"text": "Paris"}',
        4: b'{"text": "town", "label": 1}',
        10: b"",
        11: b'{"text": "a"}',
        12: b"",
    }
    for number, (line, message) in broken.items():
        every = good | {number: line}
        source.write_bytes(b"\n".join(every.get(i, good[1]) for i in range(1, 20)) + b"\n")
        with pytest.raises(ValueError, match=rf"in.jsonl:{number}: {message}.*skip"):
            list(DocumentFile(source))
    every = good | {number: line for number, (line, _) in broken.items()}
    source.write_bytes(b"\n".join(every[i] for i in range(1, 20)))
    with pytest.warns(UserWarning, match=r"15 broken lines of .* were skipped: 2, 3, 5, 6"):
        done = predict_file(
            source, target, *make(), tokenizer=tokenizer, broken_lines="skip", **OPTIONS
        )
    assert done == Written(3, 3, tuple(sorted(broken)))
    assert [line["id"] for line in lines(target)] == [0, 3, 10]


@pytest.mark.parametrize("pair", ["", None])
def test_an_empty_pair_is_none_as_in_training(tmp_path, pair):
    source = write(tmp_path / "in.jsonl", [{"text": "a", "text_pair": pair}])
    assert [d.content for d in DocumentFile(source)] == [{"text": "a"}]


def test_a_batch_is_not_filled_up_beyond_the_rows_there_are(tmp_path, monkeypatch):
    """And one size serves the whole run, so that a bucket is compiled once."""
    source, shapes = write(tmp_path / "in.jsonl", ids(5)), set()
    start = Program.start

    def starting(self, params, batch):
        shapes.add(batch["input_ids"].shape)
        return start(self, params, batch)

    monkeypatch.setattr(Program, "start", starting)
    for window, rows in ((9, 5), (3, 3)):
        options = OPTIONS | {"batch_size": 10**12, "window": window}
        predict_file(source, tmp_path / "out", *make(), **options)
        assert shapes == {(rows, LIMIT)}
        shapes.clear()


UNFIT = [
    ({"input_ids": [2, 99, 3]}, r"in.jsonl:2 has input_ids in 2\.\.99, but vocab_size=23 allows"),
    ({"input_ids": [2, 5, 3], "attention_mask": [1]}, r"in.jsonl:2 has \[1\] attention_mask"),
    ({"input_ids": [[2, 3]]}, "in.jsonl:2: input_ids are one list of numbers"),
    ({"question": "a", "context": "b"}, r"in.jsonl:2: a document has \['context', 'question'\]"),
    ({"text": "town " * 99}, r"in.jsonl:2: the text 'town .* has 101 tokens, more than 64"),
]


@pytest.mark.parametrize(("row", "message"), UNFIT)
def test_a_row_that_the_model_cannot_take_is_a_broken_line(
    row, message, tmp_path, tokenizer, monkeypatch
):
    """Also behind documents that a run has finished before."""
    texts = "input_ids" not in row
    good = (
        {"text": "Paris"}
        if texts
        else {"input_ids": [2, 5, 3]} | {key: [1, 1, 1] for key in row.keys() - {"input_ids"}}
    )
    source, target = write(tmp_path / "in.jsonl", [good, row, good]), tmp_path / "out.jsonl"
    options = OPTIONS | {"tokenizer": tokenizer, "answers": TextClassification()}
    run = functools.partial(predict_file, source, target, *make(), **options)
    with pytest.raises(ValueError, match=message + '.*Mend it, or pass broken_lines="skip"'):
        run()
    with pytest.warns(UserWarning, match=r"1 broken lines of .*in.jsonl were skipped: 2\."):
        assert run(broken_lines="skip") == Written(2, 2, (2,))
    whole = target.read_bytes()
    assert [line["id"] for line in lines(target)] == [0, 2]
    with monkeypatch.context() as patch:  # the run dies behind its first window
        patch.setattr(ResumableLines, "write", dies_behind(1))
        with pytest.raises(KeyboardInterrupt):
            run(broken_lines="skip", window=1)
    with pytest.warns(UserWarning, match="were skipped: 2"):
        assert run(broken_lines="skip", window=1) == Written(2, 1, (2,))
    assert [line["id"] for line in lines(target)] == [0, 2] and len(whole) == target.stat().st_size


def dies_behind(windows: int):
    """`ResumableLines.write` that is interrupted after so many windows."""
    write, written = ResumableLines.write, []

    def dying(self, *given):
        if len(written) == windows:
            raise KeyboardInterrupt
        written.append(given)
        write(self, *given)

    return dying


def test_what_is_wrong_for_every_row_is_not_skipped(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "Paris"}])
    with pytest.raises(ValueError, match=r"in.jsonl:1: a text needs tokenizer="):
        predict_file(source, tmp_path / "out", *make(), broken_lines="skip", **OPTIONS)


@pytest.mark.parametrize(
    ("document", "options", "message"),
    [
        ({"text": "Paris"}, {}, r"jsonl:1: a text needs tokenizer="),
        ({"input_ids": [[1, 2], [3]]}, {}, r"jsonl:1: input_ids are one list of numbers"),
        ({"input_ids": [1]}, {"answers": FillMask()}, "FillMask is not possible for files"),
        (
            {"input_ids": [1]},
            {"answers": ANSWERS["question_answering"]},
            "needs a model for question_ans",
        ),
        (
            {"input_ids": [1]},
            {"answers": TextClassification(), "fields": ("logits",)},
            "exclude each other; give one of them",
        ),
        (
            {"input_ids": [1]},
            {"max_length": 65},
            r"max_length=65 .* 1..64, what this model reads; give",
        ),
        (
            {"input_ids": [1]},
            {"max_length": 65, "buckets": (16, 32)},
            r"max_length=65 must be in 1..32, the largest of buckets",
        ),
        ({"input_ids": [1]}, {"window": 0}, "window=0 must be at least 1"),
    ],
)
def test_what_does_not_fit(document, options, message, tmp_path):
    source = write(tmp_path / "in.jsonl", [document])
    with pytest.raises(ValueError, match=message):
        predict_file(source, tmp_path / "out.jsonl", *make(), **OPTIONS | options)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl is no file"):
        DocumentFile(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=r"must end in .jsonl, .csv, .parquet, .txt, or"):
        DocumentFile(tmp_path / "in.xlsx")


@pytest.fixture
def dataset(monkeypatch):
    """A dataset of the hub with two splits, of which `small` has one."""
    datasets = pytest.importorskip("datasets")
    splits = {
        "train": datasets.Dataset.from_dict({"body": ["w5 w6", "w7"]}),
        "test": datasets.Dataset.from_dict({"body": ["w9 w8 w7", "w6"], "key": ["a", "b"]}),
    }

    def load_dataset(name, subset=None, *, split=None):
        if (name, subset) not in (("somebody/two", "long"), ("small", None)):
            raise FileNotFoundError(f"nothing called {name}")
        found = {"test": splits["test"]} if name == "small" else splits
        return found if split is None else found[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_dataset_is_read_by_its_name(dataset, tmp_path):
    columns = {"text": "body", "id": "key"}
    part = DatasetPart("somebody/two", "long", "test")
    texts = [("a", {"text": "w9 w8 w7", "id": "a"}), ("b", {"text": "w6", "id": "b"})]
    for source in (part, "small", DatasetPart("small")):
        documents = DocumentFile(source, columns=columns)
        assert [(d.name, d.content) for d in documents] == texts
        assert documents.count_lines() == 2
    train = DocumentFile(part._replace(split="train"), columns={"text": "body"})
    assert [d.name for d in train] == [0, 1] and train.name == "somebody/two[train]"
    with pytest.raises(ValueError, match="has the splits train, test; give one of them as split="):
        DocumentFile(part._replace(split=None))
    with pytest.raises(ValueError, match=r"load it as load_dataset\('none', None, split='x'\)"):
        DocumentFile(DatasetPart("none", None, "x"))
    with pytest.raises(ValueError, match=r"two\[train\], row 0: it has \['body'\] and must have"):
        list(DocumentFile(part._replace(split="train")))
    skipped = DocumentFile(part._replace(split="train"), broken_lines="skip")
    assert list(skipped) == [] and skipped.skipped[1] == "somebody/two[train], row 1"
    (tmp_path / "in.txt").write_text("w5")
    with pytest.raises(ValueError, match=r"split='test' is for a dataset, but .*in\.txt names"):
        DocumentFile(DatasetPart(str(tmp_path / "in.txt"), split="test"))


def test_commands_read_a_dataset_by_its_name(dataset, capsys, tmp_path):
    columns, long = ["--columns", "text=body,id=key"], ["--subset", "long"]
    model, answers, vectors = (str(tmp_path / n) for n in ("model", "answers.jsonl", "v.jsonl"))
    save_tiny(pathlib.Path(model))
    given = ["predict", model, "somebody/two", answers, "--outputs", *columns, *long]
    assert cli.main([*given]) == 2
    assert "has the splits train, test; give one of them as --split" in capsys.readouterr().err
    for done in ("wrote", "replaced"):  # the same command again replaces its own result
        assert cli.main([*given, "--split", "test"]) == 0
        assert capsys.readouterr().out == f"{done} {answers}: 2 documents\n"
    assert cli.main(["embed", model, "small", vectors, "--pooling", "mean", *columns]) == 0
    for file in (answers, vectors):
        rows = [json.loads(line) for line in pathlib.Path(file).read_text().splitlines()]
        assert [row["id"] for row in rows] == ["a", "b"]
    assert "texts longer than 16 tokens" in capsys.readouterr().out
