"""Types of models' inputs and outputs: parameters, batches, and the record of outputs."""

import dataclasses
from typing import Any

import flax.struct
from jaxtyping import Array

from lsg_flax.patterns import Cache

Params = dict[str, Any]  # nested, with arrays as leaves
Batch = dict[str, Any]  # arrays by Hugging Face's names, inputs and labels


@flax.struct.dataclass
class ModelOutput:
    """The outputs of a model, by the names of transformers' MaskedLMOutput and its like; a field
    that the task does not have is None.

    Shapes: `last_hidden_state` is [B, T, D] and `pooler_output` [B, D]; `logits` are [B, T, V] for
    language models, [B, T, labels] for token classification, [B, labels] for sequence
    classification, [B, C] for multiple choice; `start_logits` and `end_logits` are [B, T].

    `hidden_states` are the outputs of the embeddings and of each layer: `num_hidden_layers + 1`
    arrays of [B, G + T padded, D]. As in the reference they include the globals at the start and
    the padding to whole blocks at the end. An encoder-decoder has `encoder_hidden_states` and
    `decoder_hidden_states` instead; its `encoder_last_hidden_state` starts with the globals if they
    are passed to the decoder. `cache` is for the next call of a decoder. `loss` is set only by
    models that compute it themselves (REALM's).
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
        """Returns a copy whose outputs for whole texts are [B, texts, ...] instead of
        [B * texts, ...]; the fields in `per_token`, which have a token axis, are unchanged."""
        others = {name: x for name, x in vars(self).items() if name not in per_token}
        by_text = {
            n: x.reshape(-1, texts, *x.shape[1:]) for n, x in others.items() if x is not None
        }
        return dataclasses.replace(self, **by_text)
