"""Meshes, the two tables, and that a sharded model gives the numbers of one device."""

import functools
import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import GOLDEN
from jax.sharding import PartitionSpec as P

import lsg_flax
from lsg_flax import hub, sharding

TREES = json.loads((pathlib.Path(__file__).parent / "golden" / "parameter_trees.json").read_text())


def tree(name):
    leaves = {k: jax.ShapeDtypeStruct(tuple(s), jnp.float32) for k, s in TREES[name].items()}
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def specs(shardings):
    flat = flax.traverse_util.flatten_dict(shardings, sep="/")
    return {path: sharding.spec for path, sharding in flat.items()}


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({}, (8, 1, 1, 1)),
        ({"sequence": 8}, (1, 1, 1, 8)),
        ({"fsdp": -1, "tensor": 2}, (1, 4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"data": -1, "sequence": 4}, (2, 1, 1, 4)),
    ],
)
def test_meshes(axes, sizes):
    mesh = sharding.make_mesh(**axes)
    assert mesh.axis_names == sharding.AXES and mesh.devices.shape == sizes


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "does not fit 8 devices"),
        ({"tensor": 16}, "does not fit 8 devices"),
        ({"tensor": -1, "fsdp": -1}, "at most one"),
        ({"sequence": 0}, "positive sizes"),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**axes)


def test_a_mesh_of_some_devices():
    mesh = sharding.make_mesh(tensor=2, devices=jax.devices()[:2])
    assert mesh.size == 2


@pytest.mark.parametrize("name", list(TREES))
def test_every_parameter_of_every_model_has_a_place(name):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, sequence=2)
    placed = specs(sharding.shardings_for(tree(name), mesh))
    stacks = [
        path.removesuffix("/layers/mlp_norm/scale") for path in placed if "mlp_norm/s" in path
    ]
    assert stacks
    for stack in stacks:
        assert placed[f"{stack}/layers/mlp_norm/scale"] == P()
        up = functools.reduce(dict.__getitem__, f"{stack}/layers/mlp_up".split("/"), tree(name))
        if "kernels" in up:  # tests/test_squeezebert.py has more of these
            assert placed[f"{stack}/layers/mlp_up/kernels"] == P(
                None, "tensor", ("fsdp", "sequence")
            )
            continue
        layers = len(up["kernel"].shape) - 2
        assert placed[f"{stack}/layers/mlp_up/kernel"] == P(
            *[None] * layers, ("fsdp", "sequence"), "tensor"
        )


def test_where_parameters_lie():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = specs(sharding.shardings_for(tree("bert lsg masked_lm"), mesh))
    assert placed["encoder/layers/attention/query/kernel"] == P(None, "fsdp", "tensor")
    assert placed["encoder/layers/attention/query/bias"] == P(None, "tensor")
    assert placed["encoder/layers/attention/output/kernel"] == P(None, "tensor", "fsdp")
    assert placed["encoder/layers/attention/output/bias"] == P()
    # 13 words: the axis stays whole
    assert placed["encoder/embeddings/word_embeddings/embedding"] == P(None, "fsdp")


def test_optimizer_states_lie_as_their_parameters():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    params = tree("bert lsg sequence_classification")
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    placed = sharding.shardings_for(state, mesh)
    wanted = sharding.shardings_for(params, mesh)
    assert jax.tree.leaves(placed[0].mu) == jax.tree.leaves(wanted)
    assert placed[0].count.spec == P()


def test_an_unknown_parameter_is_named():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="encoder/layers/adapter/kernel"):
        leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)
        sharding.shardings_for({"encoder": {"layers": {"adapter": {"kernel": leaf}}}}, mesh)


def test_a_width_that_does_not_divide_is_named():
    mesh = sharding.make_mesh(fsdp=8)
    leaf = jax.ShapeDtypeStruct((2, 12, 8), jnp.float32)
    tree = {"layers": {"mlp_up": {"kernel": leaf}}}
    with pytest.raises(ValueError, match=r"fsdp=8 cannot split the width axis of layers/mlp_up"):
        sharding.shardings_for(tree, mesh)


