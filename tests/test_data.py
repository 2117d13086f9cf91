"""From files to rows: readers, tokenizing per task, the cache."""

import csv
import json
import pathlib
import shutil
import warnings

import jaxtyping
import numpy as np
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, MBartTokenizer, PreTrainedTokenizerFast

from lsg_flax.data import Columns, DataOptions, labels_for, load_examples, train_batches
from lsg_flax.data.values import label_number, names_of_labels
from lsg_flax.models import TASKS, Target, Task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
PIECES = ["who", "saw", "the", "cat", "dog", "sat", "un", "##like", "##ly", "?", ".", "##s"]


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.tokenizer(*args, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *PIECES]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def unchecked():
    """Without the annotation checks of conftest.py, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{(first + i) % 40}" for i in range(count))


TEXTS = [{"text": words(3 + i, i), "label": "even" if i % 2 == 0 else "odd"} for i in range(9)]


@pytest.fixture
def load(tokenizer, tmp_path):
    """Loads rows (or what else `load_examples` takes) of a task, in a cache of the test's own."""

    def load(rows, task="sequence_classification", *, tokenizer=tokenizer, **options):
        if isinstance(rows, list) and (not rows or isinstance(rows[0], dict)):
            rows = write(tmp_path / "rows.jsonl", rows)
        options = DataOptions(task, **{"max_length": 32} | options)
        return load_examples(
            rows, options, tokenizer=tokenizer, cache=tmp_path / "cache", progress=False
        )

    return load


def rows_of(data) -> list[dict]:
    return [{name: x.tolist() for name, x in data[i].items()} for i in range(len(data))]


# Readers


def write_as(kind: str, folder: pathlib.Path) -> pathlib.Path:
    path = folder / f"data{kind}"
    if kind == ".jsonl":
        write(path, TEXTS)
    elif kind == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"])
            writer.writeheader()
            writer.writerows(TEXTS)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(TEXTS), path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(load, tokenizer, tmp_path, kind):
    data = load(write_as(kind, tmp_path))
    assert data.labels == ("even", "odd") and data.num_labels == 2
    for i, row in enumerate(TEXTS):
        assert data[i]["input_ids"].tolist() == tokenizer(row["text"])["input_ids"]
        assert data[i]["labels"] == i % 2
        assert data.info(i).id == i
    assert data.lengths.tolist() == [5 + i for i in range(9)]


def test_text_files_by_line_and_whole(load, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n")
    (tmp_path / "b.txt").write_text("w4")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.txt").write_text("w5")
    for source in (tmp_path, f"{tmp_path}/*.txt", [tmp_path / "a.txt", tmp_path / "b.txt"]):
        by_line = load(source, "masked_lm", pack=False)
        texts = [tokenizer.decode(row["input_ids"][1:-1]) for row in rows_of(by_line)]
        assert texts == ["w1 w2", "w3", "w4"]
    whole = load(tmp_path, "masked_lm", pack=False, text_unit="file")
    assert [tokenizer.decode(r["input_ids"][1:-1]) for r in rows_of(whole)] == ["w1 w2 w3", "w4"]


def test_a_dataset_of_the_library_brings_names_of_labels(load, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["odd", "even"])
    )
    made = datasets.Dataset.from_list(TEXTS, features=features)
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load("someone/numbers")
    assert asked == [(("someone/numbers", None), {"split": "train"})]
    assert data.labels == ("odd", "even")
    options = DataOptions("sequence_classification", max_length=8)
    for head in (("even", "odd"), ("a", "b", "c")):  # whose order the numbers do not have
        assert labels_for("someone/numbers", options, head) == ("odd", "even")
    assert [row["labels"] for row in rows_of(data)] == [1, 0] * 4 + [1]


def test_a_name_that_is_nothing(load, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **options):
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="'nothing_here' is not a file or folder here, and"):
        load("nothing_here")
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl is not a file"):
        load(str(tmp_path / "missing.jsonl"))
    (tmp_path / "a.txt").write_text("w1")
    (tmp_path / "b.tsv").write_text("w1")
    with pytest.raises(ValueError, match=r"give a file of .jsonl, .csv"):
        load(tmp_path / "b.tsv")
    write(tmp_path / "c.jsonl", TEXTS)
    with pytest.raises(ValueError, match=r"of the kinds \['.jsonl', '.txt'\]"):
        load(tmp_path)


