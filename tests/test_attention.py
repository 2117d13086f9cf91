"""lsg_attention by its properties: equal to the dense oracle, blind to padding and to the future,
finite in half precision."""

import functools
import re
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from golden_data import GOLDEN

import lsg_flax
from lsg_flax.attention import full_attention, lsg_attention, lsg_attention_reference
from lsg_flax.patterns import sparsity
from lsg_flax.patterns.config import SPARSITY_TYPES, LSGConfig

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# (block_size, sparse_block_size, sparsity_factor)
GEOMETRIES = [
    (4, 4, 2),
    (4, 4, 4),
    (4, 8, 2),
    (4, 4, 1),
    (6, 6, 3),
    (8, 5, 2),
    (8, 8, 8),
    (8, 4, 4),
    (4, 0, 2),
    (4, 4, 0),
]
SMALL = {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2, "num_global_tokens": 2}

attention = jax.jit(
    lsg_attention, static_argnames=("config", "causal", "global_tokens", "dropout_rate")
)


class Call(NamedTuple):
    """The static part of a call, drawn by hypothesis, and the seed of its arrays."""

    config: LSGConfig
    length: int
    heads: int
    key_heads: int
    options: Any  # causal, global_tokens, blocks_per_step
    seed: int


def attempt(**fields) -> LSGConfig | None:
    try:
        return LSGConfig(**fields)
    except ValueError:
        return None


CONFIGS = [
    config
    for kind in SPARSITY_TYPES
    for block, sparse, factor in GEOMETRIES
    for globals_ in (1, 3)
    if (
        config := attempt(
            block_size=block,
            sparse_block_size=sparse,
            sparsity_factor=factor,
            sparsity_type=kind,
            num_global_tokens=globals_,
        )
    )
]


@st.composite
def calls(draw) -> Call:
    config = draw(st.sampled_from(CONFIGS))
    blocks = draw(st.integers(0, 5))
    heads = draw(st.sampled_from([(1, 1), (3, 3), (4, 2), (2, 1)]))
    return Call(
        config,
        max(1, blocks * config.block_size + draw(st.integers(0, config.block_size - 1))),
        *heads,
        {
            "causal": draw(st.booleans()),
            "global_tokens": draw(st.sampled_from(["prepended", "first_token", "none"])),
            "blocks_per_step": draw(st.sampled_from([None, 1, 2, 3])),
        },
        draw(st.integers(0, 2**16)),
    )


def arrays(seed: int, batch: int, length: int, heads: int, key_heads: int, width: int = 3):
    """query, key, value and a cotangent."""
    generator = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(generator.standard_normal((batch, length, n, width)), jnp.float32)
        for n in (heads, key_heads, key_heads, heads)
    )


def masks(seed: int, length: int):
    """Random holes, one row with nothing to see, one whose end is padding."""
    holes = np.random.default_rng(seed).random(length) < 0.7
    return jnp.asarray(np.stack([holes, np.zeros(length, bool), np.arange(length) < length * 0.6]))


