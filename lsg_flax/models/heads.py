"""Models: the encoder with a head for each task. All have one call signature and one output type.

Axes: B batch, C choices, T tokens, D model width, V vocabulary, K labels, G global tokens.
"""

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float

from lsg_flax.config import EncoderConfig
from lsg_flax.layers import Part, activation
from lsg_flax.models.encoder import Encoder, Remat

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
    + T padded, D].
    """

    last_hidden_state: Array | None = None
    pooler_output: Array | None = None
    logits: Array | None = None
    start_logits: Array | None = None
    end_logits: Array | None = None
    prediction_logits: Array | None = None
    seq_relationship_logits: Array | None = None
    hidden_states: tuple[Array, ...] | None = None


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


class Model(nn.Module):
    """An encoder with the head of one task; parameters are {"encoder": ..., "pooler": ..., "head":
    ...}, as far as the task has them.

    Attributes:
        config: sizes, family, kind of attention.
        task: one of `Task`.
        dtype, param_dtype: of the computation and of the parameters; softmax and LayerNorm
            statistics are float32 in any case.
        remat, unroll: run-time choices about the stack of layers, see `Encoder`; change them by
            `model.clone(remat="full")`.
    """

    config: EncoderConfig
    task: Task = "base"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: Remat = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            input_ids: [B, T] token ids ([B, C, T] for multiple choice), or in their place
                `inputs_embeds` [B, T, D].
            attention_mask: [B, T], 1 or True for real tokens.
            token_type_ids, position_ids: [B, T]; segment 0 and 0..T-1 by default.
            train: dropout on; needs rngs={"dropout": key}.
            output_hidden_states: also return the embeddings' and every layer's output.

        Raises:
            ValueError: for shapes or dtypes that do not fit, and for ids beyond their tables. Under
                jit values cannot be read: there an id beyond its table gives NaN.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions=True is not possible: LSG attention never forms the [tokens, "
                "tokens] probabilities, and what it "
                "forms block by block is not kept. To look at the pattern use "
                "lsg_flax.attention.lsg_attention_reference."
            )
        inputs = _Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        _check_inputs(inputs, self.config, choices=self.task == "multiple_choice")
        choices = inputs.lead[1] if self.task == "multiple_choice" else None
        part = {
            "config": self.config,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "train": train,
        }
        encoder = Encoder(
            **part,
            remat=self.remat,
            unroll=self.unroll,
            keep_states=output_hidden_states,
            name="encoder",
        )
        last, states, words = encoder(*(inputs.flattened() if choices else inputs.arrays()))
        head = HEADS[self.task]
        pooled = Pooler(**part, name="pooler")(last) if head.pooled else None
        output = head(**part, name="head")(last, pooled, words)
        if choices and output.logits is not None:
            output = dataclasses.replace(
                output, logits=output.logits.reshape(-1, choices)
            )  # [B, C]
        return dataclasses.replace(output, hidden_states=states)


class _Inputs:
    """The arrays of a call by name; `lead` is their common [B, T] or [B, C, T]."""

    def __init__(self, *arrays):
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        self.named: dict[str, Any] = dict(zip(names, arrays, strict=True))
        for name, array in self.named.items():
            if array is not None and not hasattr(array, "shape"):
                raise ValueError(
                    f"{name} is a {type(array).__name__}; give a numpy or JAX array "
                    '(tokenizer(..., return_tensors="np")).'
                )
        given = [a for a in (self.named["input_ids"], self.named["inputs_embeds"]) if a is not None]
        if len(given) != 1:
            raise ValueError(f"give either input_ids or inputs_embeds, got {len(given)} of them.")
        self.lead = tuple(
            given[0].shape if self.named["input_ids"] is not None else given[0].shape[:-1]
        )

    def arrays(self):
        return tuple(None if a is None else jnp.asarray(a) for a in self.named.values())

    def flattened(self):
        """Choices merged into the batch."""
        drop = len(self.lead) - 1
        return tuple(None if a is None else a.reshape(-1, *a.shape[drop:]) for a in self.arrays())


def _check_inputs(inputs: _Inputs, config: EncoderConfig, *, choices: bool) -> None:
    """Raises early, with what was given, what is allowed and what to do."""
    lead, named = inputs.lead, inputs.named
    layout = "[batch, choices, tokens]" if choices else "[batch, tokens]"
    if len(lead) != (3 if choices else 2):
        raise ValueError(
            f"the inputs must be {layout}, got a leading shape {lead}; add the missing axis with "
            "x[None]."
        )
    length, limit = lead[-1], config.max_position_embeddings
    if length > limit and named["position_ids"] is None:
        raise ValueError(
            f"{length} tokens are more than max_position_embeddings={limit} of this checkpoint; "
            "truncate them, or make the checkpoint "
            f"longer: lsg_flax.convert_checkpoint(source, target, max_sequence_length={length})."
        )
    embeds = named["inputs_embeds"]
    if embeds is not None and embeds.shape[-1] != config.hidden_size:
        raise ValueError(
            f"inputs_embeds {embeds.shape} must end in hidden_size={config.hidden_size}."
        )
    for name in ("attention_mask", "token_type_ids", "position_ids"):
        array = named[name]
        broadcast = (
            name == "position_ids" and array is not None and tuple(array.shape) == (1, *lead[1:])
        )
        if array is not None and tuple(array.shape) != lead and not broadcast:
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}, but the inputs are {layout} = {lead}; "
                "they must be equal."
            )
    mask = named["attention_mask"]
    if mask is not None and not (jnp.issubdtype(mask.dtype, jnp.integer) or mask.dtype == bool):
        raise ValueError(
            f"attention_mask has dtype {mask.dtype}; give integers or booleans, 1 or True for "
            "real tokens (not the additive form)."
        )
    if config.type_vocab_size == 0 and named["token_type_ids"] is not None:
        raise ValueError(
            f"{config.model_type} has no segments (type_vocab_size=0): leave token_type_ids out."
        )
    for name, field in (
        ("input_ids", "vocab_size"),
        ("token_type_ids", "type_vocab_size"),
        ("position_ids", "max_position_embeddings"),
    ):
        _check_ids(named[name], name, field, getattr(config, field))


def _check_ids(ids, name: str, field: str, limit: int) -> None:
    if ids is None:
        return
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {ids.dtype}; they must be integers.")
    if isinstance(ids, jax.core.Tracer) or ids.size == 0:
        return
    values = np.asarray(ids)
    if values.min() < 0 or values.max() >= limit:
        remedy = {
            "max_position_embeddings": "; a longer table comes from "
            "lsg_flax.convert_checkpoint(..., max_sequence_length=...)",
            "vocab_size": "; tokenizer and checkpoint do not belong together",
        }.get(field, "")
        raise ValueError(
            f"{name} lie in {values.min()}..{values.max()}, but {field}={limit} allows "
            f"0..{limit - 1}{remedy}."
        )


assert set(HEADS) == set(get_args(Task))
