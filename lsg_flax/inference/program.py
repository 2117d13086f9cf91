"""A model as a jitted program from a batch to selected outputs."""

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
    """Returns the outputs with these names, or all; raises ValueError for one that the task does
    not have."""
    output = vars(model.apply({"params": params}, **batch))
    given = [name for name, value in output.items() if value is not None]
    # Encoder states, as long as the bucket and the globals, are large and rarely needed.
    wanted = fields or tuple(name for name in given if name != "encoder_last_hidden_state")
    if not set(wanted) <= set(given):
        raise ValueError(
            f"fields={fields} are not all outputs of task={model.task!r}; it has "
            f"{', '.join(given)}."
        )
    return {name: output[name] for name in wanted}


@runtime_checkable
class Runnable(Protocol):
    """A program to which a `Predictor` passes batches; its outputs have a row for each row."""

    @property
    def compilations(self) -> int:
        """The number of compiled programs so far."""
        ...

    def start(self, params: Params, batch: dict[str, np.ndarray]) -> Outputs:
        """Starts a batch of arrays [B, ...] on the device; returns outputs [B, ...]."""
        ...


class Program:
    """The jitted model. Compilations are counted by tracing, which happens once for each."""

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
        """Starts a batch on the device; outputs are copied to the host as soon as they are
        ready."""
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
