"""Beam search and beam sampling: one step of the search, and the choice of texts at the end.

Results are those of transformers 4.37.2, ties included: of equal candidates the one of the earlier
beam comes first, then the one with the lower token; of equal finished texts the oldest is dropped
first, and the newest is the best.

Axes: B batch, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax.checks import require
from lsg_flax.generation.rules import Rules, Text, apply_rules, check_number, check_whole
from lsg_flax.generation.sampling import Sample, top_k, warp


@dataclass(frozen=True)
class Beams:
    """The settings of beam search, or with `sample` of beam sampling, as transformers'
    `beam_search` and `beam_sample` with its BeamSearchScorer.

    Attributes:
        count: number of beams per row.
        length_penalty: a text's score is divided by its number of new tokens to this power.
        early_stopping: when a row ends: with True as soon as `count` texts have ended; with False
            when no open text can become better at its present length; with "never" when none can
            become better at any length.
        sample: how candidates are drawn; None to take the best ones.

    Raises:
        ValueError: for fewer than 2 beams, a penalty that is not finite, or another
            `early_stopping`.
    """

    count: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    sample: Sample | None = None

    def __post_init__(self):
        check_whole("num_beams", self.count, 2)
        check_number("length_penalty", self.length_penalty, positive=False)
        require(
            isinstance(self.early_stopping, bool) or self.early_stopping == "never",
            f"early_stopping={self.early_stopping!r} must be True, False or 'never'.",
        )

    def divide(
        self, scores: Float[Array, "*B"], length: Int[Array, ""], width: int
    ) -> Float[Array, "*B"]:
        """Divides the scores of texts with `length` new tokens, at most `width`, by the length
        penalty.

        Raises:
            ValueError: if `width` to this power leaves the range of float32.
        """
        require(
            abs(self.length_penalty) * math.log(width + 1) < math.log(1e30),
            f"length_penalty={self.length_penalty} over- or underflows for {width} tokens; usual "
            "values are between -2 and 2.",
        )
        powers = np.maximum(np.arange(width + 1), 1) ** float(self.length_penalty)
        # With a single divisor XLA multiplies by its reciprocal, and equal quotients would differ.
        return scores / jnp.asarray(powers, jnp.float32)[jnp.full(scores.shape, length)]


class Kept(NamedTuple):
    """The best finished texts, without end tokens, unordered. `added` counts all texts that were
    ever added, those dropped since included; while it is less than the number of beams, the last
    slots are free."""

    tokens: Int[Array, "B Beams Width"]
    scores: Float[Array, "B Beams"]
    lengths: Int[Array, "B Beams"]
    ages: Int[Array, "B Beams"]  # which of the added ones it is
    added: Int[Array, "B"]

    def offer(
        self,
        text: Int[Array, "B Beams Width"],
        length: Int[Array, ""],
        scores: Float[Array, "B Beams"],
        valid: Bool[Array, "B Beams"],
    ) -> "Kept":
        """Adds the valid texts, one after the other: into a free slot, or instead of the worst text
        if that is worse."""
        batch, beams = scores.shape

        def one(heap, offered):
            kept, ages, source, added = heap
            score, fits, number = offered
            worst = kept.min(axis=1, keepdims=True)
            oldest = jnp.argmin(jnp.where(kept == worst, ages, jnp.iinfo(ages.dtype).max), axis=1)
            free = added < beams
            place = jnp.where(free, added, oldest)
            accepted = fits & (free | (score > worst[:, 0]))
            here = (jnp.arange(beams)[None] == place[:, None]) & accepted[:, None]
            kept = jnp.where(here, score[:, None], kept)
            ages = jnp.where(here, added[:, None], ages)
            source = jnp.where(here, beams + number, source)
            return (kept, ages, source, added + accepted), None

        source = jnp.broadcast_to(jnp.arange(beams)[None], (batch, beams))
        heap = (self.scores, self.ages, source, self.added)
        (kept, ages, source, added), _ = lax.scan(one, heap, (scores.T, valid.T, jnp.arange(beams)))
        lengths = jnp.broadcast_to(length, self.lengths.shape)
        return Kept(
            of_parents(jnp.concatenate([self.tokens, text], axis=1), source),
            kept,
            of_parents(jnp.concatenate([self.lengths, lengths], axis=1), source),
            ages,
            added,
        )

    def best(self, count: int) -> "Kept":
        """Returns the best `count` texts, best first."""
        order = jnp.lexsort((-self.ages, -self.scores), axis=1)[:, :count]
        tokens, scores, lengths, ages = (of_parents(x, order) for x in self[:-1])
        return Kept(tokens, scores, lengths, ages, self.added)


class BeamState(NamedTuple):
    """The state of beam search between steps, beside the texts."""

    scores: Float[Array, "B Beams"]  # summed log-probabilities
    parents: Int[Array, "B Beams"]  # the beam of the last step that each beam continues
    kept: Kept
    done: Bool[Array, "B"]

    @classmethod
    def first(cls, tokens: Int[Array, "B Beams Width"], beams: Beams) -> "BeamState":
        """The state after the prompts. All beams are equal then, so only one of them counts."""
        shape = tokens.shape[:2]
        none = jnp.zeros(shape, jnp.int32)
        behind = jnp.arange(shape[1]) > 0
        scores = jnp.where(behind & (beams.sample is None), -1e9, 0.0)
        worst = jnp.full(shape, -jnp.inf, jnp.float32)
        kept = Kept(tokens, worst, none, none, jnp.zeros(shape[0], jnp.int32))
        scores = jnp.broadcast_to(scores.astype(jnp.float32)[None], shape)
        return cls(scores, none, kept, jnp.zeros(shape[0], bool))


def of_parents(x: Array, parents: Int[Array, "B Beams"]) -> Array:
    """Selects from [B, Beams, ...], for each beam, its parent in the same row. Nothing moves
    between rows, so that no device needs data of another."""
    return jax.vmap(lambda row, places: row[places])(x, parents)


def search_step(
    beams: Beams,
    rules: Rules,
    pad: int,
    state: BeamState,
    text: Text,
    logits: Float[Array, "B Beams V"],
    key: PRNGKeyArray,
) -> tuple[BeamState, Text]:
    """Adds one token to each beam: the best open candidates continue, and those that end are added
    to the finished texts. Rows that are done do not change."""
    ends = jnp.asarray(rules.eos_token_id, jnp.int32)
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    scores = apply_rules(rules, text, scores)
    at_least = max(2, 1 + len(ends))  # candidates per beam, so that enough of them do not end
    if beams.sample is not None:
        scores = warp(scores, beams.sample, keep=at_least)
    scores = scores + state.scores[..., None]
    scores, parents, tokens = _candidates(scores, at_least * beams.count, beams.sample, key)
    ending = jnp.isin(tokens, ends)  # [B, candidates]
    width = text.tokens.shape[-1]
    divided = beams.divide(scores, text.length + 1 - text.start, width)
    first = slice(0, beams.count)
    valid = ending[:, first] & ~state.done[:, None]
    ended = of_parents(text.tokens, parents[:, first])
    kept = state.kept.offer(ended, text.length, divided[:, first], valid)
    best = divided[:, 0]
    if beams.early_stopping == "never" and beams.length_penalty > 0:
        best = beams.divide(scores[:, 0], text.limit - text.start, width)
    enough = (kept.scores.min(axis=1) >= best) | (beams.early_stopping is True)
    done = state.done | (enough & (kept.added >= beams.count))
    going = jnp.argsort(ending, axis=1, stable=True)[:, first]
    parents, tokens, scores = (of_parents(x, going) for x in (parents, tokens, scores))
    tokens = jnp.where(state.done[:, None], pad, tokens)
    text = text._replace(tokens=of_parents(text.tokens, parents)).add(tokens)
    return BeamState(scores, parents, kept, done), text


def _candidates(
    scores: Float[Array, "B Beams V"], count: int, sample: Sample | None, key: PRNGKeyArray
) -> tuple[Float[Array, "B Count"], Int[Array, "B Count"], Int[Array, "B Count"]]:
    """Returns scores, beams and tokens of the best (or drawn) candidates, best first."""
    vocabulary = scores.shape[-1]
    flat = scores.reshape(len(scores), -1)
    if sample is None:
        found, places = highest(flat, count)
    else:  # the highest sums with Gumbel noise are draws without repetition
        places = highest(flat + jax.random.gumbel(key, flat.shape), count)[1]
        found, order = top_k(of_parents(flat, places), count)
        places = of_parents(places, order)
    return found, places // vocabulary, places % vocabulary


def highest(
    scores: Float[Array, "B _"], count: int, run: int = 128
) -> tuple[Float[Array, "B Count"], Int[Array, "B Count"]]:
    """`top_k` in two stages: over the maxima of runs of entries, then within the best runs. This
    way a vocabulary that is sharded over devices is not gathered."""
    batch, places = scores.shape
    if places <= run * count:
        return top_k(scores, count)
    filled = jnp.pad(scores, ((0, 0), (0, -places % run)), constant_values=-jnp.inf)
    runs = filled.reshape(batch, -1, run)
    numbers = jnp.sort(top_k(runs.max(axis=-1), count)[1], axis=1)  # so equal ones keep order
    found, inside = top_k(of_parents(runs, numbers).reshape(batch, -1), count)
    return found, of_parents(numbers, inside // run) * run + inside % run


def finish(beams: Beams, state: BeamState, text: Text, count: int) -> Kept:
    """Returns the best `count` texts of each row; open texts count for rows that are not done."""
    divided = beams.divide(state.scores, text.length - text.start, text.tokens.shape[-1])
    valid = jnp.broadcast_to(~state.done[:, None], divided.shape)
    return state.kept.offer(text.tokens, text.length, divided, valid).best(count)