GOOD = json.dumps(TEXTS[0]).encode()
BROKEN = {
    "not JSON": (b'{"text": "w1"', "not valid JSON"),
    "not an object": (b'["w1"]', "must be a JSON object"),
    "not UTF-8": (b'{"text": "w\xff", "label": "odd"}', "not valid UTF-8"),
    "lone surrogate": (
        b'{"text": "\\ud800", "label": "odd"}',
        "a lone surrogate .half of a character",
    ),
    "no text": (
        b'{"label": "odd"}',
        r"column 'text' is missing; .*'label'\]; if it has another name",
    ),
    "null": (b'{"text": null, "label": "odd"}', "column 'text' is empty"),
    "text a number": (b'{"text": 3, "label": "odd"}', "'text' must be a text, got 3"),
    "label unknown": (b'{"text": "w1", "label": "other"}', "none of the 2 labels even, odd"),
    "label too large": (b'{"text": "w1", "label": 2}', "label 2 is none of the 2"),
    "label negative": (b'{"text": "w1", "label": -1}', "label -1 is none of the 2"),
    "label fractional": (
        b'{"text": "w1", "label": 0.5}',
        "a label must be a name or a whole number, got 0.5",
    ),
    "several labels": (b'{"text": "w1", "label": ["odd"]}', "multi_label_classification"),
    "text empty": (b'{"text": "", "label": "odd"}', "'text' is empty"),
    "text without a sign": (rb'{"text": " \u200b", "label": "odd"}', "'text' is empty"),
    "text blank": (b'{"text": " \\n", "label": "odd"}', "'text' is empty"),
    "label empty": (b'{"text": "w1", "label": ""}', "the label '' is empty"),
    "label with space": (b'{"text": "w1", "label": " odd"}', "' odd' has spaces around it"),
    "label null": (b'{"text": "w1", "label": null}', "column 'label' is empty"),
    "label NaN": (
        b'{"text": "w1", "label": NaN}',
        "a label must be a name or a whole number, got nan",
    ),
    "label an object": (b'{"text": "w1", "label": {}}', "a label must be a name or a whole number"),
    "a name twice": (b'{"text": "w1", "text": "w2", "label": 0}', "the name 'text' is there twice"),
}


@pytest.mark.parametrize("line, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_raises_or_is_skipped_on_request(load, tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    labels = ("even", "odd")
    with pytest.raises(ValueError, match=f"data.jsonl:3: .*{message}"):
        load(path, labels=labels)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="1 broken rows of .*data.jsonl:3"):
            data = load(path, labels=labels, on_error="skip")
        assert (len(data), data.skipped) == (2, 1)


@pytest.mark.parametrize(
    "line, message",
    [("odd", "1 fields for the columns"), ('odd,"w1"x', "expected after"), ("odd,w\xff", "8")],
)
def test_a_broken_line_of_csv(load, tmp_path, line, message):
    path = tmp_path / "data.csv"
    path.write_bytes(f'label,text\neven,"w1\nw2"\n{line}\nodd,w3\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=f"data.csv:4: .*{message}"):
        load(path)
    with pytest.warns(UserWarning, match="1 broken rows"):
        data = load(path, on_error="skip")
    assert data.lengths.tolist() == [4, 3]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'"te"xt,label', "names of the columns cannot be read: ',' expected after '\"'; save"),
        (b'"text,label', "names of the columns cannot be read: unexpected end of data; save"),
        ("text,label".encode("utf-16"), "not valid UTF-8 at character 0; save the file as CSV in"),
        (b"t\xe9xt,label", "not valid UTF-8 at character 1; save the file as CSV in UTF-8"),
    ],
)
def test_a_broken_header_of_csv_is_never_skipped(load, tmp_path, header, message):
    (tmp_path / "data.csv").write_bytes(header + b"\nw5,a\n")
    with pytest.raises(ValueError, match=f"data.csv:1: .*{message}"):
        load(tmp_path / "data.csv", labels=("a",), on_error="skip")


