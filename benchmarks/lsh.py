"""Times Reformer's attentions beside transformers': projections and attention of one layer, same
weights and rotations, in turn, on this CPU. Or measures what sorting by buckets costs on a TPU.

    python benchmarks/lsh.py --reference-python .venv-reference/bin/python
    PYTHONPATH=.libtpu python benchmarks/lsh.py --tpu    (see docs/plan.md for .libtpu)

The default config: 12 heads of 64, states of 256, chunks of 64, one chunk before, one hash
(buckets in factors); float32. For a TPU it prints the compiler's own bytes and cycles, of 16,384
tokens of 12 heads sorted by 512 buckets, and of the whole attention with gradients in bfloat16.
"""

import os
import sys

import numpy as np
from workers import compare, make_parser, serve

HEADS, WIDTH, MODEL, CHUNK, FACTORS = 12, 64, 256, 64, (16, 32)


def arrays(length: int):
    """States, the weights of three projections, rotations."""
    generator = np.random.default_rng(0)
    shapes = ((1, length, MODEL), (3, HEADS * WIDTH, MODEL), (HEADS, WIDTH, 1, sum(FACTORS) // 2))
    states, weights, rotations = (generator.standard_normal(s).astype(np.float32) for s in shapes)
    return states, weights / 16, rotations


def jax_step(kind: str, length: int, *, causal: bool, gradients: bool):
    """A function that runs lsg_flax once and returns a number to compare."""
    import jax
    import jax.numpy as jnp

    from lsg_flax.kernels import Source
    from lsg_flax.patterns import LSH, Local, Runtime, attention

    states, weights, rotations = map(jnp.asarray, arrays(length))
    mask = jnp.ones((1, 1, length), bool)

    def attend(states, weights):
        weights = weights.reshape(3, HEADS, WIDTH, MODEL)
        query, key, value = (jnp.einsum("btd,nhd->bnht", states, w) for w in weights)
        if kind == "local":
            pattern = Local(CHUNK, causal, look_forward=0, wraps=True)
            return attention(pattern, query, Source(key, value, mask), Runtime())
        pattern = LSH(CHUNK, causal, num_buckets=FACTORS)
        return attention(pattern, query, Source(query, key, mask), Runtime(lsh=(rotations,)))

    def loss(*x):
        return jnp.square(attend(*x)).sum()

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)) if gradients else attend)
    return lambda: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(program(states, weights)))


def torch_step(kind: str, length: int, *, causal: bool, gradients: bool):
    """The same with PyTorch."""
    import torch
    from transformers import ReformerConfig
    from transformers.models.reformer import modeling_reformer as reformer

    torch.set_num_threads(os.cpu_count() or 1)
    states, weights, rotations = (torch.from_numpy(x) for x in arrays(length))
    torch.randn = lambda *_, **__: rotations
    config = ReformerConfig(num_buckets=list(FACTORS), is_decoder=causal)
    own = reformer.LSHSelfAttention if kind == "lsh" else reformer.LocalSelfAttention
    attend, names = own(config).eval(), ("query_key", "value")
    names = names if kind == "lsh" else ("query", "key", "value")
    for name, weight in zip(names, weights, strict=False):
        getattr(attend, name).weight.data = weight
    states.requires_grad_(gradients)
    given = [states, *attend.parameters()]

    def run():
        if not gradients:
            with torch.no_grad():
                return float(attend(states).hidden_states.abs().sum())
        loss = attend(states).hidden_states.square().sum()
        found = torch.autograd.grad(loss, given)
        return float(loss + sum(x.abs().sum() for x in found))

    return run


def work(rival: str, kind: str, length: str, causal: str, gradients: str) -> None:
    """A rival's process: warms up, then runs once for each line on standard input."""
    options = {"causal": causal == "True", "gradients": gradients == "True"}
    step = (torch_step if rival == "PyTorch" else jax_step)(kind, int(length), **options)
    step()
    serve(step, {"value": step()})


def on_tpu(length: int) -> None:
    """Prints what the compiler says of ways to sort, and of the attention."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8")
    os.environ.update(TPU_WORKER_HOSTNAMES="localhost", JAX_PLATFORMS="cpu")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from lsg_flax.kernels import Source
    from lsg_flax.patterns import LSH, Runtime, attention, sort_by_bucket
    from lsg_flax.planning.hlo import read_program

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    pattern, count = LSH(CHUNK, num_buckets=FACTORS), int(np.prod(FACTORS))
    features, tokens = (1, HEADS, WIDTH, length), (1, HEADS, 1, length)

    def by_counting(buckets):
        hot = (buckets[..., None] == jnp.arange(count + 1)).astype(jnp.int32)
        total = hot.sum(axis=-2, keepdims=True)
        first = jnp.cumsum(total, axis=-1) - total
        return ((first + jnp.cumsum(hot, axis=-2) - hot) * hot).sum(axis=-1)

    def loss(query_key, value):
        source = Source(query_key, value, jnp.ones((1, 1, length), bool))
        return attention(pattern, query_key, source, Runtime()).astype(jnp.float32).sum()

    ways = {
        "order and places by one sort of words": (lambda b: sort_by_bucket(pattern, b), tokens),
        "order by a stable sort of pairs": (lambda b: jnp.argsort(b, axis=-1), tokens),
        "places by one-hot and cumulative sums": (by_counting, tokens),
        "the whole attention with gradients": (jax.value_and_grad(loss, (0, 1)), features),
    }
    for name, (function, shape) in ways.items():
        kind = jnp.int32 if shape == tokens else jnp.bfloat16
        x = jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, PartitionSpec()))
        with jax.set_mesh(mesh):
            program = jax.jit(function).lower(*[x] * (1 + (shape == features))).compile()
        report = read_program(program.as_text())
        print(f"{name}: {report.bytes / 2**20:,.0f} MiB, {report.cycles:,.0f} cycles", flush=True)


def main() -> None:
    """Runs the comparison and prints it."""
    parser = make_parser(__doc__, 5, 5)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--tpu", action="store_true")
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    if options.tpu:
        on_tpu(options.length)
        return
    pythons = {"PyTorch": options.reference_python, "lsg_flax": sys.executable}
    for kind in ("lsh", "local"):
        for causal in (False, True):
            for gradients in (False, True):
                sizes = (kind, options.length, causal, gradients)
                result = compare(__file__, pythons, sizes, options.repeats)
                told = f"{'causal' if causal else 'both sides'}, "
                told += "gradients" if gradients else "forward"
                print(f"{kind}, {options.length} tokens, {told}: {result}", flush=True)


if __name__ == "__main__":
    main()
