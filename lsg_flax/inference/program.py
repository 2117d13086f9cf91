"""A model as a jitted program from a batch to the outputs wanted, whatever their axes."""

import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from lsg_flax.models import Batch, Model, Params
from lsg_flax.progress import Compiled
from lsg_flax.sharding import shard_batch

Outputs = dict[str, jax.Array]
Select = Callable[[Outputs, Batch], Outputs]


def outputs_of(
    model: Model, params: Params, batch: Batch, fields: tuple[str, ...] | None
) -> Outputs:
    """The outputs of these names, or all; raises ValueError for one that the task does not have."""
    output = vars(model.apply({"params": params}, **batch))
    given = [name for name, value in output.items() if value is not None]
    # An encoder's states, as wide as the bucket and its globals, are large and rarely the answer.
    wanted = fields or tuple(name for name in given if name != "encoder_last_hidden_state")
    if not set(wanted) <= set(given):
        raise ValueError(
            f"fields={fields} are not all outputs of task={model.task!r}; it has "
            f"{', '.join(given)}."
        )
    return {name: output[name] for name in wanted}


@runtime_checkable
class Runnable(Protocol):
    """What a `Predictor` gives batches to, for outputs with a row for each of the batch's."""

    @property
    def compilations(self) -> int: ...
    def start(self, params: Params, batch: dict[str, np.ndarray]) -> Outputs: ...


class Program:
    """The jitted model; tracing happens once per compilation, which is how they are counted."""

    def __init__(
        self,
        model: Model,
        fields: tuple[str, ...] | None,
        select: Select | None,
        mesh: Mesh | None,
    ):
        self.compilations, self.mesh = 0, mesh
        self._compiled = Compiled()

        def apply(params: Params, batch: Batch) -> Outputs:
            self.compilations += 1
            chosen = outputs_of(model, params, batch, fields)
            return select(chosen, batch) if select else chosen

        self._apply = jax.jit(apply)

    def start(self, params: Params, batch: dict[str, np.ndarray]) -> Outputs:
        """Gives a batch to the device; the outputs come to the host as soon as they are there."""
        with self._compiled.call(batch):
            if self.mesh is None:
                outputs = self._apply(params, batch)
            else:
                with jax.set_mesh(self.mesh):
                    outputs = self._apply(params, shard_batch(batch, self.mesh))
        for value in outputs.values():
            value.copy_to_host_async()
        return outputs


# Predictors of equal models share their compilations.
program_of: Callable[..., Program] = functools.lru_cache(maxsize=16)(Program)
