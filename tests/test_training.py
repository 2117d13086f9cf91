"""Losses against PyTorch's recorded ones and formulas in numpy; the step, the optimizer,
checkpoints and the loop on a tiny model."""

import contextlib
import functools
import gc
import json
import math
import pathlib
import resource
import shutil
import subprocess
import sys

import flax.traverse_util
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import GOLDEN, cases, load
from tensorboardX.proto.event_pb2 import Event
from tiny_run import tiny_writer

import lsg_flax
from lsg_flax import LSGConfig, training
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.models import TASKS, EncoderConfig, Model, ModelOutput
from lsg_flax.sharding import make_mesh, shard, shard_batch
from lsg_flax.training import flops, log, losses, metrics, optimizers
from lsg_flax.training import states as checkpoints

HERE = pathlib.Path(__file__).parent

WITH_LOSS = [
    n
    for n in cases("model")
    if "loss" in load(n)[2] and ("causal_lm" not in n or "_norm_" in n)  # one sparsity suffices
]


def config(**overrides):
    sizes = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    rest = {"num_attention_heads": 2, "max_position_embeddings": 32}
    return EncoderConfig(**sizes | rest | overrides)


@functools.cache
def make(task="masked_lm", **overrides):
    """Full attention by default: training knows nothing of the attention, and it compiles fast."""
    model = Model(config(**overrides), task)
    ids = np.zeros((1, 3), np.int32)
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"]


loss_fn = jax.jit(losses.loss_fn, static_argnums=0)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def random_batch(seed=0, rows=4, length=13, **labels):
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 23, (rows, length))
    mask = np.arange(length) < generator.integers(5, length + 1, (rows, 1))
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32)} | labels


def masked_lm_batch(seed=0, rows=4):
    batch = random_batch(seed, rows)
    chosen = np.random.default_rng(seed + 1).random(batch["input_ids"].shape)
    some = chosen < np.linspace(0.1, 0.9, rows)[:, None]  # rows count differently
    return batch | {"labels": np.where(some, batch["input_ids"], -100)}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def bits_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", WITH_LOSS)
def test_loss_is_that_of_pytorch(name):
    case, inputs, outputs = load(name)
    model, params = lsg_flax.from_pretrained(GOLDEN / case["checkpoint"], **case.get("config", {}))
    batch = {name: array for name, array in inputs.items() if not name.startswith("weight_")}
    loss, metrics = loss_fn(model, params, batch)
    np.testing.assert_allclose(loss, outputs["loss"], rtol=1e-5, atol=1e-5)
    assert metrics["tokens"] == inputs["attention_mask"].sum()


def test_every_loss_is_recorded():
    recorded = {load(name)[0]["checkpoint"].split("_", 1)[1] for name in WITH_LOSS}
    assert recorded - {name for name in recorded if name.startswith("plain_")} == {
        task.name for task in TASKS.values() if task.targets
    }  # tests/test_families.py has those of other families


SMOOTHED = dict(np.load(GOLDEN / "label_smoothing.npz"))


@pytest.mark.parametrize("name", [key[:-5] for key in SMOOTHED if key.endswith("/loss")])
def test_smoothed_loss_is_that_of_transformers(name):
    """And of an encoder-decoder a gradient; it got its decoder's inputs from the labels."""
    case, inputs, _ = load(name)
    model, params = lsg_flax.from_pretrained(GOLDEN / case["checkpoint"])
    smoothed = functools.partial(losses.loss_fn, label_smoothing=float(SMOOTHED["epsilon"]))
    wanted = SMOOTHED.get(f"{name}/gradient")
    if wanted is None:
        loss, _ = jax.jit(smoothed, static_argnums=0)(model, params, inputs)
    else:
        compute = jax.jit(jax.value_and_grad(smoothed, 1, has_aux=True), static_argnums=0)
        (loss, _), gradient = compute(model, params, inputs)
        tensors = params_to_torch(gradient, model)
        ours = tensors["model.decoder.layers.1.final_layer_norm.weight"]
        np.testing.assert_allclose(ours, wanted, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(loss, SMOOTHED[f"{name}/loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "labels", "share"),
    [
        ("question_answering", {"start_positions": [1] * 4, "end_positions": [2] * 4}, 0.1),
        ("sequence_classification", {"labels": np.ones((4, 2), np.float32)}, 0.1),
        ("masked_lm", {"labels": np.ones((4, 13), int)}, 1.0),
        ("masked_lm", {"labels": np.ones((4, 13), int)}, -0.1),
    ],
)
def test_only_labels_that_are_classes_are_smoothed(task, labels, share):
    model, params = make(task)
    batch = random_batch(**{name: np.asarray(array) for name, array in labels.items()})
    with pytest.raises(ValueError, match=f"label_smoothing={share} must be at least 0 and below 1"):
        jax.eval_shape(
            functools.partial(losses.loss_fn, model, label_smoothing=share), params, batch
        )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"tensor": 2, "sequence": 2}])
