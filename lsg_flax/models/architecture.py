"""What varies between architectures and config.json does not say: fields that embeddings and layers
read, one record per family."""

from dataclasses import dataclass
from typing import Literal

from lsg_flax.models.config import EncoderConfig

Norm = Literal["post", "pre"]
Positions = Literal["from_zero", "behind_padding"]
# How a decoder's inputs are made of its labels: a row moves by one place, and the first place gets
# the config's start token, or the last token that is no padding (mBART's language).
Shift = Literal["start_token", "last_token"]


@dataclass(frozen=True)
class Architecture:
    """The choices, BERT's by default.

    Attributes:
        norm: LayerNorm behind the sum of a layer's part and its input ("post"), or in front of the
            part ("pre").
        final_norm: a LayerNorm behind the last layer.
        embedding_norm: a LayerNorm behind the embeddings.
        embedding_scale: rows of the word table are multiplied by the root of their width.
        positions: counted from 0, or over real tokens from pad_token_id + 1, which padding has.
        position_offset: rows of the position table before that of the first token.
        sinusoids: position tables hold sines and cosines, and are not trained.
        embeds_padding: padding to whole blocks is embedded, as tokens of pad_token_id behind the
            others; otherwise zeros behind the embeddings.
        layer_norm_eps: of the layers, where config.json's is that of embeddings and heads alone.
        biases: of the projections in the layers.
        groups: projections in groups, each reading and writing its share of features: names of
            projections -> fields of config.json that hold the number, see `config_json.Groups`.
        always_projects: from embeddings to layers, padding too, even if the widths are the same.
        shift: see `Shift`.
        shifts_inputs: a decoder without inputs gets those of the encoder, shifted.
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
        """Rows of the position table in front of those that max_position_embeddings counts."""
        return self.position_offset if self.positions == "from_zero" else 0

    def max_position_embeddings(self, length: int) -> int:
        """What config.json says of tables that read as many tokens."""
        return length + self.position_offset - self.uncounted_rows

    def projects(self, config: EncoderConfig) -> bool:
        """Whether there is a projection from the embeddings to the layers."""
        return self.always_projects or config.embedding_width != config.hidden_size

    def first_row(self, config: EncoderConfig) -> int:
        """The row of the position table, of those that are counted, that the first token has, or
        those before it if more."""
        if self.positions == "from_zero":
            return 0
        return max(self.position_offset, (config.pad_token_id or 0) + 1)

    def groups_of(self, projection: str, config: EncoderConfig) -> int | None:
        """How many groups a projection of the layers has; None where it has none."""
        field = dict(self.groups).get(projection)
        return None if field is None else config.other(field, config.dialect.groups[field].default)
