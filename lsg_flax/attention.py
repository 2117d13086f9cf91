"""LSG attention (arXiv 2210.15497) as pure functions of arrays: usable with any model, JAX library
or training loop.

`lsg_attention` is the linear-cost computation, `lsg_attention_reference` the same pattern written
out over all pairs of tokens, slow and obvious; tests hold the first to the second. `full_attention`
is ordinary attention in linear memory.

Axes: B batch, T tokens, S keys, N heads, K key heads, H head width, G global tokens, R
representatives. Arrays are [B, T, N, H] in and out.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lsg_flax import patterns, sharding
from lsg_flax.kernels import Implementation, Source, masked_softmax, pad
from lsg_flax.patterns import LSG, Full, GlobalTokens, Runtime
from lsg_flax.patterns import LSGConfig as LSGConfig


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
        ValueError: for shapes that do not fit together (they are named), integers, or a length
            that the settings do not allow.
    """
    inputs = _checked(query, key, value, mask, config, global_tokens)
    pattern = LSG(config, causal, global_tokens)
    lsh = lsh_key if lsh_rotations is None else lsh_rotations
    run = Runtime(dropout_rate, dropout_key, lsh, implementation, blocks_per_step)
    (features, source), shards = inputs.features_first(), sharding.sequence_shards()
    if shards == 1:
        return _tokens_first(patterns.attention(pattern, features, source, run))
    return _tokens_first(_over_shards(pattern, features, source, run, shards))


def _over_shards(
    pattern: LSG, query: Float[Array, "B N H T"], source: Source, run: Runtime, shards: int
) -> Float[Array, "B N H T"]:
    """The attention of a whole sequence in shards over the ambient mesh: the globals go to each of
    them."""
    length, split = query.shape[-1], pattern.split
    extra = pattern.config.needs_padding(length - split, shards)
    arrays = jax.tree.map(lambda x: pad(x, 0, extra), (query, source))
    first, own = (
        jax.tree.map(lambda x, part=part: x[..., part], arrays)
        for part in (slice(split), slice(split, None))
    )

    def of_shard(first, own, random):
        query, source = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=-1), first, own)
        key, lsh = random
        shard_run = replace(run, dropout_key=key, lsh=lsh, sequence_axis=sharding.SEQUENCE)
        context = patterns.attention(pattern, query, source, shard_run)
        return context[..., :split], context[..., split:]

    cut = jax.tree.map(lambda x: x.ndim - 1, own)
    sharded = sharding.over_sequence(of_shard, in_axes=(None, cut, None), out_axes=(None, 3))
    context = jnp.concatenate(sharded(first, own, (run.dropout_key, run.lsh)), axis=-1)
    return context[..., :length]


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
    inputs = _checked(query, key, value, mask, config, global_tokens)
    pattern = LSG(config, causal, global_tokens)
    split, keys, values = pattern.split, inputs.key, inputs.value
    length = query.shape[1] - split
    heads = (*inputs.mask.shape[:1], query.shape[2], inputs.mask.shape[1])
    real = jnp.broadcast_to(inputs.mask[:, None], heads)  # [B, N, G + T]
    if config.is_sparse and length > 2 * config.block_size:
        run = Runtime(lsh=lsh_key if lsh_rotations is None else lsh_rotations)
        tokens = jax.tree.map(lambda x: x[..., split:], inputs.features_first())
        chosen = patterns.representatives_of(pattern, *patterns.pad_to_blocks(config, *tokens), run)
        keys = jnp.concatenate([keys, _tokens_first(chosen.key)], axis=1)
        values = jnp.concatenate([values, _tokens_first(chosen.value)], axis=1)
        real = jnp.concatenate([real, chosen.mask], axis=-1)  # [B, N, G + T + R]
    seen = attention_pattern(config, length, causal=causal, global_tokens=global_tokens)
    scores = jnp.einsum("btnh,bsnh->bnts", query, keys).astype(jnp.float32)
    weights = masked_softmax(
        scores * query.shape[-1] ** -0.5, jnp.asarray(seen)[None, None] & real[:, :, None]
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
    whole = LSG(config, causal, global_tokens)
    block, split = config.block_size, whole.split
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
        left, right = (
            (of - 1) * step - wide,
            of * step + patterns.right_offset(config),
        )  # first ones seen
        sees_left = (left <= unit) & (unit < left + wide)
        sees_right = (right <= unit) & (unit < right + wide)
        parts.append(sees_left if causal else sees_left | sees_right)
    pattern = np.concatenate(parts, axis=1)  # [T, G + T + R]
    pattern = np.concatenate([np.zeros((split, pattern.shape[1]), bool), pattern])
    rows = whole.full_rows if blocked_path and not causal else split
    pattern[:rows] = np.arange(pattern.shape[1]) < total
    return pattern


def full_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B S"] | None = None,
    *,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """Ordinary attention of every query to every key, in memory linear in the length.

    Args:
        key, value: they may have fewer heads (K divides N).
        mask: True for keys that may be attended to, all by default.
        causal: query t sees keys 0..t.

    Raises:
        ValueError: for shapes that do not fit together (they are named), and integers.
    """
    features, source = _checked_arrays(query, key, value, mask).features_first()
    run = Runtime(dropout_rate, dropout_key)
    return _tokens_first(patterns.attention(Full(causal), features, source, run))


class _Arrays(NamedTuple):
    query: Float[Array, "B T N H"]
    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]
    mask: Bool[Array, "B S"]

    def features_first(self) -> tuple[Float[Array, "B N H T"], Source]:
        query, key, value = map(_features_first, self[:3])
        return query, Source(key, value, self.mask[:, None])


