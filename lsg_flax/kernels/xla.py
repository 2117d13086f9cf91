"""Attention kernels in plain XLA, their definition: query blocks against windows of keys, one joint
softmax, linear memory in both directions.

A query block sees some *windows* (runs of keys whose place depends on the block) and some *shared*
keys (the same for every block). Local, sparse and global attention are windows and shared keys of
one call; full attention is shared keys alone. A scan walks over the blocks, a few at a time, so
that the scores live in cache; the backward pass recomputes them from the saved log-normalisers.

Axes: B batch, N heads, H head width, T tokens, S keys of a source, C blocks per step, Q queries of
a block, W keys of a block's windows. Features come before tokens everywhere, [B, N, H, T]: these
products measured up to 1.6 x faster on CPU than with tokens first.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from lsg_flax.kernels.dropout import kept
from lsg_flax.kernels.spec import Source, Spec, Window

NEGATIVE = float(jnp.finfo(jnp.float32).min)
# Scores of one step on an accelerator. On TPU they then stay on the chip: with 2**28 the compiler's
# own numbers for two layers, 4 rows of 4,096 tokens on v5e were twice the traffic and 0.7 GiB more.
STEP_BYTES, TPU_STEP_BYTES = 2**28, 2**25


def attend(
    query: Float[Array, "B N H T"],
    sources: tuple[Source, ...],
    shared: Source | None,
    spec: Spec,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B N H T"]:
    """Softmax attention of every block of `query` (already scaled) to its windows and the shared
    keys.

    A query that sees nothing gets zeros and passes no gradient.
    """
    return attend_in_part(query, sources, shared, spec, dropout_key)[0]


def attend_in_part(
    query: Float[Array, "B N H T"],
    sources: tuple[Source, ...],
    shared: Source | None,
    spec: Spec,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """`attend`, and the logarithm of each query's sum of exp(score): with both, attention to other
    keys can be added."""
    length = query.shape[-1]
    blocks = -(-length // spec.block)
    steps = -(-blocks // (spec.blocks_per_step or _blocks_per_step(query, shared, spec, blocks)))
    spec = replace(spec, blocks_per_step=-(-blocks // steps))
    blocks = steps * spec.blocks_per_step
    left = [
        max([0, *(-w.offset for w in spec.windows if w.source == i)]) for i in range(len(sources))
    ]
    ends = [
        max(w.offset + (blocks - 1) * w.stride + w.width for w in spec.windows if w.source == i)
        for i in range(len(sources))
    ]
    sources = tuple(
        Source(*(pad(x, before, max(end - x.shape[-1], 0)) for x in source))
        for source, before, end in zip(sources, left, ends, strict=True)
    )
    spec = replace(
        spec, windows=tuple(replace(w, offset=w.offset + left[w.source]) for w in spec.windows)
    )
    query = pad(query, 0, blocks * spec.block - length)
    results: Any = _attend(spec, query, sources, shared, dropout_key)
    context, normaliser = results
    normaliser = jnp.moveaxis(normaliser, 0, 2).reshape(*query.shape[:2], -1)  # [B, N, T]
    return context[..., :length], normaliser[..., :length]


def _blocks_per_step(query, shared: Source | None, spec: Spec, blocks: int) -> int:
    """One on CPU, where the scores then stay in cache; elsewhere as many as keep a step's scores
    within STEP_BYTES or TPU_STEP_BYTES on each device.

    The device is that of the ambient mesh, where a program is compiled for another machine.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    kind = (jax.default_backend() if device is None else device.device_kind).lower()
    if kind == "cpu":
        return 1
    step_bytes = TPU_STEP_BYTES if "tpu" in kind else STEP_BYTES
    keys = sum(w.width for w in spec.windows) + (0 if shared is None else shared.key.shape[-1])
    one_block = 4 * query.shape[0] * query.shape[1] * spec.block * keys
    devices = math.prod(mesh.shape[axis] for axis in mesh.auto_axes)  # rows and heads are spread
    return max(1, min(blocks, step_bytes * devices // one_block))


def pad(x, before: int, after: int):
    """Zeros (False) in front of and behind the last axis."""
    return x if before == after == 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def _to_steps(x: Float[Array, "B N H T"], spec: Spec) -> Float[Array, "steps B N C H Q"]:
    split = x.reshape(*x.shape[:-1], -1, spec.blocks_per_step, spec.block)  # [B, N, H, steps, C, Q]
    return split.transpose(3, 0, 1, 4, 2, 5)


def _from_steps(x: Float[Array, "steps B N C H Q"]) -> Float[Array, "B N H T"]:
    merged = x.transpose(1, 2, 4, 0, 3, 5)  # [B, N, H, steps, C, Q]
    return merged.reshape(*merged.shape[:3], -1)


def _unfold(
    x: Shaped[Array, "B N *H S"], window: Window, count: int
) -> Shaped[Array, "B N C *H W"]:
    """The overlapping windows of `count` neighbouring blocks, from the run of keys that they cover;
    static slices only."""
    stride, width = window.stride, window.width
    if count == 1:
        return jnp.expand_dims(x, 2)
    parts = -(-width // stride)
    cells = pad(x, 0, (count - 1 + parts) * stride - x.shape[-1]).reshape(
        *x.shape[:-1], -1, stride
    )  # [B, N, *H, cells, stride]
    shifted = [cells[..., j : j + count, : min(stride, width - j * stride)] for j in range(parts)]
    return jnp.moveaxis(jnp.concatenate(shifted, axis=-1), -2, 2)


def _run(x, window: Window, step, count: int):
    """The run of keys that a step's `count` windows cover."""
    start = window.offset + step * count * window.stride
    return lax.dynamic_slice_in_dim(x, start, (count - 1) * window.stride + window.width, axis=-1)


def _unfold_all(runs, spec: Spec):
    """All windows of a step side by side: [B, N, C, H, W]. Linear, so the backward pass transposes
    it."""
    return jnp.concatenate(
        [_unfold(r, w, spec.blocks_per_step) for r, w in zip(runs, spec.windows, strict=True)],
        axis=-1,
    )


def _runs(sources: list, step, spec: Spec) -> list:
    return [_run(sources[w.source], w, step, spec.blocks_per_step) for w in spec.windows]


def _window_mask(sources: tuple[Source, ...], step, spec: Spec) -> Bool[Array, "B #N C #Q W"]:
    runs = _runs([s.mask for s in sources], step, spec)
    masks = [
        jnp.expand_dims(_unfold(m, w, spec.blocks_per_step), -2)
        for m, w in zip(runs, spec.windows, strict=True)
    ]
    for i, w in enumerate(spec.windows):
        if w.causal:
            masks[i] &= np.tri(spec.block, w.width, w.width - spec.block, dtype=bool)[
                None, None, None
            ]  # [1, 1, 1, Q, W]
    heads, rows = (max(m.shape[axis] for m in masks) for axis in (1, 3))
    return jnp.concatenate(
        [jnp.broadcast_to(m, (m.shape[0], heads, m.shape[2], rows, m.shape[4])) for m in masks],
        axis=-1,
    )


def _views(step, sources: tuple[Source, ...], shared: Source | None, spec: Spec):
    """The (key, value, mask) groups that the queries of a step see: their windows, and the shared
    keys."""
    views = []
    if spec.windows:
        key, value = (
            _unfold_all(_runs([getattr(s, name) for s in sources], step, spec), spec)
            for name in ("key", "value")
        )
        views.append((key, value, _window_mask(sources, step, spec)))
    if shared is not None:
        mask = shared.mask[:, :, None, None]  # [B, N, 1, 1, S]
        if spec.shared_causal:
            shape = (1, 1, spec.blocks_per_step, spec.block, mask.shape[-1])
            block, query, key = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3, 4))
            mask &= (
                key <= (step * spec.blocks_per_step + block) * spec.block + query
            )  # [B, N, C, Q, S]
        views.append((shared.key[:, :, None], shared.value[:, :, None], mask))
    return views


def _product(equation: str, x, y):
    """A product over [B, N, C] with float32 accumulation; C = 1 broadcasts (the shared keys)."""
    x_letters, rest = equation.split(",")
    y_letters, out = rest.split("->")
    x_c, y_c = ("" if a.shape[2] == 1 else "c" for a in (x, y))
    c = x_c or y_c
    x, y = (a[:, :, 0] if not k else a for a, k in ((x, x_c), (y, y_c)))
    result = jnp.einsum(
        f"bn{x_c}{x_letters},bn{y_c}{y_letters}->bn{c}{out}",
        x,
        y,
        preferred_element_type=jnp.float32,
    )
    return result if c else result[:, :, None]


def _scores(query, views):
    return [jnp.where(mask, _product("hq,hk->qk", query, key), NEGATIVE) for key, _, mask in views]


def _kept(dropout_key, step, index: int, shape, rate: float):
    """Dropout's factor for view `index` of a step; the backward pass repeats it."""
    return kept(jax.random.fold_in(jax.random.fold_in(dropout_key, step), index), shape, rate)


def _forward(spec: Spec, query, sources, shared, dropout_key):
    def one_step(_, inputs):
        step, query = inputs  # query [B, N, C, H, Q]
        views = _views(step, sources, shared, spec)
        scores = _scores(query, views)
        # Half the minimum: exp(NEGATIVE - top) is then 0 in a fully masked row too.
        top = jnp.maximum(jnp.stack([s.max(axis=-1) for s in scores]).max(axis=0), NEGATIVE / 2)[
            ..., None
        ]  # [B, N, C, Q, 1]
        weights = [jnp.exp(s - top) for s in scores]
        total = jnp.maximum(
            sum(w.sum(axis=-1) for w in weights), jnp.finfo(jnp.float32).tiny
        )  # [B, N, C, Q]
        if spec.dropout_rate:
            weights = [
                w * _kept(dropout_key, step, i, w.shape, spec.dropout_rate)
                for i, w in enumerate(weights)
            ]
        context = sum(
            _product("hk,qk->hq", value, w.astype(value.dtype))
            for w, (_, value, _) in zip(weights, views, strict=True)
        )
        return None, (
            (context / total[..., None, :]).astype(query.dtype),
            top[..., 0] + jnp.log(total),
        )

    steps = _to_steps(query, spec)
    _, (context, normaliser) = lax.scan(one_step, None, (jnp.arange(steps.shape[0]), steps))
    return context, normaliser


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: Spec, query, sources, shared, dropout_key):
    context, normaliser = _forward(spec, query, sources, shared, dropout_key)
    return _from_steps(context), normaliser


