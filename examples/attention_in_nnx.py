"""lsg_flax in Flax NNX: trains an NNX model that contains a pretrained encoder, and uses LSG
attention in NNX's own attention layer.

    python examples/attention_in_nnx.py CHECKPOINT     # a BERT: a folder or a hub id
    4 texts of 1024 tokens: ToNNX and apply differ by 0.0e+00
    step 1: loss 0.666, 51.8 s
    step 2: loss 0.374, 21.7 s
    step 3: loss 0.169, 20.3 s

With the weights of all-MiniLM-L6-v2, made for 512 tokens. Measured on 2 CPU cores that were busy
with other work, the first step with compilation.
"""

import argparse
import pathlib
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lsg_flax
from lsg_flax import hub
from lsg_flax.adapters import AttentionFn


def to_nnx(model: lsg_flax.Model, params, rngs: nnx.Rngs) -> nnx.bridge.ToNNX:
    """Our Linen model as an NNX module that holds these parameters."""
    module = nnx.bridge.ToNNX(model, rngs)
    for name, part in params.items():  # what `lazy_init` does, without drawing random ones first
        setattr(module, name, nnx.data(jax.tree.map(nnx.Param, part)))
    return module


class Classifier(nnx.Module):
    """The encoder, one layer of NNX's own attention with the same pattern, mean, linear."""

    def __init__(self, model: lsg_flax.Model, params, labels: int, rngs: nnx.Rngs):
        width, heads = model.config.hidden_size, model.config.num_attention_heads
        self.encoder = to_nnx(model, params, rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, attention_fn=AttentionFn(model.config.lsg), rngs=rngs
        )
        self.head = nnx.Linear(width, labels, rngs=rngs)

    def __call__(self, ids, mask, *, train: bool = False):
        x = self.encoder(ids, mask, train=train).last_hidden_state  # [B, T, D]
        x = x + self.attention(x, mask=mask[:, None, None].astype(bool))
        return self.head((x * mask[..., None]).sum(axis=1) / mask.sum(axis=1)[:, None])


def texts(count: int) -> tuple[list[str], np.ndarray]:
    """Pages of Python's documentation (label 0) and files of its library (1), by turns."""
    pages = sorted(topics.values(), key=len)[-count // 2 :]
    library = sorted(pathlib.Path(argparse.__file__).parent.glob("*.py"))
    files = [file.read_text() for file in library[: count // 2]]
    return [t for pair in zip(pages, files, strict=True) for t in pair], np.arange(count) % 2


def main(checkpoint: str, length: int, steps: int, rate: float = 1e-4) -> None:
    """Converts, compares, trains."""
    model, params = lsg_flax.convert_checkpoint(checkpoint, task="base", max_sequence_length=length)
    tokenizer = hub.read_tokenizer(hub.resolve(checkpoint))
    raw, labels = texts(4)
    batch = tokenizer(raw, padding=True, truncation=True, max_length=length, return_tensors="np")
    ids, mask = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])

    classifier = Classifier(model, params, 2, nnx.Rngs(params=0, dropout=1))
    states = nnx.jit(lambda m, ids, mask: m.encoder(ids, mask).last_hidden_state)
    ours = jax.jit(model.apply)({"params": params}, ids, mask).last_hidden_state
    apart = jnp.abs(states(classifier, ids, mask) - ours).max()
    print(f"{ids.shape[0]} texts of {ids.shape[1]} tokens: ToNNX and apply differ by {apart:.1e}")

    optimizer = nnx.Optimizer(classifier, optax.adamw(rate), wrt=nnx.Param)

    @nnx.jit
    def step(classifier, optimizer):
        def loss(classifier):
            logits = classifier(ids, mask, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = nnx.value_and_grad(loss)(classifier)
        optimizer.update(classifier, gradient)
        return value

    for number in range(1, steps + 1):
        start = time.perf_counter()
        loss = float(step(classifier, optimizer))
        print(f"step {number}: loss {loss:.3f}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    main(**vars(parser.parse_args()))
