"""Models with every head against the PyTorch reference: outputs (1e-4), gradients, hidden
states."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import GOLDEN, cases, load, lsh_rotations

import lsg_flax
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.hub import config_values
from lsg_flax.patterns import sparsity

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def recorded_rotations(monkeypatch):
    def rotations(key, config, *, num_heads, head_dim):
        outputs = [config.selection_chunk] * config.lsh_num_pre_rounds + [
            config.selection_chunk // config.sparsity_factor
        ]
        return tuple(
            jnp.asarray(lsh_rotations(num_heads, head_dim, buckets // 2)) for buckets in outputs
        )

    monkeypatch.setattr(sparsity, "lsh_rotations", rotations)


@functools.cache
def checkpoint(folder: str, **overrides):
    return lsg_flax.from_pretrained(GOLDEN / folder, **overrides)


@functools.partial(jax.jit, static_argnames=("model", "hidden"))
def apply(model, params, arrays, *, hidden):
    return model.apply({"params": params}, **arrays, output_hidden_states=hidden)


@functools.partial(jax.jit, static_argnames=("model", "hidden"))
def apply_and_differentiate(model, params, arrays, weights, *, hidden):
    """The outputs, a sum in which they count with `weights`, and its gradients."""

    def loss(params):
        result = model.apply({"params": params}, **arrays, output_hidden_states=hidden)
        return sum((getattr(result, n) * w).sum() for n, w in weights.items()), result

    (value, result), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return result, value, gradients


def starting(prefix, arrays):
    return {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}


@pytest.mark.parametrize("name", cases("model"))
def test_model(name):
    case, inputs, outputs = load(name)
    overrides = dict(case.get("config", {}))
    if case.get("strict_reference"):
        overrides["strict_reference"] = True
    model, params = checkpoint(case["checkpoint"], **overrides)
    arrays = {name: inputs[name] for name in INPUTS if name in inputs}
    hidden = bool(case.get("output_hidden_states"))
    if gradients := starting("grad.", outputs):
        weights = starting("weight_", inputs)
        result, value, grads = apply_and_differentiate(
            model, params, arrays, weights, hidden=hidden
        )
        np.testing.assert_allclose(value, outputs["weighted_loss"], rtol=1e-4)
        tensors = params_to_torch(grads, model)
        for n, expected in gradients.items():
            scale = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(tensors[n] / scale, expected / scale, err_msg=n, **TOLERANCE)
    else:
        result = apply(model, params, arrays, hidden=hidden)
    compare_outputs(result, outputs, inputs.get("attention_mask"))


def compare_outputs(result, outputs, mask):
    compared = 0
    for field, expected in outputs.items():
        if field in ("weighted_loss", "loss") or field.startswith(("grad.", "hidden_states.")):
            continue
        value = np.asarray(getattr(result, field))
        if (
            mask is not None
            and field not in ("pooler_output", "seq_relationship_logits")
            and value.shape[:2] == mask.shape
        ):
            real = mask.astype(bool).reshape(*mask.shape, *[1] * (value.ndim - 2))
            value, expected = np.where(real, value, 0), np.where(real, expected, 0)
        np.testing.assert_allclose(value, expected, err_msg=field, **TOLERANCE)
        compared += 1
    assert compared
    states = starting("hidden_states.", outputs)
    assert len(states) == len(result.hidden_states or ())
    for i, expected in states.items():
        np.testing.assert_allclose(
            result.hidden_states[int(i)], expected, err_msg=f"hidden state {i}", **TOLERANCE
        )


def test_hidden_states_and_gradients_are_recorded():
    fields = {field for name in cases("model") for field in load(name)[2]}
    assert any(f.startswith("hidden_states.") for f in fields) and any(
        f.startswith("grad.") for f in fields
    )


@pytest.mark.parametrize("head", sorted({load(name)[0]["checkpoint"] for name in cases("model")}))
def test_round_trip_is_the_identity(head, tmp_path):
    model, params = checkpoint(head)
    lsg_flax.save_pretrained(tmp_path, model, params)
    again, params_again = lsg_flax.from_pretrained(tmp_path)
    assert again.task == model.task
    assert config_values(again) == config_values(model) | {"torch_dtype": "float32"}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(
            leaf, flax.traverse_util.flatten_dict(params_again, sep="/")[path], err_msg=path
        )
