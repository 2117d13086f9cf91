"""The attention kernels by their contract: equal to the dense oracle, forward and backward, over
windows, rules, positions, biases, masks, block sizes and dtypes."""

import functools
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsg_flax.kernels import (
    NOT_SELF,
    PAST,
    Biases,
    Queries,
    Rule,
    Source,
    Spec,
    Window,
    attend,
    attend_reference,
    merge_softmax_parts,
)

ROWS, HEADS, WIDTH = 2, 2, 3


class Case(NamedTuple):
    """What is static about a call: one program each, so there are few."""

    spec: Spec
    length: int
    sources: tuple[int, ...] = ()  # keys of each
    shared: int = 0
    window_biases: tuple[tuple[int, int], ...] = ()  # rows and heads of each, (0, 0) for none
    shared_bias: tuple[int, int] | None = None
    positions: bool = False
    heads: int = 1  # of masks and positions
    dtype: str = "float32"
    segments: int = 0  # how many, drawn for each token


NEAR = Rule(4, 0, itself=False)
CASES = [
    Case(Spec(4, (Window(0, 0, 4, 8, PAST, lead=4),)), 13, (17,), 3, heads=HEADS),
    Case(
        Spec(3, (Window(0, -3, 3, 9), Window(1, -1, 1, 4), Window(1, 4, 1, 2)), blocks_per_step=2),
        *(11, (11, 4), 2, ((2, 1), (0, 0), (1, 2)), (1, 2)),
    ),
    Case(Spec(4, (Window(0, -4, 4, 12, NOT_SELF), Window(0, 8, 4, 4, PAST))), 8, (8,)),
    Case(
        Spec(4, (Window(0, -4, 4, 8, Rule(4, 0)),), blocks_per_step=3), 14, (14,), 0, ((1, HEADS),)
    ),
    Case(Spec(4, (Window(0, -4, 4, 8, Rule(after=-1)),)), 9, (7,)),  # the first sees nothing
    Case(Spec(4, shared_rule=PAST), 13, shared=13),
    Case(Spec(5, shared_rule=Rule(3, 1), blocks_per_step=2), 12, (), 9, (), (2, 1)),
    Case(Spec(4, (Window(0, -4, 4, 8, NEAR),)), 12, (12,), positions=True, heads=HEADS),
    Case(
        Spec(4, (Window(0, -2, 2, 9, PAST), Window(1, 0, 3, 3)), NOT_SELF, blocks_per_step=2),
        *(10, (12, 9), 5, ((1, 1), (1, 1)), (2, 2), True),
    ),
    Case(Spec(4, (Window(0, -4, 4, 8, PAST),)), 13, (13,), 2, ((1, 2),), (1, 1), dtype="bfloat16"),
    Case(Spec(4, (Window(0, 0, 4, 4, NOT_SELF),)), 8, (8,), positions=True, dtype="float16"),
    Case(Spec(4, (Window(0, -4, 4, 12),), PAST, 2), 14, (14,), 3, segments=2),
    Case(Spec(4, (Window(0, -4, 4, 8, PAST),), one_segment=True), 9, (12,), 3, segments=3),
]


def arrays(case: Case, seed: int):
    """What gradients flow into, what they do not, and cotangents."""
    generator = np.random.default_rng(seed)

    def floats(*shape):
        return jnp.asarray(generator.standard_normal(shape), case.dtype)

    def integers(keys):
        mask = generator.random((ROWS, case.heads, keys)) < generator.choice([0.0, 0.5, 0.9, 1.0])
        place = generator.permuted(np.broadcast_to(np.arange(keys), mask.shape), axis=-1)
        texts = None
        if case.segments:
            texts = jnp.asarray(np.sort(generator.integers(case.segments + 1, size=mask.shape)))
        return jnp.asarray(mask), jnp.asarray(place) if case.positions else None, texts

    sizes = (*case.sources, *([case.shared] if case.shared else []))
    features = [(ROWS, HEADS, WIDTH, keys) for keys in sizes]
    windows = tuple(
        floats(rows, heads, case.spec.block, window.width) if rows else None
        for (rows, heads), window in zip(case.window_biases, case.spec.windows, strict=False)
    )
    shared = case.shared_bias and floats(*case.shared_bias, case.shared)
    query = (ROWS, HEADS, WIDTH, case.length)
    moving = (floats(*query), [(floats(*f), floats(*f)) for f in features], Biases(windows, shared))
    _, places, texts = integers(case.length)
    if case.spec.one_segment and texts is not None:
        texts = texts[..., np.arange(case.length) // case.spec.block * case.spec.block]
    fixed = ((places, texts), [integers(keys) for keys in sizes])
    of_normaliser = jnp.asarray(generator.standard_normal((ROWS, HEADS, case.length)), jnp.float32)
    return moving, fixed, (floats(*query), of_normaliser)


def call(function, case: Case, moving, fixed):
    query, pairs, biases = moving
    sources = [Source(*pair, *rest) for pair, rest in zip(pairs, fixed[1], strict=True)]
    shared = sources.pop() if case.shared else None
    return function(case.spec, Queries(query, *fixed[0]), tuple(sources), shared, biases)


@functools.partial(jax.jit, static_argnames="case")
def both(case: Case, moving, fixed, cotangents):
    """(context, normaliser), gradients: of the kernel, and of the oracle."""
    results = []
    for function in (attend, attend_reference):
        outputs, pullback = jax.vjp(lambda x, f=function: call(f, case, x, fixed), moving)
        results.append((outputs, pullback(cotangents)[0]))
    return results


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],
)
@hypothesis.given(st.sampled_from(CASES), st.integers(0, 2**16))
def test_kernel_equals_the_dense_oracle(case, seed):
    check(case, seed)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_each_case_equals_the_dense_oracle(case):
    check(case, seed=0)


