"""SqueezeBERT: BERT with zeros between the groups of its projections, none of which are
computed."""

import functools
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import spelled
from tiny_tokenizers import write_source

import lsg_flax
from lsg_flax import LSGConfig, hub, sharding, training
from lsg_flax.models import Model, read_config
from lsg_flax.planning.hlo import read_program
from lsg_flax.training.flops import train_flops

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
NAMES = ("q", "k", "v", "post_attention", "intermediate", "output")
OF = ("hidden_size",) * 4 + ("intermediate_size",) * 2
LSG = LSGConfig(block_size=4, sparse_block_size=4, num_global_tokens=2)


def config_of(groups, lsg=None, **fields):
    numbers = {f"{name}_groups": n for name, n in zip(NAMES, groups, strict=True)}
    return read_config(spelled("squeezebert", SIZES | numbers | fields)).with_overrides(lsg=lsg)


@functools.cache
def made(groups, lsg=None, task="masked_lm"):
    model = Model(config_of(groups, lsg), task)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    leaves, drawn = jax.tree.flatten(params)[0], np.random.default_rng(0)
    noise = [leaf + 0.2 * drawn.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return model, jax.tree.unflatten(jax.tree.structure(params), noise)


def batch(rows=4, length=27):
    drawn = np.random.default_rng(1)
    mask = np.arange(length) < drawn.integers(9, length + 1, (rows, 1))
    ids = drawn.integers(3, 23, (rows, length))
    labels = np.where(mask & (drawn.random(ids.shape) < 0.4), ids, -100)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, rows):
    return jax.value_and_grad(lambda p: training.loss_fn(model, p, rows)[0])(params)


def with_zeros(kernels):
    """[L, I, D/I, F/I] as one matrix a layer, [L, D, F]."""
    layers, groups, inputs, outputs = kernels.shape
    whole = np.zeros((layers, groups, inputs, groups, outputs), np.float32)
    for group in range(groups):
        whole[:, group, :, group] = kernels[:, group]
    return whole.reshape(layers, groups * inputs, groups * outputs)


@pytest.mark.parametrize("lsg", [None, LSG], ids=["plain", "lsg"])
def test_it_is_bert_with_zeros_between_the_groups(lsg):
    """BERT's LSG classes are compared with PyTorch's, which has none of SqueezeBERT."""
    model, params = made((2, 1, 4, 2, 8, 4), lsg)
    values = {n: v for n, v in model.config.to_dict().items() if "groups" not in n}
    bert = Model(read_config(values | {"model_type": "bert", "embedding_size": None}), model.task)
    leaves = flax.traverse_util.flatten_dict({k: v for k, v in params.items() if k != "pooler"})
    for path in [path for path in leaves if path[-1] == "kernels"]:
        leaves[*path[:-1], "kernel"] = with_zeros(np.asarray(leaves.pop(path)))
    rows = batch()
    loss, gradients = loss_and_gradients(model, params, rows)
    dense = flax.traverse_util.unflatten_dict(leaves)
    expected, expected_gradients = loss_and_gradients(bert, dense, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    found = flax.traverse_util.flatten_dict(gradients)
    for path, wanted in flax.traverse_util.flatten_dict(expected_gradients).items():
        wanted, grouped = np.asarray(wanted), (*path[:-1], "kernels")
        in_groups = path[-1] == "kernel" and grouped in found
        leaf = np.asarray(found[grouped if in_groups else path])
        if in_groups:  # of the zeros there are gradients in BERT alone
            wanted = wanted * with_zeros(np.ones(leaf.shape))
            leaf = with_zeros(leaf)
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-5, err_msg=str(path))


def test_the_layers_have_an_epsilon_of_their_own():
    model, params = made((4, 4, 4, 1, 4, 4), task="base")
    other = Model(model.config.with_overrides(layer_norm_eps=0.3))
    rows = batch()["input_ids"]

    @functools.partial(jax.jit, static_argnums=0)
    def states(model):
        return model.apply({"params": params}, rows, output_hidden_states=True).hidden_states

    embedded, changed = states(model)[0], states(other)[0]
    assert not np.allclose(embedded, changed, atol=1e-2)
    for state in (states(model)[-1], states(other)[-1]):  # of variance one: 0.3 would show
        norm = jax.tree.map(np.asarray, params["encoder"]["layers"]["mlp_norm"])
        normal = (np.asarray(state) - norm["bias"][-1]) / norm["scale"][-1]
        np.testing.assert_allclose(normal.std(axis=-1), 1.0, atol=1e-4)


# ---------------------------------------------------------------------------- what is computed

B, T, WIDE = 2, 16, {"hidden_size": 64, "intermediate_size": 128}


def compiled(groups):
    model = Model(config_of(groups, **WIDE, num_hidden_layers=1))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def forward(params, ids):
        return model.apply({"params": params}, ids).last_hidden_state

    return jax.jit(forward).lower(model.abstract_params(), ids).compile()


def matrix_flops(groups):
    """Of one layer: two per weight that is no zero and token, and four of attention."""
    hidden, wide = WIDE.values()
    weights = [hidden * hidden] * 4 + [hidden * wide] * 2
    shares = sum(size / n for size, n in zip(weights, groups, strict=True))
    return 2 * B * T * shares + 4 * B * T * T * hidden


