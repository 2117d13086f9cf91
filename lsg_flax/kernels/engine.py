"""The entry point of attention kernels, which chooses the implementation; and merging of parts.

Axes: B batch, N heads, H head width, T tokens (queries), S keys.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lsg_flax.kernels import gpu, xla
from lsg_flax.kernels.device import device_kind, is_gpu
from lsg_flax.kernels.spec import EVERYTHING, NO_BIASES, Biases, Queries, Source, Spec

Implementation = Literal["xla", "pallas", "pallas_interpret"]
NOT_FUSED = (
    "there is no fused kernel for LSH attention; choose 'xla', or None, which uses kernels where "
    "there are any."
)


def attend(
    spec: Spec,
    queries: Queries,
    sources: tuple[Source, ...] = (),
    shared: Source | None = None,
    biases: Biases = NO_BIASES,
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """Computes the attention of every block of queries to its windows of the sources and to the
    shared keys, under one softmax. The backward pass recomputes the scores (arXiv 2205.14135,
    section 3.1). `attend_reference` computes the same in a simple way.

    Args:
        spec: the static settings.
        queries: scaled queries.
        sources: the keys from which `spec.windows` select.
        shared: keys that all queries see.
        biases: added to the scores.
        key: random key for dropout of attention weights, with `spec.dropout_rate`.
        implementation: None chooses the fastest correct one for the device that the program is
            compiled for.

    Returns:
        The context in the dtype of the queries, and the logarithm of each query's sum of
        exp(score), in float32, with which parts can be merged. A query that sees no key has zeros,
        a logarithm so low that merging gives it no weight, and zero gradients.

    Raises:
        ValueError: for an unknown implementation, dropout without a key, a wrong number of biases,
            a rule without the positions that it needs, and segments of only queries or only keys.
    """
    check_implementation(implementation)
    check_segments(queries.segments, (*sources, shared), implementation)
    on_gpu = implementation == "pallas" and is_gpu()
    known = on_gpu or implementation in (None, "xla")
    accepts(implementation, None if known else NOT_FUSED)
    if spec.dropout_rate and key is None:
        raise ValueError(f"dropout_rate={spec.dropout_rate} needs a random key; pass key=.")
    if biases.windows and len(biases.windows) != len(spec.windows):
        raise ValueError(
            f"len(biases.windows)={len(biases.windows)}, len(spec.windows)={len(spec.windows)}; "
            "give one bias, or None, for each window, or leave out biases.windows."
        )
    if biases.shared is not None and shared is None:
        raise ValueError(
            "a bias for shared keys is given, but there are no shared keys; pass these, or leave "
            "out biases.shared."
        )
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
                f"{rule} needs a window that moves with the queries, but this one moves by "
                f"{stride} keys per block={spec.block} of queries; pass positions of both."
            )
    function = gpu.attend if on_gpu else xla.attend
    return function(spec, queries, sources, shared, biases, key if spec.dropout_rate else None)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for an unknown implementation."""
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose 'xla', 'pallas', "
            "'pallas_interpret', or None for the fastest."
        )


def is_fused(implementation: Implementation | None) -> bool:
    """Whether the TPU kernels are requested, or are chosen if they support the call. (GPU kernels
    are used inside `attend`.)

    Raises:
        ValueError: for implementation="pallas" if the device is neither a TPU nor a GPU.
    """
    check_implementation(implementation)
    kind = device_kind()
    if implementation == "pallas" and is_gpu():
        return False
    if implementation == "pallas" and "tpu" not in kind:
        raise ValueError(
            "implementation='pallas' is for TPUs and NVIDIA GPUs, but this program is compiled "
            f"for {kind!r}; call jax.set_mesh with a mesh of such devices to compile for them, or "
            "choose 'xla', None for the fastest, or 'pallas_interpret' to run the TPU kernels "
            "slowly without a TPU."
        )
    return "tpu" in kind if implementation is None else implementation != "xla"


def accepts(implementation: Implementation | None, refused: str | None) -> bool:
    """Whether the kernels compute a call; `refused` is the reason if they cannot, else None.

    Raises:
        ValueError: if they cannot, but were requested.
    """
    if refused is not None and implementation is not None:
        raise ValueError(f"implementation={implementation!r}: {refused}")
    return refused is None


def check_segments(
    segments: Int[Array, "B #N T"] | None,
    sources: tuple[Source | None, ...],
    implementation: Implementation | None,
) -> None:
    """Raises ValueError if only some of queries and keys have segments, and if a fused kernel is
    requested, which does not support segments."""
    given = [segments is not None] + [s.segments is not None for s in sources if s is not None]
    if not any(given):
        return
    if not all(given):
        raise ValueError(
            "segments are given for some of the queries and keys, but not for all; give them for "
            "all or for none."
        )
    if implementation not in (None, "xla"):
        raise ValueError(
            f"implementation={implementation!r} has no kernel for several texts in one row "
            "(segment_ids); choose 'xla', or None, which uses XLA for them."
        )


def merge_softmax_parts(
    context: Float[Array, "B N H T"], normaliser: Float[Array, "B N T"], axis: str
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """Merges parts of attention, each the result of `attend` for some of the keys, into attention
    to all keys (arXiv 2205.14135, section 3.1).

    Args:
        context, normaliser: one part.
        axis: the axis of the parts: an axis of the mesh, or the name of one in `jax.vmap`.
    """
    top = lax.pmax(lax.stop_gradient(normaliser), axis)
    weight = jnp.exp(normaliser - top)[:, :, None]  # [B, N, 1, T]
    total = lax.psum(weight, axis)
    merged = lax.psum(context.astype(jnp.float32) * weight / total, axis)
    return merged.astype(context.dtype), top + jnp.log(total[:, :, 0])
