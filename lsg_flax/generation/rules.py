"""Rules for the next token: pure functions that change its scores, in the order of transformers.

They get the text as an array of fixed width, of which the first `length` entries are in use, so
that one program serves every step. As in transformers, greedy decoding and sampling apply them to
logits, beam search to log-probabilities.

Axes: B batch, V vocabulary; S keys are the encoder's tokens here.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsg_flax.checks import require


def check_whole(name: str, value: int, least: int) -> None:
    """Raises ValueError unless the value is an integer of at least `least`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least
    require(bool(whole), f"{name}={value!r} must be a whole number, at least {least}.")


def check_number(name: str, value: float, *, positive: bool = True) -> None:
    """Raises ValueError unless the value is a finite number, by default above 0."""
    known = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
    number = float(value) if known else math.nan
    fits = math.isfinite(number) and (number > 0 or not positive)
    require(fits, f"{name}={value!r} must be {'positive and ' if positive else ''}finite.")


@dataclass(frozen=True)
class Rules:
    """Restrictions of the next token, by the names of transformers' `generate`; the defaults
    restrict nothing.

    Attributes:
        eos_token_id: tokens that end a row.
        repetition_penalty: for tokens that the text already has, positive scores are divided by it
            and negative ones multiplied.
        no_repeat_ngram_size: runs of this many tokens occur only once.
        encoder_no_repeat_ngram_size: runs of this many tokens of the encoder do not occur.
        bad_words_ids: runs of tokens that never occur.
        min_length, min_new_tokens: no row ends before this many tokens, with and without the
            prompt.
        forced_eos_token_id: the last token of a row that reaches its limit.
        suppress_tokens, begin_suppress_tokens: tokens that never occur; that do not occur directly
            after the prompt.

    Raises:
        ValueError: for a penalty that is not positive, sizes and lengths that are not whole numbers
            of at least 0, and an empty word.
    """

    eos_token_id: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        check_number("repetition_penalty", self.repetition_penalty)
        for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            check_whole(name, getattr(self, name), 0)
        for name in ("min_length", "min_new_tokens"):
            check_whole(name, getattr(self, name), 0)
        require(
            all(self.bad_words_ids),
            "bad_words_ids has an empty word; every word is one or more token ids.",
        )

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """All token ids of the rules, by the name of the rule."""
        names = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
        words = sum(self.bad_words_ids, ())
        return {name: getattr(self, name) for name in names} | {"bad_words_ids": words}


class Text(NamedTuple):
    """The generated texts with their prompts.

    Attributes:
        tokens: int32; entries from `length` on are free.
        length, start, limit: number of tokens of every row, of its prompt, and the largest number
            allowed.
        source, source_length: the encoder's tokens, and how many of them are not padding to a
            bucket.
        first: the second token of each row, if it is forced (forced_bos_token_id).
    """

    tokens: Int[Array, "B Beams Width"]
    length: Int[Array, ""]
    start: Int[Array, ""]
    limit: Int[Array, ""]
    source: Int[Array, "B S"] | None = None
    source_length: Int[Array, ""] | None = None
    first: Int[Array, "B"] | None = None

    def add(self, tokens: Int[Array, "B Beams"]) -> "Text":
        """Returns the text with one more token in each row."""
        new = tokens[..., None].astype(self.tokens.dtype)
        written = lax.dynamic_update_slice_in_dim(self.tokens, new, self.length, axis=2)
        return self._replace(tokens=written, length=self.length + 1)

    def tail(self, count: int) -> Int[Array, "B Beams Tail"]:
        """Returns the last `count` tokens; if there are fewer, the first one is repeated."""
        places = self.length - count + jnp.arange(count)
        return jnp.take(self.tokens, jnp.maximum(places, 0), axis=2)


TokenScores = Float[Array, "B Beams V"]


