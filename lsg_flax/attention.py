"""LSG attention (arXiv 2210.15497) as pure functions of arrays: usable with any model, JAX library
or training loop.

`lsg_attention` is the linear-cost computation, `lsg_attention_reference` the same pattern written
out over all pairs of tokens, slow and obvious; tests hold the first to the second. `full_attention`
is ordinary attention in linear memory.

Axes: B batch, T tokens, S keys, N heads, K key heads, H head width, G global tokens, R
representatives, Q queries of a block, W keys of a block's windows. Arrays are [B, T, N, H] in and
out.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lsg_flax import patterns, sharding
from lsg_flax.checks import require
from lsg_flax.kernels import Implementation, Source, masked_softmax, pad
from lsg_flax.patterns import (
    LSG,
    Arrays,
    Full,
    GlobalTokens,
    Runtime,
    checked_arrays,
    checked_tokens,
    features_first,
    rotary_of,
    tokens_first,
)
from lsg_flax.patterns import Local as Local
from lsg_flax.patterns import LSGConfig as LSGConfig

ONE_DEVICE = Runtime()


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
        implementation: "xla"; "pallas", the fused kernels for TPUs; "pallas_interpret", the same
            without a TPU, slowly; None picks the fastest correct one for the device.
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
    attend = partial(patterns.attention, pattern)
    if shards == 1:
        return tokens_first(attend(features, source, run))
    extra = pattern.config.needs_padding(features.shape[-1] - pattern.split, shards)
    return tokens_first(_over_shards(attend, features, source, run, pattern.split, extra))


def _over_shards(
    attend: Callable[[Float[Array, "B N H T"], Source, Runtime], Float[Array, "B N H T"]],
    query: Float[Array, "B N H T"],
    source: Source,
    run: Runtime,
    split: int,
    extra: int,
) -> Float[Array, "B N H T"]:
    """The attention of a whole sequence in shards over the ambient mesh: the first `split` tokens,
    its globals, go to each of them, and `extra` ones fill the last."""
    length = query.shape[-1]
    arrays = jax.tree.map(lambda x: pad(x, 0, extra), (query, source))
    first, own = (
        jax.tree.map(lambda x, part=part: x[..., part], arrays)
        for part in (slice(split), slice(split, None))
    )

    def of_shard(first, own, random):
        query, source = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=-1), first, own)
        key, lsh = random
        shard_run = replace(run, dropout_key=key, lsh=lsh, sequence_axis=sharding.SEQUENCE)
        context = attend(query, source, shard_run)
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
        keys = jnp.concatenate([keys, tokens_first(chosen.key)], axis=1)
        values = jnp.concatenate([values, tokens_first(chosen.value)], axis=1)
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
    features, source = checked_arrays(query, key, value, mask).features_first()
    run = Runtime(dropout_rate, dropout_key)
    return tokens_first(patterns.attention(Full(causal), features, source, run))


def local_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    window_size: int,
    causal: bool = False,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_windowsize: bool = False,
    shared_qk: bool = False,
    scale: float | None = None,
    use_rotary_pos_emb: bool = True,
    use_xpos: bool = False,
    xpos_scale_base: float | None = None,
    attn_bias: Float[Array, "N Q W"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
    blocks_per_step: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention within windows of tokens and their neighbours, linear in the number of tokens: that
    of local-attention 1.11.2 (`local_attention.py`), whose option names it has.

    Under `jax.set_mesh` with a `sequence` axis each device computes its own windows; devices
    exchange only the edges of their shards.

    Args:
        query, key, value: projected inputs; key and value may have fewer heads (K divides N). Any
            length: they are padded to whole windows here, and no query sees that padding.
        mask: True for real tokens, all by default. A query that sees nothing gets zeros and passes
            no gradient.
        window_size: tokens of a window.
        causal: no token sees a later one.
        look_backward, look_forward: how many windows before and behind its own a token sees; by
            default one before, and one behind unless causal.
        exact_windowsize: a token sees `look_backward * window_size` tokens before its own place and
            `look_forward * window_size` behind it, rather than whole windows.
        shared_qk: query and key are one array; keys are brought to length 1, and a token sees
            itself only if it sees nothing else.
        scale: of the scores; H ** -0.5 by default.
        use_rotary_pos_emb: rotate queries and keys by their places. As in the reference, queries
            stand in the last window that they see, wherever their own is.
        use_xpos, xpos_scale_base: change their lengths too (xpos); the base is by default half a
            window.
        attn_bias: added to the scores of each window, whose queries see W = (look_backward + 1 +
            look_forward) * window_size keys.
        dropout_rate: probability of dropping an attention weight; needs `dropout_key`.
        implementation: None picks the fastest correct one for the device.
        blocks_per_step: windows computed at once. Trades memory for parallelism; affects speed, not
            numerics.

    Returns:
        The attended values in the dtype of `query`.

    Raises:
        ValueError: for shapes that do not fit together (they are named), integers, or options that
            do not fit. Under jit, where values cannot be read, a shared query and key that differ
            give NaN.
    """
    forward = look_forward if look_forward is not None else int(not causal)
    rotary = rotary_of(
        query.shape[-1],
        window_size,
        used=use_rotary_pos_emb,
        xpos=use_xpos,
        base=xpos_scale_base,
    )
    windows = (window_size, causal, look_backward, forward)
    pattern = Local(*windows, exact_windowsize, shared_qk, scale, rotary)
    run = Runtime(dropout_rate, dropout_key, None, implementation, blocks_per_step)
    return attend_windows(query, key, value, mask, pattern=pattern, attn_bias=attn_bias, run=run)


