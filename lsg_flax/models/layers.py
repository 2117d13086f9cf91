"""Linen modules shared by all models. Computations are pure functions; modules own only parameters
and dropout.

Axes: B batch, T tokens, D model width, E embedding width, F features of a projection, I its groups,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from lsg_flax.kernels import Implementation, drop
from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config import EncoderConfig
from lsg_flax.patterns import shard_key
from lsg_flax.sharding import constrain

AxisOrder = Literal["btd", "bdt"]
PROJECTED = "projected"  # the name of projections' results for `jax.checkpoint`
# Up to this many tokens `project` transposes its result: otherwise XLA on CPU transposes the
# kernel, which is 5 x slower.
FEW = 16


@dataclass(frozen=True)
class Context:
    """The settings that every part of a model gets.

    Attributes:
        config, architecture: what is computed.
        dtype, param_dtype: of the computation and of the parameters.
        train: whether the model is being trained.
        sequence_axis: inside `jax.shard_map`, the mesh axis that tokens are sharded over.
        implementation: of attention, see `lsg_attention`.
        slots: number of slots of a new cache, which the layers fill; 0 for no cache.
        texts: largest number of texts in a row, each with its own globals; 0 for one text.
        filler: inside the layers, number of masked positions after the globals.
        activation_dropout: dropout rate after the activation of a layer's wide projection.
        layerdrop: probability that a layer is skipped during training.
        global_attention: the user's module in front of layers of a LocalTransformer.
    """

    config: EncoderConfig
    architecture: Architecture
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    train: bool = False
    sequence_axis: str | None = None
    implementation: Implementation | None = None
    slots: int = 0
    texts: int = 0
    filler: int = 0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    global_attention: nn.Module | None = None


class Part(nn.Module):
    """The base of the modules of a model: one that has the model's `Context`."""

    context: Context

    @property
    def config(self) -> EncoderConfig:
        """The model's config."""
        return self.context.config

    def dense(self, features: int, name: str) -> nn.Dense:
        """Makes a dense layer with BERT's initialisation."""
        context, init = self.context, nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(
            features,
            dtype=context.dtype,
            param_dtype=context.param_dtype,
            kernel_init=init,
            name=name,
        )

    def layer_norm(self, name: str, eps: float | None = None) -> "LayerNorm":
        """Makes a LayerNorm with the config's epsilon, or another one."""
        context = self.context
        eps = self.config.layer_norm_eps if eps is None else eps
        return LayerNorm(eps, context.dtype, context.param_dtype, name=name)

    def dropout(self, x: Array, rate: float | None = None) -> Array:
        """Applies dropout with the config's hidden rate, or another one."""
        rate = self.config.hidden_dropout_prob if rate is None else rate
        if not self.context.train or not rate:
            return x
        key, context = self.make_rng("dropout"), self.context
        axis = context.sequence_axis
        own: PRNGKeyArray | None = shard_key(key, axis)
        if axis is None or self.config.lsg is None:
            return drop(x, own, rate)
        # Globals are replicated over the shards, so all shards must drop the same of them.
        tokens = x.shape[1] - self.config.lsg.num_global_tokens - context.filler
        return jnp.concatenate(
            [drop(x[:, :tokens], own, rate), drop(x[:, tokens:], key, rate)], axis=1
        )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float
) -> Float[Array, "*B D"]:
    """LayerNorm over the last axis, computed and returned in float32, with the two-pass variance,
    as in PyTorch.

    The backward pass sums over tokens by products with ones: JAX's own sums took 40 ms instead of 1
    ms at [4096, 768] on CPU.
    """
    return _normalize_forward(x, scale, bias, eps)[0]


def _normalize_forward(x, scale, bias, eps):
    mean = x.astype(jnp.float32).mean(axis=-1, keepdims=True)
    centred = x - mean
    inverse = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    normal = centred * inverse
    return normal * _like(normal, scale) + _like(normal, bias), (x, mean, inverse, scale, bias)


