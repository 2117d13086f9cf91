"""The fused attention kernels for GPUs, interpreted: equal to the dense oracle, forward and
backward, over lengths, masks, globals, selections, geometries and dtypes, and in dropout to XLA's
definition; what they refuse. What they compile to: test_plan_gpu.py.

Interpreting is slow, so arrays are small and cases few.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import CAUSAL, FIRST, NONE, arrays, assert_close, assert_equal, outputs

from lsg_flax.attention import (
    full_attention,
    local_attention,
    lsg_attention,
)
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
    device,
    gpu,
    gpu_backward,
)
from lsg_flax.patterns.config import LSGConfig
from lsg_flax.sharding import make_mesh


@pytest.fixture(scope="module", autouse=True)
def on_gpu():
    """The kernels as on a GPU, but interpreted; so few programs that these share the queries of
    shared keys unevenly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "device_kind", lambda: "nvidia h100 80gb hbm3")
        patch.setattr(gpu, "attend", functools.partial(gpu.attend, interpret=True))
        patch.setattr(gpu_backward, "PROGRAMS", 13)
        yield


def case(length=200, width=32, **options):
    return kernel_cases.case(length, width=width, **options)


CASES = [
    case(300, block_size=128, sparse_block_size=128, width=64, num_global_tokens=17),
    # Of width 64: scaling rounds queries of 32 and 128, in XLA as well, and adds to the error.
    case(sparsity_factor=8, sparse_block_size=128, width=64, dtype="bfloat16", options=(FIRST,)),
    case(sparsity_factor=4, sparse_block_size=48, sparsity_type="pooling", options=(CAUSAL,)),
    case(heads=4, key_heads=2, sparsity_type="stride", options=(FIRST, CAUSAL)),
    case(520, block_size=256, sparse_block_size=256, width=128, heads=1),
    case(150, block_size=48, sparse_block_size=48, sparsity_type="block_stride", options=(NONE,)),
    case(131, sparsity_factor=0, dtype="float16", options=(NONE,)),
    case(93, options=(CAUSAL,)),  # full attention
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_oracle(case):
    assert_equal(case, 0, "pallas")


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.sampled_from(CASES), st.integers(0, 2**16))
def test_kernels_equal_the_oracle_under_any_mask(case, seed):
    assert_equal(case, seed, "pallas")


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient():
    case = CASES[3]
    *inputs, mask = arrays(case, 0)
    context, gradients = outputs(case, *inputs, mask.at[0].set(False), "pallas")
    for x in (context, *gradients):
        assert not x[0].any() and x[1].any() and jnp.isfinite(x).all()


NEAR = Rule(30, 0, itself=False)
SPECS = {
    "windows that overlap": (Spec(32, (Window(0, -40, 24, 100), Window(0, 10, 32, 33))), 1, 0),
    "two sources": (Spec(48, (Window(0, -48, 48, 96, PAST), Window(1, 7, 16, 20))), 2, 5),
    "a rule of distances": (Spec(20, (Window(0, -20, 20, 60, NEAR),)), 1, 3),
    "shared keys alone": (Spec(64, shared_rule=PAST), 0, 150),
    "dropout": (Spec(48, (Window(0, -48, 48, 96), Window(1, 7, 16, 20)), NOT_SELF, 2, 0.3), 2, 5),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_contract_of_attention_kernels(name):
    """Normalisers and their gradients too; masks of each head; fewer queries than whole blocks."""
    spec, sources, shared = SPECS[name]
    generator = np.random.default_rng(0)

    def floats(*shape):
        return jnp.asarray(generator.standard_normal(shape), jnp.float32)

    sizes = [*(150, 70)[:sources], *([shared] if shared else [])]
    pairs = [(floats(2, 2, 32, n), floats(2, 2, 32, n)) for n in sizes]
    masks = [jnp.asarray(generator.random((2, 1 + (n == 70), n)) < 0.8) for n in sizes]
    query, cotangents = floats(2, 2, 32, 150), (floats(2, 2, 32, 150), floats(2, 2, 150))
    key = jax.random.key(1) if spec.dropout_rate else None

    @functools.partial(jax.jit, static_argnames="which")
    def both(query, pairs, which):
        def call(query, pairs):
            every = [Source(*pair, mask) for pair, mask in zip(pairs, masks, strict=True)]
            last = every.pop() if shared else None
            if which == "oracle":
                return attend_reference(spec, Queries(query), tuple(every), last)
            options = {"key": key, "implementation": which}
            return attend(spec, Queries(query), tuple(every), last, **options)

        results, transpose = jax.vjp(call, query, pairs)
        return results, transpose(cotangents)

    other = "xla" if key is not None else "oracle"  # which drops nothing
    (context, normaliser), gradients = both(query, pairs, "pallas")
    wanted = both(query, pairs, other)
    seen = wanted[0][1] > -1e30
    assert (normaliser[~seen] < -1e30).all() and jnp.isfinite(normaliser).all()
    known = (context, jnp.where(seen, normaliser, 0.0)), gradients
    assert_close(known, ((wanted[0][0], jnp.where(seen, wanted[0][1], 0.0)), wanted[1]))


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(full_attention, causal=True),
        functools.partial(local_attention, window_size=48, causal=True),
        functools.partial(local_attention, window_size=32, shared_qk=True, exact_windowsize=True),
    ],
)
def test_local_and_full_attention_are_those_of_xla(function):
    """Rotary positions turn queries and keys outside of the kernels."""
    query, key, value, gradient, mask = arrays(CASES[2], 0)

    @functools.partial(jax.jit, static_argnames="implementation")
    def both(implementation):
        call = functools.partial(function, mask=mask, implementation=implementation)
        context, transpose = jax.vjp(call, query, key, value)
        return context, transpose(gradient)

    assert_close(both("pallas"), both("xla"))


