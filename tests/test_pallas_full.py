"""Full and local attention by fused kernels, interpreted: equal to the dense oracles, forward and
backward; what the kernels refuse; what they compile to for a TPU.

Interpreting is slow, so arrays are small and cases few.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import assert_close

from lsg_flax import chips, topologies
from lsg_flax.attention import (
    attend_windows,
    full_attention,
    local_attention,
    local_attention_reference,
)
from lsg_flax.kernels import Source
from lsg_flax.models import Model, read_config
from lsg_flax.patterns import LSH, Full, Local, Runtime, attention, rotary_of
from lsg_flax.sharding import make_mesh

ROTARY = {"rotary": rotary_of(64, 128, used=True, xpos=False, base=None)}
XPOS = {"rotary": rotary_of(64, 64, used=True, xpos=True, base=None)}
# Options of the pattern, and the length.
LOCAL = [
    ({"window_size": 64}, 300),
    ({"window_size": 256, "look_forward": 0, "look_backward": 0} | ROTARY, 300),
    ({"window_size": 192, "causal": True, "look_forward": 0, "scale": 0.3}, 600),  # parts of 64
    ({"window_size": 128, "exact_windowsize": True, "look_forward": 2} | ROTARY, 320),
    ({"window_size": 64, "causal": True, "look_forward": 0, "exact_windowsize": True} | XPOS, 200),
    ({"window_size": 64, "causal": True, "look_forward": 0, "shared_qk": True} | ROTARY, 200),
]


def arrays(seed: int, length: int, width: int = 64, heads: int = 2):
    generator = np.random.default_rng(seed)
    floats = jnp.asarray(generator.standard_normal((4, 2, length, heads, width)), jnp.float32)
    mask = generator.random((2, length)) < 0.9
    mask[0, -length // 3 :] = False
    return *floats, jnp.asarray(mask)


def features_first(x):
    return x.transpose(0, 2, 3, 1)


@functools.partial(jax.jit, static_argnames=("pattern", "oracle"))
def local_outputs(pattern: Local, query, key, value, gradient, mask, oracle=False):
    """The context and all gradients."""

    def attend(query, key, value):
        key = query if pattern.shared_qk else key
        if oracle:
            return local_attention_reference(query, key, value, mask, pattern=pattern)
        source = Source(features_first(key), features_first(value), mask[:, None])
        run = Runtime(implementation="pallas_interpret")
        return attention(pattern, features_first(query), source, run).transpose(0, 3, 1, 2)

    context, transpose = jax.vjp(attend, query, key, value)
    return context, transpose(gradient)


@pytest.mark.parametrize(("options", "length"), LOCAL)
def test_local_attention_equals_the_oracle(options: Any, length):
    pattern, inputs = Local(**options), arrays(0, length)
    assert_close(local_outputs(pattern, *inputs), local_outputs(pattern, *inputs, oracle=True))


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def full_outputs(query, key, value, gradient, mask, causal, implementation, segment_ids=None):
    """The context and all gradients."""
    options: dict[str, Any] = {"causal": causal, "implementation": implementation}
    options["segment_ids"] = segment_ids
    function = functools.partial(full_attention, mask=mask, **options)
    context, transpose = jax.vjp(function, query, key, value)
    return context, transpose(gradient)


@pytest.mark.parametrize(("causal", "length", "keys"), [(False, 130, 300), (True, 300, 300)])
def test_full_attention_equals_the_definition(causal, length, keys):
    """Of rows that see nothing, too: padding on the left of a causal row, and a row of padding."""
    query, key, value, gradient, mask = arrays(0, keys, width=32)
    mask = mask.at[0, :40].set(False).at[1].set(causal)
    inputs = query[:, :length], key, value, gradient[:, :length], mask
    found, wanted = (
        full_outputs(*inputs, causal=causal, implementation=name)
        for name in ("pallas_interpret", "xla")
    )
    assert_close(found, wanted)
    assert causal or not found[0][1].any()


@pytest.mark.parametrize("causal", [False, True])
def test_texts_of_one_row_do_not_see_each_other(causal):
    """Nor does a hidden token's text end with it: hidden queries see the others of their own."""
    *inputs, mask = arrays(0, 140, width=32)
    numbers = jnp.searchsorted(jnp.array([50, 90]), jnp.arange(140), side="right") + 1
    numbers = jnp.stack([numbers, jnp.where(numbers == 3, 0, numbers)])
    found, wanted = (
        full_outputs(*inputs, mask, causal, name, numbers) for name in ("pallas_interpret", "xla")
    )
    assert_close(found, wanted)


