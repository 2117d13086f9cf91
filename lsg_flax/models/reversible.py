"""Reversible layers with two residual streams: each half of a layer reads one stream and is added
to the other. The backward pass recomputes a layer's inputs from its outputs, so that the memory of
training does not grow with depth (arXiv 1707.04585).

Axes: B batch, T tokens, D model width, L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Streams = tuple[Float[Array, "B T D"], Float[Array, "B T D"]]


class HalfLayer(NamedTuple):
    """Half of a layer: a branch. Halves write to the first and to the second stream in turn.

    Attributes:
        stack, place: the stack of its layer's parameters, and their index among those that a group
            has of this stack.
        run: the branch: called with the parameters, the stream that it reads, the layer's draws,
            the arrays that all layers share, and what the branch kept in an earlier run (None the
            first time). It returns its output and what to keep.
    """

    stack: str
    place: int
    run: Callable[[Any, Array, Any, Any, Any], tuple[Array, Any]]


class LayerGroup(NamedTuple):
    """A group of half layers that is repeated with other parameters; for `unroll` and `keep_states`
    see `Encoder`."""

    halves: tuple[HalfLayer, ...]
    unroll: int = 1
    keep_states: bool = False


class LayerArrays(NamedTuple):
    """The arrays of all layers: `params` and `draws` are by stack, [groups, layers of the stack in
    a group, ...]; `shared` is the same for all. Only parameters have gradients."""

    params: Any
    draws: Any
    shared: Any

    def of(self, half: HalfLayer, stream: Array) -> tuple[Any, Array, Any, Any]:
        """Returns the arguments of a half layer, from the arrays of its group."""
        params, draws = jax.tree.map(
            lambda x: x[half.place], (self.params[half.stack], self.draws[half.stack])
        )
        return params, stream, draws, self.shared


def _scan(one: Callable, group: LayerGroup, arrays: LayerArrays, carry: Any, more: Any, **options):
    def step(carry, inputs):
        (params, draws), more = inputs
        return one(carry, LayerArrays(params, draws, arrays.shared), more)

    inputs = ((arrays.params, arrays.draws), more)
    return lax.scan(step, carry, inputs, unroll=group.unroll, **options)


def run_and_keep(group: LayerGroup, arrays: LayerArrays, streams: Streams, given: Any = None):
    """Returns the result of `run_layers`, and what the branches keep, stacked over the groups.
    `given` are the last arguments of the branches, stacked likewise. It has no hand-written
    backward pass."""

    def one(carry, arrays, given):
        streams, states, kept = list(carry), [], []
        for number, half in enumerate(group.halves):
            to = number % 2
            last = None if given is None else given[number]
            arguments: Any = (*arrays.of(half, streams[1 - to]), last)
            y, keep = half.run(*arguments)
            streams[to] = streams[to] + y
            kept.append(keep)
            states += [streams[1]] if to and group.keep_states else []
        return tuple(streams), (jnp.stack(states) if states else None, kept)

    streams, (states, kept) = _scan(one, group, arrays, streams, given)
    states = None if states is None else states.reshape(-1, *states.shape[2:])
    return (streams, states), kept


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_layers(
    group: LayerGroup, arrays: LayerArrays, streams: Streams
) -> tuple[Streams, Float[Array, "L B T D"] | None]:
    """Returns the streams after the last layer and, if asked for, the second stream after every
    layer. For the backward pass only the former, and what branches keep, are saved."""
    return run_and_keep(group, arrays, streams)[0]


def _forward(group, arrays, streams):
    (streams, states), kept = run_and_keep(group, arrays, streams)
    return (streams, states), (arrays, streams, kept)


def _backward(group, saved, gradients):
    arrays, streams, kept = saved
    of_streams, of_states = gradients
    if of_states is not None:
        of_states = of_states.reshape(-1, len(group.halves) // 2, *of_states.shape[1:])

    def one(carry, arrays, more):
        (streams, gradients), (kept, of_states) = map(list, carry), more
        of_params: dict[str, dict[int, Any]] = {}
        for number, half in reversed([*enumerate(group.halves)]):
            to = number % 2
            if to and of_states is not None:
                gradients[1] = gradients[1] + of_states[number // 2]
            params, stream, *others = arrays.of(half, streams[1 - to])
            run = lambda params, x: half.run(params, x, *others, kept[number])[0]  # noqa: B023, E731
            y, pull = jax.vjp(run, params, stream)
            streams[to] = streams[to] - y
            of_layer, of_stream = pull(gradients[to].astype(y.dtype))
            gradients[1 - to] = gradients[1 - to] + of_stream
            layers = of_params.setdefault(half.stack, {})
            if half.place in layers:
                of_layer = jax.tree.map(jnp.add, layers[half.place], of_layer)
            layers[half.place] = of_layer
        stacked = {
            stack: jax.tree.map(lambda *x: jnp.stack(x), *(layers[i] for i in sorted(layers)))
            for stack, layers in of_params.items()
        }
        return (tuple(streams), tuple(gradients)), stacked

    carry = (streams, of_streams)
    options = {"reverse": True}
    (_, of_streams), of_params = _scan(one, group, arrays, carry, (kept, of_states), **options)
    return LayerArrays(of_params, None, None), of_streams


run_layers.defvjp(_forward, _backward)
