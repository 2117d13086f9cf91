"""Batched inference: order, padding, buckets, compilations, files, and documents that do not
fit."""

import functools
import json

import jax
import numpy as np
import pytest

from lsg_flax import LSGConfig, inference, sharding
from lsg_flax.models import EncoderConfig, Model

BUCKETS = (16, 32)
LENGTHS = (5, 30, 16, 1, 9, 12, 20, 8, 3)


@functools.cache
def make(task="token_classification", **overrides):
    lsg = LSGConfig(block_size=4, sparse_block_size=4, num_global_tokens=2)
    sizes = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    rest = {"num_attention_heads": 2, "max_position_embeddings": 32, "lsg": lsg}
    model = Model(EncoderConfig(**sizes | rest | overrides), task)
    ids = np.zeros((1, 2, 3) if task == "multiple_choice" else (1, 3), np.int32)
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"]


def documents(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    return [{"input_ids": generator.integers(0, 23, length).tolist()} for length in lengths]


def alone(model, params, encoding):
    arrays = {name: np.array([values]) for name, values in encoding.items()}
    return apply(model, params, arrays)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, arrays):
    return model.apply({"params": params}, **arrays)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["token_classification", "base"])
def test_each_document_is_as_if_alone_and_in_order(task):
    model, params = make(task)
    encodings = documents()
    results = inference.predict(model, params, encodings, buckets=BUCKETS, progress=False)
    fields = {"base": {"last_hidden_state", "pooler_output"}}.get(task, {"logits"})
    for place in (1, 5):
        encoding, result = encodings[place], results[place]
        expected = alone(model, params, encoding)
        assert result.keys() == fields
        for name, value in result.items():
            one = getattr(expected, name)[0]
            assert value.shape == one.shape
            np.testing.assert_allclose(value, one, rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_compilation_per_bucket():
    model, params = make(num_hidden_layers=1)  # one that no other test has compiled
    predictor = inference.Predictor(model, params, batch_size=2, buckets=BUCKETS)
    assert predictor.compilations == 0
    list(predictor(documents((5, 11, 6, 7)), progress=False))
    assert predictor.compilations == 1
    list(predictor(documents(), window=4, progress=False))
    again = inference.Predictor(model, params, batch_size=2, buckets=BUCKETS)
    list(again(documents(), progress=False))
    assert again.compilations == predictor.compilations == 2


def test_what_fills_the_last_batch_up_has_no_effect():
    model, params = make()
    encodings = documents((7, 5, 6))
    full, filled = (
        inference.predict(model, params, encodings, batch_size=n, buckets=(16,), progress=False)
        for n in (3, 8)
    )
    for one, other in zip(full, filled, strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], rtol=1e-5, atol=1e-6)


def test_masks_segments_and_choices_are_passed_on():
    model, params = make()
    ids = [4, 5, 6, 7, 8]
    encoding = {
        "input_ids": ids,
        "attention_mask": [1, 1, 0, 1, 1],
        "token_type_ids": [0, 0, 1, 1, 1],
    }
    (result,) = inference.predict(model, params, [encoding], buckets=(16,), progress=False)
    np.testing.assert_allclose(
        result["logits"], alone(model, params, encoding).logits[0], rtol=1e-4, atol=1e-5
    )
    model, params = make("multiple_choice")
    encoding = {"input_ids": [ids, [9, 10]]}
    padded = {
        "input_ids": [ids, [9, 10, 0, 0, 0]],
        "attention_mask": [[1] * 5, [1, 1, 0, 0, 0]],
    }
    (result,) = inference.predict(model, params, [encoding], buckets=(16,), progress=False)
    np.testing.assert_allclose(
        result["logits"], alone(model, params, padded).logits[0], rtol=1e-4, atol=1e-5
    )


def test_the_outputs_of_a_task_decide_what_is_cut():
    """ELECTRA's "pretraining" gives logits [B, T], one number per token; BERT's also an answer per
    document."""
    model, params = make("pretraining", model_type="electra", embedding_size=8)
    encodings = documents((5, 7))
    results = inference.predict(model, params, encodings, buckets=(16,), progress=False)
    assert [result["logits"].shape for result in results] == [(5,), (7,)]
    expected = alone(model, params, encodings[1]).logits[0]
    np.testing.assert_allclose(results[1]["logits"], expected, rtol=1e-4, atol=1e-5)
    model, params = make("pretraining")
    results = inference.predict(model, params, encodings, buckets=(16,), progress=False)
    shapes = [{name: value.shape for name, value in result.items()} for result in results]
    assert shapes == [
        {"prediction_logits": (length, 23), "seq_relationship_logits": (2,)} for length in (5, 7)
    ]


def test_jsonl_is_in_order_and_appears_whole(tmp_path):
    model, params = make()
    path, encodings = tmp_path / "deep" / "out.jsonl", documents()
    names = [f"document {i}" for i in range(len(encodings))]
    options = {"buckets": BUCKETS, "progress": False}
    inference.predict_to_jsonl(path, model, params, encodings, ids=names, window=4, **options)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == names
    results = inference.predict(model, params, encodings, **options)
    for line, result in zip(lines, results, strict=True):
        np.testing.assert_allclose(line["logits"], result["logits"], rtol=1e-4, atol=1e-5)
    before = path.read_text()
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(ValueError, match=r"document 0: .*'logits'.* are not finite"):
        inference.predict_to_jsonl(path, model, broken, encodings, **options)
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["out.jsonl"]
    names[1] = np.float32("nan")
    with pytest.raises(ValueError, match="its id nan has NaN or infinity"):
        inference.predict_to_jsonl(path, model, params, encodings, ids=names, **options)
    with pytest.raises(ValueError, match="2 ids for 9 documents"):
        inference.predict_to_jsonl(path, model, params, encodings, ids=names[:2], **options)


