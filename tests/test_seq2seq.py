"""Encoder-decoders beyond what is recorded of PyTorch (test_golden_model.py): caches, beams, end
tokens, shifted inputs, files of other shapes, conversion, and what is refused."""

import dataclasses
import functools
import itertools
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_config
from golden_data import GOLDEN
from tiny_config import has_two_stacks, spelled

import lsg_flax
import lsg_flax.inference
from lsg_flax import LSGConfig, sharding
from lsg_flax.convert_from_torch import params_from_torch, params_to_torch
from lsg_flax.hub.to_lsg import LSGOptions, to_lsg
from lsg_flax.models import FAMILIES, read_config, sinusoids
from lsg_flax.training import loss_fn, make_optimizer, train_flops
from lsg_flax.training.source import open_source

SEQ2SEQ = [family for family in FAMILIES if has_two_stacks(family)]
SIZES = tiny_config.SIZES | {"max_position_embeddings": 30}
LSG = LSGConfig(block_size=4, sparse_block_size=4, num_global_tokens=2)
GENERATION = "conditional_generation"
IDS = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 5, 15, 6, 16, 7, 1, 1, 1]])
MASK = IDS != 1
TARGETS = np.array([[2, 5, 6, 7, 8], [2, 9, 10, 11, 12]])


@functools.cache
def made(family: str, task: str, lsg: LSGConfig | None = LSG, **fields):
    """A model with random parameters."""
    config = read_config(spelled(family, SIZES | fields)).with_overrides(lsg=lsg)
    config = config.with_overrides(**FAMILIES[family].head(task).task.fixed)
    model = lsg_flax.Model(config, task)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    return model, jax.tree.map(lambda x: 3 * x, params)  # far from uniform scores


@functools.partial(jax.jit, static_argnames=("model", "cache_length"))
def run(model, params, cache_length=None, **inputs):
    return model.apply({"params": params}, cache_length=cache_length, **inputs)


def decoded(model, params, cache, tokens):
    """The scores behind each of the tokens, fed one by one, and the cache."""
    scores = []
    name = "decoder_input_ids" if model.has_two_stacks else "input_ids"
    for i in range(tokens.shape[1]):
        out = run(model, params, cache=cache, **{name: tokens[:, i : i + 1]})
        cache = out.cache
        scores.append(out.logits)
    return np.concatenate(scores, axis=1), cache


# ----------------------------------------------------------------------------------------- caches


