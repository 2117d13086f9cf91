"""LSG attention (arXiv 2210.15497) as pure functions of arrays: usable with any model, JAX library
or training loop.

`lsg_attention` costs time and memory linear in the number of tokens. `lsg_attention_reference`
computes the same pattern over all pairs of tokens: slow and obvious. Tests compare the two.
`full_attention` is ordinary attention in linear memory.

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


@sharding.with_auto_axes
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
    """Local + sparse + global attention (arXiv 2210.15497, section 3), linear in the number of
    tokens. Numbers are those of lsg_converter's LSGSelfAttention; docs/design.md lists differences.

    A query attends to its own block and both neighbouring blocks (only the previous one if causal),
    to `sparse_block_size` representatives on either side of those, and to the globals, under one
    softmax. Up to two blocks of tokens this is full attention.

    Under `jax.set_mesh` with a `sequence` axis each device computes its own blocks; devices
    exchange only the edges of their shards and what the globals see.

    Args:
        query, key, value: projected inputs of any length; this function pads them to whole blocks.
            key and value may have fewer heads (K divides N).
        mask: True for real tokens; by default all tokens are real. A query that sees no key gives
            zeros and zero gradients.
        config: the pattern. This function ignores `pool_with_global` and `mask_first_token`, which
            the models apply.
        causal: whether a token sees no later token. As in the reference, the outputs of prepended
            globals are then their own queries.
        global_tokens: "prepended": the first `config.num_global_tokens` positions are globals,
            outside the blocks; they see all tokens, and all tokens see them. "first_token": token 0
            of the sequence is the one global (the reference's standalone `attention_layers`).
            "none": no globals.
        dropout_rate: probability of dropping an attention weight; needs `dropout_key`.
        lsh_key: random key of the rotations for sparsity_type "lsh". By default a fixed seed, so
            that results are reproducible.
        lsh_rotations: the rotations themselves, instead of a key (see `sparsity.lsh_rotations`).
        implementation: "xla"; "pallas", the fused kernels for a TPU or an NVIDIA GPU;
            "pallas_interpret", the TPU kernels interpreted on any device, slowly. None picks the
            fastest implementation known to be correct on the device: "xla" on GPUs, where the
            kernels have never run.
        blocks_per_step: query blocks computed at once. It trades memory for parallelism and affects
            speed, not numerics.
        segment_ids: for several texts packed into one row, each starting at the start of a block: 1
            for the tokens of the first text, 2 for the second, 0 for padding. No text sees another,
            so each gives the outputs that it gives in a row of its own. Prepended globals have no
            entry here (see `num_segments`). Under jit, where values cannot be checked, a row with
            invalid segments gives NaN.
        num_segments: the largest number of texts in a row. Required with segment_ids and prepended
            globals: each text has its own globals, and those of the first text come first.

    Returns:
        The attended values, [B, T, N, H], in the dtype of `query`.

    Raises:
        ValueError: if shapes do not fit together (the message gives them), an array is not
            floating-point, or the settings do not allow the length.
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
    """Computes the attention of a sequence in shards over the ambient mesh.

    Every shard gets the first `split` tokens, the globals. `extra` padding tokens fill the last
    shard.
    """
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
    """`lsg_attention` without dropout, computed from the dense mask [tokens, tokens +
    representatives]. Its cost is quadratic: it is for tests and for reading.

    Args are those of `lsg_attention`.

    Raises:
        ValueError: as `lsg_attention`.
    """
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
    """Returns which query may see which key in `lsg_attention`, as a boolean matrix.

    Args:
        config: the pattern.
        length: number of tokens T, without prepended globals.
        causal, global_tokens: as in `lsg_attention`.

    Returns:
        [G + T, G + T + R]. Rows are globals, then tokens; columns are globals, tokens, then
        representatives. The representatives are those of the tokens padded to whole blocks; there
        are none up to two blocks. The rows of prepended globals are all True, or unused if causal.
    """
    return patterns.seen_by(LSG(config, causal, global_tokens), length)


@sharding.with_auto_axes
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
    """Ordinary attention of every query to every key (arXiv 1706.03762, section 3.2.1), in memory
    linear in the length (as in arXiv 2112.05682).

    Args:
        query: projected queries.
        key, value: projected keys and values; they may have fewer heads (K divides N).
        mask: True for keys that may be attended to; by default all.
        causal: whether query t sees only keys 0..t.
        dropout_rate: probability of dropping an attention weight; needs `dropout_key`.
        implementation: as in `lsg_attention`; on TPUs "pallas" uses JAX's kernels.
        segment_ids: for several texts packed into one row, which do not see each other: 1 for the
            tokens of the first text, 2 for the second, 0 for padding. Queries and keys must then be
            the same tokens.

    Returns:
        The attended values, [B, T, N, H], in the dtype of `query`.

    Raises:
        ValueError: if shapes do not fit together (the message gives them), or an array is not
            floating-point.
    """
    check = checked_arrays if segment_ids is None else partial(checked_tokens, segments=segment_ids)
    features, source = check(query, key, value, mask).features_first()
    run = Runtime(dropout_rate, dropout_key, implementation=implementation)
    return tokens_first(patterns.attention(Full(causal), features, source, run))


@sharding.with_auto_axes
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
    """Attention of each token to its window and the neighbouring windows, linear in the number of
    tokens. Options and numbers are those of local-attention 1.11.2 (`local_attention.py`).

    Under `jax.set_mesh` with a `sequence` axis each device computes its own windows; devices
    exchange only the edges of their shards.

    Args:
        query, key, value: projected inputs of any length; this function pads them to whole windows,
            and no query sees that padding. key and value may have fewer heads (K divides N).
        mask: True for real tokens; by default all tokens are real. A query that sees no key gives
            zeros and zero gradients.
        window_size: tokens per window.
        causal: whether a token sees no later token.
        look_backward, look_forward: how many windows before and after its own a token sees; by
            default one before, and one after unless causal.
        exact_windowsize: whether a token sees exactly `look_backward * window_size` tokens before
            its own position and `look_forward * window_size` after it, instead of whole windows.
        shared_qk: whether query and key are one array. Keys are then normalised to length 1, and a
            token sees itself only if it sees no other token.
        scale: factor of the scores; H ** -0.5 by default.
        use_rotary_pos_emb: whether to rotate queries and keys by their positions. As in the
            reference, queries get the positions of the last window that they see, not of their own.
        use_xpos, xpos_scale_base: whether to scale rotated queries and keys by their positions as
            well (xpos), and the base of that scale in tokens, by default half a window.
        attn_bias: added to the scores of each window, whose queries see W = (look_backward + 1 +
            look_forward) * window_size keys.
        dropout_rate: probability of dropping an attention weight; needs `dropout_key`.
        implementation: as in `lsg_attention`.
        blocks_per_step: windows computed at once. It trades memory for parallelism and affects
            speed, not numerics.
        segment_ids: for several texts packed into one row, as in `lsg_attention`; each text starts
            at the start of a window.

    Returns:
        The attended values, [B, T, N, H], in the dtype of `query`.

    Raises:
        ValueError: if shapes do not fit together (the message gives them), an array is not
            floating-point, or options contradict each other. Under jit, where values cannot be
            checked, a shared query and key that differ give NaN.
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


@sharding.with_auto_axes
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
    """`local_attention` with its options in two records, `pattern` and `run`; raises ValueError as
    it does."""
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
    """`attend_windows` without dropout, over all pairs of tokens. Its cost is quadratic: it is for
    tests and for reading.

    Raises:
        ValueError: if shapes do not fit together, or an array is not floating-point.
    """
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
    """The context if query and key are equal. If they differ: raises ValueError, or gives NaN under
    jit, where values cannot be checked."""
    if query is key:
        return context
    same = jnp.array_equal(query, key) if query.shape == key.shape else jnp.array(False)
    if isinstance(same, jax.core.Tracer):
        return jnp.where(same, context, jnp.nan)
    require(bool(same), "shared_qk=True needs one array as query and key; those given differ.")
    return context