@pytest.mark.parametrize("names", [[], ["text", "text"]])
def test_columns_of_parquet_are_there_and_differ(load, tmp_path, names):
    table = pyarrow.table([["w5"]] * len(names), names=names)
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="parquet: it needs columns with different names, got"):
        load(tmp_path / "data.parquet", on_error="skip")


def test_a_quote_that_is_not_closed_is_never_skipped(load, tmp_path):
    (tmp_path / "data.csv").write_text('text,label\nw1,a\n"w2,b\nw3,a\n')
    with pytest.raises(ValueError, match=r"data.csv:3: a quoted field is wrong at line 4"):
        load(tmp_path / "data.csv", on_error="skip")


def test_a_long_field_of_csv(load, tmp_path):
    (tmp_path / "data.csv").write_text(f"text,label\n{words(60_000)},a\nw1,b\n")
    assert load(tmp_path / "data.csv", max_length=50).lengths.tolist() == [50, 3]


def test_a_broken_parquet_file(load, tmp_path):
    path = write_as(".parquet", tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"data.parquet is not valid Parquet after row 0"):
        load(path, on_error="skip")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(load, tmp_path, content):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"data.jsonl has no rows"):
        load(tmp_path / "data.jsonl")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_numbers_as_labels_and_labels_of_training_for_evaluation(load):
    numbers = [{"text": "w1", "label": label} for label in (10, 2, 0)]
    data = load(numbers)
    assert data.labels == tuple(map(str, range(11)))  # 10 comes after 2
    assert [row["labels"] for row in rows_of(data)] == [10, 2, 0]
    only = load([{"text": "w1", "label": "odd"}], labels=("even", "odd"))
    assert rows_of(only)[0]["labels"] == 1
    assert "labels" not in load([{"text": "w1"}], with_labels=False)[0]


@pytest.mark.parametrize(
    "labels, message",
    [(["a", 1], "names such as 'a' and numbers such as 1"), ([0, 10**9], "up to 1000000000, too")],
)
def test_labels_that_cannot_be_inferred(load, labels, message):
    rows = [{"text": "w1", "label": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        load(rows)


def test_an_empty_row_of_csv_is_no_class(load, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('text,label\nw1,a\n"",""\nw2,b\nw3," "\n')
    with pytest.raises(ValueError, match=r"data.csv:3: 'text' is empty"):
        load(path)
    with pytest.warns(UserWarning, match=r"2 broken rows.*csv:3: .*csv:5: the label ' ' is empty"):
        assert load(path, on_error="skip").labels == ("a", "b")


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([True, False], ("0", "1")),
        ([1.0, 0, "2"], ("0", "1", "2")),
        (["1", "01", "1.0", "+1"], ("0", "1")),
        ([np.int64(1), np.float32(0.0), np.bool_(True), np.str_("1")], ("0", "1")),
        (["pos", " pos", "", " ", None, NAN, 0.5, {}], ("pos",)),
        ([["b", "a"], [], ["", "c"]], ("a", "b", "c")),
        (["1", "2", "n/a"], ("1", "2", "n/a")),
        ([-1, 1], ("0", "1")),
    ],
)
def test_the_labels_that_are_found(values, names):
    assert names_of_labels(values) == names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1e300, 2], r"numbers up to 1\d{59}, too large"),
        (["1.5", "2"], "such as 1.5 that are not whole; give problem_type='regression'"),
        ([1, "x"], "names such as 'x' and numbers such as 1"),
        ([True, "true"], "names such as 'true' and numbers such as 1"),
        ([0, 1, 1300], "3 different numbers up to 1300, too large to be"),
        ([1 << 20, *range(20_000)], "20001 different numbers up to 1048576, too large to be"),
    ],
)
def test_labels_that_are_no_table(values, message):
    with pytest.raises(ValueError, match=message):
        names_of_labels(values)


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("no", "yes"), ["yes", 1, 1.0, "1", "1.0", True, np.int8(1), np.float64(1)]),
        (("-1", "1"), [1, "1", 1.0, True, "01"]),  # names that are numbers: by name
        (("2", "0"), [0, "0", "0.0", False]),
        (("a", " b "), [" b ", 1]),  # given by hand, as they are
    ],
)
def test_a_label_is_the_same_however_it_is_written(names, values):
    assert [label_number(value, names) for value in values] == [1] * len(values)


