"""What the loop needs of a decoder, as a protocol, and a causal model that fulfils it.

Axes: B batch, T tokens of the prompt, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import flax.struct
from jaxtyping import Array, Float, Int

State = TypeVar("State")
Prompt = Mapping[str, Any]  # arrays by the model's names, `input_ids` [B, T] among them, or None


@runtime_checkable
class Decoder(Protocol[State]):
    """A model as the loop sees it: a pytree whose leaves are parameters, and whose static part
    decides the program. Its state is a pytree of fixed shapes."""

    def start(self, prompt: Prompt, room: int) -> tuple[Float[Array, "B V"], State]:
        """Reads prompts; gives the logits of the token behind them, and a state with room for this
        many tokens, those of the prompts included."""
        ...

    def step(self, state: State, tokens: Int[Array, "B"]) -> tuple[Float[Array, "B V"], State]:
        """Reads one more token of every row; gives the logits of the next, and the state."""
        ...

    def take(self, state: State, rows: Int[Array, "Rows"]) -> State:
        """The state of these rows, in this order and as often as they are named."""
        ...


@runtime_checkable
class CausalModel(Protocol):
    """What `generate` needs of a model, as `lsg_flax.Model` has it for the task causal_lm."""

    @property
    def config(self) -> Any: ...
    @property
    def max_length(self) -> int: ...
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


@flax.struct.dataclass
class ModelDecoder:
    """A causal model as a decoder, whose state is the model's cache."""

    params: Mapping[str, Any]
    model: CausalModel = flax.struct.field(pytree_node=False)

    def start(self, prompt: Prompt, room: int) -> tuple[Float[Array, "B V"], Any]:
        return self._read(prompt, cache_length=room)

    def step(self, state: Any, tokens: Int[Array, "B"]) -> tuple[Float[Array, "B V"], Any]:
        return self._read({"input_ids": tokens[:, None]}, cache=state)

    def take(self, state: Any, rows: Int[Array, "Rows"]) -> Any:
        return state.take(rows)

    def _read(self, inputs: Prompt, **cache: Any) -> tuple[Float[Array, "B V"], Any]:
        output = self.model.apply({"params": self.params}, **inputs, **cache)
        return output.logits[:, 0], output.cache
