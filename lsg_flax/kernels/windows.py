"""Windows of keys: slices them for a few neighbouring blocks of queries at a time, from the one run
of keys that they cover, and adds gradients back to the same slices.

Axes: B batch, N heads, H head width, S keys, J blocks of a step, W keys of a block's windows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from lsg_flax.kernels.spec import Spec, Window


def pad(x, before: int, after: int):
    """Pads the last axis of x, [..., S], with `before` zeros (False) at the start and `after` at
    the end."""
    return x if before == after == 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def cut_window(
    x: Shaped[Array, "B N *H S"], window: Window, step: Int[Array, ""], spec: Spec
) -> Shaped[Array, "B N J *H W"]:
    """Returns one window for each of a step's blocks."""
    return _unfold(_run(x, window, step, spec), window, spec.blocks_per_step)


def cut_windows(
    sources: tuple[Float[Array, "B N H _"], ...], step: Int[Array, ""], spec: Spec
) -> Float[Array, "B N J H W"]:
    """Returns all windows, concatenated, for each of a step's blocks."""
    return _unfold_all([_run(sources[w.source], w, step, spec) for w in spec.windows], spec)


def add_to_windows(
    totals: tuple[Float[Array, "B N H _"], ...],
    gradient: Float[Array, "B N J H W"],
    step: Int[Array, ""],
    spec: Spec,
) -> tuple[Float[Array, "B N H _"], ...]:
    """Adds a step's gradient to the totals, one for each source, at the slices of `cut_windows`."""
    added = list(totals)
    runs = [_run(totals[w.source], w, step, spec) for w in spec.windows]
    run_gradients = jax.linear_transpose(lambda *r: _unfold_all(r, spec), *runs)(gradient)
    for w, run_gradient in zip(spec.windows, run_gradients, strict=True):
        total, start = added[w.source], _start(w, step, spec)
        old = lax.dynamic_slice_in_dim(total, start, run_gradient.shape[-1], axis=-1)
        added[w.source] = lax.dynamic_update_slice_in_dim(total, old + run_gradient, start, axis=-1)
    return tuple(added)


def _start(window: Window, step, spec: Spec):
    return window.offset + step * spec.blocks_per_step * window.stride


def _run(x, window: Window, step, spec: Spec):
    """Returns the run of keys that a window covers in all of a step's blocks."""
    width = (spec.blocks_per_step - 1) * window.stride + window.width
    return lax.dynamic_slice_in_dim(x, _start(window, step, spec), width, axis=-1)


def _unfold_all(runs, spec: Spec):
    windows = zip(runs, spec.windows, strict=True)
    return jnp.concatenate([_unfold(r, w, spec.blocks_per_step) for r, w in windows], axis=-1)


def _unfold(
    x: Shaped[Array, "B N *H S"], window: Window, count: int
) -> Shaped[Array, "B N J *H W"]:
    """Returns the overlapping windows of `count` neighbouring blocks, from the run they cover."""
    stride, width = window.stride, window.width
    if count == 1:
        return jnp.expand_dims(x, 2)
    parts = -(-width // stride)
    cells = pad(x, 0, (count - 1 + parts) * stride - x.shape[-1]).reshape(
        *x.shape[:-1], -1, stride
    )  # [B, N, *H, cells, stride]
    shifted = [cells[..., j : j + count, : min(stride, width - j * stride)] for j in range(parts)]
    return jnp.moveaxis(jnp.concatenate(shifted, axis=-1), -2, 2)
