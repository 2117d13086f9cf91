"""Full attention of arrays with features first, in memory linear in their length.

Axes: B batch, N heads, H head width, T tokens (queries), S keys.
"""

from jaxtyping import Array, Float

from lsg_flax.kernels import (
    EVERYTHING,
    PAST,
    Queries,
    Source,
    Spec,
    attend,
    attend_full,
    plan_full,
)
from lsg_flax.patterns.pattern import Runtime
from lsg_flax.sharding import MESH_AXES

AXES = MESH_AXES["batch"], MESH_AXES["heads"]  # mesh axes that rows and heads are sharded over
BLOCK = 256  # queries per block: affects speed and memory, not numerics


def attend_to_all(
    query: Float[Array, "B N H T"],
    source: Source,
    run: Runtime,
    *,
    causal: bool = False,
    first: int = 0,
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """Returns the context and the logarithm of the softmax's denominator. If the source has
    segments, the queries are its tokens from number `first` on."""
    rule = PAST if causal else EVERYTHING
    size, rate = min(query.shape[-1], BLOCK), run.dropout_rate
    spec = Spec(size, shared_rule=rule, dropout_rate=rate, axes=AXES)
    options = {"key": run.dropout_key, "implementation": run.implementation}
    queries = scale(query)
    if source.segments is not None:
        queries = queries._replace(segments=source.segments[..., first : first + query.shape[-1]])
    return attend(spec, queries, shared=source, **options)


def attend_fully(
    query: Float[Array, "B N H T"], source: Source, run: Runtime, *, causal: bool = False
) -> Float[Array, "B N H T"]:
    """Returns the context, by fused kernels if there are any for the device and this case."""
    options = {"causal": causal, "dropout_rate": run.dropout_rate, "axes": AXES}
    plan = plan_full(query, run.implementation, **options)
    if plan is None:
        return attend_to_all(query, source, run, causal=causal)[0]
    return attend_full(plan, scale(query).features, source)


def scale(query: Float[Array, "B N H T"]) -> Queries:
    """Returns the queries scaled by H ** -0.5, as the engine takes them."""
    return Queries(query * query.shape[2] ** -0.5)