def test_a_mesh_gives_an_encoder_decoder_the_loss_and_gradients_of_one_device(mesh):
    model, params = tiny_writer(max_position_embeddings=64)
    generator = np.random.default_rng(0)
    batch = {"input_ids": generator.integers(4, 31, (8, 64))}
    batch["attention_mask"] = (np.arange(64) < generator.integers(20, 65, (8, 1))).astype(np.int32)
    labels = generator.integers(4, 31, (8, 10))
    batch["labels"] = np.where(np.arange(10) < generator.integers(3, 11, (8, 1)), labels, -100)
    smoothed = functools.partial(losses.loss_fn, label_smoothing=0.1)
    compute = jax.jit(jax.value_and_grad(smoothed, 1, has_aux=True), static_argnums=0)
    (loss, _), gradients = compute(model, params, batch)
    made = make_mesh(data=2, **mesh)
    with jax.set_mesh(made):
        (found, _), ours = compute(model, shard(params, made), shard_batch(batch, made))
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), ours, gradients
    )


def test_labels_are_as_long_as_given_decoder_inputs():
    model, params = lsg_flax.from_pretrained(GOLDEN / "bart_conditional_generation")
    ids = np.full((2, 7), 5)
    batch = {"input_ids": ids, "labels": ids[:, :4], "decoder_input_ids": ids[:, :5]}
    with pytest.raises(ValueError, match=r"labels .*\(2, 4\).* as long as decoder_input_ids, or"):
        jax.eval_shape(functools.partial(losses.loss_fn, model), params, batch)


@pytest.fixture
def given_logits(monkeypatch):
    """Models whose outputs are their parameters."""

    def apply(model, variables, **inputs):
        return ModelOutput(**jax.tree.map(jnp.asarray, variables["params"]))

    monkeypatch.setattr(Model, "apply", apply)


def random_logits(*shape):
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@pytest.mark.usefixtures("given_logits")
def test_answer_positions_beyond_the_end_do_not_count():
    model, start, end = Model(config(), "question_answering"), *random_logits(2, 4, 13)
    positions = {"start_positions": np.array([3, 13, 0, -1]), "end_positions": np.full(4, 99)}
    batch = random_batch(**positions)
    loss, metrics = losses.loss_fn(model, {"start_logits": start, "end_logits": end}, batch)
    scores = log_softmax(start)
    expected = -(scores[0, 3] + scores[2, 0] + scores[3, 0]) / 3 / 2  # PyTorch clamps -1 to 0
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["targets"] == 3


@pytest.mark.usefixtures("given_logits")
@pytest.mark.parametrize(("task", "ahead"), [("masked_lm", 0), ("causal_lm", 1)])
def test_language_model_formulas(task, ahead):
    batch, logits = masked_lm_batch(), random_logits(4, 13, 23)
    labels = batch["labels"][:, ahead:]
    scores = log_softmax(logits)[:, : labels.shape[1]]
    picked = np.take_along_axis(scores, np.maximum(labels, 0)[..., None], -1)[..., 0]
    loss, metrics = losses.loss_fn(Model(config(), task), {"logits": logits}, batch)
    np.testing.assert_allclose(loss, -picked[labels != -100].mean(), rtol=1e-5)
    assert metrics["targets"] == (labels != -100).sum()


@pytest.mark.usefixtures("given_logits")
@pytest.mark.parametrize(
    ("labels", "count", "problem", "expected"),
    [
        (np.zeros(2, np.int32), 2, None, "single_label_classification"),
        (np.zeros((2, 2), np.float32), 2, None, "multi_label_classification"),
        (np.zeros(2, np.float32), 1, None, "regression"),
        (np.zeros((2, 3), np.float32), 3, "regression", "regression"),
    ],
)
def test_problem_type_as_hugging_face_infers_it(labels, count, problem, expected):
    settings = config(labels=tuple(map(str, range(count))), problem_type=problem)
    assert losses.problem_type(settings, labels.dtype) == expected
    logits = random_logits(2, count)
    by_hand = {
        "single_label_classification": -log_softmax(logits)[:, 0].mean(),
        "multi_label_classification": np.log1p(np.exp(logits)).mean(),  # all targets are 0
        "regression": (logits**2).mean(),
    }
    model = Model(settings, "sequence_classification")
    loss, _ = losses.loss_fn(model, {"logits": logits}, random_batch(rows=2, labels=labels))
    np.testing.assert_allclose(loss, by_hand[expected], rtol=1e-5)


