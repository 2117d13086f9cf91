"""LSG attention by two fused kernels for TPUs: prepares their inputs, decides when they are used,
and defines their gradient.

The kernels read arrays with tokens first, [B, T, D] with concatenated heads, and one additive row
per block that hides keys; everything else of the pattern is computed on the chip.

Axes: B batch, N heads, H head width, T tokens, S keys, G global tokens, R representatives, W keys
of a block's windows, D model width.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lsg_flax.kernels import spread, tpu_backward, tpu_forward, tpu_plan, tpu_step, tpu_turn
from lsg_flax.kernels.device import device_kind
from lsg_flax.kernels.engine import Implementation, accepts, is_fused
from lsg_flax.kernels.spec import Axes, Source, Spec, Window
from lsg_flax.kernels.tpu_plan import LANES, FusedArrays, FusedPlan, FusedSpec
from lsg_flax.kernels.windows import cut_window, pad
from lsg_flax.kernels.xla import ATTENDED


def plan_fused(
    spec: FusedSpec,
    query: Float[Array, "B N H T"],
    shared: Source | None,
    implementation: Implementation | None,
    *,
    axes: Axes = ((), ()),
    extended: bool = False,
    behind: int = 0,
) -> FusedPlan | None:
    """Returns how the TPU kernels compute a call; None if `attend` does, by XLA or GPU kernels.

    Args:
        spec: the pattern.
        query: queries of the tokens, without globals and without padding to whole blocks.
        shared: keys that every query sees.
        implementation: what the caller requests.
        axes: mesh axes that rows and heads may be sharded over.
        extended: whether keys will include those of neighbouring shards.
        behind: how many of `shared` may be passed after the tokens instead, as queries too.
            `FusedPlan.behind` says whether they must be: only if one range has all tokens.

    Raises:
        ValueError: for implementation="pallas" if there is no TPU or GPU, or the kernels do not
            support the case.
    """
    kind = device_kind()
    on_tpu, interpret = "tpu" in kind, implementation == "pallas_interpret"
    if not is_fused(implementation):
        return None
    batch, heads, width, length = query.shape
    group = max(1, LANES // width)
    row_axes, head_axes = spread.axes_that_divide(axes, batch, heads, group)
    tile = tpu_plan.tile("bfloat16")
    plan = FusedPlan(
        spec,
        blocks=-(-length // spec.block),
        shared=0 if shared is None else -(-shared.mask.shape[-1] // tile) * tile,
        heads=tpu_plan.padded_heads(heads, width),
        all_heads=heads,
        width=width,
        dtype=query.dtype.name,
        row_axes=row_axes,
        head_axes=head_axes,
        extended=extended,
        interpret=interpret,
        behind=0 if extended else behind,
    )
    plan = tpu_plan.cut_to_fit(plan, kind) if on_tpu else plan
    refused = tpu_plan.refusal(plan, kind if on_tpu else None)
    return plan if accepts(implementation, refused) else None


def attend_fused(
    plan: FusedPlan,
    query: Float[Array, "B N H T"],
    source: Source,
    shared: Source | None = None,
    given: Source | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B N H T"]:
    """Returns the context of tokens in whole blocks, and of `plan.behind` globals after them; see
    `attend`.

    Args:
        plan: from `plan_fused`.
        query: unscaled queries.
        source: keys and values of the same tokens; `mask` is False for those that windows and
            representatives must hide. If `plan.extended`, with `plan.before` blocks before them and
            `plan.after` blocks after them.
        shared: keys that every query sees, if they are not after the tokens.
        given: representatives of the same blocks, for `Selecting.kind` "given".
        key: random key of dropout.
    """
    if plan.ranges > 1:
        return _in_ranges(plan, query, source, shared, given, key)
    seeds = jnp.zeros(2, jnp.uint32) if key is None else jax.random.bits(key, (2,), jnp.uint32)
    seeds = jnp.append(seeds, jnp.uint32(0))
    real = pad(source.mask[:, 0], 0, plan.blocks_behind * plan.block - plan.behind)
    real = real.reshape(query.shape[0], -1, plan.block)
    arrays = FusedArrays(
        seeds=seeds,
        numbers=jnp.arange(plan.heads, dtype=jnp.int32),
        query=_tokens_first(plan, query),
        key=_tokens_first(plan, source.key),
        value=_tokens_first(plan, source.value),
        real=real.astype(jnp.float32),
        hidden=_hidden(plan, source.mask, shared, given),
        shared=None if shared is None else _visible_rows(plan, shared, plan.shared),
        given=None if given is None else _visible_rows(plan, given, given.mask.shape[-1]),
        turns=tpu_turn.tables(plan),
    )
    context = _on_devices(plan, arrays)  # [B, T, D]
    batch, heads, width, length = query.shape
    context = context.reshape(batch, length, plan.heads, width)[:, :, :heads]
    return context.transpose(0, 2, 3, 1)


def _in_ranges(plan: FusedPlan, query, source, shared, given, key) -> Float[Array, "B N H T"]:
    """Runs `attend_fused` on ranges of tokens, with the edges of neighbouring ranges, as rows of
    the batch."""
    batch, length, count = query.shape[0], query.shape[-1], plan.ranges
    extra = count * plan.blocks - length // plan.block  # blocks
    front, behind = (0, 0) if plan.extended else (plan.before, plan.after)

    def rows_of(x, size: int, around: tuple[int, int], blocks: int):
        x = pad(x, around[0] * size, (around[1] + extra) * size)
        starts = [i * plan.blocks * size for i in range(count)]
        parts = jnp.stack([x[..., i : i + blocks * size] for i in starts], axis=1)
        return parts.reshape(batch * count, *parts.shape[2:])

    def keys_of(keys: Source | None, size: int) -> Source | None:
        cut = partial(rows_of, size=size, around=(front, behind), blocks=plan.scratch_blocks)
        return jax.tree.map(cut, keys)

    query = rows_of(query, plan.block, (0, 0), plan.blocks)
    tokens, given = keys_of(source, plan.block), keys_of(given, plan.selecting.step)
    shared = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), shared)
    assert tokens is not None
    one = replace(plan, ranges=1, extended=True)
    context = attend_fused(one, query, tokens, shared, given, key)  # [B * ranges, N, H, T / ranges]
    context = jnp.moveaxis(context.reshape(batch, count, *context.shape[1:]), 1, 3)
    return context.reshape(*context.shape[:3], -1)[..., :length]


def _on_devices(plan: FusedPlan, arrays: FusedArrays) -> Float[Array, "B T D"]:
    """The kernels on each device of the ambient mesh for its own rows and heads."""
    rows, heads = plan.row_axes or None, plan.head_axes or None
    features, rest = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    several = arrays.hidden.shape[1] > 1
    specs = FusedArrays(
        seeds=PartitionSpec(),
        numbers=PartitionSpec(heads),
        query=features,
        key=features,
        value=features,
        real=rest,
        hidden=PartitionSpec(rows, heads) if several else rest,
        shared=jax.tree.map(lambda _: features, arrays.shared),
        given=jax.tree.map(lambda _: features, arrays.given),
        turns=jax.tree.map(lambda _: PartitionSpec(), arrays.turns),
    )
    local = replace(plan, heads=plan.heads // spread.devices_along(plan.head_axes))

    def of_device(arrays: FusedArrays):
        if rows:
            first = lax.axis_index(rows) * arrays.query.shape[0]
            arrays = arrays._replace(seeds=arrays.seeds.at[2].set(first.astype(jnp.uint32)))
        return _attend(local, arrays)

    return spread.on_devices(of_device, (specs,), features)(arrays)


def _tokens_first(plan: FusedPlan, x: Float[Array, "B N H S"]) -> Float[Array, "B S D"]:
    x = jnp.pad(x, [(0, 0), (0, plan.heads - x.shape[1]), (0, 0), (0, 0)])
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], x.shape[3], -1)


def _visible_rows(plan: FusedPlan, source: Source, rows: int):
    """Returns keys and values with zeros where the mask is False, padded to that many rows."""
    mask, extra = source.mask[:, :, None], rows - source.mask.shape[-1]
    key, value = (pad(jnp.where(mask, x, 0), 0, extra) for x in source[:2])
    return _tokens_first(plan, key), _tokens_first(plan, value)


def _hidden(
    plan: FusedPlan, mask: Bool[Array, "B 1 T"], shared: Source | None, given: Source | None
) -> Float[Array, "B #N _ W"]:
    """The additive rows that hide keys from each block."""
    size, sparse, step = plan.block, plan.selecting, plan.selecting.step
    to_all = None if shared is None else shared.mask
    if plan.behind:
        mask, to_all = mask[..., : -plan.behind], mask[..., -plan.behind :]
    mask = _extend(plan, mask, size)
    windows = [(mask, Window(0, (plan.before - plan.near_before) * size, size, plan.near))]
    if sparse.step:
        chosen = _chosen_mask(plan, mask) if given is None else _extend(plan, given.mask, step)
        first = plan.before * step  # of block 0's own
        windows.append((chosen, Window(0, first - step - sparse.width, step, sparse.width)))
        if not plan.spec.causal:
            windows.append((chosen, Window(0, first + sparse.right, step, sparse.width)))
    spec = Spec(size, blocks_per_step=plan.blocks)
    start = jnp.zeros((), jnp.int32)
    seen = [cut_window(x, window, start, spec) for x, window in windows]
    if to_all is not None:
        row = pad(to_all, 0, plan.shared - to_all.shape[-1])[:, :, None]
        seen.append(jnp.broadcast_to(row, (*row.shape[:2], plan.blocks, row.shape[-1])))
    heads = max(x.shape[1] for x in seen)
    lead = (mask.shape[0], heads, plan.blocks)
    visible = jnp.concatenate([jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in seen], axis=-1)
    hidden = jnp.where(visible, 0.0, tpu_step.HIDDEN)
    extra = plan.heads - heads if heads > 1 else 0  # fills up a group
    return jnp.pad(hidden, [(0, 0), (0, extra), (0, 0), (0, 0)])


def _extend(plan: FusedPlan, mask: Bool[Array, "B #N S"], rows: int) -> Bool[Array, "B #N _"]:
    """Extends the mask of tokens or representatives, `rows` per block, by those around it."""
    return mask if plan.extended else pad(mask, plan.before * rows, plan.after * rows)


def _chosen_mask(plan: FusedPlan, mask: Bool[Array, "B 1 T"]) -> Bool[Array, "B #N R"]:
    """Returns which representatives represent real tokens. Those of "norm" are in rising order of
    norms, with padding first, so this is the same in each head."""
    sparse, batch = plan.selecting, mask.shape[0]
    factor = plan.block // sparse.step
    match sparse.kind:
        case "norm":
            chunks = mask.reshape(batch, 1, -1, sparse.chunk)
            kept = sparse.chunk // factor
            count = chunks.sum(axis=-1, keepdims=True, dtype=jnp.int32)
            place = jnp.arange(kept).reshape(1, 1, 1, kept)
            return (place >= kept - count).reshape(batch, 1, -1)
        case "pooling":
            return mask.reshape(batch, 1, -1, factor).any(axis=-1)
        case "stride":
            turns = jnp.moveaxis(mask.reshape(batch, -1, factor), -1, 1)  # [B, factor, R]
        case _:
            turns = jnp.moveaxis(mask.reshape(batch, -1, factor, sparse.step), 2, 1)
            turns = turns.reshape(batch, factor, -1)
    repeats = -(-plan.all_heads // factor)
    return jnp.tile(turns, (1, repeats, 1))[:, : plan.all_heads]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: FusedPlan, arrays: FusedArrays) -> Float[Array, "B T D"]:
    return tpu_forward.forward(plan, arrays)[0]


def _attend_forward(plan: FusedPlan, arrays: FusedArrays):
    results = checkpoint_name(tpu_forward.forward(plan, arrays), ATTENDED)
    return results[0], (arrays, results)


def _attend_backward(plan: FusedPlan, saved, gradient):
    arrays, results = saved
    gradients = tpu_backward.backward(plan, arrays, results, gradient)
    none = FusedArrays(*(None for _ in FusedArrays._fields))
    return (none._replace(**gradients._asdict()),)


_attend.defvjp(_attend_forward, _attend_backward)
