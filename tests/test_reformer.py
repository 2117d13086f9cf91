"""Reformer: the reference's numbers and gradients, layers that are computed back, its files both
ways, meshes, and what is refused."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny_run
from golden_data import cases, load
from reference.reformer_numbers import drawn, rotations

import lsg_flax
from lsg_flax import cli, hub, sharding, training
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.models import Model, read_config, reformer, reversible
from lsg_flax.training import Settings, finetune, loss_fn, losses, survey
from lsg_flax.training.flops import train_flops
from lsg_flax.training.preparation import training_buckets

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SMALL: dict[str, Any] = {
    "model_type": "reformer",
    "vocab_size": 31,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "attention_head_size": 4,
    "feed_forward_size": 12,
    "attn_layers": ["local", "lsh"],
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 6,
    "axial_pos_shape": [4, 6],
    "axial_pos_embds_dim": [3, 5],
    "max_position_embeddings": 24,
    "num_buckets": 4,
}
CASES = cases("reformer")
# What float32 in the reference makes of the weights of tokens that see only themselves, in so many
# rounds; the same cases in float64 are compared as all others.
INEXACT = dict.fromkeys(("reformer_hashes_causal", "reformer_hashes_causal_masked"), 0.0029)


def write(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """The checkpoint of a recorded case; returns its tensors."""
    case = load(name)[0]
    values = {"model_type": "reformer", "architectures": [case["class"]]} | case["config"]
    (folder / "config.json").write_text(json.dumps(values))
    shapes: dict[str, list[int]] = case["report"]["parameters"]
    tensors = {name: drawn(name, shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors


def run_of(name: str, model: Model):
    """The function of parameters that the reference was differentiated by, and its outputs."""
    case, inputs, outputs = load(name)
    targets = model.task_record.targets
    labels = {target.labels: inputs[target.labels] for target in targets if "loss" in outputs}
    weights = {n: a for n, a in inputs.items() if n.startswith("weight_")}
    given = {n: a for n, a in inputs.items() if n not in weights and n not in labels}
    shapes = map(tuple, case["report"]["hashings"])
    hashing = tuple(rotations(number, shape) for number, shape in enumerate(shapes))
    states = "hidden_states.0" in outputs

    def run(params):
        out = model.apply(
            {"params": params}, **given, lsh_rotations=hashing, output_hidden_states=states
        )
        total = sum((getattr(out, n.removeprefix("weight_")) * a).sum() for n, a in weights.items())
        if not labels:
            return total, out
        batch = given | labels
        sums, counts = losses.target_sums(model, out, batch), losses.target_counts(model, batch)
        loss = losses.weighted_mean(model, sums, counts)
        return total + loss, dataclasses.replace(out, loss=loss)

    return jax.jit(jax.value_and_grad(run, has_aux=True) if "grad_of" in case else run)


def compared(name: str, output: str, found, expected, real):
    """Where tokens are real; the padding behind them that hidden states have is cut."""
    assert found.shape == expected.shape, output
    if output.startswith("hidden_states"):
        found, expected = (x[:, : real.shape[1]][real] for x in (found, expected))
    elif expected.shape[:2] == real.shape:
        found, expected = found[real], expected[real]
    scale = max(1.0, np.abs(expected).max()) if output.startswith("grad.") else 1.0
    if name in INEXACT:
        assert np.abs(found - expected).max() <= 3 * INEXACT[name] * np.abs(expected).max(), output
        return
    np.testing.assert_allclose(found / scale, expected / scale, err_msg=output, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_the_reference(name, tmp_path):
    """Outputs, loss and gradients, with its rotations; and the file again, every tensor as it
    was."""
    tensors = write(tmp_path, name)
    model, params = lsg_flax.from_pretrained(tmp_path)
    case, inputs, outputs = load(name)
    result = run_of(name, model)(params)
    (_, out), gradients = result if "grad_of" in case else (result, params)
    ours = {f"grad.{n}": g for n, g in params_to_torch(gradients, model).items()}
    assert len([n for n in outputs if n in ours]) >= 5 or "grad_of" not in case
    lead = next(inputs[n] for n in ("input_ids", "inputs_embeds") if n in inputs).shape[:2]
    real = inputs.get("attention_mask", np.ones(lead, np.int32)).astype(bool)
    for output, expected in outputs.items():
        if output == "weighted_loss":
            continue
        field, _, number = output.partition(".")
        found = ours[output] if field == "grad" else getattr(out, field)
        found = np.asarray(found[int(number)] if field == "hidden_states" else found)
        compared(name, output, found, expected, real)
    written = params_to_torch(params, model)
    assert written.keys() - {"lm_head.decoder.bias"} == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)


def made(task: str = "causal_lm", **fields) -> tuple[Model, Any]:
    """A model with random parameters, larger than at first."""
    config = read_config(SMALL | {"is_decoder": task == "causal_lm"} | fields)
    model = Model(config, task)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    return model, jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, params)


def text(rows: int = 2, length: int = 24) -> dict[str, np.ndarray]:
    """A batch; the first row ends in padding."""
    ids = np.random.default_rng(0).integers(1, 31, (rows, length))
    mask = np.ones((rows, length), np.int32)
    mask[0, -5:] = 0
    return {"input_ids": ids, "labels": np.where(mask, ids, -100), "attention_mask": mask}


def gradients_of(model: Model, params, batch, key=None):
    """Not jitted from outside, so that what it runs can be replaced."""
    run = jax.value_and_grad(lambda params: loss_fn(model, params, batch, key)[0])
    return jax.jit(run)(params)


def assert_close(found, expected, tolerance=1e-5):
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        scale = max(1.0, np.abs(np.asarray(other)).max())
        np.testing.assert_allclose(
            np.asarray(one) / scale, np.asarray(other) / scale, rtol=tolerance, atol=tolerance
        )


RATES = {
    "hidden_dropout_prob": 0.2,
    "local_attention_probs_dropout_prob": 0.1,
    "lsh_attention_probs_dropout_prob": 0.1,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_layers": ["lsh", "local", "local"] * 2, "num_hashes": 2},
        {"attn_layers": ["lsh", "lsh", "local"], "chunk_size_feed_forward": 7},
        {"attn_layers": ["lsh"] * 3, "axial_pos_embds": False},
    ],
    ids=str,
)
def test_gradients_are_those_of_autodiff(fields, monkeypatch):
    """With the dropout and the buckets of the forward pass."""
    model, params = made(**RATES, **fields)
    key = jax.random.key(3)
    loss, gradients = gradients_of(model, params, text(), key)
    monkeypatch.setattr(reformer, "run_layers", reversible.run_layers.fun)  # pyright: ignore
    expected, plain = gradients_of(model, params, text(), key)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_close(gradients, plain)
    assert gradients_of(model, params, text(), jax.random.key(4))[0] != loss


def test_hidden_states_have_gradients_too(monkeypatch):
    model, params = made("base", attn_layers=["local", "lsh"] * 2)
    ids, weight = text()["input_ids"], np.random.default_rng(0).standard_normal((5, 2, 24, 8))

    def run(params):
        states = model.apply({"params": params}, ids, output_hidden_states=True).hidden_states
        return sum((state * part).sum() for state, part in zip(states, weight, strict=True))

    found = jax.jit(jax.grad(lambda p: run(p)))(params)
    monkeypatch.setattr(reformer, "run_layers", reversible.run_layers.fun)  # pyright: ignore
    assert_close(found, jax.jit(jax.grad(lambda p: run(p)))(params))


def compiled(depth: int, length: int = 2048):
    model = Model(
        read_config(
            SMALL
            | {"attn_layers": ["local", "lsh"] * (depth // 2), "is_decoder": True}
            | {"hidden_size": 32, "axial_pos_embds_dim": [16, 16], "num_buckets": None}
            | {"local_attn_chunk_length": 32, "lsh_attn_chunk_length": 32}
            | {"axial_pos_shape": [32, length // 32], "max_position_embeddings": length}
        ),
        "causal_lm",
    )
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    run = jax.jit(
        lambda params, ids: jax.value_and_grad(
            lambda params: loss_fn(
                model, params, {"input_ids": ids, "labels": ids}, jax.random.key(0)
            )[0]
        )(params)
    )
    return run.lower(model.abstract_params(), ids).compile()


def test_memory_and_program_do_not_grow_with_depth():
    """What a backward pass of ten more layers keeps are buckets, one number a token and head."""
    shallow, deep = (compiled(depth) for depth in (4, 24))
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (shallow, deep)]
    assert sizes[1] <= 1.2 * sizes[0], sizes
    assert len(deep.as_text()) <= 1.05 * len(shallow.as_text())


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4}], ids=str)
def test_a_mesh_gives_what_one_device_gives(axes):
    model, params = made(attn_layers=["lsh", "local"] * 2, num_hashes=2, num_attention_heads=4)
    batch = text(rows=4)
    expected = gradients_of(model, params, batch)
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = sharding.make_mesh(**{"data": 1} | axes, devices=devices)
    with jax.set_mesh(mesh):
        placed = sharding.shard(params, mesh), sharding.shard_batch(batch, mesh)
        found = gradients_of(model, *placed)
    assert_close(found, expected)
    with (
        jax.set_mesh(sharding.make_mesh(sequence=2, devices=jax.devices()[:2])),
        pytest.raises(ValueError, match="cannot be sharded over a sequence axis"),
    ):
        model.apply({"params": params}, batch["input_ids"])


def test_rows_are_sorted_on_their_own_devices():
    model, params = made(attn_layers=["lsh"], num_hashes=2)
    mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
    loss = lambda params, batch: loss_fn(model, params, batch, jax.random.key(0))[0]  # noqa: E731
    with jax.set_mesh(mesh):
        placed = sharding.shard(params, mesh), sharding.shard_batch(text(rows=4), mesh)
        program = jax.jit(jax.grad(loss)).lower(*placed).compile().as_text()
    assert "all-reduce" in program  # of gradients
    assert not re.search("all-gather|all-to-all|collective-permute", program)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_finite_and_near(dtype):
    """Streams stay in float32, from which they are computed back."""
    model, params = made(attn_layers=["local"] * 6)
    loss, gradients = gradients_of(model, params, text())
    half, of_half = gradients_of(model.clone(dtype=dtype), params, text())
    np.testing.assert_allclose(half, loss, rtol=2e-2)
    assert_close(of_half, gradients, 5e-2)


def test_the_ordinary_training_step():
    model, params = made(**RATES)
    optimizer = optax.adam(1e-2)
    state = training.init_state(params, optimizer, jax.random.key(0))
    step, found = training.make_train_step(model, optimizer), []
    for _ in range(30):
        state, metrics = step(state, text())
        found.append(float(metrics["loss"]))
    assert found[-1] < 0.7 * found[0]


def test_rotations_are_drawn_where_none_are_given():
    model, params = made("base", attn_layers=["lsh", "lsh"])
    ids, run = text()["input_ids"], jax.jit(model.apply)
    alone = run({"params": params}, ids).last_hidden_state
    for empty in (None, ()):
        found = run({"params": params}, ids, lsh_rotations=empty).last_hidden_state
        np.testing.assert_array_equal(found, alone)
    keys = {"lsh": jax.random.key(9)}
    assert not np.allclose(run({"params": params}, ids, rngs=keys).last_hidden_state, alone)
    seeded = model.clone(config=model.config.with_overrides(hash_seed=5))
    run = jax.jit(seeded.apply)
    one, other = (run({"params": params}, ids, rngs=rngs) for rngs in ({}, keys))
    np.testing.assert_array_equal(one.last_hidden_state, other.last_hidden_state)
    assert not np.allclose(one.last_hidden_state, alone)
    with pytest.raises(ValueError, match=r"= \(2, 4, 1, 2\) for each LSH layer .* there are 2 w"):
        model.apply({"params": params}, ids, lsh_rotations=(np.ones((2, 4, 1, 2), np.float32),))
    with pytest.raises(ValueError, match="there are 0 with 6 tokens"):
        rotation = np.ones((2, 4, 1, 2), np.float32)
        model.apply({"params": params}, ids[:, :6], lsh_rotations=(rotation, rotation))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "axes": (
        {"axial_pos_embds_dim": [3, 4]},
        r"\[3, 4\] adds up to 7, but must add up to hidden_size=8",
    ),
    "one axis": ({"axial_pos_shape": [24]}, "must have two positive numbers each"),
    "kind": ({"attn_layers": ["local", "full"]}, "'local' or 'lsh'"),
    "no layers": ({"attn_layers": []}, "of 1 to 1000 layers"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers=3, but attn_layers"),
    "odd": ({"num_buckets": 7}, "num_buckets=7 must be a power of two, or a list of even factors"),
    "no power": ({"num_buckets": 12}, r"num_buckets=12 must be .* such as \[64, 128\]"),
    "factors": ({"num_buckets": [2, 3]}, r"num_buckets=\(2, 3\) must be a power of two"),
    "no factors": ({"num_buckets": []}, r"num_buckets=\(\) must be"),
    "chunks": ({"lsh_num_chunks_before": -1}, "lsh_num_chunks_before=-1 must be at least 0"),
    "after": (
        {"is_decoder": True, "local_num_chunks_after": 1},
        "local_num_chunks_after=1 with is_decoder=True: a decoder sees no later tokens",
    ),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=True in config.json changes"),
    "lsg": ({"base_model_prefix": "lsg"}, "has no LSG attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit_are_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_config(SMALL | fields)


def test_calls_that_do_not_fit_are_refused():
    model, params = made()
    ids, variables = np.ones((1, 24), np.int32), {"params": params}
    with pytest.raises(ValueError, match=r"25 tokens .* 24 positions .*prod\(axial_pos_shape\)=24"):
        model.apply(variables, np.ones((1, 25), np.int32))
    with pytest.raises(
        ValueError, match=r"prod\(axial_pos_shape\)=24 allows 0..23; a position needs"
    ):
        model.apply(variables, ids, position_ids=np.full((1, 24), 24))
    rngs = {"dropout": jax.random.key(0)}
    with pytest.raises(
        ValueError, match=r"12 tokens while training, .* 4 x 6 = 24 tokens, because"
    ):
        model.apply(variables, ids[:, :12], train=True, rngs=rngs)
    learned, of_learned = made(axial_pos_embds=False)
    with pytest.raises(ValueError, match=r"10 tokens .* multiple of 12, such as 12"):
        learned.apply({"params": of_learned}, ids[:, :10], train=True, rngs=rngs)
    with pytest.raises(ValueError, match="remat='full': a Reformer's layers"):
        model.clone(remat="full").apply(variables, ids)
    with pytest.raises(ValueError, match="is_decoder=True: causal_lm needs a decoder, masked_lm"):
        model.clone(task="masked_lm").apply(variables, ids)
    with pytest.raises(ValueError, match="give attn_layers, such as"):
        model.config.with_overrides(num_hidden_layers=3)


def test_buckets_are_chosen_by_the_length_and_written_nowhere(tmp_path):
    model, params = made(num_buckets=None)
    config = model.config
    assert [config.buckets(n) for n in (6, 12, 18, 24)] == [2, 4, 4, 8]
    long = config.with_overrides(axial_pos_embds=False, max_position_embeddings=9600)
    assert [long.buckets(n) for n in (240, 480)] == [64, (8, 16)]
    model.apply({"params": params}, text()["input_ids"])
    lsg_flax.save_pretrained(tmp_path, model, params)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values == values | SMALL | {"num_buckets": None, "num_hidden_layers": 2}
    assert values["architectures"] == ["ReformerModelWithLMHead"]
    assert "intermediate_size" not in values
    again, _ = lsg_flax.from_pretrained(tmp_path)
    assert (json.loads(json.dumps(again.config.to_dict())), again.task) == (values, "causal_lm")
    with pytest.raises(ValueError, match="a reformer model cannot become LSG"):
        lsg_flax.convert_checkpoint(tmp_path, max_sequence_length=64)
    assert cli.main(["inspect", str(tmp_path)]) == 0


def test_old_files_hold_mask_values_that_are_no_parameters(tmp_path):
    name = "reformer_usual"
    tensors = write(tmp_path, name)
    layer = "encoder.layers.0.attention.self_attention"
    tensors |= {f"{layer}.mask_value_float16": np.full((), -1e4, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    lsg_flax.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="something_else"):
        tensors |= {f"{layer}.something_else": np.ones(1, np.float32)}
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        lsg_flax.from_pretrained(tmp_path)


def test_padding_changes_nothing():
    """A text alone, and beside a longer one, with positions behind the table for padding's."""
    fields = {"attn_layers": ["lsh", "local"], "axial_pos_shape": [4, 5], "num_hashes": 2}
    model, params = made("base", **fields)
    ids, run = text(1, 17)["input_ids"], jax.jit(model.apply)
    alone = run({"params": params}, ids).last_hidden_state  # 24 of 20 positions with padding
    wider = np.pad(ids, ((0, 0), (0, 3)), constant_values=9)
    mask = np.arange(20)[None] < 17
    found = run({"params": params}, wider, mask).last_hidden_state
    np.testing.assert_allclose(found[:, :17], alone, rtol=1e-5, atol=1e-5)


