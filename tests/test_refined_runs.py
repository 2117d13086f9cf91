"""Runs with refinements: early stops, reports, resuming bit for bit, the documented examples, and
what is refused before anything is read."""

import dataclasses
import functools
import shutil
import sys
import types

import flax.traverse_util
import numpy as np
import pytest
import test_training
from test_training import bits_equal
from tiny_run import save_tiny, write

import lsg_flax
from lsg_flax import hub, training
from lsg_flax.training import read_settings
from lsg_flax.training.finetune import finetune
from lsg_flax.training.reports import open_reports
from lsg_flax.training.survey import survey

pytestmark = pytest.mark.filterwarnings("ignore:weights for task")  # heads that are drawn


def flat(tree) -> dict:
    return flax.traverse_util.flatten_dict(tree, sep="/")


# ------------------------------------------------------------------------------------ early stops


@pytest.mark.parametrize(
    ("mode", "threshold", "scores", "ends"),
    [
        ("min", 0.0, [3, 2, 2, 2.5], 4),
        ("min", 0.0, [3, 2, 2.5, 1.9, 2, 2], 6),
        ("max", 0.0, [1, 2, 1, 3, 3, 2], 6),
        ("min", 0.5, [3, 2.8, 2.6], 3),  # each is the best, and none by enough
        ("min", 0.5, [3, 2.8, 2.2, 2.1], None),
    ],
)
def test_patience_counts_evaluations_that_are_no_better(mode, threshold, scores, ends):
    """As transformers' EarlyStoppingCallback, whose best score is the best of all."""
    rule = training.EarlyStopping("score", 2, threshold, mode)
    waiting, ended = None, None
    for number, score in enumerate(scores, 1):
        waiting = rule.after(waiting, {"score": float(score)})
        ended = ended or (number if rule.ends(waiting) else None)
    assert ended == ends
    with pytest.raises(ValueError, match=r"metric='score' is not among .*\['eval_loss'\]"):
        rule.after(None, {"eval_loss": 1.0})
    with pytest.raises(ValueError, match=r"patience=0 must be at least 1"):
        training.EarlyStopping("score", 0)


def test_a_run_that_stops_early_stays_stopped_and_counts_on_after_a_kill(tmp_path, capsys):
    values = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 0.0}

    def fit(folder, steps=6, patience=3):
        rule = training.EarlyStopping("score", patience)
        evaluation = training.Evaluation(
            lambda state: {"score": values[int(state.step)]}, every=1, stopping=rule
        )
        return test_training.fit(folder, steps, evaluation=evaluation, every=1, keep=1)[1]

    assert [r["step"] for r in fit(tmp_path / "whole")] == [1, 2, 3, 4, 5]
    said = (
        "stopping early, after 5 of 6 steps: score did not improve in 3 evaluations; the best was"
    )
    assert said in capsys.readouterr().err
    assert training.saved_steps(tmp_path / "whole") == [5]
    assert fit(tmp_path / "whole") == [] and said in capsys.readouterr().err
    assert [r["step"] for r in fit(tmp_path / "whole", patience=4)] == [6]
    assert [r["step"] for r in fit(tmp_path / "parts", steps=4)] == [1, 2, 3, 4]
    assert [r["step"] for r in fit(tmp_path / "parts")] == [5]


# ---------------------------------------------------------------------------------------- reports


class FakeRun:
    """What wandb.init gives; keeps what it is told."""

    def __init__(self, options):
        self.id, self.options, self.steps, self.ended = options["id"] or "new", options, {}, None

    def log(self, values, step):
        self.steps[step] = values

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def reported(monkeypatch):
    """Small stands-in for the two packages, and what runs tell them."""
    wandb_runs, calls = [], []

    def init(**options):
        wandb_runs.append(FakeRun(options))
        return wandb_runs[-1]

    def told(name):
        return lambda *arguments, **options: calls.append((name, arguments, options))

    def logged():
        return [(o["step"], a[0]) for name, a, o in calls if name == "log_metrics"]

    def start_run(run_id, run_name):
        calls.append(("start_run", (run_id, run_name), {}))
        found = {"info": {"run_id": run_id or "theirs"}}
        found["data"] = {"metrics": {name: 0.0 for _, values in logged() for name in values}}
        return types.SimpleNamespace(**{n: types.SimpleNamespace(**v) for n, v in found.items()})

    class Client:
        def get_metric_history(self, run_id, name):
            assert run_id == "theirs"
            return [types.SimpleNamespace(step=step) for step, values in logged() if name in values]

    names = ("log_params", "log_metrics", "end_run")
    mlflow = types.SimpleNamespace(start_run=start_run, **{name: told(name) for name in names})
    mlflow.MlflowClient = Client
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return wandb_runs, calls


