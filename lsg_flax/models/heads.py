"""Heads: from the encoder's last state to a task's outputs, which have one type.

Axes: B batch, C choices, T tokens, D model width, V vocabulary, K labels, G global tokens.
"""

from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsg_flax.decoding import Cache
from lsg_flax.layers import Part, activation

Task = Literal[
    "base",
    "masked_lm",
    "causal_lm",
    "pretraining",
    "next_sentence_prediction",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
]


@flax.struct.dataclass
class ModelOutput:
    """Outputs by Hugging Face's names; those that a task does not have are None.

    `hidden_states` are the embeddings and each layer's output. As in the reference they keep the
    globals in front and the padding to whole blocks behind: `num_hidden_layers + 1` arrays of [B, G
    + T padded, D]. `cache` is what the next call of a causal model takes.
    """

    last_hidden_state: Array | None = None
    pooler_output: Array | None = None
    logits: Array | None = None
    start_logits: Array | None = None
    end_logits: Array | None = None
    prediction_logits: Array | None = None
    seq_relationship_logits: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    cache: Cache | None = None


class Pooler(Part):
    """Dense and tanh over the first token's state."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x[:, 0]))


class Head(Part):
    """From the encoder's last state, the pooler's output (None unless `pooled`) and the word table
    to the task's outputs."""

    pooled: ClassVar[bool] = False

    def __call__(
        self,
        last: Float[Array, "B T D"],
        pooled: Float[Array, "B D"] | None,
        words: Float[Array, "V D"],
    ) -> ModelOutput:
        """Applies the head."""
        raise NotImplementedError


class BaseHead(Head):
    """No head: the states themselves."""

    pooled = True

    def __call__(self, last, pooled, words):
        return ModelOutput(last_hidden_state=last, pooler_output=pooled)


class LanguageModelHead(Head):
    """Transform, then scores over the vocabulary by the word table (by an own kernel where the
    embeddings are not tied)."""

    @nn.compact
    def __call__(self, last, pooled, words):
        config = self.config
        x = activation(config.hidden_act)(self.dense(config.hidden_size, "transform")(last))
        x = self.layer_norm("layer_norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,), self.param_dtype)
        if config.tie_word_embeddings:
            kernel = words.T
        else:
            init = nn.initializers.normal(config.initializer_range)
            kernel = self.param(
                "kernel", init, (config.hidden_size, config.vocab_size), self.param_dtype
            ).astype(self.dtype)
        return ModelOutput(logits=x @ kernel + bias.astype(self.dtype)[None, None])  # [B, T, V]


class PretrainingHead(Head):
    """Masked language model and next sentence."""

    pooled = True

    @nn.compact
    def __call__(self, last, pooled, words):
        language_model = LanguageModelHead(**self.inherited(), name="masked_lm")(
            last, pooled, words
        )
        return ModelOutput(
            prediction_logits=language_model.logits,
            seq_relationship_logits=self.dense(2, "seq_relationship")(pooled),
        )


class NextSentenceHead(Head):
    """Whether the second segment follows the first."""

    pooled = True

    @nn.compact
    def __call__(self, last, pooled, words):
        return ModelOutput(logits=self.dense(2, "seq_relationship")(pooled))  # [B, 2]


class _Classifier(Head):
    def classify(self, x: Any, labels: int) -> Array:
        """Dropout and a projection to the labels."""
        rate = self.config.classifier_dropout
        return self.dense(labels, "classifier")(
            self.dropout(x, self.config.hidden_dropout_prob if rate is None else rate)
        )


class SequenceClassificationHead(_Classifier):
    """One score per label for the sequence."""

    pooled = True

    @nn.compact
    def __call__(self, last, pooled, words):
        return ModelOutput(logits=self.classify(pooled, self.config.num_labels))  # [B, K]


class TokenClassificationHead(_Classifier):
    """One score per label for every token."""

    @nn.compact
    def __call__(self, last, pooled, words):
        return ModelOutput(logits=self.classify(last, self.config.num_labels))  # [B, T, K]


class MultipleChoiceHead(_Classifier):
    """One score per choice; the model has flattened the choices into the batch."""

    pooled = True

    @nn.compact
    def __call__(self, last, pooled, words):
        return ModelOutput(logits=self.classify(pooled, 1))  # [B * C, 1]


class QuestionAnsweringHead(Head):
    """Scores of every token to start and to end the answer."""

    @nn.compact
    def __call__(self, last, pooled, words):
        logits = self.dense(2, "outputs")(last)  # [B, T, 2]
        return ModelOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])


HEADS: dict[str, type[Head]] = {
    "base": BaseHead,
    "masked_lm": LanguageModelHead,
    "causal_lm": LanguageModelHead,
    "pretraining": PretrainingHead,
    "next_sentence_prediction": NextSentenceHead,
    "sequence_classification": SequenceClassificationHead,
    "token_classification": TokenClassificationHead,
    "question_answering": QuestionAnsweringHead,
    "multiple_choice": MultipleChoiceHead,
}

assert set(HEADS) == set(get_args(Task))
