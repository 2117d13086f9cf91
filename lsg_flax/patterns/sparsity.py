"""Sparse selection: chooses, from the keys and values of ONE head, the representatives that distant
queries attend to.

Every selection has the signature `(inputs, config) -> Selected`; `select` maps them over batch and
heads. They follow section 3 of the LSG paper (arXiv 2210.15497). Masks are boolean (True = real),
and sums are computed in float32 for every dtype.

Axes: B batch, T tokens (whole blocks, no globals), N heads, H head width, R representatives, one
for each `sparsity_factor` tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax.kernels import NEGATIVE, device_kind, masked_softmax
from lsg_flax.patterns.config import LSGConfig
from lsg_flax.patterns.groups import ranks, sum_groups


class HeadInputs(NamedTuple):
    """The inputs of a selection for one head. `bos_query` is the query of the first non-global
    token, or for each block the query of the first token of its text; `bos_mask` is what it
    sees."""

    key: Float[Array, "T H"]
    value: Float[Array, "T H"]
    mask: Bool[Array, "T"]
    head: Int[Array, ""]
    bos_query: Float[Array, "*blocks H"]
    bos_mask: Bool[Array, "T"]
    rotations: tuple[Float[Array, "H _"], ...]


class Selected(NamedTuple):
    """One head's representatives, in the order of the tokens that they represent; `mask` is False
    for representatives of padding only."""

    key: Float[Array, "R H"]
    value: Float[Array, "R H"]
    mask: Bool[Array, "R"]


def _take(inputs: HeadInputs, index: Int[Array, "R"]) -> Selected:
    def rows(x):
        return x.at[index].get(mode="promise_in_bounds", unique_indices=True)

    return Selected(rows(inputs.key), rows(inputs.value), rows(inputs.mask))


def _squares(inputs: HeadInputs, chunk: int) -> Float[Array, "chunks chunk"]:
    """The squared norms of the keys of each chunk, 0 for masked ones."""
    key = jax.lax.stop_gradient(inputs.key).astype(jnp.float32)
    return jnp.where(inputs.mask, jnp.sum(key * key, axis=-1), 0.0).reshape(-1, chunk)


def norm(inputs: HeadInputs, config: LSGConfig) -> Selected:
    """Selects per chunk the keys with the largest L2 norm; masked tokens count as norm 0. No
    gradient flows through the choice."""
    chunk, kept = config.selection_chunk, config.selection_chunk // config.sparsity_factor
    squares = _squares(inputs, chunk)  # [chunks, chunk]
    # In the order of rising norms, as in the reference's argsort: the order matters, because a
    # window may end inside a chunk.
    index = jax.lax.top_k(squares, kept)[1][:, ::-1]
    start = jnp.arange(index.shape[0], dtype=index.dtype)[:, None] * chunk
    return _take(inputs, (index + start).reshape(-1))


def pooling(inputs: HeadInputs, config: LSGConfig) -> Selected:
    """Takes the mean key and value of the real tokens among every `sparsity_factor` tokens."""
    mask = inputs.mask.reshape(-1, config.sparsity_factor)  # [R, f]
    count = mask.sum(axis=-1, dtype=jnp.float32)[:, None]

    def mean(x):
        groups = x.reshape(*mask.shape, -1).astype(jnp.float32)  # [R, f, H]
        return (jnp.where(mask[..., None], groups, 0.0).sum(axis=1) / (count + 1e-6)).astype(
            x.dtype
        )

    return Selected(mean(inputs.key), mean(inputs.value), mask.any(axis=-1))


def _pick(x, position: Int[Array, ""]):
    """x[:, position] as a masked sum, whose gradient is a select; that of indexing would be a
    scatter."""
    chosen = jnp.arange(x.shape[1]) == position
    return jnp.where(chosen.reshape(1, -1, *[1] * (x.ndim - 2)), x, 0).sum(axis=1).astype(x.dtype)


def stride(inputs: HeadInputs, config: LSGConfig) -> Selected:
    """Selects every `sparsity_factor`-th token, starting from head % sparsity_factor."""
    factor = config.sparsity_factor

    def rows(x):
        return _pick(x.reshape(-1, factor, *x.shape[1:]), inputs.head % factor)

    return Selected(rows(inputs.key), rows(inputs.value), rows(inputs.mask))


def block_stride(inputs: HeadInputs, config: LSGConfig) -> Selected:
    """Selects from every block one contiguous slice of block_size / sparsity_factor tokens, slice
    number head % sparsity_factor."""
    factor, step = config.sparsity_factor, config.sparse_step

    def rows(x):
        slices = x.reshape(-1, factor, step, *x.shape[1:])  # [T/block, f, step, ...]
        return _pick(slices, inputs.head % factor).reshape(-1, *x.shape[1:])

    return Selected(rows(inputs.key), rows(inputs.value), rows(inputs.mask))


def bos_pooling(inputs: HeadInputs, config: LSGConfig) -> Selected:
    """Averages every `sparsity_factor` tokens, weighted by a softmax of the first token's query
    over them.

    The reference unmasks groups that are all padding (in float32 and bfloat16); so does
    `strict_reference`.
    """
    factor = config.sparsity_factor
    key, query = inputs.key.astype(jnp.float32), inputs.bos_query.astype(jnp.float32)
    if query.ndim == 1:
        scores = key @ query  # [T]
    else:
        blocks = key.reshape(query.shape[0], -1, key.shape[-1])
        scores = jnp.einsum("jqh,jh->jq", blocks, query).reshape(-1)
    scores = scores / key.shape[-1] ** 0.5
    visible, mask = inputs.bos_mask.reshape(-1, factor), inputs.mask.reshape(-1, factor)
    if config.strict_reference:
        # Added, as in the reference: the gradient passes through masked scores as well.
        weights = jax.nn.softmax(
            scores.reshape(-1, factor) + jnp.where(visible, 0.0, NEGATIVE), axis=-1
        )
        mask = jnp.full(mask.shape[:1], True)
    else:
        weights, mask = masked_softmax(scores.reshape(-1, factor), visible), mask.any(axis=-1)

    def pool(x):
        return jnp.einsum(
            "rf,rfh->rh", weights, x.reshape(-1, factor, x.shape[-1]).astype(jnp.float32)
        ).astype(x.dtype)

    return Selected(pool(inputs.key), pool(inputs.value), mask)


def lsh(inputs: HeadInputs, config: LSGConfig) -> Selected:
    """Hashes the tokens of each chunk into buckets by random rotations of their keys; a
    representative is a bucket's mean.

    The first `lsh_num_pre_rounds` rounds have as many buckets as tokens, the last one chunk /
    sparsity_factor buckets.
    """
    chunk = config.selection_chunk
    mask = inputs.mask.reshape(-1, chunk)  # [T/chunk, chunk]

    def real_chunks(x):
        x = x.reshape(*mask.shape, -1).astype(jnp.float32)
        return jnp.where(mask[..., None], x, 0.0)

    key, value, count = (
        real_chunks(inputs.key),
        real_chunks(inputs.value),
        mask.astype(jnp.float32)[..., None],
    )
    outputs = [chunk] * config.lsh_num_pre_rounds + [chunk // config.sparsity_factor]
    for buckets, rotation in zip(outputs, inputs.rotations, strict=True):
        norms = jnp.linalg.norm(jax.lax.stop_gradient(key), axis=-1, keepdims=True)
        unit = jnp.where(count > 0, jax.lax.stop_gradient(key) / jnp.maximum(norms, 1e-12), 0.0)
        projected = unit @ rotation.astype(jnp.float32)  # [T/chunk, chunk, buckets // 2]
        bucket = jnp.argmax(jnp.concatenate([projected, -projected], axis=-1), axis=-1)
        sums: list[Array] = [sum_groups(x, bucket, buckets) for x in (key, value, count)]
        key, value, count = sums

    def mean(x, like):
        return (x / (count + 1e-8)).reshape(-1, x.shape[-1]).astype(like.dtype)

    return Selected(mean(key, inputs.key), mean(value, inputs.value), (count > 0).reshape(-1))


def by_groups(kind: str, inputs: HeadInputs, config: LSGConfig) -> Selected:
    """Computes the selection of this name as sums over groups of a chunk's tokens; each token
    belongs to one representative or none. It avoids sorting, gathering and scattering, which are
    slow on accelerators."""
    factor = config.sparsity_factor
    chunk = config.selection_chunk if kind == "norm" else config.block_size
    count, place = chunk // factor, jnp.arange(chunk)[None]
    mask = inputs.mask.reshape(-1, chunk)  # [chunks, chunk]
    match kind:
        case "norm":
            group = count - 1 - ranks(_squares(inputs, chunk))
        case "pooling":
            group = jnp.where(mask, place // factor, count)
        case "stride":
            group = jnp.where(place % factor == inputs.head % factor, place // factor, count)
        case _:  # block_stride
            group = place - inputs.head % factor * count
    group = jnp.broadcast_to(group, mask.shape)
    real: Array = sum_groups(mask.astype(jnp.float32)[..., None], group, count)  # [chunks, R, 1]
    # Dividing a gradient by almost zero would be infinite in half precision.
    parts = jnp.where(real > 0, real + 1e-6, 1.0) if kind == "pooling" else 1.0

    def rows(x):
        total: Array = sum_groups(x.reshape(*mask.shape, -1), group, count)  # [chunks, R, H]
        total = total / parts
        return total.reshape(-1, x.shape[-1]).astype(x.dtype)

    return Selected(rows(inputs.key), rows(inputs.value), (real > 0).reshape(-1))


SELECTIONS = {f.__name__: f for f in (norm, pooling, lsh, stride, block_stride, bos_pooling)}
GROUPED = ("norm", "pooling", "stride", "block_stride")  # those that `by_groups` supports


def lsh_rotations(
    key: PRNGKeyArray, config: LSGConfig, *, num_heads: int, head_dim: int
) -> tuple[Float[Array, "N H _"], ...]:
    """Draws the rotations of every hashing round from a normal distribution: per round one array
    [heads, head width, buckets // 2]."""
    outputs = [config.selection_chunk] * config.lsh_num_pre_rounds + [
        config.selection_chunk // config.sparsity_factor
    ]
    keys = jax.random.split(key, len(outputs))
    return tuple(
        jax.random.normal(k, (num_heads, head_dim, buckets // 2))
        for k, buckets in zip(keys, outputs, strict=True)
    )


def effective_type(config: LSGConfig) -> str:
    """Returns the sparsity type that runs: "lsh" with one representative per chunk has nothing to
    hash, and the reference uses "bos_pooling" instead."""
    if config.sparsity_type == "lsh" and config.sparsity_factor == config.sparse_block_size:
        return "bos_pooling"
    return config.sparsity_type


def select(
    key: Float[Array, "B N T H"],
    value: Float[Array, "B N T H"],
    mask: Bool[Array, "B T"],
    *,
    config: LSGConfig,
    bos_query: Float[Array, "B N *blocks H"],
    bos_mask: Bool[Array, "B T"] | None = None,
    rotations: tuple[Float[Array, "N H _"], ...] | None = None,
) -> tuple[Float[Array, "B N R H"], Float[Array, "B N R H"], Bool[Array, "B N R"]]:
    """Returns the representatives of every head: a selection mapped over heads and batch.

    Args:
        key, value: projected keys and values of the non-global tokens, a whole number of blocks.
        mask: True for real tokens.
        config: pattern settings; with `sparsity_factor=1` every token is returned.
        bos_query: query of the first token, for "bos_pooling"; if a row has several texts, for each
            block that of its text's first token.
        bos_mask: what that query sees; `mask` by default.
        rotations: from `lsh_rotations`, for "lsh".

    Returns:
        Keys and values of the representatives, [B, N, R, H], and their mask, [B, N, R].

    Raises:
        ValueError: if the tokens cannot be split into the chunks that a selection needs, or "lsh"
            has no rotations.
    """
    batch, heads, length, _ = key.shape
    if config.sparsity_factor == 1:
        return key, value, jnp.broadcast_to(mask[:, None], (batch, heads, length))
    kind = effective_type(config)
    if kind in ("norm", "lsh") and length % config.selection_chunk:
        raise ValueError(
            f"sparsity_type={kind!r} needs a multiple of min(block_size, sparse_block_size) = "
            f"{config.selection_chunk} tokens, "
            f"got {length}; choose a sparse_block_size that divides block_size={config.block_size}."
        )
    if kind == "lsh" and rotations is None:
        raise ValueError(
            "sparsity_type='lsh' needs rotations: pass those of lsh_rotations(key, config, ...)."
        )
    inputs = HeadInputs(
        key,
        value,
        mask,
        jnp.arange(heads),
        bos_query,
        mask if bos_mask is None else bos_mask,
        tuple(rotations or ()) if kind == "lsh" else (),
    )
    # key, value, mask, head, bos_query, bos_mask, rotations: masks are the same for every head,
    # head numbers and rotations for every row of the batch.
    over_heads, over_batch = (0, 0, None, 0, 0, None, 0), (0, 0, 0, None, 0, 0, None)

    # On CPU choosing by norm with a sort took a third of the time of products with ones and zeros.
    grouped = kind in GROUPED and device_kind() != "cpu"
    selection = partial(by_groups, kind) if grouped else SELECTIONS[kind]

    def one_head(*fields):
        return selection(HeadInputs(*fields), config=config)

    chosen = jax.vmap(jax.vmap(one_head, in_axes=over_heads), in_axes=over_batch)(*inputs)
    return chosen.key, chosen.value, chosen.mask