def test_a_run_is_reported_and_goes_on_as_the_same_run(reported, tmp_path):
    runs, calls = reported
    reporting = training.Reporting(("wandb", "mlflow"), "mine", {"seed": 3})
    logging = training.Logging(tmp_path / "log", progress=False, reporting=reporting)
    first = test_training.fit(tmp_path / "state", 2, logging=logging)[1]
    broken = lambda number: 1 / 0  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        test_training.fit(tmp_path / "state", 3, broken, logging=logging)
    rest = test_training.fit(tmp_path / "state", 3, logging=logging)[1]
    assert [run.ended for run in runs] == [0, 1, 0]
    assert [(run.options["id"], run.options["resume"]) for run in runs] == [
        (None, None),
        ("new", "allow"),
        ("new", "allow"),
    ]
    assert all(run.options["config"] == {"seed": 3} for run in runs)
    assert all(run.options["name"] == "mine" for run in runs)
    assert {step: v["loss"] for run in runs for step, v in run.steps.items()} == {
        record["step"]: record["loss"] for record in first + rest
    }
    begun = [arguments for name, arguments, _ in calls if name == "start_run"]
    assert begun == [(None, "mine"), ("theirs", None), ("theirs", None)]
    assert [a for name, a, _ in calls if name == "log_params"] == [({"seed": "3"},)]
    ends = [arguments for name, arguments, _ in calls if name == "end_run"]
    assert ends == [("FINISHED",), ("FAILED",), ("FINISHED",)]
    logged = [(o["step"], a[0]["loss"]) for name, a, o in calls if name == "log_metrics"]
    assert logged == [(record["step"], record["loss"]) for record in first + rest]


def test_mlflow_gets_no_number_twice(reported, tmp_path):
    """A run that was killed after step 3, and goes on behind its checkpoint of step 1."""
    reporting = training.Reporting(("mlflow",))
    for first, last in ((0, 3), (1, 4)):
        (report,) = open_reports(reporting, tmp_path, first=first)
        for step in range(first + 1, last + 1):
            evaluated = {"eval_loss": 0.5} if step == 3 and first else {}  # killed while evaluating
            report.write(step, {"loss": 9.0 - step} | evaluated)
    logged = [(o["step"], a[0]) for name, a, o in reported[1] if name == "log_metrics"]
    assert logged == [
        *((step, {"loss": 9.0 - step}) for step in (1, 2, 3)),
        *((3, {"eval_loss": 0.5}), (4, {"loss": 5.0})),
    ]


# ------------------------------------------------------------------------------- runs from files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def settings_of(tiny, folder, **options):
    values = {"model": tiny, "task": "sequence_classification", "output": folder / "out"}
    values |= {"train_data": write(folder, "single_label_classification"), "devices": 1}
    held_out = write(folder, "single_label_classification", rows=10, seed=1, name="eval.jsonl")
    values |= {"eval_data": held_out, "cache": folder / "cache", "learning_rate": 1e-2}
    return read_settings(None, values | {"steps": 4, "evaluate_every": 2} | options)


def run(settings):
    return finetune(settings, progress=False)