def test_a_training_step_counts_the_keys_that_are_seen():
    model, params = made(attn_layers=["local", "local", "lsh"], num_hashes=3)
    kernels = sum(x.size for x in jax.tree.leaves(params["encoder"]) if x.ndim == 3)
    kernels += params["head"]["kernel"].size
    seen = (2 * 8 + 3 * 12) / 3  # own chunk and the one before, in each round
    found = train_flops(model, {"input_ids": text()["input_ids"]})
    np.testing.assert_allclose(found, 2 * 24 * (6 * kernels + 12 * 3 * 8 * seen))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights for task")
def test_rows_that_it_is_trained_on_are_padded_to_the_length_that_it_trains_on(tmp_path):
    sizes = {"attn_layers": ["local"], "axial_pos_shape": [4, 8], "max_position_embeddings": 32}
    model = Model(read_config(SMALL | sizes), "base")
    limit = model.max_length
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 3), np.int32))["params"]
    lsg_flax.save_pretrained(tmp_path / "m", model, params, hub.read_tokenizer(tiny_run.PLAIN))
    settings = Settings(
        model=str(tmp_path / "m"),
        task="sequence_classification",
        train_data=tiny_run.write(tmp_path, "single_label_classification", rows=8),
        output=str(tmp_path / "out"),
        max_length=limit // 2,
        steps=1,
    )
    assert survey(settings, progress=False).train.buckets == {limit: 8}
    assert finetune(settings, progress=False).step == 1
    with pytest.raises(
        ValueError, match=rf"give at most max_length={limit} \(no conversion of a reformer"
    ):
        survey(dataclasses.replace(settings, max_length=limit + 1), progress=False)
    with pytest.raises(ValueError, match=rf"{limit // 2} tokens while training"):
        survey(dataclasses.replace(settings, buckets=(limit // 2, limit)), progress=False)


@pytest.mark.parametrize(
    ("fields", "longest", "lengths"),
    [
        ({"local_attn_chunk_length": 16}, 900, (1024,)),
        ({"axial_pos_embds": False}, 1000, (520, 1000)),
        ({"axial_pos_embds": False}, 30, (40,)),
    ],
)
def test_batches_have_lengths_that_it_trains_on(fields, longest, lengths):
    axes = {"axial_pos_shape": [32, 32], "local_attn_chunk_length": 20, "attn_layers": ["local"]}
    config = read_config(SMALL | axes | fields)
    assert training_buckets(None, longest, config) == lengths