@pytest.mark.slow
@hypothesis.settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # shrinking would compile hundreds of programs
)
@hypothesis.given(calls())
def test_blocked_equals_the_dense_oracle(call):
    options = dict(call.options)
    prepended = call.config.num_global_tokens * (options["global_tokens"] == "prepended")
    length = call.length + prepended
    mask = masks(call.seed, length)
    inputs = arrays(call.seed, len(mask), length, call.heads, call.key_heads)

    @jax.jit
    def both(query, key, value, cotangent):
        steps = options.pop("blocks_per_step")
        results = []
        for attend in (
            functools.partial(lsg_attention, blocks_per_step=steps),
            lsg_attention_reference,
        ):
            context, pullback = jax.vjp(
                lambda *x, f=attend: f(*x, mask, config=call.config, **options), query, key, value
            )
            results.append((context, *pullback(cotangent)))
        return results

    names = ("context", "query gradient", "key gradient", "value gradient")
    for name, ours, expected in zip(names, *both(*inputs), strict=True):
        np.testing.assert_allclose(ours, expected, err_msg=f"{name}, {call}", **TOLERANCE)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_padding_content_never_leaks(kind):
    config = LSGConfig(**SMALL, sparsity_type=kind)
    globals_, length = config.num_global_tokens, 21
    real = np.ones((2, globals_ + length), bool)
    real[0, globals_ + 7 :] = False  # blocks of nothing but padding
    real[1, globals_ + 1 :: 3] = False
    mask = jnp.asarray(real)
    attend = functools.partial(attention, config=config)
    query, key, value, other = arrays(0, 2, globals_ + length, 2, 2)
    for causal in (False, True):
        before = attend(query, key, value, mask, causal=causal)
        changed = [jnp.where(mask[..., None, None], x, 50 * other) for x in (query, key, value)]
        after = attend(*changed, mask, causal=causal)
        np.testing.assert_array_equal(np.asarray(before)[real], np.asarray(after)[real])
        assert not np.array_equal(np.asarray(before)[~real], np.asarray(after)[~real])


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_padding_on_the_left_never_leaks(kind):
    config = LSGConfig(**SMALL, sparsity_type=kind)
    real = np.ones((1, 22), bool)
    real[0, 2:7] = False
    mask = jnp.asarray(real)
    query, key, value, other = arrays(12, 1, 22, 2, 2)
    before = attention(query, key, value, mask, config=config)
    changed = [jnp.where(mask[..., None, None], x, other) for x in (query, key, value)]
    after = attention(*changed, mask, config=config)
    np.testing.assert_array_equal(np.asarray(before)[real], np.asarray(after)[real])


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_padding_to_whole_blocks_equals_padding_by_mask(kind):
    """The same tokens in a longer batch: ragged batches do not change results."""
    config = LSGConfig(**SMALL, sparsity_type=kind)
    globals_, length = config.num_global_tokens, 13
    inputs = arrays(1, 1, globals_ + length + 10, 2, 2)[:3]
    attend = functools.partial(attention, config=config)
    mask = jnp.asarray(np.arange(globals_ + length + 10) < globals_ + length)[None]
    longer = attend(*inputs, mask)[:, : globals_ + length]
    alone = attend(*(x[:, : globals_ + length] for x in inputs))
    np.testing.assert_allclose(longer, alone, **TOLERANCE)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_padding_content_never_leaks_through_a_model(kind):
    model, params = lsg_flax.from_pretrained(GOLDEN / "bert_masked_lm", sparsity_type=kind)
    apply = jax.jit(lambda ids, mask: model.apply({"params": params}, ids, mask).logits)
    ids = np.random.default_rng(0).integers(5, 31, (2, 43))
    real = np.ones(ids.shape, bool)
    real[0, 19:] = False
    real[1, 3:40:4] = False
    before = np.asarray(apply(ids, real))
    after = np.asarray(apply(np.where(real, ids, 0), real))
    np.testing.assert_array_equal(before[real], after[real])
    assert not np.array_equal(before[~real], after[~real])


@pytest.mark.parametrize("length", [8, 18], ids=["short", "long"])
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_causal_gradient_to_the_future_is_exactly_zero(kind, length):
    config = LSGConfig(**SMALL, sparsity_type=kind)
    globals_ = config.num_global_tokens

    @jax.jit
    def jacobian(x):  # [tokens out, inputs in]
        def out(x):
            context = lsg_attention(*x, config=config, causal=True)
            return (context * jnp.arange(1.0, 4.0)).sum((0, 2, 3))

        return jnp.abs(jax.jacrev(out)(x)).sum((1, 2, 4, 5))

    with jax.numpy_rank_promotion("allow"):  # jacrev of a stack
        size = jacobian(jnp.stack(arrays(2, 1, globals_ + length, 2, 2)[:3]))
    tokens = np.asarray(size)[globals_:, globals_:]
    assert (np.triu(tokens, 1) == 0).all()
    assert (np.diag(tokens) > 0).all()
    assert (np.tril(tokens, -1).sum(axis=1)[1:] > 0).all()


