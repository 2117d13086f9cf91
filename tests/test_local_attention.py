"""local_attention: the numbers of lucidrains' local-attention, the dense oracle's, and its
properties."""

from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import cases, load

import lsg_flax
from lsg_flax import sharding
from lsg_flax.adapters import AttentionFn
from lsg_flax.attention import Local, attend_windows, local_attention, local_attention_reference
from lsg_flax.patterns import Rotary, Runtime

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
WIDTH, WINDOW = 6, 4
attention = jax.jit(
    local_attention,
    static_argnames=(
        *("window_size", "causal", "look_backward", "look_forward", "exact_windowsize"),
        *("shared_qk", "use_rotary_pos_emb", "use_xpos", "dropout_rate"),
    ),
)


def arrays(seed: int, batch: int, length: int, heads=2, key_heads=2, dtype="float32"):
    """query, key, value and a cotangent."""
    generator = np.random.default_rng(seed)
    heads = (heads, key_heads, key_heads, heads)
    shapes = ((batch, length, count, WIDTH) for count in heads)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def with_gradients(attend, query, key, value, cotangent, *, shared=False):
    """The context and the gradients of query, key and value; of a shared one their sum."""
    if shared:
        context, pullback = jax.vjp(lambda x, value: attend(x, x, value), query, value)
    else:
        context, pullback = jax.vjp(attend, query, key, value)
    return context, *pullback(cotangent)


@pytest.mark.parametrize("name", cases("local_attention"))
def test_the_numbers_of_the_reference(name):
    case, inputs, outputs = load(name)
    options = {name: value for name, value in case["options"].items() if name != "dim"}
    shared = options.get("shared_qk", False)
    mask, bias = jnp.asarray(inputs["mask"]), inputs.get("attn_bias")
    bias = None if bias is None else jnp.asarray(bias)
    names = ("query", "key", "value", "cotangent")
    given = [jnp.asarray(inputs[name]).swapaxes(1, 2) for name in names]

    def attend(query, key, value):
        return local_attention(query, key, value, mask, attn_bias=bias, **options)

    context, *gradients = with_gradients(attend, *given, shared=shared)
    expected = [outputs[f"grad_{name}"].swapaxes(1, 2) for name in names[:3]]
    expected = [expected[0] + expected[1], expected[2]] if shared else expected
    theirs = outputs["context"].swapaxes(1, 2)
    np.testing.assert_allclose(context[mask], theirs[mask], **TOLERANCE)
    for ours, gradient in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, gradient, **TOLERANCE)


class Call(NamedTuple):
    """What hypothesis draws: the windows, and the arrays."""

    pattern: Local
    length: int
    key_heads: int
    biased: bool
    blocks_per_step: int | None
    seed: int


@st.composite
def calls(draw) -> Call:
    causal, shared = draw(st.booleans()), draw(st.booleans())
    forward = 0 if causal else draw(st.integers(0, 2))
    rotary = draw(st.sampled_from([None, Rotary(), Rotary(2.0)]))
    windows = (draw(st.sampled_from([1, 3, 4])), causal, draw(st.integers(0, 2)), forward)
    pattern = Local(
        *windows, draw(st.booleans()), shared, draw(st.sampled_from([None, 0.7])), rotary
    )
    heads = 2 if shared else draw(st.integers(1, 2))
    more = (draw(st.booleans()), draw(st.sampled_from([None, 1, 2])), draw(st.integers(0, 2**16)))
    return Call(pattern, draw(st.integers(1, 17)), heads, *more)


@pytest.mark.slow
@hypothesis.settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # shrinking would compile hundreds of programs
)
@hypothesis.given(calls())
def test_windows_equal_the_dense_oracle(call):
    pattern, length = call.pattern, call.length
    holes = np.random.default_rng(call.seed).random(length) < 0.7
    mask = jnp.asarray(np.stack([holes, np.zeros(length, bool), np.arange(length) < length * 0.6]))
    *inputs, cotangent = arrays(call.seed, len(mask), length, 2, call.key_heads)
    seen = pattern.windows_seen * pattern.window_size
    bias = jax.random.normal(jax.random.key(call.seed), (2, pattern.window_size, seen))
    bias = bias if call.biased else None
    run = Runtime(blocks_per_step=call.blocks_per_step)

    @jax.jit
    def both(*given):
        return [
            with_gradients(attend, *given, shared=pattern.shared_qk)
            for attend in (
                lambda *x: attend_windows(*x, mask, pattern=pattern, attn_bias=bias, run=run),
                lambda *x: local_attention_reference(*x, mask, pattern=pattern, attn_bias=bias),
            )
        ]

    for ours, expected in zip(*both(*inputs, cotangent), strict=True):
        np.testing.assert_allclose(ours, expected, err_msg=str(call), **TOLERANCE)


def test_a_bias_gets_its_gradient():
    query, key, value, cotangent = arrays(0, 2, 11)
    bias = jax.random.normal(jax.random.key(1), (2, WINDOW, 2 * WINDOW))
    pattern = Local(WINDOW, causal=True, look_forward=0, rotary=Rotary())
    ours, theirs = (
        jax.grad(
            lambda b, f=f: (f(query, key, value, pattern=pattern, attn_bias=b) * cotangent).sum()
        )
        for f in (attend_windows, local_attention_reference)
    )
    np.testing.assert_allclose(ours(bias), theirs(bias), **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"causal": True, "exact_windowsize": True}])
