"""Runs cases in the reference environment, and compares what comes back."""

import json
import os
import pathlib
import subprocess
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from golden_data import lsh_rotations

from lsg_flax import LSGConfig

HERE = pathlib.Path(__file__).parent
DIFFERENCES: dict[str, float] = {}  # the largest seen, by group
TABLE: dict[tuple[str, str], dict[str, float]] = {}  # (family, task) -> column -> the largest
TOKEN_OUTPUTS = ("last_hidden_state", "prediction_logits", "start_logits", "end_logits")
TOKEN_LOGITS = (
    *("masked_lm", "causal_lm", "token_classification", "pretraining", "conditional_generation"),
)


class Case(NamedTuple):
    """A case of tests/reference/worker.py: its fields, and its arrays."""

    fields: dict[str, Any]
    inputs: Mapping[str, np.ndarray] = MappingProxyType({})


class Result(NamedTuple):
    """What the reference made of a case; `error` is its traceback if it failed."""

    outputs: dict[str, np.ndarray]
    report: dict[str, Any]
    error: str | None


class Results(NamedTuple):
    """All results of a job, and the folder its checkpoints lie in."""

    folder: pathlib.Path
    cases: dict[str, Case]
    by_name: dict[str, Result]

    def __getitem__(self, name: str) -> tuple[Case, Result]:
        result = self.by_name[name]
        assert result.error is None, f"the reference failed on {name}:\n{result.error}"
        return self.cases[name], result


def run(cases: dict[str, Case], folder: pathlib.Path) -> Results:
    """Runs all cases in one process of the reference."""
    for name, case in cases.items():
        if case.inputs:
            np.savez(folder / f"{name}.npz", **case.inputs)
    job = [{"name": name, **case.fields} for name, case in cases.items()]
    (folder / "job.json").write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(folder / "remote_code")
    done = subprocess.run(
        [os.environ["LSG_REFERENCE_PYTHON"], HERE / "worker_job.py", folder],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode in (0, 1), done.stderr
    return Results(folder, cases, {name: _read(folder, name, done.stderr) for name in cases})


def ask(code: str) -> str:
    """What the reference's interpreter prints."""
    command = [os.environ["LSG_REFERENCE_PYTHON"], "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _read(folder: pathlib.Path, name: str, stderr: str) -> Result:
    arrays, facts, error = (
        folder / f"{name}{suffix}" for suffix in (".out.npz", ".out.json", ".error.txt")
    )
    if error.exists() or not facts.exists():
        return Result({}, {}, error.read_text() if error.exists() else stderr)
    with np.load(arrays) as archive:
        return Result(dict(archive), json.loads(facts.read_text()), None)


def rotations(config: LSGConfig, heads: int, width: int):
    """The fixed LSH rotations of every round."""
    outputs = [config.selection_chunk] * config.lsh_num_pre_rounds + [
        config.selection_chunk // config.sparsity_factor
    ]
    return tuple(jnp.asarray(lsh_rotations(heads, width, buckets // 2)) for buckets in outputs)


def close(group: str, ours, expected, *, tolerance: float, label: str):
    """Asserts equality to a tolerance, relative to values over 1, and notes the difference."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape, f"{label}: {ours.shape} and {expected.shape}"
    DIFFERENCES[group] = max(
        DIFFERENCES.get(group, 0.0), float(np.abs(ours - expected).max(initial=0.0))
    )
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance, err_msg=label)


def close_outputs(group: str, task: str, ours, case: Case, result: Result, label: str):
    """Every output of a model, tokens where they are real."""
    seen = case.inputs["attention_mask"].astype(bool)
    mask = case.inputs.get("decoder_attention_mask", seen).astype(bool)
    names = [n for n in result.outputs if not n.startswith(("grad.", "hidden_", "weighted_"))]
    assert names
    for name in names:
        value, expected = np.asarray(getattr(ours, name)), result.outputs[name]
        if name == "encoder_last_hidden_state":  # globals in front are real
            globals_ = value.shape[1] - seen.shape[1]
            real = np.pad(seen, ((0, 0), (globals_, 0)), constant_values=True)
            value, expected = value[real], expected[real]
        elif name in TOKEN_OUTPUTS or (name == "logits" and task in TOKEN_LOGITS):
            value, expected = value[mask], expected[mask]
        close(group, value, expected, tolerance=1e-4, label=f"{name} of {label}")