@pytest.mark.parametrize("value", [2, -1, "-1", "", " yes", 0.5, NAN, None, [], {}, 10**400])
def test_what_is_no_label(value):
    with pytest.raises(ValueError, match="label"):
        label_number(value, ("no", "yes"))
    with pytest.raises(ValueError, match=r"label 0 is none of the 2 labels -1, 1$"):
        label_number(0, ("-1", "1"))


def test_a_file_that_changes_while_it_is_read_is_not_kept(load, tokenizer, tmp_path):
    class Meddling(Counting):
        def __call__(self, *args, **options):
            write(tmp_path / "rows.jsonl", [*TEXTS, TEXTS[0]])
            return super().__call__(*args, **options)

    with pytest.raises(ValueError, match=r"rows.jsonl changed while it was read; run again"):
        load(TEXTS, tokenizer=Meddling(tokenizer))
    assert len(load(tmp_path / "rows.jsonl")) == 10


# Tasks


def test_pairs_and_other_names_of_columns(load, tokenizer):
    rows = [
        {"a": "w1 w2", "b": "w3", "name": "x", "y": 1},
        {"a": "w4", "b": None, "name": "z", "y": 0},
    ]
    columns = Columns(text="a", text_pair="b", id="name", label="y")
    data = load(rows, columns=columns)
    for i, texts in enumerate([("w1 w2", "w3"), ("w4",)]):
        expected = tokenizer(*texts)
        assert data[i]["input_ids"].tolist() == expected["input_ids"]
        assert data[i]["token_type_ids"].tolist() == expected["token_type_ids"]
        assert data.info(i).id == rows[i]["name"]
    assert "token_type_ids" not in load(rows, columns=columns, token_type_ids=False)[0]


def test_long_texts_are_cut_and_counted(load, tokenizer):
    data = load([{"text": words(n), "label": 0} for n in (5, 30, 31, 90)])
    assert data.lengths.tolist() == [7, 32, 32, 32] and data.truncated == data.cut.cut_texts == 2
    cut = tokenizer(words(90), truncation=True, max_length=32)["input_ids"]
    assert data[3]["input_ids"].tolist() == cut


def test_several_labels_and_regression(load):
    rows = [{"text": "w1", "label": label} for label in (["b", "a"], [], ["c"])]
    data = load(rows, problem_type="multi_label_classification")
    assert data.labels == ("a", "b", "c")
    assert [r["labels"] for r in rows_of(data)] == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    rows = [{"text": "w1", "label": label} for label in (0.5, "2", -1)]
    data = load(rows, problem_type="regression")
    assert [r["labels"] for r in rows_of(data)] == [[0.5], [2.0], [-1.0]]
    assert (data.labels, data.num_labels) == (None, 1)
    broken = [("x", "a number"), (NAN, "finite"), (1e39, "finite"), (10**400, "a number")]
    broken += [(None, "is empty"), ("", "a number"), ([], "finite"), ([1, 2], "2 numbers, but")]
    for wrong, message in broken:
        with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{message}"):
            load([rows[0], {"text": "w1", "label": wrong}], problem_type="regression")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the label has 1 numbers, but 2 in the"):
        load(rows, problem_type="regression", width=2)
    with pytest.raises(ValueError, match="width=2 must be at least 1, and is only for"):
        load(rows, width=2)


