"""mBART: BART with LayerNorms before each sublayer and after each stack, and the language as first
token of the decoder. BARThez is an mBART; the reference has classes for it under both names.
"""

from dataclasses import replace

from lsg_flax.models.families import bart
from lsg_flax.models.families.family import Row, Rows
from lsg_flax.models.layout import NORM

FINAL_NORMS: Rows = tuple(
    Row(f"{side}.layer_norm", f"{side}/final_norm", NORM) for side in ("encoder", "decoder")
)
_ENCODER, _DECODER = (*bart.ENCODER, FINAL_NORMS[0]), (*bart.DECODER, FINAL_NORMS[1])

MBART = replace(
    bart.BART,
    model_type="mbart",
    class_prefix="MBart",
    encoder=(bart.SHARED, *_ENCODER, *_DECODER),
    tables=(*bart.BART.tables[:-1], bart.causal_lm(_DECODER)),
    dialect=bart.DIALECT._replace(defaults={}),
    architecture=replace(bart.BART.architecture, norm="pre", final_norm=True, shift="last_token"),
    other_names=("Barthez",),
    other_types=("barthez",),
)
