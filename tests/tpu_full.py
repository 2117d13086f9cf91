"""Compiles full and local attention for a TPU that is not there, and prints what the programs move,
keep and compute, one line of JSON each. `test_pallas_full.py` starts it, in the environment that
`topologies.environment_for` names.
"""

import functools
import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsg_flax import chips, sharding, topologies
from lsg_flax.attention import full_attention, local_attention
from lsg_flax.planning.hlo import read_program

SHAPE = (4, 4096, 12, 64)
WINDOWS = {"window_size": 512, "causal": True, "exact_windowsize": True}
CASES = {
    "full": functools.partial(full_attention, implementation="pallas"),
    "causal": functools.partial(full_attention, causal=True),  # None takes the kernels, too
    "local": functools.partial(local_attention, **WINDOWS),
}


def facts(attend, passes: str) -> dict[str, float]:
    """Of the forward pass, or of both passes together."""
    mesh = sharding.make_mesh(devices=topologies.devices_of(chips.parse_topology("v5e:1x1")))
    here = NamedSharding(mesh, P())
    rows = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=here)
    mask = jax.ShapeDtypeStruct(SHAPE[:2], jnp.bool_, sharding=here)

    def both(mask, gradient, *arrays):
        context, pullback = jax.vjp(lambda *x: attend(*x, mask), *arrays)
        return context, pullback(gradient)

    def forward(mask, *arrays):
        return attend(*arrays, mask)

    function, count = (both, 4) if passes == "both" else (forward, 3)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(mask, *[rows] * count).compile()
    program, memory = read_program(compiled.as_text()), compiled.memory_analysis()
    assert memory is not None
    kept = memory.temp_size_in_bytes / 1e6
    return {"gigabytes": program.bytes / 1e9, "temporaries": kept, "flops": program.flops}


if __name__ == "__main__":
    for name, attend in CASES.items():
        for passes in ("forward", "both"):
            print(json.dumps({"case": name, "passes": passes} | facts(attend, passes)), flush=True)
