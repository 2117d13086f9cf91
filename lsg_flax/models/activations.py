"""The activations that config.json can name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lsg_flax.checks import short

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # BERT's is exact, JAX defaults to the tanh form; erf is faster on CPU than JAX's erfc
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str, field: str = "hidden_act") -> Callable[[Array], Array]:
    """Returns the activation function with this name in config.json.

    Raises:
        ValueError: for an activation that is not supported.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{field}={short(name)} is not supported; supported are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]