def _attend_forward(spec: Spec, query, sources, shared, dropout_key):
    context, normaliser = _forward(spec, query, sources, shared, dropout_key)
    context = _from_steps(context)
    return (context, normaliser), (query, sources, shared, dropout_key, context, normaliser)


def _attend_backward(spec: Spec, saved, gradients):
    query, sources, shared, dropout_key, context, normaliser = saved
    gradient, of_normaliser = gradients

    def one_step(totals, inputs):
        step, query, context, gradient, normaliser, of_normaliser = inputs
        views = _views(step, sources, shared, spec)
        delta = (gradient.astype(jnp.float32) * context.astype(jnp.float32)).sum(axis=-2)
        delta = (delta - of_normaliser)[..., None]  # [B, N, C, Q, 1]
        query_gradients, view_gradients = [], []
        for i, (scores, (key, value, _)) in enumerate(
            zip(_scores(query, views), views, strict=True)
        ):
            weights = jnp.exp(scores - normaliser[..., None])  # [B, N, C, Q, W]; 0 where masked
            weight_gradient = _product("hq,hk->qk", gradient, value)
            dropped = weights
            if spec.dropout_rate:
                factor = _kept(dropout_key, step, i, weights.shape, spec.dropout_rate)
                dropped, weight_gradient = weights * factor, weight_gradient * factor
            score_gradient = (weights * (weight_gradient - delta)).astype(query.dtype)
            query_gradients.append(_product("hk,qk->hq", key, score_gradient))
            key_gradient = _product("hq,qk->hk", query, score_gradient)
            value_gradient = _product("hq,qk->hk", gradient, dropped.astype(gradient.dtype))
            view_gradients.append((key_gradient, value_gradient))
        query_gradient = sum(query_gradients[1:], query_gradients[0]).astype(query.dtype)
        return _accumulate(totals, view_gradients, step, spec), query_gradient

    def zeros(x):
        return jnp.zeros(x.shape, jnp.float32)

    totals = (
        tuple((zeros(s.key), zeros(s.value)) for s in sources),
        None if shared is None else (zeros(shared.key), zeros(shared.value)),
    )
    steps = tuple(_to_steps(x, spec) for x in (query, context, gradient))
    (windowed, common), query_gradient = lax.scan(
        one_step, totals, (jnp.arange(steps[0].shape[0]), *steps, normaliser, of_normaliser)
    )

    def as_source(grads, source):
        return Source(grads[0].astype(source.key.dtype), grads[1].astype(source.value.dtype), None)  # type: ignore[arg-type]

    source_gradients = tuple(as_source(g, s) for g, s in zip(windowed, sources, strict=True))
    return (
        _from_steps(query_gradient),
        source_gradients,
        None if shared is None else as_source(common, shared),
        None,
    )


