"""Scores of answers to questions as texts, computed from the same forward pass as the loss.

Axes: B batch, T tokens.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lsg_flax.data import (
    AnswerSpan,
    TokenizedDataset,
    WindowAnswers,
    merge_windows,
    window_answers,
)
from lsg_flax.hub import Tokenizer
from lsg_flax.models import Batch, Model, ModelOutput
from lsg_flax.training.metrics import LONGEST_ANSWER, ROWS, AnswerScorer
from lsg_flax.training.scores import Scores, answer_scores


def text_scorer(model: Model, data: TokenizedDataset, tokenizer: Tokenizer) -> AnswerScorer | None:
    """Returns a scorer that compares answers as texts, see `answer_scores`; None for other tasks
    than question answering.

    The answer to a question is the best span of all windows of its context, of at most 30 tokens
    and widened to whole words. If any question of the data has no answer, "" competes.

    Args:
        data: the dataset, all of whose rows the batches must have.
        tokenizer: the tokenizer that the data was read with.
    """
    if model.task_record.scorer != "spans":
        return None
    keep = functools.partial(_best_of_windows, data, tokenizer)
    return AnswerScorer(_positions, functools.partial(_scores, data), keep)


def _positions(model: Model, output: ModelOutput, batch: Batch) -> dict[str, jax.Array]:
    """Returns the start and end logits, [B, T, 2], and as labels the numbers of the rows."""
    logits = [getattr(output, target.output) for target in model.task_record.targets]
    return {"predicted": jnp.stack(logits, -1).astype(jnp.float32), "labels": batch[ROWS]}


def _best_of_windows(
    data: TokenizedDataset,
    tokenizer: Tokenizer,
    logits: Float[np.ndarray, "B T 2"],
    rows: Int[np.ndarray, "B"],
) -> Float[np.ndarray, "B 4"]:
    """Returns for each window its best answer's score, start and end, and the score of "no
    answer"."""
    found = np.zeros((len(rows), 4))
    for place, row in enumerate(rows):
        words = data.info(row).words
        assert words is not None
        special = data[row]["input_ids"] == tokenizer.cls_token_id
        own = logits[place, : len(words)]
        best = window_answers(own, words, special, count=1, longest=LONGEST_ANSWER)
        (span,) = best.spans or [AnswerSpan(-1.0, 0, 0)]  # no token lies in the context
        found[place] = *span, best.impossible
    return found


def _scores(
    data: TokenizedDataset,
    found: list[Float[np.ndarray, "_ 4"]],
    rows: list[Int[np.ndarray, "_"]],
    names: tuple[str, ...],
    loss: float,
) -> Scores:
    """Returns the scores of the best answers of all windows of each question."""
    windows: dict[int, list[WindowAnswers]] = collections.defaultdict(list)
    numbers, values = np.concatenate(rows), np.concatenate(found)
    for place in np.argsort(numbers):  # windows in the order of the context
        score, start, end, impossible = values[place].tolist()
        window = WindowAnswers([AnswerSpan(score, int(start), int(end))], impossible)
        windows[int(data.arrays["examples"][numbers[place]])].append(window)
    records = [data.record(example) for example in windows]
    answers = [record["answers"]["text"] for record in records]
    given = []
    for record, parts in zip(records, windows.values(), strict=True):
        (span,) = merge_windows(parts, count=1, may_be_empty=not all(answers))
        given.append(record["context"][span.start : span.end])
    return answer_scores(given, answers)
