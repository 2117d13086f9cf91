"""Scores against scikit-learn, scipy, SQuAD's own examples and counting by hand; `evaluate` on tiny
models: batches, filling rows and the mesh change nothing."""

import functools
import math
import sys

import jax
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from rouge_score import rouge_scorer

from lsg_flax.models import TASKS as RECORDS
from lsg_flax.models import EncoderConfig, Model, ModelOutput
from lsg_flax.sharding import make_mesh, shard
from lsg_flax.training import losses, metrics
from lsg_flax.training.classes import by_class
from lsg_flax.training.scores import (
    ROUGE,
    answer_scores,
    classification_scores,
    entity_scores,
    multi_label_scores,
    perplexity,
    regression_scores,
    rouge_scores,
)

GENERATOR = np.random.default_rng(0)
TASKS = {
    "sequence_classification": {"labels": ("a", "b", "c")},
    "regression": {"labels": ("score",), "problem_type": "regression"},
    "multi_label": {"labels": ("a", "b"), "problem_type": "multi_label_classification"},
    "token_classification": {"labels": ("O", "B-X", "I-X")},
    "question_answering": {},
    "masked_lm": {},
    "pretraining": {},
}


@functools.cache
def make(name):
    sizes = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    rest = {"num_attention_heads": 2, "max_position_embeddings": 16}
    task = name if name in RECORDS else "sequence_classification"
    model = Model(EncoderConfig(**sizes | rest | TASKS[name]), task)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 3), np.int32))["params"]
    return model, jax.tree.map(lambda p: p * 8, params)  # answers that differ


def rows_of(name, count, length=12):
    generator = np.random.default_rng(1)
    ids = generator.integers(1, 23, (count, length))
    mask = np.arange(length) < generator.integers(4, length + 1, (count, 1))
    some = np.where(generator.random(ids.shape) < 0.5, ids, -100)
    targets = {
        "sequence_classification": {"labels": generator.integers(0, 3, count)},
        "regression": {"labels": generator.normal(size=count).astype(np.float32)},
        "multi_label": {"labels": generator.integers(0, 2, (count, 2)).astype(np.float32)},
        "token_classification": {"labels": np.where(mask, ids % 3, -100)},
        "question_answering": {
            "start_positions": generator.integers(0, 3, count),
            "end_positions": generator.integers(3, 14, count),
        },
        "masked_lm": {"labels": some},
        "pretraining": {"labels": some, "next_sentence_label": ids[:, 0] % 2},
    }
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32)} | targets[name]


def batches_of(rows, size):
    """In batches of `size`, the last filled up as data.eval_batches does."""
    count = len(rows["input_ids"])
    for start in range(0, count, size):
        numbers = np.arange(start, start + size)
        numbers = np.where(numbers < count, numbers, -1)
        batch = {}
        for key, array in rows.items():
            empty = 0 if array.dtype.kind == "f" else {"input_ids": 0, "attention_mask": 0}
            empty = empty if isinstance(empty, int) else empty.get(key, -100)
            empty = array.shape[0] + 99 if key.endswith("_positions") else empty
            shown = numbers.reshape(-1, *[1] * (array.ndim - 1))
            batch[key] = np.where(shown >= 0, array[numbers], empty).astype(array.dtype)
        yield batch, numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_evaluate_does_not_depend_on_batches_or_mesh(name):
    model, params = make(name)
    rows = rows_of(name, 11)
    whole = metrics.evaluate(model, params, [(rows, np.arange(11))])
    parts = metrics.evaluate(model, params, batches_of(rows, 8))
    spread = parts
    if name in ("regression", "token_classification", "masked_lm"):
        mesh = make_mesh(data=4, tensor=2)
        spread = metrics.evaluate(model, shard(params, mesh), batches_of(rows, 8), mesh=mesh)
    assert whole.keys() == parts.keys() == spread.keys()
    for key, value in whole.items():
        assert math.isclose(value, parts[key], rel_tol=1e-5), key
        assert math.isclose(value, spread[key], rel_tol=1e-4), key
    loss, _ = jax.jit(losses.loss_fn, static_argnums=0)(model, params, rows)
    np.testing.assert_allclose(whole["eval_loss"], loss, rtol=1e-5)
    if name == "masked_lm":
        np.testing.assert_allclose(whole["eval_perplexity"], np.exp(loss), rtol=1e-5)


