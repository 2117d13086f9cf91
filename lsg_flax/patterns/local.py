"""Local attention of arrays with features first, on one device or on a shard: each window of
queries sees its own keys and those of neighbouring windows.

Axes: B batch, N heads, H head width, T tokens, Q queries of a block (a window), W keys of a block's
windows.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from lsg_flax.checks import require
from lsg_flax.kernels import (
    EVERYTHING,
    NEGATIVE,
    PAST,
    Biases,
    Queries,
    Rule,
    Source,
    Spec,
    Window,
    attend,
    drop,
    pad,
)
from lsg_flax.patterns import halo
from lsg_flax.patterns.full import AXES
from lsg_flax.patterns.local_fused import attend_locally_fused, plan_locally, sees_others
from lsg_flax.patterns.pattern import Local, Runtime


def attend_locally(
    pattern: Local,
    query: Float[Array, "B N H T"],
    source: Source,
    run: Runtime,
    bias: Float[Array, "N Q W"] | None = None,
) -> Float[Array, "B N H T"]:
    """Returns the context of `local_attention`; `bias` is added to the scores of every window.
    Raises ValueError for `pattern.wraps` (windows in a ring) on a shard of a sequence."""
    length, size, run = query.shape[-1], pattern.window_size, run.on_shard()
    if pattern.wraps and length <= size:
        size, alone = length, {"window_size": length, "look_backward": 0, "look_forward": 0}
        pattern = replace(pattern, wraps=False, **alone)
    query, source = jax.tree.map(lambda x: pad(x, 0, -length % size), (query, source))
    if pattern.shared_qk:
        source = source._replace(key=unit(source.key, 2))
    segmented = source.segments is not None  # supported by the XLA implementation only
    plan = None if segmented else plan_locally(pattern, query, run, biased=bias is not None)
    if plan is not None:
        context = attend_locally_fused(plan, pattern, query, source, run)
        if pattern.shared_qk:
            alone = ~sees_others(pattern, source.mask, run)
            context = show_themselves(context, alone, source, run)
        return context[..., :length]
    width = query.shape[2] ** -0.5 if pattern.scale is None else pattern.scale
    if pattern.wraps and pattern.causal:
        source = source._replace(positions=places(query))
    sources, windows = _windows(pattern, source, run)
    steps, rate = run.blocks_per_step or 0, run.dropout_rate
    spec = Spec(size, windows, blocks_per_step=steps, dropout_rate=rate, axes=AXES)
    options = {"key": run.dropout_key, "implementation": run.implementation}
    turned = _turn(pattern, query * width, pattern.windows_seen - 1, sign=1)
    queries = Queries(turned, source.positions, source.segments)
    context, normaliser = attend(spec, queries, sources, biases=_biases(bias, windows), **options)
    if pattern.shared_qk:
        context = show_themselves(context, saw_nothing(normaliser), source, run)
    return context[..., :length]


def saw_nothing(normaliser: Float[Array, "B N T"]) -> Bool[Array, "B N T"]:
    """Returns which queries saw no key, from the log normaliser that `attend` returns."""
    return normaliser <= NEGATIVE / 2


def show_themselves(
    context: Float[Array, "B N H T"],
    alone: Bool[Array, "B #N T"],
    source: Source,
    run: Runtime,
) -> Float[Array, "B N H T"]:
    """Replaces the context of tokens that see no other token by their own value, for shared queries
    and keys."""
    alone &= source.mask
    own = source.value
    other = run.with_other_dropout().dropout_key
    if other is not None and run.dropout_rate:
        kept: Array = drop(jnp.ones_like(own[:, :, :1]), other, run.dropout_rate)
        own = own * kept
    return jnp.where(alone[:, :, None], own, context)


def take_tokens(x: Shaped[Array, "B *A T"], place: Int[Array, "B _"]) -> Shaped[Array, "B *A _"]:
    """Returns the tokens at each row's own indices `place`."""
    place = place.reshape(len(place), *[1] * (x.ndim - 2), -1)
    return jnp.take_along_axis(x, place, axis=-1, mode="promise_in_bounds")


def places(x: Float[Array, "B N H T"]) -> Int[Array, "B 1 T"]:
    """Returns the position of each token in the array."""
    return lax.broadcasted_iota(jnp.int32, (x.shape[0], 1, x.shape[-1]), 2)


