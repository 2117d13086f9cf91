"""LSG attention of arrays with features first, on one device or on a shard.

Axes: B batch, N heads, H head width, T tokens, S keys.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lsg_flax.kernels import (
    EVERYTHING,
    PAST,
    FusedPlan,
    FusedSpec,
    Queries,
    Selecting,
    Source,
    Spec,
    Window,
    attend,
    attend_fused,
    check_segments,
    merge_softmax_parts,
    pad,
    plan_fused,
)
from lsg_flax.patterns import halo, segments, sparsity
from lsg_flax.patterns.full import AXES, attend_fully, attend_to_all, scale
from lsg_flax.patterns.pattern import LSG, Runtime
from lsg_flax.patterns.representatives import (
    hide_global,
    pad_to_blocks,
    representatives_of,
    right_offset,
)


def attend_by_blocks(
    pattern: LSG, query: Float[Array, "B N H T"], source: Source, run: Runtime
) -> Float[Array, "B N H T"]:
    """Returns the context of LSG attention; up to two blocks it is that of full attention.

    Here prepended globals come *after* the tokens: before them they would shift all blocks against
    the tiles of a TPU's memory.
    """
    axis, run, tokens = run.sequence_axis, run.on_shard(), query.shape[-1] - pattern.behind
    if axis is None and tokens <= 2 * pattern.config.block_size:
        return _short_rows(pattern, query, source, run)
    context = _token_rows(pattern, query, source, run)
    if pattern.split:
        if context.shape == query.shape:  # a kernel has computed the rows of the globals as well
            return context
        own = query[..., tokens:]
        if not pattern.causal:
            own = _full_rows(own, source, pattern.behind, run)
        return jnp.concatenate([context, own], axis=-1)
    if pattern.causal or not pattern.full_rows:
        return context
    first = _full_rows(query[..., :1], source, 0, run)
    first = jnp.where(halo.is_first(axis), first, context[..., :1])
    return jnp.concatenate([first, context[..., 1:]], axis=-1)


def _short_rows(
    pattern: LSG, query: Float[Array, "B N H T"], source: Source, run: Runtime
) -> Float[Array, "B N H T"]:
    """Full attention; as in the reference, the outputs of causal globals are their queries."""
    behind = pattern.behind
    if not (pattern.causal and behind):
        return attend_fully(query, source, run, causal=pattern.causal)
    own, keys = jax.tree.map(lambda x: jnp.roll(x, behind, axis=-1), (query, source))
    context = attend_fully(own, keys, run, causal=True)
    return jnp.concatenate([context[..., behind:], query[..., -behind:]], axis=-1)


def _full_rows(
    query: Float[Array, "B N H _"], source: Source, behind: int, run: Runtime
) -> Float[Array, "B N H _"]:
    """Computes full attention for the globals: the prepended ones, which are the last `behind`
    positions, or the first token."""
    axis, run = run.sequence_axis, run.with_other_dropout()
    run = replace(run, implementation=None)  # few rows
    if axis is None:
        place = source.mask.shape[-1] - behind if behind else 0
        return attend_to_all(query, source, run, first=place)[0]
    if behind:  # every shard has the globals, but they must count as keys only once
        tokens = source.mask.shape[-1] - behind
        is_key = (jnp.arange(source.mask.shape[-1]) < tokens) | halo.is_first(axis)
        source = source._replace(mask=source.mask & is_key[None, None])
    first = query if behind else halo.share_first(query, axis)
    return merge_softmax_parts(*attend_to_all(first, source, run), axis)[0]


def _token_rows(
    pattern: LSG, query: Float[Array, "B N H T"], source: Source, run: Runtime
) -> Float[Array, "B N H _"]:
    """Returns the context of the tokens, followed by that of the globals if a kernel computes
    both."""
    config, split, axis = pattern.config, pattern.split, run.sequence_axis
    block, all_of = config.block_size, (query, source)
    length = query.shape[-1] - pattern.behind
    shared = None
    if pattern.global_tokens != "none":
        shared = jax.tree.map(lambda x: x[..., length:] if split else x[..., :1], source)
        if not split:  # the global is in the first shard
            shared = jax.tree.map(lambda x: halo.share_first(x, axis), shared)
    query, source = jax.tree.map(lambda x: x[..., :length], (query, source))
    plan = _fused_plan(pattern, query, source, shared, run)
    query, source = pad_to_blocks(config, query, source)
    local = hide_global(pattern, source, run)  # seen once, as the global
    if plan is not None:
        given = plan.selecting.kind == "given"
        chosen = representatives_of(pattern, query, source, run) if given else None
        if plan.behind:
            extra = query.shape[-1] - length
            whole = jax.tree.map(lambda x: _pad_tokens(x, length, extra), all_of)
            context = attend_fused(plan, *whole, given=chosen, key=run.dropout_key)
            return _cut_tokens(context, length, extra)
        if axis is not None:
            local = _with_neighbours(local, plan.before * block, pattern, axis)
        if axis is not None and chosen is not None:
            chosen = _with_neighbours(chosen, plan.before * config.sparse_step, pattern, axis)
        context = attend_fused(plan, query, local, shared, chosen, run.dropout_key)
        return context[..., :length]
    sources = [_with_neighbours(local, block, pattern, axis)]
    front = 0 if axis is None else block
    width, rule = (2, PAST) if pattern.causal else (3, EVERYTHING)
    windows = [Window(0, front - block, block, width * block, rule, lead=front)]
    if config.is_sparse:
        step, wide, seen = config.sparse_step, config.sparse_block_size, config.sparse_halo
        chosen = representatives_of(pattern, query, source, run)
        sources.append(_with_neighbours(chosen, seen, pattern, axis))
        first = 0 if axis is None else seen  # of block 0's own
        windows.append(Window(1, first - seen, step, wide))
        if not pattern.causal:
            windows.append(Window(1, first + right_offset(config), step, wide))
    steps, rate = run.blocks_per_step or 0, run.dropout_rate
    spec = Spec(block, tuple(windows), EVERYTHING, steps, rate, AXES)
    options = {"key": run.dropout_key, "implementation": run.implementation}
    queries = scale(query)
    if source.segments is not None:
        spec, queries = replace(spec, one_segment=True), _in_segments(queries, source, block)
    context, _ = attend(spec, queries, tuple(sources), shared, **options)
    return context[..., :length]


def _in_segments(queries: Queries, source: Source, block: int) -> Queries:
    """Assigns the queries of each block, those of padding as well, to the block's text."""
    assert source.segments is not None
    own = segments.of_blocks(source.segments, block)
    return queries._replace(segments=jnp.repeat(own, block, axis=-1))


