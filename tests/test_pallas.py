"""The fused LSG kernels for TPUs, interpreted: equal to the dense oracle, forward and backward,
over lengths, masks, globals, selections, geometries and dtypes; what they refuse; what they compile
to for a TPU.

Interpreting is slow, so arrays are small and cases few.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import CAUSAL, FIRST, NONE, arrays, assert_equal, case, outputs

from lsg_flax import chips, topologies
from lsg_flax.attention import lsg_attention
from lsg_flax.kernels import (
    FusedPlan,
    FusedSpec,
    Selecting,
    Source,
    attend_fused,
    pad,
    plan_fused,
    tpu_plan,
)
from lsg_flax.patterns import LSG, Runtime, attention
from lsg_flax.patterns.config import LSGConfig
from lsg_flax.planning import PlanSettings, plan
from lsg_flax.sharding import make_mesh

CASES = [
    case(400, block_size=128, sparse_block_size=128),
    case(384, block_size=128, sparse_block_size=128, dtype="bfloat16", num_global_tokens=17),
    case(block_size=128, sparsity_factor=8, dtype="bfloat16", heads=4, width=32, options=(FIRST,)),
    case(150, sparsity_factor=2, sparse_block_size=32, options=(CAUSAL,)),
    case(sparsity_type="pooling", sparsity_factor=4, options=(FIRST,)),
    case(sparsity_type="stride", heads=3, key_heads=1, options=(NONE,)),
    case(sparsity_type="block_stride", sparsity_factor=4, width=128, heads=1, options=(CAUSAL,)),
    case(sparsity_type="bos_pooling", sparse_block_size=128, num_global_tokens=3),
    case(sparsity_type="lsh", sparsity_factor=8, options=(FIRST, CAUSAL)),
    case(600, block_size=256, sparsity_factor=0, options=(CAUSAL,)),
    case(640, sparsity_factor=1, dtype="bfloat16", options=(NONE, CAUSAL)),  # more than one step
    # More keys than globals see at once, and more globals than a block has.
    case(1100, sparsity_factor=0, num_global_tokens=70),
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_oracle(case):
    assert_equal(case, 0, "pallas_interpret")


# The same examples in each run: with rare ones (the last bfloat16 case with seed 30019) a few
# gradients are beyond the limit, because they are computed from the rounded context.
@pytest.mark.slow
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.sampled_from(CASES), st.integers(0, 2**16))
def test_kernels_equal_the_oracle_under_any_mask(case, seed):
    assert_equal(case, seed, "pallas_interpret")


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient():
    case = CASES[4]
    query, key, value, gradient, mask = arrays(case, 0)
    mask = mask.at[0].set(False)
    context, gradients = outputs(case, query, key, value, gradient, mask, "pallas_interpret")
    for x in (context, *gradients):
        assert not x[0].any() and x[1].any() and jnp.isfinite(x).all()


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
@pytest.mark.parametrize("causal", [False, True])
def test_what_fills_a_tile_behind_the_globals_is_not_seen(implementation, causal):
    generator = np.random.default_rng(0)
    query, key, value = jnp.asarray(generator.standard_normal((3, 2, 2, 64, 203)), jnp.float32)
    mask = jnp.asarray(generator.random((2, 1, 203)) < 0.8)
    config = LSGConfig(block_size=64, sparse_block_size=64, num_global_tokens=3)

    @functools.partial(jax.jit, static_argnames="filler")
    def attend(query, source, filler):
        query, source = jax.tree.map(lambda x: pad(x, 0, filler), (query, source))
        pattern, run = LSG(config, causal, filler=filler), Runtime(implementation=implementation)
        return attention(pattern, query, source, run)

    source = Source(key, value, mask)
    found = attend(query, source, filler=5)[..., :203]
    np.testing.assert_allclose(found, attend(query, source, filler=0), atol=1e-6)


def test_dropout_of_what_globals_see_is_the_same_in_both_passes():
    query = jnp.zeros((1, 770, 2, 64))
    config = LSGConfig(block_size=64, sparse_block_size=64, num_global_tokens=2)
    options = {"config": config, "implementation": "pallas_interpret"}
    drawn = {"dropout_rate": 0.25, "dropout_key": jax.random.key(0)}
    attend = jax.jit(functools.partial(lsg_attention, query, query, **options, **drawn))
    generator = np.random.default_rng(0)
    value, gradient = jnp.asarray(generator.standard_normal((2, *query.shape)), jnp.float32)
    gradient = gradient.at[:, 2:].set(0.0)  # of the globals alone
    context, transpose = jax.vjp(attend, value)
    found = (transpose(gradient)[0] * value).sum()
    np.testing.assert_allclose((context * gradient).sum(), found, rtol=1e-4)
    # The mean of 770 factors, 0 or 1 / 0.75: its standard deviation is 0.021.
    shares = attend(jnp.ones_like(value))[0, :2, :, 0]
    assert (abs(shares - 1.0) < 0.1).all() and len(np.unique(shares)) == 4


def dropout_weights(seed: int):
    """The weights of queries to values [T, T], read by values of one token each: heads of 64 lanes
    show 64 tokens of one block at a time."""
    config = LSGConfig(block_size=64, sparsity_type="none", sparse_block_size=0)
    query = jnp.zeros((1, 192, 2, 64))
    value = jnp.zeros((1, 192, 2, 64)).at[0, 64:128].set(jnp.eye(64)[:, None])

    @functools.partial(jax.jit, static_argnames="rate")
    def run(value, rate):
        options = {"config": config, "global_tokens": "none", "implementation": "pallas_interpret"}
        drawn = {"dropout_rate": rate, "dropout_key": jax.random.key(seed)} if rate else {}
        function = functools.partial(lsg_attention, query, query, **options, **drawn)
        context, transpose = jax.vjp(function, value)
        return context, transpose(jnp.ones_like(context))[0]

    return run(value, 0.25), run(value, 0.0)


def test_dropout_drops_that_share_of_weights_and_the_same_in_both_passes():
    (context, gradient), (whole, _) = dropout_weights(seed=0)
    factors = context / whole  # of queries, heads, and the 64 tokens of the second block
    is_kept = factors > 0
    np.testing.assert_allclose(factors, jnp.where(is_kept, 1 / 0.75, 0.0), rtol=1e-5, atol=1e-6)
    # 192 * 2 * 64 draws: the standard deviation of their share is 0.0028; halves of them, and
    # heads, are as independent as that.
    assert abs(float(is_kept.mean()) - 0.75) < 0.012
    for x, y in ((is_kept[:, :96], is_kept[:, 96:]), (is_kept[:, :, 0], is_kept[:, :, 1])):
        assert abs(float((x & y).mean()) - 0.75**2) < 0.02
    # All 64 features of a value get what the queries gave the token.
    wanted = context.sum(axis=1)  # [1, 2, 64]: of each token of the second block
    found = gradient[:, 64:128].mean(axis=-1).swapaxes(1, 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    (other, _), _ = dropout_weights(seed=1)
    assert 0.3 < float(((other > 0) != is_kept).mean()) < 0.45  # 2 * 0.25 * 0.75


@pytest.mark.parametrize(("rows", "heads"), [(4, 4), (3, 2)])
def test_devices_compute_their_own_rows_and_heads(rows, heads):
    """Under automatic sharding, with the same dropout; an axis that does not divide is not used."""
    config = LSGConfig(block_size=64, sparse_block_size=64, sparsity_type="stride")
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((4, rows, 193, heads, 64)), jnp.float32)

    def gradients(query, key, value, gradient):
        options = {"config": config, "implementation": "pallas_interpret"}
        drawn = {"dropout_rate": 0.2, "dropout_key": jax.random.key(0)}
        function = functools.partial(lsg_attention, **options, **drawn)
        context, transpose = jax.vjp(function, query, key, value)
        return context, transpose(gradient)

    wanted = jax.jit(gradients)(*x)
    layout = NamedSharding(mesh, P("data" if rows % 2 == 0 else None, None, "tensor"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).lower(*jax.device_put(tuple(x), layout)).compile()
        found = compiled(*jax.device_put(tuple(x), layout))
    assert rows % 2 or heads % 4 or "all-gather" not in compiled.as_text()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        case(1000, options=(FIRST,)),
        case(1200, sparsity_type="bos_pooling", sparsity_factor=4, options=(CAUSAL,)),
    ],
)
def test_shards_of_a_sequence_see_their_neighbours(case):
    *inputs, mask = arrays(case, 0)
    wanted = outputs(case, *inputs, mask)
    with jax.set_mesh(make_mesh(data=2, sequence=4)):
        found = outputs(case, *inputs, mask, "pallas_interpret")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_long_text_is_cut_into_ranges(causal):
    generator = np.random.default_rng(0)
    query, key, value, gradient = jnp.asarray(generator.standard_normal((4, 2, 2, 64, 448)), "f4")
    mask = jnp.asarray(generator.random((2, 1, 448)) < 0.8)
    spec = FusedSpec(64, Selecting("norm", 32, 64, 64, 64), causal)

    @functools.partial(jax.jit, static_argnames="ranges")
    def gradients(ranges):
        def attend(query, key, value):
            first = Source(key[..., :3], value[..., :3], mask[..., :3])
            plan = plan_fused(spec, query, first, "pallas_interpret")
            plan = dataclasses.replace(plan, blocks=-(-7 // ranges), ranges=ranges)
            return attend_fused(plan, query, Source(key, value, mask), first)

        context, transpose = jax.vjp(attend, query, key, value)
        return context, transpose(gradient)

    for a, b in zip(*(jax.tree.leaves(gradients(n)) for n in (3, 1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"implementation": "pallas"},
            "is for TPUs and NVIDIA GPUs, but this program .* for 'cpu'",
        ),
        ({"implementation": "mosaic"}, "'mosaic' is unknown; choose 'xla', 'pallas'"),
        ({"block_size": 32}, "block_size=32 is none of 64, 128, 256"),
        ({"sparsity_factor": 16}, "4 representatives per block .* multiples of 8 in float32"),
        ({"sparse_block_size": 48}, "sparse_block_size=48 must divide block_size=64, .*'norm'"),
        ({"width": 16}, "head width 16 is none of 32, 64, 128"),
        ({"dtype": jnp.float16}, "dtype float16 is none of float32, bfloat16"),
        ({"length": 128, "width": 24}, "head width 24 is not a multiple of 16"),
    ],
)
def test_what_the_kernels_refuse(changes, says, unchecked):
    fields = {"block_size": 64, "sparse_block_size": 64} | changes
    implementation = fields.pop("implementation", "pallas_interpret")
    length, width = fields.pop("length", 300), fields.pop("width", 64)
    x = jnp.ones((1, length, 2, width), fields.pop("dtype", jnp.float32))
    options = {"config": LSGConfig(**fields), "global_tokens": "none"}
    with pytest.raises(ValueError, match=says):
        lsg_attention(x, x, x, implementation=implementation, **options)


def test_a_call_too_large_for_the_vector_memory_is_refused_before_it_is_compiled():
    selecting = Selecting("norm", 128, 256, 256, 256)
    sizes = {"blocks": 64, "shared": 512, "heads": 2, "all_heads": 2, "width": 64}
    plan = FusedPlan(FusedSpec(256, selecting), dtype="float32", behind=512, **sizes)
    chip = "some tpu"
    refused = tpu_plan.refusal(tpu_plan.cut_to_fit(plan, chip), chip)
    says = r"64 blocks of 256 tokens need \d+ MiB of vector memory, but a kernel may use 15 MiB on "
    assert re.match(says + "some tpu; use smaller blocks, or use implementation='xla'", refused)
    assert tpu_plan.refusal(tpu_plan.cut_to_fit(plan, "tpu v5e"), "tpu v5e") is None


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "lengths"),
    [("v5e:1x1", [384, 131_072]), ("v5p:2x2x1", [384]), ("v6e:1x1", [384])],
)
def test_a_real_tpu_compilation_of_short_and_long_texts(topology, lengths):
    """Of one row: 384 tokens, and 131,072, which do not fit a chip's vector memory at once."""
    file = pathlib.Path(__file__).with_name("tpu_attention.py")
    environment = topologies.environment_for(chips.parse_topology(topology))
    environment |= {"PYTHONPATH": os.pathsep.join([str(file.parents[1]), *sys.path])}
    command = [sys.executable, str(file), topology, *map(str, lengths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for found in json.loads(done.stdout).values():
        assert found["kernels"] == 2 and not found["slow"]


@pytest.mark.slow
@needs_libtpu
def test_a_real_tpu_compilation_of_a_training_step():
    """RoBERTa-base, 4 rows of 4,096 tokens on each of four v5e: in each of 12 layers each kernel
    runs once, and nothing is turned or shifted for them."""
    config = pathlib.Path(__file__).parent.parent / "benchmarks" / "configs" / "roberta-base.json"
    where = {"topology": "v5e:2x2", "task": "sequence_classification"}
    found = plan(PlanSettings(str(config), batch_size=16, max_length=4096, **where))
    assert found.program.kernels == 2 * 12 and found.program.unknown_kernels == 0
    assert found.program.bytes < 30e9 and found.memory.temporaries < 4.4e9


@pytest.mark.slow
@needs_libtpu
def test_a_real_tpu_compilation_of_the_kernels():
    """Four rows of 4,096 tokens on v5e, a global and what fills up a tile behind them: q, k, v and
    the context are 0.10 GB, with the gradients and what the backward pass reads again 0.28."""
    file = pathlib.Path(__file__).parent.parent / "benchmarks" / "kernels.py"
    command = [sys.executable, str(file), "--json", "--what", "layer"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    forward, both = map(json.loads, lines)
    assert forward["gigabytes"] < 0.11 and both["gigabytes"] < 0.30
    for row in (forward, both):
        assert row["temporaries"] < 5
        assert row["sort"] == row["gather"] == row["scatter"] == 0
        assert 1.0e6 < row["forward"] < 1.2e6
    assert 1.9e6 < both["backward"] < 2.2e6
    seen = 3 * 128 + 2 * 128 + 16  # local, sparse, and the global in a tile
    product = 2 * 4 * 12 * 64 * (4096 * seen + 16 * 4112)
    assert forward["flops"] == 2 * product and both["flops"] == 7 * product
