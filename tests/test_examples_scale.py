"""The examples of training and inference at scale, and docs/scaling.md, run in a tiny setting."""

import json
import math
import pathlib
import re
import sys

import jax
import jaxtyping
import numpy as np
import pytest
from golden_data import GOLDEN
from jax import export

import lsg_flax
from lsg_flax import hub

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
WORDS = [f"w{number}" for number in range(5, 30)]  # of the golden checkpoints' tokenizer
TINY = str(GOLDEN / "bert_to_convert_512")


@pytest.fixture
def main(script, monkeypatch, tmp_path):
    """The `main` of an example or a benchmark, in an empty folder and with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return lambda name: script(name).main


def texts(count, length, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, length)) for _ in range(count)]


def write(path, rows):
    pathlib.Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def checkpoint(tmp_path):
    """A plain BERT that meshes can cut, with a tokenizer, as a classifier."""
    config = lsg_flax.EncoderConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        labels=("first", "second"),
    )
    model = lsg_flax.Model(config, "sequence_classification")
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    tokenizer = hub.read_tokenizer(pathlib.Path(TINY))
    lsg_flax.save_pretrained(tmp_path / "plain", model, params, tokenizer)
    return tmp_path / "plain"


@pytest.fixture
def untyped():
    """Shapes of any batch size are no integers, which jaxtyping expects."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_pretraining_measures_each_length_before_and_after(main, capsys):
    write("train.jsonl", [{"text": text} for text in texts(4, 600)])
    write("held.jsonl", [{"text": text} for text in texts(2, 400, seed=1)])
    arguments = ["--model", TINY, "--train", "train.jsonl", "--held-out", "held.jsonl"]
    table = main("pretrain_mlm")([*arguments, "--lengths", "64", "300", "--steps", "2", "1"])
    rows = [("full attention", 64), ("LSG, converted", 64), ("LSG, converted", 300)]
    rows += [("LSG, trained on", 64), ("LSG, trained on", 300)]
    assert [row[:2] for row in table] == rows
    values = [row[2] for row in table]
    # nobody can know random words of 25: at best 25, and an untrained model of 31 is not far off
    assert all(20 < value < 40 for value in values) and len(set(values)) == 5
    assert "2 steps of 32 x 64 tokens" in capsys.readouterr().out


def test_pretraining_wants_held_out_text(main, capsys):
    with pytest.raises(SystemExit):
        main("pretrain_mlm")(["--train", "train.jsonl"])
    assert "give both, or neither" in capsys.readouterr().err


