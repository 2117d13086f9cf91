"""Trains retriever and reader end to end, and pretrains the retriever on masked names and dates,
while the index is refreshed from the embedder. (arXiv 2002.08909, sections 3.3 and 3.4)

Axes: B batch (one question or text), C choices (candidates), T tokens, D model width (here of the
projection).
"""

import concurrent.futures
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from lsg_flax.checks import require
from lsg_flax.hub import Tokenizer
from lsg_flax.models import IGNORED, Model, Params
from lsg_flax.open_qa.embeddings import WINDOW, BlockEmbedder
from lsg_flax.open_qa.pairs import batch_encode_candidates, checked_config
from lsg_flax.open_qa.qa import OpenQA
from lsg_flax.open_qa.reading import embed_question, read_blocks, reader_inputs
from lsg_flax.open_qa.records import Records
from lsg_flax.open_qa.search import Search, Stored, device_search

# Names (which may have small words inside), dates and numbers: knowledge about the world.
_SALIENT = re.compile(
    r"\b[A-Z]\w+(?:\s+(?:(?:of|the|de|van|von)\s+)?[A-Z]\w+)*|\b\d{1,4}(?:[./:-]\d{1,2}){0,2}\b"
)
_TITLE = re.compile(r"(?:^|[.!?]\s+)$")  # what precedes the first word of a sentence


class LiveIndex:
    """Embeddings of blocks that are refreshed while an embedder is trained. Every `every` steps it
    switches to embeddings of the parameters of `every` steps before, and starts to compute the next
    ones in a thread, if one of the `steps` steps will use them; so runs are reproducible.

    Attributes:
        embeddings, search: the current ones; refreshed ones are in memory and on the default
            device.
    """

    def __init__(
        self,
        embedder: Model,
        tokenizer: Tokenizer,
        records: Records,
        *,
        every: int | None,
        steps: int,
        start: tuple[Stored, Search] | Params,
    ):
        """Starts with given embeddings and their search, or with those that the embedder computes
        from given parameters; with every=None they are never refreshed."""
        require(every is None or every > 0, f"refresh_every={every} must be at least 1, or None.")
        self._model, self._tokenizer, self._records = embedder, tokenizer, records
        self._thread, self._next = concurrent.futures.ThreadPoolExecutor(1), None
        self._every, self._steps = every, steps
        self.embeddings, self.search = start if isinstance(start, tuple) else self._made(start)

    def follow(self, step: int, params: Params) -> None:
        """Switches to new embeddings and starts computing the next ones, if it is time."""
        if self._every is None or step % self._every:
            return
        if self._next is not None:
            self.embeddings, self.search = self._next.result()
        if step + self._every < self._steps:
            self._next = self._thread.submit(self._made, params)

    def _made(self, params: Params) -> tuple[Stored, Search]:
        embed, count = BlockEmbedder(self._model, params, self._tokenizer), len(self._records)
        windows = (range(n, min(n + WINDOW, count)) for n in range(0, count, WINDOW))
        made = np.concatenate([embed(self._records.texts(numbers)) for numbers in windows])
        return made, device_search(made)


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def _update(params: Params, state: Any, batch: Any, *, loss, optimizer):
    value, gradients = jax.value_and_grad(loss)(params, *batch)
    changes, state = optimizer.update(gradients, state, params)
    return value, optax.apply_updates(params, changes), state


def _finite(loss: Array, step: int) -> float:
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {float(loss)} at step {step}; lower the learning rate, and check the "
            "parameters that training started with."
        )
    return float(loss)


def finetune(
    qa: OpenQA,
    examples: Sequence[tuple[str, Sequence[str]]],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: PRNGKeyArray | None = None,
    refresh_every: int | None = None,
) -> tuple[OpenQA, list[float]]:
    """Trains embedder and reader on the marginal likelihood of right blocks and right spans, one
    question per step (the losses of transformers' RealmForOpenQA). A question without an answer in
    its searcher_beam_size blocks gives no gradient.

    Args:
        qa: the models and the index to start from.
        examples: questions, each with its right answers as texts; used in turn.
        optimizer: the optimizer.
        steps: number of steps.
        key: random key of dropout; None for no dropout.
        refresh_every: steps between refreshes of the index; None never refreshes it, as in REALM's
            fine-tuning.

    Returns:
        The trained OpenQA, with the embeddings that it was trained with last, and the losses.

    Raises:
        ValueError: as `OpenQA`'s call, with the example's question.
        FloatingPointError: for a loss that is not finite.
    """
    require(bool(examples), "there are no examples; give questions with their answers.")
    index = LiveIndex(
        *(qa.embedder, qa.tokenizer, qa.records),
        every=refresh_every,
        steps=steps,
        start=(qa.embeddings, qa.search),
    )
    models = {"embedder": qa.embedder, "reader": qa.reader}

    def loss(params, question, vectors, blocks, key):
        return read_blocks(params, question, vectors, blocks, key, **models).loss

    params, state, losses = qa.params, optimizer.init(qa.params), []
    for step in range(steps):
        index.follow(step, params["embedder"])
        if index.search is not qa.search:
            qa = dataclasses.replace(qa, embeddings=index.embeddings, search=index.search)
        text, answers = examples[step % len(examples)]
        try:
            question = qa.encode(text)
            require(
                bool(answers) and not isinstance(answers, str),
                f"the answers are {answers!r}; give a list of texts, at least one.",
            )
            ids = qa.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
            found = qa.retrieve(question, ids, train=True, params=params["embedder"])
        except ValueError as error:
            raise ValueError(f"example {step % len(examples)}, {text!r:.60}: {error}") from error
        blocks = reader_inputs(found, qa.config, qa.reader.max_length)
        dropout = None if key is None else jax.random.fold_in(key, step)
        batch = (question, found.vectors, blocks, dropout)
        value, params, state = _update(params, state, batch, loss=loss, optimizer=optimizer)
        losses.append(_finite(value, step))
    return dataclasses.replace(qa, params=params), losses


