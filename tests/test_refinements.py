"""LoRA, averages, rates by layer and weights of classes: formulas, PyTorch's recorded numbers, and
meshes."""

import functools
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_training
from golden_data import GOLDEN
from test_training import NO_DROPOUT, QUIET, bits_equal, log_softmax, make, masked_lm_batch
from tiny_config import spelled
from tiny_run import tiny_writer

import lsg_flax
from lsg_flax import training
from lsg_flax.models import Model, ModelOutput, read_config
from lsg_flax.models.layers import Projection
from lsg_flax.sharding import make_mesh, shard, shard_batch, shardings_for
from lsg_flax.training import losses, optimizers
from lsg_flax.training.step import trained_params


def flat(tree) -> dict:
    return flax.traverse_util.flatten_dict(tree, sep="/")


# ------------------------------------------------------------------------------ weights of classes

WEIGHED = dict(np.load(GOLDEN / "class_weights.npz"))
NAMES = {"labels": ("a", "b", "c")}


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_weighted_loss_is_that_of_pytorch(monkeypatch, share):
    logits, labels, weights = (WEIGHED[name] for name in ("logits", "labels", "weights"))
    apply = lambda model, variables, **inputs: ModelOutput(**variables["params"])  # noqa: E731
    monkeypatch.setattr(Model, "apply", apply)
    model = Model(test_training.config(**NAMES), "token_classification")
    options = {"label_smoothing": share, "class_weights": weights.tolist()}
    batch = {"input_ids": np.ones(labels.shape, int), "labels": labels}
    compute = jax.value_and_grad(functools.partial(losses.loss_fn, **options), 1, has_aux=True)
    (loss, metrics), gradient = compute(model, {"logits": jnp.asarray(logits)}, batch)
    np.testing.assert_allclose(loss, WEIGHED[f"{share}/loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient["logits"], WEIGHED[f"{share}/gradient"], atol=1e-7)
    assert metrics["targets"] == (labels != -100).sum()


@pytest.mark.slow
def test_weights_count_over_microbatches_and_devices_as_in_one_batch():
    """The mean is over the weights of all labels, however they are spread."""
    sizes = {"hidden_size": 16, "vocab_size": 24} | NO_DROPOUT
    model, params = make("token_classification", **NAMES, **sizes)
    weights, share = (0.01, 0.02, 0.005), 0.1  # their sum over a microbatch is below 1
    batch = masked_lm_batch(rows=8)
    batch["labels"] = np.where(batch["labels"] == -100, -100, batch["input_ids"] % 3)
    rows = jax.jit(model.apply)({"params": params}, batch["input_ids"], batch["attention_mask"])
    scores, labels = log_softmax(rows.logits), batch["labels"]
    own = np.take_along_axis(scores, np.maximum(labels, 0)[..., None], -1)[..., 0]
    counts = np.where(labels == -100, 0.0, np.take(weights, np.maximum(labels, 0)))
    every = np.where(labels == -100, 0.0, scores @ np.array(weights) / 3)
    expected = -((1 - share) * counts * own + share * every).sum() / counts.sum()
    ends, options = [], {"label_smoothing": share, "class_weights": weights}
    for accumulate, axes in ((1, None), (4, None), (2, {"data": 2, "fsdp": 2, "tensor": 2})):
        step = training.make_train_step(model, test_training.SGD, accumulate, **options)
        mesh = axes and make_mesh(**axes)
        state = training.init_state(params, test_training.SGD, jax.random.key(0), mesh=mesh)
        micro = {n: a.reshape(accumulate, -1, *a.shape[1:]) for n, a in batch.items()}
        given = micro if accumulate > 1 else batch
        if mesh is None:
            state, metrics = step(state, given)
        else:
            with jax.set_mesh(mesh):
                state, metrics = step(state, shard_batch(given, mesh, microbatches=True))
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        ends.append(jax.device_get(state.params))
    for end in ends[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), end, ends[0])


@pytest.mark.parametrize(
    ("task", "weights", "message"),
    [
        (
            "token_classification",
            (1.0, 2.0),
            r"must be 3 numbers of at least 0, .* labels a, b, c, in",
        ),
        ("token_classification", (1.0, 2.0, -1.0), "must be 3 numbers of at least 0"),
        ("masked_lm", (1.0, 2.0, 3.0), "need labels with names"),
    ],
)
def test_weights_are_one_for_each_label(task, weights, message):
    model = Model(test_training.config(**NAMES), task)
    batch, compute = masked_lm_batch(), functools.partial(losses.loss_fn, class_weights=weights)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(compute, model), model.abstract_params(), batch)


