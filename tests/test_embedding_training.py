"""Embeddings learned from pairs and from a teacher: formulas, cached gradients and their memory,
retrieval by hand, whole runs, and what is refused."""

import dataclasses
import functools
import itertools
import json
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import PLAIN, save_tiny, save_tiny_writer, texts, tiny_model, write

import lsg_flax
from lsg_flax import cli, hub, training
from lsg_flax.hub import SentenceSettings
from lsg_flax.models import EncoderConfig, Model
from lsg_flax.pipelines import Embedder
from lsg_flax.sharding import make_mesh, shard, shard_batch
from lsg_flax.training import contrastive, distillation, embedding, pictures, retrieval
from lsg_flax.training.embedding_source import Teacher
from lsg_flax.training.settings import Settings
from lsg_flax.training.settings_file import read_settings
from lsg_flax.training.step import init_state

RNG = np.random.default_rng(0)


def norm(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# -------------------------------------------------------------------------------- contrast


def by_hand(anchors, candidates, others, scale):
    """Mean of -log softmax, each anchor over its own candidate and the others."""
    scores, losses = scale * norm(anchors) @ norm(candidates).T, []
    for place, row in enumerate(scores):
        seen = others[place].copy()
        if seen.any():
            seen[place] = True
            losses.append(np.log(np.exp(row[seen]).sum()) - row[place])
    return np.mean(losses)


@pytest.mark.parametrize("hidden", [False, True])
def test_ranking_loss_by_hand(hidden):
    anchors, candidates = RNG.normal(size=(4, 6)), RNG.normal(size=(7, 6))
    others = ~np.eye(4, 7, dtype=bool)
    if hidden:
        others[:, 5], others[2] = False, False
    loss = contrastive.ranking_loss(
        *(jnp.asarray(v, jnp.float32) for v in (anchors, candidates)),
        jnp.asarray(others),
        scale=20.0,
    )
    np.testing.assert_allclose(loss, by_hand(anchors, candidates, others, 20.0), rtol=1e-5)


def test_a_positive_that_stands_in_several_rows_is_no_negative():
    anchors = jnp.array([[1, 2, 0], [3, 0, 0], [1, 2, 0], [0, 0, 0]])
    positives = jnp.array([[5, 6, 7, 0], [8, 0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
    negatives = jnp.array([[5, 6, 7, 0, 0], [4, 0, 0, 0, 0]])
    found = contrastive.other_texts(anchors, positives, negatives)
    expected = [[0, 1, 0, 0, 0, 1], [1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1], [0] * 6]
    np.testing.assert_array_equal(found, np.array(expected, bool))


def tiny(**overrides):
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    rest = {"num_attention_heads": 2, "max_position_embeddings": 64}
    model = Model(EncoderConfig(**sizes | rest | overrides), "base")
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 3), np.int32))["params"]


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pairs(rows, length=12, negatives=0, seed=0):
    """A batch as `train_batches` gives it."""
    generator, batch = np.random.default_rng(seed), {}
    shapes = {"": (rows, 5), "positive_": (rows, length)}
    shapes |= {"negative_": (rows, negatives, length)} if negatives else {}
    for prefix, shape in shapes.items():
        ids = generator.integers(1, 23, shape).astype(np.int32)
        mask = np.arange(shape[-1]) < generator.integers(3, shape[-1] + 1, (*shape[:-1], 1))
        batch |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask.astype(np.int32)}
    return batch


def cut(batch, parts):
    return {name: x.reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}


def learner(model, **more):
    return embedding.EmbeddingRun(model, SentenceSettings("mean", True), 20.0, **more)


def gradients_of(run, params, batch, parts, key):
    """Loss and gradient of a step, by SGD of rate 1 and without the optimizer's state."""
    optimizer = optax.sgd(1.0)
    step = embedding.make_embedding_step(run, optimizer, parts)
    state, metrics = step(init_state(params, optimizer, key), batch)
    return metrics["loss"], jax.tree.map(lambda a, b: a - b, params, state.params)