@pytest.mark.slow
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_cached_decoding_equals_the_uncached_one(family):
    """A prompt padded on the left, in one row, then one token at a time."""
    model, params = made(family, GENERATION)
    mask = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    whole = run(
        model, params, decoder_input_ids=TARGETS, decoder_attention_mask=mask, **inputs
    ).logits
    prompt = {"decoder_input_ids": TARGETS[:, :2], "decoder_attention_mask": mask[:, :2]}
    first = run(model, params, 6, **prompt, **inputs)
    scores, _ = decoded(model, params, first.cache, TARGETS[:, 2:])
    np.testing.assert_allclose(first.logits[:, 0], whole[:, 1], atol=1e-5)
    np.testing.assert_allclose(scores, whole[:, 2:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("states", [False, True])
def test_a_decoder_alone_has_a_cache_too(states):
    model, params = made("bart", "causal_lm", None)
    given = {"encoder_hidden_states": np.ones((2, 3, 12), np.float32)} if states else {}
    whole = run(model, params, input_ids=TARGETS, **given).logits
    first = run(model, params, 5, input_ids=TARGETS[:, :1], **given)
    scores, _ = decoded(model, params, first.cache, TARGETS[:, 1:])
    np.testing.assert_allclose(scores, whole[:, 1:], atol=1e-5)


@pytest.mark.slow
def test_beams_share_the_keys_of_their_text():
    """Of three beams each: what the encoder's states were made into is there once per text."""
    model, params = made("bart", GENERATION)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    cache = run(model, params, 5, decoder_input_ids=TARGETS[:, :1], **inputs).cache
    rows = jnp.array([0, 0, 0, 1, 1, 1])
    beams = cache.take(jnp.zeros((2, 3), int))
    assert beams.layers.memory is cache.layers.memory
    assert beams.layers.tokens.key.shape[1] == 6
    tokens = np.array([[5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [15, 16]])
    scores, after = decoded(model, params, beams, tokens)
    expected, _ = decoded(model, params, cache.take(rows), tokens)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    moved = after.take(jnp.array([[2, 0, 0], [1, 1, 0]]))
    scores, _ = decoded(model, params, moved, np.full((6, 1), 3))
    order = [2, 0, 0, 4, 4, 3]
    last = np.concatenate([TARGETS[[0, 0, 0, 1, 1, 1], :1], tokens[order], np.full((6, 1), 3)], 1)
    expected = run(
        model,
        params,
        input_ids=IDS[rows],
        attention_mask=MASK[rows],
        decoder_input_ids=last,
    ).logits[:, -1]
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-5)


@pytest.mark.slow
def test_states_of_the_encoder_stand_in_for_its_inputs():
    lsg = LSGConfig(block_size=4, sparse_block_size=4, mask_first_token=True)
    for passed in (True, False):
        model, params = made("mbart", "base", lsg, pass_global_tokens_to_decoder=passed)
        inputs = {"attention_mask": MASK, "decoder_input_ids": TARGETS}
        out = run(model, params, input_ids=IDS, **inputs)
        assert out.encoder_last_hidden_state.shape == (2, 9 + passed, 12)
        again = run(model, params, encoder_outputs=(out.encoder_last_hidden_state,), **inputs)
        np.testing.assert_allclose(again.last_hidden_state, out.last_hidden_state, atol=1e-6)


# ----------------------------------------------------------------------------------------- inputs


@pytest.mark.slow
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_texts_as_long_as_the_table(family):
    """29 and 30 tokens are padded to 32, whose last ones have no position."""
    model, params = made(family, "base")
    ids = np.arange(60).reshape(2, 30) % 18 + 5
    short = run(model, params, input_ids=ids[:, :29], decoder_input_ids=ids).last_hidden_state
    mask = np.arange(30)[None].repeat(2, 0) < 29
    longer = run(model, params, input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    np.testing.assert_allclose(short, longer.last_hidden_state, atol=1e-5)
    with pytest.raises(ValueError, match="31 decoder_tokens are more than the 30 positions"):
        model.apply({"params": params}, ids, decoder_input_ids=np.full((2, 31), 5))


def test_inputs_are_shifted_as_each_family_does():
    labels = jnp.array([[5, 6, 7, 3], [8, 4, -100, -100]])
    expected = {
        "bart": [[2, 5, 6, 7], [2, 8, 4, 1]],
        "mbart": [[3, 5, 6, 7], [4, 8, 4, 1]],  # the last token is the language
        "pegasus": [[0, 5, 6, 7], [0, 8, 4, 0]],
    }
    for family, ids in expected.items():
        model = lsg_flax.Model(read_config(spelled(family, SIZES)), GENERATION)
        np.testing.assert_array_equal(model.shift_right(labels), ids)
    for wrong, message in (
        (labels.at[0, 3].set(23), "labels are in 0..23, but vocab_size=23"),
        (labels[0], r"labels must be \[batch, tokens\], got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.shift_right(wrong)
    without = lsg_flax.Model(model.config.with_overrides(decoder_start_token_id=None), GENERATION)
    with pytest.raises(ValueError, match="decoder_start_token_id=None, which are needed"):
        without.shift_right(labels)


def test_labels_are_as_long_as_the_decoders_inputs():
    model = lsg_flax.Model(read_config(spelled("bart", SIZES)), GENERATION)
    batch = {"input_ids": IDS, "decoder_input_ids": IDS, "labels": TARGETS}
    with pytest.raises(ValueError, match=r"labels .* shape \(2, 5\), but .* of shape \(2, 9\)"):
        jax.eval_shape(lambda params: loss_fn(model, params, batch), model.abstract_params())


@pytest.mark.slow
def test_the_loss_is_that_of_shifted_labels():
    model, params = made("pegasus", GENERATION)
    labels = np.array([[5, 6, 7, 3], [8, 4, -100, -100]])
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    loss, metrics = jax.jit(loss_fn, static_argnums=0)(model, params, batch)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    logits = run(model, params, decoder_input_ids=model.shift_right(jnp.array(labels)), **inputs)
    scores = jax.nn.log_softmax(logits.logits)
    chosen = np.take_along_axis(np.asarray(scores), np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -chosen[labels >= 0].mean(), rtol=1e-5)
    assert metrics["targets"] == 6
    with pytest.raises(
        ValueError, match=r"labels .* have shape \(2, 4\), but outputs of shape \(2, 5"
    ):
        loss_fn(model, params, batch | {"decoder_input_ids": TARGETS})
    trained = jax.jit(loss_fn, static_argnums=0)(model, params, batch, jax.random.key(0))[0]
    assert trained != loss  # dropout


def test_a_decoder_alone_is_not_trained_on_its_own_inputs():
    """As PyTorch's its loss takes labels that are shifted already, and rows of text have none."""
    with pytest.raises(
        ValueError, match="causal_lm of bart cannot be trained from files, because its"
    ):
        open_source(str(GOLDEN / "bart_causal_lm"), "causal_lm", None, convert=False)


@pytest.mark.slow
def test_dropout_behind_the_activation():
    fields = {"hidden_dropout_prob": 0.0, "activation_dropout": 0.5}
    model, params = made("bart", "base", None, **fields)
    apply = functools.partial(model.apply, {"params": params}, IDS, decoder_input_ids=TARGETS)
    first, again, other, evaluated = (
        jax.jit(lambda key, train: apply(train=train, rngs={"dropout": key}), static_argnums=1)(
            jax.random.key(seed), train
        ).last_hidden_state
        for seed, train in ((0, True), (0, True), (1, True), (0, False))
    )
    np.testing.assert_array_equal(first, again)
    assert abs(first - other).max() > 1e-3 and abs(first - evaluated).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_whole_layers_are_left_out_while_training(side):
    """All rows together and each layer by itself: of two layers there are four models, of which a
    run is one; where one is left out its states are those of its input."""
    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, params = made("bart", "base", **fields, **{f"{side}_layerdrop": 0.3})

    def run_once(model, key, *, train=True):
        inputs = {"decoder_input_ids": TARGETS, "output_hidden_states": True}
        out = model.apply({"params": params}, IDS, MASK, **inputs, train=train, rngs=key)
        return out.last_hidden_state, getattr(out, f"{side}_hidden_states")

    keys = jax.random.split(jax.random.key(0), 200)
    last, states = jax.jit(jax.vmap(lambda key: run_once(model, {"dropout": key})))(keys)
    pairs = itertools.pairwise(states)
    left_out = np.stack([(x == y).all(axis=(1, 2, 3)) for x, y in pairs])  # [layers, keys]
    counts = [(left_out == np.array([[a], [b]])).all(axis=0).sum() for a in (0, 1) for b in (0, 1)]
    np.testing.assert_allclose(np.array(counts) / 200, [0.49, 0.21, 0.21, 0.09], atol=0.08)
    answered = jax.jit(lambda: run_once(model, {}, train=False))()[0]  # nothing is left out of it
    change = abs(last - answered[None]).max(axis=(1, 2, 3))
    assert change[~left_out.any(axis=0)].max() < 1e-5 and change[left_out.any(axis=0)].min() > 1e-3


@pytest.mark.slow
def test_rows_are_classified_by_their_last_end_token():
    model, params = made("bart", "sequence_classification", num_labels=3)
    ids = np.where(MASK, IDS, 1)
    ids[0, [3, 8]], ids[1, [1, 5]] = 2, 2
    logits = run(model, params, input_ids=ids, attention_mask=MASK).logits
    assert logits.shape == (2, 3) and np.isfinite(logits).all()
    later = np.where(np.arange(9) > 5, 7, ids)[1:]  # behind the last end token, which sees them not
    alone = run(model, params, input_ids=later, attention_mask=MASK[1:], decoder_input_ids=ids[1:])
    assert np.isfinite(alone.logits).all()
    ids[0, 3] = 7
    with pytest.raises(
        ValueError, match=r"same number of them, at least one, but they have \[1, 2\]"
    ):
        model.apply({"params": params}, ids, MASK)
    ids[1, [1, 5]] = 7
    logits = run(model, params, input_ids=ids, attention_mask=MASK).logits  # ids cannot be read
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"sequence": 2, "data": 2}, {"tensor": 2, "fsdp": 2}])
def test_devices_share_the_work(axes):
    """The encoder's tokens over `sequence` among them, with globals for the decoder."""
    model, params = made("pegasus", GENERATION, vocab_size=24)
    mesh = sharding.make_mesh(**axes, devices=jax.devices()[:4])
    inputs = {"input_ids": np.tile(IDS, 3), "attention_mask": np.tile(MASK, 3)}
    inputs["decoder_input_ids"] = TARGETS
    expected = run(model, params, **inputs)
    with jax.set_mesh(mesh):
        ours = jax.jit(model.apply)({"params": sharding.shard(params, mesh)}, **inputs)
    np.testing.assert_allclose(ours.logits, expected.logits, atol=1e-5)
    states = expected.encoder_last_hidden_state
    np.testing.assert_allclose(ours.encoder_last_hidden_state, states, atol=1e-5)


def test_flops_of_both_stacks():
    """Keys and values of cross-attention are made of the encoder's tokens."""
    model, _ = made("bart", GENERATION, None, decoder_ffn_dim=20)
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "labels": np.array([[5, 6, 7], [8, -100, 3]]),
    }
    width, words = 12, 23
    encoder = 2 * (4 * width**2 + 2 * width * 16) + 2 * 2 * width**2
    decoder = 2 * (6 * width**2 + 2 * width * 20) + width * words
    expected = 15 * (6 * encoder + 12 * 2 * width * 9)
    expected += 5 * (6 * decoder + 12 * 2 * width * (3 + 9))
    assert train_flops(model, batch) == expected


@pytest.mark.parametrize(
    ("task", "inputs", "message"),
    [
        ("base", {"position_ids": IDS}, "leave position_ids out: the family counts"),
        ("causal_lm", {"token_type_ids": IDS}, "pegasus has no segments"),
        ("base", {}, "give decoder_input_ids .* from labels only"),
        ("base", {"encoder_hidden_states": IDS}, "takes encoder_outputs"),
        ("base", {"decoder_input_ids": TARGETS + 30}, "decoder_input_ids are in"),
        ("base", {"decoder_input_ids": TARGETS[:1]}, r"\[batch=1, 2 global tokens \+ tokens"),
        (
            "base",
            {"decoder_input_ids": TARGETS, "decoder_attention_mask": MASK},
            "decoder_attention_mask has shape",
        ),
        (
            "base",
            {"decoder_input_ids": TARGETS, "encoder_outputs": np.ones((2, 3, 12), np.float32)},
            "leave input_ids out: encoder_outputs replace them",
        ),
        ("base", {"decoder_input_ids": TARGETS, "cache_length": 9}, "it needs a task of"),
        (
            "causal_lm",
            {"decoder_input_ids": TARGETS},
            "decoder_input_ids out: only encoder-decoders",
        ),
        ("causal_lm", {"cache_length": 40}, "cache_length=40 is more than the 30 positions"),
    ],
)
def test_what_does_not_fit_is_refused(task, inputs, message):
    config = read_config(spelled("pegasus", SIZES)).with_overrides(lsg=LSG)
    model = lsg_flax.Model(config.with_overrides(**FAMILIES["pegasus"].head(task).task.fixed), task)

    def apply(params):
        return model.apply({"params": params}, input_ids=IDS, **inputs)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, model.abstract_params())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_attention_heads": 5}, "not divisible by encoder_attention_heads=5"),
        ({"decoder_layers": 0}, "decoder_layers=0 must be at least 1"),
        ({"dropout": 1.5}, r"dropout=1.5 must be in \[0, 1\)"),
        ({"decoder_start_token_id": 23}, "decoder_start_token_id=23 is outside 0..22"),
        ({"encoder_layerdrop": 1.0}, r"encoder_layerdrop=1.0 must be in \[0, 1\)"),
    ],
)
def test_a_config_that_does_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        read_config(spelled("bart", SIZES) | fields)


