"""The one encoder: embeddings, a scanned stack of layers, pooler. Families and attention kinds are
values of its config.

Axes: B batch, T tokens, U tokens with an output (T, or 1 with a cache), G global tokens, D model
width, E embedding width, L layers.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from lsg_flax.attention import DEFAULT_LSH_SEED
from lsg_flax.config import EncoderConfig
from lsg_flax.decoding import Cache, LayerCache, extend, prompt_length
from lsg_flax.layers import Embeddings, EncoderLayer, Memory, Part
from lsg_flax.models.families import family_of

Remat = Literal["none", "full", "dots"]
REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Encoder(Part):
    """Embeddings and layers.

    Attributes:
        remat: what the backward pass recomputes: "none", "full" (a layer keeps only its input),
            "dots" (keeps its projections).
        unroll: layers per iteration of the scan; more compiles longer and may run faster.
        keep_states: also return every layer's output.
        slots: if not 0, also return a cache with this many (from `decoding.slots_for`).
    """

    remat: Remat = "none"
    unroll: int = 1
    keep_states: bool = False
    slots: int = 0

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "#B T"] | None = None,
        inputs_embeds: Float[Array, "B T E"] | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
    ) -> tuple[
        Float[Array, "B U D"],
        tuple[Float[Array, "B GT D"], ...] | None,
        Float[Array, "V E"],
        Cache | None,
    ]:
        """Returns the last state (without globals and padding), all states (with them) if kept, the
        word table, and the cache. Given a cache, the input is the next token; with `slots` or a
        cache, the last state is that of the last token alone."""
        lsg, family = self.config.lsg if cache is None else None, family_of(self.config.model_type)
        if cache is not None and position_ids is None:
            position_ids = cache.position[:, None]
        if position_ids is None and family.positions_after_padding:
            position_ids = _positions_after_padding(input_ids, inputs_embeds, self.config)
        x, words = Embeddings(**self.inherited(), name="embeddings")(
            input_ids, token_type_ids, position_ids, inputs_embeds
        )
        if family.projects(self.config) and not family.always_projects:
            x = self.dense(self.config.hidden_size, "embeddings_project")(x)
        if cache is not None and self.config.lsg:
            x = x[:, self.config.lsg.num_global_tokens :]  # they are in the cache
        globals_ = lsg.num_global_tokens if lsg else 0
        length = x.shape[1] - globals_
        mask = (
            jnp.ones((x.shape[0], length), bool)
            if attention_mask is None
            else attention_mask.astype(bool)
        )
        if lsg:
            if lsg.mask_first_token:
                mask = mask.at[:, 0].set(False)
            extra = lsg.needs_padding(length)  # once here, not in each layer
            mask = jnp.pad(
                jnp.pad(mask, ((0, 0), (0, extra))), ((0, 0), (globals_, 0)), constant_values=True
            )  # [B, G + T]
            x = jnp.pad(x, ((0, 0), (0, extra), (0, 0)))
        if family.always_projects:  # behind the padding, which can be seen under strict_reference
            x = self.dense(self.config.hidden_size, "embeddings_project")(x)
        last, states, layers = self._layers(x, mask, memory, cache)
        if lsg and lsg.pool_with_global:
            last = last.at[:, globals_].set(last[:, 0])
        if states is not None:  # the reference pools in place, so its last entry shows it
            states = (x, *states[:-1], last)
        last = last[:, globals_ : globals_ + length]
        if cache is not None:
            assert position_ids is not None and layers is not None
            position = jnp.broadcast_to(position_ids[:, 0], cache.position.shape)
            cache = extend(cache, layers, position, self.config.lsg)
        elif layers is not None:
            cache = _first_cache(layers, mask[:, globals_ : globals_ + length], position_ids)
            last = jax.lax.dynamic_slice_in_dim(last, cache.length - 1, 1, axis=1)
        return last, states, words, cache

    def _layers(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        memory: Memory | None,
        cache: Cache | None,
    ):
        """The scan over stacked layers: parameters have a leading axis of layers, and compile time
        does not grow with depth."""
        step: Any = _Step
        if self.remat != "none":
            step = nn.remat(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        config, keys = self.config, self._lsh_keys()
        unroll = min(self.unroll, config.num_hidden_layers)
        stack = _scan(step, config.stack[-1], unroll)
        if config.num_hidden_groups is not None:  # group, times that it is used, layer within
            groups, inner = config.stack
            times = config.num_hidden_layers // groups
            stack = _scan(_scan(stack, times, 1, shared=True), groups, 1)
            keys = None if keys is None else keys.reshape(groups, times, inner)
        layers = stack(
            **self.inherited(), slots=self.slots, keep_states=self.keep_states, name="layers"
        )
        numbers = None if cache is None else jnp.arange(config.num_hidden_layers)
        last, (states, new) = layers(x, mask, keys, memory, cache, numbers)
        if states is not None and config.num_hidden_groups is not None:
            states = states[:, :, -1].reshape(config.num_hidden_layers, *x.shape)
        return last, states, new

    def _lsh_keys(self) -> Key[Array, "L"] | None:
        """One key per layer, from the "lsh" rng or a fixed seed."""
        lsg = self.config.lsg
        if not lsg or lsg.sparsity_type != "lsh":
            return None
        key = self.make_rng("lsh") if self.has_rng("lsh") else jax.random.key(DEFAULT_LSH_SEED)
        inner = self.config.inner_group_num or 1
        return jax.random.split(key, self.config.num_hidden_layers * inner)


def _scan(step, length: int, unroll: int, *, shared: bool = False) -> Any:
    """The module repeated: with parameters of its own each time, stacked along a leading axis, or
    `shared` ones."""
    return nn.scan(
        step,
        variable_axes={} if shared else {"params": 0},
        variable_broadcast="params" if shared else False,
        split_rngs={"params": not shared, "dropout": True},
        in_axes=(nn.broadcast, 0, nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
        length=length,
        unroll=unroll,
    )


def _positions_after_padding(ids, embeds, config: EncoderConfig) -> Int[Array, "#B T"]:
    """Real tokens counted from pad_token_id + 1, padding at pad_token_id (RoBERTa); embeddings, of
    which none can be told to be padding, from the first on."""
    first = (config.pad_token_id or 0) + 1
    if ids is None:
        return jnp.arange(first, first + embeds.shape[1])[None]
    real = (ids != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + first - 1


def _first_cache(
    layers: LayerCache, mask: Bool[Array, "B T"], position_ids: Int[Array, "#B T"] | None
) -> Cache:
    """The cache of a prompt; positions are counted on from that of its last token."""
    length = prompt_length(mask)
    position = length[None] if position_ids is None else position_ids[:, length - 1] + 1
    return Cache(layers, length, jnp.broadcast_to(position, mask.shape[:1]).astype(jnp.int32))


class _Step(EncoderLayer):
    """A layer as a scan step: its output is carried on and, if asked for, kept."""

    keep_states: bool = False

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        lsh_key: PRNGKeyArray | None,
        memory: Memory | None,
        cache: Cache | None,
        layer: Int[Array, ""] | None,
    ):
        x, new = super().__call__(x, mask, lsh_key, memory, cache, layer)
        return x, (x if self.keep_states else None, new)
