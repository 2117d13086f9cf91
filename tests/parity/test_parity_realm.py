"""REALM both ways, live: outputs and gradients of every parameter 1e-4, losses 1e-5, answers and
spans equal."""

import functools
import warnings

import jax
import numpy as np
import pytest
from cases import generator_of
from cases_realm import TASKS, TIMES, realm_cases, realm_inputs, realm_sizes
from golden_data import GOLDEN
from jobs import DIFFERENCES, TABLE, Case, close, run
from saved import random_params
from tensorflow_names import OF_TENSORFLOW

import lsg_flax
from lsg_flax.convert_from_torch import params_from_torch, params_to_torch
from lsg_flax.models import FAMILIES, read_config

LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys")
RUNS = [f"realm_{task}_{i}" for task in TASKS for i in range(TIMES)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(realm_cases(), tmp_path_factory.mktemp("realm"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What PyTorch makes of checkpoints that lsg_flax wrote."""
    folder, cases = tmp_path_factory.mktemp("realm_saved"), {}
    for name in RUNS:
        generator, task = generator_of(f"saved {name}"), name.removeprefix("realm_")[:-2]
        own = task == "scorer" and not name.endswith("0")
        values = realm_sizes(generator)
        config = read_config(values | {"own_query_embedder": own})
        model = lsg_flax.Model(config, task)
        lsg_flax.save_pretrained(folder / name, model, random_params(model, generator))
        cls = FAMILIES["realm"].class_name(task, lsg=False)
        fields = {"class": cls, "checkpoint": name, "own_query_embedder": own}
        cases[f"strict_{name}"] = Case({"kind": "strict_load", **fields})
        cases[name] = Case({"kind": "model", **fields}, realm_inputs(generator, task, values))
    return run(cases, folder)


@functools.partial(jax.jit, static_argnums=0)
def gradients_of(model, params, arguments, weights):
    def loss(params):
        out = model.apply({"params": params}, **arguments)
        return sum((getattr(out, output) * weight).sum() for output, weight in weights.items())

    return jax.grad(loss)(params)


def compare(results, name: str, direction: str, task: str | None = None):
    """Runs a case and notes its largest difference in the table of families and heads."""
    case, result = results[name]
    assert {key: result.report[key] for key in LISTS} == {key: [] for key in LISTS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, params = lsg_flax.from_pretrained(results.folder / case.fields["checkpoint"], task)
    arguments = {n: a for n, a in case.inputs.items() if not n.startswith("weight_")}
    ours = jax.jit(model.apply)({"params": params}, **arguments)
    group, label = f"{direction} {name}", f"{name} {model.config}"
    names = [n for n in result.outputs if not n.startswith(("grad.", "weighted_"))]
    for n in names:
        value, expected = np.asarray(getattr(ours, n)), result.outputs[n]
        if n in ("logits", "last_hidden_state"):
            real = case.inputs["attention_mask"].astype(bool).reshape(value.shape[:2])
            value, expected = value[real], expected[real]
        if not np.issubdtype(value.dtype, np.floating):
            np.testing.assert_array_equal(value, expected, err_msg=f"{n} of {label}")
            continue
        if n == "reader_logits":
            spans = expected > -1e30
            np.testing.assert_array_equal(value > -1e30, spans)
            value, expected = value[spans], expected[spans]
        tolerance = 1e-5 if n.endswith("loss") else 1e-4
        close(group, value, expected, tolerance=tolerance, label=f"{n} of {label}")
    row = TABLE.setdefault(("realm", model.task), {})
    column, difference = f"plain {direction}", DIFFERENCES.pop(group)
    row[column] = max(row.get(column, 0.0), difference)
    return model, params, arguments, case, result, names


@pytest.mark.parametrize("name", RUNS)
def test_a_realm_of_pytorch_in_jax(reference, name):
    model, params, arguments, case, result, _ = compare(reference, name, "PyTorch -> JAX")
    starts = "weight_"
    weights = {n.removeprefix(starts): w for n, w in case.inputs.items() if n.startswith(starts)}
    found = params_to_torch(gradients_of(model, params, arguments, weights), model)
    expected = {n.removeprefix("grad."): g for n, g in result.outputs.items() if "grad." in n}
    assert len(expected) > 15
    for parameter, gradient in expected.items():
        scale, label = max(1.0, np.abs(gradient).max()), f"{parameter}, {model.config}"
        ours = found[parameter] / scale
        close(f"grad {name}", ours, gradient / scale, tolerance=1e-4, label=label)
    row = TABLE[("realm", model.task)]
    row["gradients"] = max(row.get("gradients", 0.0), DIFFERENCES.pop(f"grad {name}"))


@pytest.mark.parametrize("part", ["reader", "embedder"])
def test_a_part_of_a_whole_system_in_jax(reference, part):
    compare(reference, f"realm_open_qa_{part}", "PyTorch -> JAX", part)


@pytest.mark.parametrize("kind", OF_TENSORFLOW)
def test_variables_of_tensorflow_are_the_same_tensors(reference, kind):
    """As transformers renames and turns them, for the class of the checkpoint."""
    case, result = reference[f"tensorflow_{kind}"]
    model, _ = lsg_flax.from_pretrained(GOLDEN / OF_TENSORFLOW[kind])
    ours = params_to_torch(params_from_torch(case.inputs, model), model)
    assert ours.keys() == result.outputs.keys()
    drawn = set() if kind == "encoder" else {"cls.predictions.decoder.weight"}  # else the words
    for name in ours.keys() - drawn:
        np.testing.assert_array_equal(ours[name], result.outputs[name], err_msg=name)


@pytest.mark.parametrize("name", RUNS)
def test_a_realm_of_ours_in_pytorch(saved, name):
    """Nothing missing, nothing left over, the same numbers; and a strict load of the file."""
    compare(saved, name, "JAX -> PyTorch")
    assert len(saved[f"strict_{name}"][1].report["keys"]) > 15
