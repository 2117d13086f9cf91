"""Self- and cross-attention as layers: projections around the attention patterns.

Axes: B batch, T tokens, S keys (an encoder's states), D model width, N heads, H head width, Q
queries of a block, W keys of a block's windows.
"""

from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsg_flax import patterns
from lsg_flax.kernels import Source
from lsg_flax.models.layers import Part, Projection
from lsg_flax.patterns import Cache, LayerCache, Runtime
from lsg_flax.sharding import constrain

Hashing = PRNGKeyArray | tuple[Float[Array, "..."], ...] | None  # see `Runtime.lsh`


class HeadProjections(Part):
    """Projections that self- and cross-attention share."""

    def heads(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B N H T"]:
        """Projects the states and splits them into heads."""
        config = self.config
        features = config.num_attention_heads * config.head_dim
        y = Projection(self.context, features=features, writes="bdt", name=name)(x)
        y = y.reshape(x.shape[0], config.num_attention_heads, config.head_dim, x.shape[1])
        return constrain(y, "batch", "heads", None, "length")

    def merged(self, context: Float[Array, "B N H T"]) -> Float[Array, "B T D"]:
        """Concatenates the heads and projects them."""
        features = self.config.hidden_size
        output = Projection(self.context, features=features, reads="bdt", name="output")
        return output(context.reshape(context.shape[0], -1, context.shape[-1]))

    def runtime(self, lsh: Hashing = None, rate: float | None = None) -> Runtime:
        """The `Runtime` of this call; `rate` is that of dropout, by default the config's."""
        context = self.context
        rate = self.config.attention_probs_dropout_prob if rate is None else rate
        rate = rate if context.train else 0.0
        key = self.make_rng("dropout") if rate else None
        return Runtime(
            rate,
            key,
            lsh,
            implementation=context.implementation,
            sequence_axis=context.sequence_axis,
        )


class EncoderStates(NamedTuple):
    """The encoder's states that a decoder attends to; `mask` is True for real ones."""

    states: Float[Array, "B S D"]
    mask: Bool[Array, "B S"]


class LayerCall(NamedTuple):
    """The inputs of a layer beside the states.

    Attributes:
        mask: True for real tokens.
        lsh_key: random key of this layer's rotations.
        memory: what cross-attention attends to; None with a cache, which has its keys and values.
        cache: the cache of all layers; the input is then the next token.
        number: the number of this layer in the cache.
        bias: added to the scores of every window of local attention.
        given: parameters of the user's module in front of this layer, and whether the layer has
            one; None instead of the latter if all layers have one.
        segments: the text of each token if a row has several texts, 0 for padding.
    """

    mask: Bool[Array, "B T"]
    lsh_key: PRNGKeyArray | None = None
    memory: EncoderStates | None = None
    cache: Cache | None = None
    number: Int[Array, ""] | None = None
    bias: Float[Array, "N Q W"] | None = None
    given: tuple[Any, Bool[Array, ""] | None] | None = None
    segments: Int[Array, "B T"] | None = None


class SelfAttention(HeadProjections):
    """LSG or full attention with its projections.

    The second result is what the cache keeps of this layer: with `context.slots` the whole prompt,
    with a cache the one token; otherwise None.
    """

    causal: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], call: LayerCall
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        texts, filler = self.context.texts or 1, self.context.filler
        pattern = patterns.pattern_of(
            self.config.lsg, causal=self.causal, texts=texts, filler=filler
        )
        query, key, value = (self.heads(x, name) for name in ("query", "key", "value"))
        segments = None if call.segments is None else call.segments[:, None]
        source = Source(key, value, call.mask[:, None], segments=segments)
        run = self.runtime(call.lsh_key)
        if call.cache is not None and call.number is not None:
            context, new = patterns.step(pattern, query, source, run, call.cache, call.number)
            return self.merged(context), new
        context, new = patterns.attention(pattern, query, source, run), None
        if slots := self.context.slots:
            new = patterns.prefill(pattern, query, source, run, slots)
        return self.merged(context), new


class CrossAttention(HeadProjections):
    """Full attention to the encoder's states, or to their cached keys and values, which it also
    returns. Adjacent rows may share one row of these (the beams of a text, see `Cache.take`)."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], memory: EncoderStates | Source
    ) -> tuple[Float[Array, "B T D"], Source]:
        if isinstance(memory, EncoderStates):
            states, mask = memory
            memory = Source(self.heads(states, "key"), self.heads(states, "value"), mask[:, None])
        folded = x.reshape(memory.key.shape[0], -1, x.shape[-1])  # beams become more queries
        query = self.heads(folded, "query")
        context = patterns.attention(patterns.Full(), query, memory, self.runtime())
        return self.merged(context).reshape(x.shape), memory