def _fused_plan(
    pattern: LSG,
    query: Float[Array, "B N H _"],
    source: Source,
    shared: Source | None,
    run: Runtime,
) -> FusedPlan | None:
    """Returns how the fused kernels compute the rows of the tokens; None if the XLA implementation
    does."""
    if source.segments is not None:
        check_segments(source.segments, (source,), run.implementation)
        return None
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
    extended = run.sequence_axis is not None
    options = {"axes": AXES, "extended": extended, "behind": pattern.behind}
    return plan_fused(spec, query, shared, run.implementation, **options)


def _pad_tokens(x: Shaped[Array, "*A _"], length: int, extra: int) -> Shaped[Array, "*A _"]:
    """Inserts zeros (False) between the tokens and the globals after them."""
    parts = [pad(x[..., :length], 0, extra), x[..., length:]]
    return jnp.concatenate(parts, axis=-1) if extra else x


def _cut_tokens(x: Shaped[Array, "*A _"], length: int, extra: int) -> Shaped[Array, "*A _"]:
    parts = [x[..., :length], x[..., length + extra :]]
    return jnp.concatenate(parts, axis=-1) if extra else x


def _with_neighbours(source: Source, size: int, pattern: LSG, axis: str | None) -> Source:
    """Adds to a shard's source the `size` keys before it and, if they may be seen, after it;
    without shards there are none, and the source is unchanged."""
    if axis is None:
        return source
    after = 0 if pattern.causal else size
    return jax.tree.map(lambda x: halo.add_neighbours(x, size, after, axis), source)