@pytest.mark.parametrize("kind", ["norm", "bos_pooling"])
@pytest.mark.parametrize("causal", [False, True])
def test_up_to_two_blocks_is_full_attention(kind, causal):
    config = LSGConfig(**SMALL, sparsity_type=kind)
    globals_ = config.num_global_tokens
    for length in (1, 5, 2 * config.block_size):
        query, key, value, _ = arrays(length, 3, globals_ + length, 2, 2)
        mask = masks(3, globals_ + length)
        ours = attention(query, key, value, mask, config=config, causal=causal)
        seen = np.broadcast_to(np.asarray(mask)[:, None, None], (3, 1, *(globals_ + length,) * 2))
        if causal:
            ones = np.ones((globals_ + length,) * 2, bool)
            ones[:, globals_:] = np.tri(*ones[:, globals_:].shape, -globals_, dtype=bool)
            seen = seen & ones
        scores = np.einsum("btnh,bsnh->bnts", query, key) / 3**0.5
        weights = np.where(seen, np.exp(scores), 0.0)
        weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
        expected = np.einsum("bnts,bsnh->btnh", weights, value)
        np.testing.assert_allclose(ours[:, globals_:], expected[:, globals_:], **TOLERANCE)
    beyond = arrays(9, 1, globals_ + 2 * config.block_size + 1, 2, 2)[:3]
    full = full_attention(*beyond, causal=causal)
    sparse = attention(*beyond, config=config, causal=causal)
    assert np.abs(full - sparse)[:, globals_:].max() > 1e-3  # one token more is another pattern


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_finite_with_fully_masked_rows(kind, dtype):
    config = LSGConfig(**SMALL, sparsity_type=kind)
    length = config.num_global_tokens + 19
    mask = jnp.stack([jnp.zeros(length, bool), jnp.ones(length, bool)])
    inputs = arrays(4, 2, length, 2, 2)

    @jax.jit
    def run(query, key, value, cotangent):
        context, pullback = jax.vjp(
            lambda *x: lsg_attention(*x, mask, config=config), query, key, value
        )
        return context, pullback(cotangent)

    context, gradients = run(*(20 * x.astype(dtype) for x in inputs))
    assert context.dtype == dtype and all(g.dtype == dtype for g in gradients)
    for x in (context, *gradients):
        assert bool(jnp.isfinite(x).all())
        assert not np.asarray(x[0], np.float32).any()  # nothing seen: zeros, and no gradient
        assert np.asarray(x[1], np.float32).any()


def test_half_precision_is_near_float32():
    config = LSGConfig(**SMALL, sparsity_type="pooling")
    inputs = arrays(5, 1, config.num_global_tokens + 19, 2, 2)[:3]
    rounded = tuple(x.astype(jnp.bfloat16) for x in inputs)
    half = attention(*rounded, config=config)
    exact = attention(*(x.astype(jnp.float32) for x in rounded), config=config)
    np.testing.assert_allclose(np.asarray(half, np.float32), exact, atol=0.02)


def test_dropout_drops_at_the_rate_and_repeats():
    config = LSGConfig(**SMALL)
    query, key, value, _ = arrays(6, 1, config.num_global_tokens + 18, 1, 1)
    attend = functools.partial(attention, config=config)

    @jax.jit
    def many(keys, *inputs):
        one = functools.partial(attend, *inputs, dropout_rate=0.5)
        return jax.vmap(lambda k: one(dropout_key=k))(keys)

    keys = jax.random.split(jax.random.key(0), 2048)
    samples = np.asarray(many(keys, query, key, value))
    np.testing.assert_array_equal(samples, many(keys, query, key, value))
    assert (np.abs(samples[0] - samples[1]).max(axis=-1) > 1e-6).mean() > 0.9
    error = (samples.mean(axis=0) - attend(query, key, value)) / (
        samples.std(axis=0) / len(keys) ** 0.5
    )
    assert np.abs(error).max() < 5.0  # standard errors, over 60 numbers
    short = many(keys, query[:, :6], key[:, :6], jnp.ones_like(value[:, :6]))
    np.testing.assert_allclose(short.mean(), 1.0, atol=0.01)


