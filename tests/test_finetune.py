"""Files to a trained checkpoint: every task end to end, resuming, meshes, and what is refused."""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
import time

import jax
import numpy as np
import pytest
from golden_data import GOLDEN
from rouge_score import rouge_scorer
from tiny_run import PLAIN, save_tiny, save_tiny_writer, texts, write
from transformers import MBartTokenizer

import lsg_flax
from lsg_flax import cli, hub
from lsg_flax.generation.loop import decode
from lsg_flax.locks import PlaceTaken, locked
from lsg_flax.models import PROBLEM_SCORERS, SCORES, TASKS
from lsg_flax.training.evaluation import evaluate_files
from lsg_flax.training.finetune import finetune
from lsg_flax.training.preparation import options_for
from lsg_flax.training.refinements import FROZEN
from lsg_flax.training.scores import ROUGE
from lsg_flax.training.settings import Settings, trained_tasks
from lsg_flax.training.settings_file import read_settings
from lsg_flax.training.source import open_source
from lsg_flax.training.survey import survey
from lsg_flax.training.written import writing_options

pytestmark = pytest.mark.filterwarnings("ignore:weights for task")  # heads that are drawn


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return save_tiny_writer(tmp_path_factory.mktemp("writer"))


def settings_of(tiny, folder, kind: str = "single_label_classification", **options) -> Settings:
    """Two files of that kind, and a short run on one device."""
    classifies = kind in ("single_label_classification", "regression") or "multi_label" in kind
    values = {
        "model": tiny,
        "task": "sequence_classification" if classifies else kind,
        "train_data": write(folder, kind),
        "eval_data": write(folder, kind, rows=10, seed=1, name="eval.jsonl"),
        "output": folder / "out",
        "cache": folder / "cache",
        "steps": 4,
        "evaluate_every": 2,
        "learning_rate": 1e-3,
        "devices": 1,
        "stride": 4,
    }
    values |= {"problem_type": kind} if classifies else {}
    return read_settings(None, values | options)


def run(settings: Settings):
    return finetune(settings, progress=False)


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("regression", [1, 2], r"the label has 2 numbers, but 1 in the training data"),
        ("multi_label_classification", ["other"], r"label 'other' is none of the"),
    ],
)
def test_held_out_rows_of_another_width_stop_a_run_before_it_begins(
    tiny, tmp_path, kind, label, message
):
    settings = settings_of(tiny, tmp_path, kind)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "a", "label": label}) + "\n")
    with pytest.raises(ValueError, match=rf"eval.jsonl:1: {message}"):
        run(settings)
    assert not list((tmp_path / "out").rglob("*.json*"))


KINDS = PROBLEM_SCORERS | {name: TASKS[name].scorer for name in trained_tasks()}
del KINDS["sequence_classification"]  # is one of the three by its problem type
del KINDS["embedding"]  # tests/test_embedding_training.py: it has no head


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_from_files_to_a_checkpoint(tiny, writer, tmp_path, kind):
    source = writer if kind == "conditional_generation" else tiny
    settings = settings_of(source, tmp_path, kind)
    result = run(settings)
    assert result.step == 4 and [record["step"] for record in result.history] == [1, 2, 3, 4]
    assert set(result.scores) == {"eval_loss", *(f"eval_{name}" for name in SCORES[KINDS[kind]])}
    assert np.isfinite(list(result.scores.values())).all()
    model, params = lsg_flax.from_pretrained(settings.output)
    assert model.task == settings.task
    jax.tree.map(np.testing.assert_array_equal, params, result.params)
    tokenizer = hub.read_tokenizer(result.output)
    assert tokenizer is not None and tokenizer.model_max_length == 16
    names = {"vocab.txt", "tokenizer.json", "LICENSE"}
    carried = [file for file in pathlib.Path(source).iterdir() if file.name in names]
    assert len(carried) >= 2
    assert all((result.output / f.name).read_bytes() == f.read_bytes() for f in carried)
    lines = (result.output / "log" / "metrics.jsonl").read_text().splitlines()
    losses = {r["step"]: r["eval_loss"] for r in map(json.loads, lines) if "eval_loss" in r}
    assert list(losses) == [2, 4] and result.best == min(
        losses, key=lambda step: (losses[step], -step)
    )
    best = lsg_flax.from_pretrained(result.output / "best")[1]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), best, params)
    assert all(jax.tree.leaves(same)) == (result.best == 4)