def test_labels_that_do_not_count_and_labels_that_cannot_be():
    logits = jnp.ones((2, 3))
    assert losses.cross_entropy_sum(logits, jnp.array([-100, -100])) == 0
    for wrong in (3, -1):
        assert np.isnan(losses.cross_entropy_sum(logits, jnp.array([wrong, 0])))
    batch = random_batch(labels=np.full((4, 13), -100))
    model, params = make()
    _, (metrics,) = run(model, params, SGD, [batch])
    assert metrics["loss"] == metrics["update_norm"] == 0


@pytest.mark.usefixtures("given_logits")
def test_an_answer_that_is_neither_yes_nor_no_gives_nan():
    """ELECTRA's question per token: replaced or not."""
    model = Model(config(model_type="electra", embedding_size=8), "pretraining")
    for answer, finite in ((1, True), (-100, True), (2, False), (-1, False)):
        batch = random_batch(labels=np.full((4, 13), answer))
        loss, _ = losses.loss_fn(model, {"logits": random_logits(4, 13)}, batch)
        assert bool(np.isfinite(loss)) == finite, answer


@pytest.mark.usefixtures("given_logits")
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (random_batch(), r"missing: \['labels'\]"),
        (random_batch(labels=np.zeros(4, int), label=1), r"unknown: \['label'\]"),
        (random_batch(labels=np.zeros((4, 13))), "must be integers, got float"),
        (random_batch(labels=np.zeros((4, 5), int)), r"shape \(4, 5\).* labels of shape \(4, 13\)"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    model = Model(config(), "token_classification")
    with pytest.raises(ValueError, match=message):
        losses.loss_fn(model, {"logits": random_logits(4, 13, 2)}, batch)


def test_the_base_model_has_no_loss():
    with pytest.raises(ValueError, match=r"'base' has no loss; train one of .*masked_lm"):
        losses.loss_fn(Model(config(), "base"), {}, random_batch())


train_step = functools.cache(training.make_train_step)
SGD = optax.sgd(0.5)


def run(model, params, optimizer, batches, accumulate_steps=1):
    step = train_step(model, optimizer, accumulate_steps)
    state, curve = training.init_state(params, optimizer, jax.random.key(7)), []
    for batch in batches:
        state, metrics = step(state, batch)
        curve.append(metrics)
    return state, curve


def test_accumulation_equals_one_big_batch():
    model, params = make(**NO_DROPOUT)
    optimizer = SGD  # linear in the gradients, so that their differences are not hidden
    batch = masked_lm_batch(rows=6)
    micro = {name: array.reshape(3, 2, *array.shape[1:]) for name, array in batch.items()}
    (whole, (one,)), (parts, (three,)) = (
        run(model, params, optimizer, [batch]),
        run(model, params, optimizer, [micro], accumulate_steps=3),
    )
    for name in one:
        np.testing.assert_allclose(one[name], three[name], rtol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        whole.params,
        parts.params,
    )
    with pytest.raises(ValueError, match=r"accumulate_steps=2 every array must be \[2, batch"):
        run(model, params, optimizer, [micro], accumulate_steps=2)


def test_dropout_differs_by_step_and_repeats_by_key():
    model, params = make()
    step, seen = train_step(model, SGD), []
    for number in (0, 0, 1):
        state = training.init_state(params, SGD, jax.random.key(7))
        seen.append(step(state.replace(step=jnp.int32(number)), masked_lm_batch())[1]["loss"])
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.slow
def test_remat_changes_memory_only():
    model, params = make(**NO_DROPOUT)
    optimizer, batches = SGD, [masked_lm_batch(rows=6)]
    state, _ = run(model, params, optimizer, batches)
    full, _ = run(model.clone(remat="full"), params, optimizer, batches)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        state.params,
        full.params,
    )


