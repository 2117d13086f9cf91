"""Attention in plain XLA, whose results all other kernels reproduce: query blocks against windows
of keys under one softmax, with linear memory in both directions.

A query block sees some *windows* (runs of keys whose position depends on the block) and some
*shared* keys (the same for every block). Local, sparse and global attention are windows and shared
keys of one call; full attention has only shared keys. A scan goes over the blocks, a few at a time,
so that the scores stay in the cache; the backward pass recomputes them from the saved
log-normalisers.

Axes: B batch, N heads, H head width, T tokens (queries), S keys, J blocks of a step, Q queries of
a block, W keys of a block's windows. Features come before tokens everywhere, [B, N, H, T]: these
products measured up to 1.6 x faster on CPU than with tokens first.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lsg_flax.kernels import steps
from lsg_flax.kernels.device import device_kind
from lsg_flax.kernels.dropout import kept
from lsg_flax.kernels.spec import NEGATIVE, Biases, Queries, Source, Spec
from lsg_flax.kernels.steps import Operands, View

ATTENDED = "attended"  # the name of the results of `attend`, for `jax.checkpoint`

# Bytes of the scores of one step on an accelerator. On TPU they then stay on the chip: with 2**28
# the compiler's own numbers for two layers, 4 rows of 4,096 tokens on v5e were twice the traffic
# and 0.7 GiB more.
STEP_BYTES, TPU_STEP_BYTES = 2**28, 2**25


def attend(
    spec: Spec,
    queries: Queries,
    sources: tuple[Source, ...],
    shared: Source | None,
    biases: Biases,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """See `lsg_flax.kernels.attend`."""
    length = queries.features.shape[-1]
    spec = with_steps(spec, queries.features, shared)
    biases = jax.tree.map(lambda x: x.astype(jnp.float32), biases)
    operands = Operands(queries, sources, shared, biases)
    results: Any = _attend(*steps.fill_up(spec, operands), key)
    context, normaliser = results
    return context[..., :length], steps.from_steps(normaliser)[..., :length]


def with_steps(spec: Spec, query: Float[Array, "B N H T"], shared: Source | None) -> Spec:
    """Returns the spec with its blocks per step, chosen by the device if they are 0."""
    blocks = -(-query.shape[-1] // spec.block)
    count = spec.blocks_per_step or _blocks_per_step(query, shared, spec, blocks)
    return replace(spec, blocks_per_step=-(-blocks // -(-blocks // count)))


def _blocks_per_step(query, shared: Source | None, spec: Spec, blocks: int) -> int:
    """One block on CPU, so that its scores stay in the cache; elsewhere as many as keep a step's
    scores within STEP_BYTES or TPU_STEP_BYTES on each device."""
    kind, mesh = device_kind(), jax.sharding.get_abstract_mesh()
    if kind == "cpu":
        return 1
    step_bytes = TPU_STEP_BYTES if "tpu" in kind else STEP_BYTES
    keys = sum(w.width for w in spec.windows) + (0 if shared is None else shared.key.shape[-1])
    one_block = 4 * query.shape[0] * query.shape[1] * spec.block * keys
    devices = math.prod(mesh.shape[axis] for axis in mesh.auto_axes)  # rows and heads are sharded
    return max(1, min(blocks, step_bytes * devices // one_block))


def _product(equation: str, x: Array, y: Array) -> Float[Array, "B N #J _ _"]:
    """Returns products over [B, N, J], accumulated in float32; J = 1 (shared keys) broadcasts."""
    x_letters, rest = equation.split(",")
    y_letters, out = rest.split("->")
    x_c, y_c = ("" if a.shape[2] == 1 else "c" for a in (x, y))
    c = x_c or y_c
    x, y = (a[:, :, 0] if not k else a for a, k in ((x, x_c), (y, y_c)))
    equation = f"bn{x_c}{x_letters},bn{y_c}{y_letters}->bn{c}{out}"
    result = jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
    return result if c else result[:, :, None]


def _scores(query: Float[Array, "B N J H Q"], view: View) -> Float[Array, "B N J Q W"]:
    scores = _product("hq,hk->qk", query, view.key)
    scores = scores if view.bias is None else scores + view.bias
    return jnp.where(view.mask, scores, NEGATIVE)


def _kept(dropout_key, step, index: int, shape: tuple[int, ...], rate: float):
    """Returns dropout's factor for view `index` of a step; the same in the backward pass."""
    return kept(view_key(dropout_key, step, index), shape, rate)


