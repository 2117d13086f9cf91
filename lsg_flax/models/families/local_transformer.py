"""local-attention's LocalTransformer, whose config.json has its constructor's keywords."""

from typing import Any

import numpy as np

from lsg_flax.checks import require
from lsg_flax.models import heads, task
from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config_local import DIALECT, LocalTransformerConfig
from lsg_flax.models.families.family import Family, HeadTable, Row
from lsg_flax.models.layout import (
    AS_IT_IS,
    DENSE,
    DENSE_WITHOUT_BIAS,
    NORM,
    TABLE,
    TENSOR,
    Index,
    Leaf,
    Shape,
    Storage,
)
from lsg_flax.patterns import frequencies


def _read_frequencies(tensor: Any, index: Index, shape: Shape) -> np.ndarray:
    """Returns the exact frequencies of rotary positions; a file in half precision has them
    rounded."""
    right = frequencies(2 * shape[0])
    given = np.asarray(tensor[:], np.float32)
    require(
        np.allclose(given, right, rtol=1e-2, atol=1e-6),
        f"rel_pos.inv_freq has {given[:3]}..., but rotary positions here have the frequencies "
        f"{right[:3]}... (theta 10,000); a model with others is not supported.",
    )
    return right[index]


_FREQUENCIES = Storage("frequencies", 1, AS_IT_IS.torch_shape, AS_IT_IS.to_torch, _read_frequencies)
_OURS, _ATTENTION, _MLP = "encoder/layers", "layers.{0}.0", "layers.{0}.1"
_GLOBAL = "encoder/global_layers"
_STREAMS = {
    name: f"{name}"
    for name in (
        *("static_alpha", "dynamic_alpha_fn", "dynamic_alpha_scale"),
        *("static_beta", "dynamic_beta_fn", "dynamic_beta_scale"),
    )
} | {"norm.gamma": "norm_gamma"}

LOCAL_TRANSFORMER = Family(
    model_type="local-transformer",
    class_prefix="LocalTransformer",
    prefix="",
    encoder=(
        Row("token_emb", "encoder/embeddings/word_embeddings", TABLE),
        Row("pos_emb", "encoder/embeddings/position_embeddings", TABLE),
        *(
            Row(f"dynamic_pos_bias.mlp.{2 * i}", f"encoder/position_bias/dense_{i}", DENSE)
            for i in range(3)
        ),
        *(
            Row(f"{part}.{theirs}", f"{path}_streams/{ours}", TENSOR)
            for part, path in (
                (_ATTENTION, f"{_OURS}/attention"),
                (_MLP, f"{_OURS}/mlp"),
                ("global_layers.{0}", f"{_GLOBAL}/global"),
            )
            for theirs, ours in _STREAMS.items()
        ),
        Row(f"{_ATTENTION}.branch.norm", f"{_OURS}/attention_norm", NORM),
        Row(f"{_ATTENTION}.branch.to_qkv", f"{_OURS}/attention/qkv", DENSE_WITHOUT_BIAS),
        Row(f"{_ATTENTION}.branch.q_scale", f"{_OURS}/attention/scale_of_query", TENSOR),
        Row(f"{_ATTENTION}.branch.k_scale", f"{_OURS}/attention/scale_of_key", TENSOR),
        Row(
            f"{_ATTENTION}.branch.attn_fn.rel_pos.inv_freq",
            f"{_OURS}/attention/inv_freq",
            (Leaf("", "/buffer", _FREQUENCIES),),
        ),
        Row(f"{_ATTENTION}.branch.to_v_gate.0", f"{_OURS}/attention/gate", DENSE),
        Row(f"{_ATTENTION}.branch.to_out", f"{_OURS}/attention/output", DENSE_WITHOUT_BIAS),
        Row(f"{_MLP}.branch.0", f"{_OURS}/mlp_norm", NORM),
        Row(f"{_MLP}.branch.1", f"{_OURS}/mlp_up", DENSE_WITHOUT_BIAS),
        Row(f"{_MLP}.branch.4", f"{_OURS}/mlp_down", DENSE_WITHOUT_BIAS),
    ),
    pooler=(),
    given=Row("global_layers.{0}.branch", f"{_GLOBAL}/attention", ()),
    tables=(
        HeadTable(
            task.CAUSAL_LM,
            "",
            heads.NormedScoresHead,
            (
                Row("to_logits.0", "head/layer_norm", NORM),
                Row("to_logits.1", "head", DENSE_WITHOUT_BIAS),
            ),
        ),
        HeadTable(task.BASE, "Body", heads.BaseHead),
    ),
    to_lsg=None,
    dialect=DIALECT,
    architecture=Architecture(norm="pre", embedding_norm=False, biases=False),
    config_type=LocalTransformerConfig,
    ignored=(),
    describes_itself=False,
)
