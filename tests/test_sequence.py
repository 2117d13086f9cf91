"""Sequences over several devices: the numbers of one device, and only edges of shards that move."""

import functools
import math
import os
import pathlib
import re
import subprocess
import sys

import compiling
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsg_flax import EncoderConfig, LSGConfig, Model, sharding
from lsg_flax.attention import lsg_attention
from lsg_flax.models import read_config
from lsg_flax.models.architecture import Architecture
from lsg_flax.models.layers import Context, Part
from lsg_flax.training import losses

pytestmark = pytest.mark.slow
KINDS = ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none")


def pattern(kind="norm", **overrides):
    sizes = {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2, "num_global_tokens": 2}
    return LSGConfig(sparsity_type=kind, **sizes | overrides)


def inputs(length, rows=2):
    generator = np.random.default_rng(length)
    arrays = generator.normal(size=(4, rows, length, 2, 4)).astype(np.float32)
    mask = np.ones((rows, length), bool)
    mask[0, 2:20] = False  # padding over a border on the left, and at the end
    mask[1, -20:] = False
    return *arrays, jnp.asarray(mask)


def attention_and_gradients(config, arrays, **options):
    *qkv, weights, mask = arrays

    def total(*qkv):
        context = lsg_attention(*qkv, mask, config=config, **options)
        return (context * weights).sum(), context

    (_, context), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*qkv)
    return context, *gradients


def assert_equal_on(mesh, config, length, **options):
    arrays = inputs(length)
    expected = attention_and_gradients(config, arrays, **options)
    with jax.set_mesh(mesh):
        found = attention_and_gradients(config, arrays, **options)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_gradients_are_those_of_one_device(kind, causal):
    mesh = sharding.make_mesh(data=2, sequence=4)
    assert_equal_on(mesh, pattern(kind), 2 + 61, causal=causal)


@pytest.mark.parametrize("global_tokens", ["none", "first_token"])
def test_other_kinds_of_globals(global_tokens):
    mesh = sharding.make_mesh(sequence=4, devices=jax.devices()[:4])
    assert_equal_on(mesh, pattern("bos_pooling"), 63, global_tokens=global_tokens)


@pytest.mark.parametrize(
    ("shards", "length", "overrides"),
    [
        (2, 40, {}),  # five blocks each
        (8, 96, {}),  # three
        (2, 4 * 11 * 2 - 3, {}),  # eleven, the last one not full
        (2, 64, {"sparse_block_size": 12}),  # representatives of eight blocks
        (2, 36, {"sparsity_factor": 4}),  # one representative per block
    ],
)
def test_borders_anywhere_between_blocks(shards, length, overrides):
    mesh = sharding.make_mesh(sequence=shards, devices=jax.devices()[:shards])
    assert_equal_on(mesh, pattern("block_stride", **overrides), 2 + length)


def test_dropout_goes_on_in_each_shard():
    """Averaged over many keys the context is that without dropout; and no two shards repeat."""
    config, mesh = pattern("none"), sharding.make_mesh(data=2, sequence=4)
    ones = jnp.ones((1, 2 + 64, 2, 4))

    def context(key):
        return lsg_attention(ones, ones, ones, config=config, dropout_rate=0.5, dropout_key=key)

    with jax.set_mesh(mesh):
        found = jax.jit(lambda keys: jax.lax.map(context, keys))(
            jax.random.split(jax.random.key(0), 300)
        )
    np.testing.assert_allclose(found.mean(axis=0), np.ones(ones.shape), atol=0.15)
    first, second = found[:, 0, 2:18], found[:, 0, 18:34]
    assert not np.allclose(first, second)


# ------------------------------------------------------------------------------------- the model


def model(task="masked_lm", family="bert", kind="norm", **values):
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32}
    rest = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    config = EncoderConfig.from_dict({"model_type": family} | sizes | rest | values)
    return Model(config.with_overrides(lsg=pattern(kind, num_global_tokens=3)), task)


