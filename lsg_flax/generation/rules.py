"""Rules on the next token: pure functions that change its scores, in the order of transformers.

They see what is written as an array of fixed width, of which `length` places are in use, so that
one program serves every step. Greedy decoding and sampling apply them to logits, beam search to
log-probabilities, as transformers does.

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
    """Raises ValueError for anything but a whole number of at least `least`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least
    require(bool(whole), f"{name}={value!r} must be a whole number, at least {least}.")


def check_number(name: str, value: float, *, positive: bool = True) -> None:
    """Raises ValueError for anything but a finite number, by default above 0."""
    known = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
    number = float(value) if known else math.nan
    fits = math.isfinite(number) and (number > 0 or not positive)
    require(fits, f"{name}={value!r} must be {'positive and ' if positive else ''}finite.")


@dataclass(frozen=True)
class Rules:
    """What restricts the next token, by transformers' names; each default restricts nothing.

    Attributes:
        eos_token_id: what ends a row.
        repetition_penalty: divides the positive scores of tokens that are there, multiplies others.
        no_repeat_ngram_size, encoder_no_repeat_ngram_size: runs of so many tokens come once, or do
            not come at all where the encoder's tokens have them.
        bad_words_ids: runs of tokens that never come.
        min_length, min_new_tokens: before so many tokens (with, without the prompt) no row ends.
        forced_eos_token_id: the last token where a row reaches its limit.
        suppress_tokens, begin_suppress_tokens: never; not behind the prompt.
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
        """All token ids that are named, by the name of the rule."""
        names = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
        words = sum(self.bad_words_ids, ())
        return {name: getattr(self, name) for name in names} | {"bad_words_ids": words}


class Text(NamedTuple):
    """What is written, and what the rules count by.

    Attributes:
        tokens: int32; the places from `length` on are free.
        length, start, limit: tokens of every row, of which `start` are the prompt's, and the most
            that there may be.
        source, source_length: the encoder's tokens, of which so many are the caller's, and the
            others fill a bucket.
        first: the token that each row is forced to have behind a single one (forced_bos_token_id).
    """

    tokens: Int[Array, "B Beams Width"]
    length: Int[Array, ""]
    start: Int[Array, ""]
    limit: Int[Array, ""]
    source: Int[Array, "B S"] | None = None
    source_length: Int[Array, ""] | None = None
    first: Int[Array, "B"] | None = None

    def add(self, tokens: Int[Array, "B Beams"]) -> "Text":
        """The text with one more token in each row."""
        new = tokens[..., None].astype(self.tokens.dtype)
        written = lax.dynamic_update_slice_in_dim(self.tokens, new, self.length, axis=2)
        return self._replace(tokens=written, length=self.length + 1)

    def tail(self, count: int) -> Int[Array, "B Beams Tail"]:
        """The last `count` tokens; before the first one it is repeated."""
        places = self.length - count + jnp.arange(count)
        return jnp.take(self.tokens, jnp.maximum(places, 0), axis=2)


TokenScores = Float[Array, "B Beams V"]


def apply_rules(rules: Rules, text: Text, scores: TokenScores) -> TokenScores:
    """The scores of the next token under all rules."""
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
    """-inf for these tokens, when it is so."""
    if not tokens:
        return scores
    return jnp.where(_among(tokens, scores)[None, None] & when, -jnp.inf, scores)


def force(
    scores: TokenScores, tokens: Bool[Array | np.ndarray, "#B V"], when: Bool[Array, ""]
) -> TokenScores:
    """0 for these tokens and -inf for all others, when it is so."""
    return jnp.where(when, jnp.where(tokens[:, None], 0.0, -jnp.inf), scores)


def penalize(scores: TokenScores, text: Text, penalty: float) -> TokenScores:
    """TokenScores of tokens that are written, the prompt's included, made less."""
    if penalty == 1:
        return scores
    vocabulary = scores.shape[-1]
    used = jnp.arange(text.tokens.shape[-1]) < text.length
    tokens = jnp.where(used[None, None], text.tokens, vocabulary)  # those out of range are dropped
    written = jax.vmap(jax.vmap(lambda t: jnp.zeros(vocabulary, bool).at[t].set(True, mode="drop")))
    less = jnp.where(scores < 0, scores * penalty, scores / penalty)
    return jnp.where(written(tokens), less, scores)


def ban_repeats(
    scores: TokenScores, text: Text, seen: Int[Array, "B _ S"], length: Int[Array, ""], size: int
) -> TokenScores:
    """-inf for what would end a run of `size` tokens that is among the first `length` seen."""
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
    """-inf for what would end one of these runs of tokens. As in transformers a run of n needs n
    tokens before it is looked for, not n - 1."""
    if not words:
        return scores
    longest = max(map(len, words)) - 1
    before = np.asarray([(-1,) * (longest + 1 - len(w)) + w[:-1] for w in words], np.int32)
    before = before.reshape(1, 1, len(words), longest)  # -1 where anything may stand
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