@pytest.mark.parametrize("names", [("data",), ("rows",)])
def test_a_mesh_of_other_axes_is_refused(names):
    kind = jax.sharding.AxisType.Explicit if names == ("data",) else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), names, axis_types=(kind,))
    batch = {"input_ids": np.zeros((8, 16), np.int32)}
    with pytest.raises(ValueError, match=rf"axes {names[0]}=8, of the types .*make_mesh"):
        sharding.shard({"layers": {"mlp_up": {"bias": np.zeros(8)}}}, mesh)
    with pytest.raises(ValueError, match="make_mesh"):
        sharding.shard_batch(batch, mesh)
    with pytest.raises(ValueError, match="make_mesh"):
        sharding.check_batches(mesh, {"batch_size": 8}, [16], None)


def test_a_mesh_of_one_axis_is_enough():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding.check_batches(mesh, {"batch_size": 8}, [16], None)
    with pytest.raises(ValueError, match="data=8 cannot split evenly"):
        sharding.check_batches(mesh, {"batch_size": 4}, [16], None)


def test_models_refuse_inputs_on_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",))
    ids = jax.device_put(np.ones((8, 16), np.int32), jax.NamedSharding(mesh, P("data")))
    model = lsg_flax.Model(lsg_flax.EncoderConfig(vocab_size=9))
    with pytest.raises(ValueError, match=r"input_ids is sharded .* type Explicit, .*'data'"):
        jax.eval_shape(model.init, jax.random.key(0), ids)


def test_batches():
    mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2)
    batch = {"input_ids": np.zeros((8, 16), np.int32), "labels": np.zeros(8, np.int32)}
    placed = sharding.shard_batch(batch, mesh)
    assert placed["input_ids"].sharding.spec == P(("data", "fsdp"), "sequence")
    assert placed["labels"].sharding.spec == P(("data", "fsdp"))
    choices = {"input_ids": np.zeros((4, 3, 16), np.int32), "labels": np.zeros(4, np.int32)}
    assert sharding.shard_batch(choices, mesh)["input_ids"].sharding.spec == P(
        ("data", "fsdp"), None, "sequence"
    )
    several = {name: array.reshape(2, 4, *array.shape[1:]) for name, array in batch.items()}
    placed = sharding.shard_batch(several, mesh, microbatches=True)
    assert placed["input_ids"].sharding.spec == P(None, ("data", "fsdp"), "sequence")
    assert placed["labels"].sharding.spec == P(None, ("data", "fsdp"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((6, 16), r"6 rows, which data=2 x fsdp=2"), ((8, 15), r"15 tokens, which sequence=2")],
)
def test_batches_that_do_not_divide(shape, message):
    mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2)
    with pytest.raises(ValueError, match=message):
        sharding.shard_batch({"input_ids": np.zeros(shape, np.int32)}, mesh)


def test_constraints_do_nothing_without_a_mesh_and_skip_what_does_not_divide():
    x = jnp.ones((3, 8))
    assert sharding.constrain(x, "batch", "length") is x
    with jax.set_mesh(sharding.make_mesh(data=4, sequence=2)):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "length"))(x)
    assert y.sharding.spec == P(None, "sequence")


@pytest.mark.parametrize("checkpoint", ["bert_question_answering"])
def test_checkpoints_load_straight_into_shards(checkpoint, monkeypatch):
    model, params = lsg_flax.from_pretrained(GOLDEN / checkpoint)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    read = []
    part = hub.StoredTensor.__getitem__
    monkeypatch.setattr(
        hub.StoredTensor,
        "__getitem__",
        lambda self, index: read.append((self.shape, part(self, index).shape)) or part(self, index),
    )
    _, placed = lsg_flax.from_pretrained(GOLDEN / checkpoint, mesh=mesh)
    expected = sharding.shardings_for(params, mesh)
    for one, other, wanted in zip(*map(jax.tree.leaves, (params, placed, expected)), strict=True):
        assert other.sharding == wanted
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    wide = model.config.hidden_size, model.config.hidden_size
    assert {given for shape, given in read if shape == wide} == {(wide[0] // 2, wide[1] // 2)}


def test_parameters_are_drawn_straight_into_shards():
    model, _ = lsg_flax.from_pretrained(GOLDEN / "bert_masked_lm")
    mesh, ids = sharding.make_mesh(data=2, fsdp=4), np.zeros((1, 4), np.int32)

    def draw(key):
        return model.init(key, ids)["params"]

    placed = sharding.sharded_init(draw, jax.random.key(0), mesh=mesh)
    alone = jax.jit(draw)(jax.random.key(0))
    for one, other in zip(*map(jax.tree.leaves, (alone, placed)), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6, atol=1e-7)
    assert placed["encoder"]["layers"]["mlp_up"]["kernel"].sharding.spec == P(None, "fsdp")