def of_features(pattern, query, key, value, mask, **run):
    source = Source(features_first(key), features_first(value), mask[:, None])
    run = {"implementation": "pallas_interpret"} | run
    context = attention(pattern, features_first(query), source, Runtime(**run))
    return context.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_windows_in_a_ring_equal_the_definition(causal):
    """Reformer's local attention: the last window is in front of the first, but of causal ones
    nothing there is earlier."""
    pattern = Local(64, causal, look_backward=2, look_forward=int(not causal), wraps=True)
    *inputs, _gradient, mask = arrays(0, 250)
    run = jax.jit(
        lambda *x, name: of_features(pattern, *x, implementation=name), static_argnames="name"
    )
    found, wanted = (run(*inputs, mask, name=name) for name in ("pallas_interpret", "xla"))
    assert_close(found, wanted)


@pytest.mark.parametrize("options", [LOCAL[2][0], LOCAL[3][0], LOCAL[5][0]])
def test_shards_of_a_sequence_see_their_neighbours(options):
    """And windows stay whole where they are several blocks."""
    *inputs, gradient, mask = arrays(0, 4 * 192 + 5)
    pattern = Local(**options)
    inputs[1] = inputs[0] if pattern.shared_qk else inputs[1]

    @functools.partial(jax.jit, static_argnames="name")
    def outputs(query, key, value, gradient, mask, name):
        run = Runtime(implementation=name)
        function = functools.partial(attend_windows, mask=mask, pattern=pattern, run=run)
        context, transpose = jax.vjp(function, query, key, value)
        return context, transpose(gradient)

    wanted = outputs(*inputs, gradient, mask, name="xla")
    with jax.set_mesh(make_mesh(data=2, sequence=4)):
        found = outputs(*inputs, gradient, mask, name="pallas_interpret")
    assert_close(found, wanted)


