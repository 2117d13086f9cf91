"""The tasks of pipelines whose answers are spans of the text: token classification and question
answering.

Axes: T tokens, Y labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
from scipy.special import softmax

from lsg_flax.data import answer_places, merge_windows, window_answers
from lsg_flax.files import is_blank
from lsg_flax.pipelines.tasks import (
    PipelineError,
    PipelineTask,
    Reader,
    a_text,
    check_choice,
    check_positive,
)

Aggregation = Literal["none", "simple", "first", "average", "max"]


class _Piece(NamedTuple):
    """A token, or a word of several tokens, with the scores [Y] of its labels."""

    word: str
    scores: np.ndarray
    start: int
    end: int
    place: int  # among the tokens
    continues: bool  # the word before it


@dataclass(frozen=True)
class TokenClassification(PipelineTask):
    """Labels tokens: {"entity", "score", "index", "word", "start", "end"}, or groups of them:
    {"entity_group", "score", "word", "start", "end"}; "start" and "end" are characters, "score" is
    a probability. (transformers' TokenClassificationPipeline)

    Attributes:
        aggregation_strategy: "none": single tokens; "simple": neighbours of the same entity are
            grouped (B- starts a new group); "first", "average", "max": the same for whole words,
            with the scores of the first token, the mean, or the most confident token.
        ignore_labels: labels or groups to leave out.

    Raises:
        ValueError: for an unknown aggregation_strategy.
    """

    heads: ClassVar = {"token_classification": ("logits",)}
    aggregation_strategy: Aggregation = "none"
    ignore_labels: Sequence[str] = ("O",)

    def __post_init__(self):
        check_choice("aggregation_strategy", self.aggregation_strategy, get_args(Aggregation))

    def rows(self, reader, item):
        """Returns the rows of one text; raises ValueError as other tasks, and for a slow
        tokenizer."""
        reader.need_offsets("token-classification")
        return super().rows(reader, item)

    def answer(self, reader, item, rows, outputs):
        """Returns the tokens or groups of a text whose labels are not in `ignore_labels`."""
        scores = softmax(outputs[0]["logits"], axis=-1)
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
    """Groups neighbours of the same entity, unless B- starts another one."""
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
    """Finds answers in a context: {"score", "start", "end", "answer"} with character positions, or
    a list of them if there are several. (transformers' QuestionAnsweringPipeline)

    Attributes:
        top_k: largest number of answers, per window and in total.
        max_answer_len: largest number of tokens of an answer.
        handle_impossible_answer: whether the empty answer "" (start 0, end 0) competes with its own
            score.
        max_seq_len: tokens per window, question included; by default what the pipeline reads.
        doc_stride: tokens that neighbouring windows share; by default half of max_seq_len, at most
            128.
        align_to_words: whether to extend answers to whole words.

    Raises:
        ValueError: for numbers that are not whole or too small, and flags that are not booleans.
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
            raise ValueError(f"doc_stride={self.doc_stride!r} must be an integer of at least 0.")

    def items(self, inputs, question, context):
        """Returns dicts of "question" and "context"; raises ValueError unless either these or
        `inputs` are given, and for unequal numbers of questions and contexts."""
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
        """Returns a row for each window of the context.

        Raises:
            ValueError: for a slow tokenizer, another document than a dict of two texts, an empty
                question or context, and a window that has no room for the context.
        """
        reader.need_offsets("question-answering")
        if not isinstance(item, dict) or item.keys() != {"question", "context"}:
            raise ValueError(f"a document must have 'question' and 'context', got {item!r:.60}.")
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
        """Returns the tokens per window, and how many neighbouring windows share."""
        window = reader.max_length if self.max_seq_len is None else self.max_seq_len
        tokens = reader.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        room = window - len(tokens) - reader.tokenizer.num_special_tokens_to_add(pair=True)
        stride = self.doc_stride
        if stride is None:
            stride = min(window // 2, 128, max(room - 1, 0))
        if not 1 <= window <= reader.max_length:
            raise ValueError(f"max_seq_len={window} must be in 1..{reader.max_length}.")
        if not 0 <= stride < room:
            raise PipelineError(
                f"max_seq_len={window} leaves {max(room, 0)} tokens for the context beside a "
                f"question of {len(tokens)}, which must be more than doc_stride={stride}; give a "
                f"max_seq_len of up to {reader.max_length}, a smaller doc_stride or a shorter "
                "question."
            )
        return window, stride

    def answer(self, reader, item, rows, outputs):
        """Returns the best answers of all windows."""
        windows = []
        for (inputs, encoding), output in zip(rows, outputs, strict=True):
            logits = np.stack([output["start_logits"], output["end_logits"]], axis=-1)
            places = answer_places(encoding, whole_words=self.align_to_words)
            special = np.array(inputs["input_ids"]) == reader.tokenizer.cls_token_id
            limits = {"count": self.top_k, "longest": self.max_answer_len}
            windows.append(window_answers(logits, places, special, **limits))
        found = merge_windows(windows, count=self.top_k, may_be_empty=self.handle_impossible_answer)
        answers = [a._asdict() | {"answer": item["context"][a.start : a.end]} for a in found]
        return answers[0] if len(answers) == 1 else answers
