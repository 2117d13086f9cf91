"""Makes summaries from a document's own sentences, which any summariser should be compared with,
and the table that compares them.

`lead` takes the first sentences. `central` takes the sentences nearest to the mean of all sentences
of the document, as bags of words weighted by TF-IDF (a centroid, Radev et al. 2004), up to a number
of words, in the order of the text. Neither sees an abstract. They need scikit-learn, and nltk,
which rouge-score installs.
"""

from collections.abc import Callable, Iterable

import numpy as np
from aclsum_papers import Paper
from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer

from lsg_flax.training import ROUGE, rouge_scores

SHORTEST = 5  # words of a sentence; what is shorter is a remnant of a list or a formula
Splitter = Callable[[str], list[str]]


def sentence_splitter(texts: Iterable[str]) -> Splitter:
    """Splits paragraphs to sentences. Which words end with a dot and no sentence ("et al.") it
    learns from `texts` (Punkt, Kiss and Strunk 2006), so that nothing has to be downloaded."""
    trainer = PunktTrainer()
    trainer.train("\n".join(texts))
    punkt = PunktSentenceTokenizer(trainer.get_params())
    return lambda text: [s for line in text.splitlines() for s in punkt.tokenize(line)]


def lead(sentences: list[str], count: int = 3) -> list[str]:
    """The first ones."""
    return sentences[:count]


def up_to(words: int, sentences: Iterable[str]) -> list[str]:
    """The first ones, until they have so many words together."""
    taken: list[str] = []
    for sentence in sentences:
        if sum(len(s.split()) for s in taken) >= words:
            break
        taken.append(sentence)
    return taken


def word_weights(texts: Iterable[str]) -> TfidfVectorizer:
    """How much a word tells, by how few of `texts` have it."""
    return TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(texts)


def central(sentences: list[str], weights: TfidfVectorizer, *, words: int) -> list[str]:
    """The most central sentences, of so many words together."""
    kept = [s for s in dict.fromkeys(sentences) if len(s.split()) >= SHORTEST] or sentences
    vectors = weights.transform(kept)
    nearness = vectors @ np.asarray(vectors.mean(axis=0)).ravel()
    order = np.argsort(-nearness, kind="stable")
    return sorted(up_to(words, (kept[place] for place in order)), key=kept.index)


def baselines(known: list[Paper], new: list[Paper]) -> dict[str, list[str]]:
    """Summaries of the new papers by each of these ways, a sentence per line. Of the known ones
    they use how long abstracts are, and how words are distributed."""
    texts, lengths = [p.text for p in known], [len(p.abstract.split()) for p in known]
    words, weights = sum(lengths) // len(lengths), word_weights(texts)
    split = sentence_splitter(texts[:30])
    documents = [split(paper.text) for paper in new]
    found = {
        "the first 3 sentences": [lead(d) for d in documents],
        f"the first {words} words": [up_to(words, d) for d in documents],
        "the most central sentences": [central(d, weights, words=words) for d in documents],
    }
    return {name: ["\n".join(sentences) for sentences in of] for name, of in found.items()}


def show(summaries: dict[str, list[str]], papers: list[Paper]) -> dict[str, dict[str, float]]:
    """Prints and returns ROUGE of each kind of summary."""
    scores = {n: rouge_scores(of, [p.abstract for p in papers]) for n, of in summaries.items()}
    table = Table(title=f"ROUGE on {len(papers)} test papers, F1 in points")
    for column in ("summary", *ROUGE):
        table.add_column(column)
    for name, of in scores.items():
        table.add_row(name, *(f"{100 * of[kind]:.1f}" for kind in ROUGE))
    Console(highlight=False, width=100).print(table)
    return scores