# ------------------------------------------------------------------------------------------ LoRA

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
GLOBALS = "global_tokens_and_head"
HEAD_LEARNS = training.frozen_beside("^(shared|encoder|decoder)/")
LORA = training.LoRA(r=3, alpha=6.0, target_modules=("query", "attention/output", "mlp_up"))


def with_adapters(params, mesh=None):
    """Adapters that have learned something."""
    added = training.add_lora(params, LORA, jax.random.key(1), mesh=mesh)
    noise = lambda x: x + 0.3 * np.random.default_rng(x.size).normal(size=x.shape)  # noqa: E731
    moved = {p: noise(x) if p.endswith("_lora_b") else x for p, x in flat(added).items()}
    return flax.traverse_util.unflatten_dict(moved, sep="/")


def beside(next_function, arguments, keywords, context):
    """A projection's own result, and its adapters' added to it."""
    module, result = context.module, next_function(*arguments, **keywords)
    if not (isinstance(module, Projection) and context.method_name == "__call__"):
        return result
    if not module.has_variable("params", "kernel_lora_a"):
        return result
    a, b = (module.get_variable("params", f"kernel_lora_{part}") for part in "ab")
    given, taken = module.reads, module.writes.replace("d", "f")
    x = arguments[0] if module.act is None else module.act(arguments[0])
    return result + LORA.alpha / LORA.r * jnp.einsum(f"{given},dr,rf->{taken}", x, a, b)


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_what_is_saved_computes_what_the_adapters_do_beside_their_projections(tmp_path, family):
    if family == "bert":
        model, params = make("base")
        inputs = {"input_ids": masked_lm_batch()["input_ids"]}
    else:
        model, params = tiny_writer()
        model = Model(model.config, "base")
        params = {name: params[name] for name in ("shared", "encoder", "decoder")}
        inputs = {"input_ids": np.full((2, 9), 5), "decoder_input_ids": np.full((2, 7), 6)}
    params = with_adapters(params)

    def unmerged(params):
        with nn.intercept_methods(beside):
            return model.apply({"params": params}, **inputs).last_hidden_state

    expected = jax.jit(unmerged)(params)
    lsg_flax.save_pretrained(tmp_path, model, training.merge_lora(params))
    loaded, merged = lsg_flax.from_pretrained(tmp_path)
    found = jax.jit(loaded.apply)({"params": merged}, **inputs).last_hidden_state
    base = jax.jit(model.apply)({"params": params}, **inputs).last_hidden_state
    assert np.abs(expected - base).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_adapters_alone_learn_and_have_moments():
    model, params = make()
    optimizer = training.make_optimizer(0.01, total_steps=9, frozen=HEAD_LEARNS, ema_decay=0.9)
    start = training.add_lora(params, LORA, jax.random.key(1))
    assert all(x.any() == ("_lora_b" not in p) for p, x in flat(start).items() if "_lora_" in p)
    bits_equal(training.merge_lora(start), params)
    state, curve = test_training.run(model, start, optimizer, [masked_lm_batch()] * 3)
    assert curve[2]["loss"] < curve[0]["loss"]
    learns = {p for p in flat(start) if "_lora_" in p or p.startswith("head/")}
    moved = {p for p, x in flat(start).items() if not np.array_equal(x, flat(state.params)[p])}
    assert moved == learns and "lora_scaling/buffer" not in learns
    bytes_of = sum(x.nbytes for p, x in flat(start).items() if p in learns)
    kept = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert kept == 3 * bytes_of  # two moments and the average
    added = {p: x for p, x in flat(start).items() if "_lora_" in p}
    assert sum(x.size for x in added.values()) == 2 * 3 * (3 * (8 + 8) - 16 + (8 + 16))
    ended = flat(trained_params(state))
    assert ended.keys() == flat(params).keys()


