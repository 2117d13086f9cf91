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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lsg_flax import blocked, halo, sharding, sparsity
from lsg_flax.blocked import Source, Spec, Window
from lsg_flax.config import LSGConfig as LSGConfig

GlobalTokens = Literal["prepended", "first_token", "none"]
Implementation = Literal["xla"]
DEFAULT_LSH_SEED = 0
FULL_ATTENTION_BLOCK = (
    256  # queries per block of full attention: affects speed and memory, not numerics
)


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


def attend_features_first(
    query: Float[Array, "B N H T"],
    key: Float[Array, "B N H S"],
    value: Float[Array, "B N H S"],
    mask: Bool[Array, "B S"],
    *,
    config: LSGConfig | None,
    causal: bool = False,
    global_tokens: GlobalTokens = "prepended",
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    lsh_key: PRNGKeyArray | None = None,
    lsh_rotations: tuple[Float[Array, "N H _"], ...] | None = None,
    blocks_per_step: int | None = None,
    sequence_axis: str | None = None,
) -> Float[Array, "B N H T"]:
    """`lsg_attention`, or without a config `full_attention`, on the layout they compute in.

    A model that projects straight to [B, N, H, T] saves the transposes, which are slow on CPU.
    Shapes are not checked here.

    Args:
        sequence_axis: inside `jax.shard_map`, the mesh axis that tokens are spread over. The arrays
            are this shard's: the prepended globals, the same in each, and whole blocks of tokens,
            at least as many as `config.needs_padding` asks for. Shards exchange their edges and
            add up what the globals see; nothing else moves.
    """
    if blocks_per_step is not None and blocks_per_step < 1:
        raise ValueError(f"blocks_per_step={blocks_per_step} must be at least 1, or None.")
    dropout = _Dropout.checked(dropout_rate, dropout_key)
    everything = Source(key, value, mask[:, None])
    if config is None:
        return _full(query, everything, dropout, causal=causal)
    axis, dropout = sequence_axis, dropout.of_shard(sequence_axis)
    split = config.num_global_tokens if global_tokens == "prepended" else 0
    short = axis is None and query.shape[-1] - split <= 2 * config.block_size
    if short:
        context = _full(query, everything, dropout, causal=causal)
    else:
        tokens = _Tokens(*(x[..., split:] for x in (query, key, value, mask)))
        shared = Source(*(x[..., : split or 1] for x in everything))
        if not split:  # the globals are in the first shard, if anywhere
            shared = Source(*(halo.of_first(x, axis) for x in shared))
        rotations = rotations_of(config, query, lsh_key, lsh_rotations)
        context = _block_rows(
            tokens, shared, config, causal, global_tokens, rotations, blocks_per_step, dropout, axis
        )
    if causal:  # as in the reference, the outputs of prepended globals are their raw queries
        of_tokens = context[..., split:] if short else context
        return jnp.concatenate([query[..., :split], of_tokens], axis=-1) if split else context
    rows = 0 if short else _full_rows(config, global_tokens)
    if rows:
        first = _full_over_shards(query[..., :rows], everything, split, dropout.other(), axis)
        if not split:
            first = jnp.where(halo.is_first(axis), first, context[..., :rows])
        context = jnp.concatenate([first, context[..., rows - split :]], axis=-1)
    return context


def _full_over_shards(query, source: Source, split: int, dropout: "_Dropout", axis: str | None):
    """Full attention of the globals: the `split` prepended ones, or the first token."""
    if axis is None:
        return _full(query, source, dropout)
    if split:  # every shard has them: they are keys once
        is_key = (jnp.arange(source.mask.shape[-1]) >= split) | halo.is_first(axis)
        source = source._replace(mask=source.mask & is_key[None, None])
    first = query if split else halo.of_first(query, axis)
    spec = _full_spec(first, dropout)
    parts = blocked.attend_in_part(_scaled(first), (), source, spec, dropout.key)
    return halo.combined(*parts, axis)


