"""What the loop needs of a decoder, as a protocol, and a model that fulfils it.

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
    """A model as the loop sees it: a pytree whose leaves are parameters, and whose static part
    decides the program. Its state is a pytree of fixed shapes.

    Each row of a batch is written on by a number of beams, which share its prompt. What differs
    between the beams (the keys and values of their own tokens) is in the state once per beam; what
    does not (those of an encoder's states) is there once per row, the decoder folds the beams into
    its queries, and `take` does not touch it.
    """

    def start(self, prompt: Prompt, room: int, beams: int) -> tuple[Float[Array, "B V"], State]:
        """Reads prompts; gives the logits of the token behind them, and a state of this many equal
        beams for each, with room for this many tokens, those of the prompts included."""
        ...

    def step(
        self, state: State, tokens: Int[Array, "B Beams"]
    ) -> tuple[Float[Array, "B Beams V"], State]:
        """Reads one more token of every beam; gives the logits of the next, and the state."""
        ...

    def take(self, state: State, parents: Int[Array, "B Beams"]) -> State:
        """The state in which each beam goes on from the given one of its own row, 0 for the first;
        some are taken more than once perhaps, and others not at all."""
        ...


@runtime_checkable
class CausalModel(Protocol):
    """What `generate` needs of a model, as `lsg_flax.Model` has it for the task causal_lm: `apply`
    gives a cache, and `cache.take(parents)` what `Decoder.take` says. With `cache_length=0` it
    gives the same logits alone.

    An encoder-decoder has `has_two_stacks = True` besides. Its `apply` takes the encoder's inputs
    with `decoder_input_ids`, `decoder_attention_mask` and `cache_length`, and then
    `decoder_input_ids` with `cache`. It gives the logits of the last real token, [rows, 1, V], and
    a cache.

    A model with `rolls = True` writes on behind its last position: it then sees the last
    `max_length` tokens, at positions from 0 on.
    """

    @property
    def config(self) -> Any: ...
    @property
    def max_length(self) -> int: ...
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


def two_stacks(model: CausalModel) -> bool:
    """Whether the model writes with a decoder behind what it reads with an encoder."""
    return getattr(model, "has_two_stacks", False)


def rolls(model: CausalModel) -> bool:
    """Whether the model writes on behind its last position, by its last tokens."""
    return getattr(model, "rolls", False)


@flax.struct.dataclass
class ModelDecoder:
    """A model as a decoder, whose state is the model's cache: a causal one, or an encoder-decoder,
    which reads the encoder's inputs when it starts."""

    params: Mapping[str, Any]
    model: CausalModel = flax.struct.field(pytree_node=False)

    @property
    def tokens_name(self) -> str:
        """The model's name of what is written."""
        return "decoder_input_ids" if two_stacks(self.model) else "input_ids"

    def start(self, prompt: Prompt, room: int, beams: int) -> tuple[Float[Array, "B V"], Any]:
        logits, cache = self._read(prompt, cache_length=room)
        if beams > 1:
            cache = cache.take(jnp.zeros((len(logits), beams), jnp.int32))
        return logits, cache

    def step(
        self, state: Any, tokens: Int[Array, "B Beams"]
    ) -> tuple[Float[Array, "B Beams V"], Any]:
        logits, state = self._read({self.tokens_name: tokens.reshape(-1, 1)}, cache=state)
        return logits.reshape(*tokens.shape, -1), state

    def take(self, state: Any, parents: Int[Array, "B Beams"]) -> Any:
        return state.take(parents)

    def read(self, prompt: Prompt) -> Float[Array, "B V"]:
        """The logits of the token behind the prompts, of which nothing is kept."""
        return self._read(prompt, cache_length=0)[0]

    def _read(self, inputs: Prompt, **cache: Any) -> tuple[Float[Array, "Rows V"], Any]:
        output = self.model.apply({"params": self.params}, **inputs, **cache)
        return output.logits[:, 0], output.cache


class Rolling(NamedTuple):
    """A state with the last tokens, `limit` places; `mask` False for padding."""

    cache: Any
    ids: Int[Array, "Rows _"]
    mask: Bool[Array, "Rows _"]


@flax.struct.dataclass
class RollingDecoder:
    """A model that rolls, as a decoder of texts longer than its positions. Up to these it has a
    cache; from then on every token's position changes with each step, and with it all that is kept,
    so that each step reads the last tokens anew."""

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
    """A state with all tokens, and how many places are in use."""

    ids: Int[Array, "Rows _"]
    mask: Bool[Array, "Rows _"]
    length: Int[Array, ""]


@flax.struct.dataclass
class RereadingDecoder:
    """A causal model as a decoder that keeps nothing and reads all tokens anew in each step: for a
    model whose cache is an approximation, a Reformer."""

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