def _checked(query, key, value, mask, config: LSGConfig, global_tokens: GlobalTokens) -> _Arrays:
    if global_tokens not in ("prepended", "first_token", "none"):
        raise ValueError(
            f"global_tokens={global_tokens!r} is unknown; choose 'prepended', 'first_token' or "
            "'none'."
        )
    if query.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"query {query.shape} and key {key.shape} must have the same batch and tokens."
        )
    arrays = _checked_arrays(query, key, value, mask)
    split = config.num_global_tokens if global_tokens == "prepended" else 0
    if query.shape[1] < split:
        raise ValueError(
            f"the first num_global_tokens={split} positions are the globals, but there are only "
            f"{query.shape[1]} positions."
        )
    return arrays


def _checked_arrays(query, key, value, mask) -> _Arrays:
    """The arrays with a mask, and a key head for each head of the queries.

    Raises:
        ValueError: for shapes that do not fit together, and dtypes that are none of attention's.
    """
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"
    if {query.ndim, key.ndim, value.ndim} != {4}:
        raise ValueError(
            f"query, key and value must be [batch, tokens, heads, width], not {shapes}."
        )
    if 0 in (*query.shape, *key.shape):
        raise ValueError(f"every axis must have at least one entry, but there are {shapes}.")
    if key.shape != value.shape:
        raise ValueError(
            f"key and value must have the same shape, got {key.shape} and {value.shape}."
        )
    if query.shape[::3] != key.shape[::3] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{shapes} do not fit: batch and width must agree, and the heads of key must divide "
            "those of query."
        )
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {array.dtype}, but attention is of real numbers; give float32, "
                "bfloat16 or float16, for example by astype(jnp.float32)."
            )
    if mask is None:
        mask = jnp.ones(key.shape[:2], bool)
    if mask.shape != key.shape[:2] or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be boolean of shape {key.shape[:2]} (batch, tokens; True = real), got "
            f"{mask.dtype} {mask.shape}; "
            "make one from Hugging Face's 0/1 mask with mask.astype(bool)."
        )
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (key, value))
    return _Arrays(query, key, value, mask)


def _features_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N H T"]:
    return x.transpose(0, 2, 3, 1)


def _tokens_first(x: Float[Array, "B N H T"]) -> Float[Array, "B T N H"]:
    return x.transpose(0, 3, 1, 2)