def _over_shards(attend, arrays, random: dict[str, Any], *, split: int, extra: int):
    """`attend` of a whole sequence and `extra` padding, in shards over the ambient mesh: the
    globals go to each of them."""
    length = arrays[0].shape[-1]
    arrays = tuple(blocked.pad(x, 0, extra) for x in arrays)
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
        tokens = _Tokens(query_, key_, value_, inputs.mask[:, split:])
        padded = _padded(tokens, config)
        key, value, chosen = _representatives(padded, config, global_tokens, rotations)
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
        left, right = (of - 1) * step - wide, of * step + _right_offset(config)  # first ones seen
        sees_left = (left <= unit) & (unit < left + wide)
        sees_right = (right <= unit) & (unit < right + wide)
        parts.append(sees_left if causal else sees_left | sees_right)
    pattern = np.concatenate(parts, axis=1)  # [T, G + T + R]
    pattern = np.concatenate([np.zeros((split, pattern.shape[1]), bool), pattern])
    full_rows = _full_rows(config, global_tokens) if blocked_path and not causal else split
    pattern[:full_rows] = np.arange(pattern.shape[1]) < total
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
    dropout = _Dropout.checked(dropout_rate, dropout_key)
    return _tokens_first(_full(_features_first(query), source, dropout, causal=causal))


def _full(query, source: Source, dropout: "_Dropout", *, causal: bool = False):
    spec = _full_spec(query, dropout, causal=causal)
    return blocked.attend(_scaled(query), (), source, spec, dropout.key)


def _full_spec(query, dropout: "_Dropout", *, causal: bool = False) -> Spec:
    block = min(query.shape[-1], FULL_ATTENTION_BLOCK)
    return Spec(block, shared_causal=causal, dropout_rate=dropout.rate)


class _Dropout(NamedTuple):
    rate: float
    key: PRNGKeyArray | None

    @classmethod
    def checked(cls, rate: float, key: PRNGKeyArray | None) -> "_Dropout":
        """Raises ValueError for a rate outside [0, 1), or one without a key."""
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout_rate={rate} must lie in [0, 1).")
        if rate and key is None:
            raise ValueError(f"dropout_rate={rate} needs a dropout_key.")
        return cls(rate, key if rate else None)

    def of_shard(self, axis: str | None) -> "_Dropout":
        """The same rate with a key of the shard's own."""
        return self._replace(key=halo.folded(self.key, axis))

    def other(self) -> "_Dropout":
        """The same rate with an independent key."""
        return self if self.key is None else self._replace(key=jax.random.fold_in(self.key, 1))


class _Inputs(NamedTuple):
    query: Float[Array, "B T N H"]
    key: Float[Array, "B T N H"]
    value: Float[Array, "B T N H"]
    mask: Bool[Array, "B T"]


class _Tokens(NamedTuple):
    """The part of the inputs that is cut into blocks, features first."""

    query: Float[Array, "B N H T"]
    key: Float[Array, "B N H T"]
    value: Float[Array, "B N H T"]
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


def rotations_of(config: LSGConfig, query, key: PRNGKeyArray | None, rotations=None):
    """What "lsh" hashes with: the rotations given, or those of a key, or of a fixed seed; None for
    other types. `query` is [B, N, H, T]."""
    if not config.is_sparse or sparsity.effective_type(config) != "lsh" or rotations is not None:
        return rotations
    key = jax.random.key(DEFAULT_LSH_SEED) if key is None else key
    return sparsity.lsh_rotations(key, config, num_heads=query.shape[1], head_dim=query.shape[2])


def _full_rows(config: LSGConfig, global_tokens: GlobalTokens) -> int:
    """How many first positions attend to everything, in the bidirectional pattern."""
    if global_tokens == "prepended":
        return config.num_global_tokens
    # The reference's bos_pooling gives token 0 the full row that it computed for the weights,
    # whether globals are wanted or not.
    forced = config.strict_reference and config.is_sparse
    return int(global_tokens == "first_token" or (forced and config.sparsity_type == "bos_pooling"))


def _padded(tokens: _Tokens, config: LSGConfig) -> _Tokens:
    extra = config.needs_padding(tokens.query.shape[-1])
    return _Tokens(*(blocked.pad(x, 0, extra) for x in tokens))


def _right_offset(config: LSGConfig) -> int:
    """First representative of block 0's right-hand window. At one representative per block the
    reference starts at the block itself."""
    return 2 * config.sparse_step if config.sparse_step > 1 else 0


