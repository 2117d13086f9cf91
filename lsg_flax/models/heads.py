"""Heads of tasks: they turn a stack's last states into a `ModelOutput`; and log probabilities of
labels.

Axes: B batch, C choices, T tokens, D model width, E embedding width, V vocabulary, Y labels, G
global tokens.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsg_flax.checks import require, short
from lsg_flax.models.activations import activation
from lsg_flax.models.layers import Buffer, Part
from lsg_flax.models.outputs import ModelOutput
from lsg_flax.models.task import IGNORED


class Pooler(Part):
    """Dense and tanh over the first token's state."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x[:, 0]))


class Head(Part):
    """The base of heads: reads the last states, the pooler's output (None if the task has no
    pooler) and the word table, and returns the task's outputs."""

    def __call__(
        self,
        last: Float[Array, "B T D"],
        pooled: Float[Array, "B D"] | None,
        words: Float[Array, "V E"],
    ) -> ModelOutput:
        """Applies the head."""
        raise NotImplementedError


class BaseHead(Head):
    """Returns the states themselves, and the pooler's output."""

    def __call__(self, last, pooled, words):
        return ModelOutput(last_hidden_state=last, pooler_output=pooled)


class LanguageModelHead(Head):
    """A transform to the width of the embeddings, then scores over the vocabulary with the word
    table, or with a kernel of its own if the embeddings are not tied.

    Attributes:
        act: activation of the transform; by default the config's `hidden_act`.
    """

    act: str | None = None

    @nn.compact
    def __call__(self, last, pooled, words):
        config, context, width = self.config, self.context, self.config.embedding_width
        x = activation(self.act or config.hidden_act)(self.dense(width, "transform")(last))
        x = self.layer_norm("layer_norm")(x)
        zeros, init = nn.initializers.zeros, nn.initializers.normal(config.initializer_range)
        bias = self.param("bias", zeros, (config.vocab_size,), context.param_dtype)
        if config.tie_word_embeddings:
            kernel = words.T
        else:
            kernel = self.param("kernel", init, (width, config.vocab_size), context.param_dtype)
        logits = x @ kernel.astype(context.dtype) + bias.astype(context.dtype)[None, None]
        return ModelOutput(logits=logits)  # [B, T, V]


class WordScoresHead(Head):
    """Scores over the vocabulary with the word table, or with a kernel of its own if the embeddings
    are not tied.

    Attributes:
        biased: whether there is a bias, which is stored and never trained.
    """

    biased: bool = False

    @nn.compact
    def __call__(self, last, pooled, words):
        config, context, kernel = self.config, self.context, words.T
        shape, init = kernel.shape, nn.initializers.normal(config.initializer_range)
        if not config.tie_word_embeddings:
            kernel = self.param("kernel", init, shape, context.param_dtype)
        logits = last @ kernel.astype(context.dtype)  # [B, T, V]
        if self.biased:
            first = functools.partial(jnp.zeros, (1, shape[1]))
            bias = Buffer(first, context.param_dtype, name="final_logits_bias")()
            logits += bias[None].astype(context.dtype)
        return ModelOutput(logits=logits)


class NormedScoresHead(Head):
    """A LayerNorm, then scores over the vocabulary with a kernel of its own."""

    @nn.compact
    def __call__(self, last, pooled, words):
        config, context = self.config, self.context
        shape, init = last.shape[-1:], nn.initializers.normal(config.initializer_range)
        kernel = self.param("kernel", init, (*shape, config.vocab_size), context.param_dtype)
        return ModelOutput(
            logits=self.layer_norm("layer_norm")(last) @ kernel.astype(context.dtype)
        )


class PretrainingHead(Head):
    """Masked language modelling and next-sentence prediction."""

    @nn.compact
    def __call__(self, last, pooled, words):
        language_model = LanguageModelHead(self.context, name="masked_lm")(last, pooled, words)
        return ModelOutput(
            prediction_logits=language_model.logits,
            seq_relationship_logits=self.dense(2, "seq_relationship")(pooled),
        )


class NextSentenceHead(Head):
    """Whether the second segment follows the first."""

    @nn.compact
    def __call__(self, last, pooled, words):
        return ModelOutput(logits=self.dense(2, "seq_relationship")(pooled))  # [B, 2]


class _Classifier(Head):
    def classify(self, x: Any, labels: int, rate: float | None = None) -> Array:
        """Applies dropout (by default with `classifier_dropout`) and a projection to the labels."""
        rate = self.config.classifier_dropout if rate is None else rate
        return self.dense(labels, "classifier")(self.dropout(x, rate))


