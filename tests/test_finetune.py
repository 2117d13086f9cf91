"""Files to a trained checkpoint: every task end to end, resuming, meshes, and what is refused."""

import dataclasses
import json
import pathlib
import shutil
import time

import jax
import numpy as np
import pytest
from golden_data import GOLDEN
from tiny_run import PLAIN, save_tiny, write

import lsg_flax
from lsg_flax import hub
from lsg_flax.locks import PlaceTaken, locked
from lsg_flax.models import PROBLEM_SCORERS, SCORES, TASKS
from lsg_flax.training.finetune import finetune, options_for
from lsg_flax.training.settings import Settings, read_settings, trained_tasks
from lsg_flax.training.source import open_source

pytestmark = pytest.mark.filterwarnings("ignore:weights for task")  # heads that are drawn


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


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
        ("regression", [1, 2], r"2 numbers, but 1 in the training data"),
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_from_files_to_a_checkpoint(tiny, tmp_path, kind):
    settings = settings_of(tiny, tmp_path, kind)
    result = run(settings)
    assert result.step == 4 and [record["step"] for record in result.history] == [1, 2, 3, 4]
    assert set(result.scores) == {"eval_loss", *(f"eval_{name}" for name in SCORES[KINDS[kind]])}
    assert np.isfinite(list(result.scores.values())).all()
    model, params = lsg_flax.from_pretrained(settings.output)
    assert model.task == settings.task
    jax.tree.map(np.testing.assert_array_equal, params, result.params)
    tokenizer = hub.read_tokenizer(result.output)
    assert tokenizer is not None and tokenizer.model_max_length == 16
    carried = (pathlib.Path(tiny, name) for name in ("vocab.txt", "tokenizer.json", "LICENSE"))
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
    with pytest.warns(UserWarning, match="bad, fair, good; training goes on.*poor, so so, superb"):
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
    rest = run(dataclasses.replace(settings, keep=3))  # how it is kept may change
    assert [record["step"] for record in rest.history] == [3, 4]
    losses = [[r["loss"] for r in history] for history in (whole.history[2:], rest.history)]
    assert losses[0] == losses[1] and rest.scores == whole.scores and rest.best == whole.best
    assert (rest.output / hub.WEIGHTS).read_bytes() == weights
    assert (rest.output / "best" / hub.WEIGHTS).read_bytes() == best
    again = run(settings)  # nothing left to do
    assert again.history == [] and again.scores == pytest.approx(whole.scores, abs=1e-6)
    other = dataclasses.replace(settings, learning_rate=2e-3, seed=5)
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 there, 0.002 here; seed: 0 there"):
        run(other)
    write(tmp_path, "single_label_classification", seed=7)
    with pytest.raises(ValueError, match="contents_of_train_data"):
        run(settings)


