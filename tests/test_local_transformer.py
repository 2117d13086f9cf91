"""local-attention's transformer: the reference's numbers, its files both ways, a cache that is
right, and what is refused."""

import json
import logging
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from golden_data import cases, load
from reference.local_numbers import drawn
from tiny_tokenizers import write_words

import lsg_flax
from lsg_flax import cli, sharding
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.generation import generate
from lsg_flax.hub import read_tokenizer
from lsg_flax.models import Model, read_config
from lsg_flax.patterns import frequencies
from lsg_flax.training import Settings, evaluate, finetune, init_state, loss_fn, make_train_step
from lsg_flax.training.flops import train_flops

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SMALL: dict[str, Any] = {
    "model_type": "local-transformer",
    "num_tokens": 31,
    "max_seq_len": 24,
    "dim": 10,
    "depth": 2,
    "heads": 2,
    "dim_head": 6,
    "local_attn_window_size": 4,
}
CASES = cases("local_transformer")
WRITERS = [name for name in CASES if "tokens" in load(name)[2]]
GLOBAL = [name for name in CASES if "global_attn_layer" in load(name)[0]]
CACHED = [name for name in WRITERS if name not in GLOBAL]


class Causal(nn.Module):
    """A global attention layer, of one head: that of the reference's worker."""

    @nn.compact
    def __call__(self, x):
        dim = x.shape[-1]
        normed = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x)
        query, key, value = jnp.split(
            nn.Dense(3 * dim, use_bias=False, name="to_qkv")(normed), 3, axis=-1
        )
        scores = query @ key.mT / dim**0.5
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool)[None], scores, -1e9)
        return nn.Dense(dim, name="to_out")(nn.softmax(scores) @ value)


class Means(nn.Module):
    """Of the real tokens so far; or, while it is trained, less of them."""

    @nn.compact
    def __call__(self, x, attention_mask, train):
        real = attention_mask[..., None]
        y = jnp.cumsum(nn.Dense(x.shape[-1], name="to_v")(x) * real, axis=1)
        y /= jnp.maximum(jnp.cumsum(real, axis=1), 1)
        return nn.Dropout(0.5, deterministic=not train)(y)


def write(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """The checkpoint of a recorded case; returns its tensors."""
    case = load(name)[0]
    config = {"model_type": "local-transformer"} | case["options"]
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, list[int]] = case["report"]["state_dict"]
    tensors = {
        name: frequencies(2 * shape[0]) if name.endswith("inv_freq") else drawn(name, shape)
        for name, shape in shapes.items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_the_reference(name, tmp_path):
    """Outputs, loss and gradients; and the file again, with every tensor as it was."""
    tensors = write(tmp_path, name)
    module = Causal() if name in GLOBAL else None
    model, params = lsg_flax.from_pretrained(tmp_path, global_attention=module)
    _, inputs, outputs = load(name)
    mask, tokens = inputs.get("mask"), "with_loss" in inputs
    limit = SMALL["max_seq_len"]  # a loss may be of one more
    given = {"input_ids" if tokens else "inputs_embeds": inputs["x"][:, :limit]}
    batch = {"input_ids": inputs["x"], "labels": inputs["x"]}

    @jax.jit
    def run(params):
        out = model.apply({"params": params}, **given, attention_mask=mask)
        found = out.logits if tokens else out.last_hidden_state
        loss = loss_fn(model, params, batch)[0] if tokens else 0.0
        return (found * inputs["weight"]).sum() + loss, (found, loss)

    gradients, (found, loss) = jax.grad(run, has_aux=True)(params)
    real = np.ones(found.shape[:2], bool) if mask is None else mask
    np.testing.assert_allclose(found[real], outputs["outputs"][real], **TOLERANCE)
    if tokens:
        np.testing.assert_allclose(loss, outputs["loss"], **TOLERANCE)
    ours = params_to_torch(gradients, model)
    expected = {n.removeprefix("grad."): g for n, g in outputs.items() if n.startswith("grad.")}
    assert len(expected) >= 3
    for parameter, gradient in expected.items():
        scale = max(1.0, np.abs(gradient).max())
        np.testing.assert_allclose(
            ours[parameter] / scale, gradient / scale, err_msg=parameter, **TOLERANCE
        )
    written = params_to_torch(params, model)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)


