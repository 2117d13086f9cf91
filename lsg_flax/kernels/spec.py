"""The contract of attention kernels: sources of keys, the windows of them that blocks of queries
see, and the static settings of a call.

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
    """Keys and values that queries may attend to.

    Attributes:
        mask: False for keys that are never seen; it may have one head for all.
        positions: positions of the keys if they are in another order in the arrays, for example
            sorted into buckets: rules then compare these with the positions of the queries.
        segments: numbers of the texts in a row: a query sees only keys with its own number.
    """

    key: Float[Array, "B N H S"]
    value: Float[Array, "B N H S"]
    mask: Bool[Array, "B #N S"]
    positions: Int[Array, "B #N S"] | None = None
    segments: Int[Array, "B #N S"] | None = None


class Biases(NamedTuple):
    """Biases that are added to scores; finite numbers (use masks to hide keys).

    Attributes:
        windows: for each window the bias that every block adds, or None; () for no biases.
        shared: the bias that every query adds to the shared keys. (One bias per query would be
            quadratic in the length.)
    """

    windows: tuple[Float[Array, "#B #N Q W"] | None, ...] = ()
    shared: Float[Array, "#B #N S"] | None = None


@dataclass(frozen=True)
class Rule:
    """Which keys a query may see, by positions: from `before` positions before its own to `after`
    positions after it (None for any number), including its own if `itself`.
    """

    before: int | None = None
    after: int | None = None
    itself: bool = True

    def allows(self, query: Any, key: Any) -> Any:
        """Whether a query at one position sees a key at another; both are NumPy or JAX arrays that
        broadcast against each other."""
        allowed: Any = True
        if self.before is not None:
            allowed = key >= query - self.before if self.before else key >= query
        if self.after is not None:
            allowed &= key <= query + self.after if self.after else key <= query
        return allowed if self.itself else allowed & (key != query)


Axes = tuple[tuple[str, ...], tuple[str, ...]]
NEGATIVE = float(jnp.finfo(jnp.float32).min)  # masked scores; not -inf, so that no row gives NaN
NO_BIASES = Biases()
EVERYTHING, PAST, NOT_SELF = Rule(), Rule(after=0), Rule(itself=False)


@dataclass(frozen=True)
class Window:
    """A window of keys: block b sees the `width` keys from `offset + b * stride` on of source
    number `source`; keys outside the source do not exist.

    Attributes:
        rule: which of these keys each query sees. Without positions it compares indices in the
            arrays; the window must then have the stride of the blocks.
        lead: number of keys of the source before the first query's position.
    """

    source: int
    offset: int
    stride: int
    width: int
    rule: Rule = EVERYTHING
    lead: int = 0


@dataclass(frozen=True)
class Spec:
    """The static settings of a call.

    Attributes:
        block: queries per block, Q.
        windows: the windows that each block sees.
        shared_rule: the rule for the shared keys.
        blocks_per_step: blocks computed at once, which trades memory for parallelism; 0 chooses by
            the device.
        dropout_rate: probability of dropping an attention weight.
        axes: mesh axes that rows and heads may be sharded over.
        one_segment: whether all queries of a block belong to one segment, which saves comparisons.
    """

    block: int
    windows: tuple[Window, ...] = ()
    shared_rule: Rule = EVERYTHING
    blocks_per_step: int = 0
    dropout_rate: float = 0.0
    axes: Axes = ((), ())
    one_segment: bool = False
