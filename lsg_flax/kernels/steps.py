"""The steps of a call, of a few blocks each: splits its arrays into steps, selects the keys, masks
and biases of a step, and sums their gradients.

Axes: B batch, N heads, H head width, T tokens (queries), S keys, J blocks of a step, Q queries of
a block, W keys of a block's windows.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from lsg_flax.kernels.spec import EVERYTHING, Biases, Queries, Source, Spec, Window
from lsg_flax.kernels.windows import add_to_windows, cut_window, cut_windows, pad


class Operands(NamedTuple):
    """The arrays of a call."""

    queries: Queries
    sources: tuple[Source, ...]
    shared: Source | None
    biases: Biases

    def summed(self) -> "Operands":
        """Returns the arrays whose gradients are summed over steps: all floats but the queries."""
        none: Any = None
        sources, shared = jax.tree.map(
            lambda s: Source(s.key, s.value, none),
            (self.sources, self.shared),
            is_leaf=lambda x: isinstance(x, Source),
        )
        return Operands(none, sources, shared, self.biases)


class View(NamedTuple):
    """Keys that a step's queries see, with one mask; J is 1 for the shared keys."""

    key: Float[Array, "B N #J H W"]
    value: Float[Array, "B N #J H W"]
    mask: Bool[Array, "B #N #J #Q W"]
    bias: Float[Array, "#B #N 1 #Q W"] | None


def fill_up(spec: Spec, operands: Operands) -> tuple[Spec, Operands]:
    """Pads the operands to whole steps and to all keys that windows cover beyond the ends of their
    sources; returns them, and the settings with the new offsets of windows."""
    length = operands.queries.features.shape[-1]
    blocks = -(-length // (spec.block * spec.blocks_per_step)) * spec.blocks_per_step
    sources, windows = list(operands.sources), list(spec.windows)
    for i, source in enumerate(sources):
        own = [w for w in spec.windows if w.source == i]
        before = max([0, *(-w.offset for w in own)])
        end = max(w.offset + (blocks - 1) * w.stride + w.width for w in own)
        after = max(end - source.mask.shape[-1], 0)
        sources[i] = jax.tree.map(lambda x, b=before, a=after: pad(x, b, a), source)
        for j, w in enumerate(spec.windows):
            if w.source == i:
                windows[j] = replace(w, offset=w.offset + before, lead=w.lead + before)
    queries = jax.tree.map(lambda x: pad(x, 0, blocks * spec.block - length), operands.queries)
    operands = operands._replace(queries=queries, sources=tuple(sources))
    return replace(spec, windows=tuple(windows)), operands


def to_steps(x: Shaped[Array, "B N *H T"], spec: Spec) -> Shaped[Array, "steps B N J *H Q"]:
    """Splits the last axis into steps, blocks and queries."""
    split = x.reshape(*x.shape[:-1], -1, spec.blocks_per_step, spec.block)
    return jnp.moveaxis(split, (-3, -2), (0, 3))  # from [B, N, *H, steps, J, Q]


def from_steps(x: Shaped[Array, "steps B N J *H Q"]) -> Shaped[Array, "B N *H T"]:
    """Undoes `to_steps`."""
    merged = jnp.moveaxis(x, (0, 3), (-3, -2))  # [B, N, *H, steps, J, Q]
    return merged.reshape(*merged.shape[:-3], -1)


def numbered(queries: Queries, spec: Spec) -> tuple[Int[Array, "steps"], Queries]:
    """Returns the numbers and queries of all steps, along a leading axis."""
    queries = jax.tree.map(lambda x: to_steps(x, spec), queries)
    if spec.one_segment and queries.segments is not None:
        queries = queries._replace(segments=queries.segments[..., :1])
    return jnp.arange(queries.features.shape[0]), queries


def views(step: Int[Array, ""], queries: Queries, operands: Operands, spec: Spec) -> list[View]:
    """Returns the views of a step from `numbered`: its windows, and the shared keys."""
    seen, sources, shared = [], operands.sources, operands.shared
    biases = view_biases(operands.biases, spec)
    if spec.windows:
        key = cut_windows(tuple(s.key for s in sources), step, spec)
        value = cut_windows(tuple(s.value for s in sources), step, spec)
        masks = [_window_mask(w, sources[w.source], step, queries, spec) for w in spec.windows]
        seen.append(View(key, value, _join(masks), biases[0]))
    if shared is not None:
        mask = _shared_mask(shared, step, queries, spec)
        seen.append(View(shared.key[:, :, None], shared.value[:, :, None], mask, biases[-1]))
    return seen


def _join(parts: list[Array]) -> Array:
    """Concatenates along the last axis, after broadcasting along the others."""
    lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in parts], axis=-1)


