"""Counts what is truncated of texts that are longer than a row."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Cut(NamedTuple):
    """How much was truncated; all 0 with a slow tokenizer, which does not say.

    Attributes:
        texts, tokens: number of texts, and of their tokens before truncation.
        cut_texts, cut_tokens: number of truncated texts, and of dropped tokens.
    """

    texts: int = 0
    cut_texts: int = 0
    tokens: int = 0
    cut_tokens: int = 0

    def __add__(self, other: object) -> "Cut":
        """Returns the counts of both together."""
        assert isinstance(other, Cut)
        return Cut(*(a + b for a, b in zip(self, other, strict=True)))

    def words(self, length: int) -> str:
        """Returns the counts as a sentence, for rows of at most `length` tokens; "" if nothing was
        truncated."""
        if not self.cut_texts:
            return ""
        texts = f"{self.cut_texts:,} of {self.texts:,} texts" if self.texts else "some texts"
        share = self.cut_tokens / max(self.tokens, 1)
        return f"{texts} were truncated to {length:,} tokens, which drops {share:.1%} of all tokens"


def cut_of(encodings: Sequence[Any] | None) -> Cut:
    """Returns what a fast tokenizer has truncated of these texts, or pairs of texts."""
    total = Cut()
    for encoding in encodings or ():
        cut = _cut_tokens(encoding) if encoding.overflowing else 0
        total += Cut(1, int(bool(encoding.overflowing)), len(encoding.ids) + cut, cut)
    return total


def _cut_tokens(encoding: Any) -> int:
    """Returns the number of dropped tokens. The overflowing parts of a pair have the tokens of one
    of its texts several times, so positions are compared."""
    if max(s or 0 for part in encoding.overflowing for s in part.sequence_ids) == 0:
        return sum(len(e.ids) - sum(e.special_tokens_mask) for e in encoding.overflowing)
    return len(set().union(*map(_places, encoding.overflowing)) - _places(encoding))


def _places(encoding: Any) -> set[tuple[int, int | None, tuple[int, int]]]:
    """Returns the positions of the tokens in the texts."""
    parts = zip(encoding.sequence_ids, encoding.word_ids, encoding.offsets, strict=True)
    return {place for place in parts if place[0] is not None}
