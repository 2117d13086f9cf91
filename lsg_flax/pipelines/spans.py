"""The tasks of pipelines whose answers are places in the text: token classification and question
answering.

Axes: T tokens, Y labels, A answer lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float

from lsg_flax.files import is_blank
from lsg_flax.pipelines.tasks import (
    PipelineError,
    PipelineTask,
    Reader,
    a_text,
    check_choice,
    check_positive,
    softmax,
)

Aggregation = Literal["none", "simple", "first", "average", "max"]


class _Piece(NamedTuple):
    """A token, or a word of several, with the scores [Y] of its labels."""

    word: str
    scores: np.ndarray
    start: int
    end: int
    place: int  # among the tokens
    continues: bool  # the word before it


@dataclass(frozen=True)
class TokenClassification(PipelineTask):
    """Labels of tokens: {"entity", "score", "index", "word", "start", "end"}, or of groups of them:
    {"entity_group", "score", "word", "start", "end"}.

    Attributes:
        aggregation_strategy: "none": tokens; "simple": neighbours of the same entity together (B-
            begins a new one); "first", "average", "max": the same with whole words, whose scores
            are those of the first token, the mean, or those of the surest token.
        ignore_labels: labels or groups to leave out.
    """

    heads: ClassVar = {"token_classification": ("logits",)}
    aggregation_strategy: Aggregation = "none"
    ignore_labels: Sequence[str] = ("O",)

    def __post_init__(self):
        check_choice("aggregation_strategy", self.aggregation_strategy, get_args(Aggregation))

    def rows(self, reader, item):
        reader.need_offsets("token-classification")
        return super().rows(reader, item)

    def answer(self, reader, item, rows, outputs):
        scores = softmax(outputs[0]["logits"])
        pieces = self._tokens(reader.tokenizer, item, rows[0].encoding, scores)
        if self.aggregation_strategy in ("first", "average", "max"):
            pieces = self._words(reader.tokenizer, pieces)
        labels = [reader.config.labels[piece.scores.argmax()] for piece in pieces]
        if self.aggregation_strategy != "none":
            groups = _group(pieces, labels, reader.tokenizer)
            return [g for g in groups if g["entity_group"] not in self.ignore_labels]
        return [
            {
                "entity": label,
                "score": float(piece.scores.max()),
                "index": piece.place,
                "word": piece.word,
                "start": piece.start,
                "end": piece.end,
            }
            for piece, label in zip(pieces, labels, strict=True)
            if label not in self.ignore_labels
        ]

    def _tokens(self, tokenizer, text: str, encoding, scores) -> list[_Piece]:
        prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
        pieces = []
        places = zip(encoding.ids, encoding.offsets, strict=True)
        for index, (token, (start, end)) in enumerate(places):
            if encoding.special_tokens_mask[index]:
                continue
            word = tokenizer.convert_ids_to_tokens(token)
            # As transformers: a prefix makes a token longer than its text; without one, a token
            # continues a word unless there is a space at its start.
            continues = (
                len(word) != end - start
                if prefix
                else start > 0 and " " not in text[start - 1 : start + 1]
            )
            if token == tokenizer.unk_token_id:
                word, continues = text[start:end], False
            pieces.append(_Piece(word, scores[index], start, end, index, continues))
        return pieces

    def _words(self, tokenizer, tokens: list[_Piece]) -> list[_Piece]:
        words: list[list[_Piece]] = []
        for token in tokens:
            if token.continues and words:
                words[-1].append(token)
            else:
                words.append([token])
        return [
            parts[0]._replace(
                word=tokenizer.convert_tokens_to_string([part.word for part in parts]),
                scores=self._of_word(np.stack([part.scores for part in parts])),
                end=parts[-1].end,
            )
            for parts in words
        ]

    def _of_word(self, scores: np.ndarray) -> np.ndarray:
        if self.aggregation_strategy == "average":
            return scores.mean(axis=0)
        first = self.aggregation_strategy == "first"
        return scores[0 if first else scores.max(axis=1).argmax()]


def _group(pieces: list[_Piece], labels: list[str], tokenizer) -> list[dict[str, float | str]]:
    """Neighbours of the same entity, joined unless B- begins another one."""
    groups: list[list[_Piece]] = []
    names: list[str] = []
    before = None
    for piece, label in zip(pieces, labels, strict=True):
        begins = label.startswith("B-")
        entity = label[2:] if begins or label.startswith("I-") else label
        if not begins and entity == before:
            groups[-1].append(piece)
        else:
            groups.append([piece])
            names.append(label.split("-", 1)[-1])
        before = entity
    return [
        {
            "entity_group": name,
            "score": float(np.mean([piece.scores.max() for piece in group])),
            "word": tokenizer.convert_tokens_to_string([piece.word for piece in group]),
            "start": group[0].start,
            "end": group[-1].end,
        }
        for name, group in zip(names, groups, strict=True)
    ]


@dataclass(frozen=True)
class QuestionAnswering(PipelineTask):
    """Answers in a context: {"score", "start", "end", "answer"} with places of characters, or a
    list of them if there are several.

    Attributes:
        top_k: answers per window and in all.
        max_answer_len: tokens of an answer at most.
        handle_impossible_answer: "" (start 0, end 0) competes with its own score.
        max_seq_len: tokens of a window, question included; what the pipeline reads by default.
        doc_stride: tokens that windows share; by default half of max_seq_len up to 128.
        align_to_words: widen answers to whole words.
    """

    heads: ClassVar = {"question_answering": ("start_logits", "end_logits")}
    top_k: int = 1
    max_answer_len: int = 15
    handle_impossible_answer: bool = False
    max_seq_len: int | None = None
    doc_stride: int | None = None
    align_to_words: bool = True

    def __post_init__(self):
        check_positive(top_k=self.top_k, max_answer_len=self.max_answer_len)
        if self.max_seq_len is not None:
            check_positive(max_seq_len=self.max_seq_len)
        for name in ("handle_impossible_answer", "align_to_words"):
            check_choice(name, getattr(self, name), (True, False))
        if self.doc_stride is not None and (
            type(self.doc_stride) is not int or self.doc_stride < 0
        ):
            raise ValueError(f"doc_stride={self.doc_stride!r} must be a whole number from 0.")

    def items(self, inputs, question, context):
        given = [value is not None for value in (inputs, question, context)]
        if given not in ([True, False, False], [False, True, True]):
            raise ValueError(
                "give question= and context=, or dicts of 'question' and 'context' in their place."
            )
        if inputs is not None:
            return inputs
        if isinstance(question, str) and isinstance(context, str):
            return {"question": question, "context": context}
        contexts = [context] * len(question) if isinstance(context, str) else context
        if isinstance(question, str) or len(question) != len(contexts):
            raise ValueError(
                "question= and context= are lists of different lengths; give one context, or one "
                "for each question."
            )
        return [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]

    def rows(self, reader, item):
        reader.need_offsets("question-answering")
        if not isinstance(item, dict) or item.keys() != {"question", "context"}:
            raise ValueError(
                f"a document must be a dict of 'question' and 'context', got {item!r}."
            )
        question, context = (a_text(item[name]) for name in ("question", "context"))
        if is_blank(question):
            raise ValueError("the question is empty.")
        window, stride = self._window(reader, question)
        rows = reader.rows(
            question,
            context,
            truncation="only_second",
            max_length=window,
            stride=stride,
            return_overflowing_tokens=True,
        )
        if not any(place == 1 for row in rows for place in row.encoding.sequence_ids):
            raise ValueError(f"the context {context[:60]!r} has no tokens to answer with.")
        return rows

    def _window(self, reader: Reader, question: str) -> tuple[int, int]:
        """Tokens of a window, and how many it shares with the next."""
        window = reader.max_length if self.max_seq_len is None else self.max_seq_len
        tokens = reader.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        room = window - len(tokens) - reader.tokenizer.num_special_tokens_to_add(pair=True)
        stride = self.doc_stride
        if stride is None:
            stride = min(window // 2, 128, max(room - 1, 0))
        readable = 1 <= window <= reader.max_length
        if not readable or not 0 <= stride < room:
            kind = ValueError if readable else PipelineError
            raise kind(
                f"max_seq_len={window} (1..{reader.max_length} here) leaves {room} tokens for the "
                f"context after a question of {len(tokens)}, and doc_stride={stride} must be less."
            )
        return window, stride

    def answer(self, reader, item, rows, outputs):
        answers, impossible = [], 1e6
        for (inputs, encoding), output in zip(rows, outputs, strict=True):
            allowed = np.array([place == 1 for place in encoding.sequence_ids])
            counted = allowed | (np.array(inputs["input_ids"]) == reader.tokenizer.cls_token_id)
            start, end = (
                softmax(np.where(counted, output[name], -1e4))
                for name in ("start_logits", "end_logits")
            )
            impossible = min(impossible, float(start[0] * end[0]))
            for first, last, score in best_spans(
                start, end, allowed, count=self.top_k, longest=self.max_answer_len
            ):
                places = self._characters(encoding, first, last)
                answers.append((score, *places, item["context"][slice(*places)]))
        if self.handle_impossible_answer:
            answers.append((impossible, 0, 0, ""))
        answers = sorted(answers, key=lambda answer: -answer[0])[: self.top_k]
        named = [dict(zip(("score", "start", "end", "answer"), a, strict=True)) for a in answers]
        return named[0] if len(named) == 1 else named

    def _characters(self, encoding, first: int, last: int) -> tuple[int, int]:
        words = encoding.token_to_word(first), encoding.token_to_word(last)
        if not self.align_to_words or None in words:
            return encoding.offsets[first][0], encoding.offsets[last][1]
        spans = [encoding.word_to_chars(word, sequence_index=1) for word in words]
        return spans[0][0], spans[1][1]


def best_spans(
    start: Float[np.ndarray, "T"],
    end: Float[np.ndarray, "T"],
    allowed: Bool[np.ndarray, "T"],
    *,
    count: int,
    longest: int,
) -> list[tuple[int, int, float]]:
    """The `count` best (first, last, score) of up to `longest` tokens, both ends allowed; the score
    is start * end. All [T, T] pairs are never formed: documents are long."""
    length = len(start)
    last = np.arange(length)[:, None] + np.arange(min(longest, length))[None]  # [T, A]
    inside = last < length
    last = np.minimum(last, length - 1)
    scores = np.where(inside & allowed[:, None] & allowed[last], start[:, None] * end[last], -1.0)
    best = np.argsort(-scores, axis=None, kind="stable")[:count]
    places = [np.unravel_index(place, scores.shape) for place in best]
    return [(int(p[0]), int(last[p]), float(scores[p])) for p in places if scores[p] >= 0]
