"""The demo's task on real papers, and its readers and the benchmark of them on a tiny BERT."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import GOLDEN

from lsg_flax import Model, hub
from lsg_flax.models import EncoderConfig

PLAIN = GOLDEN / "bert_to_convert_512"  # one token per word, [UNK] for most
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
SIZES |= {"intermediate_size": 8, "max_position_embeddings": 8}


def test_papers_are_those_that_people_marked(script):
    task = script("demo_task")
    papers = {split: task.read_papers(split) for split in task.SPLITS}
    assert [len(of) for of in papers.values()] == [100, 50, 100]
    labels = np.array([s.label for paper in papers["train"] for s in paper])
    counts = [int((labels == label).sum()) for label in (task.HEADING, 0, 1, 2, 3)]
    assert counts == [300, 2255, 455, 716, 442]
    assert task.read_papers("test", 2) == papers["test"][:2]


def test_parts_fit_the_model_and_make_up_the_paper(script):
    task, tokenizer = script("demo_task"), hub.read_tokenizer(PLAIN)
    papers = task.read_papers("validation", 5)
    parts = [*task.parts_of(papers, tokenizer, 300)]
    for number, paper in enumerate(papers):
        assert [s for p in parts if p.paper == number for s in p.sentences] == paper
    rows = script("demo_reader").encode(parts, tokenizer, 300)
    assert max(len(row.ids) for row in rows) <= 300 < len(rows[0].ids) + len(rows[1].ids)
    for part, row in zip(parts, rows, strict=True):
        assert row.sentence[0] == row.sentence[-1] == -1
        assert [*np.unique(row.sentence[1:-1])] == [*range(len(part.sentences))]
    first = task.first_parts(parts)
    assert [part.paper for part in first] == [0, 1, 2, 3, 4] and first[0] is parts[0]


def test_scores_are_f1_of_each_class(script):
    truth, found = np.array([0, 1, 1, 2, 3, 0]), np.array([1, 1, 0, 2, 0, 0])
    expected = {"macro_f1": 0.5, "challenge": 0.5, "approach": 1.0, "outcome": 0.0}
    assert script("demo_task").scores(truth, found) == expected


def test_the_loss_is_that_of_mean_logits(script):
    """Padding and headings count nothing, and a class as its weight says."""
    reader = script("demo_reader")
    config = EncoderConfig(**SIZES, labels=("a", "b", "c", "d"))
    model = Model(config, "token_classification")
    ids = np.array([[1, 2, 3, 4, 5, 6], [1, 7, 8, 9, 0, 0]])
    sentence = np.array([[-1, 0, 0, 1, 2, -1], [-1, 0, 1, -1, -1, -1]])
    labels = np.array([[2, -1, 1], [3, 0, -1]])
    params = model.init(reader.jax.random.key(0), ids)["params"]
    weights = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
    batch = {"input_ids": ids, "attention_mask": ids != 0, "sentence": sentence, "labels": labels}
    loss = reader.sentence_loss(model, weights)(params, batch)
    logits = model.apply({"params": params}, ids, ids != 0).logits
    read = [(logits[0, 1:3].mean(0), 2), (logits[0, 4], 1), (logits[1, 1], 3), (logits[1, 2], 0)]
    each = [-float(weights[k]) * reader.jax.nn.log_softmax(x)[k] for x, k in read]
    np.testing.assert_allclose(loss, sum(each) / weights.sum(), rtol=1e-6)


def test_a_head_tells_states_apart_and_counts_classes_by_weight(script):
    reader = script("demo_reader")
    labels = np.repeat([0, 1, 2, 3], [40, 5, 10, 10])
    states = np.eye(8, dtype=np.float32)[labels] * 3 + 7
    weights = reader.class_weights([reader.Row(labels, labels, labels)])
    counts = np.bincount(labels)
    np.testing.assert_allclose((weights * counts).sum(), counts.sum(), rtol=1e-6)
    np.testing.assert_allclose(weights[1] / weights[0], 8**0.5, rtol=1e-6)
    head = reader.fit_head(states, labels, weights)
    assert ((states @ head["kernel"] + head["bias"][None]).argmax(-1) == labels).all()


@pytest.mark.slow
def test_readers_learn_are_compared_and_drawn(script, monkeypatch, tmp_path, capsys):
    benchmark = script("paper_sentences")
    monkeypatch.setattr(benchmark, "minilm", lambda: PLAIN)
    file = tmp_path / "scores.json"
    sizes = ["--papers", "4", "--held-out", "3", "--split", "validation"]
    found = benchmark.main([*sizes, "--seeds", "2", "--epochs", "1", "--json", str(file)])
    runs = json.loads(file.read_text())
    assert [len(of) for of in runs.values()] == [2, 2, 2] and runs.keys() == found.keys()
    assert all(0 <= run["macro_f1"] <= 1 for of in runs.values() for run in of)
    cut, whole = found["first 512 tokens"][0], found["LSG, all at once"][0]
    assert sum(map(len, cut.logits)) == sum(map(len, whole.logits))  # also what is not read
    assert not jnp.allclose(found["LSG, all at once"][1].logits[0], whole.logits[0])
    assert "F1 on held-out papers" in capsys.readouterr().out
    demo = benchmark.demo
    demo.report({name: of[0] for name, of in found.items()}, 0.1)
    demo.show(whole)
    assert "LSG, all at once" in capsys.readouterr().out
    demo.write_answers(tmp_path / "answers.jsonl", whole)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == sum((part.labels >= 0).sum() for part in whole.parts)
    demo.demo_plot.draw({name: of[0] for name, of in found.items()}, 0.1, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