def test_the_first_token_of_a_word_carries_its_tag(load, tokenizer):
    rows = [{"tokens": ["the", "unlikely", "cats"], "tags": ["O", "X", "Y"], "id": 7}]
    data = load(rows, "token_classification")
    tokens = tokenizer.convert_ids_to_tokens(data[0]["input_ids"])
    assert tokens == ["[CLS]", "the", "un", "##like", "##ly", "cat", "##s", "[SEP]"]
    assert data[0]["labels"].tolist() == [-100, 0, 1, -100, -100, 2, -100, -100]
    assert data.labels == ("O", "X", "Y") and data.info(0).id == 7
    for wrong, message in (
        ({"tokens": ["the"], "tags": []}, "one label for each of 1 words"),
        ({"tokens": "the", "tags": ["O"]}, "must be a list of words"),
        ({"tokens": [], "tags": []}, "'tokens' is empty"),
        ({"tokens": ["the", " "], "tags": ["O", "O"]}, "'tokens' has an empty word at 1"),
        ({"tokens": ["the"], "tags": [""]}, "the label '' is empty"),
        ({"tokens": ["the"], "tags": ["Z"]}, "label 'Z' is none of the 3 labels"),
    ):
        with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{message}"):
            load([*rows, wrong], "token_classification", labels=("O", "X", "Y"))


CONTEXT = "the cat sat . " * 5 + "the unlikely dogs saw the cat ."
ANSWER = {"text": ["unlikely dogs"], "answer_start": [CONTEXT.index("unlikely")]}
SQUAD = [
    {"id": "a", "question": "who saw the cat ?", "context": CONTEXT, "answers": ANSWER},
    {
        "id": "b",
        "question": "who ?",
        "context": "the dog sat .",
        "answers": {"text": [], "answer_start": []},
    },
]


@pytest.mark.parametrize("length, stride", [(20, 5), (16, 1), (19, 0)])  # the last two cut it
def test_windows_of_questions_hold_the_answer_or_say_that_they_do_not(load, length, stride):
    assert CONTEXT[74:87] == "unlikely dogs"
    data = load(SQUAD, "question_answering", max_length=length, stride=stride)
    assert len(data) > data.examples == 2
    covered, answered = set(), 0
    for i in range(len(data)):
        row, info = data[i], data.info(i)
        offsets, first, last = info.offsets, row["start_positions"], row["end_positions"]
        assert len(row["input_ids"]) <= length and offsets.shape == (len(row["input_ids"]), 2)
        assert info.record["context"] == SQUAD[info.example]["context"]
        context = offsets[:, 0] >= 0
        np.testing.assert_array_equal(context[:-1], row["token_type_ids"][:-1] == 1)
        if info.id == "a":
            covered |= {int(c) for a, b in offsets[context] for c in range(a, b)}
        inside = info.id == "a" and offsets[context][0, 0] <= 74 and offsets[context][-1, 1] >= 87
        assert (first > 0) == (last > 0) == inside
        if first:
            answered += 1
            assert CONTEXT[offsets[first, 0] : offsets[last, 1]] == "unlikely dogs"
    assert answered >= 1 or length == 19
    assert covered == {c for c in range(len(CONTEXT)) if CONTEXT[c] != " "}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answers": {"text": ["dog"], "answer_start": [3]}}, "is not at character 3"),
        ({"answers": {"text": ["dog"], "answer_start": []}}, "1 texts, but 0 answer_start"),
        ({"answers": "dog"}, "answers must be"),
        ({"question": words(40)}, "a question of 40, which must be more than stride=5"),
        ({"context": None}, "column 'context' is empty"),
    ],
)
def test_a_question_that_cannot_be_read(load, change, message):
    options = {"max_length": 20, "stride": 5}
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{message}"):
        load([SQUAD[0], SQUAD[1] | change], "question_answering", **options)
    with pytest.warns(UserWarning, match=message):
        data = load([SQUAD[1] | change, SQUAD[1]], "question_answering", **options, on_error="skip")
    assert (len(data), data.info(0).id) == (1, "b")