def test_evaluate_scores_the_models_own_answers():
    model, params = make("sequence_classification")
    rows = rows_of("sequence_classification", 11)
    apply = jax.jit(model.apply)
    output = apply({"params": params}, rows["input_ids"], rows["attention_mask"])
    right = np.argmax(output.logits, -1)
    scores = metrics.evaluate(model, params, batches_of(rows | {"labels": right}, 4))
    assert scores["eval_accuracy"] == scores["eval_macro_f1"] == 1.0
    with pytest.raises(ValueError, match="no batches"):
        metrics.evaluate(model, params, [])
    nothing = rows | {"labels": np.full(11, -100)}
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.evaluate(model, params, [(nothing, np.arange(11))])


def test_batches_without_the_numbers_of_their_rows_are_refused(unchecked):
    model, params = make("sequence_classification")
    rows = rows_of("sequence_classification", 11)
    with pytest.raises(ValueError, match=r"must be a pair .*, got a mapping of input_ids"):
        metrics.evaluate(model, params, [rows])


def test_the_best_span_ends_behind_its_start_and_inside_the_text(monkeypatch):
    start = np.full((3, 40), -1.0, np.float32)
    end = start.copy()
    start[0, 5], end[0, 2], end[0, 7] = 9, 9, 5  # 2 lies before 5
    start[1, 3], end[1, 39], end[1, 6] = 9, 9, 5  # 37 tokens are no answer
    start[2, 3], end[2, 30], end[2, 4] = 9, 9, 5  # 30 is padding
    mask = np.ones((3, 40), np.int32)
    mask[2, 20:] = 0

    def apply(model, variables, **inputs):
        return ModelOutput(start_logits=jax.numpy.array(start), end_logits=jax.numpy.array(end))

    monkeypatch.setattr(Model, "apply", apply)
    model = Model(EncoderConfig(max_position_embeddings=64), "question_answering")
    batch = {"input_ids": mask, "attention_mask": mask}
    labels = np.array([[5, 7], [3, 6], [3, 5]])
    batch |= {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    scores = metrics.evaluate(model, {}, [(batch, np.arange(3))])
    assert math.isclose(scores["eval_exact_match"], 2 / 3)
    assert math.isclose(scores["eval_f1"], (1 + 1 + 2 * 2 / 5) / 3, rel_tol=1e-6)


def test_classification_as_scikit_learn():
    labels, predicted = GENERATOR.integers(0, 4, (2, 50))
    labels[labels == 3] = 0  # 3 is predicted only
    scores = classification_scores(np.append(predicted, 9), np.append(labels, -100))
    assert math.isclose(scores["accuracy"], sklearn.metrics.accuracy_score(labels, predicted))
    expected = sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    assert math.isclose(scores["macro_f1"], expected)


def test_multi_label_as_scikit_learn():
    labels, predicted = GENERATOR.integers(0, 2, (2, 30, 4))
    scores = multi_label_scores(predicted.astype(bool), labels)
    for average in ("micro", "macro"):
        expected = sklearn.metrics.f1_score(labels, predicted, average=average, zero_division=0)
        assert math.isclose(scores[f"{average}_f1"], expected)
    assert math.isclose(scores["accuracy"], sklearn.metrics.accuracy_score(labels, predicted))


def test_regression_as_scipy():
    labels, predicted = GENERATOR.normal(size=(2, 40))
    scores = regression_scores(predicted, labels)
    assert math.isclose(scores["mse"], ((labels - predicted) ** 2).mean())
    assert math.isclose(scores["pearson"], scipy.stats.pearsonr(labels, predicted).statistic)
    assert regression_scores(np.ones(3), labels[:3])["pearson"] == 0


def test_entities_count_as_wholes(monkeypatch):
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    given = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]]  # one cut short, two right
    scores = entity_scores(given, truth)
    assert scores["precision"] == scores["recall"] == scores["f1"] == 2 / 3
    assert scores["accuracy"] == 5 / 6
    monkeypatch.setitem(sys.modules, "seqeval", None)
    with pytest.raises(ImportError, match=r"lsg-flax\[metrics\]"):
        entity_scores(given, truth)


def judged(predicted, labels):
    """As of two batches."""
    return metrics.Judged({}, [predicted[:7], predicted[7:]], [labels[:7], labels[7:]])