def _accumulate(totals, view_gradients, step, spec: Spec):
    """Adds the gradients of a step's views to the places in the sources that the views were taken
    from."""
    windowed, common = totals
    if spec.windows:
        windowed = [list(pair) for pair in windowed]
        for part, gradient in enumerate(view_gradients[0]):  # key, value
            runs = [
                _run(windowed[w.source][part], w, step, spec.blocks_per_step) for w in spec.windows
            ]
            run_gradients = jax.linear_transpose(lambda *r: _unfold_all(r, spec), *runs)(gradient)
            for w, run_gradient in zip(spec.windows, run_gradients, strict=True):
                total = windowed[w.source][part]
                start = w.offset + step * spec.blocks_per_step * w.stride
                updated = (
                    lax.dynamic_slice_in_dim(total, start, run_gradient.shape[-1], axis=-1)
                    + run_gradient
                )
                windowed[w.source][part] = lax.dynamic_update_slice_in_dim(
                    total, updated, start, axis=-1
                )
        windowed = tuple(tuple(pair) for pair in windowed)
    if common is not None:
        common = tuple(
            total + gradient.sum(axis=2)
            for total, gradient in zip(common, view_gradients[-1], strict=True)
        )
    return windowed, common


_attend.defvjp(_attend_forward, _attend_backward)
