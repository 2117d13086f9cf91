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
from lsg_flax.training import loss_fn

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "encoder_outputs"),
    *("encoder_hidden_states", "encoder_attention_mask"),
)
# Outputs of rows, not of tokens; of these a mask of the inputs says nothing.
OF_ROWS = ("pooler_output", "seq_relationship_logits")
WITH_LOSS = ("model_seq2seq.npz", "model_squeezebert.npz")  # of others by test_training.py

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
    names = (*INPUTS, *model.task_record.arrays)
    arrays = {name: inputs[name] for name in names if name in inputs}
    made = model.task == "conditional_generation" and "labels" in inputs
    if made and "decoder_input_ids" not in inputs:
        arrays["decoder_input_ids"] = model.shift_right(jnp.asarray(inputs["labels"]))
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
    if "loss" in outputs and case["file"] in WITH_LOSS:
        names = [*arrays, *(t.labels for t in model.task_record.targets)]
        batch = {name: inputs[name] for name in names if name in inputs}
        loss, _ = jax.jit(loss_fn, static_argnums=0)(model, params, batch)
        np.testing.assert_allclose(loss, outputs["loss"], rtol=1e-5)
    mask = inputs.get("attention_mask")
    answered = inputs.get("decoder_attention_mask") if model.has_two_stacks else mask
    compare_outputs(result, outputs, answered)
    if mask is not None and (states := result.encoder_last_hidden_state) is not None:
        split = states.shape[1] - mask.shape[1]
        seen = np.pad(mask, ((0, 0), (split, 0)), constant_values=1).astype(bool)
        expected = outputs["encoder_last_hidden_state"]
        np.testing.assert_allclose(states[seen], expected[seen], **TOLERANCE)


def compare_outputs(result, outputs, mask):
    compared = 0
    if "loss" in outputs and result.loss is not None:
        np.testing.assert_allclose(result.loss, outputs["loss"], rtol=1e-5, atol=1e-5)
    for field, expected in outputs.items():
        skipped = ("weighted_loss", "loss", "encoder_last_hidden_state")
        if field in skipped or field.startswith("grad.") or "hidden_states." in field:
            continue
        value = np.asarray(getattr(result, field))
        if mask is not None and field not in OF_ROWS and value.shape[:2] == mask.shape:
            real = mask.astype(bool).reshape(*mask.shape, *[1] * (value.ndim - 2))
            value, expected = np.where(real, value, 0), np.where(real, expected, 0)
        np.testing.assert_allclose(value, expected, err_msg=field, **TOLERANCE)
        compared += 1
    assert compared
    for of in ("", "encoder_", "decoder_"):
        states = starting(f"{of}hidden_states.", outputs)
        ours = getattr(result, f"{of}hidden_states") or ()
        assert len(states) == len(ours)
        for i, expected in states.items():
            value = ours[int(i)]
            if mask is not None and value.shape[:2] == mask.shape and of:
                value, expected = value[mask == 1], expected[mask == 1]
            np.testing.assert_allclose(
                value, expected, err_msg=f"{of}hidden state {i}", **TOLERANCE
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