def made(module: nn.Module | None = None, **fields) -> tuple[Model, Any]:
    """A model with random parameters, larger than at first."""
    config = read_config(SMALL | fields)
    model = Model(config, config.usual_task, global_attention=module)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    layers = params["encoder"]["layers"]
    kept = {"attention": layers["attention"]}  # with the frequencies of its positions
    params["encoder"]["layers"] = jax.tree.map(lambda x: 3 * x, layers) | kept
    return model, params


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_gives_what_the_whole_text_gives(name, tmp_path):
    """Step by step over the ends of windows, with padding in front of one row."""
    write(tmp_path, name)
    model, params = lsg_flax.from_pretrained(tmp_path)
    length, begun = SMALL["max_seq_len"], 6
    ids = np.random.default_rng(0).integers(0, 31, (2, length))
    mask = np.ones((2, length), np.int32)
    mask[0, :3] = 0
    variables = {"params": params}
    whole = jax.jit(model.apply)(variables, ids, mask).logits
    apply = jax.jit(model.apply, static_argnames="cache_length")
    output = apply(variables, ids[:, :begun], mask[:, :begun], cache_length=length)
    np.testing.assert_allclose(output.logits[:, 0], whole[:, begun - 1], **TOLERANCE)
    for place in range(begun, length):
        output = apply(variables, ids[:, place : place + 1], cache=output.cache)
        np.testing.assert_allclose(
            output.logits[:, 0], whole[:, place], err_msg=str(place), **TOLERANCE
        )


def test_a_step_reads_its_windows_alone():
    """The compiled step's scores are as many as two windows, however long the cache is."""
    model, params = made(max_seq_len=4096)
    ids = np.ones((1, 1), np.int32)
    cache = jax.eval_shape(
        lambda: model.apply({"params": params}, ids, cache_length=4096).cache  # pyright: ignore
    )
    step = jax.jit(lambda cache: model.apply({"params": params}, ids, cache=cache).logits)
    cost = step.lower(cache).compile().cost_analysis()
    short = jax.eval_shape(lambda: model.apply({"params": params}, ids, cache_length=8).cache)
    assert cost["flops"] <= 1.01 * step.lower(short).compile().cost_analysis()["flops"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"look_backwards": 2}, "look_backwards in config.json"),
    "global": ({"global_attn_layer": "Attention"}, "passed to from_pretrained"),
    "no layer": ({"layers_insert_global_attn": [0, 3]}, r"=\[0, 3\] must be .* 1 to depth=2"),
    "forward": ({"look_forward": 1}, "look_forward=1 with causal=True"),
    "window": ({"local_attn_window_size": 25}, "local_attn_window_size=25 is larger than max"),
    "streams": ({"num_residual_streams": 0}, "num_residual_streams=0 must be at least 1"),
    "odd": ({"dim_head": 5}, "odd width 5"),
    "none": ({"num_tokens": 0}, "num_tokens=0"),
    "lsg": ({"base_model_prefix": "lsg"}, "has no LSG attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit_are_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_config(SMALL | fields)


def test_keywords_that_the_constructor_needs():
    with pytest.raises(ValueError, match=r"missing are \['max_seq_len'\]"):
        read_config({name: value for name, value in SMALL.items() if name != "max_seq_len"})


def test_config_json_has_the_keywords_of_the_constructor(tmp_path):
    model, params = made(num_residual_streams=1, look_backward=2)
    lsg_flax.save_pretrained(tmp_path, model, params)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values == values | SMALL | {"look_backward": 2, "exact_windowsize": None}
    assert not {"architectures", "id2label", "torch_dtype", "vocab_size"} & values.keys()
    again, _ = lsg_flax.from_pretrained(tmp_path)
    assert (again.config, again.task) == (model.config, "causal_lm")
    with pytest.raises(ValueError, match="cannot become LSG"):
        lsg_flax.convert_checkpoint(tmp_path, max_sequence_length=64)


def test_a_file_with_other_frequencies_is_refused(tmp_path):
    tensors = write(tmp_path, CASES[0])
    name = next(name for name in tensors if name.endswith("inv_freq"))
    tensors[name] = tensors[name] * 2
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="theta 10,000"):
        lsg_flax.from_pretrained(tmp_path)


