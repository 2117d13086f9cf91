"""Compiles attention for a GPU that is not there, and prints as JSON what the programs do:
`test_plan_gpu.py` starts it, in the environment that `topologies.environment_for` names.

Two rows of 1,025 tokens, the first a global; heads of 64, blocks of 128.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsg_flax import LSGConfig, chips, lsg_attention, sharding, topologies
from lsg_flax.kernels import Queries, Source, Spec, Window, attend
from lsg_flax.planning.hlo import read_program

ROWS, TOKENS, HEADS, WIDTH, BLOCK = 2, 1024, 4, 64, 128
CASES = {
    "xla": {"implementation": "xla"},
    "norm": {},
    "pooling, causal": {"sparsity_type": "pooling", "causal": True},
    "first token, dropout": {"global_tokens": "first_token", "dropout_rate": 0.1},
    "float32, width 128": {"dtype": "float32", "width": 128, "sparsity_type": "stride"},
    "blocks of 256": {"block_size": 256, "sparse_block_size": 256, "width": 128},
}


def report(mesh, both, *shapes) -> dict:
    """Of forward and backward pass together; rows lie over `data`."""
    layout = NamedSharding(mesh, P("data"))
    given = [jax.ShapeDtypeStruct(s, d, sharding=layout) for s, d in shapes]
    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(*given).compile()
    found, memory = read_program(compiled.as_text()), compiled.memory_analysis()
    names = ("flops", "bytes", "kernels", "unknown_kernels", "sorts", "gathers", "scatters")
    moved = [c.kind for c in found.collectives]
    return {n: getattr(found, n) for n in names} | {
        "temporaries": memory.temp_size_in_bytes,
        "collectives": moved,
    }


def kernels_alone(mesh) -> dict:
    """Without a selection, between arrays as projections write them."""
    local, near = 3 * BLOCK, BLOCK // 2
    windows = (
        Window(0, -BLOCK, BLOCK, local),
        Window(1, -near - BLOCK, near, BLOCK),
        Window(1, 2 * near, near, BLOCK),
    )
    spec = Spec(BLOCK, windows, axes=(("data",), ("tensor",)))

    def call(mask, query, *pairs):
        first = [x.transpose(0, 2, 3, 1) for x in (query, *pairs)]
        sizes = (TOKENS, TOKENS // 2, 1)
        masks = [mask[:, None, :n] for n in sizes]
        sources = [Source(*first[1 + 2 * i : 3 + 2 * i], masks[i]) for i in range(3)]
        options = {"shared": sources.pop(), "implementation": "pallas"}
        return attend(spec, Queries(first[0]), tuple(sources), **options)[0].transpose(0, 3, 1, 2)

    def both(mask, gradient, *arrays):
        context, transpose = jax.vjp(functools.partial(call, mask), *arrays)
        return context, transpose(gradient)

    def shape(tokens):
        return (ROWS, tokens, HEADS, WIDTH), jnp.bfloat16

    tokens, chosen, first = shape(TOKENS), shape(TOKENS // 2), shape(1)
    pairs = [tokens, tokens, chosen, chosen, first, first]
    return report(mesh, both, ((ROWS, TOKENS), jnp.bool_), tokens, tokens, *pairs)


def whole(mesh, implementation="pallas", dtype="bfloat16", width=WIDTH, **options) -> dict:
    """`lsg_attention`."""
    calls = ("causal", "global_tokens", "dropout_rate")
    given = {name: options.pop(name) for name in calls if name in options}
    if "dropout_rate" in given:
        given["dropout_key"] = jax.random.key(0)
    given |= {"config": LSGConfig(**options), "implementation": implementation}

    def both(mask, gradient, *arrays):
        attention = functools.partial(lsg_attention, mask=mask, **given)
        context, transpose = jax.vjp(attention, *arrays)
        return context, transpose(gradient)

    length = TOKENS + (given.get("global_tokens") != "first_token")
    array = (ROWS, length, HEADS, width), jnp.dtype(dtype)
    return report(mesh, both, ((ROWS, length), jnp.bool_), *[array] * 4)


if __name__ == "__main__":
    gpu, *names = sys.argv[1:]
    on_mesh = sharding.make_mesh(data=2, devices=topologies.devices_of(chips.parse_topology(gpu)))
    results = {}
    for name in names:
        alone = name == "kernels alone"
        results[name] = kernels_alone(on_mesh) if alone else whole(on_mesh, **CASES[name])
    print(json.dumps(results))