@pytest.mark.parametrize("lsg", [None, LSGConfig(block_size=8, sparse_block_size=8)])
def test_what_a_layer_keeps_for_the_backward_pass(lsg):
    """Eleven arrays of [tokens, width], four of them for the wide projection: its input, and what
    products and attention gave. Padded copies, representatives and norms are made again."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    model = Model(config(lsg=lsg, max_position_embeddings=512, **sizes), "masked_lm")
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example_inputs()))
    batch = random_batch(rows=1, length=512, labels=np.zeros((1, 512), int))

    def pullback(params):
        loss = functools.partial(losses.loss_fn, model, batch=batch, dropout_key=jax.random.key(0))
        return jax.vjp(lambda params: loss(params)[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, params["params"]))
    arrays = [x.shape for x in kept if x.shape[:1] == (3,) and x.size >= 3 * 512 * 64]
    assert round(sum(map(np.prod, arrays)) / (3 * 512 * 64), 1) == 11.0, arrays


def test_frozen_parameters_keep_every_bit():
    model, params = make()
    optimizer = training.make_optimizer(0.01, total_steps=10, frozen="^encoder/embeddings/")
    state, _ = run(model, params, optimizer, [masked_lm_batch()] * 3)
    before, after = (flax.traverse_util.flatten_dict(p, sep="/") for p in (params, state.params))
    for path, leaf in before.items():
        same = np.array_equal(leaf, after[path])
        assert same == path.startswith("encoder/embeddings/"), path
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    trained = [x for path, x in before.items() if not path.startswith("encoder/embeddings/")]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in trained)
    for pattern, number in (("embedings", "no"), ("", "every")):
        with pytest.raises(ValueError, match=f"matches {number} parameter"):
            training.make_optimizer(1e-3, total_steps=2, frozen=pattern).init(params)


def test_optimizer_schedule_clipping_and_decay():
    params = {
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
    }
    optimizer = training.make_optimizer(1.0, total_steps=10, warmup_steps=4, weight_decay=0.5)
    opt_state, sizes = optimizer.init(params), []
    update, zero = jax.jit(optimizer.update), jax.tree.map(jnp.zeros_like, params)
    for _ in range(11):
        updates, opt_state = update(zero, opt_state, params)
        assert not np.any(updates["dense"]["bias"]) and not np.any(updates["norm"]["scale"])
        sizes.append(-updates["dense"]["kernel"][0, 0] / 0.5)
    expected = [*np.arange(4) / 4, *(np.arange(10, 3, -1) - 4) / 6]
    np.testing.assert_allclose(sizes, expected, atol=1e-6)
    clipped, free = (
        training.make_optimizer(1.0, total_steps=2, max_grad_norm=n) for n in (1.0, None)
    )
    big = jax.tree.map(lambda p: 100 * p, params)
    states = [jax.jit(o.update)(big, o.init(params), params)[1] for o in (clipped, free)]
    norms = [optax.tree.norm(optax.tree_utils.tree_get(state, "mu")) for state in states]
    np.testing.assert_allclose(norms, [0.1, 10 * math.sqrt(8)], rtol=1e-5)
    with pytest.raises(ValueError, match=r"warmup_steps=5 must be in 0\.\.4"):
        training.make_optimizer(1.0, total_steps=5, warmup_steps=5)


def batch_at(number):
    return masked_lm_batch(seed=number)


ADAMW = training.make_optimizer(0.01, total_steps=6, warmup_steps=1)


QUIET = training.Logging(progress=False)


def fit(folder, steps, batches=batch_at, *, evaluation=None, logging=QUIET, **saving):
    model, params = make()
    state, step = training.init_state(params, ADAMW, jax.random.key(1)), train_step(model, ADAMW)
    records = {"evaluation": evaluation, "logging": logging}
    if folder is not None:
        records["saving"] = training.Saving(folder, **{"every": 2} | saving)
    return training.fit(step, state, training.BatchesAt(batches), steps=steps, **records)


@pytest.mark.slow
def test_a_resumed_run_repeats_the_curve_bit_for_bit(tmp_path):
    state, history = fit(tmp_path / "whole", 6)
    _, begun = fit(tmp_path / "parts", 3)
    resumed, rest = fit(tmp_path / "parts", 6)
    assert [record["step"] for record in begun + rest] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in history] == [r["loss"] for r in begun + rest]
    bits_equal(state, resumed)
    assert training.saved_steps(tmp_path / "whole") == [2, 4, 6]
    assert training.saved_steps(tmp_path / "parts") == [3, 4, 6]  # the last three
    params = make()[1]
    other = training.init_state(params, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match="of another model or optimizer"):
        training.restore_state(tmp_path / "whole", other)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; .* \[2, 4, 6\]"):
        training.restore_state(tmp_path / "whole", state, step=5)
    with pytest.raises(ValueError, match="already has a checkpoint of step 6"):
        training.save_state(tmp_path / "whole", state)


def test_fit_evaluates_and_needs_what_it_is_asked_for(tmp_path):
    def evaluate(state):
        return {"seen": int(state.step)}

    _, history = fit(None, 5, evaluation=training.Evaluation(evaluate, every=2))
    assert [record.get("seen") for record in history] == [None, 2, None, 4, 5]
    with pytest.raises(ValueError, match="best='seen' needs evaluation, which computes it"):
        fit(tmp_path, 5, best="seen")
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        fit(tmp_path, 5, keep=0)


def test_a_nan_names_its_step_and_is_not_saved(tmp_path):
    def broken(number):
        batch = batch_at(number)
        return batch | {"labels": batch["labels"] * 0 - 1} if number == 3 else batch

    with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
        fit(tmp_path, 6, broken)
    assert training.saved_steps(tmp_path) == [2]


def test_schedules_follow_their_formulas():
    warm = [0, 0.5]
    rest = np.arange(5) / 5
    expected = {
        "linear": [*warm, *(1 - rest), 0],
        "cosine": [*warm, *((1 + np.cos(np.pi * rest)) / 2), 0],
        "constant": [*warm, *np.ones(6)],
    }
    for schedule, rates in expected.items():
        rate = optimizers.make_schedule(1.0, total_steps=7, warmup_steps=2, schedule=schedule)
        np.testing.assert_allclose([rate(step) for step in range(8)], rates, atol=1e-6)
    with pytest.raises(ValueError, match="schedule='square' must be one of linear, cosine"):
        optimizers.make_schedule.__wrapped__(1.0, total_steps=7, schedule="square")


@pytest.mark.slow
def test_bfloat16_computes_and_float32_remembers():
    model, params = make(**NO_DROPOUT)
    batches = [masked_lm_batch(rows=6)] * 4
    _, curve = run(model, params, ADAMW, batches)
    state, low = run(model.clone(dtype=jnp.bfloat16), params, ADAMW, batches)
    kinds = {x.dtype for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim}
    assert kinds == {jnp.dtype("float32")}
    np.testing.assert_allclose([m["loss"] for m in low], [m["loss"] for m in curve], rtol=2e-2)
    assert low[0]["loss"] != curve[0]["loss"]


MESHES = {
    "data": {"data": 8},
    "mixed": {"fsdp": 4, "tensor": 2},
    "accumulated": {"data": 2, "fsdp": 2, "tensor": 2},
}


def mesh_config():
    """Sizes that the meshes divide."""
    return make(hidden_size=16, vocab_size=24, **NO_DROPOUT)


def fit_on(sizes, folder, steps, accumulate=1, scored=None):
    model, params = mesh_config()
    mesh = sizes and make_mesh(**sizes)
    state = training.init_state(params, ADAMW, jax.random.key(1), mesh=mesh)

    def batch(number):
        whole = masked_lm_batch(seed=number, rows=16)
        if accumulate == 1:
            return whole
        return {n: a.reshape(accumulate, -1, *a.shape[1:]) for n, a in whole.items()}

    def evaluate(state):
        return metrics.evaluate(model, state.params, scored, mesh=mesh)

    return training.fit(
        train_step(model, ADAMW, accumulate),
        state,
        training.BatchesAt(batch),
        steps=steps,
        mesh=mesh,
        microbatches=accumulate > 1,
        evaluation=scored and training.Evaluation(evaluate),
        saving=folder and training.Saving(folder),
        logging=QUIET,
    )


@pytest.mark.slow
def test_another_mesh_goes_on(tmp_path):
    _, expected = fit_on(None, tmp_path / "one", 4)
    _, begun = fit_on(MESHES["data"], tmp_path / "two", 2)
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    held_out = [(masked_lm_batch(rows=16), np.arange(16))]
    ends = [
        fit_on(MESHES["mixed"], tmp_path / "two", 4, scored=held_out),
        fit_on(None, tmp_path / "three", 4, scored=held_out),
    ]
    scores = [rest[-1]["eval_perplexity"] for _, rest in ends]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    assert all(record["compilations"] == 1 for record in begun)
    for _, rest in ends:
        losses_ = [record["loss"] for record in [*begun, *rest]]
        np.testing.assert_allclose(losses_, [r["loss"] for r in expected], rtol=1e-5)
        assert [record["step"] for record in rest] == [3, 4]
    kernel = ends[0][0].params["encoder"]["layers"]["mlp_up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 8)  # layers, width / 4, mlp / 2
    _, accumulated = fit_on(MESHES["accumulated"], None, 3, accumulate=4)
    np.testing.assert_allclose(
        [r["loss"] for r in accumulated], [r["loss"] for r in expected[:3]], rtol=1e-5
    )


class Dice:
    """Batches without a place."""

    def __iter__(self):
        return map(batch_at, range(3))


def test_batches_need_a_place_and_must_suffice(tmp_path):
    model, params = make()
    step = train_step(model, ADAMW)

    def run_on(batches, saving=None):
        state = training.init_state(params, ADAMW, jax.random.key(1))
        return training.fit(step, state, batches, steps=4, saving=saving, logging=QUIET)

    with pytest.raises(ValueError, match=r"have no get_state\(\) and set_state\(\)"):
        run_on(Dice(), training.Saving(tmp_path))
    with pytest.raises(ValueError, match="the batches ended before step 4 of 4"):
        run_on(Dice())


@pytest.mark.slow
def test_grain_goes_on_where_it_was(tmp_path):
    def batches():
        data = grain.MapDataset.range(6).shuffle(seed=3).map(batch_at)
        return data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))

    model, params = make()

    def run_to(folder, steps):
        state = training.init_state(params, ADAMW, jax.random.key(1))
        options = {"steps": steps, "saving": training.Saving(folder), "logging": QUIET}
        return training.fit(train_step(model, ADAMW), state, batches(), **options)

    whole, expected = run_to(tmp_path / "whole", 6)
    _, begun = run_to(tmp_path / "parts", 3)
    resumed, rest = run_to(tmp_path / "parts", 6)
    assert [r["loss"] for r in begun + rest] == [r["loss"] for r in expected]
    bits_equal(whole, resumed)


def test_settings_of_the_run_must_be_the_same(tmp_path):
    settings = {"task": "masked_lm", "optimizer": {"learning_rate": 0.01}, "buckets": (16, 32)}
    fit(tmp_path, 2, settings=settings)
    assert json.loads((tmp_path / "run.json").read_text())["buckets"] == [16, 32]
    fit(tmp_path, 3, settings=settings)
    other = settings | {"optimizer": {"learning_rate": 0.1}, "seed": 1}
    message = r"optimizer.learning_rate: 0.01 then, 0.1 now; seed: \(not set\) then, 1 now.*new run"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, 4, settings=other)
    more = settings | {"steps": 9, "seed": 1}
    with pytest.raises(ValueError, match=r"other settings: seed: \(not set\) then, 1 now\. R"):
        checkpoints.check_settings(tmp_path, more, follows=("steps",))
    with pytest.raises(ValueError, match=r"settings: seed: .*; steps: \(not set\) then, 9 now"):
        checkpoints.check_settings(tmp_path, more, follows=("steps", "seed"))
    (tmp_path / "new").mkdir()
    for value in (1, 2):  # nothing is saved yet, so nothing holds a run to its first settings
        checkpoints.check_settings(tmp_path / "new", {"seed": value})
        assert json.loads((tmp_path / "new" / "run.json").read_text()) == {"seed": value}
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoints of steps \[2, 3\] but no run.json"):
        fit(tmp_path, 4, settings=settings)


def test_the_best_checkpoint_stays(tmp_path):
    def evaluate(state):
        return {"eval_loss": abs(int(state.step) - 2.0)}

    options = {"evaluation": training.Evaluation(evaluate, every=1), "every": 1, "keep": 2}
    fit(tmp_path, 6, best="eval_loss", mode="min", **options)
    assert training.saved_steps(tmp_path) == [2, 5, 6]
    assert checkpoints.best_step(tmp_path, "eval_loss", mode="min") == 2
    with pytest.raises(FileNotFoundError, match=r"metric 'f1'; its steps are \[2, 5, 6\]"):
        checkpoints.best_step(tmp_path, "f1")
    with pytest.raises(ValueError, match="best='f1' is not among the metrics"):
        fit(tmp_path / "other", 2, best="f1", **options)


@pytest.mark.slow
def test_saving_goes_on_beside_training(tmp_path):
    """The state is donated to the next step while it is written: what is read is what it was."""
    model, params = make(hidden_size=64, intermediate_size=512)
    step, state = train_step(model, SGD), training.init_state(params, SGD, jax.random.key(7))
    with checkpoints.Checkpoints(training.Saving(tmp_path, keep=9)) as folder:
        expected = []
        for number in range(3):
            state, _ = step(state, batch_at(number))
            folder.save(state, data=number)
            expected.append(jax.tree.map(lambda x: x + 0 if x.ndim else x.copy(), state.params))
    for number, params in enumerate(expected, 1):
        saved, place = checkpoints.restore(tmp_path, state, step=number)
        bits_equal(saved.params, params)
        assert place == number - 1


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    _, params = make(hidden_size=64, intermediate_size=512)
    state = training.init_state(params, SGD, jax.random.key(7))
    training.save_state(tmp_path, state.replace(step=jnp.int32(1)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # files cannot grow any more
    try:
        with pytest.raises(checkpoints.SaveError, match=r"step 2 could not .* steps \[1\] there"):
            training.save_state(tmp_path, state.replace(step=jnp.int32(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert training.saved_steps(tmp_path) == [1]
    bits_equal(training.restore_state(tmp_path, state).params, params)
    training.save_state(tmp_path, state.replace(step=jnp.int32(2)))  # with room again
    assert training.saved_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("metrics/metrics", "best"),
        ("metrics/metrics", "restore"),
        ("metrics/metrics", "open"),
        ("state/_METADATA", "restore"),
        ("state/manifest.ocdbt", "restore"),
        ("state/array_metadatas/process_0", "restore"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named(two_saved, tmp_path, name, call):
    state, folder = two_saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2" / name).write_bytes(b"")
    says = f"the checkpoint {tmp_path}/2 cannot be read .*delete this folder to resume from step 1"
    with pytest.raises(ValueError, match=says):
        if call == "best":
            checkpoints.best_step(tmp_path, "f1")
        elif call == "open":
            checkpoints.Checkpoints(training.Saving(tmp_path, best="f1"))
        else:
            training.restore_state(tmp_path, state)
    shutil.rmtree(tmp_path / "2")
    assert int(training.restore_state(tmp_path, state).step) == 1
    gc.collect()  # Orbax leaves loops of events open behind an error


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """A state, and a folder with its first two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    state = training.init_state({"a": jnp.ones(3)}, SGD, jax.random.key(7))
    with checkpoints.Checkpoints(training.Saving(folder, best="f1")) as saved:
        for step in (1, 2):
            saved.save(state.replace(step=jnp.int32(step)), scores={"f1": 0.5})
    return state, folder


