"""Tasks: what a head is for."""

from typing import Literal

Task = Literal[
    "base",
    "masked_lm",
    "causal_lm",
    "pretraining",
    "next_sentence_prediction",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
]
