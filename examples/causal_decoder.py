"""A small GPT-2-like decoder written around `lsg_attention`, trained on Python's documentation.

    python examples/causal_decoder.py        # --steps 120 --length 2048

EXPECTED
"""

import argparse
import time
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsg_flax import LSGConfig, full_attention, lsg_attention

START = 256  # the token in front of every stretch of bytes: the one global, seen by all
CONFIG = LSGConfig(block_size=64, sparse_block_size=64, sparsity_factor=4)


class Decoder(nn.Module):
    """Bytes [B, T] -> logits [B, T, 257]; `lsg=None` is full attention with the same parameters."""

    lsg: LSGConfig | None
    length: int
    layers: int = 2
    heads: int = 2
    width: int = 64

    @nn.compact
    def __call__(self, ids):
        small = nn.initializers.normal(0.02)
        words = nn.Embed(START + 1, self.width, embedding_init=small, name="words")
        positions = self.param("positions", small, (self.length, self.width))
        x = words(ids) + positions[None, : ids.shape[1]]  # [B, T, D]
        for _ in range(self.layers):
            x = x + self.attention(nn.LayerNorm()(x))
            wide = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(wide)
        return words.attend(nn.LayerNorm()(x))

    def attention(self, x):
        """Causal self-attention."""
        qkv = nn.DenseGeneral((3, self.heads, self.width // self.heads))(x)  # [B, T, 3, N, H]
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        attend = full_attention
        if self.lsg is not None:
            attend = partial(lsg_attention, config=self.lsg, global_tokens="first_token")
        context = attend(query, key, value, causal=True)
        return nn.DenseGeneral(self.width, axis=(-2, -1))(context)


def windows(text: np.ndarray, length: int, count: int, seed: int) -> np.ndarray:
    """`count` random stretches of text, [count, length + 1]: START, then bytes."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    taken = text[starts[:, None] + np.arange(length)].astype(np.int32)
    return np.pad(taken, [(0, 0), (1, 0)], constant_values=START)


def bits(params, model: Decoder, ids) -> jax.Array:
    """Mean bits per byte of predicting each from those before it."""
    logits = model.apply(params, ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean() / np.log(2)


def train(model: Decoder, batches: np.ndarray) -> tuple[Any, float]:
    """The trained parameters, and seconds per step without compilation."""
    steps = len(batches)
    params = model.init(jax.random.key(0), batches[0, :, :-1])
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, steps // 10, steps))

    @jax.jit
    def step(params, state, ids):
        updates, state = optimizer.update(jax.grad(bits)(params, model, ids), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    compiled, start = step.lower(params, state, batches[0]).compile(), time.perf_counter()
    for ids in batches:
        params, state = jax.block_until_ready(compiled(params, state, ids))
    return params, (time.perf_counter() - start) / steps


def main(steps: int, length: int) -> None:
    """Trains both models on the first nine tenths of the text, measures them on the last."""
    text = np.frombuffer("\n\n".join(topics.values()).encode(), np.uint8)
    split = len(text) * 9 // 10
    batches = windows(text[:split], length, steps, seed=1)[:, None]  # [steps, 1, T + 1]
    held_out = windows(text[split:], length, 8, seed=0)
    measure = jax.jit(bits, static_argnums=1)
    for name, lsg in (("LSG", CONFIG), ("full", None)):
        model = Decoder(lsg, length)
        before = measure(model.init(jax.random.key(0), batches[0, :, :-1]), model, held_out)
        params, seconds = train(model, batches)
        after = measure(params, model, held_out)
        print(f"{name:4}: {before:.2f} -> {after:.2f} bits per byte, {1e3 * seconds:.0f} ms a step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--length", type=int, default=2048)
    main(**vars(parser.parse_args()))
