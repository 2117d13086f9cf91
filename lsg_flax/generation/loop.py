"""The loop of text generation: reads the prompt in one call, then generates one token at a time, in
one compiled program, or with a program per step if each token is shown at once.

Axes: B batch, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax.generation.beam import Beams, BeamState, finish, search_step
from lsg_flax.generation.rules import Rules, Text, apply_rules
from lsg_flax.generation.sampling import Greedy, Sample, pick
from lsg_flax.generation.steps import Decoder, Prompt

Picker = Greedy | Sample | Beams


@dataclass(frozen=True)
class Decoding:
    """The settings of decoding that are static in the program.

    Attributes:
        picker: how the next token is chosen.
        rules: restrictions of the next token.
        returned: number of texts returned per row.
        pad: the token that follows a row that has ended.
    """

    picker: Picker
    rules: Rules
    returned: int = 1
    pad: int = 0

    @property
    def beams(self) -> int:
        """The number of texts that are generated per row at once."""
        return self.picker.count if isinstance(self.picker, Beams) else self.returned


class Progress(NamedTuple):
    """The state of the loop between steps."""

    state: Any  # the decoder's
    text: Text
    ended: Bool[Array, "B Beams"]
    broken: Bool[Array, "B Beams"]  # a token was chosen although its score was NaN
    key: PRNGKeyArray
    search: BeamState | None


class Texts(NamedTuple):
    """Texts with their prompts, and their lengths. Texts of beam search have no end token, and have
    scores. A row is broken if the model gave NaN for it."""

    tokens: Int[Array, "B Returned Width"]
    lengths: Int[Array, "B Returned"]
    scores: Float[Array, "B Returned"] | None
    broken: Bool[Array, "B"]


def begin(
    decoder: Decoder[Any], prompt: Prompt, text: Text, key: PRNGKeyArray, how: Decoding
) -> Progress:
    """Reads the prompts, which are also in `text`, and writes the first token."""
    batch, beams, width = text.tokens.shape
    filled = next(prompt[n] for n in ("decoder_input_ids", "input_ids") if n in prompt).shape[1]
    logits, state = decoder.start(prompt, max(filled, width - 1), beams)  # the last is not fed
    search = None
    if isinstance(how.picker, Beams):
        search = BeamState.first(text.tokens, how.picker)
    none = jnp.zeros((batch, beams), bool)
    progress = Progress(state, text, none, none, key, search)
    return _write(
        progress, jnp.broadcast_to(logits[:, None], (batch, beams, logits.shape[-1])), how
    )


def proceed(decoder: Decoder[Any], progress: Progress, how: Decoding) -> Progress:
    """Writes one more token."""
    state, text = progress.state, progress.text
    if progress.search is not None:
        state = decoder.take(state, progress.search.parents)
    last = lax.dynamic_index_in_dim(text.tokens, text.length - 1, axis=2, keepdims=False)
    logits, state = decoder.step(state, last)
    return _write(progress._replace(state=state), logits, how)


def goes_on(progress: Progress) -> Bool[Array, ""]:
    """Whether there is room for a token, and some row has not ended."""
    return (progress.text.length < progress.text.limit) & ~progress.ended.all()


def _write(progress: Progress, logits: Float[Array, "B Beams V"], how: Decoding) -> Progress:
    text, ended, ends = progress.text, progress.ended, how.rules.eos_token_id
    key, draw = jax.random.split(progress.key)
    if isinstance(how.picker, Beams):
        assert progress.search is not None
        search, text = search_step(
            how.picker, how.rules, how.pad, progress.search, text, logits, draw
        )
        ended = jnp.broadcast_to(search.done[:, None], ended.shape)
        broken = progress.broken | (jnp.isnan(search.scores) & ~progress.ended)
        return Progress(progress.state, text, ended, broken, key, search)
    scores = apply_rules(how.rules, text, logits.astype(jnp.float32))
    tokens = pick(scores, how.picker, draw).astype(text.tokens.dtype)
    # A NaN among the scores is always chosen: it counts as the highest.
    nan = jnp.isnan(jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0])
    broken = progress.broken | (nan & ~ended)
    tokens = jnp.where(ended, how.pad, tokens) if ends else tokens
    ended = ended | jnp.isin(tokens, jnp.asarray(ends, tokens.dtype))
    return Progress(progress.state, text.add(tokens), ended, broken, key, None)


@partial(jax.jit, static_argnames="how")
def decode(
    decoder: Decoder[Any], prompt: Prompt, text: Text, key: PRNGKeyArray, *, how: Decoding
) -> Texts:
    """Generates until all rows have ended or reached the limit; returns the texts."""
    first = begin(decoder, prompt, text, key, how)
    last = lax.while_loop(goes_on, lambda progress: proceed(decoder, progress, how), first)
    return _close(last, how)


def _close(last: Progress, how: Decoding) -> Texts:
    text, broken = last.text, last.broken.any(axis=1)
    if isinstance(how.picker, Beams):
        assert last.search is not None
        best = finish(how.picker, last.search, text, how.returned)
        return Texts(best.tokens, best.lengths, best.scores, broken)
    return Texts(text.tokens, jnp.broadcast_to(text.length, text.tokens.shape[:2]), None, broken)


_begin = jax.jit(begin, static_argnames="how")
_proceed = jax.jit(proceed, static_argnames="how")


def decode_shown(
    decoder: Decoder[Any],
    prompt: Prompt,
    text: Text,
    key: PRNGKeyArray,
    *,
    how: Decoding,
    show: Callable[[int], object],
) -> Texts:
    """`decode` for one text; calls `show` with every new token as soon as it is computed."""
    progress = _begin(decoder, prompt, text, key, how=how)
    while True:
        show(int(progress.text.tokens[0, 0, progress.text.length - 1]))
        if not goes_on(progress):
            return _close(progress, how)
        progress = _proceed(decoder, progress, how=how)
