"""Models both ways, live: PyTorch's random ones in JAX, and ours in PyTorch. 1e-4 on real
tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, COMPARED, HEADS, KINDS, leaks, names
from jobs import DIFFERENCES, TABLE, close, close_outputs
from saved import CONVERTED

import lsg_flax
from lsg_flax.convert_from_torch import params_to_torch

pytestmark = pytest.mark.usefixtures("fixed_rotations")
ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids")
ARGUMENTS += ("decoder_input_ids", "decoder_attention_mask")
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


def compare(results, name: str, direction: str):
    """Runs a case and notes its largest difference in the table of families and heads."""
    kind = "plain" if name.startswith("plain") else "LSG"
    group = f"{direction} {kind} {name}"
    model, params, arguments, case, result = loaded(results, name)
    assert {key: result.report[key] for key in LISTS} == {key: [] for key in LISTS}
    ours = jax.jit(model.apply)({"params": params}, **arguments)
    close_outputs(group, model.task, ours, case, result, f"{name} {model.config}")
    row = TABLE.setdefault((model.config.model_type, model.task), {})
    column, difference = f"{kind} {direction}", DIFFERENCES.pop(group)
    row[column] = max(row.get(column, 0.0), difference)


@pytest.mark.parametrize("name", names("model"))
def test_a_model_of_pytorch_in_jax(reference, name):
    compare(reference, name, "PyTorch -> JAX")


@pytest.mark.parametrize("name", [n for n in CASES if "grad_of" in CASES[n].fields])
def test_gradients_of_every_parameter(reference, name):
    model, params, arguments, case, result = loaded(reference, name)
    weights = {
        n.removeprefix("weight_"): jnp.asarray(w)
        for n, w in case.inputs.items()
        if n.startswith("weight_")
    }

    @jax.jit
    def gradients(params):
        def loss(params):
            out = model.apply({"params": params}, **arguments)
            return sum((getattr(out, output) * weight).sum() for output, weight in weights.items())

        return jax.grad(loss)(params)

    tensors = params_to_torch(gradients(params), model)
    expected = {n.removeprefix("grad."): g for n, g in result.outputs.items() if "grad." in n}
    assert len(expected) > 15
    for parameter, gradient in expected.items():
        scale = max(1.0, np.abs(gradient).max())
        label = f"gradient of {parameter}, {model.config}"
        ours = tensors[parameter] / scale
        group = f"gradients {name}"
        close(group, ours, gradient / scale, tolerance=1e-4, label=label)
    row = TABLE.setdefault((model.config.model_type, model.task), {})
    row["gradients"] = DIFFERENCES.pop(group)


RUN = [f"{kind}_{family}_{task}" for family, task in HEADS for kind in KINDS[family]]
RUN += ["lsg_bert_masked_lm_untied", "plain_bert_causal_lm_cross"]


@pytest.mark.parametrize("name", RUN)
def test_a_model_of_ours_in_pytorch(saved, name):
    """Nothing missing, nothing left over, the same numbers; and a strict load of the file."""
    compare(saved, name, "JAX -> PyTorch")
    _, strict = saved[f"strict_{name}"]
    assert len(strict.report["keys"]) > 15


@pytest.mark.parametrize(("kind", "family"), [(k, f) for f in COMPARED for k in KINDS[f]])
def test_what_a_family_does_not_read_changes_no_number(saved, kind, family):
    compare(saved, f"{kind}_{family}_unread", "JAX -> PyTorch")


@pytest.mark.parametrize("name", CONVERTED)
def test_our_conversion_in_pytorch(saved, name):
    compare(saved, f"converted_{name}", "JAX -> PyTorch")