def test_one_run_at_a_time_and_away_from_its_data(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path)
    with locked(tmp_path / "out"), pytest.raises(PlaceTaken, match=r"another process writes .*out"):
        run(settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    for changes, message in (
        ({"output": str(tmp_path), "train_data": str(tmp_path)}, "holds the data file"),
        ({"eval_data": str(tmp_path)}, "out lies in the data .*give another folder"),
        ({"output": settings.train_data}, "output=.*train.jsonl is a file; give a folder"),
        ({"output": f"{settings.train_data}/x"}, "lies in .*train.jsonl, which is a file"),
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
        with pytest.raises(ValueError, match=rf"has not made .{name}.; give another folder"):
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
    "columns: {txt: body}": "columns: 'txt' is unknown; did you mean 'text'",
    "mesh: {model: 2}": "mesh: 'model' is unknown; Known are data, fsdp, tensor, sequence",
    "lsg: {blocksize: 2}": "did you mean 'block_size'",
    "batch_size: 8.5": "batch_size=8.5 must be a whole number",
    "batch_size: 0": "batch_size=0 must be at least 1",
    "learning_rate: fast": "learning_rate='fast' must be a number",
    "pack: 'no'": "pack='no' must be true or false",
    "labels: []": "labels=.* must be a list of at least one",
    "mesh: 8": "mesh=8 must be a mapping",
    "remat: some": "remat='some' must be one of none, full, dots",
    "{epochs: 1, steps: 2}": "epochs=1 and steps=2: give one",
    "{batch_size: 6, accumulate: 4}": "batch_size=6 is no multiple of accumulate=4",
    "{train_only: head, frozen: x}": "give one of them",
    "warmup: 100": "warmup=100.0 is a share",
    "best: eval_f1": "best='eval_f1' needs eval_data",
    "{eval_data: x, best: eval_f1}": "eval_f1' is none of the scores of masked_lm: eval_loss, eval",
    "{eval_data: x, evaluate_every: 10, save_every: 4}": "must be a multiple of save_every=4",
    "buckets: [0, 8]": r"buckets=\[0, 8\] must be lengths of at least 1",
    "mesh: {data: -3}": "mesh.data=-3: give whole numbers from 1, and -1 for at most one axis",
    "mesh: {data: -1, fsdp: -1}": "mesh.data=-1, mesh.fsdp=-1: give whole numbers",
    "mesh: {data: 1.5}": "mesh.data=1.5 must be a whole number",
    f"seed: {2**70}": f"seed={2**70} must lie in 0..4294967295",
    "seed: -1": "seed=-1 must lie in 0..4294967295",
    "steps: 0": "steps=0 must be at least 1",
    f"steps: {2**31}": "steps=2147483648 must be at most 2147483647",
    "lsg: {block_size: 0}": "block_size=0 must be at least 1",
    "lsg: {num_global_tokens: 600}": "num_global_tokens=600 is outside 1..512",
    r'cache: "a\0b"': "has a character of 0",
    "epochs: 2.5": "epochs=2.5 must be a whole number",
    "epochs: true": "epochs=True must be a whole number",
    "accumulate: 0": "accumulate=0 must be at least 1",
    "save_every: 0": "save_every=0 must be at least 1",
    "keep: 0": "keep=0 must be at least 1",
    "learning_rate: .nan": "learning_rate=nan must be a number",
    "learning_rate: -1e-4": "learning_rate=-0.0001 must be at least 0",
    "max_grad_norm: 0": "max_grad_norm=0.0 would clip|max_grad_norm=0 would clip",
    "schedule: exponential": "schedule='exponential' must be one of linear, cosine, constant",
    "frozen: '['": r"frozen='\[' is no regular expression: unterminated",
    "frozen: ''": "frozen='' is empty; give a value, or leave it out",
    "cache: ' '": "cache=' ' is empty",
    "labels: [a, '']": "labels='' is empty",
    "columns: {text: ''}": "columns.text='' is empty",
    "labels: [a, b]": "labels=.* are for sequence_classification and token_classification",
    "problem_type: regression": "problem_type='regression' is for sequence_classification",
    "lsg: {block_size: big}": "lsg.block_size='big' must be a whole number",
    "lsg: {sparsity_type: odd}": "lsg.sparsity_type='odd' must be one of none, norm",
    "- model": "must hold lines such as",
    "a: b: c": "run.yaml:1 is not valid YAML",
    "seed: 1\nsteps: 2\nseed: 3": "run.yaml:3: 'seed' is in line 1 already; leave one",
    '{"columns": {"text": "a",\n"text": "b"}}': "run.yaml:2: 'text' is in line 1 already",
    "lsg:\n\tblock_size: 8": r"run.yaml:2 is not valid YAML: .*with spaces, not tabs",
    "1: 2": "run.yaml:1: the name 1 is no text; quote it",
    "seed: 2020-13-45": "seed='2020-13-45' must be a whole number",
    "steps: 1\nseed: !!int abc": "run.yaml:2: 'abc' cannot be read as int; give another value",
    "pack: !!bool abc": "run.yaml:1: 'abc' cannot be read as bool",
    "subset: !!timestamp abc": "run.yaml:1: 'abc' cannot be read as timestamp",
    f"seed: {'7' * 5000}": r"run.yaml:1: '7{20,40}\.\.\.7{20,40}' cannot be read as int",
    f"seed: {'7' * 4000}": r"seed=7{20,40}\.\.\.7{20,40} must lie in",
    "labels: [no, yes]": "labels=False must be a text; quote it in a YAML file",
    "subset: 2020": "subset=2020 must be a text; quote it",
    "steps: 1:30": "steps='1:30' must be a whole number",
    "steps: 010": "steps='010' must be a whole number",
    "mesh: &m {data: 1}\nlsg: {<<: *m}": "run.yaml:2: '<<' is not read here; write the names out",
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


def test_missing_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="train_data, output, task must be given as flags or"):
        read_settings(None, {"model": "m"})
    with pytest.raises(ValueError, match="task='base' must be one of masked_lm, causal_lm, seq"):
        read_settings(None, {"model": "m", "train_data": "a", "output": "o", "task": "base"})
    with pytest.raises(FileNotFoundError, match=r"none.yaml is no file"):
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
