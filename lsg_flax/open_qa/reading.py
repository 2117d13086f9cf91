"""The program that answers: runs a question and the retrieved blocks through embedder and reader.

Axes: D model width (here of the projection), T tokens.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsg_flax.models import Model, ModelOutput, Params, RealmConfig
from lsg_flax.open_qa.pairs import AnswerPlaces, Pairs

_STEP = 64  # pairs are padded to multiples of it, so that a few programs serve all questions


class Retrieved(NamedTuple):
    """The blocks retrieved for a question, best first: their numbers, their embeddings, their pairs
    with the question, and the positions of answers if answers are given."""

    blocks: Int[np.ndarray, " beam"]
    vectors: Float[np.ndarray, "beam D"]
    pairs: Pairs
    places: AnswerPlaces | None


@functools.partial(jax.jit, static_argnames="embedder")
def embed_question(params: Params, question: dict[str, Any], *, embedder: Model) -> Array:
    """Returns the question's embedding, [1, D]."""
    output: Any = embedder.apply({"params": params}, **question)
    return output.projected_score


@functools.partial(jax.jit, static_argnames=("embedder", "reader"))
def read_blocks(
    params: Params,
    question: dict[str, Any],
    vectors: Float[Array, "beam D"],
    blocks: dict[str, Any],
    key: jax.Array | None = None,
    *,
    embedder: Model,
    reader: Model,
) -> ModelOutput:
    """Returns the reader's outputs. The relevance of a block is the product of its embedding with
    the question's, which is computed here, so that gradients reach the embedder.

    Args:
        params: {"embedder": ..., "reader": ...}.
        question: the question's arrays, [1, T].
        vectors: embeddings of the blocks.
        blocks: from `reader_inputs`.
        key: random key of dropout; None for no dropout.
    """
    train, keys = key is not None, {} if key is None else {"dropout": key}
    variables = {"params": params["embedder"]}
    output: Any = embedder.apply(variables, **question, train=train, rngs=keys)
    relevance = vectors.astype(jnp.float32) @ output.projected_score[0].astype(jnp.float32)
    variables = {"params": params["reader"]}
    output = reader.apply(variables, **blocks, relevance_score=relevance, train=train, rngs=keys)
    return output


def reader_inputs(
    retrieved: Retrieved, config: RealmConfig, max_length: int
) -> dict[str, np.ndarray]:
    """Returns the reader's inputs without the relevance: the first reader_beam_size pairs, padded
    to a multiple of 64 tokens, and all labels, padded to a power of two of positions."""
    beam, length = config.reader_beam_size, retrieved.pairs.input_ids.shape[1]
    padded = min(-(-length // _STEP) * _STEP, max_length)
    fill = ((0, 0), (0, max(padded, config.max_span_width) - length))
    arrays = {n: np.pad(array[:beam], fill) for n, array in retrieved.pairs._asdict().items()}
    if retrieved.places is None:
        return arrays
    has_answers, starts, ends = retrieved.places
    fill = ((0, 0), (0, (1 << max(starts.shape[1] - 1, 0).bit_length()) - starts.shape[1]))
    starts, ends = (np.pad(places, fill, constant_values=-1) for places in (starts, ends))
    return arrays | dict(has_answers=has_answers, start_positions=starts, end_positions=ends)


def without_padding(output: ModelOutput, *, padded: int, length: int, width: int) -> ModelOutput:
    """Returns the outputs for pairs of `length` tokens that were padded to `padded`: removes spans
    (of up to `width` tokens) that end in the padding, and renumbers the others."""
    ends = np.concatenate([np.arange(more, padded) for more in range(width)])
    kept, before = ends < length, np.asarray(output.candidate).item()
    logits, correct = np.asarray(output.reader_logits)[:, kept], output.reader_correct
    correct = None if correct is None else jnp.asarray(np.asarray(correct)[:, kept])
    candidate = jnp.asarray(np.count_nonzero(kept[:before]))
    changed = {"candidate": candidate, "reader_correct": correct}
    return dataclasses.replace(output, reader_logits=jnp.asarray(logits), **changed)


def best_span(output: ModelOutput) -> tuple[int, int, int]:
    """Returns the index of the best block in the beam, and of the answer's first and last token in
    its pair."""
    found = (output.block_idx, output.start_pos, output.end_pos)
    block, start, end = (np.asarray(value).item() for value in found)
    return block, start, end