def view_biases(biases: Biases, spec: Spec) -> list[Float[Array, "#B #N 1 #Q W"] | None]:
    """Returns the biases of the windows and of the shared keys."""
    windows, shared = None, biases.shared
    if any(bias is not None for bias in biases.windows):
        pairs = zip(biases.windows, spec.windows, strict=True)
        parts = [jnp.zeros((1, 1, spec.block, w.width)) if b is None else b for b, w in pairs]
        windows = _join(parts)[:, :, None]
    return [windows, None if shared is None else shared[:, :, None, None]]


def _window_mask(
    window: Window, source: Source, step, queries: Queries, spec: Spec
) -> Bool[Array, "B #N J #Q W"]:
    mask = cut_window(source.mask, window, step, spec)[..., None, :]
    if queries.segments is not None and source.segments is not None:
        of_keys = cut_window(source.segments, window, step, spec)
        mask = mask & (queries.segments[..., None] == of_keys[..., None, :])
    if window.rule == EVERYTHING:
        return mask
    if queries.positions is not None and source.positions is not None:
        of_keys = cut_window(source.positions, window, step, spec)
        return mask & window.rule.allows(queries.positions[..., None], of_keys[..., None, :])
    # In NumPy, a constant of the program: rules on indices are the same for every block.
    query, key = np.arange(spec.block)[:, None], np.arange(window.width)[None]
    key = key + window.offset - window.lead
    return mask & window.rule.allows(query, key)[None, None, None]


def _shared_mask(shared: Source, step, queries: Queries, spec: Spec) -> Bool[Array, "B #N #J #Q S"]:
    mask = shared.mask[:, :, None, None]
    if queries.segments is not None and shared.segments is not None:
        mask = mask & (queries.segments[..., None] == shared.segments[:, :, None, None])
    if spec.shared_rule == EVERYTHING:
        return mask
    if queries.positions is not None and shared.positions is not None:
        query, key = queries.positions[..., None], shared.positions[:, :, None, None]
    else:
        shape = (1, 1, spec.blocks_per_step, spec.block, mask.shape[-1])
        number, row, key = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3, 4))
        query = (step * spec.blocks_per_step + number) * spec.block + row
    return mask & spec.shared_rule.allows(query, key)


def add_gradients(totals: Operands, gradients: list[View], step, spec: Spec) -> Operands:
    """Adds the gradients of a step's views to those of the arrays that the views came from; the
    gradient of a bias is that of the scores."""
    sources, shared, biases = totals[1:]
    if spec.windows:
        keys = add_to_windows(tuple(s.key for s in sources), gradients[0].key, step, spec)
        values = add_to_windows(tuple(s.value for s in sources), gradients[0].value, step, spec)
        pairs = zip(sources, keys, values, strict=True)
        sources = tuple(source._replace(key=k, value=v) for source, k, v in pairs)
    if shared is not None:
        key, value = (x.sum(axis=2) for x in gradients[-1][:2])
        shared = shared._replace(key=shared.key + key, value=shared.value + value)
    if jax.tree.leaves(biases):
        scores: list[Any] = [gradients[0].bias, gradients[-1].bias]

        def spread(biases):
            pairs = zip(view_biases(biases, spec), scores, strict=True)
            return [None if b is None else jnp.broadcast_to(b, x.shape) for b, x in pairs]

        like, transpose = jax.vjp(spread, biases)  # sums over the axes of broadcasting
        present = zip(scores, like, strict=True)
        (new,) = transpose([None if y is None else x for x, y in present])
        biases = jax.tree.map(jnp.add, biases, new)
    return Operands(totals.queries, sources, shared, biases)