@pytest.mark.parametrize("pattern", [Full(causal=True), Local(64, rotary=ROTARY["rotary"])])
def test_devices_compute_their_own_rows_and_heads(pattern):
    *inputs, _gradient, mask = arrays(0, 200)
    run = jax.jit(functools.partial(of_features, pattern))
    wanted = run(*inputs, mask)
    mesh = make_mesh(data=2, tensor=1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        layout = NamedSharding(mesh, P("data"))
        placed = jax.device_put((*inputs, mask), layout)
        compiled = run.lower(*placed).compile()
        found = compiled(*placed)
    assert "all-gather" not in compiled.as_text()
    assert_close(found, wanted)


def test_local_attention_drops_that_share_of_weights():
    """The mean of many draws is the whole context."""
    query, key, value, _gradient, mask = arrays(0, 128)
    pattern, value = Local(64), jnp.ones_like(value)
    drawn = {"dropout_rate": 0.25, "dropout_key": jax.random.key(0)}
    context = of_features(pattern, query * 0.1, key, value, mask | True, **drawn)
    assert abs(float(context.mean()) - 1.0) < 0.01 and float(context.std()) > 0.01


SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 31}
MODELS = {
    "bert": SIZES | {"intermediate_size": 16, "max_position_embeddings": 200, "is_decoder": True},
    "local-transformer": {
        "num_tokens": 31,
        "max_seq_len": 200,
        "dim": 32,
        "depth": 1,
        "heads": 2,
        "dim_head": 32,
        "local_attn_window_size": 64,
        "use_xpos": True,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_read_by_the_kernels(name):
    """The logits, and what the cache keeps of the second layer's input."""
    config = read_config({"model_type": name} | MODELS[name])
    model, ids = Model(config, "causal_lm"), np.arange(2 * 150).reshape(2, 150) % 31
    mask = np.arange(150)[None] >= np.array([[0], [30]])
    params = jax.jit(model.init)(jax.random.key(0), ids[:, :3])["params"]

    def read(implementation):
        run = model.clone(implementation=implementation)
        arrays = {"input_ids": ids, "attention_mask": mask, "cache_length": 160}
        return jax.jit(functools.partial(run.apply, **arrays))({"params": params})

    found, wanted = read("pallas_interpret"), read("xla")
    for x, y in zip(*(jax.tree.leaves((o.logits, o.cache)) for o in (found, wanted)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


X = jnp.ones((1, 300, 2, 64))
DROPOUT = {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}


@pytest.mark.parametrize(
    ("function", "query", "options", "says"),
    [
        (full_attention, X, DROPOUT, "full attention have no dropout, but dropout_rate=0.1"),
        (full_attention, X.astype(jnp.float16), {}, "dtype float16 is none of float32, bfloat16"),
        (full_attention, X[..., :24], {}, "head width 24 is not a multiple of 16"),
        (local_attention, X, {"window_size": 100}, "window_size=100 is not a multiple of 64"),
        (local_attention, X[..., :48], {"window_size": 64}, "width 48 is none of 32, 64, 128"),
        (
            local_attention,
            X,
            {"window_size": 64, "attn_bias": jnp.zeros((2, 64, 192))},
            "they add no bias .attn_bias",
        ),
        (
            local_attention,
            jnp.ones((1, 3000, 1, 64)),
            {"window_size": 64, "use_xpos": True},
            r"use_xpos scales by up to e \*\* 64 over 3008 tokens",
        ),
    ],
)
def test_what_the_kernels_refuse(function, query, options, says, unchecked):
    with pytest.raises(ValueError, match=says):
        function(query, query, query, implementation="pallas_interpret", **options)
    with pytest.raises(
        ValueError, match="is for TPUs and NVIDIA GPUs, but this program is compiled for 'cpu'"
    ):
        function(query, query, query, implementation="pallas", **options)


def test_lsh_attention_has_no_kernel():
    x = jnp.ones((1, 2, 16, 100))
    source = Source(x, x, jnp.ones((1, 1, 100), bool))
    with pytest.raises(ValueError, match="no fused kernel for LSH attention; choose 'xla'"):
        attention(LSH(64), x, source, Runtime(implementation="pallas_interpret"))
    # What a mesh cannot spread would be computed again and again on its devices.
    says = r"1 rows and 2 heads cannot be sharded evenly over .* data=2"
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=says):
        attention(Full(), x, source, Runtime(implementation="pallas_interpret"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_real_tpu_compilation_of_full_and_local_attention():
    """Four rows of 4,096 tokens on v5e. Local attention moves each array once; of full attention
    XLA's own program moves 9.8 GB forward, 23 in all."""
    file = pathlib.Path(__file__).with_name("tpu_full.py")
    environment = topologies.environment_for(chips.parse_topology("v5e:1x1"))
    environment |= {"PYTHONPATH": os.pathsep.join([str(file.parents[1]), *sys.path])}
    command = [sys.executable, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = map(json.loads, done.stdout.splitlines())
    found = {(line.pop("case"), line.pop("passes")): line for line in lines}
    array = 2 * 4 * 4096 * 12 * 64 / 1e9
    assert found["local", "forward"]["gigabytes"] < 1.1 * 4 * array
    assert (
        found["local", "both"]["gigabytes"] < 5.5 * 4 * array
    )  # copies to [rows, tokens, features], too
    for passes in ("forward", "both"):
        assert found["local", passes]["temporaries"] < 5
    assert found["full", "forward"]["gigabytes"] < 0.5 and found["full", "both"]["gigabytes"] < 1.5
    assert found["full", "forward"]["temporaries"] < 5
    assert found["full", "both"]["temporaries"] < 220
    product = 2 * 4 * 12 * 4096 * 64
    assert found["local", "both"]["flops"] == 7 * product * (512 + 128)
    assert found["full", "both"]["flops"] == 9 * product * 4096
    assert found["causal", "forward"]["flops"] == 2 * product * 4096 * 5 / 8  # blocks of 1,024
