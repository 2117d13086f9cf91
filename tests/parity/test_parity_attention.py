"""Selections and attention with random patterns and shapes, live: 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import leaks, names
from jobs import close, rotations

from lsg_flax import LSGConfig
from lsg_flax.attention import local_attention, lsg_attention
from lsg_flax.patterns import sparsity


def config_of(case) -> LSGConfig:
    fields = case.fields["config"]
    return LSGConfig(**fields, strict_reference=leaks(fields, case.inputs["mask"]))


def ordered(key, value, mask, kept: int):
    """Representatives of each chunk sorted, as a chunk's choice is a set; masked ones are alike."""
    rows = np.where(np.asarray(mask)[..., None], np.concatenate([key, value], axis=-1), 1e9)
    rows = rows.reshape(*rows.shape[:2], -1, kept, rows.shape[-1])
    return np.take_along_axis(rows, np.argsort(rows[..., :1], axis=-2), axis=-2)


@pytest.mark.parametrize("name", names("selection"))
def test_selection(reference, name):
    case, result = reference[name]
    config = config_of(case)
    query, key, value = (jnp.asarray(case.inputs[n]) for n in ("query", "key", "value"))
    ours = sparsity.select(
        key,
        value,
        jnp.asarray(case.inputs["mask"]),
        config=config,
        bos_query=query[:, :, 0],
        rotations=rotations(config, key.shape[1], key.shape[3]),
    )
    chosen = np.broadcast_to(result.outputs["sparse_mask"][:, :, 0] == 0, ours[2].shape)
    np.testing.assert_array_equal(np.sort(ours[2]), np.sort(chosen), err_msg=str(case.fields))
    theirs = (result.outputs["sparse_key"], result.outputs["sparse_value"], chosen)
    picks = sparsity.effective_type(config) == "norm" and config.sparsity_factor > 1
    kept = config.selection_chunk // config.sparsity_factor if picks else 1
    close(
        f"selection {config.sparsity_type}",
        ordered(*ours, kept),
        ordered(*theirs, kept),
        tolerance=1e-5,
        label=str(case.fields),
    )


@pytest.mark.parametrize("name", names("attention"))
def test_attention(reference, name):
    case, result = reference[name]
    config, causal = config_of(case), case.fields["causal"]
    mask = np.pad(
        case.inputs["mask"], ((0, 0), (config.num_global_tokens, 0)), constant_values=True
    )
    query, key, value, cotangent = (
        jnp.asarray(case.inputs[n]).swapaxes(1, 2) for n in ("query", "key", "value", "cotangent")
    )
    lsh = rotations(config, *query.shape[2:]) if config.sparsity_type == "lsh" else None

    @jax.jit
    def run(query, key, value):
        context, pullback = jax.vjp(
            lambda *x: lsg_attention(
                *x, jnp.asarray(mask), config=config, causal=causal, lsh_rotations=lsh
            ),
            query,
            key,
            value,
        )
        return context, pullback(cotangent)

    context, gradients = run(query, key, value)
    label = str(case.fields)
    group = f"attention {config.sparsity_type}"
    theirs = result.outputs["context"].swapaxes(1, 2)
    close(group, np.asarray(context)[mask], theirs[mask], tolerance=1e-5, label=label)
    for which, gradient in zip(("query", "key", "value"), gradients, strict=True):
        expected = result.outputs[f"grad_{which}"].swapaxes(1, 2)
        close(f"{group} gradient", gradient, expected, tolerance=1e-5, label=f"{which} {label}")


@pytest.mark.parametrize("name", names("local_attention"))
def test_local_attention(reference, name):
    case, result = reference[name]
    options = {name: value for name, value in case.fields["options"].items() if name != "dim"}
    mask, bias = (jnp.asarray(case.inputs[n]) for n in ("mask", "attn_bias"))
    of = ("query", "key", "value", "cotangent")
    *inputs, cotangent = (jnp.asarray(case.inputs[n]).swapaxes(1, 2) for n in of)

    @jax.jit
    def run(*inputs):
        context, pullback = jax.vjp(
            lambda *x: local_attention(*x, mask, attn_bias=bias, **options), *inputs
        )
        return context, pullback(cotangent)

    context, gradients = run(*inputs)
    label, real = str(options), case.inputs["mask"]
    theirs = result.outputs["context"].swapaxes(1, 2)
    close("local attention", np.asarray(context)[real], theirs[real], tolerance=1e-5, label=label)
    for which, gradient in zip(of[:3], gradients, strict=True):
        expected = result.outputs[f"grad_{which}"].swapaxes(1, 2)
        group = "local attention gradient"
        close(group, gradient, expected, tolerance=1e-5, label=f"{which} {label}")
