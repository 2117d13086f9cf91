"""The contract of attention kernels: sources of keys, the windows of them that a block of queries
sees, and what is static about a call.

Axes: B batch, N heads, H head width, T tokens (queries), S keys, Q queries of a block, W keys of a
block's windows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Queries(NamedTuple):
    """Queries, already scaled; `positions` and `segments` as in `Source`."""

    features: Float[Array, "B N H T"]
    positions: Int[Array, "B #N T"] | None = None
    segments: Int[Array, "B #N T"] | None = None


class Source(NamedTuple):
    """Keys that queries may attend to; `mask` False means never. The mask may have one head for
    all.

    `positions` say where keys stood before they were put in this order (sorted into buckets, say):
    rules then go by these and those of the queries, not by places in the arrays.

    `segments` number the texts that lie in one row: a query sees the keys of its own number alone.
    """

    key: Float[Array, "B N H S"]
    value: Float[Array, "B N H S"]
    mask: Bool[Array, "B #N S"]
    positions: Int[Array, "B #N S"] | None = None
    segments: Int[Array, "B #N S"] | None = None


class Biases(NamedTuple):
    """What is added to scores; finite numbers (what must not be seen is masked).

    Attributes:
        windows: nothing, or of each window that which every block adds (None for nothing).
        shared: what every query adds to the shared keys. (For each query its own would be quadratic
            in the length.)
    """

    windows: tuple[Float[Array, "#B #N Q W"] | None, ...] = ()
    shared: Float[Array, "#B #N S"] | None = None


@dataclass(frozen=True)
class Rule:
    """Which keys a query may see by their positions: from `before` ones before its own up to
    `after` ones behind it (None: any number), its own too or not.

    A query that shall see itself if it sees nothing else (shared queries and keys) gets a part of
    its own, joined by `merge_softmax_parts`.
    """

    before: int | None = None
    after: int | None = None
    itself: bool = True

    def allows(self, query: Any, key: Any) -> Any:
        """Whether a query at one position sees a key at another: for arrays, NumPy's or JAX's,
        that broadcast against each other."""
        allowed: Any = True
        if self.before is not None:
            allowed = key >= query - self.before if self.before else key >= query
        if self.after is not None:
            allowed &= key <= query + self.after if self.after else key <= query
        return allowed if self.itself else allowed & (key != query)


Axes = tuple[tuple[str, ...], tuple[str, ...]]
NEGATIVE = float(jnp.finfo(jnp.float32).min)  # masked scores; never -inf, so that no row gives NaN
NO_BIASES = Biases()
EVERYTHING, PAST, NOT_SELF = Rule(), Rule(after=0), Rule(itself=False)


@dataclass(frozen=True)
class Window:
    """Block b sees the `width` keys from `offset + b * stride` of source number `source`; keys
    outside the source do not exist.

    `rule`: which of them each query sees. Without positions it goes by places in the arrays, and
        the window must move as the blocks do; `lead` keys of the source lie in front of the first
        query's place.
    """

    source: int
    offset: int
    stride: int
    width: int
    rule: Rule = EVERYTHING
    lead: int = 0


@dataclass(frozen=True)
class Spec:
    """What is static about a call: Q = `block` queries per block, the windows that each block sees,
    the rule for the shared keys.

    `blocks_per_step` trades memory for parallelism; 0 lets the device decide. `axes` of meshes are
    those that rows and heads may lie along. `one_segment` says that the queries of a block are of
    one segment, which spares a comparison for each of them.
    """

    block: int
    windows: tuple[Window, ...] = ()
    shared_rule: Rule = EVERYTHING
    blocks_per_step: int = 0
    dropout_rate: float = 0.0
    axes: Axes = ((), ())
    one_segment: bool = False
