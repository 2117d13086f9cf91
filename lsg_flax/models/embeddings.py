"""Embeddings of tokens, positions, segments and globals.

Axes: B batch, T tokens, P positions of a table, G global tokens, E embedding width, V vocabulary.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lsg_flax.models.inputs import Inputs
from lsg_flax.models.layers import Buffer, Embedding, Part, rows
from lsg_flax.patterns import MAX_GLOBAL_TOKENS
from lsg_flax.sharding import constrain


def sinusoids(rows: int, width: int) -> Float[np.ndarray, "P E"]:
    """Returns the position table of transformers' PegasusSinusoidalPositionalEmbedding, `rows`
    positions of `width` features: sines in the first half of the columns, cosines in the second.
    """
    half = np.arange((width + 1) // 2)
    angles = np.arange(rows)[:, None] / 10000 ** (2 * half / width)
    table = np.concatenate([np.sin(angles), np.cos(angles[:, : width // 2])], axis=1)
    return table.astype(np.float32)


class Embeddings(Part):
    """The sum of word, position and segment embeddings with LayerNorm and dropout; and the
    embeddings of the global tokens, with LayerNorm and dropout. Positions and segments of the
    globals are not added here: conversion has put them into their table."""

    def table(self, rows: int, name: str) -> Float[Array, "V E"]:
        """Returns an embedding table in the dtype of the computation."""
        config = self.config
        width, dtype = config.embedding_width, self.context.param_dtype
        table = Embedding(rows, width, config.initializer_range, dtype, name=name)()
        return constrain(table.astype(self.context.dtype), "vocab", "columns")

    def positions(self, length: int) -> Float[Array, "P E"]:
        """Returns the position table from the first token's row on, extended by zeros to at least
        `length` rows, because padding may reach beyond the table."""
        config, architecture = self.config, self.context.architecture
        begin = architecture.uncounted_rows
        count, name = config.max_position_embeddings + begin, "position_embeddings"
        if architecture.sinusoids:
            first = functools.partial(_sinusoids, count, config.embedding_width)
            table = Buffer(first, self.context.param_dtype, name=name)().astype(self.context.dtype)
        else:
            table = self.table(count, name)
        table = table[begin:]
        return jnp.pad(table, ((0, max(length - table.shape[0], 0)), (0, 0)))

    @nn.compact
    def __call__(
        self, inputs: Inputs, words: Float[Array, "V E"] | None = None
    ) -> tuple[Float[Array, "B G E"] | None, Float[Array, "B T E"], Float[Array, "V E"]]:
        """Returns the globals (None without LSG; those of each text if a row has several), the
        tokens, and the word table: the one passed, or its own."""
        config, architecture = self.config, self.context.architecture
        if words is None:
            words = self.table(config.vocab_size, "word_embeddings")
        if inputs.input_ids is not None:
            x = rows(words, inputs.input_ids)  # [B, T, E]
            x = x * config.embedding_width**0.5 if architecture.embedding_scale else x
        else:
            x = inputs.inputs_embeds.astype(self.context.dtype)
        positions = self.positions(x.shape[1] if inputs.segment_ids is None else 0)
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
            first = norm(first)
            if self.context.texts:
                first = jnp.tile(first, (1, self.context.texts, 1))
            globals_ = jnp.broadcast_to(first, (x.shape[0], *first.shape[1:]))
            globals_ = self.dropout(globals_)
        return globals_, self.dropout(norm(x)), words


def _sinusoids(rows: int, width: int) -> Float[Array, "P E"]:
    return jnp.asarray(sinusoids(rows, width))
