"""Reformer's embeddings of words and positions. Positions have one table, or (axial) are arranged
in rows and columns, with a table for the rows and one for the columns.

Axes: B batch, T tokens, D model width, P positions of a table, E embedding width, V vocabulary.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsg_flax.kernels import drop
from lsg_flax.models.config_reformer import ReformerConfig
from lsg_flax.models.embeddings import Embeddings
from lsg_flax.models.inputs import Inputs
from lsg_flax.models.layers import Embedding, Part, rows
from lsg_flax.sharding import constrain


class ReformerPart(Part):
    """A module of a Reformer."""

    @property
    def settings(self) -> ReformerConfig:
        """The config, with its type."""
        assert isinstance(self.config, ReformerConfig)
        return self.config


class ReformerEmbeddings(Embeddings, ReformerPart):
    """The sum of word and position embeddings, each with dropout."""

    @nn.compact
    def __call__(self, inputs: Inputs) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        words = self.table(self.config.vocab_size, "word_embeddings")
        if inputs.input_ids is None:
            x = inputs.inputs_embeds.astype(self.context.dtype)
        else:
            x = rows(words, inputs.input_ids)
        x = self.dropout(x) + self._positions(inputs.position_ids, *x.shape[:2])
        return constrain(x, "batch", "length", None), words

    def _positions(
        self, places: Int[Array, "#B T"] | None, batch: int, length: int
    ) -> Float[Array, "#B T D"]:
        if not self.settings.axial_pos_embds:
            table = self.positions(length)
            x = table[None, :length] if places is None else rows(table, places)
            return self.dropout(jnp.broadcast_to(x, (batch, *x.shape[1:])))
        of_rows, of_columns = self._axis(0, "row"), self._axis(1, "column")
        per_row = of_columns.shape[0]
        if places is None:
            x = _side_by_side(of_rows, of_columns, -(-length // per_row))[None]
            x = jnp.pad(x, ((0, 0), (0, max(length - x.shape[1], 0)), (0, 0)))[:, :length]
            places = jnp.arange(length)[None]
        else:
            parts = (rows(of_rows, places // per_row), rows(of_columns, places % per_row))
            x = jnp.concatenate(parts, axis=-1)
        if self.context.train and (rate := self.config.hidden_dropout_prob):
            ones = jnp.ones((batch, per_row), x.dtype)
            factor: Array = drop(ones, self.make_rng("dropout"), rate)
            places = jnp.broadcast_to(places % per_row, (batch, length))
            x = x * jnp.take_along_axis(factor, places, axis=1)[..., None]
        return x

    def _axis(self, number: int, name: str) -> Float[Array, "P _"]:
        settings, dtype = self.settings, self.context.param_dtype
        sizes = (settings.axial_pos_shape[number], settings.axial_pos_embds_dim[number])
        table = Embedding(*sizes, settings.axial_norm_std, dtype, name=f"{name}_embeddings")
        return table().astype(self.context.dtype)


def _side_by_side(
    of_rows: Float[Array, "_ _"], of_columns: Float[Array, "_ _"], count: int
) -> Float[Array, "P E"]:
    """The embeddings of the positions in the first `count` rows, or in all rows if there are
    fewer."""
    first = of_rows[:count]
    shape = (first.shape[0], of_columns.shape[0])
    parts = (
        jnp.broadcast_to(first[:, None], (*shape, first.shape[1])),
        jnp.broadcast_to(of_columns[None], (*shape, of_columns.shape[1])),
    )
    x = jnp.concatenate(parts, axis=-1)
    return x.reshape(-1, x.shape[-1])