def test_each_class_as_scikit_learn():
    model, _ = make("sequence_classification")
    model = model.clone(
        config=model.config.with_overrides(problem_type="single_label_classification")
    )
    labels, predicted = GENERATOR.integers(0, 3, (2, 40))
    given = judged(np.append(predicted, 1), np.append(labels, -100))
    classes, names, confusion = by_class(model, given)
    expected = sklearn.metrics.precision_recall_fscore_support(labels, predicted, zero_division=0)
    np.testing.assert_allclose([c[1:] for c in classes], np.transpose(expected))
    np.testing.assert_array_equal(confusion, sklearn.metrics.confusion_matrix(labels, predicted))
    assert names == ("a", "b", "c") == tuple(c.name for c in classes)
    several, _ = make("multi_label")
    labels, logits = GENERATOR.integers(0, 2, (30, 2)), GENERATOR.normal(size=(30, 2))
    classes, _, confusion = by_class(several, judged(logits, labels.astype(np.float32)))
    expected = sklearn.metrics.precision_recall_fscore_support(labels, logits > 0)
    np.testing.assert_allclose([c[1:] for c in classes], np.transpose(expected))
    assert confusion is None and by_class(make("masked_lm")[0], judged(logits, labels))[0] == ()


def test_each_entity_and_the_tags_that_are_confused():
    model, _ = make("token_classification")  # O, B-X, I-X
    truth = np.array([[1, 2, 0, -100], [0, 1, -100, -100]])
    given = np.array([[1, 0, 0, 2], [0, 1, 1, 1]])  # one cut short, one right
    classes, names, confusion = by_class(model, metrics.Judged({}, [given], [truth]))
    assert classes == (("X", 0.5, 0.5, 0.5, 2),) and names == ("O", "B-X", "I-X")
    np.testing.assert_array_equal(confusion, [[2, 0, 0], [0, 2, 0], [1, 0, 0]])


def test_answers_as_squad_compares_them():
    scores = answer_scores(
        ["The Cat!", "black cat", "", "something", "dog"],
        [["cat"], ["a cat", "a cat, black"], [], [], ["cat", "mouse"]],
    )
    assert scores["exact_match"] == 2 / 5  # word order counts for the second
    assert scores["f1"] == 3 / 5
    assert answer_scores(["big black cat"], [["black cat"]])["f1"] == 0.8


@pytest.mark.parametrize(
    ("given", "right", "exact", "f1"),
    [  # counted by hand from the published rule
        ("  An   U.S.A. ", ["usa"], 1, 1),
        ("twenty-one", ["Twenty one"], 0, 0),  # a hyphen joins
        ("theatre another", ["another theatre"], 0, 1),  # articles are whole words
        ("«cat»", ["cat"], 0, 0),  # other punctuation than ASCII's stays
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),  # words count as often as in both
        ("the cat sat on the mat", ["the cat", "on a mat"], 0, 2 * (2 / 4) / (2 / 4 + 1)),
        ("a", ["the", "!"], 1, 1),  # nothing is left of any
        ("", ["the", "cat"], 0, 0),  # what is nothing is no answer beside others
        ("the", [], 1, 1),
        ("cat", [], 0, 0),
    ],
)
def test_answers_of_the_published_rule(given, right, exact, f1):
    assert answer_scores([given], [right]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_perplexity_of_a_uniform_guess():
    assert math.isclose(perplexity(math.log(50)), 50)
    assert perplexity(1e9) == math.inf


def test_rouge_as_its_package_gives_it(monkeypatch):
    """With sentences a line each, and means over the texts."""
    written = ["The cat sat. It slept!", "no word of it", ""]
    references = ["It slept. The cats sat down.\n", "other words", "a text"]
    scores = rouge_scores(written, references)
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    by_line = [("It slept.\nThe cats sat down.", "The cat sat.\nIt slept!")]
    by_line += zip(references[1:], written[1:], strict=True)
    each = [scorer.score(*pair) for pair in by_line]
    expected = {name: np.mean([s[name].fmeasure for s in each]) for name in ROUGE}
    assert scores == pytest.approx(expected)
    assert scores["rougeLsum"] > scores["rougeL"] > 0  # sentences may change places
    with pytest.raises(ValueError, match="nothing to score"):
        rouge_scores([], [])
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(ImportError, match=r"lsg-flax\[summarization\]"):
        rouge_scores(written, references)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A b. C d! E?", ["A b.", "C d!", "E?"]),
        ('He said "no." Then 3.5 went.', ['He said "no."', "Then 3.5 went."]),
        ("(One.) Two\nthree", ["(One.)", "Two", "three"]),
    ],
)
def test_where_sentences_end(text, sentences):
    """A text of the same sentences in another order has the same rougeLsum."""
    turned = "\n".join(reversed(sentences))
    assert rouge_scores([turned], [text])["rougeLsum"] == 1.0
