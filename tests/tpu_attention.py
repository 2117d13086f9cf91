"""Compiles attention with its gradients for a TPU that is not there, and prints as JSON which
instructions that TPUs are slow at the programs have. `test_plan.py` starts it.

    python tests/tpu_attention.py
"""

import os

from lsg_flax import chips

SLICE = chips.parse_topology("v5e:2x2")
os.environ.update(chips.environment_for(SLICE))  # before jax

import functools  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from lsg_flax import LSGConfig, lsg_attention, sharding  # noqa: E402
from lsg_flax.patterns import SPARSITY_TYPES  # noqa: E402

SLOW = re.compile(r" (sort|gather|scatter)\(")


def slow_instructions(kind: str, axes: dict[str, int], **options) -> list[str]:
    """Those of forward and backward pass together."""
    mesh = sharding.make_mesh(**axes, devices=chips.devices_of(SLICE))
    on = functools.partial(NamedSharding, mesh)
    rows = jax.ShapeDtypeStruct((4, 1537, 2, 64), jnp.bfloat16, sharding=on(P("data")))
    mask = jax.ShapeDtypeStruct(rows.shape[:2], jnp.bool_, sharding=on(P("data")))

    def both(query, key, value, mask, cotangent):
        attend = functools.partial(
            lsg_attention, mask=mask, config=LSGConfig(sparsity_type=kind), **options
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