def put_in_ring(
    source: Source, size: int, before: int, after: int, rule: Rule
) -> tuple[Source, tuple[Window, ...]]:
    """Returns the source with its ends repeated, and the windows of it that blocks of `size` see:
    `before` blocks before their own and `after` blocks after it, in a ring.

    As in the reference (`_look_adjacent`), a neighbour at a distance of the ring's length or more
    is the block itself, seen once more.
    """
    most = source.mask.shape[-1] // size - 1
    first, last = min(before, most) * size, min(after, most) * size

    def around(x):
        return jnp.concatenate([x[..., x.shape[-1] - first :], x, x[..., :last]], axis=-1)

    again = before + after - (first + last) // size
    windows = (Window(0, 0, size, first + size + last, rule, lead=first),)
    own = Window(0, first, size, size, rule, lead=first)
    return jax.tree.map(around, source), windows + (own,) * again


def put_in_own_rings(
    source: Source, size: int, sides: tuple[int, int], rule: Rule, end: Int[Array, "B"]
) -> tuple[tuple[Source, ...], tuple[Window, ...]]:
    """`put_in_ring` for rows whose rings end at their own `end`. There is one run of keys for each
    neighbour that a row may have, because which neighbour is the block itself differs from row to
    row."""
    place, end = jnp.arange(source.mask.shape[-1])[None], end[:, None]
    most, (before, after) = source.mask.shape[-1] // size - 1, sides
    runs = {0: source}
    for number in range(-min(after, most), min(before, most) + 1):
        if number:
            turned = (place - number * size) % end
            turned = jnp.where(abs(number) * size < end, turned, place)
            runs[number] = jax.tree.map(lambda x, at=turned: take_tokens(x, at), source)
    again = before + after + 1 - len(runs)
    seen = [*range(len(runs)), *[0] * again]
    return tuple(runs.values()), tuple(Window(n, 0, size, size, rule) for n in seen)


def _windows(
    pattern: Local, source: Source, run: Runtime
) -> tuple[tuple[Source, ...], tuple[Window, ...]]:
    """Returns what blocks of queries see: one run of keys; or, with rotary positions, one run for
    each distance, because a key is rotated differently for each window that sees it."""
    size, axis, length = pattern.window_size, run.sequence_axis, source.mask.shape[-1]
    if pattern.wraps:
        require(axis is None, "local attention in a ring cannot be sharded over a sequence axis.")
        rule = PAST if pattern.causal else EVERYTHING
        if run.own_lengths is not None:
            sides = (pattern.look_backward, pattern.look_forward)
            return put_in_own_rings(source, size, sides, rule, run.own_lengths)
        ring, seen = put_in_ring(source, size, pattern.look_backward, pattern.look_forward, rule)
        return (ring,), seen
    before, after = pattern.look_backward * size, pattern.look_forward * size
    wide = jax.tree.map(lambda x: halo.add_neighbours(x, before, after, axis), source)
    rule = Rule(
        before if pattern.exact_windowsize else None,
        0 if pattern.causal else after if pattern.exact_windowsize else None,
        itself=not pattern.shared_qk,
    )
    if pattern.rotary is None:
        return (wide,), (Window(0, 0, size, before + size + after, rule, lead=before),)
    sources = []
    for number in range(pattern.windows_seen):
        start = number * size
        run_of = jax.tree.map(lambda x, start=start: x[..., start : start + length], wide)
        sources.append(run_of._replace(key=_turn(pattern, run_of.key, number, sign=-1)))
    numbers = range(pattern.windows_seen)
    leads = (before - number * size for number in numbers)
    windows = (Window(n, 0, size, size, rule, lead) for n, lead in zip(numbers, leads, strict=True))
    return tuple(sources), tuple(windows)


def _turn(pattern: Local, x: Float[Array, "B N H T"], number: int, *, sign: int):
    """Rotates queries or keys as those of window `number` among the windows that are seen. As in
    the reference, queries get the positions of the last one, not of their own."""
    if pattern.rotary is None:
        return x
    size = pattern.window_size
    centre = pattern.windows_seen * size // 2
    return pattern.rotary.rotate(x, size, number * size, centre=centre, sign=sign)


def _biases(bias: Float[Array, "N Q W"] | None, windows: tuple[Window, ...]) -> Biases:
    """The bias of each window of keys."""
    if bias is None:
        return Biases()
    return Biases(tuple(jnp.split(bias[None], len(windows), axis=-1)))


def unit(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Normalises vectors along an axis to length 1, as local-attention's `l2norm`; zeros stay
    zeros."""
    square = jnp.sum(x.astype(jnp.float32) ** 2, axis=axis, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))  # the root of 0 has no gradient
    return (x / jnp.maximum(length, 1e-12)).astype(x.dtype)