@pytest.mark.slow
def test_a_classifier_learns_and_is_trained_further(tiny, tmp_path):
    """Broken rows are skipped on request, labels keep the order given, also in a further run."""
    names, files = ("red", "blue"), (tmp_path / "train.jsonl", tmp_path / "held_out.jsonl")
    words = {"w7 w8": "red", "w20 w21": "blue"}
    data = [{"text": word, "label": label} for word, label in words.items()]
    for file, count in zip(files, (16, 4), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in data * count) + "{broken\n")
    options = {"learning_rate": 1e-2, "steps": 40, "best": "eval_accuracy", "evaluate_every": 20}
    options |= {"labels": list(names), "on_error": "skip"}
    settings = settings_of(tiny, tmp_path, **options)
    settings = dataclasses.replace(settings, train_data=str(files[0]), eval_data=str(files[1]))
    files[0].write_text("".join(json.dumps(line) + "\n" for line in data * 16) + "{broken\n")
    held_out = pytest.warns(UserWarning, match=r"1 broken rows.*held_out.jsonl:9")
    with held_out, pytest.warns(UserWarning, match=r"1 broken rows.*train.jsonl:33"):
        result = run(settings)
    assert result.model.config.labels == names  # sorted, they would be turned
    assert result.scores["eval_accuracy"] == 1.0
    classify = lsg_flax.pipeline("text-classification", model=str(result.output / "best"))
    assert [answer["label"] for answer in classify(list(words))] == list(names)
    further = {"model": str(result.output), "output": str(tmp_path / "further"), "labels": None}
    further |= {"steps": 1, "learning_rate": 0.0, "eval_data": None, "best": None}
    with pytest.warns(UserWarning, match="broken rows"):
        second = run(dataclasses.replace(settings, **further, evaluate_every=None))
    assert second.model.config.labels == names and second.best is None and second.scores == {}
    jax.tree.map(np.testing.assert_array_equal, second.params, result.params)


def labelled(folder, names) -> str:
    """A file in which each of the names is a label."""
    rows = ({"text": "w7 w8", "label": name} for name in names * 4)
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "labelled.jsonl")


@pytest.fixture(scope="module")
def with_a_head(tiny, tmp_path_factory):
    """The tiny model with a head for three labels."""
    folder = tmp_path_factory.mktemp("with_a_head")
    labels = ("bad", "fair", "good")
    model, params = lsg_flax.from_pretrained(tiny, "sequence_classification", labels=labels)
    lsg_flax.save_pretrained(folder, model, params, hub.read_tokenizer(tiny))
    return folder