def salient_spans(text: str) -> list[tuple[int, int]]:
    """Returns the spans of names, dates and numbers in a text, in characters (arXiv 2002.08909,
    section 3.4). Where the paper uses a tagger, these are rules: capitalised words that do not
    start a sentence, or are several, and digits."""
    found = []
    for match in _SALIENT.finditer(text):
        begins = _TITLE.search(text[: match.start()]) and not match[0][0].isdigit()
        if not begins or " " in match[0]:
            found.append(match.span())
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Pretraining:
    """The models of pretraining, which predict masked names and dates from retrieved blocks (arXiv
    2002.08909, section 3): an embedder and a knowledge-augmented encoder with one tokenizer, and
    the texts of the blocks."""

    embedder: Model
    encoder: Model
    tokenizer: Tokenizer
    records: Records

    def example(
        self, text: str, span: tuple[int, int], candidates: Sequence[str]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Makes the inputs of both models: the text with its span masked, on its own and with each
        candidate (an empty one is added at the end); and the candidates on their own.

        Returns:
            Arrays by the models' names: "question" [1, T], "blocks" [C, T], "encoder" [1, C, T]
            with labels [1, T].

        Raises:
            ValueError: for a text that is too long for the encoder.
        """
        tokenizer, mask = self.tokenizer, self.tokenizer.mask_token_id
        length = min(self.encoder.max_length, self.embedder.max_length)
        encode = functools.partial(batch_encode_candidates, tokenizer, max_length=length)
        words = tokenizer(text[slice(*span)], add_special_tokens=False)["input_ids"]
        gap = " ".join([tokenizer.mask_token] * len(words))
        masked, others = text[: span[0]] + gap + text[span[1] :], [[*candidates, ""]]
        pairs = encode([[masked] * len(others[0])], text_pair=others)
        alone, whole = encode([[masked]]), encode([[text]])["input_ids"][0]
        hidden = alone["input_ids"][0] == mask
        kept = hidden | (alone["input_ids"][0] == whole)  # the span does not split a token
        seen = (pairs["input_ids"][0] == mask) == hidden
        require(
            bool(kept.all() and seen.all()) and int(hidden.sum()) == len(words) > 0,
            f"{text!r:.60} must fit {length} tokens beside a block, and its masked span {span} "
            "must be whole words; give shorter texts.",
        )
        labels = {"labels": np.where(hidden, whole, IGNORED), "mlm_mask": hidden}
        question, blocks = ({n: x[0] for n, x in e.items()} for e in (alone, encode(others)))
        return {"question": question, "blocks": blocks, "encoder": pairs | labels}

    def loss(self, params: Params, example: dict[str, Any]) -> Float[Array, ""]:
        """Returns -log of the probability of the masked tokens, in nats, marginal over the
        candidates by their relevance. Candidates are embedded here, so both models have gradients.
        """
        variables = {"params": params["embedder"]}
        query: Any = self.embedder.apply(variables, **example["question"])
        blocks: Any = self.embedder.apply(variables, **example["blocks"])
        relevance = query.projected_score @ blocks.projected_score.T  # [1, C]
        given = example["encoder"] | {"relevance_score": relevance}
        output: Any = self.encoder.apply({"params": params["encoder"]}, **given)
        return output.loss


def pretrain(
    models: Pretraining,
    params: Params,
    texts: Sequence[str],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    refresh_every: int | None = 500,
    seed: int = 0,
) -> tuple[Params, list[float]]:
    """Trains both models, one text per step, of which one salient span is masked. Its candidates
    are the best num_candidates - 1 blocks that do not contain the text, and an empty one (arXiv
    2002.08909, sections 3.3 and 3.4).

    Args:
        models: the models and the blocks.
        params: {"embedder": ..., "encoder": ...}.
        texts: training texts; those without salient spans are skipped.
        optimizer: the optimizer.
        steps: number of steps.
        refresh_every: steps between refreshes of the index, see `LiveIndex`.
        seed: seed of the choice of spans.

    Returns:
        The trained parameters and the losses.

    Raises:
        ValueError: for texts none of which has a salient span, or that are too long, and models of
            other tasks or another vocabulary.
        FloatingPointError: for a loss that is not finite.
    """
    config = checked_config(models.encoder, "knowledge_augmented_encoder", models.tokenizer)
    salient = [(text, spans) for text in texts if (spans := salient_spans(text))]
    require(bool(salient), f"none of {len(texts)} texts has a name, date or number to mask.")
    index = LiveIndex(
        models.embedder,
        models.tokenizer,
        models.records,
        every=refresh_every,
        steps=steps,
        start=params["embedder"],
    )
    count, generator = config.num_candidates - 1, np.random.default_rng(seed)
    state, losses = optimizer.init(params), []
    for step in range(steps):
        index.follow(step, params["embedder"])
        text, spans = salient[step % len(salient)]
        span = spans[int(generator.integers(len(spans)))]
        query = models.example(text, span, [])["question"]
        vector = embed_question(params["embedder"], query, embedder=models.embedder)
        beam = min(count + 1, len(models.records))
        found = models.records.texts(index.search(np.asarray(vector), beam).blocks[0].tolist())
        candidates = [block for block in found if text not in block][:count]
        batch = (models.example(text, span, candidates),)
        value, params, state = _update(params, state, batch, loss=models.loss, optimizer=optimizer)
        losses.append(_finite(value, step))
    return params, losses
