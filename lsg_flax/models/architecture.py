"""What varies between architectures and config.json does not say: fields that embeddings and layers
read, one record per family."""

from dataclasses import dataclass
from typing import Literal

from lsg_flax.models.config import EncoderConfig

Norm = Literal["post", "pre"]
Positions = Literal["from_zero", "behind_padding"]


@dataclass(frozen=True)
class Architecture:
    """The choices, BERT's by default.

    Attributes:
        norm: LayerNorm behind the sum of a layer's part and its input ("post"), or in front of the
            part ("pre").
        final_norm: a LayerNorm behind the last layer.
        embedding_norm: a LayerNorm behind the embeddings.
        embedding_scale: word embeddings are multiplied by the root of their width.
        positions: counted from 0, or over real tokens from pad_token_id + 1, which padding has.
        position_offset: rows of the position table before that of the first token.
        biases: of the projections in the layers.
        groups: projections in groups, each reading and writing its share of features: names of
            projections -> fields of config.json that hold the number.
        always_projects: from embeddings to layers, padding too, even if the widths are the same.
    """

    norm: Norm = "post"
    final_norm: bool = False
    embedding_norm: bool = True
    embedding_scale: bool = False
    positions: Positions = "from_zero"
    position_offset: int = 0
    biases: bool = True
    groups: tuple[tuple[str, str], ...] = ()
    always_projects: bool = False

    def projects(self, config: EncoderConfig) -> bool:
        """Whether there is a projection from the embeddings to the layers."""
        return self.always_projects or config.embedding_width != config.hidden_size

    def first_row(self, config: EncoderConfig) -> int:
        """The row of the position table that the first token has, or those before it if more."""
        if self.positions == "from_zero":
            return self.position_offset
        return max(self.position_offset, (config.pad_token_id or 0) + 1)

    def groups_of(self, projection: str, config: EncoderConfig) -> int:
        """How many groups a projection of the layers has."""
        field = dict(self.groups).get(projection)
        return 1 if field is None else config.other(field, 1)
