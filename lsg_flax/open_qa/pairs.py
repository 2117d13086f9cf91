"""Encodes texts for the models: pairs of a question and a block, candidates, and the positions of
answers in blocks.

Axes: B batch, C choices (candidates of a row), T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lsg_flax.checks import require
from lsg_flax.hub import Tokenizer
from lsg_flax.models import Model, RealmConfig

_FIELDS = ("input_ids", "attention_mask", "token_type_ids")


class Pairs(NamedTuple):
    """A question paired with several blocks, [CLS] question [SEP] block [SEP]; `block_mask` is True
    for the block's own tokens."""

    input_ids: Int[np.ndarray, "blocks T"]
    attention_mask: Int[np.ndarray, "blocks T"]
    token_type_ids: Int[np.ndarray, "blocks T"]
    block_mask: Bool[np.ndarray, "blocks T"]


class AnswerPlaces(NamedTuple):
    """The positions of answers in blocks, padded with -1."""

    has_answers: Bool[np.ndarray, " blocks"]
    start_positions: Int[np.ndarray, "blocks places"]
    end_positions: Int[np.ndarray, "blocks places"]


def checked_config(model: Model, task: str, tokenizer: Tokenizer) -> RealmConfig:
    """Returns the model's config; raises ValueError for another task, and for a tokenizer that
    cannot make pairs or has ids beyond the model's vocabulary."""
    config = model.config
    if model.task != task or not isinstance(config, RealmConfig):
        raise ValueError(
            f"the model is a {config.model_type} for {model.task!r}; give a REALM for {task!r}."
        )
    lacking = [n for n in ("cls", "sep", "pad") if getattr(tokenizer, f"{n}_token_id") is None]
    require(not lacking, f"the tokenizer lacks {lacking} tokens; give the model's BERT tokenizer.")
    highest = max(tokenizer.get_vocab().values())
    require(
        highest < config.vocab_size,
        f"the tokenizer has ids up to {highest}, but the model has vocab_size={config.vocab_size}: "
        "it has another vocabulary; copy the tokenizer's files from the model's checkpoint.",
    )
    return config


def encode_pairs(
    tokenizer: Tokenizer, question: str, blocks: Sequence[str], max_length: int
) -> Pairs:
    """Pairs the question with each block, padded to the longest pair; in pairs that are too long
    the longer part is truncated first. Raises ValueError if nothing of the blocks is left."""
    encoded = tokenizer(
        [question] * len(blocks),
        list(blocks),
        **{"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "np"},
        **{"return_token_type_ids": True, "return_special_tokens_mask": True},
    )
    ids, mask, types = (np.asarray(encoded[name], np.int32) for name in _FIELDS)
    own = (types > 0) & (encoded["special_tokens_mask"] == 0)
    require(
        bool(own.any()) and ids.shape[1] <= max_length,
        f"reader_seq_len={max_length} leaves no token of a block beside the question; raise it in "
        "config.json.",
    )
    return Pairs(ids, mask, types, own)


def question_text(tokenizer: Tokenizer, ids: Int[np.ndarray, " T"]) -> str:
    """Decodes a question without special tokens, except [UNK], which stands for a word (the
    reference drops it).

    Raises:
        ValueError: for a question without words.
    """
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    tokens = [token for token in ids.tolist() if token not in special]
    require(
        bool(tokens),
        f"the question has only {len(ids)} special tokens; ask one with words in it.",
    )
    return tokenizer.decode(tokens, skip_special_tokens=False)


def check_answers(answer_ids: Sequence[Sequence[int]], max_span_width: int) -> None:
    """Raises ValueError for answers that are empty or wider than max_span_width."""
    lengths = [len(answer) for answer in answer_ids]
    require(
        bool(lengths) and min(lengths) > 0,
        f"the answers have {lengths} tokens; give at least one answer, each of at least one token.",
    )
    require(
        max(lengths) <= max_span_width,
        f"the answers have {lengths} tokens, but the reader finds none of more than max_span_width="
        f"{max_span_width}; leave the longer ones out, or raise it in config.json (no weight "
        "depends on it).",
    )


def block_has_answer(
    input_ids: Int[np.ndarray, "blocks T"], answer_ids: Sequence[Sequence[int]], *, sep: int
) -> AnswerPlaces:
    """Finds every position between a row's first and second [SEP] (of id `sep`) where an answer's
    ids start: in the order of the answers, then from left to right, padded with -1. (transformers'
    `RealmRetriever.block_has_answer`)"""
    passed = (input_ids == sep).cumsum(axis=1)
    inside = (passed == 1) & (input_ids != sep)
    found: list[list[tuple[int, int]]] = [[] for _ in input_ids]
    for answer in answer_ids:
        if not 0 < len(answer) <= input_ids.shape[1]:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(input_ids, len(answer), axis=1)
        same = (windows == np.asarray(answer)).all(axis=2) & inside[:, : windows.shape[1]]
        for row, start in np.argwhere(same):
            found[row].append((int(start), int(start) + len(answer) - 1))
    places = np.full((len(found), max(map(len, found), default=0), 2), -1, np.int32)
    for row, spans in enumerate(found):
        places[row, : len(spans)] = np.reshape(spans, (-1, 2))
    return AnswerPlaces(np.array([*map(bool, found)]), places[..., 0], places[..., 1])


def batch_encode_candidates(
    tokenizer: Tokenizer,
    text: Sequence[Sequence[str]],
    *,
    max_length: int,
    text_pair: Sequence[Sequence[str]] | None = None,
) -> dict[str, Int[np.ndarray, "B C T"]]:
    """Encodes the candidates of each row, truncated and padded to `max_length` tokens, as the
    method of this name of transformers' RealmTokenizer with truncation.

    Returns:
        `input_ids`, `attention_mask` and `token_type_ids`, [B, C, T].

    Raises:
        ValueError: if rows have different numbers of candidates, or none, or `text_pair` has other
            numbers than `text`.
    """
    both = [text] if text_pair is None else [text, text_pair]
    counts = [[len(row) for row in rows] for rows in both]
    require(
        counts[0] == counts[-1] and len({*counts[0]}) == 1 and counts[0][0] > 0,
        f"rows have {' and '.join(map(str, counts))} candidates; give all rows the same "
        "number, 1 or more.",
    )
    encoded = tokenizer(
        *([candidate for row in rows for candidate in row] for rows in both),
        **{"padding": "max_length", "truncation": True, "max_length": max_length},
        **{"return_token_type_ids": True, "return_tensors": "np"},
    )
    shape = (len(text), counts[0][0], max_length)
    return {name: np.asarray(encoded[name], np.int32).reshape(shape) for name in _FIELDS}
