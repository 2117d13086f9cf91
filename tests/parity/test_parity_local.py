"""local-attention's LocalTransformer both ways, live: outputs, losses and gradients of every
parameter 1e-4, greedy tokens equal."""

import flax.traverse_util
import jax
import numpy as np
import pytest
from cases import generator_of
from jobs import DIFFERENCES, TABLE, Case, close, run
from saved import random_params

import lsg_flax
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.models import Model, read_config
from lsg_flax.training import loss_fn

COUNT, NEW = 10, 12
RUNS = [f"local_{i}" for i in range(COUNT)]


def options_of(generator) -> dict:
    """Keywords of the constructor."""
    one_of = lambda *values: values[generator.integers(len(values))]  # noqa: E731
    window = int(generator.integers(2, 6))
    causal, bias = generator.random() < 0.7, generator.random() < 0.3
    options = {
        "num_tokens": one_of(37, 37, None),
        "max_seq_len": 6 * window,
        "dim": int(generator.integers(4, 17)),
        "depth": int(generator.integers(1, 4)),
        "heads": int(generator.integers(1, 4)),
        "dim_head": 2 * int(generator.integers(1, 6)),
        "local_attn_window_size": window,
        "ff_mult": one_of(2, 4, 1.5),
        "causal": causal,
        "num_residual_streams": one_of(1, 2, 4),
        "use_dynamic_pos_bias": causal and bias,
        "use_xpos": generator.random() < 0.4,
        "xpos_scale_base": one_of(None, 3, 7.5),
        "ignore_index": one_of(-1, 5),
    }
    for name in ("qk_rmsnorm", "gate_values_per_head", "exact_windowsize", "shared_qk"):
        options[name] = bool(generator.random() < 0.4)
    options["look_backward"] = 1 if options["use_dynamic_pos_bias"] else one_of(0, 1, 1, 2)
    return options if causal else options | {"look_forward": one_of(None, 0, 1, 2)}


def inputs_of(generator, options: dict) -> dict[str, np.ndarray]:
    """Two texts; of a bidirectional model they are whole windows, behind which the reference sees
    no padding, and its loss, which reads a token less, would."""
    length = options["local_attn_window_size"] * int(generator.integers(1, 6))
    tokens, width = options["num_tokens"], options["dim"]
    if options["causal"]:
        length += int(generator.integers(0, options["local_attn_window_size"]))
    shape = (2, length, *(() if tokens else (width,)))
    x = generator.integers(0, tokens, shape) if tokens else generator.standard_normal(shape)
    inputs = {"x": x.astype(np.int32 if tokens else np.float32)}
    inputs["weight"] = generator.standard_normal((2, length, tokens or width)).astype(np.float32)
    if tokens and options["causal"] and length > 1:
        inputs["with_loss"] = np.ones((), np.int32)
    return inputs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the reference makes of models that it writes, and of those that lsg_flax wrote."""
    folder, cases = tmp_path_factory.mktemp("local"), {}
    for name in RUNS:
        generator = generator_of(name)
        options = options_of(generator)
        inputs, fields = inputs_of(generator, options), {"kind": "local_transformer"}
        fields["grad_of"] = "all"
        write = {"generate": NEW} if options["causal"] and options["num_tokens"] else {}
        # Of larger numbers the reference's own gradients in float32 are off by 1e-4 and more.
        theirs = {"options": options, "scale": 0.2, "out": f"PyTorch -> JAX {name}"} | write
        cases[f"PyTorch -> JAX {name}"] = Case(fields | theirs, inputs)
        config = read_config({"model_type": "local-transformer"} | options)
        model, ours = Model(config, config.usual_task), f"JAX -> PyTorch {name}"
        params = flax.traverse_util.flatten_dict(random_params(model, generator), sep="/")
        fixed = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
        fixed = flax.traverse_util.flatten_dict(fixed, sep="/")
        params |= {path: x for path, x in fixed.items() if path.endswith("/buffer")}
        params = flax.traverse_util.unflatten_dict(params, sep="/")
        lsg_flax.save_pretrained(folder / ours, model, params)
        cases[ours] = Case(fields | {"checkpoint": ours}, inputs)
    return run(cases, folder)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("direction", ["PyTorch -> JAX", "JAX -> PyTorch"])
def test_a_transformer_of_local_attention(results, direction, name):
    case, result = results[f"{direction} {name}"]
    model, params = lsg_flax.from_pretrained(results.folder / f"{direction} {name}")
    tokens, x = model.task == "causal_lm", case.inputs["x"]
    given = {"input_ids" if tokens else "inputs_embeds": x}

    @jax.jit
    def run_ours(params):
        out = model.apply({"params": params}, **given)
        found, loss = (out.logits if tokens else out.last_hidden_state), 0.0
        if "with_loss" in case.inputs:
            loss = loss_fn(model, params, given | {"labels": x})[0]
        return (found * case.inputs["weight"]).sum() + loss, (found, loss)

    gradients, (found, loss) = jax.grad(run_ours, has_aux=True)(params)
    group, label = f"{direction} {name}", f"{name}: {model.config}"
    close(group, found, result.outputs["outputs"], tolerance=1e-4, label=label)
    if "with_loss" in case.inputs:
        close(group, loss, result.outputs["loss"], tolerance=1e-4, label=f"loss of {label}")
    row = TABLE.setdefault(("local-transformer", model.task), {})
    column = f"plain {direction}"
    row[column] = max(row.get(column, 0.0), DIFFERENCES.pop(group))
    ours = params_to_torch(gradients, model)
    expected = {n.removeprefix("grad."): g for n, g in result.outputs.items() if "grad." in n}
    assert len(expected) > 4
    for parameter, gradient in expected.items():
        scale = max(1.0, np.abs(gradient).max())
        close(group, ours[parameter] / scale, gradient / scale, tolerance=1e-4, label=parameter)
    row["gradients"] = max(row.get("gradients", 0.0), DIFFERENCES.pop(group))
