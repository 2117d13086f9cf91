"""Times a layer of Reformer beside transformers': same weights and rotations, in turn, on this CPU.

    python benchmarks/reformer.py --reference-python .venv-reference/bin/python

The layer has the default config's sizes (256 wide, 12 heads of 64, chunks of 64, one round of
hashing) and is between axial positions and the last LayerNorm. It is timed forward, and forward and
backward of a loss in training mode without dropout, with the gradients of all parameters.
"""

import os
import sys
import tempfile

import numpy as np
from vs_reference import make_checkpoint
from workers import compare, make_parser, serve

SIZES = {"hidden_size": 256, "attention_head_size": 64, "num_attention_heads": 12}


def config_of(kind: str, length: int) -> dict:
    """config.json of a model of one layer for so many tokens, a power of two."""
    rows = 2 ** (length.bit_length() // 2)
    rates = ("hidden", "local_attention_probs", "lsh_attention_probs")
    return SIZES | {
        "model_type": "reformer",
        "attn_layers": [kind],
        "max_position_embeddings": length,
        "axial_pos_shape": [rows, length // rows],
        **{f"{name}_dropout_prob": 0.0 for name in rates},
    }


def tokens(length: int) -> np.ndarray:
    """The ids that both get, [1, T]."""
    return np.random.default_rng(0).integers(3, 320, (1, length))


def rotations(shape: tuple[int, ...]) -> np.ndarray:
    """What both hash with, [heads, head width, hashes, rotations // 2]."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def jax_step(folder: str, length: int, *, gradients: bool):
    """A function that runs lsg_flax once and returns a number to compare."""
    import jax
    import jax.numpy as jnp

    import lsg_flax

    model, params = lsg_flax.from_pretrained(folder)
    config, ids, drawn = model.config, jnp.asarray(tokens(length)), ()
    if "lsh" in config.kinds:
        shape = config.pattern("lsh", length).rotations_shape(
            config.num_attention_heads, config.head_dim
        )
        drawn = (jnp.asarray(rotations(shape)),)

    def states(params):
        key = {"dropout": jax.random.key(0)} if gradients else None
        options = {"lsh_rotations": drawn, "train": gradients, "rngs": key}
        return model.apply({"params": params}, ids, **options).last_hidden_state

    def loss(params):
        return (states(params) ** 3).mean()

    program = jax.jit(jax.grad(loss) if gradients else states)
    return lambda: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(program(params)))


def torch_step(folder: str, length: int, *, gradients: bool):
    """The same with transformers."""
    import torch
    from transformers import ReformerModel

    torch.set_num_threads(os.cpu_count() or 1)
    model = ReformerModel.from_pretrained(folder).train(gradients)
    ids = torch.tensor(tokens(length))

    torch.randn = lambda shape, **_: torch.tensor(rotations(tuple(shape)))

    def run():
        if not gradients:
            with torch.no_grad():
                return float(model(ids, use_cache=False).last_hidden_state.abs().sum())
        model.zero_grad()
        (model(ids, use_cache=False).last_hidden_state ** 3).mean().backward()
        return float(sum(x.grad.abs().sum() for x in model.parameters()))

    return run


def work(rival: str, folder: str, length: str, gradients: str) -> None:
    """A rival's process: warms up, then runs once for each line on standard input."""
    make = torch_step if rival == "PyTorch" else jax_step
    step = make(folder, int(length), gradients=gradients == "True")
    step()
    serve(step, {"value": step()})


def main() -> None:
    """Runs the comparison and prints it."""
    parser = make_parser(__doc__, 7, 4)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--kinds", nargs="+", choices=("lsh", "local"), default=["lsh", "local"])
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    pythons = {"PyTorch": options.reference_python, "lsg_flax": sys.executable}
    print(f"{options.length} tokens, medians of {options.repeats} runs in turn")
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(folder, options.length, config_of(kind, options.length))
            for gradients in (False, True):
                sizes = (folder, options.length, gradients)
                result = compare(__file__, pythons, sizes, options.repeats)
                told = f"{kind}, {'forward and backward' if gradients else 'forward'}"
                print(f"{told}: {result}", flush=True)


if __name__ == "__main__":
    main()