def test_a_body_without_tokens_takes_embeddings():
    model, params = made(num_tokens=None)
    x = np.ones((1, 40, 10), np.float32)  # more than max_seq_len, which is of positions
    assert model.apply({"params": params}, inputs_embeds=x).last_hidden_state.shape == x.shape
    with pytest.raises(ValueError, match="num_tokens=None"):
        model.apply({"params": params}, input_ids=np.ones((1, 4), np.int32))


@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_has_one_token_more_than_there_are_positions(causal):
    """It is a label alone: for the loss, in evaluation and over microbatches."""
    model, params = made(causal=causal)
    ids = np.random.default_rng(0).integers(0, 31, (2, SMALL["max_seq_len"] + 1))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": np.ones_like(ids)}
    scores = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, ids[:, :-1]).logits)
    right = -np.take_along_axis(scores, ids[:, 1:, None], axis=-1).mean()
    loss, metrics = jax.jit(lambda params: loss_fn(model, params, batch))(params)
    np.testing.assert_allclose(loss, right, rtol=1e-5)
    assert metrics["targets"] == 2 * SMALL["max_seq_len"]
    found = evaluate(model, params, [(batch, np.arange(2))])
    np.testing.assert_allclose(found["eval_loss"], right, rtol=1e-5)
    step = make_train_step(model, optax.sgd(0.0), 2)
    state = init_state(params, optax.sgd(0.0), jax.random.key(0))
    _, metrics = step(state, {name: array[:, None] for name, array in batch.items()})
    np.testing.assert_allclose(metrics["loss"], right, rtol=1e-5)
    with pytest.raises(ValueError, match="26 tokens are more than the 24 positions"):
        loss_fn(model, params, {name: np.ones((1, 26), np.int32) for name in batch})


def spelled(folder: pathlib.Path, **fields) -> pathlib.Path:
    """A checkpoint with a tokenizer of 31 words."""
    write_words(folder)
    lsg_flax.save_pretrained(folder, *made(**fields), tokenizer=read_tokenizer(folder))
    return folder


def test_its_tokenizer_is_read_without_a_word(tmp_path, caplog, monkeypatch):
    """transformers does not know the model, and would say so each time."""
    folder = spelled(tmp_path)
    before, logger = read_tokenizer(folder).get_vocab(), logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.clear()
    assert read_tokenizer(folder).get_vocab() == before and not caplog.records


def test_fine_tuning_and_the_command_line(tmp_path, capsys):
    """Prompts that are continued together are continued as each alone, beyond max_seq_len too."""
    source, data = spelled(tmp_path / "source"), tmp_path / "data.txt"
    data.write_text("w5 w6 w7 w8 w9 w10\n" * 30)
    settings = {
        "train_data": (str(data),),
        "eval_data": (str(data),),
        "output": str(tmp_path / "out"),
    }
    settings |= {"batch_size": 2, "steps": 2, "buckets": (24,), "devices": 1}
    run = finetune(Settings(model=str(source), task="causal_lm", **settings), progress=False)
    assert run.step == 2 and run.scores["eval_perplexity"] > 1
    prompts = ["w5 w6 w7", "w8", "w9"]
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert cli.main(["generate", str(tmp_path / "out"), *asked, "--max-new-tokens", "24"]) == 0
    together = capsys.readouterr().out.splitlines()
    model, params = lsg_flax.from_pretrained(tmp_path / "out")
    tokenizer = read_tokenizer(tmp_path / "out")
    for prompt, text in zip(prompts, together, strict=True):
        ids = np.array([tokenizer(prompt)["input_ids"][:-1]])
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
        alone = generate(model, params, ids, max_new_tokens=24, **ends)
        new = alone[0, ids.shape[1] :].tolist()
        assert tokenizer.decode(new, skip_special_tokens=True) == text
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "local " in shown and "local_attention.LocalTransformer(**keywords of" in shown


def test_what_reads_tokens_refuses_a_model_without_them(tmp_path):
    folder = spelled(tmp_path, num_tokens=None)
    model, params = lsg_flax.from_pretrained(folder)
    settings = Settings(model=str(folder), task="causal_lm", train_data=("x",), output="y")
    for call in (
        lambda: lsg_flax.inference.predict(model, params, [{"input_ids": [1]}]),
        lambda: lsg_flax.pipeline("feature-extraction", folder),
        lambda: finetune(settings),
    ):
        with pytest.raises(ValueError, match="num_tokens=None"):
            call()