def close(one, other, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def test_cached_gradients_are_those_of_the_whole_batch():
    """And not those of its parts alone, whose rows have fewer negatives."""
    (model, params), batch = tiny(**STILL), pairs(8, negatives=2)
    run, key = learner(model), jax.random.key(0)
    whole, cached = (
        gradients_of(run, params, part, parts, key)
        for part, parts in ((batch, 1), (cut(batch, 4), 4))
    )
    close(whole, cached)
    small = gradients_of(run, params, {n: x[:2] for n, x in batch.items()}, 1, key)
    assert abs(small[0] - whole[0]) > 0.1


def test_cached_gradients_keep_their_dropout():
    """The loss of the vectors of all parts, each with its own masks."""
    (model, params), batch = tiny(), cut(pairs(6), 3)
    run, key = learner(model), jax.random.key(7)
    embed, loss = (functools.partial(f, run) for f in (embedding.embed_batch, embedding.contrast))

    def uncached(params):
        parts = [
            embed(params, {n: x[i] for n, x in batch.items()}, jax.random.fold_in(key, i))
            for i in range(3)
        ]
        return loss(batch, jax.tree.map(lambda *v: jnp.stack(v), *parts))

    expected = jax.jit(jax.value_and_grad(uncached))(params)
    found = jax.jit(
        lambda params: contrastive.cached_gradients(
            embed, functools.partial(loss, batch), params, batch, key
        )
    )(params)
    close(expected, found)


def test_a_larger_batch_needs_no_more_memory():
    """Read from the compiled steps: beside inputs only vectors are more."""
    model, params = tiny(**STILL)
    run, optimizer = learner(model), optax.sgd(1e-3)
    state = init_state(params, optimizer, jax.random.key(0))

    def temporaries(rows, parts):
        batch = cut(pairs(rows, length=48), parts) if parts > 1 else pairs(rows, length=48)
        step: Any = embedding.make_embedding_step(run, optimizer, parts)
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    few, many, whole = temporaries(8, 2), temporaries(64, 16), temporaries(64, 1)
    vectors = 2 * 64 * (16 * 4 + 64 * 4)  # of both sides, and their scores
    assert many < few + 4 * vectors, (few, many)
    assert many < whole / 4, (many, whole)


@pytest.mark.parametrize(
    "axes", [{"data": 4}, {"data": 2, "fsdp": 2}, {"sequence": 2, "data": 2}], ids=str
)
def test_a_mesh_has_the_negatives_of_all_devices(axes):
    lsg = lsg_flax.LSGConfig(block_size=4, sparse_block_size=4)
    (model, params), batch = tiny(lsg=lsg, **STILL), pairs(8, length=32)
    batch |= {n: np.pad(batch[n], ((0, 0), (0, 27))) for n in ("input_ids", "attention_mask")}
    run, key, batch = learner(model), jax.random.key(0), cut(batch, 2)
    expected = gradients_of(run, params, batch, 2, key)
    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(**axes, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        placed = shard_batch(batch, mesh, microbatches=True)
        found = gradients_of(run, shard(params, mesh), placed, 2, key)
    close(expected, jax.device_get(found))


# -------------------------------------------------------------------------------- the teacher

FRAME = distillation.Frame((1,), (2,))


@pytest.mark.parametrize("length", [5, 6, 30])
def test_parts_are_framed_slices_of_each_text(length):
    counts, width = (11, 3, 1, 8), 13
    ids, mask = np.zeros((5, width), np.int32), np.zeros((5, width), np.int32)
    contents = [list(range(10, 10 + count)) for count in counts]
    for place, content in enumerate(contents):  # the last row only fills up
        ids[place, : len(content) + 2], mask[place, : len(content) + 2] = [1, *content, 2], 1
    parts, real, owners = map(
        np.asarray, distillation.split_parts(jnp.asarray(ids), jnp.asarray(mask), FRAME, length)
    )
    room = min(length, width) - 2
    for place, content in enumerate(contents):
        expected = [[1, *content[i : i + room], 2] for i in range(0, len(content), room)]
        found = [
            part[kept == 1].tolist() for part, kept in zip(parts[place], real[place], strict=True)
        ]
        assert found == expected + [[]] * (len(found) - len(expected))
        owned = [0, *(i // room for i in range(len(content))), len(expected) - 1]
        assert owners[place, : len(owned)].tolist() == owned
    assert not real[4].any()


def test_a_short_texts_vector_is_the_teachers_and_a_long_ones_the_average_of_its_parts():
    (model, params), (other, wanted) = tiny(**STILL), tiny(**STILL, num_hidden_layers=1)
    how = SentenceSettings("mean", True)
    teacher = Teacher("t", hub.open_checkpoint(PLAIN), how, 7, FRAME)
    run = learner(model, teacher=teacher, teacher_model=other, teacher_params=wanted)
    content = [[5, 6, 7], [*range(4, 16)]]
    ids, mask = np.zeros((2, 14), np.int32), np.zeros((2, 14), np.int32)
    for place, tokens in enumerate(content):
        ids[place, : len(tokens) + 2], mask[place, : len(tokens) + 2] = [1, *tokens, 2], 1
    total, count, cosines, vectors = embedding.distances(
        run, params, {"input_ids": ids, "attention_mask": mask}, wanted
    )[""]

    def states(model, params, tokens):
        return np.asarray(model.apply({"params": params}, np.array([tokens])).last_hidden_state[0])

    losses, nearness = [], []
    for tokens in content:
        slices = [tokens[i : i + 5] for i in range(0, len(tokens), 5)]
        targets = [norm(states(other, wanted, [1, *part, 2]).mean(0)) for part in slices]
        targets.append(norm(np.average(targets, axis=0, weights=[len(p) + 2 for p in slices])))
        own = states(model, params, [1, *tokens, 2])
        ends = [0, *(1 + min(5 * (i + 1), len(tokens)) for i in range(len(slices)))]
        ends[-1] += 1
        mine = [norm(own[a:b].mean(0)) for a, b in itertools.pairwise(ends)]
        mine.append(norm(own.mean(0)))
        losses.append(np.mean([((a - b) ** 2).sum() for a, b in zip(mine, targets, strict=True)]))
        nearness.append(mine[-1] @ targets[-1])
    np.testing.assert_allclose(total, sum(losses), rtol=1e-4)
    np.testing.assert_allclose(cosines, nearness, rtol=1e-5)
    assert count == 2 and vectors.shape == (2, 16)


def test_parts_and_rows_of_a_teacher_add_up_over_microbatches():
    (model, params), (other, wanted) = tiny(**STILL), tiny(**STILL)
    how = SentenceSettings("cls")
    teacher = Teacher("t", hub.open_checkpoint(PLAIN), how, 7, FRAME)
    run = embedding.EmbeddingRun(model, how, 20.0, teacher, other, wanted)
    batch = pairs(8)
    one, several = (
        gradients_of(run, params, part, parts, jax.random.key(0))
        for part, parts in ((batch, 1), (cut(batch, 4), 4))
    )
    close(one, several)


# -------------------------------------------------------------------------------- retrieval


def test_retrieval_scores_by_hand():
    """Two queries: one with its document in the second place, one with two, at 1 and 12."""
    documents = np.eye(14)
    queries = np.stack([np.linspace(0.5, 0.1, 14), np.linspace(0.9, 0.2, 14)])
    found = retrieval.retrieval_scores(queries, documents, [[1], [0, 11]], scale=1.0)
    ideal = 1 + 1 / np.log2(3)
    expected = {"recall@1": (0 + 0.5) / 2, "recall@10": (1 + 0.5) / 2, "mrr@10": (0.5 + 1) / 2}
    expected["ndcg@10"] = (1 / np.log2(3) + 1 / ideal) / 2
    losses = []
    for query, own in zip(norm(queries), ([1], [0, 11]), strict=True):
        others = [s for i, s in enumerate(query) if i not in own]
        losses += [np.log(np.exp([query[i], *others]).sum()) - query[i] for i in own]
    assert found == pytest.approx(expected | {"loss": np.mean(losses)})


@pytest.mark.parametrize("relevant", [[], [[0], []]])
def test_retrieval_needs_queries_with_documents(relevant):
    vectors = np.eye(2)[: len(relevant)]
    with pytest.raises(ValueError, match="needs queries that each have a positive"):
        retrieval.retrieval_scores(vectors, np.eye(2), relevant, scale=1.0)


# -------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A teacher of the same tokens and width, with full attention."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = hub.read_tokenizer(PLAIN)
    assert tokenizer is not None
    hub.save_sentence_model(
        folder, *tiny_model(None, 1), tokenizer, SentenceSettings("mean", True, 8)
    )
    return folder


def settings_of(model, folder, **options) -> Settings:
    values = {
        "model": model,
        "task": "embedding",
        "train_data": write(folder, "embedding"),
        "eval_data": write(folder, "embedding", rows=10, seed=1, name="eval.jsonl"),
        "output": folder / "out",
        "cache": folder / "cache",
        "steps": 4,
        "evaluate_every": 2,
        "learning_rate": 1e-3,
        "devices": 1,
        "picture": False,
    }
    values |= {} if "teacher" in options else {"pooling": "mean"}
    return read_settings(None, values | options)


def run_of(settings):
    return training.finetune(settings, progress=False)


RETRIEVAL = {"eval_loss", "eval_recall@1", "eval_recall@10", "eval_mrr@10", "eval_ndcg@10"}


@pytest.mark.slow
@pytest.mark.parametrize("taught", [False, True])
def test_files_become_a_folder_of_sentence_transformers(
    model, dense, tmp_path, capsys, monkeypatch, taught
):
    """And go on bit for bit; `evaluate` and `Embedder` read what was written; the run is drawn."""
    options = {"teacher": dense} if taught else {"accumulate": 4, "best": "eval_mrr@10"}
    settings, figures, draw = settings_of(model, tmp_path, **options), [], pictures.run_figure
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "run_figure", lambda *run: figures.append(draw(*run)) or figures[0])
        result = run_of(dataclasses.replace(settings, picture=True))
    assert (result.output / "log" / "run.png").stat().st_size > 10_000
    _, score, _, length = figures[0].axes
    lines = {f"eval_{line.get_label()}": line.get_ydata()[-1] for line in score.get_lines()}
    assert lines == {name: value for name, value in result.scores.items() if name != "eval_loss"}
    assert sum(bar.get_height() for bar in length.patches) == 2 * 24  # texts and positives
    assert [text.get_text() for text in length.get_legend().get_texts()] == ["input", "positive"]
    assert set(result.scores) == RETRIEVAL | ({"eval_cosine"} if taught else set())
    assert result.step == 4 and result.history[-1]["targets"] == 8
    embedder = Embedder.from_pretrained(result.output)
    assert (embedder.pooling, embedder.normalize) == ("mean", taught)
    assert embedder.max_length == 16
    jax.tree.map(np.testing.assert_array_equal, embedder.params, result.params)
    again = dataclasses.replace(settings, output=str(tmp_path / "again"), steps=4)
    first = tmp_path / "again" / "checkpoints"
    run_of(again)
    shutil.rmtree(first / "4")  # as a kill behind step 2 would leave it
    shutil.rmtree(tmp_path / "again" / "best")
    for name in (hub.CONFIG, hub.WEIGHTS):
        (tmp_path / "again" / name).unlink()
    rest = run_of(again)
    assert [record["step"] for record in rest.history] == [3, 4]
    weights = [(folder / hub.WEIGHTS).read_bytes() for folder in (result.output, rest.output)]
    assert weights[0] == weights[1]
    capsys.readouterr()
    arguments = [
        "evaluate",
        str(result.output),
        settings.eval_data,
        "--output",
        str(tmp_path / "s"),
    ]
    arguments += ["--teacher", str(dense)] if taught else []
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "s" / "evaluation.json").read_text())
    scores = {f"eval_{name}": value for name, value in report["scores"].items()}
    assert scores == pytest.approx(result.scores, abs=1e-4)
    assert "recall@10" in capsys.readouterr().out


@pytest.mark.slow
def test_a_student_comes_near_its_teacher_on_short_and_long_texts(dense, tmp_path):
    """The dense model itself, converted to read 32 tokens."""
    lines = [json.dumps({"text": " ".join(words)}) for words in texts(0, 64, 2, 30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    options = {"train_data": tmp_path / "texts.jsonl", "eval_data": tmp_path / "texts.jsonl"}
    options |= {"convert": True, "max_length": 32, "steps": 60, "evaluate_every": 60, "seed": 1}
    options |= {"lsg": {"block_size": 8, "sparse_block_size": 8}, "buckets": [32]}
    result = run_of(settings_of(dense, tmp_path, teacher=dense, learning_rate=1e-2, **options))
    losses = [record["loss"] for record in result.history]
    assert np.mean(losses[-8:]) < np.mean(losses[:4]) / 4
    assert result.scores.keys() == {"eval_loss", "eval_cosine"}
    assert result.scores["eval_cosine"] > 0.995


@pytest.mark.slow
def test_a_mesh_learns_as_one_device(model, tmp_path):
    settings = settings_of(model, tmp_path, eval_data=None, evaluate_every=None, accumulate=2)
    one = run_of(dataclasses.replace(settings, output=str(tmp_path / "one")))
    mesh = {"data": 2, "fsdp": 2}
    four = run_of(dataclasses.replace(settings, mesh=mesh, devices=4))
    losses = [[record["loss"] for record in result.history] for result in (one, four)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


# -------------------------------------------------------------------------------- refused


def lines(folder, *rows):
    file = folder / "odd.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


GOOD = {"text": "w5", "positive": "w6"}
ROWS = {
    "no positive": ([GOOD, {"text": "w5"}], {}, "odd.jsonl:2: column 'positive', a text that bel"),
    "other name": (
        [{"text": "w5", "pos": "w6"}],
        {},
        r"there are \['text', 'pos'\]. Give its name by col",
    ),
    "empty text": ([GOOD, {"text": " ", "positive": "w6"}], {}, "odd.jsonl:2: 'text' is empty"),
    "empty positive": ([GOOD | {"positive": "  "}], {}, "odd.jsonl:1: 'positive' is empty"),
    "negatives": (
        [GOOD | {"negative": "w7"}, GOOD | {"negative": ["w8", "w9"]}],
        {},
        r"odd.jsonl:2: it has the texts {'text': 1, 'positive': 1, 'negative': 2}",
    ),
    "one row": ([GOOD], {"batch_size": 1}, "batch_size=1: the negatives of a pair are the other"),
    "rest of one": ([GOOD] * 9, {}, "9 rows of at most .* leave a batch of one row"),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dry", [True, False])
def test_rows_that_teach_nothing_are_named_before_training(model, tmp_path, name, dry):
    rows, options, message = ROWS[name]
    options = {
        "train_data": lines(tmp_path, *rows),
        "eval_data": None,
        "evaluate_every": None,
    } | options
    settings = settings_of(model, tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        (training.survey if dry else training.finetune)(settings, progress=False)
    assert not (tmp_path / "out" / hub.CONFIG).exists()


@pytest.fixture
def others(dense, model, tmp_path):
    """Teachers that do not fit: of another width, other tokens, none, and without lengths of 1."""
    wide = Embedder.from_pretrained(dense)
    changed = wide.model.config.with_overrides(hidden_size=20)
    made = Model(changed, "base")
    params = jax.jit(made.init)(jax.random.key(0), np.zeros((1, 3), np.int32))["params"]
    how = SentenceSettings("mean", True, 8)
    hub.save_sentence_model(tmp_path / "wide", made, params, wide.tokenizer, how)
    for name, settings in (("words", how), ("raw", how._replace(normalize=False))):
        hub.save_sentence_model(tmp_path / name, wide.model, wide.params, wide.tokenizer, settings)
    vocabulary = (tmp_path / "words" / "vocab.txt").read_text().split("\n")
    vocabulary[7], vocabulary[8] = vocabulary[8], vocabulary[7]
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "words" / "tokenizer.json").unlink(missing_ok=True)
    return tmp_path


TEACHERS = {
    "wide": (
        "wide",
        {},
        "has embeddings of width 20, but .* has 16; give a teacher of the same width",
    ),
    "words": ("words", {}, "has another tokenizer than .*are missing or have other ids.*reads the"),
    "raw": ("raw", {"model": "dense"}, "has normalize=False, but .* has normalize=True"),
    "nothing": ("nothing", {}, "nothing"),
    "long": (
        "dense",
        {"teacher_length": 17},
        "teacher_length=17 must be in 3..16: .*reads at most",
    ),
    "short": ("dense", {"teacher_length": 2}, "teacher_length=2 must be in 3..16"),
    "unfound": (
        "dense",
        {"best": "eval_mrr@10"},
        "eval_data has no queries: no row has a 'positive'",
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_that_cannot_teach_is_named_before_training(model, dense, others, tmp_path, name):
    teacher, options, message = TEACHERS[name]
    options = {n: dense if value == "dense" else value for n, value in options.items()}
    options |= {"teacher": dense if teacher == "dense" else others / teacher}
    options |= {"eval_data": lines(tmp_path, {"text": "w5"})}
    settings = settings_of(options.pop("model", model), tmp_path, **options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training.survey(settings, progress=False)


SETTINGS = {
    "teacher: x, task: masked_lm": "teacher='x' is for task='embedding', not masked_lm",
    "pooling: mean, task: masked_lm": "pooling='mean' is for task='embedding'",
    "pooling: sum": "pooling='sum' must be one of mean, cls, max, global",
    "teacher_length: 8": "teacher_length=8 needs a teacher",
    "teacher: x, similarity_scale: 3": "similarity_scale=3.0 is for learning from pairs",
    "similarity_scale: -1": "similarity_scale=-1.0 must be above 0",
    "train_only: head": "train_only='head': embeddings have no head",
    "label_smoothing: 0.1": "label_smoothing=0.1 must be at least 0 and below 1, and 0 for label",
    "eval_data: e, best: eval_cosine": "best='eval_cosine' must be one of the scores of emb",
    "eval_data: e, best: eval_accuracy": r"known|eval_loss, eval_recall@1, .*, eval_ndcg@10",
}


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_that_do_not_fit_are_named(tmp_path, text):
    (tmp_path / "run.yaml").write_text(
        "{task: embedding, " + text + "}" if "task" not in text else "{" + text + "}"
    )
    given = {"model": "m", "train_data": "a.jsonl", "output": "o"}
    with pytest.raises(ValueError, match=SETTINGS[text]):
        read_settings(tmp_path / "run.yaml", given)


def test_models_that_have_no_one_vector_are_refused(model, tmp_path):
    writer = save_tiny_writer(tmp_path / "writer")
    with pytest.raises(ValueError, match=r"writer is an encoder-decoder \(bart\)"):
        training.survey(settings_of(writer, tmp_path), progress=False)
    with pytest.raises(ValueError, match="would say how to pool; pass pooling="):
        training.survey(settings_of(model, tmp_path, pooling=None), progress=False)


def test_a_dry_run_shows_both_sides(model, tmp_path, capsys):
    settings = settings_of(model, tmp_path)
    arguments = [
        "--model",
        str(model),
        "--task",
        "embedding",
        "--pooling",
        "mean",
        "--batch-size",
        "8",
    ]
    arguments += ["--train-data", settings.train_data, "--cache", str(tmp_path / "cache")]
    assert cli.main(["data", *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tokens of the positive: min \d+, median \d+", out)
    assert "steps: 9, 3 per epoch" in out
    arguments[arguments.index("--train-data") + 1] = lines(tmp_path, {"text": "w5", "pos": "w6"})
    assert cli.main(["data", *arguments]) == 2
    assert "Give its name by --columns positive=NAME, or give a" in capsys.readouterr().err