def apply_rules(rules: Rules, text: Text, scores: TokenScores) -> TokenScores:
    """Returns the scores of the next token after all rules."""
    ends, length = rules.eos_token_id, text.length
    scores = penalize(scores, text, rules.repetition_penalty)
    size = rules.no_repeat_ngram_size
    scores = ban_repeats(scores, text, text.tokens, length, size)
    if rules.encoder_no_repeat_ngram_size:
        assert text.source is not None and text.source_length is not None
        seen, size = text.source[:, None], rules.encoder_no_repeat_ngram_size
        scores = ban_repeats(scores, text, seen, text.source_length, size)
    words = [word for word in rules.bad_words_ids if word not in {(end,) for end in ends}]
    scores = ban_words(scores, text, words)
    if rules.min_length:
        scores = ban(scores, ends, length < rules.min_length)
    if rules.min_new_tokens:
        scores = ban(scores, ends, length - text.start < rules.min_new_tokens)
    if text.first is not None:
        scores = force(scores, jax.nn.one_hot(text.first, scores.shape[-1]) > 0, length == 1)
    if rules.forced_eos_token_id:
        forced = _among(rules.forced_eos_token_id, scores)
        scores = force(scores, forced[None], length == text.limit - 1)
    scores = ban(scores, rules.suppress_tokens, jnp.asarray(True))
    begin = text.start + ((text.start <= 1) if text.first is not None else 0)
    return ban(scores, rules.begin_suppress_tokens, length == begin)


def _among(tokens: tuple[int, ...], scores: TokenScores) -> Bool[np.ndarray, "V"]:
    return np.isin(np.arange(scores.shape[-1]), tokens)


def ban(scores: TokenScores, tokens: tuple[int, ...], when: Bool[Array, ""]) -> TokenScores:
    """Sets the scores of these tokens to -inf if `when` is True."""
    if not tokens:
        return scores
    return jnp.where(_among(tokens, scores)[None, None] & when, -jnp.inf, scores)


def force(
    scores: TokenScores, tokens: Bool[Array | np.ndarray, "#B V"], when: Bool[Array, ""]
) -> TokenScores:
    """Sets the scores of these tokens to 0 and of all others to -inf if `when` is True."""
    return jnp.where(when, jnp.where(tokens[:, None], 0.0, -jnp.inf), scores)


def penalize(scores: TokenScores, text: Text, penalty: float) -> TokenScores:
    """Lowers the scores of tokens that the text already has, those of the prompt included."""
    if penalty == 1:
        return scores
    vocabulary = scores.shape[-1]
    used = jnp.arange(text.tokens.shape[-1]) < text.length
    tokens = jnp.where(used[None, None], text.tokens, vocabulary)  # out of range: dropped below
    written = jax.vmap(jax.vmap(lambda t: jnp.zeros(vocabulary, bool).at[t].set(True, mode="drop")))
    less = jnp.where(scores < 0, scores * penalty, scores / penalty)
    return jnp.where(written(tokens), less, scores)


def ban_repeats(
    scores: TokenScores, text: Text, seen: Int[Array, "B _ S"], length: Int[Array, ""], size: int
) -> TokenScores:
    """Sets to -inf the tokens that would complete a run of `size` tokens that is among the first
    `length` tokens of `seen`."""
    places = seen.shape[-1] - size + 1
    if size == 0 or places < 1:
        return scores
    tail = text.tail(size - 1)
    again = (jnp.arange(places) + size <= length) & (text.length >= size - 1)
    again = jnp.broadcast_to(again[None, None], (*scores.shape[:2], places))
    for i in range(size - 1):
        again = again & (seen[..., i : i + places] == tail[..., i : i + 1])
    return _ban_at(scores, jnp.broadcast_to(seen[..., size - 1 :], again.shape), again)


def ban_words(scores: TokenScores, text: Text, words: list[tuple[int, ...]]) -> TokenScores:
    """Sets to -inf the tokens that would complete one of these runs. As in transformers, a run of n
    is only looked for after n tokens, not n - 1."""
    if not words:
        return scores
    longest = max(map(len, words)) - 1
    before = np.asarray([(-1,) * (longest + 1 - len(w)) + w[:-1] for w in words], np.int32)
    before = before.reshape(1, 1, len(words), longest)  # -1 matches any token
    sizes, last = np.asarray([(len(w), w[-1]) for w in words]).T
    same = (text.tail(longest)[:, :, None] == before) | (before < 0)
    enough = (sizes == 1) | (sizes <= text.length)
    found = same.all(axis=-1) & enough[None, None]  # [B, Beams, words]
    return _ban_at(scores, jnp.broadcast_to(last[None, None], found.shape), found)


def _ban_at(
    scores: TokenScores, tokens: Int[Array, "B Beams Places"], where: Bool[Array, "B Beams Places"]
) -> TokenScores:
    lowered = jax.vmap(jax.vmap(lambda row, places, most: row.at[places].min(most)))
    return lowered(scores, tokens, jnp.where(where, -jnp.inf, jnp.inf).astype(scores.dtype))
