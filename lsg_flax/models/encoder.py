"""The stack of embeddings and scanned layers that encoders and decoders share. Families and kinds
of attention are values of its context.

Axes: B batch, T tokens, U tokens with an output (T, or 1 with a cache), G global tokens, D model
width, V vocabulary, E embedding width, L layers.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lsg_flax.checks import require
from lsg_flax.kernels import ATTENDED, rows_to_fill
from lsg_flax.models.activations import activation
from lsg_flax.models.attention_layers import CrossAttention, EncoderStates, LayerCall, SelfAttention
from lsg_flax.models.config import EncoderConfig
from lsg_flax.models.embeddings import Embeddings
from lsg_flax.models.inputs import Inputs
from lsg_flax.models.layers import PROJECTED, Part, Projection
from lsg_flax.models.segments import (
    begins_text,
    count_in_texts,
    places_in_texts,
    with_first_states,
)
from lsg_flax.patterns import (
    DEFAULT_LSH_SEED,
    Cache,
    LayerCache,
    LSGConfig,
    Pattern,
    extend,
    pattern_of,
    with_globals,
)
from lsg_flax.sharding import SEQUENCE, constrain, over_sequence, sequence_shards

Remat = Literal["none", "full", "dots"]
REMAT_POLICIES = {  # what is saved for the backward pass
    "none": jax.checkpoint_policies.save_only_these_names(PROJECTED, ATTENDED),
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class BodyOutput(NamedTuple):
    """The output of a body, which its head reads.

    Attributes:
        last: the last states without padding, and without globals unless they are kept; with a
            cache only that of the last token.
        states: the outputs of the embeddings and all layers, with globals and padding; None unless
            asked for.
        words: the word table.
        cache: the cache for the next call.
    """

    last: Float[Array, "B U D"]
    states: tuple[Float[Array, "B GT D"], ...] | None
    words: Float[Array, "V E"]
    cache: Cache | None


class EncoderLayer(Part):
    """A transformer layer. Returns its output and its part of the cache (see `SelfAttention`)."""

    causal: bool = False

    def _around(self, name: str):
        """The functions applied before and after a sublayer, one of which is its LayerNorm."""
        architecture = self.context.architecture
        norm, nothing = self.layer_norm(name, architecture.layer_norm_eps), lambda x: x
        return (nothing, norm) if architecture.norm == "post" else (norm, nothing)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], call: LayerCall
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        config, context = self.config, self.context
        before, behind = self._around("attention_norm")
        attention = SelfAttention(context, self.causal, name="attention")
        attended, new = attention(before(x), call)
        x = behind(x + self.dropout(attended))
        source = call.memory
        if call.cache is not None:
            source = jax.tree.map(lambda x: x[call.number], call.cache.layers.memory)
        if source is not None:
            before, behind = self._around("cross_attention_norm")
            attended, source = CrossAttention(context, name="cross_attention")(before(x), source)
            x = behind(x + self.dropout(attended))
            new = new._replace(memory=source) if context.slots and new else new
        before, behind = self._around("mlp_norm")
        up = Projection(context, config.intermediate_size, name="mlp_up")
        act: Any = activation(config.hidden_act)
        wide = constrain(up(before(x)), "batch", "length", "mlp")
        if context.train and (rate := context.activation_dropout):
            wide, act = self.dropout(act(wide), rate), None
        down = Projection(context, config.hidden_size, act=act, name="mlp_down")
        x = behind(x + self.dropout(down(wide)))
        return constrain(x, "batch", "length", None), new


class LayerStep(EncoderLayer):
    """A layer as a step of a scan: its output is the carry and, if asked for, also collected."""

    keep_states: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], call: LayerCall):  # pyright: ignore[reportIncompatibleMethodOverride]
        before, (x, new) = x, super().__call__(x, call)
        if self.context.train and (rate := self.context.layerdrop):  # for all rows, as in PyTorch
            left_out = jax.random.uniform(self.make_rng("dropout")) < rate
            x = jnp.where(left_out, before, x)
        return x, (x if self.keep_states else None, new)


class Stack(Part):
    """A stack of layers, run one after the other.

    Attributes:
        remat: what the backward pass recomputes: "none" (neither matrix products nor attention,
            only the cheap operations between them), "dots" (attention as well), "full" (everything
            but each layer's input).
        unroll: layers per iteration of the scan; larger values compile longer and may run faster.
        keep_states: whether to return every layer's output.
    """

    remat: Remat = "none"
    unroll: int = 1
    keep_states: bool = False

    def shard_count(self) -> int:
        """The number of shards of the tokens; 1 for a new cache, and while parameters are drawn."""
        return 1 if self.context.slots or self.is_initializing() else sequence_shards()

    def run_layers(
        self,
        step: type[Part],
        first: Float[Array, "B G *S D"],
        x: Float[Array, "B T *S D"],
        call: LayerCall,
        shards: int,
        **options: bool,
    ):
        """Runs the layers, each a `step` with these options, on the globals `first` and the tokens
        `x`. Returns the last states of both, the states of all layers, and their parts of the
        cache. Inside the layers globals come after the tokens, see `attend_by_blocks`."""
        stack, split = stack_of(step, self.config, self.remat, self.unroll), first.shape[1]
        options |= {"keep_states": self.keep_states}
        filler = 0 if self.context.slots else rows_to_fill(split)
        context = dataclasses.replace(self.context, filler=filler)
        layers = stack(context, **options, name="layers")

        def run(layers, first, x, call):
            length = x.shape[1]
            whole, call = _with_globals_behind(x, first, call, self.context.texts, filler)
            if call.cache is not None:
                call = call._replace(number=jnp.arange(self.config.num_hidden_layers))
            last, (states, new) = layers(whole, call)
            tokens, globals_ = slice(length), slice(length, length + split)
            if states is not None:
                states = self._by_layer(states)
                states = jnp.concatenate([states[:, :, globals_], states[:, :, tokens]], axis=2)
            return last[:, globals_], last[:, tokens], states, new

        if shards == 1:
            return run(layers, first, x, call)
        within = dataclasses.replace(context, sequence_axis=SEQUENCE)
        within = stack(within, **options, parent=None)
        rngs = {"dropout": self.make_rng("dropout")} if self.context.train else {}

        def run_shard(params, rngs, first, x, mask, keys, memory, bias):
            apply = partial(within.apply, {"params": params}, rngs=rngs)
            call = LayerCall(mask, keys, memory, bias=bias)
            after, last, states, _ = run(apply, first, x, call)
            if states is None:
                return after, last
            return after, last, states[:, :, :split], states[:, :, split:]

        sharded = over_sequence(
            run_shard,
            in_axes=(None, None, None, 1, 1, None, None, None),
            out_axes=(None, 1, None, 2) if self.keep_states else (None, 1),
        )
        arrays = (first, x, call.mask, call.lsh_key, call.memory, call.bias)
        after, last, *states = sharded(self.variables["params"]["layers"], rngs, *arrays)
        return after, last, jnp.concatenate(states, axis=2) if states else None, None

    def _by_layer(self, states: Float[Array, "..."]) -> Float[Array, "L B T D"]:
        """The states of all layers; for layers with shared groups that of each group's last."""
        config = self.config
        if config.num_hidden_groups is None:
            return states
        return states[:, :, -1].reshape(config.num_hidden_layers, *states.shape[3:])


class Encoder(Stack):
    """Embeddings and a stack of layers.

    Attributes:
        causal: whether the layers' attention is causal.
        keep_globals: whether the states of the globals are returned, before those of the tokens,
            and not pooled.
    """

    causal: bool = False
    keep_globals: bool = False

    @nn.compact
    def __call__(
        self,
        inputs: Inputs,
        memory: EncoderStates | None = None,
        cache: Cache | None = None,
        words: Float[Array, "V E"] | None = None,
    ) -> BodyOutput:
        """Runs the stack. With a cache, the input is the next token; `words` is a word table that
        several stacks share."""
        config, architecture = self.config, self.context.architecture
        lsg = config.lsg if cache is None else None
        length, shards = inputs.lead[1], self.shard_count() if lsg else 1
        extra = lsg.needs_padding(length, shards) if lsg else 0  # padded once, not in each layer
        inputs = self._with_positions(inputs, cache)
        if architecture.embeds_padding:
            inputs = inputs.padded(extra, config.filler)
        first, x, words = Embeddings(self.context, name="embeddings")(inputs, words)
        project = lambda x: x  # noqa: E731
        if architecture.projects(config):
            project = self.dense(config.hidden_size, "embeddings_project")
        if not architecture.always_projects:
            x = project(x)
        mask, segments = _token_mask(inputs, length, lsg), inputs.segment_ids
        if lsg:
            mask = jnp.pad(mask, ((0, 0), (0, extra)))
            segments = segments if segments is None else jnp.pad(segments, ((0, 0), (0, extra)))
            x = jnp.pad(x, ((0, 0), (0, mask.shape[1] - x.shape[1]), (0, 0)))
        if architecture.always_projects:  # padding as well: strict_reference may see it
            x = project(x)
        first = project(first) if lsg else x[:, :0]  # a cache already has the globals
        call = LayerCall(mask, self._lsh_keys(), memory, cache, segments=segments)
        after, last, states, new = self.run_layers(
            LayerStep, first, x, call, shards, causal=self.causal
        )
        if architecture.final_norm:
            norm = self.layer_norm("final_norm")
            after, last = norm(after), norm(last)
        if lsg and lsg.pool_with_global and not self.keep_globals:
            last = _pool_with_globals(last, after, segments, lsg.num_global_tokens)
        if states is not None:  # the reference pools in place, so its last entry is pooled too
            begin, end = (jnp.concatenate(pair, axis=1) for pair in ((first, x), (after, last)))
            states = (begin, *states[:-1], end)
        last = last[:, :length]
        last = jnp.concatenate([after, last], axis=1) if self.keep_globals else last
        body = BodyOutput(last, states, words, None)
        pattern = pattern_of(config.lsg, causal=True)
        return with_cache(pattern, body, call, new, inputs.position_ids)

    def _with_positions(self, inputs: Inputs, cache: Cache | None) -> Inputs:
        """Adds position ids if none are given and they are not 0, 1, 2, ..."""
        if inputs.position_ids is not None:
            return inputs
        if cache is not None:
            return inputs._replace(position_ids=cache.position[:, None])
        if self.context.architecture.positions == "behind_padding":
            return inputs._replace(position_ids=_positions_behind_padding(inputs, self.config))
        if inputs.segment_ids is not None:
            return inputs._replace(position_ids=places_in_texts(inputs.segment_ids))
        return inputs

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


def _with_globals_behind(
    x: Float[Array, "B T *S D"],
    first: Float[Array, "B G *S D"],
    call: LayerCall,
    texts: int,
    filler: int,
) -> tuple[Float[Array, "B _ *S D"], LayerCall]:
    """Joins the tokens, the globals `first` and `filler` rows of padding, in this order; the mask
    and the segments of the call are then those of all of them."""
    split, filling = first.shape[1], ((0, 0), (0, filler))
    whole = jnp.concatenate([x, first], axis=1)
    whole = jnp.pad(whole, (*filling, *[(0, 0)] * (x.ndim - 2)))  # [B, T + G + filler, D]
    mask = jnp.pad(call.mask, ((0, 0), (0, split)), constant_values=True)
    mask, segments = jnp.pad(mask, filling), call.segments
    if segments is not None:
        segments = with_globals(segments, texts, split // texts)
        segments = jnp.pad(jnp.roll(segments, -split, axis=1), filling)
    return whole, call._replace(mask=mask, segments=segments)


def with_cache(
    pattern: Pattern,
    body: BodyOutput,
    call: LayerCall,
    new: LayerCache | None,
    position_ids: Int[Array, "#B T"] | None,
) -> BodyOutput:
    """Adds the cache for the next call, if there is one; `last` is then only that of the last
    token."""
    cache, last = call.cache, body.last
    if cache is not None and new is not None:
        position = cache.position if position_ids is None else position_ids[:, 0]
        position = jnp.broadcast_to(position, cache.position.shape)
        return body._replace(cache=extend(pattern, cache, new, position))
    if new is None:
        return body
    cache = Cache.of_prompt(new, call.mask[:, : last.shape[1]], position_ids)
    last = jax.lax.dynamic_slice_in_dim(last, cache.length - 1, 1, axis=1)
    return body._replace(last=last, cache=cache)


def stack_of(step: Any, config: EncoderConfig, remat: Remat, unroll: int) -> Any:
    """Makes the scan over stacked layers: parameters have a leading axis of layers, and compile
    time does not grow with depth."""
    if remat not in get_args(Remat):
        raise ValueError(f"remat={remat!r} is unknown; choose one of {', '.join(get_args(Remat))}.")
    step = nn.remat(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    stack = _scan(step, config.stack[-1], min(unroll, config.num_hidden_layers))
    if config.num_hidden_groups is not None:  # nested: groups, uses of a group, layers in it
        groups, _ = config.stack
        times = config.num_hidden_layers // groups
        stack = _scan(_scan(stack, times, 1, shared=True), groups, 1)
    return stack


def _scan(step, length: int, unroll: int, *, shared: bool = False) -> Any:
    """Repeats a module, each time with its own parameters, stacked along a leading axis, or with
    `shared` ones."""
    same: Any = nn.broadcast
    return nn.scan(
        step,
        variable_axes={} if shared else {"params": 0},
        variable_broadcast="params" if shared else False,
        split_rngs={"params": not shared, "dropout": True},
        in_axes=(LayerCall(same, 0, same, same, 0, same, 0, same),),  # pyright: ignore[reportArgumentType]
        length=length,
        unroll=unroll,
    )


def _token_mask(inputs: Inputs, length: int, lsg: LSGConfig | None) -> Bool[Array, "B T"]:
    """Returns which tokens may be attended to, out of the first `length`."""
    mask, segments = inputs.attention_mask, inputs.segment_ids
    mask = jnp.ones((inputs.lead[0], length), bool) if mask is None else mask.astype(bool)
    mask = mask if segments is None else mask & (segments != 0)
    if not lsg or not lsg.mask_first_token:
        return mask
    return mask.at[:, 0].set(False) if segments is None else mask & ~begins_text(segments)


def _pool_with_globals(
    last: Float[Array, "B T D"],
    after: Float[Array, "B _ D"],
    segments: Int[Array, "B T"] | None,
    count: int,
) -> Float[Array, "B T D"]:
    """Replaces the state of each text's first token by that of its first global, of which a text
    has `count`."""
    if segments is not None:
        return with_first_states(last, segments, after[:, ::count])
    at_first = jnp.arange(last.shape[1])[None, :, None] == 0
    return jnp.where(at_first, after[:, :1], last)


def _positions_behind_padding(inputs: Inputs, config: EncoderConfig) -> Int[Array, "#B T"]:
    """Returns RoBERTa's positions: real tokens of a text are counted from pad_token_id + 1, padding
    is at pad_token_id. For embeddings, where padding cannot be recognised, all are counted."""
    ids, segments, first = inputs.input_ids, inputs.segment_ids, (config.pad_token_id or 0) + 1
    require(
        first >= 0,
        f"pad_token_id={config.pad_token_id} puts the first token at position {first}, because "
        "this family counts positions from pad_token_id + 1; give a pad_token_id of at least -1.",
    )
    if segments is not None:
        real = segments != 0 if ids is None else (segments != 0) & (ids != config.pad_token_id)
        return (count_in_texts(real, segments) + 1) * real + first - 1
    if ids is None:
        return jnp.arange(first, first + inputs.inputs_embeds.shape[1])[None]
    real = (ids != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + first - 1
