"""Attention by fused kernels on GPUs: implements the engine's contract, windows of any sources and
shared keys under one softmax, without copying the windows.

Axes: B batch, N heads, H head width, T tokens (queries).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from lsg_flax.kernels import gpu_backward, gpu_forward, gpu_plan, spread, xla
from lsg_flax.kernels.dropout import seed_of
from lsg_flax.kernels.gpu_plan import TiledArrays, TiledPlan
from lsg_flax.kernels.spec import Biases, Queries, Source, Spec


def attend(
    spec: Spec,
    queries: Queries,
    sources: tuple[Source, ...],
    shared: Source | None,
    biases: Biases,
    key: PRNGKeyArray | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """Implements `lsg_flax.kernels.attend`. Dropout is the same as that of the XLA implementation.

    Args:
        interpret: whether to run the kernels without a GPU, slowly.

    Raises:
        ValueError: for a call that the kernels do not support.
    """
    every = sources if shared is None else (*sources, shared)
    refused = gpu_plan.refusal(queries, every, biases)
    if refused is not None:
        raise ValueError(f"implementation='pallas': {refused}")
    query = queries.features
    batch, heads, width, length = query.shape
    row_axes, head_axes = spread.axes_that_divide(spec.axes, batch, heads)
    spec = xla.with_steps(spec, query, shared)
    windows = gpu_plan.tiled_windows(spec, sources, shared)
    plan = TiledPlan(
        *(spec, windows, length, heads, width, query.dtype.name, row_axes, head_axes, interpret)
    )
    inputs = TiledArrays(
        rows=jnp.arange(batch, dtype=jnp.int32),
        heads=jnp.arange(heads, dtype=jnp.int32),
        seeds=None if key is None else _seeds(plan, key),
        query=_tokens_first(query),
        sources=tuple(
            Source(_tokens_first(s.key), _tokens_first(s.value), s.mask.astype(jnp.int8))
            for s in every
        ),
    )
    context, normaliser = _on_devices(plan, inputs)
    return context.transpose(0, 2, 3, 1), normaliser


def _tokens_first(x: Float[Array, "B N H S"]) -> Float[Array, "B S N H"]:
    """Transposes to tokens first, the layout of projections; XLA chooses that layout and moves
    nothing."""
    return x.transpose(0, 3, 1, 2)


def _seeds(plan: TiledPlan, key: PRNGKeyArray) -> UInt32[Array, "steps seeds"]:
    """Returns the seeds of dropout: two numbers for each part of the softmax."""
    steps = jnp.arange(-(-plan.blocks // plan.spec.blocks_per_step))
    views = jnp.arange(1 + max(seen.view for seen in plan.windows))

    def of_step(step):
        return jax.vmap(lambda view: seed_of(xla.view_key(key, step, view)))(views).reshape(-1)

    return jax.vmap(of_step)(steps)


def _on_devices(plan: TiledPlan, inputs: TiledArrays):
    """Runs the kernels on each device of the ambient mesh, for its own rows and heads."""
    rows, heads = plan.row_axes or None, plan.head_axes or None
    whole, per_head = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)

    def of_source(source: Source) -> Source:
        several = source.mask.shape[1] > 1
        return Source(whole, whole, per_head if several else PartitionSpec(rows))  # pyright: ignore

    specs = TiledArrays(
        rows=PartitionSpec(rows),
        heads=PartitionSpec(heads),
        seeds=None if inputs.seeds is None else PartitionSpec(),
        query=whole,
        sources=tuple(of_source(source) for source in inputs.sources),
    )
    return spread.on_devices(partial(_attend, plan), (specs,), (whole, per_head))(inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: TiledPlan, inputs: TiledArrays):
    return gpu_forward.forward(plan, inputs)


def _attend_forward(plan: TiledPlan, inputs: TiledArrays):
    results = checkpoint_name(gpu_forward.forward(plan, inputs), xla.ATTENDED)
    return results, (inputs, *results)


def _attend_backward(plan: TiledPlan, saved, gradients):
    inputs, context, normaliser = saved
    gradient, of_normaliser = gradients
    exact = gradient.astype(jnp.float32) * context.astype(jnp.float32)
    delta = exact.sum(axis=-1).swapaxes(1, 2) - of_normaliser  # [B, N, T]
    passed = gpu_backward.Saved(gradient, normaliser, delta)
    query, sources = gpu_backward.backward(plan, inputs, passed)
    none: Any = None
    return (TiledArrays(none, none, none, query, sources),)


_attend.defvjp(_attend_forward, _attend_backward)
