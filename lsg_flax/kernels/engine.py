"""The one entry to attention kernels, which picks the implementation, and the merging of parts.

Axes: B batch, N heads, H head width, T tokens (queries), S keys.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from lsg_flax.kernels import xla
from lsg_flax.kernels.spec import EVERYTHING, NO_BIASES, Biases, Queries, Source, Spec

Implementation = Literal["xla", "pallas", "pallas_interpret"]


def attend(
    spec: Spec,
    queries: Queries,
    sources: tuple[Source, ...] = (),
    shared: Source | None = None,
    biases: Biases = NO_BIASES,
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """Softmax attention of every block of queries to its windows of the sources and to the shared
    keys, all under one softmax. `attend_reference` is the same written out.

    Args:
        key: for dropout of attention weights, with `spec.dropout_rate`.
        implementation: None picks the fastest correct one for the device that the program is
            compiled for.

    Returns:
        The context in the dtype of the queries, and the logarithm of each query's sum of
        exp(score), in float32: with both, parts can be merged. A query that sees nothing gets
        zeros, a logarithm so low that merging gives it no weight, and passes no gradient.

    Raises:
        ValueError: for an unknown implementation, dropout without a key, biases of other windows,
            and a rule without the positions it needs.
    """
    check_implementation(implementation)
    if implementation not in (None, "xla"):
        raise ValueError(
            f"implementation={implementation!r} computes LSG attention of more than two blocks of "
            "tokens, and this is full or local attention, or LSG attention of fewer; choose 'xla', "
            "or None, which takes the fused kernels wherever they are faster."
        )
    if spec.dropout_rate and key is None:
        raise ValueError(f"dropout_rate={spec.dropout_rate} needs a key.")
    if biases.windows and len(biases.windows) != len(spec.windows):
        raise ValueError(f"{len(biases.windows)} biases for {len(spec.windows)} windows.")
    if biases.shared is not None and shared is None:
        raise ValueError("a bias for shared keys is given, but there are none.")
    rules = [(w.rule, sources[w.source], w.stride) for w in spec.windows]
    if shared is not None:
        rules.append((spec.shared_rule, shared, spec.block))
    for rule, source, stride in rules:
        if rule == EVERYTHING:
            continue
        if (queries.positions is None) != (source.positions is None):
            raise ValueError(f"{rule} needs positions of both queries and keys, or of neither.")
        if queries.positions is None and stride != spec.block:
            raise ValueError(
                f"{rule} is for a window that moves by {stride} where its block={spec.block} of "
                "queries does: by place that is a rule for each block; give positions."
            )
    return xla.attend(spec, queries, sources, shared, biases, key if spec.dropout_rate else None)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for one that there is not."""
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose 'xla', 'pallas', "
            "'pallas_interpret', or None for the fastest."
        )


def merge_softmax_parts(
    context: Float[Array, "B N H T"], normaliser: Float[Array, "B N T"], axis: str
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """Attention to the keys of all parts, from each part's as `attend` gives it.

    Args:
        axis: what the parts lie along: an axis of the mesh, or one that `jax.vmap` names.
    """
    top = lax.pmax(lax.stop_gradient(normaliser), axis)
    weight = jnp.exp(normaliser - top)[:, :, None]  # [B, N, 1, T]
    total = lax.psum(weight, axis)
    merged = lax.psum(context.astype(jnp.float32) * weight / total, axis)
    return merged.astype(context.dtype), top + jnp.log(total[:, :, 0])
