"""LSG attention (arXiv 2210.15497) as pure functions of arrays: usable with any model, JAX library
or training loop.

`lsg_attention` is the linear-cost computation, `lsg_attention_reference` the same pattern written
out over all pairs of tokens, slow and obvious; tests hold the first to the second. `full_attention`
is ordinary attention in linear memory.

Axes: B batch, T tokens, N heads, H head width, G global tokens, R sparse representatives. Arrays
are [B, T, N, H] in and out.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lsg_flax import sharding
from lsg_flax.kernels import Source, pad
from lsg_flax.patterns import (
    Dropout,
    GlobalTokens,
    Tokens,
    attend_features_first,
    attend_to_all,
    full_rows,
    pad_to_blocks,
    representatives_of,
    right_offset,
    rotations_of,
    sparsity,
)
from lsg_flax.patterns import LSGConfig as LSGConfig

Implementation = Literal["xla"]


def lsg_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    config: LSGConfig,
    causal: bool = False,
    global_tokens: GlobalTokens = "prepended",
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    lsh_key: PRNGKeyArray | None = None,
    lsh_rotations: tuple[Float[Array, "N H _"], ...] | None = None,
    implementation: Implementation | None = None,
    blocks_per_step: int | None = None,
) -> Float[Array, "B T N H"]:
    """Local + sparse + global attention, linear in the number of tokens.

    Under `jax.set_mesh` with a `sequence` axis each device computes its own blocks; devices
    exchange only the edges of their shards and what the globals see.

    A query attends to its own block and both neighbours (the previous one only, if causal), to
    `sparse_block_size` representatives on either side of those, and to the globals, under one
    softmax. Up to two blocks of tokens it is full attention.

    Args:
        query, key, value: projected inputs; key and value may have fewer heads (K divides N). Any
            length: they are padded to whole blocks here.
        mask: True for real tokens, all by default. A query that sees nothing gets zeros and passes
            no gradient.
        config: the pattern. `pool_with_global` and `mask_first_token` are carried out by models.
        causal: no token sees a later one. As in the reference, the outputs of prepended globals are
            then their queries.
        global_tokens: "prepended": the first `config.num_global_tokens` positions are globals,
            outside the blocks; they see and are seen by everything. "first_token": token 0 of the
            sequence is the one global (the reference's standalone `attention_layers`). "none": no
            globals.
        dropout_rate: probability of dropping an attention weight; needs `dropout_key`.
        lsh_key: for sparsity_type "lsh", the key its rotations are drawn from; a fixed seed by
            default, so that results repeat.
        lsh_rotations: the rotations themselves, instead of a key (see `sparsity.lsh_rotations`).
        implementation: None picks the fastest correct one for the device.
        blocks_per_step: query blocks computed at once. Trades memory for parallelism; affects
            speed, not numerics.

    Returns:
        The attended values in the dtype of `query`.

    Raises:
        ValueError: for shapes that do not fit together (both are named), or a length that the
            settings do not allow.
    """
    if implementation not in (None, "xla"):
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose 'xla', or None for the fastest."
        )
    inputs = _checked(query, key, value, mask, config, global_tokens)
    split = config.num_global_tokens if global_tokens == "prepended" else 0
    attend: Any = functools.partial(
        attend_features_first,
        config=config,
        causal=causal,
        global_tokens=global_tokens,
        dropout_rate=dropout_rate,
        blocks_per_step=blocks_per_step,
    )
    arrays = (*map(_features_first, inputs[:3]), inputs.mask)
    random = {"dropout_key": dropout_key, "lsh_key": lsh_key, "lsh_rotations": lsh_rotations}
    shards = sharding.sequence_shards()
    if shards == 1:
        return _tokens_first(attend(*arrays, **random))
    extra = config.needs_padding(inputs.mask.shape[1] - split, shards)
    return _tokens_first(_over_shards(attend, arrays, random, split=split, extra=extra))


def _over_shards(attend, arrays, random: dict[str, Any], *, split: int, extra: int):
    """`attend` of a whole sequence and `extra` padding, in shards over the ambient mesh: the
    globals go to each of them."""
    length = arrays[0].shape[-1]
    arrays = tuple(pad(x, 0, extra) for x in arrays)
    first, own = (
        tuple(x[..., part] for x in arrays) for part in (slice(split), slice(split, None))
    )

    def of_shard(first, own, random):
        whole = (jnp.concatenate(pair, axis=-1) for pair in zip(first, own, strict=True))
        context = attend(*whole, sequence_axis=sharding.SEQUENCE, **random)
        return context[..., :split], context[..., split:]

    run = sharding.over_sequence(of_shard, in_axes=(None, (3, 3, 3, 1), None), out_axes=(None, 3))
    return jnp.concatenate(run(first, own, random), axis=-1)[..., :length]


def lsg_attention_reference(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    config: LSGConfig,
    causal: bool = False,
    global_tokens: GlobalTokens = "prepended",
    lsh_key: PRNGKeyArray | None = None,
    lsh_rotations: tuple[Float[Array, "N H _"], ...] | None = None,
) -> Float[Array, "B T N H"]:
    """`lsg_attention` without dropout, by the full [tokens, tokens + representatives] pattern:
    quadratic, for tests and reading."""
    _, keys, values, real = inputs = _checked(query, key, value, mask, config, global_tokens)
    split = config.num_global_tokens if global_tokens == "prepended" else 0
    length = query.shape[1] - split
    real = jnp.broadcast_to(real[:, None], (*real.shape[:1], query.shape[2], real.shape[1]))
    if config.is_sparse and length > 2 * config.block_size:
        rotations = rotations_of(config, _features_first(query), lsh_key, lsh_rotations)
        query_, key_, value_ = (_features_first(x[:, split:]) for x in inputs[:3])
        tokens = Tokens(query_, key_, value_, inputs.mask[:, split:])
        padded = pad_to_blocks(tokens, config)
        key, value, chosen = representatives_of(padded, config, global_tokens, rotations)
        keys = jnp.concatenate([keys, _tokens_first(key)], axis=1)
        values = jnp.concatenate([values, _tokens_first(value)], axis=1)
        real = jnp.concatenate([real, chosen], axis=-1)  # [B, N, G + T + R]
    pattern = attention_pattern(config, length, causal=causal, global_tokens=global_tokens)
    scores = jnp.einsum("btnh,bsnh->bnts", query, keys).astype(jnp.float32)
    weights = sparsity.masked_softmax(
        scores * query.shape[-1] ** -0.5, jnp.asarray(pattern)[None, None] & real[:, :, None]
    )
    context = jnp.einsum("bnts,bsnh->btnh", weights.astype(values.dtype), values)
    if causal and split:
        context = context.at[:, :split].set(query[:, :split])
    return context.astype(query.dtype)


def attention_pattern(
    config: LSGConfig,
    length: int,
    *,
    causal: bool = False,
    global_tokens: GlobalTokens = "prepended",
) -> Bool[np.ndarray, "T S"]:
    """Which query may see which key: rows are globals and tokens, columns those and
    representatives.

    Args:
        length: tokens, without prepended globals.

    Returns:
        [G + T, G + T + R]; representatives are those of the tokens padded to whole blocks, none up
        to two blocks. The rows of prepended globals are all True, or unused if causal.
    """
    block, split = config.block_size, config.num_global_tokens * (global_tokens == "prepended")
    token, total = np.arange(length), split + length
    of = token[:, None] // block  # the block of each query
    blocked_path = length > 2 * block
    tokens = abs(of - token // block) <= 1 if blocked_path else np.ones((length, length), bool)
    if causal:
        tokens &= token <= token[:, None]
    if blocked_path and global_tokens == "first_token":
        tokens[:, 0] = True
    parts = [np.ones((length, split), bool), tokens]
    if blocked_path and config.is_sparse:
        step, wide = config.sparse_step, config.sparse_block_size
        unit = np.arange((length + config.needs_padding(length)) // config.sparsity_factor)
        left, right = (of - 1) * step - wide, of * step + right_offset(config)  # first ones seen
        sees_left = (left <= unit) & (unit < left + wide)
        sees_right = (right <= unit) & (unit < right + wide)
        parts.append(sees_left if causal else sees_left | sees_right)
    pattern = np.concatenate(parts, axis=1)  # [T, G + T + R]
    pattern = np.concatenate([np.zeros((split, pattern.shape[1]), bool), pattern])
    rows = full_rows(config, global_tokens) if blocked_path and not causal else split
    pattern[:rows] = np.arange(pattern.shape[1]) < total
    return pattern


def full_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "B S"] | None = None,
    *,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """Ordinary attention of every query to every key, in memory linear in the length.

    Args:
        mask: True for keys that may be attended to, all by default.
        causal: query t sees keys 0..t.
    """
    if mask is None:
        mask = jnp.ones(key.shape[:2], bool)
    source = Source(_features_first(key), _features_first(value), mask[:, None])
    dropout = Dropout.checked(dropout_rate, dropout_key)
    return _tokens_first(attend_to_all(_features_first(query), source, dropout, causal=causal))


class _Inputs(NamedTuple):
    query: Float[Array, "B T N H"]
    key: Float[Array, "B T N H"]
    value: Float[Array, "B T N H"]
    mask: Bool[Array, "B T"]


def _checked(query, key, value, mask, config: LSGConfig, global_tokens: GlobalTokens) -> _Inputs:
    if global_tokens not in ("prepended", "first_token", "none"):
        raise ValueError(
            f"global_tokens={global_tokens!r} is unknown; choose 'prepended', 'first_token' or "
            "'none'."
        )
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"query and key must be [batch, tokens, heads, head width], got {query.shape} and "
            f"{key.shape}."
        )
    if key.shape != value.shape:
        raise ValueError(
            f"key and value must have the same shape, got {key.shape} and {value.shape}."
        )
    same = (query.shape[0], query.shape[1], query.shape[3]) == (
        key.shape[0],
        key.shape[1],
        key.shape[3],
    )
    if not same or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query {query.shape} and key {key.shape} do not fit: batch, tokens and head width "
            "must agree, "
            "and the heads of key must divide those of query."
        )
    if mask is None:
        mask = jnp.ones(query.shape[:2], bool)
    if mask.shape != query.shape[:2] or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be boolean of shape {query.shape[:2]} (batch, tokens; True = real), got "
            f"{mask.dtype} {mask.shape}; "
            "make one from Hugging Face's 0/1 mask with mask.astype(bool)."
        )
    split = config.num_global_tokens if global_tokens == "prepended" else 0
    if query.shape[1] < split:
        raise ValueError(
            f"the first num_global_tokens={split} positions are the globals, but there are only "
            f"{query.shape[1]} positions."
        )
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (key, value))
    return _Inputs(query, key, value, mask)


def _features_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N H T"]:
    return x.transpose(0, 2, 3, 1)


def _tokens_first(x: Float[Array, "B N H T"]) -> Float[Array, "B T N H"]:
    return x.transpose(0, 3, 1, 2)