def test_defaults_are_those_of_each_family():
    bart, mbart, pegasus = (read_config({"model_type": family}) for family in SEQ2SEQ)
    assert (bart.num_labels, mbart.num_labels, pegasus.num_labels) == (3, 2, 2)
    starts = [config.decoder_start_token_id for config in (bart, mbart, pegasus)]
    assert starts == [2, None, 0]
    assert (pegasus.pad_token_id, pegasus.eos_token_id, pegasus.bos_token_id) == (0, 1, None)
    written = bart.to_dict()
    assert written["d_model"] == 1024 and "pass_global_tokens_to_decoder" not in written
    assert bart.with_overrides(lsg=LSG).to_dict()["pass_global_tokens_to_decoder"] is True
    assert "decoder_start_token_id" not in mbart.to_dict()
    assert read_config(written) == bart


# ------------------------------------------------------------------------------------------ files


def tensors_of(folder: str):
    return safetensors.numpy.load_file(GOLDEN / folder / "model.safetensors")


def same(params, others) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(others)))


def test_old_files_hold_the_word_table_under_any_of_its_names():
    model, params = lsg_flax.from_pretrained(GOLDEN / f"bart_{GENERATION}")
    stored = tensors_of(f"bart_{GENERATION}")
    words = stored.pop("model.shared.weight")
    names = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.shared.weight")
    for name in names:
        assert same(params, params_from_torch(stored | {name: words}, model))
    everything = params_to_torch(params, model)
    assert {*names, "model.decoder.embed_tokens.weight"} <= everything.keys()
    assert same(params, params_from_torch(everything | {"model.encoder.version": words}, model))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.shared.weight"):
        params_from_torch(everything | {"lm_head.weight": 2 * words}, model)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_decoder_alone_is_read_from_a_whole_model(prefix):
    whole, params = lsg_flax.from_pretrained(GOLDEN / f"bart_{GENERATION}")
    stored = {
        name.removeprefix("model." * (not prefix)): tensor
        for name, tensor in tensors_of(f"bart_{GENERATION}").items()
    }
    config = whole.config.with_overrides(**FAMILIES["bart"].head("causal_lm").task.fixed)
    model = lsg_flax.Model(config, "causal_lm")
    with pytest.warns(UserWarning, match="of another head and not used: .*encoder"):
        alone = params_from_torch(stored, model)
    assert same(alone, {name: params[name] for name in ("decoder", "shared")})