def test_no_zeros_are_computed():
    whole, groups = (1,) * 6, (4, 2, 8, 2, 16, 4)
    programs = {n: compiled(n) for n in (whole, groups)}
    for numbers, program in programs.items():
        assert read_program(program.as_text()).flops == matrix_flops(numbers)
    counted = {n: program.cost_analysis()["flops"] for n, program in programs.items()}
    saved = matrix_flops(whole) - matrix_flops(groups)
    # It counts the other work too, which fuses a little otherwise.
    np.testing.assert_allclose(counted[whole] - counted[groups], saved, rtol=0.03)
    assert matrix_flops(groups) <= counted[groups] < matrix_flops(whole) / 2


def test_a_training_step_counts_the_weights_that_there_are():
    model, params = made((2, 1, 4, 2, 8, 4), task="base")
    rows = {"input_ids": np.full((2, 8), 5)}
    weights = 2 * (256 / 2 + 256 + 256 / 4 + 256 / 2 + 512 / 8 + 512 / 4)
    assert train_flops(model, rows) == 2 * 8 * (6 * weights + 12 * 2 * 16 * 8)
    kernels = flax.traverse_util.flatten_dict(params["encoder"]["layers"])
    assert sum(leaf.size for path, leaf in kernels.items() if path[-1] == "kernels") == weights


# ---------------------------------------------------------------------------- over devices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ((4, 4, 4, 1, 4, 4), {"data": 2, "tensor": 4}),
        ((2, 2, 2, 1, 2, 2), {"data": 2, "tensor": 4}),  # groups are cut within
        ((4, 2, 4, 2, 4, 4), {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(groups, axes):
    model, params = made(groups, LSG)
    rows = batch(length=48)
    loss, gradients = loss_and_gradients(model, params, rows)
    mesh = sharding.make_mesh(**axes)
    with jax.set_mesh(mesh):
        placed = sharding.shard(params, mesh), sharding.shard_batch(rows, mesh)
        found, found_gradients = loss_and_gradients(model, *placed)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradients, found_gradients)), strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-5, atol=1e-5)


def test_groups_lie_over_tensor_where_it_divides_them():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model, _ = made((4, 4, 4, 1, 4, 4))
    layers = sharding.shardings_for(model.abstract_params(), mesh)["encoder"]["layers"]
    spec = {
        name: tuple(part["kernels"].spec)
        for name, part in (layers["attention"] | layers).items()
        if "kernels" in part
    }
    assert {spec[name] for name in ("query", "key", "value", "mlp_up")} == {
        (None, "tensor", "fsdp")  # the outputs of a group stay together
    }
    assert spec["mlp_down"] == (None, "tensor", None, "fsdp")
    assert spec["output"] == (None, None, "tensor", "fsdp")  # one group: its inputs are cut
    with pytest.raises(
        ValueError, match=r"tensor=8 cannot split the heads axis of .*attention/key/kernels"
    ):
        narrow = Model(config_of((4, 4, 4, 1, 4, 4))).abstract_params()
        sharding.shardings_for(narrow, sharding.make_mesh(tensor=8))


# ---------------------------------------------------------------------------- folders


def test_its_lsg_checkpoints_are_ours_alone(tmp_path):
    source = write_source(tmp_path / "plain", "squeezebert")
    options = {"max_sequence_length": 80, "block_size": 8, "sparse_block_size": 8}
    model, params = lsg_flax.convert_checkpoint(source, tmp_path / "long", **options)
    values = json.loads((tmp_path / "long" / "config.json").read_text())
    named = (values["model_type"], values["architectures"], "auto_map" in values)
    assert named == ("lsg-squeezebert", ["LSGSqueezeBertForMaskedLM"], False)
    assert "PyTorch has no LSG attention for it" in hub.in_pytorch(
        hub.open_checkpoint(tmp_path / "long")
    )
    back, again = lsg_flax.from_pretrained(tmp_path / "long")
    assert (back.task, back.config.lsg, back.max_length) == ("masked_lm", model.config.lsg, 80)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    lsg_flax.save_pretrained(tmp_path / "saved", back, again)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == values
    plain, _ = lsg_flax.from_pretrained(source)
    assert hub.config_values(plain)["model_type"] == "squeezebert"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_groups": 5}, "q_groups=5 does not divide hidden_size=16, .* such as 1"),
        ({"k_groups": 6}, "k_groups=6 does not divide hidden_size=16, .* such as 2"),
        ({"v_groups": 0}, "v_groups=0 does not divide hidden_size=16, .* such as 4"),
        ({"post_attention_groups": 3}, "post_attention_groups=3 does not divide hidden_size=16"),
        (
            {"output_groups": 16, "intermediate_size": 24},
            "output_groups=16 .*intermediate_size=24, .* as 8",
        ),
        ({"intermediate_groups": "4"}, "intermediate_groups='4' must be a whole number"),
        ({"embedding_size": 8}, "embedding_size=8 must equal hidden_size=16, .* embedding_size=16"),
        ({"is_decoder": True}, "is_decoder=True in config.json changes what the model computes"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        read_config(spelled("squeezebert", SIZES | fields))


def test_what_a_config_leaves_out_is_what_pytorch_takes():
    config = read_config({"model_type": "squeezebert"})
    shapes = Model(config).abstract_params()["encoder"]["layers"]
    assert shapes["attention"]["key"]["kernels"].shape == (12, 4, 192, 192)
    assert shapes["attention"]["output"]["kernels"].shape == (12, 1, 768, 768)
    assert shapes["mlp_up"]["kernels"].shape == (12, 4, 192, 768)
    with pytest.raises(ValueError, match=r"embedding_size=768 must equal hidden_size=512"):
        read_config({"model_type": "squeezebert", "hidden_size": 512})
