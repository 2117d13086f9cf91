"""Shards one text that is too long for a device over several: a forward pass and a training step.

    python examples/sharded_long_sequence.py [--devices 8] [--tokens 65536] [--remat full]
    python examples/sharded_long_sequence.py --devices 0 --tokens 1048576   # on eight real chips
Expected from the first command, on 2 busy CPU cores that simulate eight devices:

    logits of the first tokens differ from those of one device by at most 1.6e-05
    step of 65536 tokens: 7.1 s, loss 5.527
    memory of a device: 1,156 MB alone, 147 MB as one of 8

It also prints the collectives: edges of shards (permutes of 49 kB at any length), tables that are
looked up (all-to-all), parameters and gradients.
"""

import argparse
import os
import time

import numpy as np
from at_hand import sources

VOCABULARY, HIDDEN, IGNORED = 257, 256, -100  # bytes, and one that hides another


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8, help="simulated by the CPU; 0: real ones")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=64, help="of the model, of two layers")
    parser.add_argument("--remat", choices=["none", "full", "dots"], default="none")
    return parser.parse_args(arguments)


def make_batch(tokens: int) -> dict[str, np.ndarray]:
    """Bytes of Python's library as one text [1, T], every seventh hidden and asked for."""
    text = "".join(row["text"] for row in sources()).encode()
    ids = np.resize(np.frombuffer(text, np.uint8), (1, tokens)).astype(np.int32)
    asked = np.arange(tokens)[None] % 7 == 3
    return {"input_ids": np.where(asked, HIDDEN, ids), "labels": np.where(asked, ids, IGNORED)}


def megabytes(compiled) -> float:
    """What one device needs: arguments, results that take the place of none, temporaries."""
    m = compiled.memory_analysis()
    parts = m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes
    return (sum(parts) - m.alias_size_in_bytes) / 1e6


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints what is compared; returns the numbers."""
    options = parse(arguments)
    if options.devices:  # JAX reads these when it starts
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    import jax

    from lsg_flax import EncoderConfig, LSGConfig, Model, sharding, training
    from lsg_flax.planning.hlo import read_program

    config = EncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=2,
        num_attention_heads=max(options.width // 32, 1),
        max_position_embeddings=options.tokens,
        lsg=LSGConfig(),
    )
    model, batch = Model(config, "masked_lm", remat=options.remat), make_batch(options.tokens)
    optimizer = training.make_optimizer(1e-3, total_steps=10)
    step = training.make_train_step(model, optimizer)

    def init(key):
        params = model.init(key, np.zeros((1, 8), np.int32))["params"]
        return training.init_state(params, optimizer, key)

    short = {"input_ids": batch["input_ids"][:, :8192]}  # where logits are compared
    logits = jax.jit(lambda params, ids: model.apply({"params": params}, ids).logits)
    mesh = sharding.make_mesh(data=1, sequence=-1)
    state = sharding.sharded_init(init, jax.random.key(0), mesh=mesh)
    alone = step.lower(jax.eval_shape(lambda: state), batch).compile()
    expected = logits(jax.device_get(state.params), short["input_ids"])
    with jax.set_mesh(mesh):
        found = logits(state.params, sharding.shard_batch(short, mesh)["input_ids"])
        placed = sharding.shard_batch(batch, mesh)
        compiled, start = step.lower(state, placed).compile(), time.perf_counter()
        loss = float(compiled(state, placed)[1]["loss"])
    apart = float(np.abs(np.asarray(found) - np.asarray(expected)).max())
    print(f"logits of the first tokens differ from those of one device by at most {apart:.1e}")
    print(f"step of {options.tokens} tokens: {time.perf_counter() - start:.1f} s, loss {loss:.3f}")
    one, each = map(megabytes, (alone, compiled))
    print(f"memory of a device: {one:,.0f} MB alone, {each:,.0f} MB as one of {mesh.size}")
    for c in read_program(compiled.as_text()).collectives[:8]:
        print(f"{c.runs:4} x {c.kind:18} {c.bytes / 1e3:10,.1f} kB")
    return {"apart": apart, "loss": loss, "alone": one, "each": each}


if __name__ == "__main__":
    main()