def test_files_of_pegasus_may_lack_what_is_never_trained():
    model, _ = lsg_flax.from_pretrained(GOLDEN / f"pegasus_{GENERATION}")
    stored = tensors_of(f"pegasus_{GENERATION}")
    fixed = [name for name in stored if "embed_positions" in name or "final_logits" in name]
    assert len(fixed) == 3
    params = params_from_torch({k: v for k, v in stored.items() if k not in fixed}, model)
    for stack in ("encoder", "decoder"):  # without a warning
        table = params[stack]["embeddings"]["position_embeddings"]["buffer"]
        np.testing.assert_array_equal(table, sinusoids(48, 12))
    assert not params["head"]["final_logits_bias"]["buffer"].any()


@pytest.mark.slow
def test_what_is_never_trained_keeps_every_bit():
    model, params = made("pegasus", GENERATION)
    batch = {"input_ids": IDS, "labels": TARGETS}
    optimizer = make_optimizer(0.1, total_steps=2, weight_decay=0.5)

    @jax.jit
    def step(params):
        gradients = jax.grad(lambda params: loss_fn(model, params, batch)[0])(params)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    changed = flax.traverse_util.flatten_dict(step(params), sep="/")
    still = {path for path, update in changed.items() if not update.any()}
    assert {path for path in changed if path.endswith("buffer")} <= still
    assert len(still) < len(changed) / 2