ALL = {"lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["query", "mlp_down"]}
ALL |= {"ema_decay": 0.5, "layerwise_lr_decay": 0.7, "class_weights": {"low": 3, "high": 0.5}}
ALL |= {"label_smoothing": 0.1, "early_stopping_patience": 9}


@pytest.mark.slow
def test_a_refined_run_goes_on_bit_for_bit_and_saves_what_it_evaluates(tiny, tmp_path):
    settings = settings_of(tiny, tmp_path, **ALL, accumulate=2)
    whole = run(settings)
    weights = (whole.output / hub.WEIGHTS).read_bytes()
    best = (whole.output / "best" / hub.WEIGHTS).read_bytes()
    for place in (whole.output / "checkpoints" / "4", whole.output / "best"):
        shutil.rmtree(place)
    for file in (hub.CONFIG, hub.WEIGHTS):
        (whole.output / file).unlink()
    rest = run(dataclasses.replace(settings, early_stopping_patience=8))
    assert [record["step"] for record in rest.history] == [3, 4] and rest.scores == whole.scores
    assert [r["loss"] for r in rest.history] == [r["loss"] for r in whole.history[2:]]
    assert (rest.output / hub.WEIGHTS).read_bytes() == weights
    assert (rest.output / "best" / hub.WEIGHTS).read_bytes() == best
    params = lsg_flax.from_pretrained(rest.output)[1]
    bits_equal(params, rest.params)
    found = training.evaluate_files(
        training.Settings.for_data(
            model=str(rest.output), task=settings.task, data=settings.eval_data, devices=1
        ),
        progress=False,
    )
    assert found.scores["loss"] == pytest.approx(rest.scores["eval_loss"], abs=1e-5)
    before = flat(lsg_flax.from_pretrained(tiny, "base")[1])
    after = flat(params)
    moved = {p for p in before if not np.array_equal(before[p], after[p])} - {"pooler/dense/kernel"}
    layers = "encoder/layers"
    changed = {f"{layers}/attention/query/kernel", f"{layers}/mlp_down/kernel"}
    assert moved - {"pooler/dense/bias"} == changed
    for changes in ({"ema_decay": 0.6}, {"lora_r": 3}, {"class_weights": {"low": 2.0}}):
        with pytest.raises(ValueError, match=rf"{next(iter(changes))}.*then, .* now"):
            run(dataclasses.replace(settings, **changes))


@pytest.mark.slow
def test_a_run_without_a_better_score_ends(tiny, tmp_path):
    """Nothing is learned, so each loss is the first one."""
    options = {"learning_rate": 0.0, "steps": 9, "evaluate_every": 1, "early_stopping_patience": 2}
    settings = settings_of(tiny, tmp_path, **options)
    first = run(settings)
    assert first.step == 3 and [r["step"] for r in first.history] == [1, 2, 3]
    again = run(settings)
    assert again.step == 3 and again.history == []


WRONG = {
    "ema_decay: 0": "ema_decay=0.0 must be above 0 and at most 1",
    "layerwise_lr_decay: 1.5": "layerwise_lr_decay=1.5 must be above 0 and at most 1",
    "lora_r: 0": "lora_r=0 must be at least 1",
    "{lora_r: 2, lora_alpha: 0.0}": "lora_alpha=0.0 must be above 0",
    "lora_alpha: 16": "lora_alpha=16.0 has no effect without lora_r; give lora_r too",
    "{lora_r: 2, frozen: encoder}": "frozen='encoder' and lora_r=2: .*leave frozen out",
    "early_stopping_patience: 3": "early_stopping_patience=3 counts evaluations; give eval_data",
    "{eval_data: x, early_stopping_threshold: 1}": "has no effect without early_stopping_patience",
    "class_weights: [1, 2]": "class_weights=.* must be a mapping of names to values",
    "class_weights: {low: -1}": "must be at least 0, and one of them above 0",
    "{class_weights: {low: 1}, problem_type: regression}": "are for sequence_classification with o",
    "report_to: wandbb": "report_to: 'wandbb' is unknown; did you mean 'wandb'",
    "run_name: x": "run_name='x' has no effect without report_to",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_refinements_are_named(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    given = {"model": "m", "task": "sequence_classification", "train_data": "a", "output": "o"}
    with pytest.raises(ValueError, match=WRONG[text]):
        read_settings(tmp_path / "run.yaml", given)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lora_r": 2, "lora_target_modules": ["q_proj"]}, ValueError, "the model has no 'q_proj'"),
        ({"class_weights": {"lo": 2}}, ValueError, "'lo' is none of the labels high, low; give"),
        ({"report_to": ["mlflow"]}, ImportError, "needs the package mlflow: pip install mlflow"),
    ],
)
def test_a_run_and_its_dry_run_refuse_what_cannot_be(
    tiny, tmp_path, monkeypatch, options, kind, message
):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(hub.Checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))
    settings = settings_of(tiny, tmp_path, **options)
    for call in (run, functools.partial(survey, progress=False)):
        with pytest.raises(kind, match=message):
            call(settings)
    assert not list((tmp_path / "out").rglob("*.json*"))
