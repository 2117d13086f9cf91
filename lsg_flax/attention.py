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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax import patterns, sharding
from lsg_flax.checks import require
from lsg_flax.kernels import Implementation, Source, masked_softmax, pad, rows_to_fill
from lsg_flax.patterns import (
    LSG,
    Full,
    GlobalTokens,
    Runtime,
    check_shards,
    checked_arrays,
    checked_for,
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
    segment_ids: Int[Array, "B _"] | None = None,
    num_segments: int | None = None,
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
        implementation: "xla"; "pallas", the fused kernels of the device, a TPU or NVIDIA's GPU;
            "pallas_interpret", those for TPUs without one, slowly; None picks the fastest for the
            device that is known to be correct: on GPUs, where the kernels never ran, "xla".
        blocks_per_step: query blocks computed at once. Trades memory for parallelism; affects
            speed, not numerics.
        segment_ids: of several texts in one row, each beginning at a block: 1 for the tokens of the
            first, 2 of the second, 0 for padding. No text sees another; each has what it has alone
            in a row. Prepended globals are not numbered here, see `num_segments`. Under jit,
            where values cannot be read, rows of other texts give NaN.
        num_segments: how many texts a row has at most; each has its own prepended globals, those of
            the first text in front. Needed with both.

    Returns:
        The attended values in the dtype of `query`.

    Raises:
        ValueError: for shapes that do not fit together (they are named), integers, or a length
            that the settings do not allow.
    """
    pattern = LSG(config, causal, global_tokens, num_segments or 1)
    inputs = checked_for(pattern, (query, key, value, mask), segment_ids, num_segments)
    pattern = replace(pattern, filler=rows_to_fill(pattern.split))
    lsh = lsh_key if lsh_rotations is None else lsh_rotations
    run = Runtime(dropout_rate, dropout_key, lsh, implementation, blocks_per_step)
    (features, source), shards = inputs.features_first(), sharding.sequence_shards()
    split, length = pattern.split, query.shape[1] - pattern.split
    check_shards(segment_ids, shards)

    def attend(query, source, run):
        tokens = query.shape[-1] - split
        behind = partial(patterns.with_globals_behind, pattern)
        query, source = jax.tree.map(behind, (query, source))
        context = patterns.attention(pattern, query, source, run)
        parts = [context[..., tokens : tokens + split], context[..., :tokens]]
        return jnp.concatenate(parts, axis=-1)

    if shards == 1:
        context = tokens_first(attend(features, source, run))
        return patterns.only_of_texts(context, segment_ids, config.block_size)
    extra = pattern.config.needs_padding(length, shards)
    return tokens_first(_over_shards(attend, features, source, run, split, extra))


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
    segment_ids: Int[Array, "B _"] | None = None,
    num_segments: int | None = None,
) -> Float[Array, "B T N H"]:
    """`lsg_attention` without dropout, by the full [tokens, tokens + representatives] pattern:
    quadratic, for tests and reading."""
    pattern = LSG(config, causal, global_tokens, num_segments or 1)
    inputs = checked_for(pattern, (query, key, value, mask), segment_ids, num_segments)
    split, keys, values, texts = pattern.split, inputs.key, inputs.value, inputs.segments
    length = query.shape[1] - split
    heads = (*inputs.mask.shape[:1], query.shape[2], inputs.mask.shape[1])
    real = jnp.broadcast_to(inputs.mask[:, None], heads)  # [B, N, G + T]
    if config.is_sparse and length > 2 * config.block_size:
        run = Runtime(lsh=lsh_key if lsh_rotations is None else lsh_rotations)
        tokens = jax.tree.map(lambda x: x[..., split:], inputs.features_first())
        chosen = patterns.representatives_of(pattern, *patterns.pad_to_blocks(config, *tokens), run)
        keys = jnp.concatenate([keys, tokens_first(chosen.key)], axis=1)
        values = jnp.concatenate([values, tokens_first(chosen.value)], axis=1)
        real = jnp.concatenate([real, chosen.mask], axis=-1)
        if texts is not None and chosen.segments is not None:
            texts = jnp.concatenate([texts, chosen.segments[:, 0]], axis=-1)  # [B, G + T + R]
    seen = jnp.asarray(patterns.seen_by(pattern, length))[None, None] & real[:, :, None]
    if texts is not None:
        seen &= (texts[:, : query.shape[1], None] == texts[:, None])[:, None]
    scores = jnp.einsum("btnh,bsnh->bnts", query, keys).astype(jnp.float32)
    weights = masked_softmax(scores * query.shape[-1] ** -0.5, seen)
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
    return patterns.seen_by(LSG(config, causal, global_tokens), length)


def full_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B S"] | None = None,
    *,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Ordinary attention of every query to every key, in memory linear in the length.

    Args:
        key, value: they may have fewer heads (K divides N).
        mask: True for keys that may be attended to, all by default.
        causal: query t sees keys 0..t.
        implementation: as of `lsg_attention`; on TPUs "pallas" is JAX's kernels.
        segment_ids: of several texts in one row, which do not see each other: 1 for the tokens of
            the first, 2 of the second, 0 for padding. Queries and keys are then the same tokens.

    Raises:
        ValueError: for shapes that do not fit together (they are named), and integers.
    """
    check = checked_arrays if segment_ids is None else partial(checked_tokens, segments=segment_ids)
    features, source = check(query, key, value, mask).features_first()
    run = Runtime(dropout_rate, dropout_key, implementation=implementation)
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
    segment_ids: Int[Array, "B T"] | None = None,
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
        implementation: as of `lsg_attention`.
        blocks_per_step: windows computed at once. Trades memory for parallelism; affects speed, not
            numerics.
        segment_ids: of several texts in one row, each beginning at a window, as in `lsg_attention`.

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
    more = {"attn_bias": attn_bias, "run": run, "segment_ids": segment_ids}
    return attend_windows(query, key, value, mask, pattern=pattern, **more)


def attend_windows(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    pattern: Local,
    attn_bias: Float[Array, "N Q W"] | None = None,
    run: Runtime = ONE_DEVICE,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """`local_attention` with its options as two records."""
    inputs = checked_tokens(query, key, value, mask, segment_ids)
    _check_bias(pattern, attn_bias, query.shape[2])
    features, source = inputs.features_first()
    attend, shards = (
        partial(patterns.attend_locally, pattern, bias=attn_bias),
        sharding.sequence_shards(),
    )
    check_shards(segment_ids, shards)
    if shards == 1:
        context = attend(features, source, run)
    else:
        extra = pattern.needs_padding(query.shape[1], shards)
        context = _over_shards(attend, features, source, run, 0, extra)
    context = patterns.only_of_texts(tokens_first(context), segment_ids, pattern.window_size)
    return _if_shared(context, query, key) if pattern.shared_qk else context


def local_attention_reference(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    pattern: Local,
    attn_bias: Float[Array, "N Q W"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """`attend_windows` without dropout, by all pairs of tokens: quadratic, for tests and
    reading."""
    inputs = checked_tokens(query, key, value, mask, segment_ids)
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
    if segment_ids is not None:
        seen &= (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
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