@pytest.mark.parametrize("name", ["BarthezModel", "LSGBarthezModel", "LSGMBartModel", "MBartModel"])
def test_barthez_is_an_mbart(name):
    assert FAMILIES["mbart"].task_of(name) == "base"
    config = read_config({"model_type": "barthez", "architectures": [name]})
    assert config.model_type == "mbart" and (config.lsg is not None) == name.startswith("LSG")


# ------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_conversion_makes_both_tables_longer(family):
    """Globals are of the unscaled word table and the encoder's positions."""
    model, params = made(family, "base", None, max_position_embeddings=512, scale_embedding=True)
    options = LSGOptions(max_sequence_length=1030)
    ids = {"bos_token_id": 3, "mask_token_id": 4}
    new, config = to_lsg(params, model.config, options, lsg=LSG, **ids)
    assert (config.max_position_embeddings, config.lsg) == (1030, LSG)
    offset = FAMILIES[family].architecture.position_offset
    for stack in ("encoder", "decoder"):
        (leaf, table), *_ = new[stack]["embeddings"]["position_embeddings"].items()
        old = np.asarray(params[stack]["embeddings"]["position_embeddings"][leaf])
        if family == "pegasus":
            np.testing.assert_array_equal(table, sinusoids(1030, 12))
        else:
            tiled = old[2:][np.arange(1030) % 512]
            np.testing.assert_array_equal(table, np.concatenate([old[:2], tiled]))
    words = np.asarray(params["shared"]["embedding"])
    first = params["encoder"]["embeddings"]["position_embeddings"][leaf][offset]
    globals_ = new["encoder"]["embeddings"]["global_embeddings"]["embedding"]
    np.testing.assert_allclose(globals_[0], words[3] + first, atol=1e-6)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_decoder_alone_is_converted(family, tmp_path):
    """The reference's converter crashes on these classes."""
    model, params = made(family, "causal_lm", None)
    lsg_flax.save_pretrained(tmp_path / "plain", model, params)
    new, made_lsg = lsg_flax.convert_checkpoint(
        tmp_path / "plain", tmp_path / "lsg", max_sequence_length=100, block_size=8
    )
    again, read = lsg_flax.from_pretrained(tmp_path / "lsg")
    assert (again.task, again.max_length, again.config.lsg.block_size) == ("causal_lm", 100, 8)
    assert same(made_lsg, read)
    assert dataclasses.replace(again.config, extra=new.config.extra) == new.config
    np.testing.assert_array_equal(read["shared"]["embedding"], params["shared"]["embedding"])


