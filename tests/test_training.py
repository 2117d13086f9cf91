"""Losses against PyTorch's recorded ones and formulas in numpy; the step, the optimizer,
checkpoints and the loop on a tiny model."""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import GOLDEN, cases, load

import lsg_flax
from lsg_flax import losses, training
from lsg_flax.config import EncoderConfig
from lsg_flax.models.heads import ModelOutput
from lsg_flax.models.model import Model

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
    loss, metrics = loss_fn(model, params, inputs)
    np.testing.assert_allclose(loss, outputs["loss"], rtol=1e-5, atol=1e-5)
    assert metrics["tokens"] == inputs["attention_mask"].sum()


OF_OTHER_FAMILIES = {"discriminator", "sentence_order"}  # tests/test_families.py has them


def test_every_loss_is_recorded():
    assert {load(name)[0]["checkpoint"].removeprefix("bert_") for name in WITH_LOSS} == {
        *losses.TARGETS,
        "plain_masked_lm",
    } - OF_OTHER_FAMILIES


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
    assert losses.problem_type(settings, jnp.asarray(labels)) == expected
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
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (random_batch(), r"missing are \['labels'\]"),
        (random_batch(labels=np.zeros(4, int), label=1), r"unknown \['label'\]"),
        (random_batch(labels=np.zeros((4, 13))), "must be integers, got float"),
        (random_batch(labels=np.zeros((4, 5), int)), r"shape \(4, 5\).* ask for \(4, 13\)"),
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
    with pytest.raises(ValueError, match=r"accumulate_steps=2 every array is \[2, batch"):
        run(model, params, optimizer, [micro], accumulate_steps=2)


def test_dropout_differs_by_step_and_repeats_by_key():
    model, params = make()
    step, seen = train_step(model, SGD), []
    for number in (0, 0, 1):
        state = training.init_state(params, SGD, jax.random.key(7))
        seen.append(step(state.replace(step=jnp.int32(number)), masked_lm_batch())[1]["loss"])
    assert seen[0] == seen[1] != seen[2]


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
    for _ in range(11):
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, opt_state = optimizer.update(zero, opt_state, params)
        assert not np.any(updates["dense"]["bias"]) and not np.any(updates["norm"]["scale"])
        sizes.append(-updates["dense"]["kernel"][0, 0] / 0.5)
    expected = [*np.arange(4) / 4, *(np.arange(10, 3, -1) - 4) / 6]
    np.testing.assert_allclose(sizes, expected, atol=1e-6)
    clipped, free = (
        training.make_optimizer(1.0, total_steps=2, max_grad_norm=n) for n in (1.0, None)
    )
    big = jax.tree.map(lambda p: 100 * p, params)
    norms = [
        optax.tree.norm(optax.tree_utils.tree_get(o.update(big, o.init(params), params)[1], "mu"))
        for o in (clipped, free)
    ]
    np.testing.assert_allclose(norms, [0.1, 10 * math.sqrt(8)], rtol=1e-5)
    with pytest.raises(ValueError, match=r"warmup_steps=5 must lie in 0\.\.4"):
        training.make_optimizer(1.0, total_steps=5, warmup_steps=5)


def batch_at(number):
    return masked_lm_batch(seed=number)


ADAMW = training.make_optimizer(0.01, total_steps=6, warmup_steps=1)


def fit(folder, steps, batches=batch_at, **options):
    model, params = make()
    state, step = training.init_state(params, ADAMW, jax.random.key(1)), train_step(model, ADAMW)
    options = {"progress": False, "save_every": 2} | options
    batches = training.BatchesAt(batches)
    return training.fit(step, state, batches, steps=steps, checkpoints=folder, **options)


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
    with pytest.raises(ValueError, match="has a checkpoint of step 6 already"):
        training.save_state(tmp_path / "whole", state)


def test_fit_evaluates_and_needs_what_it_is_asked_for():
    def evaluate(state):
        return {"seen": int(state.step)}

    _, history = fit(None, 5, save_every=None, evaluate=evaluate, evaluate_every=2)
    assert [record.get("seen") for record in history] == [None, 2, None, 4, 5]
    with pytest.raises(ValueError, match="evaluate_every needs evaluate"):
        fit(None, 5)


def test_a_nan_names_its_step_and_is_not_saved(tmp_path):
    def broken(number):
        batch = batch_at(number)
        return batch | {"labels": batch["labels"] * 0 - 1} if number == 3 else batch

    with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
        fit(tmp_path, 6, broken)
    assert training.saved_steps(tmp_path) == [2]
