"""Full attention on TPUs by JAX's own kernels (splash attention), which never write scores to main
memory.

They read arrays with features first, as they are here, and treat the padding of keys as a segment
without queries. JAX's authors keep them up to date with new chips.

Axes: B batch, N heads, H head width, T tokens (queries), S keys.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from lsg_flax.kernels import spread
from lsg_flax.kernels.engine import Implementation, accepts, is_fused
from lsg_flax.kernels.spec import Source
from lsg_flax.kernels.tpu_plan import DTYPES
from lsg_flax.kernels.windows import pad
from lsg_flax.kernels.xla import ATTENDED

TILE = 128  # tokens along the lanes
LEAST_QUERIES = 512  # with fewer, XLA keeps all scores on the chip too, and is as fast
WIDTHS = range(16, 257, 16)  # of heads, in rows of a tile of bfloat16
SMALL = 512
BLOCKS = (1024, 768, SMALL, 384, 256)  # the larger, the less often keys are read


@dataclass(frozen=True)
class FullPlan:
    """The static plan of a call.

    Attributes:
        rows, heads: mesh axes over which rows of the batch and heads are sharded.
        interpret: whether to run without a TPU, slowly.
    """

    causal: bool
    rows: tuple[str, ...]
    heads: tuple[str, ...]
    interpret: bool


def plan_full(
    query: Float[Array, "B N H T"],
    implementation: Implementation | None,
    *,
    causal: bool,
    dropout_rate: float,
    axes: spread.Axes = ((), ()),
) -> FullPlan | None:
    """Returns how JAX's `splash_attention` computes full attention; None if XLA computes it.

    Args:
        dropout_rate: probability of dropping an attention weight.
        axes: mesh axes that rows and heads may be sharded over.

    Raises:
        ValueError: for implementation="pallas" if there is no TPU, or the kernels do not support
            the case.
    """
    if not is_fused(implementation) or (implementation is None and query.shape[-1] < LEAST_QUERIES):
        return None
    rows, heads = spread.axes_that_divide(axes, query.shape[0], query.shape[1])
    if not accepts(implementation, _refusal(query, dropout_rate, rows + heads)):
        return None
    return FullPlan(causal, rows, heads, implementation == "pallas_interpret")


def _refusal(query, dropout_rate: float, used: tuple[str, ...]) -> str | None:
    """Returns why the kernels cannot compute a call; None if they can."""
    batch, heads, width, _ = query.shape
    other = "or use implementation='xla'"
    if dropout_rate:
        return (
            f"the kernels of full attention have no dropout, but dropout_rate={dropout_rate}; "
            f"set attention_probs_dropout_prob=0.0, {other}."
        )
    if query.dtype.name not in DTYPES:
        return f"dtype {query.dtype.name} is none of {', '.join(DTYPES)}; cast the inputs, {other}."
    if width not in WIDTHS:
        return f"head width {width} is not a multiple of 16 up to 256; {other[3:]}."
    mesh = jax.sharding.get_abstract_mesh()
    idle = {name: mesh.shape[name] for name in mesh.auto_axes if mesh.shape[name] > 1}
    idle = {name: size for name, size in idle.items() if name not in used}
    if idle:
        return (
            f"{batch} rows and {heads} heads cannot be sharded evenly over the mesh's "
            f"{', '.join(f'{n}={size}' for n, size in idle.items())}, so its devices would repeat "
            f"each other's work; choose numbers of rows or heads that these divide, {other}."
        )
    return None


def attend_full(
    plan: FullPlan, query: Float[Array, "B N H T"], source: Source
) -> Float[Array, "B N H T"]:
    """Returns the context by JAX's `splash_attention`. If the source has segments, its first tokens
    are the queries.

    Args:
        query: already scaled.
    """
    mask, length = source.mask[:, 0], query.shape[-1]
    numbers = jnp.ones((len(mask), max(length, mask.shape[-1])), jnp.int32)
    if source.segments is not None:
        numbers = source.segments[:, 0].astype(jnp.int32) + 1
    own, other = numbers[:, :length], jnp.where(mask, numbers[:, : mask.shape[-1]], 0)
    features, rows = PartitionSpec(plan.rows or None, plan.heads or None), PartitionSpec(plan.rows)
    specs = (features, features, features, rows, rows)
    attend = spread.on_devices(partial(_attend, plan), specs, features)
    context = attend(query, source.key, source.value, own, other)
    seen = _sees_any(plan, source, own, other)[:, None, None]
    return jnp.where(seen, context, 0)  # otherwise the mean of hidden values


def _sees_any(plan: FullPlan, source: Source, own, other) -> Bool[Array, "B #T"]:
    """Returns which queries see a key at all."""
    if source.segments is None:
        count = jnp.cumsum(source.mask[:, 0], axis=-1)
        return count > 0 if plan.causal else count[:, -1:] > 0
    seen = own[:, :, None] == other[:, None]
    if plan.causal:
        seen &= jnp.tri(*seen.shape[1:], dtype=bool)[None]
    return seen.any(axis=-1)


def _attend(plan: FullPlan, query, key, value, own, other):
    """Returns the context on one device; `own` and `other` are segments of queries and keys."""
    length, (block, key_block) = query.shape[-1], map(_block, (query, key))
    query, own = (pad(x, 0, -length % block) for x in (query, own))
    key, value, other = (pad(x, 0, -x.shape[-1] % key_block) for x in (key, value, other))
    shape = query.shape[-1], key.shape[-1]
    one = masks.CausalMask(shape) if plan.causal else masks.FullMask(shape)
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([one] * query.shape[1]),
        block_sizes=_block_sizes(block, key_block),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
        interpret=plan.interpret,
    )
    context = jax.vmap(attend)(
        *(x.swapaxes(2, 3) for x in (query, key, value)), splash.SegmentIds(own, other)
    )
    assert isinstance(context, jax.Array)  # with residuals it would be a pair
    return context.swapaxes(2, 3)[..., :length]


def _block(x: Float[Array, "B N H _"]) -> int:
    """Returns the tokens of a block: the largest size with the least padding, among those that fit
    the 16 MiB of on-chip memory that the kernels get."""
    width, length = x.shape[2:]
    if length <= SMALL:
        return -(-length // TILE) * TILE
    most = max(BLOCKS) if width * x.dtype.itemsize <= 256 else SMALL
    return min((b for b in BLOCKS if b <= most), key=lambda block: -length % block)


def _block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    layout = splash.QKVLayout.SEQ_MINOR  # the layout of arrays here: nothing is transposed
    at_once = keys if keys <= SMALL else keys // 2  # keys whose scores are on the chip
    return splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=at_once,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=at_once,
        block_q_dq=queries,
        block_kv_dq=keys,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