@pytest.mark.slow
def test_predictions_are_the_answers_alone():
    """The encoder's states, which the model gives too, are there when they are asked for."""
    model, params = made("bart", "sequence_classification")
    documents = [[5, 6, 7, 2], [8, 9, 10, 11, 12, 13, 2]]
    encodings = [{"input_ids": ids} for ids in documents]
    results = list(lsg_flax.inference.predict(model, params, encodings, batch_size=2))
    assert [sorted(result) for result in results] == [["logits"]] * 2
    for ids, result in zip(documents, results, strict=True):
        alone = model.apply({"params": params}, np.array([ids])).logits[0]
        np.testing.assert_allclose(result["logits"], alone, atol=1e-5)


# ------------------------------------------------------------------------------------- generation


def test_generation_config_is_read_kept_and_written(tmp_path):
    first, second, name = tmp_path / "first", tmp_path / "second", "generation_config.json"
    model, params = made("bart", GENERATION)
    lsg_flax.save_pretrained(first, model, params)
    assert not (first / name).exists()
    options = {"num_beams": 2, "max_new_tokens": 4, "decoder_start_token_id": 2, "eos_token_id": 2}
    (first / name).write_text(json.dumps(options))
    loaded, params = lsg_flax.from_pretrained(first)
    chosen = lsg_flax.generate(loaded, params, IDS, MASK)
    np.testing.assert_array_equal(chosen, lsg_flax.generate(model, params, IDS, MASK, **options))
    lsg_flax.save_pretrained(second, loaded, params)
    assert json.loads((second / name).read_text()) == options
    assert "generation_config" not in json.loads((second / "config.json").read_text())