@pytest.mark.slow
def test_a_head_for_other_labels_is_a_start(with_a_head, tmp_path):
    names, further = ["v", "w", "x", "y", "z"], {"eval_data": None, "evaluate_every": None}
    further |= {"steps": 1, "train_data": labelled(tmp_path, names)}
    with pytest.warns(UserWarning, match=r"classifier.weight \[3, 16\], wanted \[5, 16\]"):
        result = run(settings_of(with_a_head, tmp_path, **further))
    written = json.loads((result.output / hub.CONFIG).read_text())
    assert written["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert written["label2id"] == {name: i for i, name in enumerate(names)}
    classify = lsg_flax.pipeline("text-classification", model=str(result.output), top_k=None)
    assert sorted(answer["label"] for answer in classify("w7 w8")) == names


def source_of(settings: Settings):
    return open_source(settings.model, settings.task, None, convert=False)


@pytest.mark.parametrize(
    ("found", "given", "labels"),
    [
        (["good", "bad"], None, ("bad", "fair", "good")),  # all of them are the head's
        ([0, 2], None, ("bad", "fair", "good")),
        (["bad", "new"], None, ("bad", "new")),
        ([0, 3], None, ("0", "1", "2", "3")),
        (["good", "bad"], ["good", "bad"], ("good", "bad")),
    ],
)
def test_labels_of_the_data_win_over_those_of_a_head(with_a_head, tmp_path, found, given, labels):
    settings = settings_of(
        with_a_head, tmp_path, train_data=labelled(tmp_path, found), labels=given
    )
    assert options_for(settings, source_of(settings)).labels == labels


def test_weights_of_as_many_other_labels_are_said_to_be_kept(with_a_head, tmp_path):
    data = labelled(tmp_path, ["poor", "so so", "superb"])
    settings = settings_of(with_a_head, tmp_path, train_data=data)
    with pytest.warns(UserWarning, match="bad, fair, good; training starts.*poor, so so, superb"):
        options = options_for(settings, source_of(settings))
    assert options.labels == ("poor", "so so", "superb")


def without_the_end(folder):
    """What a kill after the save of step 2 would have left."""
    for place in (folder / "checkpoints" / "4", folder / "best"):
        shutil.rmtree(place)
    for file in (hub.CONFIG, hub.WEIGHTS):
        (folder / file).unlink()


@pytest.mark.slow
def test_the_same_command_goes_on_bit_for_bit(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, accumulate=2)
    whole = run(settings)
    weights = (whole.output / hub.WEIGHTS).read_bytes()
    best = (whole.output / "best" / hub.WEIGHTS).read_bytes()
    without_the_end(whole.output)
    how = {"keep": 3, "log_every": 1, "picture": False}  # how it is kept and shown may change
    stored = json.loads((whole.output / "checkpoints" / "run.json").read_text())
    assert not how.keys() & stored.keys()  # so that runs go on which are older than a field of it
    rest = run(dataclasses.replace(settings, **how))
    assert [record["step"] for record in rest.history] == [3, 4]
    losses = [[r["loss"] for r in history] for history in (whole.history[2:], rest.history)]
    assert losses[0] == losses[1] and rest.scores == whole.scores and rest.best == whole.best
    assert (rest.output / hub.WEIGHTS).read_bytes() == weights
    assert (rest.output / "best" / hub.WEIGHTS).read_bytes() == best
    again = run(settings)  # nothing left to do
    assert again.history == [] and again.scores == pytest.approx(whole.scores, abs=1e-6)
    other = dataclasses.replace(settings, learning_rate=2e-3, seed=5)
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 then, 0.002 now; seed: 0 then"):
        run(other)
    other = dataclasses.replace(settings, max_length=9, lsg={"block_size": 8})
    only = r": lsg.block_size: \(not set\) then, 8 now; max_length: null then, 9 now\. R"
    with pytest.raises(ValueError, match=only):
        run(other)
    write(tmp_path, "single_label_classification", seed=7)
    with pytest.raises(ValueError, match="contents_of_train_data"):
        run(settings)
    data = r"other settings: data.contents_of_train_data: \S* then, \S* now"
    for changed, more in ((settings, ""), (dataclasses.replace(settings, seed=5), "; seed: 0 th")):
        with pytest.raises(ValueError, match=data + (more or r"\. Resume")):
            run(changed)


@pytest.mark.slow
def test_a_run_that_an_older_version_has_begun_is_resumed(tiny, tmp_path):
    """Its run.json has the hash of tokens, but none of the data."""
    settings = settings_of(tiny, tmp_path)
    run(settings)
    file = tmp_path / "out" / "checkpoints" / "run.json"
    stored = json.loads(file.read_text())
    assert stored.pop("data").keys() == {"contents_of_train_data", "contents_of_eval_data"}
    file.write_text(json.dumps(stored))
    assert run(settings).history == []
    write(tmp_path, "single_label_classification", seed=7)
    with pytest.raises(ValueError, match="has other settings: contents_of_train_data: "):
        run(settings)


CLOSE = {"rel": 1e-5, "abs": 1e-5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [*PROBLEM_SCORERS, "token_classification", "masked_lm", "causal_lm"]
)
def test_packed_runs_go_on_bit_for_bit_and_are_scored_as_if_they_were_not(tiny, tmp_path, kind):
    options = {"packing": True, "buckets": [40], "batch_size": 2, "max_length": 15}
    options |= {"devices": 2 if kind == "causal_lm" else 1}
    if kind == "regression":  # nearly equal predictions would have a correlation of rounding alone
        model, params = lsg_flax.from_pretrained(tiny, "base")
        params = jax.tree.map(lambda x: 6 * x, params)
        tiny = tmp_path / "wide"
        lsg_flax.save_pretrained(tiny, model, params, hub.read_tokenizer(PLAIN))
    settings = settings_of(tiny, tmp_path, kind, **options)
    whole = run(settings)
    assert {record["compilations"] for record in whole.history} == {1}
    weights = (whole.output / hub.WEIGHTS).read_bytes()
    without_the_end(whole.output)
    rest = run(settings)
    assert [record["step"] for record in rest.history] == [3, 4]
    assert [r["loss"] for r in whole.history[2:]] == [r["loss"] for r in rest.history]
    assert (rest.output / hub.WEIGHTS).read_bytes() == weights and rest.scores == whole.scores
    shown = survey(settings, progress=False)
    assert shown.held_out is not None and shown.train.real > shown.held_out.real > 0.5
    assert list(shown.train.buckets) == list(shown.held_out.buckets) == [40]
    assert shown.train.packed and shown.held_out.packed
    alone = {n: getattr(settings, n) for n in ("task", "problem_type", "max_length", "seed")}
    alone |= {"model": str(rest.output), "data": settings.eval_data, "pack": False, "devices": 1}
    one = evaluate_files(Settings.for_data(**alone), progress=False)
    assert rest.scores == pytest.approx({f"eval_{n}": v for n, v in one.scores.items()}, **CLOSE)
    shared = Settings.for_data(**alone, packing=True, buckets=[40])
    assert evaluate_files(shared, progress=False).scores == pytest.approx(one.scores, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("question_answering", {}, "packing=True is for masked_lm, .*, not for question_answering"),
        ("multiple_choice", {}, "packing=True is for .*, not for multiple_choice; leave it out"),
        ("masked_lm", {"buckets": [20]}, "give one length, a multiple of"),
        ("masked_lm", {"buckets": [16, 32]}, "buckets=.16, 32. with packing=True"),
        ("masked_lm", {"lsg": {"strict_reference": True}}, "strict_reference=True reproduces"),
    ],
)
def test_what_cannot_be_packed_stops_a_run_before_it_begins(tiny, tmp_path, kind, options, message):
    with pytest.raises(ValueError, match=message):
        run(settings_of(tiny, tmp_path, kind, packing=True, **options))


def test_one_run_at_a_time_and_away_from_its_data(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path)
    with locked(tmp_path / "out"), pytest.raises(PlaceTaken, match=r"another process writes .*out"):
        run(settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    for changes, message in (
        ({"output": str(tmp_path), "train_data": str(tmp_path)}, "holds the data file"),
        ({"eval_data": str(tmp_path)}, "out is inside the data folder .*give another folder"),
        ({"output": settings.train_data}, "output=.*train.jsonl is a file; give a folder"),
        ({"output": f"{settings.train_data}/x"}, "is inside .*train.jsonl, which is a file"),
        ({"cache": settings.train_data}, "cache=.*train.jsonl is a file"),
        ({"cache": str(tmp_path)}, "cache=.* holds the model or the data; give a folder of its"),
        ({"cache": settings.model}, "cache=.* holds the model or the data; give a folder of its"),
        ({"output": str(tmp_path)}, "output=.* holds the data file .*train.jsonl; give a folder"),
        ({"output": str(tmp_path), "train_data": f"{tmp_path}/*n.jsonl"}, "holds the data file"),
        ({"output": str(tmp_path.parent)}, "output=.* holds the data file"),
    ):
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(settings, **changes))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.jsonl", "train.jsonl"]
    (tmp_path / "out").mkdir()
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "out" / name).write_text("precious")
        with pytest.raises(
            ValueError, match=rf"has not made .{name}., which is not overwritten; give another"
        ):
            run(settings)
        (tmp_path / "out" / name).unlink()


