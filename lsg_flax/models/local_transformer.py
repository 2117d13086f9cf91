"""local-attention's transformer: layers of local attention and gated feed-forward layers, between
residual streams.

Axes: B batch, T tokens, D model width, N heads, Q queries of a block (a window), W keys of a
block's windows.
"""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lsg_flax import patterns
from lsg_flax.checks import require
from lsg_flax.kernels import Source
from lsg_flax.models.attention_layers import HeadProjections, LayerCall
from lsg_flax.models.config import ModelConfig
from lsg_flax.models.config_local import LocalTransformerConfig
from lsg_flax.models.embeddings import Embeddings
from lsg_flax.models.encoder import BodyOutput, Stack, with_cache
from lsg_flax.models.inputs import Inputs
from lsg_flax.models.layers import Buffer, Part, Projection
from lsg_flax.patterns import Cache, LayerCache, frequencies, unit
from lsg_flax.sharding import constrain


class _LocalPart(Part):
    """A module of this transformer."""

    @property
    def settings(self) -> LocalTransformerConfig:
        """The config, with its type."""
        assert isinstance(self.config, LocalTransformerConfig)
        return self.config

    def weight(self, name: str, init: Any, *shape: int) -> Array:
        """Returns a parameter in the dtype of the computation."""
        context = self.context
        return self.param(name, init, shape, context.param_dtype).astype(context.dtype)


class ResidualStreams(_LocalPart):
    """Hyper-connections (arXiv 2409.19606, algorithm 2). Returns the input of a branch, the mixed
    streams, and the weight with which the branch's output is added to each stream. A single stream
    is a plain residual connection."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T _ D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T _ D"], Float[Array, "B T _"]]:
        count, width = x.shape[2:]
        if count == 1:
            return x[:, :, 0], x, jnp.ones_like(x[..., 0])
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        small = nn.initializers.constant(1e-2)
        gain = self.weight("norm_gamma", zeros, width) + 1
        normed = unit(x, -1) * width**0.5 * gain[None, None, None]
        alpha = jnp.tanh(normed @ self.weight("dynamic_alpha_fn", zeros, width, 1 + count))
        alpha *= self.weight("dynamic_alpha_scale", small)
        alpha += self.weight("static_alpha", _one_of, count, 1 + count)[None, None]
        mixed = jnp.einsum("btsi,btsd->btid", alpha, x)
        beta = jnp.tanh(normed @ self.weight("dynamic_beta_fn", zeros, width))
        beta *= self.weight("dynamic_beta_scale", small)
        beta += self.weight("static_beta", ones, count)[None, None]
        return mixed[:, :, 0], mixed[:, :, 1:], beta


def _one_of(key, shape, dtype) -> Array:
    """The initial value: a branch reads one stream, and all streams are unchanged."""
    count = shape[0]
    read = jax.nn.one_hot(jax.random.randint(key, (), 0, count), count, dtype=dtype)
    return jnp.concatenate([read[:, None], jnp.eye(count, dtype=dtype)], axis=1)


class LocalHeads(HeadProjections, _LocalPart):
    """Local attention with its projections (LocalMHA). The second result is the layer's part of the
    cache, whose keys are not rotated."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], call: LayerCall
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        settings, pattern = self.settings, self.settings.pattern
        heads, width = settings.num_attention_heads, settings.head_dim
        y = Projection(self.context, 3 * heads * width, writes="bdt", name="qkv")(x)
        y = y.reshape(x.shape[0], 3, heads, width, x.shape[1])
        y = constrain(y, "batch", None, "heads", None, "length")
        query, key, value = y[:, 0], y[:, 1], y[:, 2]
        if settings.qk_rmsnorm:
            query, key = (
                unit(part, 2)
                * self.weight(f"scale_of_{name}", nn.initializers.ones, width)[None, None, :, None]
                for name, part in (("query", query), ("key", key))
            )
        if pattern.rotary is not None:  # PyTorch stores these constants
            first = lambda: jnp.asarray(frequencies(width))  # noqa: E731
            Buffer(first, self.context.param_dtype, name="inv_freq")()
        source, run = Source(key, value, call.mask[:, None]), self.runtime()
        new = None
        if call.cache is not None and call.number is not None:
            place = (call.cache, call.number)
            context, new = patterns.step(pattern, query, source, run, *place, bias=call.bias)
        else:
            context = patterns.attention(pattern, query, source, run, call.bias)
            if slots := self.context.slots:
                new = patterns.prefill(pattern, query, source, run, slots)
        if settings.gate_values_per_head:
            gate = nn.sigmoid(self.dense(heads, "gate")(x))  # [B, T, N]
            context *= gate.swapaxes(1, 2)[:, :, None]
        return self.merged(context), new


