"""What models take and give: trees of parameters, and the one type of outputs."""

import dataclasses
from typing import Any

import flax.struct
from jaxtyping import Array

from lsg_flax.patterns import Cache

Params = dict[str, Any]  # nested, with arrays as leaves
Batch = dict[str, Any]  # arrays by Hugging Face's names, inputs and labels


@flax.struct.dataclass
class ModelOutput:
    """Outputs by Hugging Face's names; those that a task does not have are None.

    `hidden_states` are the embeddings and each layer's output. As in the reference they keep the
    globals in front and the padding to whole blocks behind: `num_hidden_layers + 1` arrays of [B, G
    + T padded, D]; an encoder-decoder has `encoder_hidden_states` and `decoder_hidden_states`. Its
    `encoder_last_hidden_state` has the globals in front if they are passed on. `cache` is what the
    next call of a decoder takes. `loss` is there where a model computes it itself (REALM's).
    """

    last_hidden_state: Array | None = None
    pooler_output: Array | None = None
    logits: Array | None = None
    start_logits: Array | None = None
    end_logits: Array | None = None
    prediction_logits: Array | None = None
    seq_relationship_logits: Array | None = None
    sop_logits: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    decoder_hidden_states: tuple[Array, ...] | None = None
    cache: Cache | None = None
    loss: Array | None = None
    projected_score: Array | None = None
    relevance_score: Array | None = None
    query_score: Array | None = None
    candidate_score: Array | None = None
    retriever_logits: Array | None = None
    reader_logits: Array | None = None
    retriever_loss: Array | None = None
    reader_loss: Array | None = None
    retriever_correct: Array | None = None
    reader_correct: Array | None = None
    block_idx: Array | None = None
    candidate: Array | None = None
    start_pos: Array | None = None
    end_pos: Array | None = None

    def by_text(self, texts: int, per_token: tuple[str, ...]) -> "ModelOutput":
        """With the outputs of a row for each of its texts, [B, texts, ...] in place of
        [B * texts, ...]; those named in `per_token` have an axis of tokens there."""
        others = {name: x for name, x in vars(self).items() if name not in per_token}
        by_text = {
            n: x.reshape(-1, texts, *x.shape[1:]) for n, x in others.items() if x is not None
        }
        return dataclasses.replace(self, **by_text)
