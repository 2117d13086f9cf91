"""The model of a task: the encoder with a head, one call signature for all.

Axes: B batch, C choices, T tokens, D model width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from lsg_flax.config import EncoderConfig
from lsg_flax.models.encoder import Encoder, Remat
from lsg_flax.models.families import family_of
from lsg_flax.models.heads import ModelOutput, Pooler, Task


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
        head = family_of(self.config.model_type).head(self.task)
        pooled = Pooler(**part, name="pooler")(last) if head.pooled else None
        output = head.module(**part, name="head")(last, pooled, words)
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
    length = lead[-1]
    limit = config.max_position_embeddings - family_of(config.model_type).position_offset
    if length > limit and named["position_ids"] is None:
        raise ValueError(
            f"{length} tokens are more than the {limit} positions of this checkpoint "
            f"(max_position_embeddings={config.max_position_embeddings}); "
            "truncate them, or make the checkpoint "
            f"longer: lsg_flax.convert_checkpoint(source, target, max_sequence_length={length})."
        )
    embeds = named["inputs_embeds"]
    if embeds is not None and embeds.shape[-1] != config.embedding_width:
        name = "embedding_size" if config.embedding_size else "hidden_size"
        raise ValueError(
            f"inputs_embeds {embeds.shape} must end in {name}={config.embedding_width}."
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