def batch(task="masked_lm", rows=8, length=96):
    generator = np.random.default_rng(0)
    ids = generator.integers(2, 24, (rows, length), dtype=np.int32)
    mask = np.arange(length) < generator.integers(length * 5 // 8, length + 1, (rows, 1))
    labels = np.where(generator.random(ids.shape) < 0.3, ids, -100)
    if task == "sequence_classification":
        labels = generator.integers(0, 2, rows)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}


def initial(network):
    ids = np.zeros((1, 8), np.int32)
    return jax.jit(network.init)(jax.random.key(0), ids)["params"]


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(network, params, batch, key=None):
    def loss(params):
        return losses.loss_fn(network, params, batch, key)[0]

    return jax.value_and_grad(loss)(params)


MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 2},
    {"sequence": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "tensor": 2, "sequence": 2},
]
MODELS = {
    "masked_lm": (model(), batch()),
    "roberta": (model("sequence_classification", "roberta"), batch("sequence_classification")),
}


@pytest.fixture(scope="module", params=list(MODELS))
def on_one_device(request):
    network, rows = MODELS[request.param]
    params = initial(network)
    return network, params, rows, loss_and_gradients(network, params, rows)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(axes, on_one_device):
    assert_same_on(sharding.make_mesh(**axes), *on_one_device)


def assert_same_on(mesh, network, params, rows, expected):
    loss, gradients = expected
    with jax.set_mesh(mesh):
        placed = sharding.shard(params, mesh), sharding.shard_batch(rows, mesh)
        found, found_gradients = loss_and_gradients(network, *placed)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(
            np.asarray(other), np.asarray(one), rtol=1e-5, atol=1e-5
        ),
        gradients,
        found_gradients,
    )


MIXED = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
OTHERS = {
    "electra": model("token_classification", "electra", embedding_size=8),
    "causal": model("causal_lm", is_decoder=True),
    "full attention": Model(model().config.with_overrides(lsg=None), "masked_lm"),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_models_on_a_mixed_mesh(name):
    network, rows = OTHERS[name], batch()
    if network.task == "token_classification":
        rows["labels"] = rows["input_ids"] % 2
    params = initial(network)
    expected = loss_and_gradients(network, params, rows)
    assert_same_on(sharding.make_mesh(**MIXED), network, params, rows, expected)


def test_bfloat16_on_a_sequence_mesh():
    network = model("sequence_classification", kind="bos_pooling").clone(dtype=jnp.bfloat16)
    rows = batch("sequence_classification")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), initial(network))
    loss, gradients = loss_and_gradients(network, params, rows)
    mesh = sharding.make_mesh(data=2, sequence=4)
    with jax.set_mesh(mesh):
        placed = sharding.shard(params, mesh), sharding.shard_batch(rows, mesh)
        found, found_gradients = loss_and_gradients(network, *placed)
    np.testing.assert_allclose(found, loss, rtol=0.02)
    for one, other in zip(*map(jax.tree.leaves, (gradients, found_gradients)), strict=True):
        assert other.dtype == jnp.bfloat16
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.linalg.norm(one - other) <= 0.1 * np.linalg.norm(one) + 1e-3


ALL_AXES = """
import jax
import test_sequence as t
network, rows = t.MODELS["masked_lm"]
params = t.initial(network)
mesh = t.sharding.make_mesh(data=2, fsdp=2, tensor=2, sequence=2)
t.assert_same_on(mesh, network, params, rows, t.loss_and_gradients(network, params, rows))
print(mesh.size, "devices agree")
"""


def test_all_four_axes_at_once():
    flags = compiling.xla_flags(devices=16)
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", ALL_AXES], cwd=here, env=environment, capture_output=True, text=True
    )
    assert "16 devices agree" in done.stdout, done.stderr


