"""REALM: what PyTorch's classes cannot say for us (tests/test_golden_model.py has their numbers):
batches of questions, parts of files, names of TensorFlow, LSG readers, training, bad input."""

import functools
import json
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from golden_data import GOLDEN, load
from tensorflow_names import OF_TENSORFLOW, WORDS, in_tensorflow

import lsg_flax
from lsg_flax import hub, training
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.inference import predict
from lsg_flax.models import read_config
from lsg_flax.sharding import make_mesh, shard, shard_batch

READER, ENCODER = "realm_reader", "realm_knowledge_augmented_encoder"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def golden(folder: str, **fields):
    return lsg_flax.from_pretrained(GOLDEN / folder, **fields)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, arrays):
    return model.apply({"params": params}, **arrays)


def case(name: str) -> dict[str, np.ndarray]:
    """The arguments of a recorded case."""
    inputs = load(f"model_{name}")[1]
    return {n: array for n, array in inputs.items() if not n.startswith("weight_")}


def tensors_of(folder) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def written(folder, config: str, tensors: dict[str, np.ndarray], **fields):
    """A folder with the config.json of a golden one and these tensors."""
    folder.mkdir()
    values = json.loads((GOLDEN / config / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


# ------------------------------------------------------------------------------------ the outputs


def test_a_batch_of_questions_is_each_of_them():
    model, params = golden(READER)
    one = case("realm_reader_loss")
    other = one | {
        "relevance_score": one["relevance_score"][::-1].copy(),
        "input_ids": one["input_ids"][:, ::-1].copy(),
        "start_positions": np.full((5, 2), -1),
        "end_positions": np.full((5, 2), -1),
    }
    both = run(model, params, {n: np.stack([one[n], other[n]]) for n in one})
    alone = [run(model, params, arrays) for arrays in (one, other)]
    np.testing.assert_allclose(both.loss, (alone[0].loss + alone[1].loss) / 2, **TOLERANCE)
    for name in ("reader_logits", "retriever_logits", "start_pos", "end_pos", "block_idx"):
        for row in (0, 1):
            value = getattr(both, name)[row]
            np.testing.assert_allclose(value, getattr(alone[row], name), **TOLERANCE)
    assert both.reader_loss.shape == (2,) and both.reader_loss[1] == 0 < both.reader_loss[0]
    assert alone[0].reader_logits.shape == (3, 15 + 14 + 13 + 12)
    assert alone[0].retriever_logits.shape == (3, 1)


def test_a_wrong_activation_is_seen():
    assert read_config({"model_type": "realm"}).hidden_act == "gelu_new"
    name = "model_realm_embedder_padded"
    model, params = golden("realm_embedder", hidden_act="gelu")
    score = run(model, params, case(name.removeprefix("model_"))).projected_score
    difference = np.abs(score - load(name)[2]["projected_score"]).max()
    assert difference > 1e-4, difference  # where test_golden_model.py allows no more


def test_an_answer_wider_than_the_spans_is_named_where_it_can_be_read():
    model, params = golden(READER)
    arrays = case("realm_reader_answers_wider_than_spans")
    with pytest.raises(ValueError, match=r"3 answers are not spans.* max_span_width=4 .*\(-1"):
        model.apply({"params": params}, **arrays)
    out = run(model, params, arrays)  # as in the reference: the block has it, no span is it
    assert out.retriever_correct.sum() == 3 and out.reader_correct.sum() == 1


@pytest.mark.parametrize(("start", "end"), [(15, 15), (3, -1), (-1, 3), (4, 3)])
def test_answers_beyond_the_tokens_and_halves_of_answers_are_named(start, end):
    model, params = golden(READER)
    arrays = case("realm_reader_answers_wider_than_spans")
    places = {"start_positions": start, "end_positions": end}
    places = {name: np.full_like(arrays[name], place) for name, place in places.items()}
    with pytest.raises(ValueError, match=f"from token {start} to {end} of 15: spans have"):
        model.apply({"params": params}, **arrays | places)


def test_the_embedder_embeds_a_corpus():
    model, params = golden("realm_embedder")
    documents = [{"input_ids": list(range(5, 5 + n))} for n in (3, 9, 5)]
    made = predict(model, params, documents, batch_size=2, buckets=(8, 16), progress=False)
    for document, row in zip(documents, made, strict=True):
        alone = run(model, params, {"input_ids": np.array([document["input_ids"]])})
        np.testing.assert_allclose(row["projected_score"], alone.projected_score[0], **TOLERANCE)


# -------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("folder", ["realm_embedder", READER, "realm_scorer_of_two"])
def test_every_tensor_survives_a_round_trip(folder):
    """The head of pretraining too, which nothing reads."""
    found, stored = params_to_torch(*golden(folder)[::-1]), tensors_of(GOLDEN / folder)
    assert any("cls.predictions.transform" in name for name in stored)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    assert {n for n in found if not n.endswith("predictions.decoder.bias")} == {*stored}


def test_two_embedders_never_overwrite_each_other(tmp_path):
    two = tensors_of(GOLDEN / "realm_scorer_of_two")
    model, params = golden("realm_scorer_of_two")
    assert model.config.own_query_embedder and params.keys() == {"embedder", "query_embedder"}
    kernels = [part["head"]["dense"]["kernel"] for part in params.values()]
    assert not np.allclose(*kernels)
    one = {n: t for n, t in two.items() if n.startswith("embedder.")}
    twins = one | {f"query_{n}": t.copy() for n, t in one.items()}  # as pickles have them
    for name, tensors in (("one", one), ("twins", twins)):
        shared, inner = lsg_flax.from_pretrained(written(tmp_path / name, "realm_scorer", tensors))
        assert not shared.config.own_query_embedder
        same(inner, {"embedder": params["embedder"]})
    _, forked = lsg_flax.from_pretrained(tmp_path / "one", own_query_embedder=True)
    same(forked["query_embedder"], forked["embedder"])
    with pytest.raises(ValueError, match=r"must have the parts .'embedder'., got .*query_embedder"):
        params_to_torch(params, shared)


def test_parts_are_read_out_of_a_whole_system(tmp_path):
    """RealmForOpenQA's file has an embedder, a reader and the embeddings of blocks."""
    parts = {"embedder": "realm_embedder", "reader": READER}
    tensors = {"block_emb": np.ones((4, 5), np.float32)}
    for part, folder in parts.items():
        tensors |= {f"{part}.{n}": t for n, t in tensors_of(GOLDEN / folder).items()}
    named = {"architectures": ["RealmForOpenQA"]}
    folder = written(tmp_path / "open_qa", READER, tensors, **named)
    for part, source in parts.items():
        same(lsg_flax.from_pretrained(folder, task=part)[1], golden(source)[1])
    with pytest.raises(ValueError, match=r"RealmForOpenQA.*pass task=, one of .*embedder.*reader"):
        lsg_flax.from_pretrained(folder)
    assert hub.open_checkpoint(folder).tensors["block_emb"].shape == (4, 5)


@pytest.mark.parametrize("kind", WORDS)
def test_names_of_tensorflow_are_read(tmp_path, kind):
    """tests/parity has the same tensors through transformers' own reader."""
    folder = OF_TENSORFLOW[kind]
    theirs = in_tensorflow(tensors_of(GOLDEN / folder), kind)
    assert any("/attention/self/query/kernel" in name for name in theirs)
    of_safetensors = written(tmp_path / "safetensors", folder, theirs)
    of_numpy = shutil.copytree(of_safetensors, tmp_path / "numpy")
    (of_numpy / "model.safetensors").unlink()
    np.savez(of_numpy / "model.npz", **theirs)
    expected = flax.traverse_util.flatten_dict(golden(folder)[1], sep="/")
    for place in (of_safetensors, of_numpy):
        params = flax.traverse_util.flatten_dict(lsg_flax.from_pretrained(place)[1], sep="/")
        for path in expected.keys() - {"head/decoder_weight/buffer"}:
            np.testing.assert_array_equal(params[path], expected[path], err_msg=path)


def test_an_archive_of_objects_is_not_unpickled(tmp_path):
    folder = written(tmp_path / "objects", READER, {})
    (folder / "model.safetensors").unlink()
    np.savez(folder / "model.npz", x=np.array([{}], object))
    with pytest.raises(ValueError, match=r"model\.npz is damaged .*allow_pickle=False"):
        lsg_flax.from_pretrained(folder)


def test_a_plain_bert_becomes_an_embedder():
    source = GOLDEN / "bert_plain_base"
    with pytest.warns(UserWarning, match="drawn from seed 0: head/dense/bias, .*layer_norm/scale"):
        model, params = lsg_flax.from_pretrained(source, "embedder", model_type="realm")
    assert model.config.hidden_act == json.loads((source / "config.json").read_text())["hidden_act"]
    same(params["encoder"], lsg_flax.from_pretrained(source)[1]["encoder"])


# ------------------------------------------------------------------------------- LSG and training


@pytest.mark.parametrize(
    ("folder", "name"), [(READER, "Reader"), ("realm_embedder", "Embedder"), ("realm_scorer", None)]
)
def test_readers_of_long_blocks(tmp_path, folder, name):
    source = written(
        tmp_path / "source", folder, tensors_of(GOLDEN / folder), bos_token_id=2, mask_token_id=4
    )
    options = {"max_sequence_length": 100, "block_size": 8, "sparse_block_size": 8}
    model, params = lsg_flax.convert_checkpoint(source, tmp_path / "long", **options)
    again, reloaded = lsg_flax.from_pretrained(tmp_path / "long")
    assert again.task == model.task and again.config.lsg == model.config.lsg
    assert again.config.reader_seq_len == again.max_length == 100
    same(params, reloaded)
    values = json.loads((tmp_path / "long" / "config.json").read_text())
    class_name = f"LSGRealm{name or 'Scorer'}"
    assert (values["model_type"], values["architectures"]) == ("lsg-realm", [class_name])
    said = hub.in_pytorch(hub.open_checkpoint(tmp_path / "long"))
    assert f"not possible: {class_name} exists only in lsg_flax" in said
    if folder == READER:
        check_long_reading(model, params)


def check_long_reading(model, params):
    """Padding behind long blocks changes nothing; an answer near the end is learnt from."""
    ids = np.random.default_rng(0).integers(5, 31, (3, 100))
    mask, segments = np.ones((3, 100), int), (np.arange(100) > 7).astype(int)[None].repeat(3, 0)
    mask[:, 90:] = 0
    labels = {"start_positions": np.full((3, 1), 80), "end_positions": np.full((3, 1), 82)}
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments} | labels
    batch |= {"block_mask": (segments * mask).astype(bool), "has_answers": np.ones(3, bool)}
    batch["relevance_score"] = np.array([1.0, 0.5, 0.0], np.float32)
    out = run(model, params, batch)
    changed = batch | {"input_ids": np.where(mask, ids, 9)}
    np.testing.assert_allclose(run(model, params, changed).loss, out.loss, **TOLERANCE)
    assert out.reader_logits.shape == (3, 100 + 99 + 98 + 97) and int(out.end_pos[0]) < 90

    def loss(params):
        return training.loss_fn(model, params, batch)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, out.loss, rtol=1e-6)
    norms = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradients)
    assert norms["encoder"]["embeddings"]["global_embeddings"]["embedding"] > 0
    assert norms["head"]["decoder_weight"]["buffer"] == 0


