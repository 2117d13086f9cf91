"""Answers as spans of a context: from the scores of a window's tokens to characters, and from the
windows of a long context to its best answers, as transformers' question answering merges them.

Axes: T tokens, A answer lengths.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import softmax

_OUTSIDE = -1e4  # replaces the logits of all other tokens, as in transformers


class AnswerSpan(NamedTuple):
    """Characters `start` to `end` of a context, and as `score` the product of the probabilities of
    the span's first and last token (as transformers' QuestionAnsweringPipeline)."""

    score: float
    start: int
    end: int


class WindowAnswers(NamedTuple):
    """The best spans of a window, and as `impossible` the score of there being no answer in it;
    each score is as in `AnswerSpan`."""

    spans: list[AnswerSpan]
    impossible: float


def answer_places(encoding: Any, *, whole_words: bool = True) -> Int[np.ndarray, "T 2"]:
    """Returns for each token where in the context an answer starts whose first token it is, and
    where one ends whose last token it is, in characters; -1 for tokens outside the context.
    (transformers' QuestionAnsweringPipeline, with `align_to_words`)

    Args:
        encoding: a fast tokenizer's encoding of a question and a context.
        whole_words: widen answers to the words that their tokens are parts of.
    """
    places = np.array(encoding.offsets, np.int32)  # [T, 2]
    context = np.array([part == 1 for part in encoding.sequence_ids])
    if whole_words:
        words = np.array([-1 if word is None else word for word in encoding.word_ids])
        other = (words[1:] != words[:-1]) | (words[1:] < 0) | (context[1:] != context[:-1])
        begins = np.append(True, other)
        first, last = np.flatnonzero(begins), np.flatnonzero(np.append(other, True))
        word = np.cumsum(begins) - 1
        places = np.stack([places[first[word], 0], places[last[word], 1]], axis=-1)
    return np.where(context[:, None], places, np.int32(-1))


def window_answers(
    logits: Float[np.ndarray, "T 2"],
    places: Int[np.ndarray, "T 2"],
    no_answer: Bool[np.ndarray, "T"],
    *,
    count: int,
    longest: int,
) -> WindowAnswers:
    """Returns the `count` best answers of a window, as transformers' QuestionAnsweringPipeline.

    Args:
        logits: start and end logits of each token.
        places: the characters of each token, see `answer_places`.
        no_answer: whether a token counts in the softmax beside those of the context, as the first
            one of the window does, whose start and end mean "no answer".
        longest: maximum tokens of an answer.
    """
    allowed = places[:, 0] >= 0
    counted = np.where((allowed | no_answer)[:, None], logits, np.float32(_OUTSIDE))
    start, end = softmax(counted, axis=0).T
    found = best_spans(start, end, allowed, count=count, longest=longest)
    spans = [AnswerSpan(score, int(places[a, 0]), int(places[b, 1])) for a, b, score in found]
    return WindowAnswers(spans, float(start[0] * end[0]))


def merge_windows(
    windows: Iterable[WindowAnswers], *, count: int, may_be_empty: bool
) -> list[AnswerSpan]:
    """Returns the `count` best answers of a context. Of equal scores that of the first window wins.
    If `may_be_empty`, the span 0 to 0 competes with the lowest score of "no answer" of all windows.
    (transformers' QuestionAnsweringPipeline)
    """
    windows = list(windows)
    answers = [span for window in windows for span in window.spans]
    if may_be_empty:
        answers.append(AnswerSpan(min(window.impossible for window in windows), 0, 0))
    return sorted(answers, key=lambda answer: -answer.score)[:count]


def best_spans(
    start: Float[np.ndarray, "T"],
    end: Float[np.ndarray, "T"],
    allowed: Bool[np.ndarray, "T"],
    *,
    count: int,
    longest: int,
) -> list[tuple[int, int, float]]:
    """Returns the `count` best (first, last, score) of up to `longest` tokens, both ends allowed;
    the score is start * end. All [T, T] pairs are never formed: documents are long. (transformers'
    `decode_spans`)"""
    length = len(start)
    last = np.arange(length)[:, None] + np.arange(min(longest, length))[None]  # [T, A]
    inside = last < length
    last = np.minimum(last, length - 1)
    scores = np.where(inside & allowed[:, None] & allowed[last], start[:, None] * end[last], -1.0)
    least = np.partition(scores, -count, axis=None)[-count] if count < scores.size else 0.0
    good = np.flatnonzero(scores >= max(least, 0.0))  # sorting all would be most of the work
    best = good[np.argsort(-scores.flat[good], kind="stable")][:count]
    places = zip(*np.unravel_index(best, scores.shape), strict=True)
    return [(int(p[0]), int(last[p]), float(scores[p])) for p in places]