def attend_windows(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    pattern: Local,
    attn_bias: Float[Array, "N Q W"] | None = None,
    run: Runtime = ONE_DEVICE,
) -> Float[Array, "B T N H"]:
    """`local_attention` with its options as two records."""
    inputs = checked_tokens(query, key, value, mask)
    _check_bias(pattern, attn_bias, query.shape[2])
    features, source = inputs.features_first()
    attend, shards = (
        partial(patterns.attend_locally, pattern, bias=attn_bias),
        sharding.sequence_shards(),
    )
    if shards == 1:
        context = attend(features, source, run)
    else:
        extra = pattern.needs_padding(query.shape[1], shards)
        context = _over_shards(attend, features, source, run, 0, extra)
    context = tokens_first(context)
    return _if_shared(context, query, key) if pattern.shared_qk else context


def local_attention_reference(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    pattern: Local,
    attn_bias: Float[Array, "N Q W"] | None = None,
) -> Float[Array, "B T N H"]:
    """`attend_windows` without dropout, by all pairs of tokens: quadratic, for tests and
    reading."""
    inputs = checked_tokens(query, key, value, mask)
    length, size, forward = query.shape[1], pattern.window_size, pattern.look_forward
    query, keys = query.astype(jnp.float32), inputs.key.astype(jnp.float32)
    if pattern.shared_qk:
        keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    if pattern.rotary is not None:
        turn = partial(pattern.rotary.rotate, window=length, centre=0)
        query = tokens_first(turn(features_first(query), first=forward * size, sign=1))
        keys = tokens_first(turn(features_first(keys), first=0, sign=-1))
    scores = jnp.einsum("btnh,bsnh->bnts", query, keys)
    scores *= query.shape[-1] ** -0.5 if pattern.scale is None else pattern.scale
    place, other = np.arange(length)[:, None], np.arange(length)[None]
    apart = other // size - place // size
    seen = (apart >= -pattern.look_backward) & (apart <= forward)
    if attn_bias is not None:
        column = np.where(seen, other - (place // size - pattern.look_backward) * size, 0)
        scores += attn_bias[None, :, place % size, column]
    if pattern.exact_windowsize:
        seen &= (other >= place - pattern.look_backward * size) & (other <= place + forward * size)
    if pattern.causal:
        seen &= other <= place
    seen = jnp.asarray(seen)[None, None] & inputs.mask[:, None, None]  # [B, 1, T, T]
    if pattern.shared_qk:
        others = jnp.asarray(other != place)[None, None]
        seen &= others | ~(seen & others).any(axis=-1, keepdims=True)  # itself if it is alone
    weights = masked_softmax(scores, seen)
    return jnp.einsum("bnts,bsnh->btnh", weights, inputs.value).astype(inputs.query.dtype)


def _check_bias(pattern: Local, bias, heads: int) -> None:
    wanted = (heads, pattern.window_size, pattern.windows_seen * pattern.window_size)
    require(
        bias is None or bias.shape == wanted,
        f"attn_bias must be [heads, window, keys that a window sees] = {wanted}, got "
        f"{None if bias is None else bias.shape}.",
    )


def _if_shared(context: Float[Array, "B T N H"], query, key) -> Float[Array, "B T N H"]:
    """The context if query and key are one array; NaN where only the run can tell that they are
    not."""
    if query is key:
        return context
    same = jnp.array_equal(query, key) if query.shape == key.shape else jnp.array(False)
    if isinstance(same, jax.core.Tracer):
        return jnp.where(same, context, jnp.nan)
    require(bool(same), "shared_qk=True is for one array as query and key; those given differ.")
    return context


def _checked(query, key, value, mask, config: LSGConfig, global_tokens: GlobalTokens) -> Arrays:
    if global_tokens not in ("prepended", "first_token", "none"):
        raise ValueError(
            f"global_tokens={global_tokens!r} is unknown; choose 'prepended', 'first_token' or "
            "'none'."
        )
    arrays = checked_tokens(query, key, value, mask)
    split = config.num_global_tokens if global_tokens == "prepended" else 0
    if query.shape[1] < split:
        raise ValueError(
            f"the first num_global_tokens={split} positions are the globals, but there are only "
            f"{query.shape[1]} positions."
        )
    return arrays