def test_dropout_gradient_is_that_of_the_dropped_weights():
    """Finite differences along one direction, with one key: the backward pass draws the same."""
    config = LSGConfig(**SMALL)
    inputs = arrays(7, 1, config.num_global_tokens + 18, 2, 2)
    weights = inputs[3]

    @jax.jit
    def loss(*x):
        context = lsg_attention(*x, config=config, dropout_rate=0.3, dropout_key=jax.random.key(1))
        return (context * weights).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs[:3])
    for i, gradient in enumerate(gradients):
        direction = arrays(8 + i, *inputs[i].shape[:3], 1)[0]
        moved = [
            loss(*(x + sign * 1e-3 * direction if j == i else x for j, x in enumerate(inputs[:3])))
            for sign in (1, -1)
        ]
        slope = (moved[0] - moved[1]) / 2e-3
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("rate", "key"), [(0.5, None), (1.0, 0), (-0.1, 0)])
def test_dropout_needs_a_rate_below_one_and_a_key(rate, key):
    x = arrays(0, 1, 6, 1, 1)[:3]
    key = None if key is None else jax.random.key(key)
    with pytest.raises(ValueError, match=f"dropout_rate={rate}"):
        lsg_attention(*x, config=LSGConfig(**SMALL), dropout_rate=rate, dropout_key=key)