def test_what_is_padding_is_seen_by_nobody(options):
    query, key, value, _ = arrays(0, 2, 13)
    real = jnp.arange(13) < 10
    mask = jnp.stack([real, real])
    other = [jnp.where(real[None, :, None, None], x, 1e4) for x in (query, key, value)]
    options = {"window_size": WINDOW} | options
    ours, theirs = (attention(*x, mask, **options) for x in ((query, key, value), other))
    np.testing.assert_array_equal(ours[:, :10], theirs[:, :10])
    alone = attention(*(x[:, :10] for x in (query, key, value)), **options)
    np.testing.assert_allclose(ours[:, :10], alone, **TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shared", [False, True])
def test_half_precision_is_finite_and_blind_rows_pass_nothing(dtype, shared):
    query, key, value, cotangent = arrays(0, 2, 13, dtype=dtype)
    mask = jnp.asarray(np.stack([np.arange(13) < 5, np.zeros(13, bool)]))

    def attend(*x):
        return local_attention(*x, mask, window_size=WINDOW, use_xpos=True, shared_qk=shared)

    results = with_gradients(attend, query, key, value, cotangent, shared=shared)
    for result in results:
        assert result.dtype == dtype and jnp.isfinite(result).all()
        assert not result[1].any()


@pytest.mark.parametrize("options", [{}, {"causal": True, "look_backward": 2, "use_xpos": True}])
@pytest.mark.parametrize("length", [64, 59])
def test_shards_exchange_windows(options, length):
    inputs, options = arrays(3, 2, length), {"window_size": WINDOW} | options
    mask = jnp.asarray(np.random.default_rng(1).random((2, length)) < 0.8)

    def run(*given):
        return with_gradients(lambda *x: local_attention(*x, mask, **options), *given)

    expected = jax.jit(run)(*inputs)
    mesh = sharding.make_mesh(sequence=4, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(*inputs).compile()
        for ours, theirs in zip(program(*inputs), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    assert "collective-permute" in program.as_text()


def test_dropout_repeats_and_keeps_the_mean():
    query, _, value, _ = arrays(0, 1, 64)
    options = {"window_size": 16, "causal": True, "shared_qk": True}
    value = jnp.ones_like(value)
    drawn = [
        attention(query, query, value, dropout_rate=0.3, dropout_key=jax.random.key(i), **options)
        for i in (*range(40), 0)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[-1])
    assert abs(np.mean(drawn[:40]) - 1) < 0.02
    assert {0.0} < {float(x) for x in np.unique(np.stack(drawn)[:, 0, 0])}  # alone: dropped, or not


def test_flax_layers_take_windows():
    from flax import linen as nn

    pattern = Local(WINDOW, causal=True, look_forward=0, rotary=Rotary())
    layer = nn.MultiHeadDotProductAttention(
        num_heads=2, attention_fn=AttentionFn(pattern, causal=True)
    )
    x = jax.random.normal(jax.random.key(0), (2, 11, 12))
    variables = layer.init(jax.random.key(1), x)
    seen = jax.grad(lambda x: layer.apply(variables, x)[0, 3].sum())(x)
    assert seen[0, :4].any() and not seen[0, 4:].any() and not seen[1].any()
    with pytest.raises(ValueError, match="causal=False of the layer, but the windows are"):
        AttentionFn(pattern)(x[:, :, None], x[:, :, None], x[:, :, None])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "forward": ({"causal": True, "look_forward": 1}, "look_forward=1 with causal=True"),
    "window": ({"window_size": 0}, "window_size=0 must be at least 1"),
    "backward": ({"look_backward": -1}, "look_backward=-1 must be a number of windows"),
    "xpos": ({"use_xpos": True, "use_rotary_pos_emb": False}, "set use_rotary_pos_emb=True"),
    "base": ({"xpos_scale_base": 3.0}, "xpos_scale_base=3.0 is for use_xpos=True"),
    "no base": ({"window_size": 1, "use_xpos": True}, "xpos_scale_base=0 must be positive"),
    "bias": ({"attn_bias": jnp.ones((2, 4, 8))}, r"\(2, 4, 12\), got \(2, 4, 8\)"),
    "shared": ({"shared_qk": True}, "one array as query and key"),
    "rate": ({"dropout_rate": 0.1}, "needs a dropout_key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit_are_refused(name):
    query, key, value, _ = arrays(0, 1, 9)
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        lsg_flax.local_attention(query, key, value, **{"window_size": WINDOW} | options)


def test_widths_and_shared_arrays():
    query, key, value, _ = arrays(0, 1, 9)
    odd = [x[..., :5] for x in (query, key, value)]
    with pytest.raises(ValueError, match="odd width 5"):
        local_attention(*odd, window_size=WINDOW)
    assert attention(*odd, window_size=WINDOW, use_rotary_pos_emb=False).shape == odd[0].shape
    shared = {"window_size": WINDOW, "shared_qk": True}
    assert jnp.isfinite(attention(query, jnp.array(query), value, **shared)).all()
    assert jnp.isnan(attention(query, key, value, **shared)).all()  # only the run can tell