@pytest.mark.parametrize(("rows", "heads"), [(4, 4), (3, 2)])
def test_devices_compute_their_own_rows_and_heads(rows, heads):
    """Under automatic sharding, with the same dropout; an axis that does not divide is not used."""
    config = LSGConfig(block_size=64, sparse_block_size=64, sparsity_type="stride")
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((4, rows, 193, heads, 32)), jnp.float32)

    def gradients(query, key, value, gradient):
        options = {"config": config, "implementation": "pallas", "blocks_per_step": 1}
        drawn = {"dropout_rate": 0.2, "dropout_key": jax.random.key(0)}
        function = functools.partial(lsg_attention, **options, **drawn)
        context, transpose = jax.vjp(function, query, key, value)
        return context, transpose(gradient)

    wanted = jax.jit(gradients)(*x)
    layout = NamedSharding(mesh, P("data" if rows % 2 == 0 else None, None, "tensor"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).lower(*jax.device_put(tuple(x), layout)).compile()
        found = compiled(*jax.device_put(tuple(x), layout))
    assert "all-gather" not in compiled.as_text()
    assert_close(found, wanted)


def test_shards_of_a_sequence_see_their_neighbours():
    case = CASES[3]._replace(length=800)
    inputs = arrays(case, 0)
    wanted = outputs(case, *inputs)
    with jax.set_mesh(make_mesh(data=2, sequence=4)):
        assert_close(outputs(case, *inputs, "pallas"), wanted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 16}, "head width 16 is none of 32, 64, 128; use implementation='xla'"),
        ({"dtype": jnp.float8_e4m3fn}, "dtype float8_e4m3fn is none of float32, bfloat16, float16"),
    ],
)
def test_what_the_kernels_refuse(changes, says, unchecked):
    x = jnp.ones((1, 300, 2, changes.pop("width", 64)), changes.pop("dtype", jnp.float32))
    options = {"config": LSGConfig(**changes), "global_tokens": "none", "implementation": "pallas"}
    with pytest.raises(ValueError, match=says):
        lsg_attention(x, x, x, **options)


def test_what_the_kernels_refuse_of_the_contract(unchecked):
    x, mask = jnp.ones((1, 1, 32, 64)), jnp.ones((1, 1, 64), bool)
    spec, places = Spec(32, (Window(0, 0, 32, 32),)), jnp.arange(64).reshape(1, 1, 64)
    added = Biases((jnp.ones((1, 1, 32, 32)),))
    for queries, source, biases, says in (
        (Queries(x), Source(x, x, mask), added, "add no biases to scores"),
        (Queries(x, places), Source(x, x, mask, places), Biases(), "support positions of keys"),
    ):
        with pytest.raises(ValueError, match=f"'pallas': the GPU kernels .*{says}; use impl"):
            attend(spec, queries, (source,), biases=biases, implementation="pallas")