def test_inference_goes_on_behind_a_broken_line(main, checkpoint, untyped, capsys):
    """The run ends at the broken line with a window finished; mended, it goes on from there."""
    documents = texts(44, 90)
    lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(documents)]
    pathlib.Path("in.jsonl").write_text("\n".join([*lines[:-1], '{"id": "d43", "te']))
    arguments = ["in.jsonl", "--output", "out.jsonl", "--checkpoint", str(checkpoint)]
    arguments += ["--max-length", "128", "--window", "8", "--export", "model.stablehlo"]
    run = main("batched_inference")
    with pytest.raises(ValueError, match=r"in\.jsonl:44: "):
        run(arguments)
    assert not pathlib.Path("out.jsonl").exists()
    pathlib.Path("in.jsonl").write_text("\n".join(lines))
    written = run(arguments)
    assert written.documents == 44 and 0 < written.computed < 44
    assert "'data': 8" in capsys.readouterr().out

    model, params = lsg_flax.convert_checkpoint(checkpoint, max_sequence_length=128)
    tokenizer = hub.read_tokenizer(checkpoint)
    ids = tokenizer(documents, padding="max_length", max_length=128, return_tensors="np")
    ids, mask = (np.asarray(ids[n], np.int32) for n in ("input_ids", "attention_mask"))
    logits = jax.jit(model.apply)({"params": params}, ids, mask).logits
    answers = [json.loads(line) for line in pathlib.Path("out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [f"d{i}" for i in range(44)]
    scores = [{a["label"]: a["score"] for a in answer["answer"]} for answer in answers]
    found = [[score["first"], score["second"]] for score in scores]
    np.testing.assert_allclose(found, jax.nn.softmax(logits, axis=-1), atol=1e-5)
    program = export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(ids, mask)["logits"], logits, atol=1e-5)


def test_a_long_sequence_over_eight_devices(main, capsys):
    numbers = main("sharded_long_sequence")(["--devices", "0", "--tokens", "4096", "--width", "32"])
    assert numbers["apart"] < 1e-5
    assert numbers["loss"] == pytest.approx(math.log(257), abs=0.3)  # nothing is learned yet
    assert numbers["each"] < numbers["alone"] / 4
    assert "x collective-permute" in capsys.readouterr().out


def test_a_reformer_that_is_deeper_needs_no_more_memory(main, capsys):
    sizes = ["--tokens", "2048", "--layers", "2", "8", "--width", "16"]
    found = main("reformer_long")(sizes)
    assert list(found) == [(512, 2), (512, 8), (2048, 2), (2048, 8)]
    for tokens in (512, 2048):
        shallow, deep = found[tokens, 2], found[tokens, 8]
        assert deep["temporaries"] < 1.2 * shallow["temporaries"]
        assert deep["loss"] == pytest.approx(math.log(256), abs=0.3)  # nothing is learned yet
    assert found[2048, 2]["peak"] > 100 and "2,048 tokens, 8 layers: " in capsys.readouterr().out
    planned = main("reformer_long")([*sizes[:4], *sizes[-2:], "--topology", "cpu:1"])
    assert planned[2048, 2]["all"] > planned[2048, 2]["temporaries"] > 1


def test_long_models_are_of_one_size_and_measured(main, tmp_path, capsys):
    compare = main("long_attention")
    benchmark = sys.modules["long_attention"]
    sizes = {}
    for rival in benchmark.RIVALS:
        model = benchmark.make_model(rival, 256)
        assert model.config.num_hidden_layers == 4 and model.config.is_decoder
        assert model.config.hidden_size == 128
        leaves = jax.tree.leaves(model.abstract_params()["encoder"])
        sizes[rival] = sum(math.prod(leaf.shape) for leaf in leaves)
    assert max(sizes.values()) < 1.2 * min(sizes.values()), sizes
    assert benchmark.measure_cost(["local"], 256, limit=1, repeats=1) == {}  # not even compiled
    options = ["--rivals", "local", "--lengths", "256", "--repeats", "2", "--output", "."]
    compare([*options, "--training-length", "256", "--tokens", "4096", "--seconds", "0.5"])
    found = json.loads((tmp_path / "long_attention.json").read_text())
    assert found["cost"]["256"]["local"]["seconds"] > 0 < found["cost"]["256"]["local"]["mib"]
    marks = found["training"]["local"]
    assert marks[0]["tokens"] == marks[0]["seconds"] == 0
    assert marks[0]["bits"] == pytest.approx(8, abs=0.2) and marks[-1]["bits"] < 7
    assert marks[-1]["tokens"] >= 4096 and marks[-1]["seconds"] >= 0.5
    assert "| 4,096 tokens | " in capsys.readouterr().out
    assert (tmp_path / "long_attention.png").stat().st_size > 10_000


def test_global_tokens_learn_from_files_too(main, tmp_path):
    for name, seed in (("train", 0), ("held", 1)):
        rows = [f"{text},{'ab'[i % 2]}" for i, text in enumerate(texts(6, 40, seed))]
        pathlib.Path(f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    arguments = ["--train", "train.csv", "--held-out", "held.csv", "--length", "48"]
    loss = main("train_global_tokens")([*arguments, "--checkpoint", TINY, "--steps", "2"])
    assert 0 < loss["before"] < 2 and loss["before"] != loss["after"]


def test_the_program_of_the_scaling_page(checkpoint, monkeypatch, tmp_path):
    """And called again, it has nothing left to do."""
    page = ROOT / "docs/scaling.md"
    block, _ = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lsg_flax.convert_checkpoint(checkpoint, "path/to/lsg-bert", max_sequence_length=512)
    for name, seed in (("train", 0), ("test", 1)):
        rows = enumerate(texts(12, 40, seed))
        write(f"{name}.jsonl", [{"text": text, "label": i % 2} for i, text in rows])
    block = block.replace("max_length=4096", "max_length=512")
    first, again = {}, {}
    exec(compile(block, str(page), "exec"), first)
    assert [record["step"] for record in first["history"]] == [1, 2, 3, 4]
    assert first["history"][-1]["compilations"] == 1
    exec(compile(block, str(page), "exec"), again)
    assert again["history"] == [] and again["scores"] == first["scores"]