def read_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_log_goes_on_without_duplicates(tmp_path):
    state, log = tmp_path / "state", tmp_path / "log"
    logging = training.Logging(log, tensorboard=True, progress=False)
    fit(state, 3, logging=logging)
    assert [record["step"] for record in read_log(log)] == [1, 2, 3]
    shutil.rmtree(state / "3")  # as if killed before it was saved, in the middle of a line
    with (log / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    _, history = fit(state, 5, logging=logging)
    assert [record["step"] for record in history] == [3, 4, 5]
    assert [record["step"] for record in read_log(log)] == [1, 2, 3, 4, 5]
    assert read_log(log)[2:] == history
    assert {"loss", "tokens_per_second", "compilations"} <= history[0].keys()
    losses = read_events(log, "loss")
    assert list(losses) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([losses[step] for step in (3, 4, 5)], [r["loss"] for r in history])
    (log / "metrics.jsonl").write_text("[]\n" * 2)
    with pytest.raises(ValueError, match=r"line 1 of .* is not the record of a step"):
        fit(state, 6, logging=logging)
    with pytest.raises(ValueError, match="give folder=FOLDER"):
        training.Logging(tensorboard=True)


def read_events(folder, tag):
    """Step -> value, as TensorBoard shows it: a resumed run's file replaces what it repeats."""
    values = {}
    for file in sorted(folder.glob("events*"), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            found = [v.simple_value for v in event.summary.value if v.tag == tag]
            if found:
                values[event.step] = found[0]
    return dict(sorted(values.items()))


def test_flops_of_a_step_counted_by_hand():
    model = Model(config(), "masked_lm")
    batch = {"input_ids": np.ones((2, 10), int), "attention_mask": np.ones((2, 10), int)}
    batch["attention_mask"][1, 5:] = 0  # 15 tokens
    kernels = 2 * (4 * 8 * 8 + 2 * 8 * 16) + 8 * 8 + 8 * 23  # layers, transform, vocabulary
    assert flops.train_flops(model, batch) == 15 * (6 * kernels + 12 * 2 * 8 * 10)
    shared = config(model_type="albert", embedding_size=4, num_hidden_groups=1, inner_group_num=1)
    kernels = 2 * (4 * 8 * 8 + 2 * 8 * 16) + 4 * 8  # one layer, used twice; the embeddings'
    expected = 15 * (6 * kernels + 12 * 2 * 8 * 10)
    assert flops.train_flops(Model(shared, "sequence_classification"), batch) == expected
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("cpu") is None


def test_utilisation_where_the_chip_is_known(monkeypatch):
    monkeypatch.setitem(flops.PEAK_FLOPS, "cpu", 1e9)
    monkeypatch.setattr("lsg_flax.training.log.INTERVAL", np.inf)  # that of all steps so far
    logging = training.Logging(flops=lambda batch: 4e6, progress=False)
    _, history = fit(None, 2, logging=logging)
    for record in history:
        rate = 4e6 * record["step"] / record["seconds"]
        np.testing.assert_allclose(record["mfu"], rate / 1e9 / jax.device_count(), rtol=1e-3)


STOPPED = """
import os, signal, sys
sys.path[:0] = {path!r}
import test_training as t
def batch_at(number):
    if number == 2:
        os.kill(os.getpid(), signal.{signal})  # while step 3 is being prepared
    return t.batch_at(number)
handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
try:
    logging = t.training.Logging({folder!r} + "-log", progress=False)
    t.fit({folder!r}, 6, batch_at, logging=logging, every=None)
except t.training.Preempted as stop:
    assert stop.step == 3
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    raise
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_lets_the_step_finish_and_saves(tmp_path, name, status):
    folder = str(tmp_path / "state")
    code = STOPPED.format(path=sys.path, signal=name, folder=folder)
    code = "import conftest\n" + code if "conftest" in sys.modules else code
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=False
    )
    assert done.returncode == status, done.stderr
    assert "stopped after step 3, which is saved" in done.stderr
    assert "Traceback" not in done.stderr
    assert training.saved_steps(folder) == [3]
    _, expected = fit(tmp_path / "whole", 6)
    _, rest = fit(folder, 6)
    begun = read_log(pathlib.Path(folder + "-log"))
    assert [r["loss"] for r in begun + rest] == [r["loss"] for r in expected]


@pytest.mark.slow
def test_lengths_from_50_to_4096_compile_once_per_bucket(tmp_path):
    buckets, sizes = (512, 1024, 2048, 4096), {"hidden_size": 4, "num_attention_heads": 1}
    lsg = LSGConfig(block_size=32, sparse_block_size=32, sparsity_factor=2)
    sizes |= {"intermediate_size": 4, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    model, params = make(lsg=lsg, **sizes)

    def batch_at(number):
        length = int(np.random.default_rng(number).integers(50, 4097))
        bucket = min(b for b in buckets if b >= length)
        ids = np.random.default_rng(number).integers(0, 23, (1, bucket))
        mask = (np.arange(bucket) < length)[None]
        labels = np.where(mask, ids, -100)
        return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}

    state = training.init_state(params, SGD, jax.random.key(1))
    batches = training.BatchesAt(batch_at)
    step = training.make_train_step(model, SGD)
    logging = training.Logging(tmp_path, progress=False)
    training.fit(step, state, batches, steps=200, logging=logging)
    seen, told = set(), read_log(tmp_path)
    for number, record in enumerate(told):
        seen.add(batch_at(number)["input_ids"].shape)
        assert record["compilations"] == len(seen)
    assert len(told) == 200 and len(seen) == len(buckets)


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_is_a_whole_number_of_steps(every):
    for record in (
        lambda: training.Evaluation(lambda state: {}, every),
        lambda: training.Saving("x", every),
    ):
        with pytest.raises(ValueError, match=rf"every={every}\): give a whole number of steps"):
            record()


def test_scores_of_an_evaluation_may_be_arrays_and_have_names_of_their_own(tmp_path):
    values = {"loss": jnp.float32(1.0), "tokens": 1.0, "targets": 1.0}
    out = log.RunLog(training.Logging(tmp_path, progress=False), first=0, steps=1)
    with out, log.CompilationCounter(random_logits) as counter:
        told = log.StepRecorder(out, counter)
        told.add(1, values, None)
        told.read()
        told.finish({"score": jnp.float32(0.5)})
        assert told.history[0]["score"] == 0.5
        told.add(2, values, None)
        told.read()
        with pytest.raises(ValueError, match=r"returns \['loss', 'step'\], which are names of"):
            told.finish({"loss": 1.0, "step": 9})
    assert '"score": 0.5' in (tmp_path / "metrics.jsonl").read_text()


def test_a_folder_that_is_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for record in (training.Saving, training.Logging):
        with pytest.raises(ValueError, match=r"folder=.*file is a file; give a folder"):
            record(tmp_path / "file")


@pytest.mark.parametrize("taken", [False, True])
def test_all_processes_of_a_run_stop_where_another_run_is(tmp_path, monkeypatch, taken):
    """Only the first has the lock; here this process is the second."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoints.multihost_utils, "broadcast_one_to_all", lambda _: taken)
    with contextlib.ExitStack() as stack:
        if taken:
            stack.enter_context(pytest.raises(OSError, match="first process of this run could not"))
        stack.enter_context(checkpoints.locked_for_run(tmp_path))
        assert not taken and not list(tmp_path.iterdir())


def test_a_folder_of_checkpoints_is_one_runs(tmp_path):
    """Orbax would delete what the other is writing."""
    with checkpoints.Checkpoints(training.Saving(tmp_path / "a")):
        with pytest.raises(OSError, match=r"another process writes .*a: process \d+ on .*, since"):
            checkpoints.Checkpoints(training.Saving(tmp_path / "a"))
        with pytest.raises(OSError, match="another process writes"):
            fit(tmp_path / "a", 2)
    with checkpoints.Checkpoints(training.Saving(tmp_path / "a")):
        pass
