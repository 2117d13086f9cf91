"""Linen parts shared by all models. Maths lives in pure functions (attention.py); modules own only
parameters and dropout.

Axes: B batch, T tokens, G global tokens, D model width, E embedding width, F mlp width, N
    heads, H head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax import patterns
from lsg_flax.kernels import Source, drop
from lsg_flax.models.config import EncoderConfig
from lsg_flax.patterns import MAX_GLOBAL_TOKENS, Cache, LayerCache, Runtime, halo
from lsg_flax.sharding import constrain

Layout = Literal["btd", "bdt"]
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


def activation(name: str) -> Callable[[Array], Array]:
    """The function that config.json calls `name`.

    Raises:
        ValueError: for an activation that is not supported.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act={name!r} is not supported; supported are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


class Part(nn.Module):
    """What every part of a model is told: the config, the dtypes of computation and parameters,
    whether it is being trained, and inside `jax.shard_map` the mesh axis that tokens are spread
    over."""

    config: EncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    train: bool = False
    sequence_axis: str | None = None

    def dense(self, features: int, name: str) -> nn.Dense:
        """A projection with BERT's initialisation."""
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(
            features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name
        )

    def layer_norm(self, name: str) -> "LayerNorm":
        """LayerNorm with the config's epsilon."""
        return LayerNorm(self.config.layer_norm_eps, self.dtype, self.param_dtype, name=name)

    def dropout(self, x: Array, rate: float | None = None) -> Array:
        """Dropout with the config's hidden rate, or another."""
        rate = self.config.hidden_dropout_prob if rate is None else rate
        if not self.train or not rate:
            return x
        key, axis = self.make_rng("dropout"), self.sequence_axis
        if axis is None or self.config.lsg is None:
            return drop(x, key, rate)
        split = self.config.lsg.num_global_tokens  # the globals stay the same in every shard
        own: PRNGKeyArray | None = halo.shard_key(key, axis)
        return jnp.concatenate(
            [drop(x[:, :split], key, rate), drop(x[:, split:], own, rate)], axis=1
        )

    def inherited(self) -> dict[str, Any]:
        """The fields of this class, for a part of this part."""
        return {
            "config": self.config,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "train": self.train,
            "sequence_axis": self.sequence_axis,
        }


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float
) -> Float[Array, "*B D"]:
    """LayerNorm over the last axis, computed and returned in float32, with the two-pass variance,
    as in PyTorch.

    The backward pass sums over tokens by products with ones: the sums that JAX writes there took
    40 ms instead of 1 ms at [4096, 768] on CPU.
    """
    return _normalize_forward(x, scale, bias, eps)[0]


def _normalize_forward(x, scale, bias, eps):
    mean = x.astype(jnp.float32).mean(axis=-1, keepdims=True)
    centred = x - mean
    inverse = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    normal = centred * inverse
    return normal * _like(normal, scale) + _like(normal, bias), (x, mean, inverse, scale, bias)


def _like(x, vector):
    """The vector with leading axes of length one: JAX may be told to refuse adding them itself."""
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