def view_key(
    dropout_key: PRNGKeyArray, step: Int[Array, ""], index: Int[Array, ""] | int
) -> PRNGKeyArray:
    """Returns the random key of dropout for view `index` of a step."""
    return jax.random.fold_in(jax.random.fold_in(dropout_key, step), index)


def _forward(spec: Spec, operands: Operands, dropout_key):
    """Returns the context, and the log-normaliser of each step along a leading axis."""

    def one_step(_, inputs):
        step, queries = inputs
        query, views = queries.features, steps.views(step, queries, operands, spec)
        scores = [_scores(query, view) for view in views]
        # Half the minimum: exp(NEGATIVE - top) is then 0 in a fully masked row too.
        top = jnp.maximum(jnp.stack([s.max(axis=-1) for s in scores]).max(axis=0), NEGATIVE / 2)
        weights = [jnp.exp(s - top[..., None]) for s in scores]
        total = jnp.maximum(
            sum(w.sum(axis=-1) for w in weights), jnp.finfo(jnp.float32).tiny
        )  # [B, N, J, Q]
        if spec.dropout_rate:
            weights = [
                w * _kept(dropout_key, step, i, w.shape, spec.dropout_rate)
                for i, w in enumerate(weights)
            ]
        context = sum(
            _product("hk,qk->hq", view.value, w.astype(view.value.dtype))
            for w, view in zip(weights, views, strict=True)
        )
        context = (context / total[..., None, :]).astype(query.dtype)
        return None, (context, top + jnp.log(total))

    context, normaliser = lax.scan(one_step, None, steps.numbered(operands.queries, spec))[1]
    return steps.from_steps(context), normaliser


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: Spec, operands: Operands, dropout_key):
    return _forward(spec, operands, dropout_key)


def _attend_forward(spec: Spec, operands: Operands, dropout_key):
    # Named, so that `jax.checkpoint` can recompute the operands without computing these again.
    results = checkpoint_name(_forward(spec, operands, dropout_key), ATTENDED)
    return results, (operands, dropout_key, *results)


def _attend_backward(spec: Spec, saved, gradients):
    operands, dropout_key, context, normaliser = saved
    gradient, of_normaliser = gradients

    def one_step(totals: Operands, inputs):
        (step, queries), context, gradient, normaliser, of_normaliser = inputs
        query: Array = queries.features
        delta = (gradient.astype(jnp.float32) * context.astype(jnp.float32)).sum(axis=-2)
        delta = (delta - of_normaliser)[..., None]  # [B, N, J, Q, 1]
        query_gradients, view_gradients = [], []
        for i, view in enumerate(steps.views(step, queries, operands, spec)):
            scores = _scores(query, view)
            weights = jnp.exp(scores - normaliser[..., None])  # [B, N, J, Q, W]; 0 where masked
            weight_gradient = _product("hq,hk->qk", gradient, view.value)
            dropped = weights
            if spec.dropout_rate:
                factor = _kept(dropout_key, step, i, weights.shape, spec.dropout_rate)
                dropped, weight_gradient = weights * factor, weight_gradient * factor
            exact = weights * (weight_gradient - delta)
            score_gradient = exact.astype(query.dtype)
            query_gradients.append(_product("hk,qk->hq", view.key, score_gradient))
            key_gradient = _product("hq,qk->hk", query, score_gradient)
            value_gradient = _product("hq,qk->hk", gradient, dropped.astype(gradient.dtype))
            view_gradients.append(View(key_gradient, value_gradient, view.mask, exact))
        query_gradient = sum(query_gradients[1:], query_gradients[0]).astype(query.dtype)
        return steps.add_gradients(totals, view_gradients, step, spec), query_gradient

    inputs = (steps.to_steps(x, spec) for x in (context, gradient))
    inputs = (steps.numbered(operands.queries, spec), *inputs, normaliser, of_normaliser)
    summed = operands.summed()
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), summed)
    totals, query_gradient = lax.scan(one_step, zeros, inputs)
    totals = jax.tree.map(lambda total, x: total.astype(x.dtype), totals, summed)
    return totals._replace(queries=Queries(steps.from_steps(query_gradient))), None


_attend.defvjp(_attend_forward, _attend_backward)
