"""Embeddings of tokens, positions, segments and globals.

Axes: B batch, T tokens, G global tokens, E embedding width, V vocabulary.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsg_flax.models.inputs import Inputs
from lsg_flax.models.layers import Embedding, Part, rows
from lsg_flax.patterns import MAX_GLOBAL_TOKENS
from lsg_flax.sharding import constrain


class Embeddings(Part):
    """Word + position + segment, LayerNorm, dropout; the same for the global tokens
    (reference-behaviour 1.3)."""

    def table(self, rows: int, name: str) -> Float[Array, "V E"]:
        """One embedding table in the compute dtype."""
        config = self.config
        width, dtype = config.embedding_width, self.context.param_dtype
        table = Embedding(rows, width, config.initializer_range, dtype, name=name)()
        return constrain(table.astype(self.context.dtype), "vocab", "columns")

    @nn.compact
    def __call__(
        self, inputs: Inputs
    ) -> tuple[Float[Array, "B G E"] | None, Float[Array, "B T E"], Float[Array, "V E"]]:
        """Returns the globals (None without LSG), the tokens, and the word table."""
        config, architecture = self.config, self.context.architecture
        words = self.table(config.vocab_size, "word_embeddings")
        if inputs.input_ids is not None:
            x = rows(words, inputs.input_ids)  # [B, T, E]
        else:
            x = inputs.inputs_embeds.astype(self.context.dtype)
        if architecture.embedding_scale:
            x *= config.embedding_width**0.5
        positions = self.table(config.max_position_embeddings, "position_embeddings")
        places, types = inputs.position_ids, inputs.token_type_ids
        x += positions[None, : x.shape[1]] if places is None else rows(positions, places)
        if config.type_vocab_size:
            table = self.table(config.type_vocab_size, "token_type_embeddings")
            x += table[None, :1] if types is None else rows(table, types)
        x = constrain(x, "batch", "length", None)
        norm = self.layer_norm("layer_norm") if architecture.embedding_norm else lambda x: x
        globals_ = None
        if config.lsg:
            table = self.table(MAX_GLOBAL_TOKENS, "global_embeddings")
            first = table[None, : config.lsg.num_global_tokens]
            globals_ = jnp.broadcast_to(norm(first), (x.shape[0], *first.shape[1:]))
            globals_ = self.dropout(globals_)
        return globals_, self.dropout(norm(x)), words
