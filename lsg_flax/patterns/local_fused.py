"""Local attention by the fused kernels, as LSG attention without representatives and globals.

Axes: B batch, N heads, H head width, T tokens, S keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lsg_flax.kernels import (
    BLOCKS,
    FusedPlan,
    FusedSpec,
    Near,
    Rule,
    Source,
    Turn,
    accepts,
    attend_fused,
    is_fused,
    pad,
    plan_fused,
)
from lsg_flax.patterns import halo
from lsg_flax.patterns.pattern import Local, Runtime
from lsg_flax.sharding import MESH_AXES


def plan_locally(
    pattern: Local, query: Float[Array, "B N H T"], run: Runtime, *, biased: bool
) -> FusedPlan | None:
    """Returns how the fused kernels compute local attention; None if the XLA implementation does.

    Raises:
        ValueError: if implementation="pallas" and the kernels do not support the case.
    """
    implementation = run.implementation
    if not is_fused(implementation):
        return None
    if not accepts(implementation, _refusal(pattern, query.shape[-1], run, biased)):
        return None
    size, block = pattern.window_size, _block(pattern)
    count, itself = size // block, not pattern.shared_qk
    sides = pattern.look_backward, pattern.look_forward
    if pattern.exact_windowsize:
        rule = Rule(sides[0] * size, sides[1] * size, itself)
        near = Near(1, sides[0] * count, sides[1] * count, rule)
    else:
        near = Near(count, sides[0], sides[1], Rule(itself=itself))
    spec = FusedSpec(
        block,
        causal=pattern.causal,
        dropout_rate=run.dropout_rate,
        near=near,
        scale=pattern.scale,
        turn=_turn(pattern, query.shape[2]),
    )
    axes = MESH_AXES["batch"], MESH_AXES["heads"]
    extended = run.sequence_axis is not None or _in_ring(pattern)
    return plan_fused(spec, query, None, implementation, axes=axes, extended=extended)


def _in_ring(pattern: Local) -> bool:
    """Whether a query may see tokens from the other end of the ring; those would all be later ones
    for a causal query."""
    return pattern.wraps and not pattern.causal


def _refusal(pattern: Local, length: int, run: Runtime, biased: bool) -> str | None:
    """Why the kernels cannot compute a call of whole windows, or None."""
    size, other = pattern.window_size, "or implementation='xla'"
    sides = pattern.look_backward, pattern.look_forward
    if biased:
        return (
            f"they add no bias (attn_bias, use_dynamic_pos_bias) to scores; leave it out, {other}."
        )
    if size % min(BLOCKS):
        return f"window_size={size} is not a multiple of {min(BLOCKS)}; choose one, {other}."
    if not pattern.wraps:
        return None
    if run.own_lengths is not None:
        return f"they do not support a ring length per row; choose {other[3:]}."
    windows = -(-length // size)
    if max(sides) >= windows or (pattern.causal and pattern.look_forward):
        return (
            f"in a ring of {windows} windows a query sees {sides[0]} before its own and {sides[1]} "
            f"after it (causal={pattern.causal}), but a window must not be its own neighbour, and "
            f"a causal query must not look ahead; give more tokens, {other}."
        )
    return None


def _block(pattern: Local) -> int:
    """Queries per block: a window, or for larger windows a size that divides it."""
    size = pattern.window_size
    if size == max(BLOCKS) and not pattern.exact_windowsize:
        return size
    return next(block for block in (128, 64) if size % block == 0)


def _turn(pattern: Local, width: int) -> Turn | None:
    if pattern.rotary is None:
        return None
    angles, growth = pattern.rotary.of_a_place(width)
    # As in the reference, queries get the positions of the last window that they see.
    return Turn(angles, growth, pattern.look_forward * pattern.window_size)


def attend_locally_fused(
    plan: FusedPlan,
    pattern: Local,
    query: Float[Array, "B N H T"],
    source: Source,
    run: Runtime,
) -> Float[Array, "B N H T"]:
    """Returns the context; query and source are whole windows."""
    if plan.extended:
        source = jax.tree.map(lambda x: _with_neighbours(plan, pattern, x, run), source)
    return attend_fused(plan, query, source, key=run.dropout_key)


def _with_neighbours(plan: FusedPlan, pattern: Local, x, run: Runtime):
    """Adds the keys of the windows before and after, in as many blocks as the kernels read."""
    sides = pattern.look_backward, 0 if pattern.causal else pattern.look_forward
    before, after = (side * pattern.window_size for side in sides)
    if _in_ring(pattern):
        wide = jnp.concatenate([x[..., x.shape[-1] - before :], x, x[..., :after]], axis=-1)
    else:
        wide = halo.add_neighbours(x, before, after, run.sequence_axis)
    return pad(wide, plan.before * plan.block - before, plan.after * plan.block - after)


def sees_others(pattern: Local, mask: Bool[Array, "B #N T"], run: Runtime) -> Bool[Array, "B #N T"]:
    """Returns which queries see a token other than themselves; the mask is one of whole windows."""
    size, length = pattern.window_size, mask.shape[-1]
    before, after = pattern.look_backward * size, pattern.look_forward * size
    wide = halo.add_neighbours(mask, before, after, run.sequence_axis)
    count = pad(jnp.cumsum(wide, axis=-1, dtype=jnp.int32), 1, 0)
    own = np.arange(length)
    first = own if pattern.exact_windowsize else own // size * size
    behind = first + before + after + (1 if pattern.exact_windowsize else size)
    if pattern.causal:
        behind = np.minimum(behind, own + before + 1)
    return count[..., behind] - count[..., first] > mask