@pytest.mark.parametrize(
    ("encodings", "message"),
    [
        (documents((4, 33)), r"document 1 has 33 tokens, more than 32, .*convert_checkpoint"),
        ([{"input_ids": [1]}, {"input_ids": []}], "document 1 has .* at least 1"),
        ([{"input_ids": [1, 23]}], r"document 0 has input_ids in 1..23, but vocab_size=23 allows"),
        ([{"input_ids": [1, -1]}], r"document 0 has input_ids in -1..1"),
        ([{"input_ids": [1], "token_type_ids": [2]}], r"token_type_ids in 2..2, but type_vocab"),
        ([{"input_ids": [1], "attention_mask": [1, 1]}], r"document 0 has \[2\] attention_mask"),
        (
            [{"input_ids": [1], "attention_mask": [2]}],
            "document 0 .* 2..2; a mask has only 0 and 1",
        ),
        ([{"input_ids": [1], "labels": [1]}], r"document 0 has the fields \['input_ids', 'labels'"),
        ([{"input_ids": [1]}, {"input_ids": [1], "attention_mask": [1]}], "document 1 has the fie"),
    ],
)
def test_documents_that_cannot_be_read(encodings, message):
    model, params = make()
    with pytest.raises(ValueError, match=message):
        inference.predict(model, params, encodings, progress=False)


def test_settings_that_cannot_be():
    model, params = make()
    with pytest.raises(ValueError, match=r"buckets=\(8, 64\) must be lengths in 1..32"):
        inference.Predictor(model, params, buckets=(64, 8))
    with pytest.raises(ValueError, match="batch_size=0"):
        inference.Predictor(model, params, batch_size=0)
    with pytest.raises(ValueError, match=r"32 tokens a row.* at most batch_size=4194304\."):
        inference.Predictor(model, params, batch_size=10**12)
    with pytest.raises(ValueError, match=r"fields=\('pooled',\) are not all outputs of .* logits"):
        inference.predict(model, params, documents(), fields=["pooled"], progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "sequence": 2}], ids=str
)
def test_a_mesh_gives_what_one_device_gives(axes):
    model, params = make("sequence_classification", vocab_size=24)
    encodings, mesh = documents(), sharding.make_mesh(**axes)
    buckets = (24, 32) if "sequence" in axes else BUCKETS  # three blocks of 4 for each shard
    options = {"buckets": buckets, "batch_size": 8}
    one = inference.predict(model, params, encodings, **options, progress=False)
    predictor = inference.Predictor(model, params, **options, mesh=mesh)
    cut = [leaf for leaf in jax.tree.leaves(predictor.params) if not leaf.is_fully_replicated]
    assert bool(cut) == (axes != {"data": 8})
    many = list(predictor(encodings, progress=False))
    list(inference.Predictor(model, params, **options, mesh=mesh)(encodings, progress=False))
    assert predictor.compilations == len(BUCKETS)
    for ours, theirs in zip(many, one, strict=True):
        np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=1e-5, atol=1e-5)


def test_meshes_that_do_not_fit():
    model, params = make()
    mesh = sharding.make_mesh(data=4, sequence=2)
    with pytest.raises(ValueError, match=r"6 rows, which data=4 cannot split .* a multiple of 4"):
        inference.Predictor(model, params, mesh=mesh, batch_size=6, buckets=BUCKETS)
    with pytest.raises(ValueError, match=r"31 tokens, which sequence=2 cannot .* a multiple of 2"):
        inference.Predictor(model, params, mesh=mesh, batch_size=8, buckets=(24, 31))
    with pytest.raises(ValueError, match=r"16 tokens over sequence=2 .* 2 blocks of 4, fewer than"):
        inference.Predictor(model, params, mesh=mesh, batch_size=8, buckets=BUCKETS)


def test_the_device_is_ahead_of_the_host_and_not_too_far():
    """Each window is one batch: how many were read when a result comes is how many are at the
    device or done."""
    model, params = make()
    read = []

    def windows():
        for encoding in documents((3, 7, 5, 9, 4, 6)):
            read.append(encoding)
            yield [encoding]

    predictor = inference.Predictor(model, params, batch_size=1, buckets=(16,))
    ahead, results = [], []
    for (result,) in predictor.stream(windows()):
        results.append(result)
        ahead.append(len(read) - len(results))
    assert ahead == [inference.IN_FLIGHT] * 4 + [1, 0]
    assert [len(r["logits"]) for r in results] == [len(e["input_ids"]) for e in read]
    expected = inference.predict(model, params, read, batch_size=1, buckets=(16,), progress=False)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours["logits"], theirs["logits"])
    with pytest.raises(ValueError, match="window 1 has no documents"):
        list(predictor.stream([read[:1], []]))
