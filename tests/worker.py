"""One process of a training run, for tests/test_multiprocess.py and tests/crash.py:

    python tests/worker.py FOLDER --processes 2 --index 0 --port 12345 --steps 12 ...

Trains a tiny model with dropout on batches that are a function of the step, on a mesh over the
devices of all processes, and writes the checkpoints to FOLDER/state, the log to FOLDER/log.
"""

import argparse
import json
import pathlib
import time

import compiling

DEVICES = 4  # in all, however many processes share them
SETTINGS = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def batch_of(step: int, rows: int = 8) -> dict:
    import numpy as np

    generator = np.random.default_rng(step)
    ids = generator.integers(0, 23, (rows, 16))
    mask = np.arange(16) < generator.integers(5, 17, (rows, 1))
    labels = np.where((generator.random(ids.shape) < 0.5) & mask, ids, -100)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}


def optimizer():
    from lsg_flax import training

    return training.make_optimizer(0.01, total_steps=100, warmup_steps=2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--mesh", type=json.loads, default={})
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each batch")
    parser.add_argument("--heartbeat", type=int, default=10)
    options = parser.parse_args()
    local = DEVICES // options.processes
    compiling.set_up(local)
    import jax

    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{options.port}",
            options.processes,
            options.index,
            heartbeat_timeout_seconds=options.heartbeat,
        )
    train(options)
    print("finished", flush=True)


def train(options) -> None:
    import jax
    import numpy as np

    from lsg_flax import training
    from lsg_flax.models import EncoderConfig, Model
    from lsg_flax.sharding import make_mesh

    model = Model(EncoderConfig(**SETTINGS), "masked_lm")
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 3), np.int32))["params"]
    params = jax.device_get(params)
    adamw = optimizer()
    mesh = make_mesh(**options.mesh)

    def batch_at(step: int) -> dict:
        time.sleep(options.pause)
        shares = {n: np.split(array, options.processes) for n, array in batch_of(step).items()}
        return {name: share[options.index] for name, share in shares.items()}

    training.fit(
        training.make_train_step(model, adamw),
        training.init_state(params, adamw, jax.random.key(1), mesh=mesh),
        training.BatchesAt(batch_at),
        steps=options.steps,
        mesh=mesh,
        saving=training.Saving(
            options.folder / "state",
            every=options.save_every,
            settings={"model": SETTINGS, "learning_rate": 0.01},
        ),
        logging=training.Logging(options.folder / "log", progress=False),
    )


if __name__ == "__main__":
    main()