def test_hidden_states_and_globals_are_those_of_one_device():
    """ALBERT: shared layers, narrow embeddings; pooling and the states of all layers."""
    network = model("base", "albert", "bos_pooling", embedding_size=8)
    rows = batch(rows=1, length=50)
    del rows["labels"]
    params = initial(network)

    def run(params, rows):
        return network.apply({"params": params}, **rows, output_hidden_states=True)

    expected = jax.jit(run)(params, rows)
    mesh = sharding.make_mesh(sequence=2, data=1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = jax.jit(run)(params, rows)
    assert len(found.hidden_states) == 3
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        length = one.shape[1]  # one device pads to a block, two to two
        np.testing.assert_allclose(
            np.asarray(other)[:, :length], np.asarray(one), rtol=1e-5, atol=1e-5
        )


# Texts that fill all windows, leave whole ones to padding, or have less than one for each shard.
LOCAL = {
    "causal": ({}, 96),
    "bidirectional": ({"causal": False, "look_backward": 2, "use_xpos": True}, 88),
    "bias": ({"use_dynamic_pos_bias": True, "gate_values_per_head": True}, 48),
    "whole windows": ({"exact_windowsize": False, "shared_qk": True, "look_backward": 2}, 24),
}


def local_transformer(**fields):
    """One with parameters as large as those of a trained one."""
    sizes = {"num_tokens": 24, "max_seq_len": 512, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
    sizes |= {"local_attn_window_size": 4, "num_residual_streams": 2}
    config = read_config({"model_type": "local-transformer"} | sizes | fields)
    network = Model(config, "causal_lm")
    params = initial(network)
    layers = params["encoder"]["layers"]
    params["encoder"]["layers"] = jax.tree.map(lambda x: 3 * x, layers) | {
        "attention": layers["attention"]  # with the frequencies of its positions
    }
    return network, params


@pytest.mark.parametrize("axes", [MESHES[3], MESHES[5]], ids=str)
@pytest.mark.parametrize("name", list(LOCAL))
def test_local_transformers(name, axes):
    fields, length = LOCAL[name]
    (network, params), rows = local_transformer(**fields), batch(length=length)
    rows["labels"] = np.where(rows["attention_mask"], rows["input_ids"], -100)
    expected = loss_and_gradients(network, params, rows)
    assert_same_on(sharding.make_mesh(**axes), network, params, rows, expected)


class Dropped(Part):
    @nn.compact
    def __call__(self, x):
        return self.dropout(x)


def test_dropout_keeps_the_copies_of_the_globals_together():
    """Every shard has a copy of the globals, which must not drift apart; its tokens are its own."""
    context = Context(model().config, Architecture(), train=True, sequence_axis="sequence")
    part = Dropped(context)
    rngs = {"dropout": jax.random.key(0)}
    run = sharding.over_sequence(lambda x: part.apply({}, x, rngs=rngs), in_axes=(1,), out_axes=1)
    with jax.set_mesh(sharding.make_mesh(sequence=8)):
        found = jax.jit(run)(jnp.ones((2, 8 * (3 + 5), 16)))
    shards = np.asarray(found).reshape(2, 8, 3 + 5, 16)
    np.testing.assert_array_equal(shards[:, :, 5:], shards[:, :1, 5:].repeat(8, axis=1))
    tokens = {shards[:, i, :5].tobytes() for i in range(8)}
    assert len(tokens) == 8 and 0 < (shards == 0).mean() < 0.2


# ----------------------------------------------------------------------------------- what moves


def moved(text):
    """Kind and number of elements of every collective of a compiled program."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    pattern = rf"= (\(?[^=]*?\)?) ({kinds})(?:-start)?\("
    found = []
    for shapes, kind in re.findall(pattern, text):
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        found.append((kind, max(math.prod(int(n) for n in s.split(",") if n) for s in sizes)))
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_shards_exchange_edges_and_nothing_else(causal):
    rows, length, heads, width, block = 1, 8 * 64, 2, 8, 8
    config = LSGConfig(
        block_size=block, sparse_block_size=block, sparsity_factor=2, num_global_tokens=1
    )
    mesh = sharding.make_mesh(sequence=8)
    cut = NamedSharding(mesh, P(None, "sequence"))
    arrays = [jax.device_put(jnp.ones((rows, length, heads, width)), cut)] * 3

    def total(query, key, value):
        context = lsg_attention(
            query, key, value, config=config, causal=causal, global_tokens="first_token"
        )
        return (context**2).sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile().as_text()
    collectives = moved(program)
    per_token = rows * heads * width
    edges = {per_token * block, per_token * config.sparse_halo, heads * block}
    edges |= {heads * config.sparse_halo, block}  # keys, values and masks
    permutes = [size for kind, size in collectives if kind == "collective-permute"]
    assert len(permutes) >= (4 if causal else 8) and set(permutes) <= edges
    assert {kind for kind, _ in collectives} == {"collective-permute", "all-reduce"}
    sums = [size for kind, size in collectives if kind == "all-reduce"]
    assert max(sums) <= per_token  # of the one global


def moved_in_training(network, params):
    """What a step moves of one text of 1,024 tokens over eight devices."""
    rows, mesh = batch(rows=1, length=8 * 4 * 32), sharding.make_mesh(sequence=8)

    def loss(params, batch):
        return losses.loss_fn(network, params, batch)[0]

    with jax.set_mesh(mesh):
        placed = sharding.shard(params, mesh), sharding.shard_batch(rows, mesh)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*placed).compile()
    return moved(compiled.as_text())


@pytest.mark.parametrize("kind", ["lsg", "local"])
def test_the_model_gathers_parameters_only(kind):
    width = 16
    if kind == "lsg":
        network = model("masked_lm", max_position_embeddings=2048)
        params, lsg = initial(network), network.config.lsg
        halo = width * max(lsg.block_size, lsg.sparse_halo)
    else:
        network, params = local_transformer(max_seq_len=8 * 4 * 32)
        halo = width * network.config.local_attn_window_size
    collectives = moved_in_training(network, params)
    of_keys = width * 8 * 4 * 32  # K or V of the whole text
    largest = max(leaf.size for leaf in jax.tree.leaves(params["encoder"]["layers"]))
    gathered = [size for kind, size in collectives if kind == "all-gather"]
    assert max(gathered) <= max(largest, 8 * 4 * 32) < of_keys
    permutes = [size for kind, size in collectives if kind == "collective-permute"]
    assert permutes and max(permutes) <= halo


def test_a_local_transformer_draws_in_each_shard_and_shows_its_states():
    network, params = local_transformer(ff_dropout=0.5)
    rows, key = batch(rows=1, length=64), jax.random.key(0)
    mesh = sharding.make_mesh(sequence=2, devices=jax.devices()[:2])
    run = jax.jit(
        lambda rows, train: (
            network.apply(
                {"params": params},
                **rows,
                train=train,
                rngs={"dropout": key} if train else None,
                output_hidden_states=True,
            ).hidden_states
        ),
        static_argnums=1,
    )
    same = {"input_ids": np.tile(rows["input_ids"][:, :32], 2)}
    expected = run(same, False)
    with jax.set_mesh(mesh):
        found, dropped = run(same, False), run(same, True)
    assert len(found) == 3
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-5, atol=1e-5)
    lost = np.asarray(dropped[1] - dropped[0])
    assert not np.allclose(lost[:, 8:32], lost[:, 40:], atol=1e-3)


# ------------------------------------------------------------------------------------- bad input


def test_heads_that_do_not_divide():
    network, mesh = model(), sharding.make_mesh(tensor=4)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="tensor=4 does not divide num_attention_heads=2"),
    ):
        network.apply({"params": {}}, np.zeros((8, 16), np.int32))


@pytest.mark.parametrize(
    ("length", "overrides", "message"),
    [
        (64, {}, "give each 2 blocks of 4, fewer than the 3"),
        (8, {}, "sequence=8 devices give each 1 blocks"),
        (128, {"sparse_block_size": 12}, "fewer than the 7"),
        (128, {"strict_reference": True}, "use sequence=1"),
        (130, {"adaptive": False}, r"8 shards x block_size=4, and adaptive=False: .* 160"),
    ],
)
def test_texts_that_cannot_be_cut(length, overrides, message):
    array = jnp.ones((1, 2 + length, 2, 4))
    mesh = sharding.make_mesh(sequence=8)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        lsg_attention(array, array, array, config=pattern(**overrides))