def test_choices_are_pairs_with_the_text(load, tokenizer):
    rows = [
        {"text": "who", "choices": ["the cat", "dogs", "the"], "label": 2},
        {"text": "who saw", "choices": ["cat", "w1 w2 w3", "w4"], "label": 0},
    ]
    data = load(rows, "multiple_choice")
    assert (data.choices, data.lengths.tolist()) == (3, [6, 8])
    for i, row in enumerate(rows):
        for ids, choice in zip(data[i]["input_ids"], row["choices"], strict=True):
            assert ids.tolist() == tokenizer(row["text"], choice)["input_ids"]
        assert data[i]["labels"] == row["label"]
    with pytest.raises(
        ValueError, match=r"rows.jsonl:2: .*has 2 texts; .* the same number in all rows"
    ):
        load([rows[0], rows[1] | {"choices": ["a", "b"]}], "multiple_choice")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: label 3 is none of the 3"):
        load([rows[0] | {"label": 3}], "multiple_choice")


WRITTEN = {"task": "conditional_generation"}
PAIRS = [{"id": "first", "text": words(9), "target": "w5 w6 w7"}]
PAIRS += [{"text": words(2), "target": words(20)}]


def test_targets_are_a_stream_of_labels(load, tokenizer):
    data = load(PAIRS, **WRITTEN, max_length=8, max_target_length=6)
    for row, pair in zip(rows_of(data), PAIRS, strict=True):
        read = tokenizer(pair["text"], truncation=True, max_length=8)["input_ids"]
        written = tokenizer(text_target=pair["target"], truncation=True, max_length=6)["input_ids"]
        assert row == {"input_ids": read, "token_type_ids": [0] * len(read), "labels": written}
    assert data.truncated == 2 and data.labels is data.num_labels is None
    assert [data.info(i).record["target"] for i in (0, 1)] == [p["target"] for p in PAIRS]
    assert [data.info(i).id for i in (0, 1)] == ["first", 1]
    named = [{"article": pair["text"], "abstract": pair["target"]} for pair in PAIRS]
    columns = Columns(text="article", target="abstract")
    other = load(named, **WRITTEN, max_length=8, columns=columns)
    assert len(rows_of(other)[1]["labels"]) == 22  # none is cut
    unlabelled = load([{"text": "w1"}], **WRITTEN, with_labels=False)
    assert rows_of(unlabelled)[0].keys() == {"input_ids", "token_type_ids"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, r"rows.jsonl:2: 'text' is empty"),
        ({"target": ""}, r"rows.jsonl:2: 'target' is empty"),
        ({"target": ["w1"]}, r"rows.jsonl:2: 'target' must be a text, got \['w1'\]"),
        ({"target": None}, r"rows.jsonl:2: column 'target' is empty"),
    ],
)
def test_a_target_that_cannot_be_read(load, change, message):
    rows = [PAIRS[0], PAIRS[1] | change]
    with pytest.raises(ValueError, match=message):
        load(rows, **WRITTEN)
    with pytest.warns(UserWarning, match=f"1 broken rows .*{message}"):
        assert len(load(rows, **WRITTEN, on_error="skip")) == 1


def test_a_target_that_no_token_stands_for(load):
    plain = Tokenizer(models.WordLevel({"w1": 1}, unk_token="w1"))
    plain.normalizer = normalizers.Replace("w2", "")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: 'target' has no tokens"):
        load(
            [{"text": "w1", "target": "w2"}],
            **WRITTEN,
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=plain),
        )


def test_targets_are_read_in_their_language(load):
    """mBART's texts and targets end with their language; each is a cache of its own."""
    tokenizer = MBartTokenizer(src_lang="de_DE", tgt_lang="ro_RO")
    german, romanian, french = tokenizer.convert_tokens_to_ids(["de_DE", "ro_RO", "fr_XX"])
    rows = [{"text": "<mask>", "target": "<mask>"}]
    data = load(rows, **WRITTEN, tokenizer=tokenizer)
    assert data[0]["input_ids"][-1] == german and data[0]["labels"][-1] == romanian
    tokenizer.tgt_lang = "fr_XX"
    assert load(rows, **WRITTEN, tokenizer=tokenizer)[0]["labels"][-1] == french


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_language_models_read_full_pieces_and_no_token_is_lost(load, tokenizer, task):
    texts = [words(n, n) for n in (3, 50, 1, 17, 300)]
    data = load([{"text": text} for text in texts], task, max_length=16)
    assert data.lengths.tolist() == [16] * (len(data) - 1) + [data.lengths[-1]]
    pieces = [data[i]["input_ids"] for i in range(len(data))]
    assert all((p[0], p[-1]) == (2, 3) for p in pieces)
    read = np.concatenate([piece[1:-1] for piece in pieces]).tolist()
    assert tokenizer.decode(read) == " [SEP] ".join(texts)
    assert data.info(0).example is None


