"""Linen parts shared by all models. Maths lives in pure functions (attention.py); modules own only
parameters and dropout.

Axes: B batch, T tokens, G global tokens, D model width, F mlp width, N heads, H head width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax.attention import attend_features_first
from lsg_flax.config import MAX_GLOBAL_TOKENS, EncoderConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(
        x, approximate=False
    ),  # BERT's is exact; JAX defaults to the tanh form
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
    """What every part of a model is told: the config, the dtypes of computation and parameters, and
    whether it is being trained."""

    config: EncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    train: bool = False

    def dense(self, features: int, name: str) -> nn.Dense:
        """A projection with BERT's initialisation."""
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(
            features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name
        )

    def layer_norm(self, name: str) -> nn.LayerNorm:
        """LayerNorm whose statistics are in float32; the two-pass variance, as in PyTorch."""
        return nn.LayerNorm(
            epsilon=self.config.layer_norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_fast_variance=False,
            name=name,
        )

    def dropout(self, x: Array, rate: float | None = None) -> Array:
        """Dropout with the config's hidden rate, or another."""
        rate = self.config.hidden_dropout_prob if rate is None else rate
        return nn.Dropout(rate, deterministic=not self.train)(x)

    def inherited(self) -> dict[str, Any]:
        """The fields of this class, for a part of this part."""
        return {
            "config": self.config,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "train": self.train,
        }


def rows(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table; NaN for ids outside it, where plain indexing would silently take the last
    row."""
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


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
    """Word + position + segment, the global tokens in front, LayerNorm, dropout
    (reference-behaviour 1.3)."""

    def table(self, rows: int, name: str) -> Float[Array, "V D"]:
        """One embedding table in the compute dtype."""
        config = self.config
        table = Embedding(
            rows, config.hidden_size, config.initializer_range, self.param_dtype, name=name
        )()
        return table.astype(self.dtype)

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None,
        token_type_ids: Int[Array, "B T"] | None,
        position_ids: Int[Array, "#B T"] | None,
        inputs_embeds: Float[Array, "B T D"] | None,
    ) -> tuple[Float[Array, "B GT D"], Float[Array, "V D"]]:
        config = self.config
        words = self.table(config.vocab_size, "word_embeddings")
        if input_ids is not None:
            x = rows(words, input_ids)  # [B, T, D]
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
        if config.lsg:
            globals_ = self.table(MAX_GLOBAL_TOKENS, "global_embeddings")[
                None, : config.lsg.num_global_tokens
            ]
            x = jnp.concatenate(
                [jnp.broadcast_to(globals_, (x.shape[0], *globals_.shape[1:])), x], axis=1
            )  # [B, G + T, D]
        return self.dropout(self.layer_norm("layer_norm")(x)), words


class Projection(nn.Module):
    """A dense layer that writes features first, [B, N, H, T], as attention computes."""

    heads: int
    head_dim: int
    std: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B N H T"]:
        width, init = self.heads * self.head_dim, nn.initializers.normal(self.std)
        kernel = self.param("kernel", init, (x.shape[-1], width), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,), self.param_dtype)
        y = jnp.einsum("btd,dm->mbt", x.astype(self.dtype), kernel.astype(self.dtype))
        y = y.swapaxes(0, 1) + bias.astype(self.dtype)[None, :, None]  # [B, N * H, T]
        return y.reshape(x.shape[0], self.heads, self.head_dim, x.shape[1])


class SelfAttention(Part):
    """Projections around LSG or full attention."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        lsh_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        config = self.config

        def project(name):
            shape = (config.num_attention_heads, config.head_dim, config.initializer_range)
            return Projection(*shape, self.dtype, self.param_dtype, name=name)(x)

        rate = config.attention_probs_dropout_prob if self.train else 0.0
        context = attend_features_first(
            project("query"),
            project("key"),
            project("value"),
            mask,
            config=config.lsg,
            causal=config.is_decoder,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            lsh_key=lsh_key,
        )
        context = context.reshape(x.shape[0], -1, x.shape[1]).swapaxes(1, 2)  # [B, T, N * H]
        return self.dense(config.hidden_size, "output")(context)


class EncoderLayer(Part):
    """Post-norm transformer layer, as a scan step: (state, (mask, ...)) -> (state, state)."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        lsh_key: PRNGKeyArray | None = None,
    ):
        config = self.config
        attended = SelfAttention(**self.inherited(), name="attention")(x, mask, lsh_key)
        x = self.layer_norm("attention_norm")(x + self.dropout(attended))
        act = jax.checkpoint(activation(config.hidden_act))  # else its inner steps are kept too
        hidden = act(self.dense(config.intermediate_size, "mlp_up")(x))  # [B, T, F]
        return self.layer_norm("mlp_norm")(
            x + self.dropout(self.dense(config.hidden_size, "mlp_down")(hidden))
        )