def test_modules_that_do_not_exist_are_named_with_those_that_do():
    _, params = make()
    message = r"no 'q_proj'; give .*: attention/key, attention/output, attention/query, attent"
    with pytest.raises(ValueError, match=message):
        training.LoRA(target_modules=("query", "q_proj")).kernels(params)
    found = training.LoRA(target_modules=("decoder/layers/attention/value",)).kernels(
        tiny_writer()[1]
    )
    assert found == ["decoder/layers/attention/value/kernel"]


@pytest.mark.parametrize("family", ["squeezebert", "albert"])
def test_groups_and_shared_layers_are_cut_with_their_adapters(family):
    """Also where a group cannot be cut, and its features are."""
    config = read_config(spelled(family, SIZES))
    params = Model(config, "base").abstract_params()
    added = jax.eval_shape(lambda p: training.add_lora(p, LORA, jax.random.key(0)), params)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    arrays, places = flat(added), flat(shardings_for(added, mesh))
    shapes = {path: places[path].shard_shape(leaf.shape) for path, leaf in arrays.items()}
    paths = LORA.kernels(params)
    assert len(paths) == 3 and any(shapes[path] != arrays[path].shape for path in paths)
    for path in paths:
        kernel, a, b = (shapes[f"{path}{part}"] for part in ("", "_lora_a", "_lora_b"))
        assert (a[:-1], b[-1], b[:-2]) == (kernel[:-1], kernel[-1], kernel[:-2]), path


def test_what_learns_beside_adapters_is_what_train_only_says():
    given = {"model": "m", "task": "masked_lm", "train_data": "a", "output": "o", "lora_r": 2}
    paths = ["encoder/embeddings/global_embeddings/embedding", "head/bias", "pooler/dense/bias"]
    adapters = ["encoder/layers/mlp_up/kernel_lora_a", "decoder/layers/mlp_up/kernel_lora_b"]
    stay = ["encoder/layers/mlp_up/kernel", "shared/embedding", "lora_scaling/buffer"]
    for trained, learns in (("all", paths[1:]), ("head", paths[1:]), (GLOBALS, paths)):
        frozen = training.Settings(**given, train_only=trained).stays(trained)
        left = [p for p in (*paths, *adapters, *stay) if not re.search(str(frozen), p)]
        assert left == [*learns, *adapters]


@pytest.mark.slow
def test_adapters_and_averages_lie_as_what_they_are_of():
    model, params = make(hidden_size=16, vocab_size=24, **NO_DROPOUT)
    options = {"frozen": HEAD_LEARNS, "ema_decay": 0.9, "layerwise_lr_decay": 0.5}
    optimizer = training.make_optimizer(0.01, total_steps=6, **options)
    step, ends = training.make_train_step(model, optimizer), []
    for mesh in (None, make_mesh(data=2, fsdp=2, tensor=2)):
        own = params if mesh is None else shard(params, mesh)
        added = training.add_lora(own, LORA, jax.random.key(1), mesh=mesh)
        state = training.init_state(added, optimizer, jax.random.key(0), mesh=mesh)
        batches = training.BatchesAt(lambda number: masked_lm_batch(number, rows=8))
        fitted = training.fit(step, state, batches, steps=3, mesh=mesh, logging=QUIET)
        ends.append((fitted, trained_params(fitted[0])))
    ((_, one), alone), ((state, many), cut) = ends
    assert many[-1]["compilations"] == 1
    np.testing.assert_allclose([r["loss"] for r in many], [r["loss"] for r in one], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cut, alone)
    arrays = flat(state.params)
    for path in LORA.kernels(state.params):
        kernel = arrays[path].sharding.shard_shape(arrays[path].shape)
        parts = (arrays[f"{path}_lora_{part}"] for part in "ab")
        a, b = (part.sharding.shard_shape(part.shape) for part in parts)
        assert (a[:-1], a[-1], b[-1], b[-2]) == (kernel[:-1], LORA.r, kernel[-1], LORA.r)
        merged = flat(cut)[path]
        assert merged.sharding.shard_shape(merged.shape) == kernel != merged.shape
    averages = flat(optax.tree_utils.tree_get(state.opt_state, "averaged_params"))
    for path, leaf in averages.items():
        if not isinstance(leaf, optax.MaskedNode):
            assert leaf.sharding == arrays[path].sharding, path


