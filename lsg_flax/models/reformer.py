"""Reformer: layers of local and LSH attention between two residual streams that are not kept for
the backward pass (arXiv 2001.04451).

Axes: B batch, T tokens, D model width, N heads, H head width.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax import patterns
from lsg_flax.checks import require
from lsg_flax.kernels import Source
from lsg_flax.models.activations import activation
from lsg_flax.models.attention_layers import HeadProjections
from lsg_flax.models.config_reformer import LayerKind, ReformerConfig
from lsg_flax.models.encoder import BodyOutput, Remat
from lsg_flax.models.heads import Head
from lsg_flax.models.inputs import Inputs
from lsg_flax.models.layers import Projection
from lsg_flax.models.outputs import ModelOutput
from lsg_flax.models.reformer_embeddings import ReformerEmbeddings, ReformerPart
from lsg_flax.models.reversible import HalfLayer, LayerArrays, LayerGroup, run_and_keep, run_layers
from lsg_flax.patterns import DEFAULT_LSH_SEED, LSH, Cache, LayerCache, Runtime
from lsg_flax.sharding import constrain, sequence_shards

Rotations = tuple[Float[Array, "N H _ _"], ...]
Half = Literal["attention", "mlp"]
HALVES: tuple[Half, ...] = get_args(Half)


class RowCall(NamedTuple):
    """A call of decoding, in which every row is computed as if it were alone, with its tokens from
    position 0 on.

    Attributes:
        length: number of tokens of each row's prompt.
        padded: the length that the row would be padded to on its own.
        cache: the cache of earlier tokens; the input is then the next token.
    """

    length: Int[Array, "B"]
    padded: Int[Array, "B"]
    cache: Cache | None = None


class HalfCall(NamedTuple):
    """The inputs of a half layer beside its stream.

    Attributes:
        hashing: for LSH attention, rotations or a random key of them.
        buckets: the buckets of an earlier pass; then nothing is hashed.
        own, number: for decoding, the call and the number of the layer in a cache.
    """

    mask: Bool[Array, "B T"]
    hashing: PRNGKeyArray | Rotations | None = None
    buckets: Int[Array, "B N _ T"] | None = None
    own: RowCall | None = None
    number: Int[Array, ""] | None = None


class Shared(NamedTuple):
    """The inputs that all layers share."""

    mask: Bool[Array, "B T"]
    own: RowCall | None = None


class ReformerAttention(HeadProjections, ReformerPart):
    """Local or LSH attention. The second result is the buckets of the tokens; in decoding it is the
    layer's part of the cache."""

    kind: LayerKind = "local"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], call: HalfCall
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B N _ T"] | LayerCache | None]:
        settings, length, buckets, own = self.settings, x.shape[1], call.buckets, call.own
        pattern, mask = settings.pattern(self.kind, length), call.mask[:, None]
        if isinstance(pattern, LSH):
            query = key = self.heads(x, "query_key")
            run = self.runtime(call.hashing, settings.lsh_attention_probs_dropout_prob)
            if own is not None and own.cache is None:
                buckets = self._own_buckets(pattern, query, mask, run, own.padded)
            elif buckets is None and length > pattern.chunk_length:
                buckets = patterns.bucket_of(pattern, query, mask, run)
            lengths = None if own is None else own.padded
            run = replace(run, buckets=buckets, own_lengths=lengths)
        else:
            query, key, run = self.heads(x, "query"), self.heads(x, "key"), self.runtime()
            if own is not None and own.cache is None:
                chunk = settings.local_attn_chunk_length  # up to one chunk a row is not padded
                run = replace(run, own_lengths=jnp.where(own.length > chunk, own.padded, chunk))
        source = Source(key, self.heads(x, "value"), mask)
        if own is None:
            return self.merged(patterns.attention(pattern, query, source, run)), buckets
        if own.cache is None or call.number is None:
            context = patterns.attention(pattern, query, source, run)
            first = own.length
            if isinstance(pattern, LSH):
                first = patterns.windows_from(pattern, own.length, own.padded)
            kept = self._buckets(source, buckets)
            return self.merged(context), patterns.keep_rows(source, self.context.slots, kept, first)
        where = (own.cache, call.number)
        if isinstance(pattern, LSH):
            context, buckets = patterns.step_by_buckets(pattern, query, source, run, *where)
        else:
            context = patterns.step_in_ring(pattern, query, source, *where)
        return self.merged(context), LayerCache(source, buckets=self._buckets(source, buckets))

    def _own_buckets(
        self,
        pattern: LSH,
        query: Float[Array, "B N H T"],
        mask: Bool[Array, "B 1 T"],
        run: Runtime,
        padded: Int[Array, "B"],
    ) -> Int[Array, "B N _ T"]:
        """Hashes each row into the number of buckets that it would have on its own, by its padded
        length."""
        chunk, buckets = pattern.chunk_length, jnp.int32(0)
        counts = [self.settings.buckets(n * chunk) for n in range(query.shape[-1] // chunk + 2)]
        for count in dict.fromkeys(counts):
            found = patterns.bucket_of(replace(pattern, num_buckets=count), query, mask, run)
            here = jnp.asarray([other == count for other in counts])[padded // chunk]
            buckets = jnp.where(here[:, None, None, None], found, buckets)
        return buckets

    def _buckets(self, source: Source, buckets: Int[Array, "B N _ T"] | None) -> Array:
        """The buckets to keep in the cache; zeros for local attention, which has none."""
        batch, heads, _, length = source.key.shape
        zeros = jnp.zeros((batch, heads, self.settings.num_hashes, length), jnp.int32)
        return zeros if buckets is None else buckets


class ReformerLayer(ReformerPart):
    """Attention and a feed-forward layer, each after a LayerNorm."""

    kind: LayerKind = "local"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], call: HalfCall, halves: tuple[Half, ...]):
        """Runs one half on its stream, or both while parameters are drawn. The second result is
        that of `ReformerAttention`."""
        config, context, buckets, y = self.config, self.context, None, x
        if "attention" in halves:
            bare = replace(context.architecture, biases=False)
            bare = replace(context, architecture=bare)
            attention = ReformerAttention(bare, self.kind, name="attention")
            y, buckets = attention(self.layer_norm("attention_norm")(x), call)
        if "mlp" in halves:
            up = Projection(context, config.intermediate_size, name="mlp_up")
            act: Any = activation(config.hidden_act)
            down = Projection(context, config.hidden_size, act=act, name="mlp_down")
            wide = constrain(up(self.layer_norm("mlp_norm")(x)), "batch", "length", "mlp")
            y = down(self.dropout(wide))
        return constrain(self.dropout(y), "batch", "length", None), buckets


Layers = dict[LayerKind, ReformerLayer]


class LayerDraws(NamedTuple):
    """The randomness of a layer: keys of dropout for both halves, in training; `hashing` as in
    `HalfCall`."""

    dropout: PRNGKeyArray | None = None
    hashing: PRNGKeyArray | Float[Array, "N H _ _"] | None = None


class Reformer(ReformerPart):
    """Embeddings, layers, and a LayerNorm over both streams. Attributes are those of `Encoder`."""

    remat: Remat = "none"
    unroll: int = 1
    keep_states: bool = False

    @nn.compact
    def __call__(
        self, inputs: Inputs, rotations: Rotations = (), cache: Cache | None = None
    ) -> BodyOutput:
        """Runs the stack. `rotations` are those of every LSH layer that hashes; if empty, they are
        drawn."""
        settings, length = self.settings, inputs.lead[1]
        require(
            self.remat == "none",
            f"remat={self.remat!r}: a Reformer's layers are recomputed from their outputs, so "
            "there is nothing to save; leave remat out.",
        )
        require(
            sequence_shards() == 1,
            "a Reformer's tokens cannot be sharded over a sequence axis, because it sorts them: "
            "choose a mesh of data, fsdp and tensor.",
        )
        if self.context.train:
            settings.check_training_length(length)
        mask = inputs.attention_mask
        mask = jnp.ones(inputs.lead, bool) if mask is None else mask.astype(bool)
        own, extra = None, settings.needs_padding(length) if cache is None else 0
        if self.context.slots or cache is not None:
            require(
                not rotations or settings.num_buckets is not None,
                "lsh_rotations with cache_length and num_buckets=null: every row has its own "
                "number of buckets; set num_buckets, or leave lsh_rotations out.",
            )
            inputs, mask, own = self._alone(inputs, mask, cache)
        mask = jnp.pad(mask, ((0, 0), (0, extra)))
        if extra and inputs.position_ids is not None:  # padding's do not matter
            places = jnp.pad(inputs.position_ids, ((0, 0), (0, extra)))
            inputs = inputs._replace(position_ids=places)
        inputs = inputs.padded(extra, settings.filler)
        x, words = ReformerEmbeddings(self.context, name="embeddings")(inputs)
        layers: Layers = {
            kind: ReformerLayer(self.context, kind, parent=None) for kind in settings.kinds
        }
        hashed = mask.shape[1] if own is None else settings.lsh_attn_chunk_length + 1
        params, draws = self._params(layers), self._draws(hashed, rotations)
        arrays = LayerArrays(params, draws, Shared(mask, own))
        streams, states, new = self._layers(layers, arrays, x)
        if own is not None:
            states, last = None, (0 if cache is not None else own.length - 1)
            streams = [x[jnp.arange(len(x)), last][:, None] for x in streams]
            cache, length = self._written(new, own), 1
        both = self.layer_norm("final_norm")(jnp.concatenate(streams, axis=-1))  # [B, T, 2 D]
        last = self.dropout(both)[:, :length]
        states = None if states is None else (x, *states.astype(x.dtype))
        return BodyOutput(last, states, words, cache)

    def _alone(
        self, inputs: Inputs, mask: Bool[Array, "B T"], cache: Cache | None
    ) -> tuple[Inputs, Bool[Array, "B T"], RowCall]:
        """Returns the inputs of decoding, with each row's tokens moved to start at position 0."""
        settings = self.settings
        require(
            inputs.position_ids is None,
            "position_ids with a cache: a Reformer's chunks and positions are counted from each "
            "row's first token; leave position_ids out.",
        )
        if cache is not None:
            inputs = inputs._replace(position_ids=cache.position[:, None])
            return inputs, mask, RowCall(cache.position, cache.position, cache)
        batch, width = mask.shape
        first = jnp.argmax(mask, axis=1).astype(jnp.int32)
        length = (width - jnp.argmax(mask[:, ::-1], axis=1)).astype(jnp.int32) - first
        place = (first[:, None] + jnp.arange(width)[None]) % width

        def moved(x):
            return None if x is None else x[jnp.arange(batch)[:, None], place]

        ids, embeds = moved(inputs.input_ids), moved(inputs.inputs_embeds)
        inputs = inputs._replace(input_ids=ids, inputs_embeds=embeds, attention_mask=None)
        multiple, chunk = settings.chunk_multiple, settings.lsh_attn_chunk_length
        least = min(map(settings.chunk_length, settings.kinds))
        unit = jnp.where(length <= least, chunk, multiple)
        mask = jnp.take_along_axis(mask, place, axis=1)
        return inputs, mask, RowCall(length, -(-length // unit) * unit)

    def _written(self, new: Any, own: RowCall) -> Cache:
        """Writes the layers' parts of the cache, a list by halves, stacked over groups."""

        def by_layer(*x: Array) -> Array:
            return jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:])

        layers = jax.tree.map(by_layer, *new[::2])
        if own.cache is not None:
            return patterns.write_rows(own.cache, layers)
        return Cache(layers, jnp.max(own.length), own.length)

    def _layers(self, layers: Layers, arrays: LayerArrays, x: Array):
        """Runs the layers and returns the streams, at least in float32: the backward pass
        recomputes the layers' inputs from them, which are only as exact as they are."""
        halves, counts = [], dict.fromkeys(layers, 0)
        for kind in self.settings.period:
            for run in (_attend, _feed_forward):
                halves.append(HalfLayer(kind, counts[kind], partial(run, layers[kind])))
            counts[kind] += 1
        groups = self.settings.num_hidden_layers // len(self.settings.period)
        numbers, own = None, arrays.shared.own
        if own is not None and own.cache is not None:
            numbers = jnp.arange(self.settings.num_hidden_layers).reshape(groups, -1)
            numbers = [x for n in range(numbers.shape[1]) for x in (numbers[:, n], None)]
        params, draws = jax.tree.map(
            lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), (arrays.params, arrays.draws)
        )
        group = LayerGroup(tuple(halves), min(self.unroll, groups), self.keep_states)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        arrays = LayerArrays(params, draws, arrays.shared)
        if own is not None:
            (streams, states), kept = run_and_keep(group, arrays, (x, x), numbers)
            return streams, states, kept
        run: Any = run_layers
        return *run(group, arrays, (x, x)), None

    def _params(self, layers: Layers) -> dict[LayerKind, Any]:
        """The stacked parameters of the layers of each kind."""
        x, call = jnp.zeros((1, 1, self.config.hidden_size)), HalfCall(jnp.ones((1, 1), bool))
        for kind, layer in layers.items() if self.is_initializing() else ():
            init = lambda key, layer=layer: layer.init(key, x, call, HALVES)["params"]  # noqa: E731
            keys = partial(jax.random.split, num=self.settings.attn_layers.count(kind))
            self.param(f"{kind}_layers", lambda key: jax.vmap(init)(keys(key)))  # noqa: B023
        return {kind: self.variables["params"][f"{kind}_layers"] for kind in layers}

    def _draws(self, length: int, rotations: Rotations) -> dict[LayerKind, LayerDraws]:
        """The randomness of the layers of each kind."""
        settings, draws = self.settings, {}
        for kind in settings.kinds:
            count, keys, hashing = settings.attn_layers.count(kind), None, None
            if self.context.train and self.has_rng("dropout"):
                keys = jax.random.split(self.make_rng("dropout"), (count, 2))
            if kind == "lsh":
                hashing = self._hashing(count, length, rotations)
            draws[kind] = LayerDraws(keys, hashing)
        return draws

    def _hashing(self, count: int, length: int, rotations: Rotations):
        """The rotations of all LSH layers, or random keys of them."""
        settings, pattern = self.settings, self.settings.pattern("lsh", length)
        if rotations:
            assert isinstance(pattern, LSH)
            shape = pattern.rotations_shape(settings.num_attention_heads, settings.head_dim)
            wanted = [shape] * (count if length > pattern.chunk_length else 0)
            require(
                [x.shape for x in rotations] == wanted,
                f"lsh_rotations have the shapes {[x.shape for x in rotations]}; give one [heads, "
                f"head width, hashes, rotations // 2] = {shape} for each LSH layer that hashes, of "
                f"which there are {len(wanted)} with {length} tokens, or leave them out.",
            )
            return jnp.stack(rotations)
        if settings.hash_seed is not None:  # every layer uses the same seed
            return jnp.broadcast_to(jax.random.key(settings.hash_seed), (count,))
        key = self.make_rng("lsh") if self.has_rng("lsh") else jax.random.key(DEFAULT_LSH_SEED)
        return jax.random.split(key, count)


