"""`lsg-flax train` and `lsg-flax predict`: what reaches the library, what is written, errors."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import typing
import warnings

import compiling
import jax
import kills
import numpy as np
import pytest
from golden_data import GOLDEN
from tiny_run import PLAIN, save_tiny, write

import lsg_flax
from lsg_flax import cli, hub
from lsg_flax.cli import train
from lsg_flax.inference import ResumableLines
from lsg_flax.models import EncoderConfig, family_of
from lsg_flax.training import Finetuned, Settings, pictures
from lsg_flax.training.embedding_settings import EMBEDDING_NAMES

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def config_of(folder, tiny, **values) -> pathlib.Path:
    """A YAML file (JSON is YAML) of a short run."""
    kind = "single_label_classification"
    values = {
        "model": str(tiny),
        "task": "sequence_classification",
        "train_data": write(folder, kind),
        "eval_data": write(folder, kind, rows=8, seed=1, name="eval.jsonl"),
        "cache": str(folder / "cache"),
        "devices": 1,
    } | values
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


@pytest.mark.slow
@pytest.mark.filterwarnings("default:weights for task", "default:.*is not drawn")  # are shown
def test_train_then_predict(capsys, tiny, tmp_path, monkeypatch):
    output, answers = tmp_path / "model", tmp_path / "answers.jsonl"
    file = config_of(tmp_path, tiny, steps=100, learning_rate="1e-3")
    code, out, err = run(capsys, "train", "--config", file, "--output", output, "--steps", 3)
    assert code == 0, err
    assert "sequence_classification after 3 steps" in out and "macro_f1" in out
    assert "metrics.jsonl" in err
    line = r"lsg-flax: 3 of 3 steps, .*, loss \d\S*, .* tokens/s, .* GiB at most, .*eval_loss"
    assert re.search(line, err), err
    assert (output / "log" / "run.png").read_bytes().startswith(PNG)
    assert f"{output}/log/metrics.jsonl" in out and f"resume from: {output}/checkpoints" in out
    (output / "log" / "run.png").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        again = run(capsys, "train", "--config", file, "--output", output, "--steps", 3)
    assert again[0] == 0 and "next: lsg-flax predict" in again[1] and "run.png" not in again[1]
    assert "already finished after 3 steps: nothing is trained; more steps need" in again[2]
    assert "fine-tune before use" in err and "fine-tune before use" not in again[2]
    assert "resumes after" not in again[2]
    warned = "run.png is not drawn: it needs matplotlib, pip install 'lsg-flax[plots]'."
    assert [line for line in again[2].splitlines() if "warning" in line][-1].endswith(warned)
    assert again[2].count("is not drawn") == 1 and not (output / "log" / "run.png").exists()
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "w5 w6"}\n{"text": "w20", "id": "second"}\n')
    options = ["--answers", "top_k=1", "--mesh", "data=8", "--max-length", 8]
    code, out, err = run(capsys, "predict", output, documents, answers, *options)
    assert (code, err) == (0, "") and "2 documents" in out
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    classify = lsg_flax.pipeline("text-classification", model=str(output), top_k=1)
    assert [line["id"] for line in lines] == [0, "second"]
    for line, expected in zip(lines, classify(["w5 w6", "w20"]), strict=True):
        assert line["answer"][0]["label"] == expected[0]["label"]
        assert line["answer"][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)
    logits = tmp_path / "logits.jsonl"
    assert run(capsys, "predict", output, documents, logits, "--outputs", "logits")[0] == 0
    rows = [json.loads(line) for line in logits.read_text().splitlines()]
    model, params = lsg_flax.from_pretrained(output)
    expected = jax.jit(model.apply)({"params": params}, np.array([[2, 20, 3]])).logits[0]
    np.testing.assert_allclose(rows[1]["logits"], expected, atol=1e-5)
    code, _, err = run(capsys, "predict", output, documents, answers, "--answers", "topk=1")
    assert code == 2 and "--answers: 'topk' is unknown; did you mean 'top_k'" in err


def drawn(axes) -> dict[str, list]:
    """The lines of a panel by their labels."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_the_picture_of_a_run_shows_what_its_log_says(tmp_path):
    records = [{"step": n, "loss": 3 - n, "learning_rate": n / 10, "tokens": 9} for n in (1, 2, 3)]
    records[1] |= {"eval_loss": 0.5, "eval_accuracy": 0.25, "eval_macro_f1": 0.125}
    records[2] |= {"eval_loss": 0.25, "eval_accuracy": 0.75, "eval_macro_f1": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    given = tmp_path, {"input": np.array([3, 3, 8, 16])}, (8, 16)
    figure = pictures.run_figure(*given)
    loss, score, rate, length = figure.axes
    assert drawn(loss) == {
        "training": [[1, 2], [2, 1], [3, 0]],
        "evaluation": [[2, 0.5], [3, 0.25]],
    }
    assert drawn(score) == {"accuracy": [[2, 0.25], [3, 0.75]], "macro_f1": [[2, 0.125], [3, 0.5]]}
    assert [*drawn(rate).values()] == [[[1, 0.1], [2, 0.2], [3, 0.3]]]
    assert [points[0][0] for points in drawn(length).values()] == [8, 16]
    bars = {round(bar.get_x()): bar.get_height() for bar in length.patches if bar.get_height()}
    assert bars == {3: 2, 8: 1, 15: 1}
    for axes, title in ((loss, "loss"), (score, "held-out"), (rate, "rate"), (length, "tokens")):
        assert title in axes.get_title() and (axes.get_xlabel() == "step") == (axes is not length)
    for axes in (loss, score):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [*drawn(axes)]
    picture = pictures.draw_run(*given)
    assert picture == tmp_path / "run.png" and picture.read_bytes().startswith(PNG)


@pytest.fixture(scope="module")
def classifier(tiny, tmp_path_factory):
    """A head that is not trained, for the labels high and low; texts of 8 tokens."""
    folder = tmp_path_factory.mktemp("classifier")
    labels = {"labels": ("high", "low"), "problem_type": "single_label_classification"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, params = lsg_flax.from_pretrained(tiny, "sequence_classification", **labels)
    tokenizer = hub.read_tokenizer(tiny)
    tokenizer.model_max_length = 8
    lsg_flax.save_pretrained(folder, model, params, tokenizer)
    return folder


def csv_of(file, labels) -> pathlib.Path:
    """Texts of 3 words, and every other one of 20."""
    texts = (" ".join(["w5 w6 w7"] * (1 if n % 2 else 7)) for n in range(len(labels)))
    rows = (f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
    file.write_text("body,area\n" + "".join(rows))
    return file


SCORED = """lsg-flax: 4 of 8 texts were truncated to 8 tokens, which drops 53.6% of all tokens
"""
COLUMNS = ("--columns", "text=body,label=area")


@pytest.mark.filterwarnings("default:.*is not drawn")
def test_evaluate_reads_what_train_reads(capsys, classifier, tmp_path, monkeypatch):
    data = csv_of(tmp_path / "data.csv", ["low", "high"] * 4)
    given = (classifier, data, "--output", tmp_path / "scores", *COLUMNS)
    cache = ("--cache", tmp_path / "cache", "--devices", 1)
    code, out, err = run(capsys, "evaluate", *given, *cache)
    assert (code, err) == (0, SCORED), err
    report = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    confusion = np.array(report["confusion"]["rows"])
    assert (report["rows"], report["max_length"], confusion.sum()) == (8, 8, 8)
    assert report["confusion"]["labels"] == ["high", "low"]
    assert report["scores"]["accuracy"] == np.trace(confusion) / 8
    for number, found in enumerate(report["by_class"]):
        right = confusion[number, number]
        assert found["support"] == confusion[number].sum() == 4
        assert found["recall"] == pytest.approx(right / 4)
        assert found["precision"] == pytest.approx(right / max(confusion[:, number].sum(), 1))
        row = [found["name"], f"{found['recall']:.4f}", f"{found['support']}"]
        assert re.search(rf"{row[0]} .*{row[1]} .*{row[2]}", out), out
    assert (tmp_path / "scores" / "confusion.png").read_bytes().startswith(PNG)
    assert re.search(r"true \\ predicted .*high .*low", out) and "evaluation.json" in out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "scores" / "confusion.png").unlink()
    code, out, err = run(capsys, "evaluate", *given, *cache)
    assert code == 0 and err.count("\n") == 2 and "pip install 'lsg-flax[plots]'" in err
    assert not (tmp_path / "scores" / "confusion.png").exists()


DOCS = pathlib.Path(__file__).parent.parent / "docs" / "training.md"


def example_of(command: str) -> tuple[list[str], str]:
    """The command as docs/training.md has it, and what stands below."""
    blocks = re.findall(r"```\w*\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    number = next(n for n, block in enumerate(blocks) if block.startswith(f"lsg-flax {command} "))
    return shlex.split(blocks[number].replace("\\\n", ""))[1:], blocks[number + 1]


@pytest.mark.parametrize("command", ["evaluate", "data"])
def test_an_example_says_what_stands_in_the_docs(
    capsys, classifier, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(classifier, "areas")
    csv_of(pathlib.Path("held_out.csv"), ["low", "high"] * 4)
    arguments, expected = example_of(command)
    code, out, err = run(capsys, *arguments)
    assert (code, err + out) == (0, expected)
    if command == "data":
        arguments = ["train", "--dry-run", "--output", "none", *arguments[1:]]
        assert run(capsys, *arguments) == (0, out, err) and not pathlib.Path("none").exists()


def test_packed_rows_say_their_length_and_how_to_change_it(
    capsys, classifier, tmp_path, monkeypatch
):
    data = csv_of(tmp_path / "data.csv", ["low", "high"] * 4)
    given = ("--model", classifier, "--task", "sequence_classification", "--train-data", data)
    given += (*COLUMNS, "--max-length", 13, "--packing", "--cache", tmp_path / "cache")
    block = lsg_flax.from_pretrained(classifier)[0].config.lsg.block_size
    length = -(-13 // block) * block  # the least that holds the longest text
    for more, tokens in ((), length), (("--buckets", 5 * block), 5 * block):
        said = rf"  packed: \d rows of {tokens} tokens \(--buckets sets another length\); \d\d% of"
        assert re.search(said, run(capsys, "data", *given, *more)[1])
    stops = lambda *_, **__: 1 / 0  # noqa: E731
    monkeypatch.setattr(sys.modules["lsg_flax.training.finetune"], "init_state", stops)
    given += ("--output", tmp_path / "out", "--devices", 1)
    says = f"packing: texts share rows of {length} tokens; buckets (--buckets) sets more\n"
    assert says in run(capsys, "train", *given)[2]
    assert "packing:" not in run(capsys, "train", *given, "--buckets", 5 * block)[2]


def test_predict_reads_what_train_reads_at_the_length_of_training(capsys, classifier, tmp_path):
    data = csv_of(tmp_path / "data.csv", ["low", "high"] * 2)
    given = ("predict", classifier, data, tmp_path / "out.jsonl", "--columns", "text=body")
    assert run(capsys, *given, "--no-truncation")[2].count("23 tokens, more than 8") == 1
    code, out, err = run(capsys, *given)
    assert code == 0 and "4 documents" in out, err
    assert err == SCORED.replace("4 of 8", "2 of 4")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [0, 1, 2, 3]
    assert answers[0]["answer"] == answers[2]["answer"] != answers[1]["answer"]
    code, _, err = run(capsys, *given[:-1], "text=title")
    assert code == 2 and err.endswith("it has ['area', 'body'] and must have 'title'.\n")
    code, _, err = run(capsys, *given[:-2])
    lacks = "it has ['area', 'body'] and must have text, or question and context, or input_ids"
    assert code == 2 and lacks in err
    assert err.endswith("; if the text has another name, pass --columns text=body.\n")


def test_predict_says_after_an_interruption_what_is_kept(capsys, classifier, tmp_path, monkeypatch):
    data, out = csv_of(tmp_path / "data.csv", ["low"] * 258), tmp_path / "out.jsonl"
    given = ("predict", classifier, data, out, "--columns", "text=body", "--batch-size", 64)
    code, _, err = run(capsys, *given, "--max-length", 9000)
    assert code == 2 and "what this model reads; give fewer, or make" in err
    assert "--max-length 9000 must be in 1.." in err and "--max-sequence-length 9000" in err
    write_window = ResumableLines.write

    def interrupted(lines, *window):
        if lines.finished:
            raise KeyboardInterrupt
        write_window(lines, *window)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableLines, "write", interrupted)
        code, _, err = run(capsys, *given)
    kept = f"256 finished documents are kept in {out}.partial; the same call or command continues"
    assert code == cli.INTERRUPTED and f"interrupted: {kept} with the others." in err
    assert "258 documents, 256 done before" in run(capsys, *given)[1]


def test_a_row_without_a_text_says_the_flag_of_its_command(capsys, classifier, tmp_path):
    data, out = tmp_path / "in.jsonl", tmp_path / "out.npy"
    data.write_text('{"body": "w5 w6", "id": "a longer name"}\n')
    for command, model, advice in (
        ("embed", classifier, "pass --columns text=body. Mend it, or pass --on-error skip."),
        ("summarize", GOLDEN / "bart_conditional_generation", "pass --columns text=body. Mend it"),
        ("generate", GOLDEN / "bert_causal_lm", "pass --columns text=body. Mend it, or pass --on"),
        ("index", GOLDEN / "realm_plain_open_qa", "name it \"text\", not 'body'. Mend it."),
    ):
        target = out if command == "embed" else tmp_path / "out.jsonl"
        code, _, err = run(capsys, command, model, data, target)
        assert code == 2 and f"if the text has another name, {advice}" in err


def test_evaluate_names_labels_that_the_model_does_not_know(capsys, classifier, tmp_path):
    data = csv_of(tmp_path / "data.csv", ["low", "middle", "top", "low"])
    given = ("evaluate", classifier, data, *COLUMNS, "--cache", tmp_path / "cache")
    code, _, err = run(capsys, *given)
    assert code == 2 and "does not know: 'middle', 'top'. It knows high, low" in err
    assert "(--on-error skip)" in err and "give --labels, the data's names" in err
    code, _, err = run(capsys, *given, "--labels", "low", "middle", "top")
    assert code == 2 and "are 3 names, but" in err and "has 2 labels: high, low" in err
    code, _, err = run(capsys, "evaluate", PLAIN, data, "--task", "sequence_classification")
    assert code == 2 and "has no head for sequence_classification" in err


FLAGS = {  # one that is not the default for every field
    "train_data": (["a.txt", "b.txt"], ("a.txt", "b.txt")),
    "eval_data": (["c.txt"], ("c.txt",)),
    "labels": (["x y", "z"], ("x y", "z")),
    "columns": (["text=body,label=area"], {"text": "body", "label": "area"}),
    "mesh": (["data=2,fsdp=4"], {"data": 2, "fsdp": 4}),
    "lsg": (["--block-size", "64", "--sparsity-type", "lsh"], None),
    "buckets": (["64", "128"], (64, 128)),
    "task": (["sequence_classification"], "sequence_classification"),
    "problem_type": (["multi_label_classification"], "multi_label_classification"),
    "text_unit": (["file"], "file"),
    "on_error": (["skip"], "skip"),
    "dtype": (["bfloat16"], "bfloat16"),
    "remat": (["dots"], "dots"),
    "schedule": (["cosine"], "cosine"),
    "train_only": (["head"], "head"),
    "evaluate_every": (["8"], 8),
    "save_every": (["4"], 4),
    "best": (["eval_macro_f1"], "eval_macro_f1"),
    "push_to_hub": (["me/areas"], "me/areas"),
    "class_weights": (["low=3,high=0.5"], {"low": 3.0, "high": 0.5}),
    "lora_target_modules": (["query", "mlp_up"], ("query", "mlp_up")),
    "report_to": (["tensorboard"], ("tensorboard",)),
}
EXCLUDED = {  # of the two only one may be given
    "frozen": {"train_only", "lora_r", "lora_alpha", "lora_target_modules"},
    "steps": {"epochs"},
    "problem_type": {"class_weights"},
}
OF_TARGETS = {
    "task": (["conditional_generation"], "conditional_generation"),
    "target_buckets": (["64", "128"], (64, 128)),
    "generation": (
        ["num_beams=4,early_stopping=never,length_penalty=2.0,min_length=null"],
        {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0, "min_length": None},
    ),
    "best": (["eval_rougeL"], "eval_rougeL"),
    **dict.fromkeys(("max_target_length", "src_lang", "tgt_lang", "predict_with_generate")),
    "generation_rows": None,
    "label_smoothing": None,
}


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_every_setting_has_a_flag(monkeypatch, tmp_path, turn):
    seen: list[Settings] = []
    monkeypatch.setattr(train, "finetune", lambda settings, **_: seen.append(settings))
    monkeypatch.setattr(train, "_show", lambda result: None)
    given = FLAGS | {name: flag for name, flag in OF_TARGETS.items() if flag and turn == 2}
    left_out = {*EXCLUDED} if turn else {name for names in EXCLUDED.values() for name in names}
    left_out |= (
        {"labels", "problem_type", "class_weights"}
        if turn == 2
        else OF_TARGETS.keys() - FLAGS.keys()
    )
    left_out |= {"packing", *EMBEDDING_NAMES}  # which the mesh and tasks here exclude
    flags, expected = [], {}
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        name, flag = field.name, "--" + field.name.replace("_", "-")
        if name in left_out:
            continue
        if name == "lsg":
            flags += FLAGS["lsg"][0]
            expected[name] = {"block_size": 64, "sparsity_type": "lsh"}
        elif name in given:
            flags += [flag, *given[name][0]]
            expected[name] = given[name][1]
        elif hints[name] is bool:
            expected[name] = not field.default
            flags.append(flag if expected[name] else "--no-" + flag[2:])
        else:
            kind = next(
                k for k in (int, float, str) if k in (hints[name], *typing.get_args(hints[name]))
            )
            expected[name] = {int: 3, float: 0.5, str: f"some {name}"}[kind]
            flags += [flag, str(expected[name])]
    shared = ["--model", "m", "--train-data", "a.txt", "--output", "o", "--task", "masked_lm"]
    assert cli.main(["train", *shared, "--packing"]) == 0 and seen.pop().packing
    shared[-1] = "embedding"
    for values in (
        {"teacher": "t", "teacher_length": 9, "pooling": "cls"},
        {"similarity_scale": 5.0},
    ):
        words = [w for n, v in values.items() for w in ("--" + n.replace("_", "-"), str(v))]
        assert cli.main(["train", *shared, *words]) == 0
        assert {name: getattr(seen[0], name) for name in values} == values and seen.pop()
    assert cli.main(["train", *flags]) == 0
    assert seen == [Settings(**expected)]
    for field in dataclasses.fields(Settings):
        if field.name in expected and field.default is not dataclasses.MISSING:
            assert expected[field.name] != field.default, f"{field.name} shows nothing"


ERRORS = {
    ("train", "--model", "x"): "train_data, output, task must be given",
    ("train", "--config", "none.yaml"): "none.yaml is not a file",
    ("predict", PLAIN, "none.jsonl", "out.jsonl"): "masked_lm has no answers, only outputs",
    ("predict", PLAIN, "none.jsonl", "o.jsonl", "--outputs"): "none.jsonl is no file",
    ("predict", PLAIN, "a", "b", "--outputs", "--mesh", "data=3"): "does not fit 8 devices",
    ("predict", "./none", "a", "b"): "none is not a folder",
    ("ask", "./none", "who?"): "none is not a folder; give a folder that `lsg-flax index` made, or",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors_are_one_message(capsys, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("lsg-flax: error: ") and ERRORS[arguments] in last
    assert not list(tmp_path.iterdir())


CLASSIFIER = GOLDEN / "bert_sequence_classification"
EARLY = {
    ("--outputs", "logit"): "--outputs logit are not all outputs of --task sequence_classific",
    ("--answers", "top_k=x"): "--answers: top_k='x' must be a whole number of at least 1",
    ("--answers", "top_k=true"): "--answers: top_k=True must be a whole number",
    ("--answers", "function_to_apply=cube"): "--answers: function_to_apply='cube' is unknown",
    ("--task", "base"): "a model for base has no answers, only outputs: add",
    (
        "--task",
        "ner",
    ): "is LSGBertForSequenceClassification and has no head for token_classification",
    ("--task", "question-answering"): "has no head for question_answering; train that head first",
    ("--task", "masked_lm", "--outputs"): "has no head for masked_lm",
}
ASKS = {
    "doc_stride=-1": "doc_stride=-1 must be an integer of at least 0",
    "align_to_words=7": "align_to_words=7 is unknown",
}


@pytest.mark.parametrize("flags", EARLY)
def test_predict_says_what_is_wrong_before_it_reads_weights(
    capsys, monkeypatch, unchecked, tmp_path, flags
):
    monkeypatch.setattr(hub.Checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "w5"}\n')
    code, _, err = run(capsys, "predict", CLASSIFIER, source, target, *flags)
    assert code == 2 and EARLY[flags] in err and "unexpected" not in err
    for *files, message in (
        (tmp_path / "none.txt", target, "none.txt is no file"),
        (source, tmp_path, "is a folder; give the name of a file"),
        (source, source, "is the input"),
        (source, target, "--buckets", "0", "--buckets 0 must be at least 1"),
        (source, target, "--batch-size", "0", "--batch-size 0 must be at least 1"),
    ):
        code, _, err = run(capsys, "predict", CLASSIFIER, *files)
        assert code == 2 and message in err


@pytest.mark.parametrize("flag", ASKS)
def test_predict_checks_how_questions_are_answered(capsys, unchecked, tmp_path, flag):
    files = GOLDEN / "bert_question_answering", "none.jsonl", tmp_path / "out.jsonl"
    code, _, err = run(capsys, "predict", *files, "--answers", flag)
    assert code == 2 and ASKS[flag] in err


@pytest.mark.parametrize(
    "name,classes,tasks",
    [
        ("bert_pretraining", None, "base pretraining masked_lm causal_lm next_sentence_prediction"),
        ("bert_masked_lm", None, "base masked_lm causal_lm"),
        ("bert_token_classification", None, "base token_classification"),
        ("bert_base", None, "base"),
        ("bert_question_answering", [], "base question_answering"),
        ("bert_question_answering", ["Own"], "base question_answering"),
    ],
)
def test_a_checkpoint_has_the_heads_of_its_class_or_else_of_its_weights(
    tmp_path, name, classes, tasks
):
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    if classes is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": classes}))
    checkpoint = hub.open_checkpoint(folder)
    allowed = []
    for task in family_of("bert").heads:
        with contextlib.suppress(ValueError):
            checkpoint.require_head(task)
            allowed.append(task)
    assert {*allowed} == {*tasks.split()}


def test_train_says_where_metrics_go_when_it_begins(capsys, tiny, tmp_path):
    file = config_of(tmp_path, tiny, output=str(tmp_path / "out"), train_data="none.jsonl")
    code, _, err = run(capsys, "train", "--config", file)
    assert code == 2 and "none.jsonl" in err and "metrics" not in err
    code, _, err = run(capsys, "train", "--config", file, "--frozen", "[")
    assert code == 2 and "error: --frozen [ is not a regular expression" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", kills.COMMANDS)
def test_a_killed_command_makes_the_same_bytes(tmp_path, command):
    assert not kills.run(tmp_path, command, times=1, generator=random.Random(3))


def test_wrong_flags_are_named(capsys, tiny, tmp_path):
    file = config_of(tmp_path, tiny, output=str(tmp_path / "out"))
    for flags, message in (
        (["--mesh", "model=2"], "the axes are data, fsdp, tensor, sequence"),
        (["--mesh", "data"], "not AXIS=N"),
        (["--columns", "text"], "is not NAME=VALUE"),
        (["--task", "translating"], "invalid choice: 'translating'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["train", "--config", str(file), *flags])
        assert message in capsys.readouterr().err
    code, _, err = run(capsys, "train", "--config", file, "--mesh", "tensor=3")
    assert code == 2 and err.endswith("To use fewer, give --devices N.\n")
    code, _, err = run(capsys, "train", "--config", file, "--distributed", "here,2")
    assert code == 2 and "is not HOST:PORT,COUNT,INDEX" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("default:weights for task")  # the command shows it
def test_two_processes_train_one_model(tiny, tmp_path):
    """Each with one device; the model is that of one process with two."""
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        port = opened.getsockname()[1]
    values = {"devices": None, "steps": 2, "save_every": 2, "mesh": {"fsdp": 2}}
    file = config_of(tmp_path, tiny, **values)
    environment = os.environ | {
        "PYTHONPATH": str(pathlib.Path(lsg_flax.__file__).parents[1]),
        "XLA_FLAGS": compiling.xla_flags(devices=1),
    }
    command = [sys.executable, "-m", "lsg_flax.cli", "train", "--config", str(file)]
    command += ["--output", str(tmp_path / "two")]
    logs = [(tmp_path / f"{index}.txt").open("w+") for index in range(2)]
    processes = [
        subprocess.Popen(
            [*command, "--distributed", f"localhost:{port},2,{index}"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for index, log in enumerate(logs)
    ]
    codes = [process.wait(timeout=300) for process in processes]
    for log in logs:
        log.close()
    said = [(tmp_path / f"{index}.txt").read_text() for index in range(2)]
    assert codes == [0, 0], said
    assert "after 2 steps" in said[0] and "wrote" not in said[1]
    assert (
        cli.main(
            ["train", "--config", str(file), "--devices", "2", "--output", str(tmp_path / "one")]
        )
        == 0
    )
    two, one = (lsg_flax.from_pretrained(tmp_path / name)[1] for name in ("two", "one"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), two, one)


@pytest.mark.parametrize(
    ("task", "command"),
    [
        ("sequence_classification", "predict out INPUT OUTPUT"),
        ("masked_lm", "predict out INPUT OUTPUT --outputs"),
        ("causal_lm", "generate out INPUT OUTPUT"),
    ],
)
def test_train_names_a_command_that_takes_the_model(capsys, monkeypatch, tmp_path, task, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "log").mkdir(parents=True)
    model = lsg_flax.Model(EncoderConfig(is_decoder=task == "causal_lm"), task)
    result = Finetuned(pathlib.Path("out"), model, {}, 1, {}, None, [])
    monkeypatch.setattr(train, "finetune", lambda *_, **__: result)
    given = ("--model", "m", "--task", task, "--train-data", "x", "--output", "out")
    assert run(capsys, "train", *given)[1].endswith(f"next: lsg-flax {command}\n")
