"""The protocol of a decoder, which the generation loop uses, and its implementations by a model.

Axes: B batch, T tokens of the prompt, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

State = TypeVar("State")
Prompt = Mapping[str, Any]  # arrays by the model's names, `input_ids` [B, T] among them, or None


@runtime_checkable
class Decoder(Protocol[State]):
    """A model as the loop uses it: a pytree whose leaves are parameters and whose static part
    decides the program. Its state is a pytree of fixed shapes.

    Each row of a batch is continued by a number of beams, which share its prompt. The state has
    what differs between beams (keys and values of their own tokens) once per beam; what does not
    differ (keys and values of an encoder's states) it has once per row, where beams are further
    queries, and `take` does not change it.
    """

    def start(self, prompt: Prompt, room: int, beams: int) -> tuple[Float[Array, "B V"], State]:
        """Reads prompts; returns the logits of the next token, and a state with `beams` equal beams
        per prompt and room for `room` tokens, those of the prompts included."""
        ...

    def step(
        self, state: State, tokens: Int[Array, "B Beams"]
    ) -> tuple[Float[Array, "B Beams V"], State]:
        """Reads one more token of every beam; returns the logits of the next, and the state."""
        ...

    def take(self, state: State, parents: Int[Array, "B Beams"]) -> State:
        """Returns the state in which each beam continues the given beam of its own row, counted
        from 0; a beam may be continued several times, or not at all."""
        ...


@runtime_checkable
class CausalModel(Protocol):
    """What `generate` needs of a model, as `lsg_flax.Model` has it for the task causal_lm: `apply`
    returns a cache, whose `take(parents)` is that of `Decoder.take`. With `cache_length=0` it
    returns the same logits without a cache.

    An encoder-decoder also has `has_two_stacks = True`. Its `apply` takes the encoder's inputs with
    `decoder_input_ids`, `decoder_attention_mask` and `cache_length`, and later `decoder_input_ids`
    with `cache`. It returns the logits of the last real token, [rows, 1, V], and a cache.

    A model with `rolls = True` can generate beyond its last position: it then sees the last
    `max_length` tokens, at positions from 0 on.
    """

    @property
    def config(self) -> Any: ...
    @property
    def max_length(self) -> int: ...
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


def two_stacks(model: CausalModel) -> bool:
    """Whether the model has an encoder, which reads, and a decoder, which writes."""
    return getattr(model, "has_two_stacks", False)


def rolls(model: CausalModel) -> bool:
    """Whether the model can generate beyond its last position, from its last tokens."""
    return getattr(model, "rolls", False)


@flax.struct.dataclass
class ModelDecoder:
    """A decoder whose state is the cache of a model: a causal model, or an encoder-decoder, whose
    encoder runs at the start."""

    params: Mapping[str, Any]
    model: CausalModel = flax.struct.field(pytree_node=False)

    @property
    def tokens_name(self) -> str:
        """The model's name of the generated tokens."""
        return "decoder_input_ids" if two_stacks(self.model) else "input_ids"

    def start(self, prompt: Prompt, room: int, beams: int) -> tuple[Float[Array, "B V"], Any]:
        """See `Decoder.start`; the state is the model's cache."""
        logits, cache = self._read(prompt, cache_length=room)
        if beams > 1:
            cache = cache.take(jnp.zeros((len(logits), beams), jnp.int32))
        return logits, cache

    def step(
        self, state: Any, tokens: Int[Array, "B Beams"]
    ) -> tuple[Float[Array, "B Beams V"], Any]:
        """See `Decoder.step`."""
        logits, state = self._read({self.tokens_name: tokens.reshape(-1, 1)}, cache=state)
        return logits.reshape(*tokens.shape, -1), state

    def take(self, state: Any, parents: Int[Array, "B Beams"]) -> Any:
        """See `Decoder.take`."""
        return state.take(parents)

    def read(self, prompt: Prompt) -> Float[Array, "B V"]:
        """Returns the logits of the token after the prompts, without a cache."""
        return self._read(prompt, cache_length=0)[0]

    def _read(self, inputs: Prompt, **cache: Any) -> tuple[Float[Array, "Rows V"], Any]:
        output = self.model.apply({"params": self.params}, **inputs, **cache)
        return output.logits[:, 0], output.cache


class Rolling(NamedTuple):
    """A state with the last tokens, at most `max_length`; `mask` is False for padding."""

    cache: Any
    ids: Int[Array, "Rows _"]
    mask: Bool[Array, "Rows _"]


@flax.struct.dataclass
class RollingDecoder:
    """A decoder for texts longer than the positions of a model that rolls. Up to these it uses a
    cache; after that every token's position changes with each step, which invalidates the cache, so
    each step reads the last tokens again."""

    decoder: ModelDecoder

    def start(self, prompt: Prompt, room: int, beams: int) -> tuple[Float[Array, "B V"], Rolling]:
        limit = self.decoder.model.max_length
        ids, mask = (jnp.asarray(prompt[name]) for name in ("input_ids", "attention_mask"))
        logits, cache = self.decoder.start(prompt, limit, beams)
        ids, mask = (
            jnp.repeat(jnp.pad(x, ((0, 0), (0, limit - x.shape[1]))), beams, axis=0)
            for x in (ids.astype(jnp.int32), mask.astype(bool))
        )
        return logits, Rolling(cache, ids, mask)

    def step(
        self, state: Rolling, tokens: Int[Array, "B Beams"]
    ) -> tuple[Float[Array, "B Beams V"], Rolling]:
        cache, limit = state.cache, self.decoder.model.max_length
        full = cache.length >= limit
        place = jnp.minimum(cache.length, limit - 1)
        ids, mask = (
            jnp.where(full, jnp.roll(x, -1, axis=1), x).at[:, place].set(new)
            for x, new in ((state.ids, tokens.ravel().astype(jnp.int32)), (state.mask, True))
        )

        def read_anew():
            prompt = {"input_ids": ids, "attention_mask": mask}
            logits, _ = self.decoder.start(prompt, limit, 1)
            return logits.reshape(*tokens.shape, -1), cache

        logits, cache = lax.cond(full, read_anew, lambda: self.decoder.step(cache, tokens))
        return logits, Rolling(cache, ids, mask)

    def take(self, state: Rolling, parents: Int[Array, "B Beams"]) -> Rolling:
        cache = self.decoder.take(state.cache, parents)
        return Rolling(cache, _of_beams(state.ids, parents), _of_beams(state.mask, parents))


def _of_beams(x: Array, parents: Int[Array, "B Beams"]) -> Array:
    texts = x.reshape(*parents.shape, x.shape[-1])
    return jnp.take_along_axis(texts, parents[..., None], axis=1).reshape(x.shape)


class Reread(NamedTuple):
    """A state with all tokens, and their number."""

    ids: Int[Array, "Rows _"]
    mask: Bool[Array, "Rows _"]
    length: Int[Array, ""]


@flax.struct.dataclass
class RereadingDecoder:
    """A decoder without a cache, which reads all tokens again in each step; used for a Reformer,
    whose cache is an approximation."""

    decoder: ModelDecoder

    def start(self, prompt: Prompt, room: int, beams: int) -> tuple[Float[Array, "B V"], Reread]:
        ids, mask = (jnp.asarray(prompt[name]) for name in ("input_ids", "attention_mask"))
        logits = self.decoder.read(prompt)
        ends = jnp.where(mask.astype(bool), jnp.arange(1, mask.shape[1] + 1)[None], 0)
        ids, mask = (
            jnp.repeat(jnp.pad(x, ((0, 0), (0, room - x.shape[1]))), beams, axis=0)
            for x in (ids.astype(jnp.int32), mask.astype(bool))
        )
        return logits, Reread(ids, mask, jnp.max(ends))

    def step(
        self, state: Reread, tokens: Int[Array, "B Beams"]
    ) -> tuple[Float[Array, "B Beams V"], Reread]:
        ids = state.ids.at[:, state.length].set(tokens.ravel().astype(jnp.int32))
        state = Reread(ids, state.mask.at[:, state.length].set(True), state.length + 1)
        prompt = {"input_ids": state.ids, "attention_mask": state.mask}
        return self.decoder.read(prompt).reshape(*tokens.shape, -1), state

    def take(self, state: Reread, parents: Int[Array, "B Beams"]) -> Reread:
        ids, mask = (_of_beams(x, parents) for x in state[:2])
        return Reread(ids, mask, state.length)