@pytest.mark.slow
def test_a_mesh_trains_as_one_device(tiny, tmp_path):
    alone = settings_of(tiny, tmp_path, steps=2, save_every=2)
    cut = {"data": 2, "fsdp": 2, "tensor": 2}
    cut = dataclasses.replace(alone, devices=None, mesh=cut, output=str(tmp_path / "cut"))
    one, many = run(alone), run(cut)
    losses = [[record["loss"] for record in run.history] for run in (one, many)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert many.scores == pytest.approx(one.scores, abs=1e-4)


@pytest.mark.slow
def test_a_plain_model_is_converted_and_only_its_globals_learn(tmp_path):
    options = {"max_length": 640, "convert": True, "lsg": {"num_global_tokens": 3}, "steps": 2}
    options |= {"train_only": "global_tokens_and_head", "eval_data": None, "evaluate_every": None}
    with pytest.warns(UserWarning, match="drawn from seed"):
        result = run(settings_of(PLAIN, tmp_path, **options))
    assert result.model.config.lsg.num_global_tokens == 3 and result.model.max_length == 640
    before = lsg_flax.convert_checkpoint(
        PLAIN, max_sequence_length=640, num_global_tokens=3, task="base"
    )[1]
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), before["encoder"], result.params["encoder"]
    )
    table = moved["embeddings"].pop("global_embeddings")
    assert table["embedding"] and not any(jax.tree.leaves(moved))
    again = hub.read_tokenizer(result.output)
    assert again.model_max_length == 640


def test_yaml_and_flags_make_settings(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: tiny\ntask: masked_lm\ntrain_data: [a.txt, b.txt]\noutput: out\n"
        "learning_rate: 1e-4\nmesh: {data: 2, fsdp: 2}\nlsg: {block_size: 64}\n"
    )
    read = read_settings(file, {"batch_size": 4, "mesh": {"data": 4}, "model": tmp_path})
    assert read == Settings(
        model=str(tmp_path),
        task="masked_lm",
        train_data=("a.txt", "b.txt"),
        output="out",
        learning_rate=0.0001,
        mesh={"data": 4, "fsdp": 2},
        lsg={"block_size": 64},
        batch_size=4,
    )