def test_texts_one_by_one(load, tokenizer):
    data = load([{"text": words(n)} for n in (3, 50)], "masked_lm", pack=False)
    assert data.lengths.tolist() == [5, 32]
    assert data[0]["input_ids"].tolist() == tokenizer(words(3))["input_ids"]


def test_a_new_task_is_a_record_and_nothing_else(load, monkeypatch):
    """Its labels have the name that its loss compares them by."""
    targets = (Target("logits", "stance", "class"),)
    record = Task("stance", targets=targets, named_labels=True, examples="text")
    monkeypatch.setitem(TASKS, "stance", record)
    data = load([*TEXTS[:3], {"text": "w1", "label": "even"}], "stance", labels=("odd", "even"))
    batch = next(train_batches(data, batch_size=8, seed=0, buckets=[16], shuffle=False))
    assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids", "stance"}
    assert batch["stance"].tolist() == [1, 0, 1, 1, *[-100] * 4]
    monkeypatch.setitem(TASKS, "stance", Task("stance", targets=targets))
    with pytest.raises(ValueError, match=r"task='stance' is unknown; choose one of.*'masked_lm'"):
        load(TEXTS, "stance")


def test_tokenizers_that_cannot_serve(load, tokenizer):
    without = Counting(tokenizer)
    without.mask_token_id = None
    with pytest.raises(ValueError, match="needs a tokenizer with a mask token"):
        load(TEXTS, "masked_lm", tokenizer=without)
    slow = Counting(tokenizer)
    slow.is_fast, slow.init_kwargs = False, {}
    with pytest.raises(ValueError, match="a slow tokenizer, does not know"):
        load(SQUAD, "question_answering", tokenizer=slow)
    padless = Counting(tokenizer)
    padless.pad_token_id = None
    assert load(TEXTS, tokenizer=padless).pad_token_id == 0


