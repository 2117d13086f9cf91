"""Differences between architectures that config.json does not state: one record per family, read by
embeddings and layers."""

from dataclasses import dataclass
from typing import Literal

from lsg_flax.models.config import EncoderConfig

Norm = Literal["post", "pre"]
Positions = Literal["from_zero", "behind_padding"]
# How a decoder's inputs are made from its labels: a row is shifted right by one position, and the
# first position gets the config's start token, or the last non-padding token (mBART's language).
Shift = Literal["start_token", "last_token"]


@dataclass(frozen=True)
class Architecture:
    """The choices of one architecture; defaults are BERT's.

    Attributes:
        norm: where LayerNorms are: after the sum of a sublayer's output and input ("post"), or
            before the sublayer ("pre").
        final_norm: whether there is a LayerNorm after the last layer.
        embedding_norm: whether there is a LayerNorm after the embeddings.
        embedding_scale: whether rows of the word table are multiplied by the root of their width.
        positions: "from_zero": counted from 0. "behind_padding": real tokens are counted from
            pad_token_id + 1, and padding is at pad_token_id.
        position_offset: number of rows of the position table before that of the first token.
        sinusoids: whether position tables hold sines and cosines, and are not trained.
        embeds_padding: whether padding to whole blocks is embedded as pad_token_id; otherwise zeros
            are appended to the embeddings.
        layer_norm_eps: epsilon of the layers if it is not config.json's, which then is only that of
            embeddings and heads.
        biases: whether the projections in the layers have biases.
        groups: grouped projections, in which each group reads and writes its share of features:
            names of projections -> fields of config.json with the number of groups, see
            `config_json.Groups`.
        always_projects: whether embeddings, those of padding too, are projected to the layers even
            if the widths are equal.
        shift: see `Shift`.
        shifts_inputs: whether a decoder without inputs gets those of the encoder, shifted.
    """

    norm: Norm = "post"
    final_norm: bool = False
    embedding_norm: bool = True
    embedding_scale: bool = False
    positions: Positions = "from_zero"
    position_offset: int = 0
    sinusoids: bool = False
    embeds_padding: bool = False
    layer_norm_eps: float | None = None
    biases: bool = True
    groups: tuple[tuple[str, str], ...] = ()
    always_projects: bool = False
    shift: Shift = "start_token"
    shifts_inputs: bool = False

    @property
    def uncounted_rows(self) -> int:
        """Number of rows of the position table before those that max_position_embeddings counts."""
        return self.position_offset if self.positions == "from_zero" else 0

    def max_position_embeddings(self, length: int) -> int:
        """Returns max_position_embeddings in config.json for a table that reads `length` tokens."""
        return length + self.position_offset - self.uncounted_rows

    def projects(self, config: EncoderConfig) -> bool:
        """Whether there is a projection from the embeddings to the layers."""
        return self.always_projects or config.embedding_width != config.hidden_size

    def first_row(self, config: EncoderConfig) -> int:
        """Returns the row of the first token, among the rows that max_position_embeddings counts;
        `position_offset` if that is larger."""
        if self.positions == "from_zero":
            return 0
        return max(self.position_offset, (config.pad_token_id or 0) + 1)

    def groups_of(self, projection: str, config: EncoderConfig) -> int | None:
        """Returns the number of groups of a projection of the layers; None if it has none."""
        field = dict(self.groups).get(projection)
        return None if field is None else config.other(field, config.dialect.groups[field].default)
