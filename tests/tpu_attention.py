"""Compiles attention with its gradients for a TPU that is not there, and prints as JSON which
instructions that TPUs are slow at the programs have. `test_plan.py` starts it, in the environment
that `topologies.environment_for` names.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsg_flax import LSGConfig, chips, lsg_attention, sharding, topologies
from lsg_flax.patterns import SPARSITY_TYPES

SLICE = chips.parse_topology("v5e:2x2")
SLOW = re.compile(r" (sort|gather|scatter)\(")


def slow_instructions(kind: str, axes: dict[str, int], **options) -> list[str]:
    """Those of forward and backward pass together."""
    mesh = sharding.make_mesh(**axes, devices=topologies.devices_of(SLICE))
    on = functools.partial(NamedSharding, mesh)
    rows = jax.ShapeDtypeStruct((4, 1537, 2, 64), jnp.bfloat16, sharding=on(P("data")))
    mask = jax.ShapeDtypeStruct(rows.shape[:2], jnp.bool_, sharding=on(P("data")))

    def both(query, key, value, mask, cotangent):
        attend = functools.partial(
            lsg_attention,
            mask=mask,
            config=LSGConfig(sparsity_type=kind),
            implementation="xla",
            **options,
        )
        context, pullback = jax.vjp(attend, query, key, value)
        return context, pullback(cotangent)

    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(rows, rows, rows, mask, rows).compile()
    return SLOW.findall(compiled.as_text())


if __name__ == "__main__":
    found = {kind: slow_instructions(kind, {"data": 4}) for kind in SPARSITY_TYPES}
    found["causal"] = slow_instructions("norm", {"data": 4}, causal=True)
    found["over devices"] = slow_instructions("norm", {"data": 1, "sequence": 4})
    print(json.dumps(found))