# ------------------------------------------------------------------------- averages, rates by layer


def test_averages_follow_their_formula_and_leave_training_alone():
    model, params = make()
    options = {"total_steps": 20, "frozen": "^encoder/embeddings/"}
    kept = training.make_optimizer(0.05, ema_decay=0.4, **options)
    step = training.make_train_step(model, kept)
    state, expected = training.init_state(params, kept, jax.random.key(7)), dict(flat(params))
    for number in range(5):
        state, _ = step(state, masked_lm_batch(number))
        share = min(0.4, (1 + number) / (10 + number))
        for path, leaf in flat(state.params).items():
            expected[path] = share * expected[path] + (1 - share) * np.asarray(leaf)
    found = flat(trained_params(state))
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)
        assert (leaf == flat(state.params)[path]).all() == path.startswith("encoder/embeddings/")
    keeps, half = optimizers.average_params(0.4), {"a": jnp.ones(3, jnp.bfloat16)}
    updates, kept_state = keeps.update(half, keeps.init(half), half)
    assert updates is half and kept_state.averaged_params["a"].dtype == jnp.float32
    assert optimizers.averaged(half, kept_state)["a"].dtype == jnp.bfloat16


def test_layers_learn_at_rates_of_their_own():
    _, params = make()
    plain, decayed = (
        training.make_optimizer(0.1, total_steps=5, layerwise_lr_decay=decay)
        for decay in (None, 0.5)
    )
    gradients = jax.tree.map(jnp.ones_like, params)
    one, other = (flat(o.update(gradients, o.init(params), params)[0]) for o in (plain, decayed))
    for path, update in one.items():
        rate = np.float32(0.125 if "embeddings/" in path else 1.0)
        if "/layers/" in path:
            rate = np.float32([0.25, 0.5]).reshape(2, *[1] * (update.ndim - 1))
        np.testing.assert_allclose(other[path], update * rate, rtol=1e-6, err_msg=path)


def test_stacks_count_their_layers_and_a_reformer_has_no_order():
    sizes = {"encoder_layers": 3, "decoder_layers": 1}
    rates = flat(optimizers.layer_rates(tiny_writer(None, **sizes)[1], 0.5))
    found = {path: np.ravel(rates[f"{path}/layers/mlp_up/bias"]) for path in ("encoder", "decoder")}
    assert [list(x) for x in found.values()] == [[0.125, 0.25, 0.5], [0.5]]
    places = [rates[f"{path}/embeddings/layer_norm/bias"] for path in found]
    assert [*places, rates["shared/embedding"]] == [0.0625, 0.25, 0.0625]
    config = read_config(spelled("reformer", {}))
    with pytest.raises(ValueError, match=r"stacked by their kind of attention \(encoder/l\w+_lay"):
        optimizers.layer_rates(Model(config, "masked_lm").abstract_params(), 0.5)
    for name in ("layerwise_lr_decay", "ema_decay"):
        with pytest.raises(ValueError, match=rf"{name}=1.1 must be above 0 and at most 1"):
            training.make_optimizer(1.0, total_steps=2, **{name: 1.1}).init(make()[1])