class SentenceOrderHead(Head):
    """Masked language modelling, and whether the two segments are in order."""

    @nn.compact
    def __call__(self, last, pooled, words):
        context = self.context
        language_model = LanguageModelHead(context, name="masked_lm")(last, pooled, words)
        order = SequenceClassificationHead(context, name="sentence_order")(last, pooled, words)
        return ModelOutput(prediction_logits=language_model.logits, sop_logits=order.logits)


class DiscriminatorHead(Head):
    """Whether each token was replaced."""

    @nn.compact
    def __call__(self, last, pooled, words):
        config = self.config
        x = activation(config.hidden_act)(self.dense(config.hidden_size, "dense")(last))
        return ModelOutput(logits=self.dense(1, "prediction")(x)[..., 0])  # [B, T]


class SequenceClassificationHead(_Classifier):
    """One score per label for the sequence."""

    @nn.compact
    def __call__(self, last, pooled, words):
        return ModelOutput(logits=self.classify(pooled, self.config.num_labels))  # [B, Y]


class FirstTokenHead(_Classifier):
    """Classification by the first token's state instead of the pooler's output.

    Attributes:
        act: activation of the dense layer.
        dropout_first: whether there is dropout before the dense layer, too.
        choices: whether to return one score per choice, as `MultipleChoiceHead`.
    """

    act: str = "tanh"
    dropout_first: bool = False
    choices: bool = False

    @nn.compact
    def __call__(self, last, pooled, words):
        x = last[:, 0]
        if self.dropout_first:
            x = self.dropout(x, self.config.classifier_dropout)
        x = activation(self.act)(self.dense(self.config.hidden_size, "dense")(x))
        return ModelOutput(logits=self.classify(x, 1 if self.choices else self.config.num_labels))


SUMMARY = {"summary_type": "first", "summary_use_proj": True, "summary_proj_to_labels": False}


class SequenceSummaryHead(_Classifier):
    """Multiple choice by a projection of the first token's state (ELECTRA's summary)."""

    @nn.compact
    def __call__(self, last, pooled, words):
        config = self.config
        for name, only in SUMMARY.items():
            value = config.other(name, only)
            require(
                value == only,
                f"{name}={short(value)} in config.json changes what multiple choice computes and "
                f"is not supported; only {only!r} is.",
            )
        x = self.dropout(last[:, 0], config.other("summary_first_dropout", 0.0))
        x = self.dense(config.hidden_size, "dense")(x)
        act = config.other("summary_activation", "gelu")
        x = activation(act, "summary_activation")(x) if act else x
        rate = config.other("summary_last_dropout", 0.1)
        return ModelOutput(logits=self.classify(x, 1, rate))  # [B * C, 1]


class TokenClassificationHead(_Classifier):
    """One score per label for every token.

    Attributes:
        of_hidden: whether dropout has the rate of hidden states instead of that of classifiers.
    """

    of_hidden: bool = False

    @nn.compact
    def __call__(self, last, pooled, words):
        rate = self.config.hidden_dropout_prob if self.of_hidden else None
        return ModelOutput(logits=self.classify(last, self.config.num_labels, rate))  # [B, T, Y]


class MultipleChoiceHead(_Classifier):
    """One score per choice; the model has merged the choices into the batch."""

    @nn.compact
    def __call__(self, last, pooled, words):
        return ModelOutput(logits=self.classify(pooled, 1))  # [B * C, 1]


class QuestionAnsweringHead(Head):
    """Scores of every token as the start and as the end of the answer.

    Attributes:
        dropout_field, dropout_default: field of config.json with the dropout rate of the head, and
            its default; None for no dropout.
    """

    dropout_field: str | None = None
    dropout_default: float = 0.0

    @nn.compact
    def __call__(self, last, pooled, words):
        if self.dropout_field:
            last = self.dropout(last, self.config.other(self.dropout_field, self.dropout_default))
        logits = self.dense(2, "outputs")(last)  # [B, T, 2]
        return ModelOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])


def label_log_probs(
    logits: Float[Array, "*N V"], labels: Int[Array, "*#N"], smoothing: float = 0.0
) -> Float[Array, "*N"]:
    """Returns log softmax(logits)[label], in nats and float32, as PyTorch's CrossEntropyLoss; 0 for
    a label of -100, NaN for a label that is not a class.

    Args:
        logits: [..., classes].
        labels: [...].
        smoothing: the share of each label that is spread evenly over all classes, its own included.
    """
    logits = logits.astype(jnp.float32)
    counted = labels != IGNORED
    invalid = counted & ((labels < 0) | (labels >= logits.shape[-1]))
    index = jnp.where(counted & ~invalid, labels, 0)
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    if smoothing:
        chosen += smoothing * (jnp.mean(logits, axis=-1) - chosen)
    scores = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(invalid, jnp.nan, jnp.where(counted, scores, 0.0))