def _like(x, vector):
    """Adds leading axes of length one: users may configure JAX to refuse rank promotion."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _normalize_backward(eps, saved, gradient):
    del eps
    x, mean, inverse, scale, bias = saved
    normal, scaled = (x - mean) * inverse, gradient * _like(gradient, scale)
    along = (scaled * normal).mean(axis=-1, keepdims=True)
    x_gradient = inverse * (scaled - scaled.mean(axis=-1, keepdims=True) - normal * along)
    ones = jnp.ones(gradient.shape[:-1])
    total = partial(jnp.tensordot, ones, axes=ones.ndim)  # over all axes but the last
    scale_gradient = total(gradient * normal).astype(scale.dtype)
    return x_gradient.astype(x.dtype), scale_gradient, total(gradient).astype(bias.dtype)


normalize.defvjp(_normalize_forward, _normalize_backward)


class LayerNorm(nn.Module):
    """`normalize` with its parameters, named as in `flax.linen.LayerNorm`."""

    eps: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        y: Array = normalize(x, scale, bias, self.eps)
        return y.astype(self.dtype)


def rows(table: Float[Array, "V D"], ids: Integer[Array, "B T"]) -> Float[Array, "B T D"]:
    """Looks up rows of a table. Ids outside it, negative ones too, give NaN; plain indexing would
    silently take the last row or count from the end."""
    # On a mesh every device looks up its columns for all tokens; the results are then exchanged.
    ids = constrain(ids, "batch", None)
    x = jnp.asarray(table).at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return constrain(x, "batch", None, "columns")


class Embedding(nn.Module):
    """An embedding table: one parameter, `embedding`."""

    rows: int
    features: int
    std: float
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        return self.param(
            "embedding",
            nn.initializers.normal(self.std),
            (self.rows, self.features),
            self.param_dtype,
        )


class Buffer(nn.Module):
    """An array that is stored with the parameters and never trained: one leaf, `buffer`. If a file
    lacks it, its initial value is used."""

    first: Callable[[], Array]
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> Array:
        value = self.param("buffer", lambda key: self.first().astype(self.param_dtype))
        return jax.lax.stop_gradient(value)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: Array, kernel: Float[Array, "D F"], reads: AxisOrder = "btd", writes: AxisOrder = "btd"
) -> Array:
    """Computes x @ kernel; input and output each have tokens first ("btd") or features first
    ("bdt").

    The backward pass is written by hand, because XLA on CPU would merge the transpose that JAX puts
    after a weight gradient into the product, and then compute it 1.7 x slower.
    """
    if (reads, writes) == ("btd", "bdt") and x.shape[1] <= FEW:
        return jnp.einsum("btd,df->btf", x, kernel).swapaxes(1, 2)
    return jnp.einsum(f"{reads},df->{writes.replace('d', 'f')}", x, kernel)


def _project_forward(x, kernel, reads, writes):
    return project(x, kernel, reads, writes), (x, kernel)


def _project_backward(reads, writes, saved, gradient):
    x, kernel = saved
    writes = writes.replace("d", "f")
    x_gradient = jnp.einsum(f"{writes},df->{reads}", gradient, kernel)
    # XLA transposes the left operand unless its features are first, so the operand that is cheaper
    # to transpose goes to the left.
    x_left = (reads == "bdt", kernel.shape[1]) > (writes == "bft", kernel.shape[0])
    if x_left:
        return x_gradient, jnp.einsum(f"{reads},{writes}->df", x, gradient)
    transposed = jnp.einsum(f"{writes},{reads}->fd", gradient, x)
    return x_gradient, jax.lax.optimization_barrier(transposed).T


project.defvjp(_project_forward, _project_backward)


class Projection(Part):
    """A dense layer with BERT's initialisation for the layouts of `project`; `act` is applied to
    its input."""

    features: int = 0
    reads: AxisOrder = "btd"
    writes: AxisOrder = "btd"
    act: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        context, architecture = self.context, self.context.architecture
        groups = architecture.groups_of(self.name or "", self.config)
        init = nn.initializers.normal(self.config.initializer_range)
        shape, name = (x.shape[self.reads.index("d")], self.features), "kernel"
        run: Any = project
        if groups is not None:
            shape, name = (groups, *(size // groups for size in shape)), "kernels"  # [I, D/I, F/I]
            run = project_groups
        kernel = self.param(name, init, shape, context.param_dtype).astype(context.dtype)

        x = self.act(x) if self.act else x
        y = run(x.astype(context.dtype), kernel, self.reads, self.writes)
        if architecture.biases:
            zeros = nn.initializers.zeros
            bias = self.param("bias", zeros, (self.features,), context.param_dtype)
            shape = (1, -1, 1) if self.writes == "bdt" else (1, 1, -1)
            y += bias.astype(context.dtype).reshape(shape)
        return checkpoint_name(y, PROJECTED)


def project_groups(
    x: Array, kernel: Float[Array, "I _ _"], reads: AxisOrder = "btd", writes: AxisOrder = "btd"
) -> Array:
    """A grouped `project`: group i of the inputs gives group i of the outputs, by kernels
    [I, D/I, F/I], without the zeros that one matrix of all groups would have."""
    axis, ahead = reads.index("d"), writes.index("d")
    split = x.reshape(*x.shape[:axis], kernel.shape[0], -1, *x.shape[axis + 1 :])
    y = jax.vmap(lambda x, kernel: project(x, kernel, reads, writes), (axis, 0), ahead)(
        split, kernel
    )
    return y.reshape(*y.shape[:ahead], -1, *y.shape[ahead + 2 :])
