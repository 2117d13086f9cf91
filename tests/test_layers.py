"""The hand-written backward passes of layers.py against JAX's own derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsg_flax.kernels.dropout import drop
from lsg_flax.models.activations import ACTIVATIONS
from lsg_flax.models.layers import normalize, project


def close(got, wanted, tolerance: float = 1e-5) -> None:
    """Every leaf equal to `tolerance`."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), got, wanted)


def check(ours, plain, *inputs) -> None:
    """Both give the same outputs, and the same gradients of a sum that weighs every output."""

    def differentiate(function, *inputs):
        out, pullback = jax.vjp(function, *inputs)
        return out, *pullback(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape) / out.size)

    @jax.jit
    def both(*inputs):
        return [differentiate(function, *inputs) for function in (ours, plain)]

    close(*both(*inputs))


@pytest.mark.parametrize("reads", ["btd", "bdt"])
@pytest.mark.parametrize("writes", ["btd", "bdt"])
@pytest.mark.parametrize("features", [3, 8])
def test_projection(reads, writes, features):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 5, 4) if reads == "btd" else (2, 4, 5))
    kernel = jax.random.normal(keys[1], (4, features))

    def plain(x, kernel):
        out = (x if reads == "btd" else x.swapaxes(1, 2)) @ kernel
        return out if writes == "btd" else out.swapaxes(1, 2)

    def ours(x, kernel):
        return project(x, kernel, reads, writes)

    check(ours, plain, x, kernel)


@pytest.mark.parametrize("shape", [(7,), (2, 5, 7)])
def test_layer_norm(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x, scale, bias = (
        jax.random.normal(key, s) for key, s in zip(keys, (shape, (7,), (7,)), strict=True)
    )
    module = nn.LayerNorm(epsilon=1e-3, use_fast_variance=False)

    def plain(x, scale, bias):
        return jnp.asarray(module.apply({"params": {"scale": scale, "bias": bias}}, x))

    def ours(x, scale, bias):
        return normalize(x, scale, bias, 1e-3)

    check(ours, plain, x, scale, bias)


def test_layer_norm_in_half_precision_computes_in_float32():
    x = jax.random.normal(jax.random.key(0), (3, 64)).astype(jnp.bfloat16)
    one = jnp.ones(64), jnp.zeros(64)
    assert normalize(x, *one, 1e-5).dtype == jnp.float32
    gradient = jax.jit(jax.grad(lambda x: (normalize(x, *one, 1e-5) ** 3).sum()))
    got = gradient(x)
    assert got.dtype == jnp.bfloat16
    wanted = gradient(x.astype(jnp.float32))
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=1e-2, atol=1e-2)


def test_gelu_is_exact():
    x = jnp.linspace(-12, 12, 1001)
    close(ACTIVATIONS["gelu"](x), jax.nn.gelu(x, approximate=False), 1e-6)


def test_dropout_keeps_the_mean_and_its_gradient_is_its_mask():
    x, key = jnp.ones((64, 96, 32)), jax.random.key(3)
    dropped = drop(x, key, 0.25)
    np.testing.assert_allclose(np.unique(dropped), [0.0, 1 / 0.75], rtol=1e-6)
    standard_error = np.sqrt(0.25 / 0.75 / x.size)
    assert abs(dropped.mean() - 1) < 4 * standard_error
    for axes in ((0, 1), (0, 2), (1, 2)):  # no place along any axis is favoured
        spread = np.asarray(dropped.mean(axes)).std() / np.sqrt(
            0.25 / 0.75 * x.shape[3 - sum(axes)]
        )
        assert 0.5 < spread * np.sqrt(x.size) < 1.6
    neighbours = np.corrcoef(np.ravel(dropped)[:-1], np.ravel(dropped)[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(x.size)
    np.testing.assert_array_equal(drop(x, key, 0.25), dropped)
    assert (drop(x, jax.random.key(4), 0.25) != dropped).mean() > 0.3
    check(lambda x: drop(x, key, 0.25), lambda x: x * dropped, x)
