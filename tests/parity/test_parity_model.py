"""Models both ways, live: PyTorch's random ones in JAX, and ours in PyTorch. 1e-4 on real
tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GRADIENT_MODEL, TASKS, leaks, names
from jobs import close, close_outputs
from saved import CONVERTED

import lsg_flax
from lsg_flax.convert_from_torch import params_to_torch

pytestmark = pytest.mark.usefixtures("fixed_rotations")
ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids")
MEMORY = ("encoder_hidden_states", "encoder_attention_mask")
LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def loaded(results, name: str):
    """Our model from a checkpoint of the job, and the arguments of its case."""
    case, result = results[name]
    folder = results.folder / case.fields["checkpoint"]
    model, params = lsg_flax.from_pretrained(folder)
    if model.config.lsg and leaks(vars(model.config.lsg), case.inputs["attention_mask"]):
        model, params = lsg_flax.from_pretrained(folder, strict_reference=True)
    arguments = {n: jnp.asarray(case.inputs[n]) for n in (*ARGUMENTS, *MEMORY) if n in case.inputs}
    return model, params, arguments, case, result


def compare(results, name: str, group: str):
    model, params, arguments, case, result = loaded(results, name)
    assert {key: result.report[key] for key in LISTS} == {key: [] for key in LISTS}
    ours = jax.jit(model.apply)({"params": params}, **arguments)
    close_outputs(group, model.task, ours, case, result, f"{name} {model.config}")


@pytest.mark.parametrize("name", names("model"))
def test_a_model_of_pytorch_in_jax(reference, name):
    compare(reference, name, f"PyTorch -> JAX {name.split('_')[0]}")


def test_gradients_of_every_parameter(reference):
    model, params, arguments, case, result = loaded(reference, GRADIENT_MODEL)
    weight = jnp.asarray(case.inputs["weight_logits"])

    @jax.jit
    def gradients(params):
        return jax.grad(lambda p: (model.apply({"params": p}, **arguments).logits * weight).sum())(
            params
        )

    tensors = params_to_torch(gradients(params), model)
    assert len(case.fields["grad_of"]) > 20
    for name in case.fields["grad_of"]:
        expected = result.outputs[f"grad.{name}"]
        scale = max(1.0, np.abs(expected).max())
        label = f"gradient of {name}, {model.config}"
        close("gradients", tensors[name] / scale, expected / scale, tolerance=1e-4, label=label)


RUN = [*(f"{kind}_{task}" for task in TASKS for kind in ("lsg", "plain")), "lsg_masked_lm_untied"]


@pytest.mark.parametrize("name", RUN)
def test_a_model_of_ours_in_pytorch(saved, name):
    """Nothing missing, nothing left over, the same numbers; and a strict load of the file."""
    compare(saved, name, f"JAX -> PyTorch {name.split('_')[0]}")
    _, strict = saved[f"strict_{name}"]
    assert len(strict.report["keys"]) > 20


@pytest.mark.parametrize("name", CONVERTED)
def test_our_conversion_in_pytorch(saved, name):
    compare(saved, f"converted_{name}", "JAX -> PyTorch converted")