def byte_level(add_prefix_space: bool):
    """A tokenizer as GPT-2's: a token per byte, no special tokens, no padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_tokenizer_without_special_tokens(load):
    tokenizer = byte_level(add_prefix_space=False)
    rows = [{"text": "abc"}, {"text": "de"}, {"text": "fghij"}]
    data = load(rows, "causal_lm", tokenizer=tokenizer, max_length=4)
    assert [tokenizer.decode(r["input_ids"]) for r in rows_of(data)] == ["abcd", "efgh", "ij"]
    assert data.pad_token_id == 0
    with pytest.raises(ValueError, match=r"rows.jsonl:2: 'text' is empty"):
        load([rows[0], {"text": ""}], "causal_lm", tokenizer=tokenizer, pack=False)


def test_words_need_a_tokenizer_that_puts_spaces_before_them(load):
    rows = [{"tokens": ["ab", "c"], "tags": [1, 0]}]
    with pytest.raises(ValueError, match="load it with add_prefix_space=True"):
        load(rows, "token_classification", tokenizer=byte_level(add_prefix_space=False))
    data = load(rows, "token_classification", tokenizer=byte_level(add_prefix_space=True))
    assert data[0]["labels"].tolist() == [1, -100, -100, 0, -100]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "base"}, "task='base' is unknown; choose one of"),
        ({"problem_type": "single"}, "problem_type='single' is unknown"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"labels": ("a",)}, "are for sequence_classification and token_classification"),
        ({"problem_type": "regression"}, "is for sequence_classification, not masked_lm"),
        ({"task": "token_classification", "labels": ("a", "a")}, "must be different names"),
        ({"task": "token_classification", "labels": ()}, "different names, at least one"),
        ({"task": "token_classification", "labels": ("a", "")}, "at least one and none empty"),
        ({"max_target_length": 8}, "is for tasks that generate text, not masked_lm; leave it"),
        (WRITTEN | {"max_target_length": 1}, "max_target_length=1 must be at least 2"),
        (WRITTEN | {"labels": ("a",)}, "are for sequence_classification and token_classification"),
        (WRITTEN | {"problem_type": "regression"}, "not conditional_generation"),
    ],
)
def test_options_that_cannot_be(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**{"task": "masked_lm", "max_length": 8} | options)


# The cache


def test_a_second_run_does_not_tokenize(load, tokenizer):
    counting = Counting(tokenizer)
    first = rows_of(load(TEXTS, tokenizer=counting))
    assert counting.calls == 1
    tokenizer("w1", truncation=True, max_length=9)  # which the tokenizer remembers
    assert rows_of(load(TEXTS, tokenizer=counting)) == first
    assert counting.calls == 1
    load(TEXTS, tokenizer=counting, max_length=6)
    load(TEXTS[:4], tokenizer=counting)
    assert counting.calls == 3


def test_another_tokenizer_has_another_cache(load, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "other")
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    same = Counting(other)
    load(TEXTS)
    load(TEXTS, tokenizer=same)
    assert same.calls == 0
    other.add_tokens(["w1 w2"])
    load(TEXTS, tokenizer=same)
    assert same.calls == 1


def cut_off(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def flip(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_off, flip, pathlib.Path.unlink])
@pytest.mark.parametrize(
    "name", ["input_ids.bin", "input_offsets.bin", "records.bin", "index.json"]
)
def test_a_damaged_cache_is_not_used(load, tokenizer, tmp_path, damage, name):
    rows = [row | {"id": i} for i, row in enumerate(TEXTS)]
    expected = rows_of(load(rows))
    (file,) = (tmp_path / "cache").rglob(name)
    damage(file)
    counting = Counting(tokenizer)
    with pytest.warns(UserWarning, match="It is not used; the data is tokenized again"):
        again = load(rows, tokenizer=counting)
    assert counting.calls == 1 and rows_of(again) == expected
    with warnings.catch_warnings(action="error"):  # whole again
        load(rows, tokenizer=counting)
    assert counting.calls == 1


def test_an_index_with_another_label_is_damaged(load, tmp_path):
    load(TEXTS)
    (index,) = (tmp_path / "cache").rglob("index.json")
    index.write_text(index.read_text().replace('"odd"', '"old"'))
    with pytest.warns(UserWarning, match=r"index.json was changed. It is not used"):
        assert load(TEXTS).labels == ("even", "odd")


def test_an_interrupted_run_leaves_nothing_that_is_used(load, tokenizer, tmp_path):
    class Interrupted(Counting):
        def __call__(self, *args, **options):
            if self.calls == 1:
                raise KeyboardInterrupt
            return super().__call__(*args, **options)

    many = [{"text": words(3, i), "label": 0} for i in range(300)]  # more than one chunk
    with pytest.raises(KeyboardInterrupt):
        load(many, tokenizer=Interrupted(tokenizer))
    folders = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert folders == []
    data = load(many)
    expected = rows_of(data)
    # What a killed process leaves: files without their index, in a folder of their own.
    (place,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    unfinished = place / ".lsg-flax-unfinished-by-someone"
    shutil.move(place, place.with_name("new"))
    shutil.move(place.with_name("new"), unfinished / "new")
    (unfinished / "new" / "index.json").unlink()
    counting = Counting(tokenizer)
    with warnings.catch_warnings(action="error"):
        assert rows_of(load(many, tokenizer=counting)) == expected
    assert counting.calls == 2 and not unfinished.exists()


def test_places_outside_the_data(load):
    data = load(TEXTS)
    for ask in (data.__getitem__, data.info, data.record):
        for wrong in (-1, 9):
            with pytest.raises(IndexError, match=f"{wrong} is not in 0..8"):
                ask(wrong)
