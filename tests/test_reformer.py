"""Reformer: the reference's numbers and gradients, layers that are computed back, its files both
ways, meshes, and what is refused."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from golden_data import cases, load
from reference.reformer_numbers import drawn, rotations

import lsg_flax
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.models import Model
from lsg_flax.training import losses

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SMALL: dict[str, Any] = {
    "model_type": "reformer",
    "vocab_size": 31,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "attention_head_size": 4,
    "feed_forward_size": 12,
    "attn_layers": ["local", "lsh"],
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 6,
    "axial_pos_shape": [4, 6],
    "axial_pos_embds_dim": [3, 5],
    "max_position_embeddings": 24,
    "num_buckets": 4,
}
CASES = cases("reformer")
# What float32 in the reference makes of the weights of tokens that see only themselves, in so many
# rounds; the same cases in float64 are compared as all others.
INEXACT = dict.fromkeys(("reformer_hashes_causal", "reformer_hashes_causal_masked"), 0.0029)


def write(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """The checkpoint of a recorded case; returns its tensors."""
    case = load(name)[0]
    values = {"model_type": "reformer", "architectures": [case["class"]]} | case["config"]
    (folder / "config.json").write_text(json.dumps(values))
    shapes: dict[str, list[int]] = case["report"]["parameters"]
    tensors = {name: drawn(name, shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors


def run_of(name: str, model: Model):
    """The function of parameters that the reference was differentiated by, and its outputs."""
    case, inputs, outputs = load(name)
    targets = model.task_record.targets
    labels = {target.labels: inputs[target.labels] for target in targets if "loss" in outputs}
    weights = {n: a for n, a in inputs.items() if n.startswith("weight_")}
    given = {n: a for n, a in inputs.items() if n not in weights and n not in labels}
    shapes = map(tuple, case["report"]["hashings"])
    hashing = tuple(rotations(number, shape) for number, shape in enumerate(shapes))
    states = "hidden_states.0" in outputs

    def run(params):
        out = model.apply(
            {"params": params}, **given, lsh_rotations=hashing, output_hidden_states=states
        )
        total = sum((getattr(out, n.removeprefix("weight_")) * a).sum() for n, a in weights.items())
        if not labels:
            return total, out
        batch = given | labels
        sums, counts = losses.target_sums(model, out, batch), losses.target_counts(model, batch)
        loss = losses.weighted_mean(model, sums, counts)
        return total + loss, dataclasses.replace(out, loss=loss)

    return jax.jit(jax.value_and_grad(run, has_aux=True) if "grad_of" in case else run)


def compared(name: str, output: str, found, expected, real):
    """Where tokens are real; the padding behind them that hidden states have is cut."""
    assert found.shape == expected.shape, output
    if output.startswith("hidden_states"):
        found, expected = (x[:, : real.shape[1]][real] for x in (found, expected))
    elif expected.shape[:2] == real.shape:
        found, expected = found[real], expected[real]
    scale = max(1.0, np.abs(expected).max()) if output.startswith("grad.") else 1.0
    if name in INEXACT:
        assert np.abs(found - expected).max() <= 3 * INEXACT[name] * np.abs(expected).max(), output
        return
    np.testing.assert_allclose(found / scale, expected / scale, err_msg=output, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_the_reference(name, tmp_path):
    """Outputs, loss and gradients, with its rotations; and the file again, every tensor as it
    was."""
    tensors = write(tmp_path, name)
    model, params = lsg_flax.from_pretrained(tmp_path)
    case, inputs, outputs = load(name)
    result = run_of(name, model)(params)
    (_, out), gradients = result if "grad_of" in case else (result, params)
    ours = {f"grad.{n}": g for n, g in params_to_torch(gradients, model).items()}
    assert len([n for n in outputs if n in ours]) >= 5 or "grad_of" not in case
    lead = next(inputs[n] for n in ("input_ids", "inputs_embeds") if n in inputs).shape[:2]
    real = inputs.get("attention_mask", np.ones(lead, np.int32)).astype(bool)
    for output, expected in outputs.items():
        if output == "weighted_loss":
            continue
        field, _, number = output.partition(".")
        found = ours[output] if field == "grad" else getattr(out, field)
        found = np.asarray(found[int(number)] if field == "hidden_states" else found)
        compared(name, output, found, expected, real)
    written = params_to_torch(params, model)
    assert written.keys() - {"lm_head.decoder.bias"} == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