YAML = {
    "learning_rat: 1": "'learning_rat' is unknown; did you mean 'learning_rate'",
    "columns: {txt: body}": r"columns \(as in text=body\): 'txt' is unknown; did you mean 'text'",
    "mesh: {model: 2}": "mesh: 'model' is unknown; it must be one of data, fsdp, tensor, sequence",
    "lsg: {blocksize: 2}": "did you mean 'block_size'",
    "batch_size: 8.5": "batch_size=8.5 must be a whole number",
    "batch_size: 0": "batch_size=0 must be at least 1",
    "learning_rate: fast": "learning_rate='fast' must be a number",
    "pack: 'no'": "pack='no' must be true or false",
    "labels: []": "labels=.* must be a list of at least one",
    "mesh: 8": "mesh=8 must be a mapping",
    "remat: some": "remat='some' must be one of none, full, dots",
    "{epochs: 1, steps: 2}": "epochs=1 and steps=2: give one",
    "{batch_size: 6, accumulate: 4}": "batch_size=6 must be a multiple of accumulate=4",
    "{train_only: head, frozen: x}": "give one of them",
    "warmup: 100": "warmup=100.0 must be a share",
    "best: eval_f1": "best='eval_f1' needs eval_data",
    "{eval_data: x, best: eval_f1}": "eval_f1' must be one of the scores of masked_lm: eval_loss, ",
    "{eval_data: x, evaluate_every: 10, save_every: 4}": "must be a multiple of save_every=4",
    "buckets: [0, 8]": r"buckets=\[0, 8\] must be lengths of at least 1",
    "mesh: {data: -3}": "mesh.data=-3: give integers of at least 1, and -1 for at most one axis",
    "mesh: {data: -1, fsdp: -1}": "mesh.data=-1, mesh.fsdp=-1: give integers",
    "mesh: {data: 1.5}": "mesh.data=1.5 must be a whole number",
    f"seed: {2**70}": f"seed={2**70} must be in 0..4294967295",
    "seed: -1": "seed=-1 must be in 0..4294967295",
    "steps: 0": "steps=0 must be at least 1",
    f"steps: {2**31}": "steps=2147483648 must be at most 2147483647",
    "lsg: {block_size: 0}": "block_size=0 must be at least 1",
    "lsg: {num_global_tokens: 600}": "num_global_tokens=600 is outside 1..512",
    r'cache: "a\0b"': "has a NUL character",
    "epochs: 2.5": "epochs=2.5 must be a whole number",
    "epochs: true": "epochs=True must be a whole number",
    "accumulate: 0": "accumulate=0 must be at least 1",
    "save_every: 0": "save_every=0 must be at least 1",
    "keep: 0": "keep=0 must be at least 1",
    "learning_rate: .nan": "learning_rate=nan must be a number",
    "learning_rate: -1e-4": "learning_rate=-0.0001 must be at least 0",
    "label_smoothing: 1": "label_smoothing=1.0 must be at least 0 and below 1",
    "max_target_length: 8": "max_target_length=8 is for tasks that generate text, .* not masked_lm",
    "tgt_lang: en_XX": "tgt_lang='en_XX' is for tasks that generate text",
    "generation: {num_beams: 2}": "generation=.* is for tasks that generate text, .* not masked_lm",
    "{eval_data: x, best: eval_rouge1}": "one of the scores of masked_lm: [^;]*eval_perplexity.$",
    "max_grad_norm: 0": "max_grad_norm=0.0 would clip|max_grad_norm=0 would clip",
    "schedule: exponential": "schedule='exponential' must be one of linear, cosine, constant",
    "frozen: '['": r"frozen='\[' is not a regular expression: unterminated",
    "frozen: ''": "frozen='' is empty; give a value or leave it out",
    "cache: ' '": "cache=' ' is empty",
    "labels: [a, '']": "labels='' is empty",
    "columns: {text: ''}": "columns.text='' is empty",
    "labels: [a, b]": "labels=.* are for sequence_classification and token_classification",
    "problem_type: regression": "problem_type='regression' is for sequence_classification",
    "lsg: {block_size: big}": "lsg.block_size='big' must be a whole number",
    "lsg: {sparsity_type: odd}": "lsg.sparsity_type='odd' must be one of none, norm",
    "- model": "must have lines such as",
    "a: b: c": "run.yaml:1 is not valid YAML",
    "seed: 1\nsteps: 2\nseed: 3": "run.yaml:3: 'seed' is already in line 1; remove one",
    '{"columns": {"text": "a",\n"text": "b"}}': "run.yaml:2: 'text' is already in line 1",
    "lsg:\n\tblock_size: 8": r"run.yaml:2 is not valid YAML: .*with spaces, not tabs",
    "1: 2": "run.yaml:1: the name 1 is not text; quote it",
    "seed: 2020-13-45": "seed='2020-13-45' must be a whole number",
    "steps: 1\nseed: !!int abc": "run.yaml:2: 'abc' cannot be read as int; give another value",
    "pack: !!bool abc": "run.yaml:1: 'abc' cannot be read as bool",
    "subset: !!timestamp abc": "run.yaml:1: 'abc' cannot be read as timestamp",
    f"seed: {'7' * 5000}": r"run.yaml:1: '7{20,40}\.\.\.7{20,40}' cannot be read as int",
    f"seed: {'7' * 4000}": r"seed=7{20,40}\.\.\.7{20,40} must be in",
    "labels: [no, yes]": "labels=False must be a text; quote it in a YAML file",
    "subset: 2020": "subset=2020 must be a text; quote it",
    "steps: 1:30": "steps='1:30' must be a whole number",
    "steps: 010": "steps='010' must be a whole number",
    "mesh: &m {data: 1}\nlsg: {<<: *m}": "run.yaml:2: '<<' is not supported; write the setting",
    "{packing: true, mesh: {sequence: 2}}": "packing=True with mesh.sequence=2",
    "[" * 9999: "not valid YAML: maximum recursion",
}


