"""Exported programs: run by JAX alone, for other platforms and batch sizes, parameters beside."""

import functools
import os
import subprocess
import sys

import jax
import jaxtyping
import numpy as np
import pytest
import safetensors.flax
from golden_data import GOLDEN
from jax import export
from pages import blocks_of
from test_seq2seq import made
from test_seq2seq import run as run_model

import lsg_flax
from lsg_flax import LSGConfig, hub
from lsg_flax.inference import export_model, export_texts
from lsg_flax.models import EncoderConfig, Model

PAGE = "docs/inference.md"
*_, EXPORT, RUN, EXPORT_TEXTS, WRITE = (b.text for b in blocks_of(PAGE) if b.language == "python")
LENGTH = 64


@pytest.fixture(autouse=True)
def unchecked():
    """Without the annotation checks of conftest.py: to them a symbolic batch size is no int."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def make(task="sequence_classification", sparsity_type="norm", **overrides):
    lsg = {"block_size": 4, "sparse_block_size": 4, "num_global_tokens": 2}
    sizes = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": LENGTH}
    lsg_config = LSGConfig(**lsg, sparsity_type=sparsity_type)
    model = Model(EncoderConfig(**sizes | overrides, lsg=lsg_config, initializer_range=0.5), task)
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 3), np.int32))["params"]


def rows(count, length=LENGTH):
    generator = np.random.default_rng(count)
    mask = (np.arange(length)[None] < generator.integers(1, length, (count, 1))).astype(np.int32)
    return generator.integers(0, 23, (count, length), np.int32) * mask, mask


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, ids, mask):
    return model.apply({"params": params}, ids, mask).logits


def read(path):
    return export.deserialize(bytearray(path.read_bytes()))


def run_alone(code, folder, **arrays):
    """Arrays by their names in the code, which runs in a process without lsg_flax."""
    poison = folder / "poison"
    poison.mkdir()
    for name in ("lsg_flax", "flax", "transformers"):
        (poison / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    environment = os.environ | {"PYTHONPATH": str(poison)}
    saved = ", ".join(f"{name}={array}" for name, array in arrays.items())
    command = [sys.executable, "-W", "error", "-c", f"{code}\nnp.savez('out', {saved})"]
    done = subprocess.run(command, stderr=-1, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    refused = subprocess.run([sys.executable, "-c", "import lsg_flax"], stderr=-3, env=environment)
    assert refused.returncode == 1
    with np.load(folder / "out.npz") as stored:
        return dict(stored)


@pytest.mark.slow
def test_the_documented_lines_run_it_without_lsg_flax(tmp_path, monkeypatch):
    model, params = make()
    monkeypatch.chdir(tmp_path)
    lsg_flax.save_pretrained("areas", model, params)
    exec(compile(EXPORT, PAGE, "exec"), {})
    assert {p.name for p in tmp_path.iterdir()} == {"areas", "classifier.stablehlo"}
    out = run_alone(RUN, tmp_path, ids="input_ids", mask="attention_mask", logits="logits")
    expected = logits_of(model, params, out["ids"], out["mask"])
    np.testing.assert_allclose(out["logits"], expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 0.1


@pytest.mark.slow
def test_one_program_for_any_batch_size_and_several_platforms(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # not what it is traced for
    model, params = make(sparsity_type="lsh")  # sorts, with rotations from a key
    path = tmp_path / "deep" / "any.stablehlo"
    export_model(model, params, path, length=LENGTH, platforms=("cpu", "tpu"))
    program = read(path)
    assert program.platforms == ("cpu", "tpu")
    run = jax.jit(program.call)
    for count in (1, 3):
        ids, mask = rows(count)
        expected = logits_of(model, params, ids, mask)
        np.testing.assert_allclose(run(ids, mask)["logits"], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"[sS]hape"):
        run(*rows(2, LENGTH // 2))


def test_parameters_beside_are_an_argument(tmp_path):
    model, params = make("token_classification")
    path = tmp_path / "model.stablehlo"
    options = {"length": 16, "batch_size": 2, "inputs": ("input_ids",)}
    files = export_model(model, params, path, **options, parameters="beside")
    assert [f.name for f in files] == ["model.stablehlo", "model.stablehlo.safetensors"]
    weights = safetensors.flax.load_file(files[1])
    ids, _ = rows(2, 16)
    expected = logits_of(model, params, ids, None)
    run = jax.jit(read(path).call)
    np.testing.assert_allclose(run(weights, ids)["logits"], expected, rtol=1e-5, atol=1e-5)
    doubled = jax.tree.map(lambda x: 2 * x, weights)
    assert np.abs(run(doubled, ids)["logits"] - expected).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 65}, "length=65 must be in 1..64"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"fields": ("pooled",)}, r"fields=\('pooled',\) are not all outputs of .* logits"),
        ({"fields": ()}, r"fields=\(\) leaves nothing"),
        ({"inputs": ("attention_mask",)}, "must have input_ids"),
        ({"inputs": ("input_ids", "input_ids")}, "must be some of input_ids, attention_mask"),
        ({"platforms": ()}, "must be some of cpu, cuda, rocm, tpu"),
    ],
)
def test_settings_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(*make(), tmp_path / "x", **{"length": 16} | options)
    assert not list(tmp_path.iterdir())


def test_choices_cannot_be_exported(tmp_path):
    model = Model(make()[0].config, "multiple_choice")
    with pytest.raises(ValueError, match=r"multiple_choice. has inputs of another shape"):
        export_model(model, {}, tmp_path / "x", length=16)


def test_without_flatbuffers_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"pip install 'lsg-flax\[export\]'"):
        export_model(*make(), tmp_path / "x", length=16)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x"
    export_model(*make(), path, length=16)
    before = path.read_bytes()
    monkeypatch.setattr(
        "lsg_flax.inference.export.save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28))
    )
    with pytest.raises(OSError, match="28"):
        export_model(*make(), path, length=8, parameters="beside")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.filterwarnings("ignore:weights for task")
def test_a_converted_checkpoint_is_exported(tmp_path):
    model, params = hub.from_pretrained(GOLDEN / "bert_to_convert_512", "sequence_classification")
    export_model(model, params, tmp_path / "x", length=32, batch_size=1)
    ids, mask = rows(1, 32)
    expected = logits_of(model, params, ids, mask)
    ours = read(tmp_path / "x").call(ids, mask)["logits"]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------- texts


def writer(family="bart", **fields):
    fields |= {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return made(family, "conditional_generation", max_position_embeddings=LENGTH, **fields)


@pytest.mark.slow
def test_the_documented_lines_write_texts_without_lsg_flax(tmp_path, monkeypatch):
    """The tokens of greedy `generate`, from two documents of different lengths."""
    model, params = writer(tie_word_embeddings=False)
    params = jax.tree.map(lambda x: 4 * x, params)  # texts that differ
    monkeypatch.chdir(tmp_path)
    lsg_flax.save_pretrained("lsg-bart-arxiv", model, params)
    exec(compile(EXPORT_TEXTS, PAGE, "exec"), {})
    folder = tmp_path / "summarizer"
    assert sorted(p.name for p in folder.iterdir()) == ["encoder.stablehlo", "step.stablehlo"]
    out = run_alone(WRITE, tmp_path, ids="input_ids", mask="attention_mask", written="written")
    options = {"num_beams": 1, "max_new_tokens": out["written"].shape[1], "eos_token_id": None}
    options |= {"forced_eos_token_id": None}
    expected = lsg_flax.generate(model, params, out["ids"], out["mask"], **options)
    np.testing.assert_array_equal(out["written"], expected[:, 1:])
    assert len(np.unique(expected[:, 1:])) > 3 and (expected[0] != expected[1]).any()


@pytest.mark.slow
def test_texts_of_a_fixed_batch_with_parameters_beside(tmp_path):
    """Sinusoids, a norm in front, and logits that are those of the whole decoder; behind the last
    slot there are none."""
    model, params = writer("pegasus")
    options = {"length": 16, "max_new_tokens": 3, "batch_size": 2, "parameters": "beside"}
    files = export_texts(model, params, tmp_path, **options)
    assert [p.name for p in files] == [
        *("encoder.stablehlo", "step.stablehlo", "parameters.safetensors")
    ]
    weights = safetensors.flax.load_file(files[2])
    ids, mask = rows(2, 16)
    tokens = np.array([[2, 5, 6], [2, 7, 8]], np.int32)
    cache = read(files[0]).call(weights, ids, mask)
    step, scores = jax.jit(read(files[1]).call), []
    for i in range(3):
        logits, cache = step(weights, cache, tokens[:, i : i + 1])
        scores.append(logits)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens}
    expected = run_model(model, params, **inputs).logits
    np.testing.assert_allclose(np.stack(scores, 1), expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(step(weights, cache, tokens[:, :1])[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be in 1..64"),
        ({"max_new_tokens": 65}, "max_new_tokens=65 must be in 1..64"),
        ({"length": 65}, "length=65 must be in 1..64"),
        ({"platforms": ("gpu",)}, "must be some of cpu, cuda, rocm, tpu"),
    ],
)
def test_texts_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_texts(*writer(), tmp_path, **{"length": 16, "max_new_tokens": 4} | options)
    with pytest.raises(ValueError, match="got bert for sequence_classification; use export_model"):
        export_texts(*make(), tmp_path, length=16, max_new_tokens=4)
    assert not list(tmp_path.iterdir())
