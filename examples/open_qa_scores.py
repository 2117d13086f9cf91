"""Scores of open_qa.py: whether a question finds its block, by vectors and by BM25, and whether it
is answered."""

import bm25s
import numpy as np
from open_qa_data import Question

from lsg_flax.open_qa import BlockEmbedder, OpenQA

Scores = list[float]


def hits(scores: np.ndarray, questions: list[Question]) -> Scores:
    """The shares of questions whose block is among the best 1, 5 and 20; scores are [questions,
    blocks]. Of equal scores the own block's comes last."""
    own = np.array([[question.block] for question in questions])
    ranks = (scores >= np.take_along_axis(scores, own, axis=1)).sum(axis=1)
    return [float((ranks <= best).mean()) for best in (1, 5, 20)]


def measure(qa: OpenQA, questions: list[Question], asked: int) -> Scores:
    """Its hits, and the share of the first `asked` questions that the right name answers."""
    embed, right = BlockEmbedder(qa.embedder, qa.params["embedder"], qa.tokenizer), 0
    found = hits(embed([q.text for q in questions]) @ np.asarray(qa.embeddings).T, questions)
    for question in questions[:asked]:
        wanted = qa.tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        right += qa(**qa.encode(question.text)).predicted_answer_ids.tolist() == wanted
    return [*found, right / len(questions[:asked])]


def bm25_scores(blocks: list[str], questions: list[str]) -> np.ndarray:
    """[questions, blocks], by bm25s with its default settings, English stop words left out."""
    words = {"stopwords": "en", "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(blocks, **words), show_progress=False)
    asked = bm25s.tokenize(questions, return_ids=False, **words)
    return np.stack([index.get_scores(tokens) for tokens in asked])