def test_model_flops_count_the_windows():
    """Four products of each query with its keys, three times; and no more keys with more tokens."""
    model, _ = made()
    batch = {"input_ids": np.ones((1, 24), np.int32)}
    wider = model.clone(config=model.config.with_overrides(local_attn_window_size=6))
    pairs = (train_flops(wider, batch) - train_flops(model, batch)) / 24
    assert pairs == 12 * 2 * (2 * 6) * (7 - 5)  # layers, heads x width, keys


def test_training_draws_and_layers_may_be_recomputed():
    model, params = made(ff_dropout=0.3, attn_dropout=0.3)
    ids = np.random.default_rng(0).integers(0, 31, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    run = jax.jit(
        jax.value_and_grad(lambda p, m, key: loss_fn(m, p, batch, key)[0]), static_argnums=1
    )
    one, other = (run(params, model, jax.random.key(i))[0] for i in range(2))
    assert one != other
    again = run(params, model.clone(remat="full"), jax.random.key(0))[0]
    np.testing.assert_allclose(again, one, rtol=1e-5)


def test_parameters_lie_on_a_mesh():
    model, params = made(use_dynamic_pos_bias=True, gate_values_per_head=True, qk_rmsnorm=True)
    ids = np.random.default_rng(0).integers(0, 31, (2, 12))
    alone = jax.jit(model.apply)({"params": params}, ids).logits
    mesh = sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = jax.jit(model.apply)({"params": sharding.shard(params, mesh)}, ids).logits
    np.testing.assert_allclose(found, alone, **TOLERANCE)


FEW = ("usual", "rmsnorm_scale", "everything")


@pytest.mark.parametrize(
    "name",
    [n if n.endswith(FEW) else pytest.param(n, marks=pytest.mark.slow) for n in CACHED],
)
def test_greedy_tokens_are_those_of_the_reference_without_a_cache(name, tmp_path):
    """Beyond max_seq_len too, where it sees the last tokens alone."""
    write(tmp_path, name)
    model, params = lsg_flax.from_pretrained(tmp_path)
    case, inputs, outputs = load(name)
    tokens = generate(model, params, inputs["x"], max_new_tokens=case["generate"])
    np.testing.assert_array_equal(tokens[:, inputs["x"].shape[1] :], outputs["tokens"])


def test_beams_and_long_prompts_roll_too():
    """Beyond the positions each beam has its own last tokens, and of a prompt the last are read."""
    model, params = made()
    prompt = np.random.default_rng(1).integers(0, 31, (2, 22))
    found, scores = generate(
        model, params, prompt, max_new_tokens=8, num_beams=3, return_scores=True
    )
    seen = jax.jit(model.apply)
    for row, score in zip(found, scores, strict=True):
        total = 0.0
        for end in range(22, 30):
            logits = seen({"params": params}, row[None, max(end - 24, 0) : end]).logits[0, -1]
            total += jax.nn.log_softmax(logits)[row[end]]
        np.testing.assert_allclose(total / 8, score, rtol=1e-4)
    longer = np.concatenate([prompt, found[:, 22:]], axis=1)
    ours = generate(model, params, longer, max_new_tokens=3)
    np.testing.assert_array_equal(
        ours[:, 30:], generate(model, params, longer[:, 6:], max_new_tokens=3)[:, 24:]
    )


def test_sampling_keeps_what_filter_thres_keeps():
    model, params = made()
    prompt, key = np.ones((1, 3), np.int32), jax.random.key(0)
    options = {"max_new_tokens": 6, "do_sample": True, "key": key, "temperature": 2.0}
    ours = generate(model, params, prompt, filter_thres=0.9, **options)
    np.testing.assert_array_equal(ours, generate(model, params, prompt, top_k=3, **options))


IMPOSSIBLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "embeddings": ({"num_tokens": None}, {}, "num_tokens=None: it takes embeddings"),
    "bidirectional": ({"causal": False}, {}, "this one has causal=False"),
    "none kept": ({}, {"do_sample": True, "filter_thres": 0.99}, "filter_thres=0.99 keeps none"),
    "idle": ({}, {"filter_thres": 0.5}, "need do_sample=True"),
    "twice": ({}, {"do_sample": True, "filter_thres": 0.5, "top_k": 2}, "set the same thing"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_written(name):
    fields, options, message = IMPOSSIBLE[name]
    model, params = made(**fields)
    with pytest.raises(ValueError, match=message):
        generate(
            model,
            params,
            np.ones((1, 3), np.int32),
            max_new_tokens=2,
            key=jax.random.key(0),
            **options,
        )
    with pytest.raises(ValueError, match=r"at least one of each|num_tokens=None"):
        generate(model, params, np.ones((1, 0), np.int32))


@pytest.mark.parametrize("name", GLOBAL)
def test_texts_with_global_layers_are_written_without_a_cache(name, tmp_path):
    write(tmp_path, name)
    model, params = lsg_flax.from_pretrained(tmp_path, global_attention=Causal())
    case, inputs, outputs = load(name)
    prompt, count = inputs["x"], case["generate"]
    tokens = generate(model, params, prompt, max_new_tokens=count, use_cache=False)
    np.testing.assert_array_equal(tokens[:, prompt.shape[1] :], outputs["tokens"])
    with pytest.raises(ValueError, match=r"cannot use a cache, .* use_cache=False"):
        generate(model, params, prompt, max_new_tokens=count)


def test_global_layers_are_told_of_padding_and_training_and_lie_on_a_mesh():
    model, params = made(Means(), layers_insert_global_attn=[2], dim=12)
    ids = np.random.default_rng(0).integers(0, 31, (2, 12))
    mask = np.ones_like(ids)
    mask[:, :4] = 0
    apply = jax.jit(model.apply, static_argnames="train")
    alone = apply({"params": params}, ids, mask).logits
    other = apply({"params": params}, np.where(mask, ids, 3), mask).logits
    np.testing.assert_allclose(other[:, 4:], alone[:, 4:], **TOLERANCE)
    rngs = [{"dropout": jax.random.key(i)} for i in range(2)]
    one, two = (apply({"params": params}, ids, mask, train=True, rngs=r).logits for r in rngs)
    assert not np.allclose(one, two)
    mesh = sharding.make_mesh(fsdp=2, sequence=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = jax.jit(model.apply)({"params": sharding.shard(params, mesh)}, ids, mask).logits
    np.testing.assert_allclose(found, alone, **TOLERANCE)


def test_global_layers_are_added_to_a_checkpoint_and_kept_in_it(tmp_path):
    lsg_flax.save_pretrained(tmp_path, *made(num_residual_streams=2))
    with pytest.warns(
        UserWarning, match="drawn from seed 0: .*global_layers/attention/to_v/kernel"
    ):
        model, params = lsg_flax.from_pretrained(tmp_path, global_attention=Means())
    assert params["encoder"]["global_layers"]["attention"]["to_v"]["kernel"].shape == (2, 10, 10)
    lsg_flax.save_pretrained(tmp_path / "with", model, params)
    again = lsg_flax.from_pretrained(tmp_path / "with", global_attention=Means())
    assert again[0] == model
    jax.tree.map(np.testing.assert_array_equal, again[1], params)
    with pytest.raises(ValueError, match=r"NoneType with layers_insert_global_attn=\[1, 2\]"):
        lsg_flax.from_pretrained(tmp_path / "with")
    with pytest.raises(
        ValueError, match=r"(?s)- \S+to_qkv.weight.*\+ \S+to_v.bias.*named as in the file"
    ):
        lsg_flax.from_pretrained(tmp_path / "with", global_attention=Causal())
    module = nn.Sequential([nn.Dense(10), nn.gelu, nn.Dense(10)])
    tree = made(module, layers_insert_global_attn=[1])[1]["encoder"]["global_layers"]
    assert tree["attention"]["layers_2"]["kernel"].shape == (1, 10, 10)
    with pytest.raises(ValueError, match=r"returned \(1, 2, 3\) for states \(1, 2, 10\)"):
        made(nn.Dense(3), layers_insert_global_attn=[1])
    with pytest.raises(ValueError, match=r"Dense with layers_insert_global_attn=\[\]"):
        made(nn.Dense(10))
