"""The one encoder: embeddings, a scanned stack of layers, pooler. Families and attention kinds are
values of its config.

Axes: B batch, T tokens, U tokens with an output (T, or 1 with a cache), G global tokens, D model
width, E embedding width, L layers.
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from lsg_flax.models.config import EncoderConfig
from lsg_flax.models.families import family_of
from lsg_flax.models.layers import Embeddings, EncoderLayer, Memory, Part
from lsg_flax.patterns import DEFAULT_LSH_SEED, Cache, extend, pattern_of
from lsg_flax.sharding import SEQUENCE, over_sequence, sequence_shards

Remat = Literal["none", "full", "dots"]
REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Encoder(Part):
    """Embeddings and layers.

    Attributes:
        remat: what the backward pass recomputes: "none", "full" (a layer keeps only its input),
            "dots" (keeps its projections).
        unroll: layers per iteration of the scan; more compiles longer and may run faster.
        keep_states: also return every layer's output.
        slots: if not 0, also return a cache with this many (from `patterns.slots_for`).
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
        first, x, words = Embeddings(**self.inherited(), name="embeddings")(
            input_ids, token_type_ids, position_ids, inputs_embeds
        )
        project = (
            self.dense(self.config.hidden_size, "embeddings_project")
            if family.projects(self.config)
            else lambda x: x
        )
        if not family.always_projects:
            x = project(x)
        length, shards = x.shape[1], self._shards() if lsg else 1
        mask = (
            jnp.ones((x.shape[0], length), bool)
            if attention_mask is None
            else attention_mask.astype(bool)
        )
        if lsg:
            if lsg.mask_first_token:
                mask = mask.at[:, 0].set(False)
            extra = lsg.needs_padding(length, shards)  # once here, not in each layer
            mask = jnp.pad(mask, ((0, 0), (0, extra)))
            x = jnp.pad(x, ((0, 0), (0, extra), (0, 0)))
        if family.always_projects:  # behind the padding, which can be seen under strict_reference
            x = project(x)
        first = project(first) if lsg else x[:, :0]  # with a cache they are there already
        after, last, states, layers = self._layers(first, x, mask, memory, cache, shards)
        if lsg and lsg.pool_with_global:
            at_first = jnp.arange(last.shape[1])[None, :, None] == 0
            last = jnp.where(at_first, after[:, :1], last)
        if states is not None:  # the reference pools in place, so its last entry shows it
            begin, end = (jnp.concatenate(pair, axis=1) for pair in ((first, x), (after, last)))
            states = (begin, *states[:-1], end)
        last, mask = last[:, :length], mask[:, :length]
        if cache is not None:
            assert position_ids is not None and layers is not None
            position = jnp.broadcast_to(position_ids[:, 0], cache.position.shape)
            pattern = pattern_of(self.config.lsg, causal=True)
            cache = extend(pattern, cache, layers, position)
        elif layers is not None:
            cache = Cache.of_prompt(layers, mask, position_ids)
            last = jax.lax.dynamic_slice_in_dim(last, cache.length - 1, 1, axis=1)
        return last, states, words, cache

    def _layers(
        self,
        first: Float[Array, "B G D"],
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        memory: Memory | None,
        cache: Cache | None,
        shards: int,
    ):
        """The layers on the globals and the tokens: the last states of both, the states of all
        layers, and what the cache shall keep."""
        stack, keys = self._stack(), self._lsh_keys()
        split = first.shape[1]
        layers = stack(**self._of_stack(), name="layers")

        def run(layers, first, x, mask, memory, keys):
            whole = jnp.concatenate([first, x], axis=1)  # [B, G + T, D]
            mask = jnp.pad(mask, ((0, 0), (split, 0)), constant_values=True)
            numbers = None if cache is None else jnp.arange(self.config.num_hidden_layers)
            last, (states, new) = layers(whole, mask, keys, memory, cache, numbers)
            if states is not None:
                states = self._by_layer(states)
            return last[:, :split], last[:, split:], states, new

        if shards == 1:
            return run(layers, first, x, mask, memory, keys)
        within = stack(**self._of_stack() | {"sequence_axis": SEQUENCE}, parent=None)
        rngs = {"dropout": self.make_rng("dropout")} if self.train else {}

        def run_shard(params, rngs, *arrays):
            after, last, states, _ = run(
                partial(within.apply, {"params": params}, rngs=rngs), *arrays
            )
            if states is None:
                return after, last
            return after, last, states[:, :, :split], states[:, :, split:]

        sharded = over_sequence(
            run_shard,
            in_axes=(None, None, None, 1, 1, None, None),
            out_axes=(None, 1, None, 2) if self.keep_states else (None, 1),
        )
        params = self.variables["params"]["layers"]
        after, last, *states = sharded(params, rngs, first, x, mask, memory, keys)
        return after, last, jnp.concatenate(states, axis=2) if states else None, None

    def _stack(self) -> Any:
        """The scan over stacked layers: parameters have a leading axis of layers, and compile time
        does not grow with depth."""
        step: Any = _Step
        if self.remat != "none":
            step = nn.remat(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        config = self.config
        stack = _scan(step, config.stack[-1], min(self.unroll, config.num_hidden_layers))
        if config.num_hidden_groups is not None:  # group, times that it is used, layer within
            groups, _ = config.stack
            times = config.num_hidden_layers // groups
            stack = _scan(_scan(stack, times, 1, shared=True), groups, 1)
        return stack

    def _of_stack(self) -> dict[str, Any]:
        return self.inherited() | {"slots": self.slots, "keep_states": self.keep_states}

    def _by_layer(self, states: Float[Array, "..."]) -> Float[Array, "L B T D"]:
        """The states of all layers; of a shared group the last one's each time."""
        config = self.config
        if config.num_hidden_groups is None:
            return states
        return states[:, :, -1].reshape(config.num_hidden_layers, *states.shape[3:])

    def _shards(self) -> int:
        """How many shards the tokens are in: with a cache and while parameters are drawn one."""
        return 1 if self.slots or self.is_initializing() else sequence_shards()

    def _lsh_keys(self) -> Key[Array, "..."] | None:
        """One key per layer, from the "lsh" rng or a fixed seed."""
        lsg = self.config.lsg
        if not lsg or lsg.sparsity_type != "lsh":
            return None
        key = self.make_rng("lsh") if self.has_rng("lsh") else jax.random.key(DEFAULT_LSH_SEED)
        config = self.config
        keys = jax.random.split(key, config.num_hidden_layers * (config.inner_group_num or 1))
        if config.num_hidden_groups is None:
            return keys
        groups, inner = config.stack
        return keys.reshape(groups, config.num_hidden_layers // groups, inner)


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
