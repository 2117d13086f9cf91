"""Pegasus: mBART with sines and cosines for positions, and no LayerNorm after the embeddings."""

from dataclasses import replace

from lsg_flax.models.families import bart
from lsg_flax.models.families.family import PositionTable, Rows
from lsg_flax.models.families.mbart import FINAL_NORMS, MBART
from lsg_flax.models.layout import FIXED_TABLE


def _stack(rows: Rows) -> Rows:
    positions = "position_embeddings"
    changed = [row._replace(layout=FIXED_TABLE) if positions in row.path else row for row in rows]
    return tuple(row for row in changed if not row.path.endswith("embeddings/layer_norm"))


_ENCODER = (*_stack(bart.ENCODER), FINAL_NORMS[0])
_DECODER = (*_stack(bart.DECODER), FINAL_NORMS[1])

PEGASUS = replace(
    MBART,
    model_type="pegasus",
    class_prefix="Pegasus",
    encoder=(bart.SHARED, *_ENCODER, *_DECODER),
    tables=(bart.BASE, bart.CONDITIONAL_GENERATION, bart.causal_lm(_DECODER)),
    to_lsg=replace(
        bart.TO_LSG,
        positions=(
            PositionTable("encoder/embeddings/position_embeddings/buffer", "sinusoid"),
            PositionTable("decoder/embeddings/position_embeddings/buffer", "sinusoid"),
        ),
    ),
    dialect=bart.DIALECT._replace(
        defaults={
            "pad_token_id": 0,
            "eos_token_id": 1,
            "forced_eos_token_id": 1,
            "decoder_start_token_id": 0,
            "bos_token_id": None,
        }
    ),
    architecture=replace(
        MBART.architecture,
        position_offset=0,
        sinusoids=True,
        embedding_norm=False,
        shift="start_token",
        shifts_inputs=False,
    ),
    other_names=(),
    other_types=(),
)