def check(case: Case, seed: int):
    moving, fixed, cotangents = arrays(case, seed)
    (ours, gradients), (expected, expected_gradients) = both(case, moving, fixed, cotangents)
    tolerance = 1e-5 if case.dtype == "float32" else 0.06
    seen = np.asarray(expected[1]) > -1e30
    assert ours[0].dtype == case.dtype and ours[1].dtype == jnp.float32
    np.testing.assert_allclose(ours[1][seen], expected[1][seen], rtol=1e-5, atol=1e-5)
    assert (np.asarray(ours[1])[~seen] < -1e30).all()
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    pairs = ((ours[0], gradients), (expected[0], expected_gradients))
    for one, other in zip(*map(jax.tree.leaves, pairs), strict=True):
        assert one.dtype == other.dtype
        close(np.asarray(one, np.float32), np.asarray(other, np.float32), err_msg=f"{case}, {seed}")
    for x in (ours[0], gradients[0]):  # a query that sees nothing
        assert not np.asarray(x, np.float32).swapaxes(2, 3)[~seen].any()


def test_positions_undo_any_order():
    """Queries and keys shuffled, with their positions, see what they saw by place."""
    (query, (pair,), biases), (_, ((mask, *_),)), _ = arrays(CASES[5], seed=1)
    order, other = np.random.default_rng(0).permuted([np.arange(13)] * 2, axis=-1)
    spec, source = Spec(4, shared_rule=NEAR), Source(*pair, mask)
    by_place, _ = attend(spec, Queries(query), (), source, biases)
    positions = [jnp.broadcast_to(jnp.asarray(x), (ROWS, 1, 13)) for x in (order, other)]
    shuffled = Source(*(x[..., other] for x in source[:3]), positions[1])
    found, _ = attend(spec, Queries(query[..., order], positions[0]), (), shuffled)
    np.testing.assert_allclose(found, by_place[..., order], rtol=1e-5, atol=1e-5)


def test_parts_merge_to_the_whole():
    """Context, normaliser and gradients of two halves of the keys are those of all of them."""
    case = Case(Spec(4), 7, shared=10)
    (query, (pair,), _), (_, ((mask, *_),)), cotangents = arrays(case, seed=2)

    def whole(query, key, value):
        return attend(Spec(4), Queries(query), (), Source(key, value, mask))

    def halves(query, key, value):
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], 2, 5), -2, 0), Source(key, value, mask)
        )

        def merged(part):
            return merge_softmax_parts(*attend(Spec(4), Queries(query), (), part), "part")

        return jax.tree.map(lambda x: x[0], jax.vmap(merged, axis_name="part")(parts))

    results = []
    for function in (whole, halves):
        outputs, pullback = jax.vjp(function, query, *pair)
        results.append((outputs, pullback(cotangents)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_rule_by_place_is_a_constant():
    """It costs nothing but a mask of one block, whatever the length."""

    def temporaries(rule, length):
        x = jnp.ones((1, 1, 4, length))
        spec = Spec(8, (Window(0, -8, 8, 24, rule),))
        mask = jnp.ones((1, 1, length), bool)
        run = jax.jit(lambda x: attend(spec, Queries(x), (Source(x, x, mask),))[0])
        return run.lower(x).compile().memory_analysis().temp_size_in_bytes

    extra = [temporaries(Rule(5, 2), n) - temporaries(Rule(), n) for n in (512, 4096)]
    assert max(extra) <= 8 * 24 * 8


PLACES = jnp.zeros((1, 1, 4), int)


@pytest.mark.parametrize(
    ("window", "positions", "options", "says"),
    [
        (Window(0, 0, 2, 2), (None, None), {"implementation": "cuda"}, "'cuda' is unknown; choose"),
        (Window(0, 0, 1, 2, PAST), (None, None), {}, "moves by 1 keys per block=2 of queries"),
        (Window(0, 0, 2, 2, PAST), (PLACES, None), {}, "positions of both queries and keys"),
        (Window(0, 0, 2, 2, PAST), (None, PLACES), {}, "positions of both queries and keys"),
        (
            Window(0, 0, 2, 2),
            (None, None),
            {"biases": Biases((None, None))},
            r"len\(biases.windows\)=2, len\(spec.windows\)=1; give one",
        ),
        (
            Window(0, 0, 2, 2),
            (None, None),
            {"biases": Biases(shared=jnp.ones((1, 1, 4)))},
            "bias for shared keys is given, but there are no shared keys",
        ),
    ],
)
def test_what_the_contract_refuses(window, positions, options, says, unchecked):
    x = jnp.ones((1, 1, 3, 4))
    source = Source(x, x, jnp.ones((1, 1, 4), bool), positions[1])
    with pytest.raises(ValueError, match=says):
        attend(Spec(2, (window,)), Queries(x, positions[0]), (source,), **options)
    with pytest.raises(ValueError, match="segments are given for some of the queries"):
        attend(Spec(2, (Window(0, 0, 2, 2),)), Queries(x, segments=PLACES), (source,))
    with pytest.raises(ValueError, match=r"dropout_rate=0\.5 needs a random key; pass key="):
        attend(Spec(2, (Window(0, 0, 2, 2),), dropout_rate=0.5), Queries(x), (source,))