def rows(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table; NaN for ids outside it, where plain indexing would silently take the last
    row."""
    # On a mesh every device looks up its columns for all tokens; they are exchanged afterwards.
    ids = constrain(ids, "batch", None)
    x = jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
    return constrain(x, "batch", None, "columns")


class Embedding(nn.Module):
    """A table of rows: one parameter, `embedding`."""

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


class Embeddings(Part):
    """Word + position + segment, LayerNorm, dropout; the same for the global tokens
    (reference-behaviour 1.3)."""

    def table(self, rows: int, name: str) -> Float[Array, "V E"]:
        """One embedding table in the compute dtype."""
        config = self.config
        table = Embedding(
            rows, config.embedding_width, config.initializer_range, self.param_dtype, name=name
        )()
        return constrain(table.astype(self.dtype), "vocab", "columns")

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None,
        token_type_ids: Int[Array, "B T"] | None,
        position_ids: Int[Array, "#B T"] | None,
        inputs_embeds: Float[Array, "B T E"] | None,
    ) -> tuple[Float[Array, "B G E"] | None, Float[Array, "B T E"], Float[Array, "V E"]]:
        """Returns the globals (None without LSG), the tokens, and the word table."""
        config = self.config
        words = self.table(config.vocab_size, "word_embeddings")
        if input_ids is not None:
            x = rows(words, input_ids)  # [B, T, E]
        else:
            assert inputs_embeds is not None  # models check that one of them is given
            x = inputs_embeds.astype(self.dtype)
        positions = self.table(config.max_position_embeddings, "position_embeddings")
        x += (
            positions[None, : x.shape[1]] if position_ids is None else rows(positions, position_ids)
        )
        if config.type_vocab_size:
            types = self.table(config.type_vocab_size, "token_type_embeddings")
            x += types[None, :1] if token_type_ids is None else rows(types, token_type_ids)
        x = constrain(x, "batch", "length", None)
        norm = self.layer_norm("layer_norm")
        globals_ = None
        if config.lsg:
            table = self.table(MAX_GLOBAL_TOKENS, "global_embeddings")
            first = table[None, : config.lsg.num_global_tokens]
            globals_ = jnp.broadcast_to(norm(first), (x.shape[0], *first.shape[1:]))
            globals_ = self.dropout(globals_)
        return globals_, self.dropout(norm(x)), words


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: Array, kernel: Float[Array, "D F"], reads: Layout = "btd", writes: Layout = "btd"
) -> Array:
    """x @ kernel between layouts: "btd" tokens first, "bdt" features first, for input and output.

    Its backward pass is written out because of XLA on CPU, which merges the transpose that JAX
    puts behind a weight gradient into the product and then computes it 1.7 x slower.
    """
    return jnp.einsum(f"{reads},df->{writes.replace('d', 'f')}", x, kernel)


def _project_forward(x, kernel, reads, writes):
    return project(x, kernel, reads, writes), (x, kernel)


def _project_backward(reads, writes, saved, gradient):
    x, kernel = saved
    writes = writes.replace("d", "f")
    x_gradient = jnp.einsum(f"{writes},df->{reads}", gradient, kernel)
    # XLA transposes the left operand unless it has features first, so it gets the cheaper one.
    x_left = (reads == "bdt", kernel.shape[1]) > (writes == "bft", kernel.shape[0])
    if x_left:
        return x_gradient, jnp.einsum(f"{reads},{writes}->df", x, gradient)
    transposed = jnp.einsum(f"{writes},{reads}->fd", gradient, x)
    return x_gradient, jax.lax.optimization_barrier(transposed).T


project.defvjp(_project_forward, _project_backward)


class Projection(Part):
    """A dense layer with BERT's initialisation between the layouts of `project`.

    `act` is applied to the input and recomputed in the backward pass, which then keeps only what
    went into it.
    """

    features: int = 0
    reads: Layout = "btd"
    writes: Layout = "btd"
    act: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(self.config.initializer_range)
        shape = (x.shape[self.reads.index("d")], self.features)
        kernel = self.param("kernel", init, shape, self.param_dtype).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)

        def apply(x, kernel):
            return project(self.act(x) if self.act else x, kernel, self.reads, self.writes)

        y: Array = (jax.checkpoint(apply) if self.act else apply)(x.astype(self.dtype), kernel)
        return y + bias.astype(self.dtype).reshape(
            (1, -1, 1) if self.writes == "bdt" else (1, 1, -1)
        )


class _Attention(Part):
    """What self- and cross-attention share."""

    def heads(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B N H T"]:
        """A projection, cut into heads."""
        config = self.config
        features = config.num_attention_heads * config.head_dim
        y = Projection(**self.inherited(), features=features, writes="bdt", name=name)(x)
        y = y.reshape(x.shape[0], config.num_attention_heads, config.head_dim, x.shape[1])
        return constrain(y, "batch", "heads", None, "length")

    def merged(self, context: Float[Array, "B N H T"]) -> Float[Array, "B T D"]:
        """The heads side by side, projected."""
        features = self.config.hidden_size
        output = Projection(**self.inherited(), features=features, reads="bdt", name="output")
        return output(context.reshape(context.shape[0], -1, context.shape[-1]))

    def run(self, lsh_key: PRNGKeyArray | None = None) -> Runtime:
        """What this call brings to its pattern."""
        rate = self.config.attention_probs_dropout_prob if self.train else 0.0
        key = self.make_rng("dropout") if rate else None
        return Runtime(rate, key, lsh_key, sequence_axis=self.sequence_axis)


class SelfAttention(_Attention):
    """Projections around LSG or full attention.

    Given a cache and the number of this layer, x is the next token. The second result is what the
    layer shall keep of x: with `slots` of the whole prompt, with a cache of that token.
    """

    slots: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        lsh_key: PRNGKeyArray | None = None,
        cache: Cache | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        config = self.config
        pattern = patterns.pattern_of(config.lsg, causal=config.is_decoder)
        query, key, value = (self.heads(x, name) for name in ("query", "key", "value"))
        source, run = Source(key, value, mask[:, None]), self.run(lsh_key)
        if cache is not None and layer is not None:
            context, new = patterns.step(pattern, query, source, run, cache, layer)
            return self.merged(context), new
        context, new = patterns.attention(pattern, query, source, run), None
        if self.slots:
            new = patterns.prefill(pattern, query, source, run, self.slots)
        return self.merged(context), new


class Memory(NamedTuple):
    """The encoder's states that a decoder attends to; `mask` True for real ones."""

    states: Float[Array, "B S D"]
    mask: Bool[Array, "B S"]


class CrossAttention(_Attention):
    """Full attention to the encoder's states, or to the keys and values kept of them; returns these
    too."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], memory: Memory | Source
    ) -> tuple[Float[Array, "B T D"], Source]:
        query = self.heads(x, "query")
        if isinstance(memory, Memory):
            states, mask = memory
            memory = Source(self.heads(states, "key"), self.heads(states, "value"), mask[:, None])
        context = patterns.attention(patterns.Full(), query, memory, self.run())
        return self.merged(context), memory


class EncoderLayer(Part):
    """Post-norm transformer layer. Returns its output and, with `slots` or a cache, what it shall
    keep (see `SelfAttention`)."""

    slots: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        lsh_key: PRNGKeyArray | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        config = self.config
        attention = SelfAttention(**self.inherited(), slots=self.slots, name="attention")
        attended, new = attention(x, mask, lsh_key, cache, layer)
        x = self.layer_norm("attention_norm")(x + self.dropout(attended))
        source = memory
        if cache is not None:
            source = jax.tree.map(lambda x: x[layer], cache.layers.memory)
        if source is not None:
            cross = CrossAttention(**self.inherited(), name="cross_attention")
            attended, source = cross(x, source)
            x = self.layer_norm("cross_attention_norm")(x + self.dropout(attended))
            new = new._replace(memory=source) if self.slots and new else new
        up, down = (
            Projection(**self.inherited(), features=size, act=act, name=name)
            for size, act, name in (
                (config.intermediate_size, None, "mlp_up"),
                (config.hidden_size, activation(config.hidden_act), "mlp_down"),
            )
        )
        wide = constrain(up(x), "batch", "length", "mlp")
        x = self.layer_norm("mlp_norm")(x + self.dropout(down(wide)))
        return constrain(x, "batch", "length", None), new
