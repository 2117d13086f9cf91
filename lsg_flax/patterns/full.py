"""Full attention of arrays with features first, in memory linear in their length.

Axes: B batch, N heads, H head width, T tokens (queries), S keys.
"""

from jaxtyping import Array, Float

from lsg_flax.kernels import EVERYTHING, PAST, Queries, Source, Spec, attend
from lsg_flax.patterns.pattern import Runtime

BLOCK = 256  # queries per block: affects speed and memory, not numerics


def attend_to_all(
    query: Float[Array, "B N H T"], source: Source, run: Runtime, *, causal: bool = False
) -> tuple[Float[Array, "B N H T"], Float[Array, "B N T"]]:
    """The context, and the logarithm of the softmax's denominator."""
    rule = PAST if causal else EVERYTHING
    spec = Spec(min(query.shape[-1], BLOCK), shared_rule=rule, dropout_rate=run.dropout_rate)
    options = {"key": run.dropout_key, "implementation": run.implementation}
    return attend(spec, scale(query), shared=source, **options)


def scale(query: Float[Array, "B N H T"]) -> Queries:
    """The queries as kernels take them."""
    return Queries(query * query.shape[2] ** -0.5)