@pytest.mark.parametrize("text", YAML)
def test_wrong_settings_are_named(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    given = {"model": "m", "task": "masked_lm", "train_data": "a.txt", "output": "o"}
    with pytest.raises(ValueError, match=YAML[text]):
        read_settings(file, given)


def test_a_setting_of_many_aliases_makes_a_short_message(tmp_path):
    lists = ["&l0 [x]", *(f"&l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 8))]
    bomb = f"[{', '.join(lists)}]"
    given = {"model": "m", "task": "masked_lm", "train_data": "a.txt", "output": "o"}
    for name in ("cache", "labels", "seed", "mesh", "columns.text", "learning_rate", "remat"):
        outer, _, inner = name.partition(".")
        text = f"{outer}: {{{inner}: {bomb}}}" if inner else f"{outer}: {bomb}"
        (tmp_path / "run.yaml").write_text(text)
        begun = time.perf_counter()
        with pytest.raises(ValueError, match=name) as error:
            read_settings(tmp_path / "run.yaml", given)
        assert len(str(error.value)) < 1000 and time.perf_counter() - begun < 2


def test_yaml_may_name_a_value_and_use_it_again(tmp_path):
    (tmp_path / "run.yaml").write_text("train_data: &data a.txt\neval_data: *data\nlsg: &l {}\n")
    given = {"model": "m", "task": "masked_lm", "output": "o"}
    assert read_settings(tmp_path / "run.yaml", given).eval_data == "a.txt"


def test_a_warmup_that_fills_a_short_run_leaves_its_last_step():
    settings = Settings(model="m", task="masked_lm", train_data="a", output="o", warmup=0.9)
    assert settings.optimizer(1) and settings.optimizer(2)


@pytest.mark.parametrize(
    ("trained", "left"),
    [
        ("head", {"head", "pooler"}),
        ("global_tokens_and_head", {"head", "pooler", "encoder/embeddings/global_embeddings"}),
    ],
)
def test_what_stays_as_it_is(trained, left):
    """Of every model: encoder-decoders have words and a decoder beside the encoder, REALM's scorer
    is made of embedders."""
    trees = json.loads((GOLDEN / "parameter_trees.json").read_text())
    paths = {path for name, tree in trees.items() if " lsg " in name for path in tree}
    learn = {path for path in paths if not re.search(str(FROZEN[trained]), path)}
    learn = {re.sub("^[a-z_]*embedder/", "", path) for path in learn}
    assert learn and all(path.startswith(tuple(left)) for path in learn)
    assert all(any(path.startswith(part) for path in learn) for part in left)


def test_missing_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="train_data, output, task must be given as flags or"):
        read_settings(None, {"model": "m"})
    with pytest.raises(ValueError, match="task='base' must be one of masked_lm, causal_lm, seq"):
        read_settings(None, {"model": "m", "train_data": "a", "output": "o", "task": "base"})
    with pytest.raises(FileNotFoundError, match=r"none.yaml is not a file"):
        read_settings(tmp_path / "none.yaml")


def test_what_does_not_fit_is_refused_before_training(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path)
    file = tmp_path / "odd.jsonl"
    file.write_text('{"text": "w5", "label": "low"}\n{"text": \n{"text": "w5", "label": "odd"}\n')
    wrong = {
        "max_length": (17, r"reads 16 tokens; set convert \(--convert\)"),
        "devices": (9, "devices=9, but there are 8"),
        "mesh": ({"data": 3}, "mesh of data=3.* does not fit 1 devices"),
        "train_data": (str(tmp_path / "none.jsonl"), "none.jsonl"),
        "eval_data": (str(file), r"odd.jsonl:2: not valid JSON.*on_error='skip'"),
        "output": (str(GOLDEN / "bert_base"), "holds a model that this run has not made"),
        "model": (str(GOLDEN / "bert_base"), "has no tokenizer"),
        "buckets": ((4, 8), "add a bucket"),
        "lsg": ({"block_size": 7}, "block_size=7 is not divisible by sparsity_factor"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(dataclasses.replace(settings, **{name: value}))
    with pytest.raises(ValueError, match=r"buckets=\[16, 32\] must be lengths in 1..16"):
        run(dataclasses.replace(settings, buckets=(16, 32)))
    file.write_text('{"text": "w5", "label": "odd"}\n')
    with pytest.raises(ValueError, match=r"odd.jsonl:1: label 'odd' is none of the 2 labels"):
        run(dataclasses.replace(settings, eval_data=str(file)))
    with pytest.raises(ValueError, match=r"batch_size gives 8 rows of 16 tokens.*multiple of 3"):
        run(dataclasses.replace(settings, devices=3))
    with pytest.raises(ValueError, match=r"over sequence=8 devices give each 1 blocks"):
        run(dataclasses.replace(settings, devices=8, mesh={"sequence": 8}))
    with pytest.raises(ValueError, match="full attention and no global tokens"):
        run(dataclasses.replace(settings, model=str(PLAIN), train_only="global_tokens_and_head"))
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- texts to write


GENERATION = {"num_beams": 2, "max_length": 9, "min_new_tokens": 7, "no_repeat_ngram_size": 1}
WRITING = {"predict_with_generate": True, "generation": GENERATION, "generation_rows": 7}
WRITING |= {"label_smoothing": 0.1, "learning_rate": 0.03, "buckets": [8, 16]}
WRITING |= {"target_buckets": [6, 16], "max_target_length": 12, "eval_batch_size": 4}


BUCKETS_OF_MBART = {"buckets": None, "target_buckets": None}
DATA = ("train_data", "eval_data")
TRAINING_PAGE = pathlib.Path(__file__).parent.parent / "docs" / "training.md"


class FirstLanguage:
    """Puts the language first, as mBART-50 does."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tgt_lang = tokenizer, tokenizer.tgt_lang

    def __call__(self, text_target):
        return {"input_ids": self.tokenizer(text_target=text_target)["input_ids"][::-1]}

    def convert_tokens_to_ids(self, tokens):
        return self.tokenizer.convert_tokens_to_ids(tokens)


def writing_of(writer, folder, **options) -> Settings:
    return settings_of(writer, folder, "conditional_generation", **WRITING | options)


def written_by_hand(settings: Settings, model, params) -> dict[str, float]:
    """Scores of summaries, written and scored one by one."""
    tokenizer = hub.read_tokenizer(settings.output)
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    scores = []
    for line in pathlib.Path(str(settings.eval_data)).read_text().splitlines()[:7]:
        row = json.loads(line)
        ids = tokenizer(row["text"], truncation=True, max_length=16)["input_ids"]
        tokens = lsg_flax.generate(model, params, [ids], **GENERATION)
        text = tokenizer.decode(tokens[0], skip_special_tokens=True)
        scores.append({n: s.fmeasure for n, s in scorer.score(row["target"], text).items()})
    return {f"eval_{n}": float(np.mean([s[n] for s in scores])) for n in ROUGE}


@pytest.mark.slow
def test_what_is_written_is_scored_and_chosen_by(writer, tmp_path):
    """Of the first rows, with one program for each length of inputs; the same after a kill."""
    settings = writing_of(writer, tmp_path, steps=16, evaluate_every=8, best="eval_rougeL")
    before = decode._cache_size()
    whole = run(settings)
    assert 1 <= decode._cache_size() - before <= 2
    scores = {r["step"]: r["eval_rougeL"] for r in whole.history if "eval_rougeL" in r}
    assert list(scores) == [8, 16]
    assert whole.best == max(scores, key=lambda step: (scores[step], step))
    by_hand = written_by_hand(settings, whole.model, whole.params)
    assert by_hand["eval_rouge1"] > 0
    for name, value in by_hand.items():
        assert whole.scores[name] == pytest.approx(value, abs=1e-6), name
    weights = (whole.output / hub.WEIGHTS).read_bytes()
    for place in (whole.output / "checkpoints" / "16", whole.output / "best"):
        shutil.rmtree(place)
    for file in (hub.CONFIG, hub.WEIGHTS):
        (whole.output / file).unlink()
    rest = run(dataclasses.replace(settings, generation_rows=7))
    assert [record["step"] for record in rest.history] == [*range(9, 17)]
    assert rest.scores == whole.scores and (rest.output / hub.WEIGHTS).read_bytes() == weights
    other = dataclasses.replace(settings, label_smoothing=0.2, max_target_length=None)
    with pytest.raises(ValueError, match=r"label_smoothing: 0.1 then, 0.2 now; max_target_length"):
        run(other)


def test_evaluate_scores_what_a_model_writes(writer, tmp_path, monkeypatch, capsys):
    """As a run does, on the rows that a run scores; unless it is told not to."""
    settings = writing_of(writer, tmp_path)
    model, params = lsg_flax.from_pretrained(writer)
    by_hand = written_by_hand(dataclasses.replace(settings, output=str(writer)), model, params)
    given = ["evaluate", writer, settings.eval_data, "--output", tmp_path / "scores"]
    given += ["--cache", settings.cache, "--devices", 1, "--batch-size", 4, "--buckets", 8, 16]
    given += ["--max-target-length", 12, "--target-buckets", 6, 16]
    options = ",".join(f"{name}={value}" for name, value in GENERATION.items())
    rows = ["--generation", options, "--generation-rows", 7]
    assert cli.main([*map(str, given + rows)]) == 0
    report = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert report["scores"].keys() == {"loss", "perplexity", *ROUGE} and by_hand["eval_rouge1"] > 0
    for name in ROUGE:
        assert report["scores"][name] == pytest.approx(by_hand[f"eval_{name}"], abs=1e-6), name
    assert "rougeLsum" in capsys.readouterr().out
    assert cli.main([*map(str, given), "--no-predict-with-generate"]) == 0
    assert "rouge" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert cli.main([*map(str, given)]) == 2
    assert "pip install 'lsg-flax[summarization]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mesh_learns_to_write_as_one_device(writer, tmp_path):
    options = {"steps": 2, "evaluate_every": 2, "generation_rows": None, "buckets": [16]}
    options |= {"target_buckets": [12], "learning_rate": 1e-3, "eval_batch_size": 8}
    alone = writing_of(writer, tmp_path, **options)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    cut = dataclasses.replace(alone, devices=8, mesh=mesh, output=str(tmp_path / "cut"))
    one, many = run(alone), run(cut)
    losses = [[record["loss"] for record in each.history] for each in (one, many)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert many.scores == pytest.approx(one.scores, abs=1e-4)


WRITER_YAML = {
    "{eval_data: x, best: eval_rougeL}": "eval_perplexity; ROUGE needs predict_with_generate",
    "{eval_data: x, predict_with_generate: true, best: eval_f1}": "one of .*eval_rougeLsum",
    "predict_with_generate: true": "predict_with_generate=True needs eval_data",
    "{eval_data: x, generation_rows: 4}": "generation_rows=4 is for .* set predict_with_generate",
    "generation: {num_beam: 4}": "generation: 'num_beam' is unknown; did you mean 'num_beams'",
    "generation: {num_return_sequences: 4}": "'num_return_sequences' is unknown",
    "target_buckets: [0]": r"target_buckets=\[0\] must be lengths of at least 1",
    "generation_rows: 0": "generation_rows=0 must be at least 1",
    "max_target_length: 1": "max_target_length=1 must be at least 2",
    "columns: {summary: body}": "columns .*: 'summary' is unknown.*target",
    "labels: [a, b]": "labels=.* are for sequence_classification",
}


@pytest.mark.parametrize("text", WRITER_YAML)
def test_wrong_settings_of_what_is_written_are_named(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    given = {"model": "m", "task": "conditional_generation", "train_data": "a", "output": "o"}
    with pytest.raises(ValueError, match=WRITER_YAML[text]):
        read_settings(tmp_path / "run.yaml", given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_target_length": 17}, "the decoder of .* has 16 positions; give at most that many"),
        ({"target_buckets": (4,)}, "at least 5, the tokens of the longest target; add a"),
        ({"target_buckets": (32,)}, r"target_buckets=\[32\] must be lengths in 1..16"),
        ({"src_lang": "en_XX"}, "src_lang='en_XX', tgt_lang=None: .* does not know languages"),
        ({"generation": {"num_beams": 0}}, "num_beams=0 must be"),
        ({"generation": {"length_penalty": 2.0}}, "need num_beams > 1"),
        ({"generation": {"max_length": 18}}, "max_length=18 .* this checkpoint has 16"),
        ({"generation": {}, "max_target_length": None}, "nothing limits the length of the texts"),
        ({"train_only": "head"}, "matches every parameter"),
        ({"eval_batch_size": 3, "devices": 2}, "eval_batch_size gives 3 rows"),
    ],
)
def test_what_cannot_be_learned_or_written_is_refused(writer, tmp_path, change, message):
    settings = writing_of(writer, tmp_path)
    with pytest.raises(ValueError, match=message):
        finetune(dataclasses.replace(settings, **change), progress=False, begins=pytest.fail)


def test_rouge_is_there_before_a_run_begins(writer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(ImportError, match=r"rouge-score: pip install 'lsg-flax\[summarization\]'"):
        finetune(writing_of(writer, tmp_path), progress=False, begins=pytest.fail)


def test_a_model_and_a_tokenizer_that_cannot_write_are_refused(tmp_path):
    small = save_tiny_writer(tmp_path / "small", vocab_size=20)
    with pytest.raises(ValueError, match=r"the token \d\d, but vocab_size=20 allows 0..19; tok"):
        run(writing_of(small, tmp_path))
    other = save_tiny_writer(tmp_path / "other")
    config = json.loads((other / hub.CONFIG).read_text()) | {"decoder_start_token_id": None}
    (other / hub.CONFIG).write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="decoder_start_token_id=None, which are needed to make decoder_input_i"
    ):
        run(writing_of(other, tmp_path))


DOCUMENTED = re.findall(r"```yaml\n(.*?)```", TRAINING_PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_documented_run_makes_a_plain_model_write_about_long_texts(tmp_path):
    """As docs/training.md has it, with other sizes."""
    (tmp_path / "run.yaml").write_text(DOCUMENTED[-1])
    plain = save_tiny_writer(tmp_path / "plain", None)
    given = {name: write(tmp_path, "named", name=f"{name}.jsonl") for name in DATA}
    given |= {"model": plain, "output": tmp_path / "out", "cache": tmp_path / "cache"}
    given |= {"max_length": 40, "max_target_length": 12, "target_buckets": [12], "batch_size": 4}
    given |= {"accumulate": 2, "devices": 1, "steps": 2, "lsg": {"block_size": 8}}
    given |= {"generation": {"max_length": 9, "num_beams": 2}, "generation_rows": 3}
    given["lsg"] |= {"sparse_block_size": 8, "sparsity_factor": 2}
    result = run(read_settings(tmp_path / "run.yaml", given))
    config = result.model.config
    assert result.step == 2 and result.model.max_length == 40 and config.lsg.num_global_tokens == 1
    assert set(result.scores) == {f"eval_{n}" for n in ("loss", "perplexity", *ROUGE)}
    summarize = lsg_flax.pipeline("summarization", model=str(result.output), max_length=6)
    assert summarize(" ".join(["w5"] * 30))[0].keys() == {"summary_text"}
    assert len(DOCUMENTED) == 3 and read_settings(tmp_path / "run.yaml").label_smoothing == 0.1


@pytest.mark.slow
def test_the_documented_packing_puts_all_texts_into_one_row(tmp_path):
    """As docs/training.md has it: rows longer than the texts, and than the model has positions."""
    (tmp_path / "run.yaml").write_text(DOCUMENTED[1])
    given = {
        name: write(tmp_path, "single_label_classification", name=f"{name}.jsonl") for name in DATA
    }
    given |= {"model": PLAIN, "convert": True, "output": tmp_path / "out", "devices": 1}
    given |= {"cache": tmp_path / "cache", "batch_size": 1, "epochs": 2}
    settings = read_settings(tmp_path / "run.yaml", given)
    assert settings.packing and settings.task == "sequence_classification"
    found, result = survey(settings, progress=False).train, run(settings)
    assert found.buckets == {4096: 1} and found.rows == 24 and result.model.max_length == 2000
    lengths = [len(words) + 2 for words in texts(0, 24)]
    assert [record["tokens"] for record in result.history] == [sum(lengths)] * 2


def test_languages_are_those_of_the_settings(writer, tmp_path):
    """mBART's texts end with a language; its own tokenizer has a default for one of the two."""
    model, params = lsg_flax.from_pretrained(GOLDEN / "mbart_conditional_generation")
    folder = tmp_path / "mbart"
    lsg_flax.save_pretrained(folder, model, params)
    MBartTokenizer().save_pretrained(folder)
    settings = writing_of(folder, tmp_path, **BUCKETS_OF_MBART)
    with pytest.raises(ValueError, match="src_lang='en_XX', tgt_lang=None: both must be languages"):
        run(settings)
    with pytest.raises(ValueError, match=r"tgt_lang='ro': both must be .*'ro_RO'"):
        run(dataclasses.replace(settings, tgt_lang="ro"))
    source = open_source(str(folder), "conditional_generation", 16, convert=False)
    reader = source.reader("de_DE", "ro_RO")
    token = reader.convert_tokens_to_ids("ro_RO")
    options = writing_options(model, reader, {"num_beams": 2}, 9)
    wanted = {"num_return_sequences": 1, "decoder_start_token_id": token}
    assert options == wanted | {"num_beams": 2, "max_new_tokens": 9}
    first = FirstLanguage(reader)
    options = writing_options(model, first, {"decoder_start_token_id": 2}, 9)
    assert options["forced_bos_token_id"] == token
    assert source.tokenizer.src_lang == "en_XX"
    lsg_flax.save_pretrained(tmp_path / "out", model, params, source.tokenizer)
    saved = [(f / "tokenizer.json").read_bytes() for f in (folder, tmp_path / "out")]
    assert saved[0] == saved[1]
