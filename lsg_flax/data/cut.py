"""What is lost of texts that are longer than a row."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Cut(NamedTuple):
    """How much was cut; a slow tokenizer does not say.

    Attributes:
        texts, tokens: how many there were, before anything was cut.
        cut_texts, cut_tokens: how many of them were cut, and away.
    """

    texts: int = 0
    cut_texts: int = 0
    tokens: int = 0
    cut_tokens: int = 0

    def __add__(self, other: object) -> "Cut":
        """Of both together."""
        assert isinstance(other, Cut)
        return Cut(*(a + b for a, b in zip(self, other, strict=True)))

    def words(self, length: int) -> str:
        """What is said of it, where rows have at most `length` tokens; nothing if nothing was
        cut."""
        if not self.cut_texts:
            return ""
        texts = f"{self.cut_texts:,} of {self.texts:,} texts" if self.texts else "some texts"
        share = self.cut_tokens / max(self.tokens, 1)
        return f"{texts} were cut at {length:,} tokens, and {share:.1%} of all tokens with them"


def cut_of(encodings: Sequence[Any] | None) -> Cut:
    """What a fast tokenizer has cut of these texts, or pairs of them."""
    total = Cut()
    for encoding in encodings or ():
        cut = _cut_tokens(encoding) if encoding.overflowing else 0
        total += Cut(1, int(bool(encoding.overflowing)), len(encoding.ids) + cut, cut)
    return total


def _cut_tokens(encoding: Any) -> int:
    """Overflowing parts of a pair have the tokens of one of its texts several times."""
    if max(s or 0 for part in encoding.overflowing for s in part.sequence_ids) == 0:
        return sum(len(e.ids) - sum(e.special_tokens_mask) for e in encoding.overflowing)
    return len(set().union(*map(_places, encoding.overflowing)) - _places(encoding))


def _places(encoding: Any) -> set[tuple[int, int | None, tuple[int, int]]]:
    """Where the tokens of the texts stand."""
    parts = zip(encoding.sequence_ids, encoding.word_ids, encoding.offsets, strict=True)
    return {place for place in parts if place[0] is not None}