def test_fewer_key_heads_are_shared_by_neighbouring_query_heads():
    config = LSGConfig(**SMALL, sparsity_type="pooling")
    query, key, value, _ = arrays(9, 1, 20, 4, 2)
    shared = attention(query, key, value, config=config)
    repeated = (jnp.stack([x[:, :, i // 2] for i in range(4)], axis=2) for x in (key, value))
    np.testing.assert_allclose(shared, attention(query, *repeated, config=config), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_standalone_factor_two_has_a_sparse_part(causal):
    """Silently empty in the reference's standalone layers; here the representatives count."""
    inputs = arrays(10, 1, 40, 2, 2)[:3]
    results = [
        attention(
            *inputs,
            config=LSGConfig(**SMALL, sparsity_type=kind),
            causal=causal,
            global_tokens="first_token",
        )
        for kind in ("stride", "none")
    ]
    changed = np.abs(results[0] - results[1]).max(axis=(0, 2, 3)) > 1e-4
    first = 3 * SMALL["block_size"] if causal else 1  # block 3 is the first with left neighbours
    assert changed[first:].all() and not changed[: first - causal * SMALL["block_size"]].any()


def test_lsh_draws_from_its_key_and_repeats_without_one():
    config = LSGConfig(**SMALL, sparsity_type="lsh")
    inputs = arrays(11, 1, 40, 2, 2)[:3]
    attend = functools.partial(attention, *inputs, config=config)
    np.testing.assert_array_equal(attend(), attend())
    keyed = [attend(lsh_key=jax.random.key(i)) for i in (1, 2)]
    assert np.abs(keyed[0] - keyed[1]).max() > 1e-3


@pytest.fixture
def unchecked():
    """Without the annotation checks of conftest.py, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


X = (1, 6, 2, 3)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((1, 6, 3), X, X), ("(1, 6, 3)", "(1, 6, 2, 3)")),
        ((X, X, (1, 5, 2, 3)), ("(1, 6, 2, 3)", "(1, 5, 2, 3)")),
        ((X, (1, 5, 2, 3), (1, 5, 2, 3)), ("(1, 6, 2, 3)", "(1, 5, 2, 3)")),
        ((X, (2, 6, 2, 3), (2, 6, 2, 3)), ("(1, 6, 2, 3)", "(2, 6, 2, 3)")),
        ((X, (1, 6, 2, 4), (1, 6, 2, 4)), ("(1, 6, 2, 3)", "(1, 6, 2, 4)")),
        (((1, 6, 4, 3), (1, 6, 3, 3), (1, 6, 3, 3)), ("(1, 6, 4, 3)", "(1, 6, 3, 3)")),
    ],
)
@pytest.mark.parametrize("attend", [lsg_attention, lsg_attention_reference])
def test_shapes_that_do_not_fit_are_both_named(attend, shapes, named, unchecked):
    with pytest.raises(ValueError) as error:
        attend(*(jnp.zeros(shape) for shape in shapes), config=LSGConfig(**SMALL))
    assert all(shape in str(error.value) for shape in named), error.value


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, bool, jnp.complex64])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_real_number_is_refused(place, dtype, unchecked):
    inputs = arrays(0, 1, 6, 1, 1)[:3]
    inputs = (*inputs[:place], inputs[place].astype(dtype), *inputs[place + 1 :])
    name = ("query", "key", "value")[place]
    for attend in (functools.partial(lsg_attention, config=LSGConfig(**SMALL)), full_attention):
        with pytest.raises(ValueError, match=f"{name} has dtype {jnp.dtype(dtype)}, .* float32"):
            attend(*inputs)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_arrays_without_entries_are_refused(axis, unchecked):
    empty = jnp.zeros([0 if place == axis else 4 for place in range(4)])
    for attend in (functools.partial(lsg_attention, config=LSGConfig(**SMALL)), full_attention):
        with pytest.raises(
            ValueError, match=f"at least one entry, .*{re.escape(str(empty.shape))}"
        ):
            attend(empty, empty, empty)


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        (jnp.ones((1, 6), jnp.int32), "int32 (1, 6)"),
        (jnp.ones((1, 6)), "float32 (1, 6)"),
        (jnp.ones((1, 5), bool), "bool (1, 5)"),
        (jnp.ones((2, 6), bool), "bool (2, 6)"),
        (jnp.ones(6, bool), "bool (6,)"),
        (jnp.ones((1, 6, 6), bool), "bool (1, 6, 6)"),
    ],
)
def test_a_mask_of_another_dtype_or_shape_is_refused(mask, given, unchecked):
    inputs = arrays(0, 1, 6, 1, 1)[:3]
    with pytest.raises(ValueError, match=r"mask must be boolean of shape \(1, 6\)") as error:
        lsg_attention(*inputs, mask, config=LSGConfig(**SMALL))
    assert f"got {given}" in str(error.value) and "mask.astype(bool)" in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"global_tokens": "first"}, "global_tokens='first' is unknown; choose 'prepended', 'fir"),
        ({"implementation": "cuda"}, "implementation='cuda' is unknown; choose"),
        ({"config": LSGConfig(num_global_tokens=7)}, "num_global_tokens=7 .* only 6 positions"),
        ({"config": LSGConfig(block_size=2, adaptive=False)}, "length 5 .* adaptive=False"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says, unchecked):
    with pytest.raises(ValueError, match=says):
        lsg_attention(*arrays(0, 1, 6, 1, 1)[:3], **{"config": LSGConfig(**SMALL)} | options)


@functools.partial(jax.jit, static_argnames=("config", "device"))
def chosen_and_gradients(arrays, mask, cotangents, *, config, device):
    assert sparsity.device_kind() == device

    def chosen(key, value):
        *pair, real = sparsity.select(key, value, mask, config=config, bos_query=key[:, :, 0])
        return pair, real

    pair, pullback, real = jax.vjp(chosen, *arrays, has_aux=True)
    return pair, real, pullback(list(cotangents))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", sparsity.GROUPED)
def test_a_selection_by_groups_is_that_by_order(kind, dtype, monkeypatch):
    """The same numbers in the same order, with equal norms, masked tokens and whole chunks of
    them, and the same gradients: what accelerators compute instead of sorting and gathering."""
    config = LSGConfig(block_size=8, sparse_block_size=4, sparsity_factor=2, sparsity_type=kind)
    generator = np.random.default_rng(0)
    arrays = generator.integers(-1, 2, (2, 2, 3, 48, 2)).astype(dtype)  # few norms: many are equal
    cotangents = generator.normal(size=(2, 2, 3, 24, 2)).astype(dtype)
    mask = generator.random((2, 48)) < 0.7
    mask[0, 8:16] = False
    results = []
    for device in ("cpu", "tpu v5 lite"):
        monkeypatch.setattr(sparsity, "device_kind", lambda device=device: device)
        results.append(chosen_and_gradients(arrays, mask, cotangents, config=config, device=device))
    tolerance = 1e-3 if (kind, dtype) == ("pooling", "float16") else 1e-7  # of a mean
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_on_cpu_one_selection_sorts(kind):
    """Norms, where it is faster; the others neither sort nor gather nor scatter, with gradients."""

    def both(*arrays):
        config = LSGConfig(**SMALL, sparsity_type=kind)
        context, pullback = jax.vjp(functools.partial(lsg_attention, config=config), *arrays)
        return pullback(context)

    text = jax.jit(both).lower(*[jnp.ones((1, 18, 2, 4))] * 3).as_text()
    found = set(re.findall(r"top_k|stablehlo\.(?:sort|gather|scatter)", text))
    assert found == (
        {"top_k", "stablehlo.gather", "stablehlo.scatter"} if kind == "norm" else set()
    )


@pytest.mark.parametrize("kind", ["explicit", "shard_map"])
def test_arrays_on_a_mesh_of_yours(kind):
    """Arrays on the axes that `jax.make_mesh` makes by default, and attention inside of a
    `jax.shard_map`, give the context and the gradients of one device."""
    options = {"config": LSGConfig(**SMALL), "dropout_rate": 0.1}
    inputs = jax.random.normal(jax.random.key(0), (3, 2, 26, 4, 8))
    key = jax.random.key(1)

    def outputs(attend, inputs):
        def run(inputs):
            context = attend(*inputs)
            return context.sum(), context

        (_, context), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(inputs)
        return context, gradients

    if kind == "explicit":
        attend = functools.partial(lsg_attention, dropout_key=key, **options)
        axes = (jax.sharding.AxisType.Explicit,) * 2
    else:
        attend = functools.partial(lsg_attention, config=options["config"])
        axes = (jax.sharding.AxisType.Auto,) * 2
    wanted = outputs(attend, inputs)
    mesh = jax.make_mesh((2, 4), ("rows", "heads"), axis_types=axes)
    rows_and_heads = jax.P("rows", None, "heads")
    if kind == "shard_map":
        attend = jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(rows_and_heads,) * 3,
            out_specs=rows_and_heads,
            check_vma=False,
        )
    placed = jax.device_put(inputs, jax.NamedSharding(mesh, jax.P(None, *rows_and_heads)))
    context, gradients = outputs(attend, placed)
    assert tuple(context.sharding.spec[:3]) == ("rows", None, "heads")
    np.testing.assert_allclose(context, wanted[0], **TOLERANCE)
    np.testing.assert_allclose(gradients, wanted[1], **TOLERANCE)


def test_second_derivatives_are_those_of_the_dense_oracle():
    config = LSGConfig(**SMALL)
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 26, 2, 4))

    def curvature(attend):
        def loss(factors):
            context = attend(query * factors[0], key * factors[1], value, config=config)
            return (context * jnp.cos(jnp.arange(4.0))[None, None, None]).sum()

        return jax.jit(jax.hessian(loss))(jnp.array([1.0, 0.5]))

    np.testing.assert_allclose(
        curvature(lsg_attention), curvature(lsg_attention_reference), rtol=1e-4, atol=1e-4
    )
