"""Reformer's two attentions: LSH attention, and local attention in a ring."""

from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import cases, load

from lsg_flax import patterns
from lsg_flax.kernels import Source
from lsg_flax.patterns import LSH, Local, Runtime, attend_by_buckets_reference, bucket_of

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
WIDTH, CHUNK = 6, 4


def arrays(seed: int, batch: int, length: int, dtype="float32"):
    """query-key, value and a cotangent."""
    shape = (3, batch, 2, WIDTH, length)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def masks(seed: int, length: int):
    """One with holes, one of padding alone, one with padding behind."""
    holes = np.random.default_rng(seed).random(length) < 0.7
    rows = (holes, np.zeros(length, bool), np.arange(length) < length * 0.6)
    return jnp.asarray(np.stack(rows))[:, None]


def golden(name: str, dtype: str):
    """What the recorded case has, features first: ours (context, gradients of the query and of the
    value) and theirs; and which tokens are real."""
    case, inputs, outputs = load(f"reformer_attention_{name}_{dtype}")
    config, kind = case["config"], "lsh" if case["lsh"] else "local"
    sides = (config[f"{kind}_num_chunks_{side}"] for side in ("before", "after"))
    head = (config[f"{kind}_attn_chunk_length"], config["is_decoder"], *sides)
    names = ("query", "key", "value", "cotangent")
    query, key, value, cotangent = (jnp.asarray(inputs[n]).swapaxes(2, 3) for n in names)
    mask = jnp.asarray(inputs.get("mask", np.ones((len(query), query.shape[3]), bool)))[:, None]
    run = Runtime(lsh=(jnp.asarray(inputs["rotations"]),) if case["lsh"] else None)

    def attend(query, key, value):
        if not case["lsh"]:
            pattern = Local(*head, wraps=True)
            return patterns.attention(pattern, query, Source(key, value, mask), run)
        buckets = config["num_buckets"]
        buckets = buckets if isinstance(buckets, int) else tuple(buckets)
        pattern = LSH(*head, buckets, config["num_hashes"])
        return patterns.attention(pattern, query, Source(query, value, mask), run)

    context, pullback = jax.vjp(attend, query, key, value)
    names = ("context", "grad_query", "grad_key", "grad_value")
    ours, theirs = (context, *pullback(cotangent)), [outputs[n].swapaxes(2, 3) for n in names]
    real = np.broadcast_to(np.asarray(mask)[:, :, None], context.shape)
    return [x[real] for x in ours], [x[real] for x in theirs]


CASES = [name.removeprefix("reformer_attention_") for name in cases("reformer_attention")]
EXACT = [name.removesuffix("_float64") for name in CASES if name.endswith("float64")]


@pytest.mark.parametrize("name", [n for n in CASES if n.removesuffix("_float32") not in EXACT])
def test_the_numbers_of_the_reference(name):
    for ours, theirs in zip(*golden(*name.rsplit("_", 1)), strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("name", EXACT)
def test_the_numbers_where_float32_has_few_digits(name):
    """Ours in float32 are the reference's in float64; its own in float32 are not."""
    (ours, rough), exact = golden(name, "float32"), golden(name, "float64")[1]
    for x, float32, float64 in zip(ours, rough, exact, strict=True):
        np.testing.assert_allclose(x, float64, **TOLERANCE)
        assert np.abs(x - float32).max() <= 3 * np.abs(float32 - float64).max()
    assert np.abs(rough[0] - exact[0]).max() > 1e-4


class Call(NamedTuple):
    """What hypothesis draws."""

    pattern: LSH
    length: int
    blocks_per_step: int | None
    seed: int


@st.composite
def calls(draw) -> Call:
    buckets = draw(st.sampled_from([2, 6, (2, 4)]))
    sides = (draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    pattern = LSH(
        draw(st.sampled_from([1, 4])), draw(st.booleans()), *sides, buckets, draw(st.integers(1, 3))
    )
    blocks = draw(st.sampled_from([None, 2]))
    return Call(pattern, draw(st.integers(1, 19)), blocks, draw(st.integers(0, 2**16)))


@pytest.mark.slow
@hypothesis.settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # shrinking would compile hundreds of programs
)
@hypothesis.given(calls())
def test_buckets_equal_the_dense_oracle(call):
    pattern, mask = call.pattern, masks(call.seed, call.length)
    query_key, value, cotangent = arrays(call.seed, len(mask), call.length)
    run = Runtime(lsh=jax.random.key(call.seed), blocks_per_step=call.blocks_per_step)

    def ours(query_key, value):
        return patterns.attention(pattern, query_key, Source(query_key, value, mask), run)

    def theirs(query_key, value):
        buckets = bucket_of(pattern, query_key, mask, run)
        source = Source(query_key, value, mask)
        return attend_by_buckets_reference(pattern, query_key, source, buckets)

    @jax.jit
    def both(query_key, value, cotangent):
        results = [jax.vjp(attend, query_key, value) for attend in (ours, theirs)]
        return [(context, *pullback(cotangent)) for context, pullback in results]

    for ours, theirs in zip(*both(query_key, value, cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, err_msg=str(call), **TOLERANCE)


ATTENTIONS = {
    "lsh": LSH(CHUNK, True, 1, 0, (2, 4), 2),
    "local": Local(CHUNK, True, look_forward=0, wraps=True),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_half_precision_is_finite_and_blind_rows_pass_nothing(dtype, name):
    *given, cotangent = arrays(0, 3, 13, dtype)

    def attend(query_key, value):
        source = Source(query_key, value, masks(0, 13))
        return patterns.attention(ATTENTIONS[name], query_key, source, Runtime())

    context, pullback = jax.vjp(attend, *given)
    for result in (context, *pullback(cotangent)):
        assert result.dtype == dtype and jnp.isfinite(result).all()
        assert not result[1].any()


REFUSED = {
    "odd": (lambda: LSH(4, num_buckets=7), "num_buckets=7 must be an even number"),
    "factor": (lambda: LSH(4, num_buckets=(2, 3)), r"num_buckets=\(2, 3\) must be an even"),
    "none": (lambda: LSH(4, num_buckets=()), r"num_buckets=\(\) must be an even"),
    "hashes": (lambda: LSH(4, num_hashes=0), "num_hashes=0 must be at least 1"),
    "chunk": (lambda: LSH(0), "chunk_length=0 must be at least 1"),
    "before": (lambda: LSH(4, chunks_before=-1), "chunks_before=-1 must be a number of windows"),
    "ring": (lambda: Local(4, shared_qk=True, wraps=True), "wraps=True is Reformer's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_patterns_that_there_are_not_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Runtime(lsh=(jnp.ones((2, WIDTH, 1, 3)),)), r"= \(2, 6, 2, 3\), got \[\(2, 6, 1, 3\)\]"),
        (Runtime(sequence_axis="sequence"), "cannot be sharded over a sequence axis"),
    ],
)
def test_runs_that_do_not_fit_are_refused(run, message):
    query_key, value, _ = arrays(0, 1, 9)
    source = Source(query_key, value, jnp.ones((1, 1, 9), bool))
    with pytest.raises(ValueError, match=message):
        patterns.attention(ATTENTIONS["lsh"], query_key, source, run)