@pytest.mark.parametrize("name", ["realm_reader_loss", f"{ENCODER}_loss_of_some"])
def test_microbatches_train_as_one_batch(name):
    """Rows count by their labels, however they are spread."""
    arrays = case(name)
    model, params = golden(READER if "reader" in name else ENCODER)
    whole = (
        {n: np.stack([a, a[..., ::-1]]) for n, a in arrays.items()} if "reader" in name else arrays
    )
    if "reader" in name:
        whole["input_ids"][1] = whole["input_ids"][0]
    batches = {1: whole, 2: {n: a[:, None] for n, a in whole.items()}}
    results = {}
    for count, batch in batches.items():
        optimizer = optax.sgd(0.1)
        state = training.init_state(params, optimizer, jax.random.key(0))
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        still = model.clone(config=model.config.with_overrides(**without))
        state, metrics = training.make_train_step(still, optimizer, count)(state, batch)
        results[count] = state.params, metrics["loss"]
    np.testing.assert_allclose(results[1][1], results[2][1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        *(params for params, _ in results.values()),
    )


def test_questions_and_heads_over_a_mesh():
    model, params = golden(READER)
    one = case("realm_reader_loss")
    batch = {name: np.stack([array, array]) for name, array in one.items()}
    batch["relevance_score"][1] *= -1
    loss = jax.jit(lambda params, batch: training.loss_fn(model, params, batch)[0])
    expected = loss(params, batch)
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = loss(shard(params, mesh), shard_batch(batch, mesh))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_loss_of_other_arrays_cannot_be_planned():
    model = lsg_flax.Model(golden(READER)[0].config, "reader")
    with pytest.raises(ValueError, match=r"task='reader' computes its own loss from relevance"):
        training.label_shape(model, model.task_record.targets[0], (2, 3, 15))


# -------------------------------------------------------------------------------------- bad input


def changed(name: str, **arrays):
    """A recorded case with other arrays; None takes one away."""
    return {n: a for n, a in (case(name) | arrays).items() if a is not None}


WRONG = {
    "three blocks, two scores": (
        READER,
        changed("realm_reader_loss", relevance_score=np.zeros(2, np.float32)),
        r"3 blocks and 2 relevance scores.* reader_beam_size=3 .*load the model with .*=2",
    ),
    "more blocks than beams": (
        READER,
        {"input_ids": np.full((4, 15), 5), "relevance_score": np.zeros(9)},
        r"4 blocks and 9 relevance scores .* load the model with reader_beam_size=4",
    ),
    "shorter than spans": (
        READER,
        {"input_ids": np.full((3, 3), 5), "relevance_score": np.zeros(3)},
        "blocks of 3 tokens are shorter than max_span_width=4: pad them to 4",
    ),
    "no relevance": (
        READER,
        changed("realm_reader_spans", relevance_score=None),
        r"a reader needs relevance_score, \[3\], which is missing",
    ),
    "no mask": (
        READER,
        changed("realm_reader_spans", block_mask=None),
        r"needs block_mask, \[5, 15\]",
    ),
    "labels that are no integers": (
        READER,
        changed(
            "realm_reader_loss", start_positions=np.zeros((5, 1)), end_positions=np.zeros((5, 1))
        ),
        "start_positions has dtype float64; they must be integers",
    ),
    "some labels": (
        READER,
        changed("realm_reader_loss", end_positions=None),
        "a reader needs end_positions, .* missing",
    ),
    "another number of answers": (
        READER,
        changed("realm_reader_loss", end_positions=np.full((5, 3), -1)),
        r"end_positions has shape \(5, 3\); a reader needs \(5, 2\)",
    ),
    "candidates of rank 2": (
        "realm_scorer",
        changed("realm_scorer_padded", candidate_input_ids=np.full((2, 9), 5)),
        r"candidate_inputs must be \[batch, choices, tokens\], got a leading shape \(2, 9\)",
    ),
    "candidates of three": (
        "realm_scorer",
        changed("realm_scorer_padded", candidate_input_ids=np.full((3, 3, 9), 5)),
        "candidates for 3 queries, but 2 queries",
    ),
    "positions of the queries alone": (
        "realm_scorer",
        changed("realm_scorer_padded", position_ids=np.arange(11)[None]),
        r"position_ids \(1, 11\) are used for the candidates as well, which have 9 tokens",
    ),
    "a mask of other candidates": (
        "realm_scorer",
        changed("realm_scorer_padded", candidate_attention_mask=np.ones((2, 3, 8), int)),
        r"candidate_attention_mask has shape \(2, 3, 8\)",
    ),
    "no candidates": (
        "realm_scorer",
        {"input_ids": np.full((2, 9), 5)},
        "give either candidate_input_ids or candidate_inputs_embeds, got 0",
    ),
    "candidates for an embedder": (
        "realm_embedder",
        {"input_ids": np.full((2, 9), 5), "candidate_input_ids": np.full((2, 3, 9), 5)},
        "task='embedder' does not take candidate_input_ids; .* takes nothing",
    ),
    "one text for all candidates": (
        ENCODER,
        {"input_ids": np.full((2, 9), 5)},
        r"must be \[batch, choices, tokens\]",
    ),
    "labels of candidates": (
        ENCODER,
        changed(f"{ENCODER}_loss", labels=np.full((2, 3, 13), 5)),
        r"labels has shape \(2, 3, 13\); the loss of the labels needs \(2, 13\)",
    ),
    "labels without relevance": (
        ENCODER,
        changed(f"{ENCODER}_loss", relevance_score=None),
        r"the loss of the labels needs relevance_score, \[2, 3\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_fit_are_named(name):
    folder, arrays, says = WRONG[name]
    model, params = golden(folder)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda params: model.apply({"params": params}, **arrays), params)


@pytest.mark.parametrize(
    ("field", "value"), [("max_span_width", 0), ("reader_layer_norm_eps", -1.0)]
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must"):
        read_config({"model_type": "realm", field: value})