class GlobalLayer(_LocalPart):
    """The user's module with residual streams of its own."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T _ D"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T _ D"]:
        inner, kept, share = ResidualStreams(self.context, name="global_streams")(x)
        module, call = self.context.global_attention, {"attention_mask": mask}
        assert module is not None
        call |= {"train": self.context.train}
        takes = call.keys() & inspect.signature(type(module).__call__).parameters
        y = module.clone(parent=self, name="attention")(inner, **{n: call[n] for n in takes})
        require(
            jnp.shape(y) == inner.shape,
            f"global_attention returned {jnp.shape(y)} for states {inner.shape}; it must return "
            "the same shape, [batch, tokens, dim].",
        )
        return kept + share[..., None] * y.astype(x.dtype)[:, :, None]


class LocalLayer(_LocalPart):
    """A layer as a step of a scan: its output is the carry and, if asked for, also collected."""

    keep_states: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T _ D"], call: LayerCall):
        x = self._behind_given(x, call)
        inner, kept, share = ResidualStreams(self.context, name="attention_streams")(x)
        inner = self.layer_norm("attention_norm")(inner)
        attended, new = LocalHeads(self.context, name="attention")(inner, call)
        x = kept + share[..., None] * attended[:, :, None]
        inner, kept, share = ResidualStreams(self.context, name="mlp_streams")(x)
        x = kept + share[..., None] * self._fed_forward(inner)[:, :, None]
        x = constrain(x, "batch", "length", None, None)
        return x, (x.sum(axis=2) if self.keep_states else None, new)

    def _behind_given(self, x: Float[Array, "B T _ D"], call: LayerCall) -> Array:
        """Applies the user's module to the streams, if this layer has one."""
        if call.given is None:
            return x
        params, there = call.given
        rngs = {"dropout": self.make_rng("dropout")} if self.context.train else {}
        apply: Any = GlobalLayer(self.context, parent=None).apply
        run = lambda x: apply({"params": params}, x, call.mask, rngs=rngs)  # noqa: E731
        return run(x) if there is None else jax.lax.cond(there, run, lambda x: x, x)

    def _fed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        settings = self.settings
        up = Projection(self.context, 2 * settings.mlp_width, name="mlp_up")
        wide, gate = jnp.split(up(self.layer_norm("mlp_norm")(x)), 2, axis=-1)
        wide = self.dropout(wide * nn.gelu(gate, approximate=False), settings.ff_dropout)
        return Projection(self.context, settings.hidden_size, name="mlp_down")(wide)


class PositionBias(_LocalPart):
    """A learned bias for the distance between each query of a window and each key that it sees."""

    @nn.compact
    def __call__(self) -> Float[Array, "N Q W"]:
        pattern, width = self.settings.pattern, self.settings.hidden_size // 2
        size, seen = pattern.window_size, pattern.windows_seen
        x = jnp.arange(seen * size, dtype=self.context.dtype)[:, None]
        for number, features in enumerate((width, width, self.settings.num_attention_heads)):
            x = self.dense(features, f"dense_{number}")(nn.silu(x) if number else x)
        query = jnp.arange(size) + pattern.look_backward * size
        return x.T[:, jnp.abs(query[:, None] - jnp.arange(seen * size)[None])]


class LocalTransformer(Stack, _LocalPart):
    """Embeddings and layers; without a vocabulary only layers, which read embeddings."""

    @nn.compact
    def __call__(self, inputs: Inputs, cache: Cache | None = None) -> BodyOutput:
        """Runs the stack; with a cache, the input is the next token."""
        settings, mask = self.settings, inputs.attention_mask
        require(
            cache is None or not settings.global_layers,
            "a model with global attention layers cannot use a cache, because these layers see all "
            "tokens: call it on whole texts, or generate(..., use_cache=False).",
        )
        if settings.vocab_size:
            if cache is not None:
                inputs = inputs._replace(position_ids=cache.position[:, None])
            _, x, words = Embeddings(self.context, name="embeddings")(inputs)
        else:
            x = inputs.inputs_embeds.astype(self.context.dtype)
            words = x[0, :0]
        whole = cache is not None or settings.global_layers  # tokens are not sharded by us
        length, shards = x.shape[1], 1 if whole else self.shard_count()
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask.astype(bool)
        extra = settings.pattern.needs_padding(length, shards) if shards > 1 else 0
        x, mask = jnp.pad(x, ((0, 0), (0, extra), (0, 0))), jnp.pad(mask, ((0, 0), (0, extra)))
        bias = None
        if settings.use_dynamic_pos_bias:
            bias = PositionBias(self.context, name="position_bias")()
        streams = jnp.repeat(x[:, :, None], settings.num_residual_streams, axis=2)
        call = LayerCall(mask, cache=cache, bias=bias, given=self._given(streams, mask))
        _, streams, states, new = self.run_layers(LocalLayer, streams[:, :0], streams, call, shards)
        if states is not None:
            states = (x, *states)
        body = BodyOutput(streams.sum(axis=2)[:, :length], states, words, None)
        return with_cache(settings.pattern, body, call, new, inputs.position_ids)

    def _given(self, x: Float[Array, "B T _ D"], mask: Bool[Array, "B T"]):
        """Returns `LayerCall.given` for all layers. The parameters are stacked only over the layers
        that have the module, so they are made outside the scan, which runs over all layers."""
        numbers, depth = self.settings.global_layers, self.config.num_hidden_layers
        if not numbers:
            return None
        if self.is_initializing():
            drawn = nn.vmap(
                GlobalLayer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,  # pyright: ignore[reportArgumentType]
                axis_size=len(numbers),
            )
            drawn(self.context, name="global_layers")(x, mask)
        params = self.variables["params"].get("global_layers", {})
        if len(numbers) == depth:
            return params, None
        there = np.isin(np.arange(1, depth + 1), numbers)
        places = np.maximum(np.cumsum(there) - 1, 0)
        return jax.tree.map(lambda x: x[places], params), jnp.asarray(there)


def check_given(config: ModelConfig, module: nn.Module | None) -> None:
    """Raises ValueError unless the module and the layers that get it are given together."""
    layers = config.global_layers if isinstance(config, LocalTransformerConfig) else ()
    require(
        (module is not None) == bool(layers),
        f"global_attention={type(module).__name__} with layers_insert_global_attn={list(layers)}: "
        "give the Flax module and the layers that get it together, and only for a "
        "local-transformer (from_pretrained(folder, global_attention=module) uses all layers if "
        "config.json lists none).",
    )