def _attend(layer: ReformerLayer, params, x, draws: LayerDraws, shared: Shared, kept):
    keys, hashing = draws
    rngs = None if keys is None else {"dropout": keys[0]}
    if hashing is not None and not jax.dtypes.issubdtype(hashing.dtype, jax.dtypes.prng_key):
        hashing = (hashing,)
    given = {"buckets": kept} if shared.own is None else {"own": shared.own, "number": kept}
    call = HalfCall(shared.mask, hashing, **given)
    return layer.apply({"params": params}, x, call, HALVES[:1], rngs=rngs)


def _feed_forward(layer: ReformerLayer, params, x, draws: LayerDraws, shared: Shared, _):
    def run(x, number) -> Any:
        keys = draws.dropout
        rngs = None if keys is None else {"dropout": jax.random.fold_in(keys[1], number)}
        return layer.apply({"params": params}, x, HalfCall(shared.mask), HALVES[1:], rngs=rngs)[0]

    return in_chunks(run, x, layer.settings.chunk_size_feed_forward), None


def in_chunks(
    run: Callable[[Any, Any], Array], x: Float[Array, "B T D"], size: int
) -> Float[Array, "B T _"]:
    """Applies `run` to `size` tokens at a time and the number of the chunk; to all tokens at once
    if `size` is 0. The backward pass keeps only the inputs."""
    batch, length, width = x.shape
    if not 0 < size < length:
        return run(x, 0)
    count = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0)))
    x = x.reshape(batch, count, size, width).swapaxes(0, 1)  # [chunks, B, size, D]
    y = lax.map(jax.checkpoint(lambda chunk: run(*chunk)), (x, jnp.arange(count)))
    return y.swapaxes(0, 1).reshape(batch, count * size, -1)[:, :length]


class ReformerScoresHead(Head):
    """Scores over the vocabulary with a kernel of its own. `causal` says whether the model must be
    a decoder."""

    causal: bool = True

    @nn.compact
    def __call__(self, last, pooled, words):
        config, context = self.config, self.context
        assert isinstance(config, ReformerConfig)
        require(
            config.is_decoder == self.causal,
            f"is_decoder={config.is_decoder}: causal_lm needs a decoder, masked_lm a model that "
            f"sees all tokens; give is_decoder={self.causal}.",
        )
        init, dtype = nn.initializers.normal(config.initializer_range), context.param_dtype
        kernel = self.param("kernel", init, (last.shape[-1], config.vocab_size), dtype)
        bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,), dtype)
        kernel, bias = (x.astype(context.dtype) for x in (kernel, bias[None, None]))
        run = lambda x, _: x @ kernel + bias  # noqa: E731
        return ModelOutput(logits=in_chunks(run, last, config.chunk_size_lm_head))
