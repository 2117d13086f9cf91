"""LSG attention of arrays with features first, on one device or on a shard.

Axes: B batch, N heads, H head width, T tokens, S keys.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsg_flax.kernels import (
    EVERYTHING,
    PAST,
    FusedPlan,
    FusedSpec,
    Selecting,
    Source,
    Spec,
    Window,
    attend,
    attend_fused,
    merge_softmax_parts,
    plan_fused,
)
from lsg_flax.patterns import halo, sparsity
from lsg_flax.patterns.full import attend_to_all, scale
from lsg_flax.patterns.pattern import LSG, Runtime
from lsg_flax.patterns.representatives import (
    hide_global,
    pad_to_blocks,
    representatives_of,
    right_offset,
)
from lsg_flax.sharding import MESH_AXES


def attend_by_blocks(
    pattern: LSG, query: Float[Array, "B N H T"], source: Source, run: Runtime
) -> Float[Array, "B N H T"]:
    """The pattern's context, globals in front; up to two blocks that of full attention."""
    split, axis, run = pattern.split, run.sequence_axis, run.on_shard()
    short = axis is None and query.shape[-1] - split <= 2 * pattern.config.block_size
    if short:
        context, _ = attend_to_all(query, source, run, causal=pattern.causal)
    else:
        context = _token_rows(pattern, query, source, run)
    if pattern.causal:  # as in the reference, the outputs of prepended globals are raw queries
        own = context[..., split:] if short else context
        return jnp.concatenate([query[..., :split], own], axis=-1) if split else context
    rows = 0 if short else pattern.full_rows
    if rows:
        first = _full_rows(query[..., :rows], source, split, run)
        if not split:
            first = jnp.where(halo.is_first(axis), first, context[..., :rows])
        context = jnp.concatenate([first, context[..., rows - split :]], axis=-1)
    return context


def _full_rows(
    query: Float[Array, "B N H _"], source: Source, split: int, run: Runtime
) -> Float[Array, "B N H _"]:
    """Full attention of the globals: the `split` prepended ones, or the first token."""
    axis, run = run.sequence_axis, run.with_other_dropout()
    run = replace(run, implementation=None)  # few rows
    if axis is None:
        return attend_to_all(query, source, run)[0]
    if split:  # every shard has them: they are keys once
        is_key = (jnp.arange(source.mask.shape[-1]) >= split) | halo.is_first(axis)
        source = source._replace(mask=source.mask & is_key[None, None])
    first = query if split else halo.share_first(query, axis)
    return merge_softmax_parts(*attend_to_all(first, source, run), axis)[0]


def _token_rows(
    pattern: LSG, query: Float[Array, "B N H T"], source: Source, run: Runtime
) -> Float[Array, "B N H _"]:
    """The context of the tokens, without that of prepended globals."""
    config, split, axis = pattern.config, pattern.split, run.sequence_axis
    block = config.block_size
    shared = None
    if pattern.global_tokens != "none":
        shared = jax.tree.map(lambda x: x[..., : split or 1], source)
        if not split:  # the global is in the first shard
            shared = jax.tree.map(lambda x: halo.share_first(x, axis), shared)
    query, source = jax.tree.map(lambda x: x[..., split:], (query, source))
    length, plan = query.shape[-1], _fused_plan(pattern, query, shared, run)
    query, source = pad_to_blocks(config, query, source)
    local = hide_global(pattern, source, run)  # seen once, as the global
    if plan is not None:
        given = plan.selecting.kind == "given"
        chosen = representatives_of(pattern, query, source, run) if given else None
        if axis is not None:
            local = _with_neighbours(local, plan.before * block, pattern, axis)
        if axis is not None and chosen is not None:
            chosen = _with_neighbours(chosen, plan.before * config.sparse_step, pattern, axis)
        context = attend_fused(plan, query, local, shared, chosen, run.dropout_key)
        return context[..., :length]
    sources = [_with_neighbours(local, block, pattern, axis)]
    width, rule = (2, PAST) if pattern.causal else (3, EVERYTHING)
    windows = [Window(0, 0, block, width * block, rule, lead=block)]
    if config.is_sparse:
        step, wide, seen = config.sparse_step, config.sparse_block_size, config.sparse_halo
        chosen = representatives_of(pattern, query, source, run)
        sources.append(_with_neighbours(chosen, seen, pattern, axis))
        windows.append(Window(1, 0, step, wide))
        if not pattern.causal:
            windows.append(Window(1, seen + right_offset(config), step, wide))
    spec = Spec(block, tuple(windows), EVERYTHING, run.blocks_per_step or 0, run.dropout_rate)
    options = {"key": run.dropout_key, "implementation": run.implementation}
    context, _ = attend(spec, scale(query), tuple(sources), shared, **options)
    return context[..., :length]


def _fused_plan(
    pattern: LSG, query: Float[Array, "B N H _"], shared: Source | None, run: Runtime
) -> FusedPlan | None:
    """How the fused kernels compute the rows of the tokens; None where XLA does."""
    config, selecting = pattern.config, Selecting()
    if config.is_sparse:
        kind = sparsity.effective_type(config)
        if config.strict_reference or kind in ("lsh", "bos_pooling"):
            kind = "given"
        elif config.sparsity_factor == 1:
            kind = "stride"  # every token
        step, right, chunk = config.sparse_step, right_offset(config), config.selection_chunk
        selecting = Selecting(kind, step, config.sparse_block_size, right, chunk)
    spec = FusedSpec(config.block_size, selecting, pattern.causal, run.dropout_rate)
    axes = MESH_AXES["batch"], MESH_AXES["heads"]
    extended = run.sequence_axis is not None
    return plan_fused(spec, query, shared, run.implementation, axes=axes, extended=extended)


def _with_neighbours(source: Source, size: int, pattern: LSG, axis: str | None) -> Source:
    """A source between the `size` keys in front of it and, if they may be seen, those behind."""
    after = 0 if pattern.causal else size
    return jax.tree.map(lambda x: halo.add_neighbours(x, size, after, axis), source)
