"""Calls of attention for the tests of fused kernels, and the dense oracle's answer to them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsg_flax.attention import lsg_attention, lsg_attention_reference
from lsg_flax.patterns.config import LSGConfig

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
CAUSAL, FIRST, NONE = ("causal", True), ("global_tokens", "first_token"), ("global_tokens", "none")


class Case(NamedTuple):
    """What is static about a call."""

    config: LSGConfig
    length: int
    heads: int
    key_heads: int
    width: int
    dtype: str
    options: Any


def case(length=300, heads=2, key_heads=None, width=64, dtype="float32", options=(), **config):
    small = {"block_size": 64, "sparse_block_size": 64} | config
    return Case(LSGConfig(**small), length, heads, key_heads or heads, width, dtype, options)


def arrays(case: Case, seed: int):
    """Two rows of query, key, value, a gradient of the context, and a mask."""
    generator = np.random.default_rng(seed)
    prepended = dict(case.options).get("global_tokens", "prepended") == "prepended"
    length = (case.config.num_global_tokens if prepended else 0) + case.length
    mask = generator.random((2, length)) < generator.choice([0.3, 0.9, 1.0], (2, 1))
    mask[0, length - generator.integers(case.length) :] = False
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    floats = (generator.standard_normal((2, length, n, case.width)) for n in heads)
    return *(jnp.asarray(x, "bfloat16").astype(case.dtype) for x in floats), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames=("case", "implementation"))
def outputs(case: Case, query, key, value, gradient, mask, implementation=None):
    """The context and all gradients; without an implementation those of the oracle."""
    options = {"config": case.config, "mask": mask, **dict(case.options)}
    if implementation is None:
        function = functools.partial(lsg_attention_reference, **options)
        query, key, value, gradient = (x.astype(jnp.float32) for x in (query, key, value, gradient))
    else:
        function = functools.partial(lsg_attention, implementation=implementation, **options)
    context, transpose = jax.vjp(function, query, key, value)
    return context, transpose(gradient)


def assert_close(found, wanted, limit=1e-5):
    """Each array within a share of its largest value, or of 1."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        size = max(1.0, float(jnp.abs(y).max()))
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=limit, atol=limit * size)


def assert_equal(case: Case, seed: int, implementation: str):
    """The kernels' context and gradients are the oracle's."""
    inputs = arrays(case, seed)
    found = outputs(case, *inputs, implementation)
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {case.dtype}
    assert_close(found, outputs(case, *inputs), TOLERANCE[case.dtype])
