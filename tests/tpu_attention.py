"""Compiles attention with its gradients for a TPU that is not there, and prints as JSON which
instructions that TPUs are slow at the programs have. Tests start it, in the environment that
`topologies.environment_for` names.

    python tests/tpu_attention.py [TOPOLOGY LENGTH ...]

Without arguments XLA's attention with every selection; else one row of each length, by the fused
kernels as a layer calls them: how often these run, and the gigabytes that the program moves.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsg_flax import LSGConfig, chips, lsg_attention, patterns, sharding, topologies
from lsg_flax.kernels import Source
from lsg_flax.patterns import SPARSITY_TYPES
from lsg_flax.planning.hlo import read_program

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


def by_kernels(topology: str, tokens: int) -> dict[str, object]:
    """What the program of a row of tokens, with a global and what fills up a tile behind them, is
    like."""
    mesh = sharding.make_mesh(devices=topologies.devices_of(chips.parse_topology(topology))[:1])
    heads, width, places = 12, 64, tokens + 16
    row = jax.ShapeDtypeStruct((1, places, heads * width), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 1, places), jnp.bool_)

    def attend(mask, *arrays):
        cut = (x.reshape(1, places, heads, width).transpose(0, 2, 3, 1) for x in arrays)
        query, key, value = cut
        run = patterns.Runtime(implementation="pallas")
        pattern = patterns.LSG(LSGConfig(), filler=15)
        context = patterns.attention(pattern, query, Source(key, value, mask), run)
        return context.transpose(0, 3, 1, 2).reshape(row.shape)

    def both(mask, cotangent, *arrays):
        context, pullback = jax.vjp(functools.partial(attend, mask), *arrays)
        return context, pullback(cotangent)

    here = NamedSharding(mesh, P())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in (mask, *[row] * 4)]
    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(*arguments).compile().as_text()
    program = read_program(text)
    found = {"slow": SLOW.findall(text), "kernels": program.kernels}
    return found | {"gigabytes": program.bytes / 1e9}


if __name__ == "__main__" and len(sys.argv) > 1:
    topology, *lengths = sys.argv[1:]
    print(json.dumps({length: by_kernels(topology, int(length)) for length in lengths}))
elif __name__ == "__main__":
    found = {kind: slow_instructions(kind, {"data": 4}) for kind in SPARSITY_TYPES}
    found["causal"] = slow_instructions("norm", {"data": 4}, causal=True)
    found["over devices"] = slow_instructions("norm", {"data": 1, "sequence": 4})
    print(json.dumps(found))
