"""A model that reads sentences in context: a head fitted on frozen states, then fine-tuning.

Axes: B rows, T tokens, S sentences, D width, C classes.
"""

import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from demo_task import LABELS, Part
from jaxtyping import Array, Float, Int

import lsg_flax
from lsg_flax import inference, training

NOTHING = -1  # the sentence of [CLS], [SEP] and padding, and the label of padding


class Row(NamedTuple):
    """A part as the model reads it: token ids [T], the sentence of each token [T], labels [S]."""

    ids: np.ndarray
    sentence: np.ndarray
    labels: np.ndarray


class Reader(NamedTuple):
    """How a checkpoint reads papers.

    Attributes:
        source: folder of the checkpoint.
        limit: tokens that it reads at once.
        buckets: lengths that rows are padded to.
        rows: of a training step, about one paper.
        cut: True reads the first part of each paper and leaves the rest.
    """

    source: pathlib.Path
    limit: int
    buckets: tuple[int, ...]
    rows: int = 1
    cut: bool = False


def encode(parts: Sequence[Part], tokenizer: Any, limit: int) -> list[Row]:
    """Parts as rows."""
    words = [[word for s in part.sentences for word in s.words] for part in parts]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
    rows = []
    for place, (part, ids) in enumerate(zip(parts, encoded.input_ids, strict=True)):
        counts = [len(s.words) for s in part.sentences]
        of_word = np.append(np.repeat(np.arange(len(counts)), counts), NOTHING)
        word = [NOTHING if w is None else w for w in encoded.word_ids(place)]
        rows.append(Row(np.array(ids), of_word[word], part.labels))
    return rows


def means(model: lsg_flax.Model, params: Any, rows: Sequence[Row], reader: Reader, field: str):
    """The means of `field`, an output [T, ...] of the model, over the tokens of each sentence: an
    array [S, ...] of each row."""
    results = inference.predict(
        model,
        params,
        [{"input_ids": row.ids.tolist()} for row in rows],
        batch_size=reader.rows,
        buckets=reader.buckets,
        fields=(field,),
    )
    for row, result in zip(rows, results, strict=True):
        seen = row.sentence == np.arange(len(row.labels))[:, None]
        values = np.asarray(result[field], np.float32)[: len(row.ids)]
        yield seen @ values / np.maximum(seen.sum(axis=1), 1)[:, None]


def class_weights(rows: Sequence[Row]) -> np.ndarray:
    """What sentences of a class count, [C]: less the more of them there are; 1 on average."""
    labels = np.concatenate([row.labels for row in rows])
    shares = np.bincount(labels[labels >= 0], minlength=len(LABELS)) / (labels >= 0).sum()
    return shares**-0.5 / (shares**0.5).sum()


def fit_head(
    states: Float[np.ndarray, "S D"], labels: Int[np.ndarray, " S"], weights: np.ndarray
) -> dict[str, Array]:
    """A logistic regression on standardised states, as a kernel [D, C] and a bias [C]."""
    mean, deviation = states.mean(axis=0), states.std(axis=0) + 1e-6
    inputs, counts = (states - mean) / deviation, jnp.asarray(weights)[labels]
    optimizer = optax.adam(0.01)

    def loss(head):
        logits = inputs @ head["kernel"] + head["bias"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (counts * losses).mean() + 0.03 * (head["kernel"] ** 2).sum()

    @jax.jit
    def fit(head):
        def step(carry, _):
            head, state = carry
            updates, state = optimizer.update(jax.grad(loss)(head), state)
            return (optax.apply_updates(head, updates), state), None

        return jax.lax.scan(step, (head, optimizer.init(head)), None, length=400)[0][0]

    head = fit(
        {"kernel": jnp.zeros((states.shape[1], len(LABELS))), "bias": jnp.zeros(len(LABELS))}
    )
    kernel = head["kernel"] / deviation[:, None]
    return {"kernel": kernel, "bias": head["bias"] - mean @ kernel}


def load(reader: Reader, rows: Sequence[Row]) -> tuple[lsg_flax.Model, Any]:
    """The checkpoint with a head for the classes, which is fitted to the labels of `rows`."""
    base, params = lsg_flax.from_pretrained(reader.source, "base")
    states = np.concatenate([*means(base, params, rows, reader, "last_hidden_state")])
    labels = np.concatenate([row.labels for row in rows])
    head = fit_head(states[labels >= 0], labels[labels >= 0], class_weights(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classifier is not in the checkpoint: it is `head`
        model, params = lsg_flax.from_pretrained(
            reader.source,
            "token_classification",
            labels=LABELS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    params["head"]["classifier"] = head
    return model, params


def sentence_loss(model: lsg_flax.Model, weights: np.ndarray) -> Callable:
    """The loss of `fine_tune` as a function of parameters and a batch: cross-entropy of the mean
    logits of each sentence, weighed by class."""

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"]).logits
        labels, counts = batch["labels"], jnp.asarray(weights)[batch["labels"]]
        numbers = jnp.arange(labels.shape[1])[None, :, None]
        seen = (batch["sentence"][:, None] == numbers).astype(logits.dtype)  # [B, S, T]
        sums = jnp.einsum("bst,btc->bsc", seen, logits)
        logits = sums / jnp.maximum(seen.sum(axis=-1), 1)[..., None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        counts = jnp.where(labels >= 0, counts, 0)  # padding and headings
        return (counts * losses).sum() / jnp.maximum(counts.sum(), 1)

    return loss


def fine_tune(
    model: lsg_flax.Model,
    params: Any,
    rows: Sequence[Row],
    reader: Reader,
    *,
    epochs: int,
    seed: int,
) -> Any:
    """Trains all but the embeddings; returns the parameters."""
    steps = epochs * (len(rows) // reader.rows)
    optimizer = training.make_optimizer(
        1.5e-4, total_steps=steps, warmup_steps=steps // 10, frozen="embeddings/"
    )
    loss = sentence_loss(model, class_weights(rows))

    def compute(params, batch, key):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return gradients, {"loss": value, "tokens": batch["attention_mask"].sum()}

    step = training.make_step(compute, optimizer)
    state = training.init_state(params, optimizer, jax.random.key(seed))
    batches = training.BatchesAt(_batches(rows, reader, seed))
    return training.fit(step, state, batches, steps=steps)[0].params


def _batches(rows: Sequence[Row], reader: Reader, seed: int) -> Callable[[int], dict[str, Any]]:
    """The batch of each step: rows in random order, each once in an epoch, padded to a bucket."""
    in_epoch, most = len(rows) // reader.rows, max(len(row.labels) for row in rows)

    def batch_at(step: int) -> dict[str, Any]:
        epoch, place = divmod(step, in_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))
        chosen = [rows[i] for i in order[place * reader.rows : (place + 1) * reader.rows]]
        length = min(b for b in reader.buckets if b >= max(len(row.ids) for row in chosen))
        ids, sentence, labels = (
            np.stack([np.pad(x, (0, size - len(x)), constant_values=fill) for x in arrays])
            for arrays, size, fill in zip(
                zip(*chosen, strict=True),
                (length, length, most),
                (0, NOTHING, NOTHING),
                strict=True,
            )
        )
        mask = (sentence != NOTHING) | (ids != 0)
        return {"input_ids": ids, "attention_mask": mask, "sentence": sentence, "labels": labels}

    return batch_at