def _representatives(
    tokens: _Tokens,
    config: LSGConfig,
    global_tokens: GlobalTokens,
    rotations,
    axis: str | None = None,
):
    """Of whole blocks of tokens: keys and values [B, N, H, R], mask [B, N, R]."""
    mask = tokens.mask
    if global_tokens == "first_token":
        mask = mask & ~_is_first_token(mask, axis)
    key, value, chosen = sparsity.select(
        tokens.key.swapaxes(2, 3),
        tokens.value.swapaxes(2, 3),
        mask,
        config=config,
        bos_query=first_query(tokens.query, tokens.mask, config, axis),
        bos_mask=tokens.mask,
        rotations=rotations,
    )
    standalone_pooling = config.sparsity_type == "pooling" and global_tokens != "prepended"
    if config.strict_reference and standalone_pooling and config.sparsity_factor > 1:
        # The standalone layers' mean of masks overflows, which unmasks groups of padding.
        chosen = jnp.ones_like(chosen)
    return key.swapaxes(2, 3), value.swapaxes(2, 3), chosen


def _is_first_token(mask: Bool[Array, "B T"], axis: str | None) -> Bool[Array, "1 T"]:
    return (jnp.arange(mask.shape[1])[None] == 0) & halo.is_first(axis)


def first_query(
    query: Float[Array, "B N H T"],
    mask: Bool[Array, "B T"],
    config: LSGConfig,
    axis: str | None = None,
) -> Float[Array, "B N H"]:
    """The query that "bos_pooling" weighs with: of the first real token, so that left padding does
    not leak. The reference's is that of position 0, which counts as real under mask_first_token."""
    if config.strict_reference or config.mask_first_token:
        return halo.of_first(query[..., 0], axis)
    first = jnp.argmax(mask, axis=1)[:, None, None, None]  # [B, 1, 1, 1]
    chosen = jnp.take_along_axis(query, first, axis=-1)[..., 0]
    return halo.of_first_true(chosen, mask.any(axis=1), axis)


def _block_rows(
    tokens: _Tokens,
    shared: Source,
    config: LSGConfig,
    causal: bool,
    global_tokens: GlobalTokens,
    rotations,
    blocks_per_step: int | None,
    dropout: _Dropout,
    axis: str | None,
) -> Float[Array, "B N H T"]:
    """Context of the tokens in blocks."""
    block, wide, length = config.block_size, config.sparse_block_size, tokens.query.shape[-1]
    tokens = _padded(tokens, config)
    mask = tokens.mask
    if global_tokens == "first_token":
        mask = mask & ~_is_first_token(mask, axis)  # seen once, as the global
    local = Source(tokens.key, tokens.value, mask[:, None])
    sources = [_extended(local, block, causal, axis)]
    windows = [Window(0, 0, block, (2 if causal else 3) * block, causal=causal)]
    if config.is_sparse:
        step, halo_size = config.sparse_step, config.sparse_halo
        chosen = Source(*_representatives(tokens, config, global_tokens, rotations, axis))
        sources.append(_extended(chosen, halo_size, causal, axis))
        windows.append(Window(1, 0, step, wide))
        if not causal:
            windows.append(Window(1, halo_size + _right_offset(config), step, wide))
    spec = Spec(block, tuple(windows), False, blocks_per_step or 0, dropout.rate)
    globals_ = None if global_tokens == "none" else shared
    context = blocked.attend(_scaled(tokens.query), tuple(sources), globals_, spec, dropout.key)
    return context[..., :length]


def _extended(source: Source, size: int, causal: bool, axis: str | None) -> Source:
    """A source between the `size` keys in front of it and, if they may be seen, those behind."""
    after = 0 if causal else size
    return Source(*(halo.extended(x, size, after, axis) for x in source))


def _scaled(query: Float[Array, "B N H T"]) -> Float[Array, "B N H T"]:
    return query * query.shape[2] ** -0.5


def _features_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N H T"]:
    return x.transpose(0, 2, 3, 1)


def _tokens_first(x: Float[Array, "B N H T"]) -> Float[Array, "B T N H"]:
    return x.transpose(0, 3, 1, 2)
