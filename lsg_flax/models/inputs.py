"""What a model is given: arrays by name, checked before anything is computed."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lsg_flax.models.config import EncoderConfig


class CallInputs:
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
        """In the order of the model's arguments."""
        return tuple(None if a is None else jnp.asarray(a) for a in self.named.values())

    def flattened(self):
        """Choices merged into the batch."""
        drop = len(self.lead) - 1
        return tuple(None if a is None else a.reshape(-1, *a.shape[drop:]) for a in self.arrays())


def check_inputs(inputs: CallInputs, config: EncoderConfig, limit: int, *, choices: bool) -> None:
    """Raises early, with what was given, what is allowed and what to do."""
    lead, named = inputs.lead, inputs.named
    layout = "[batch, choices, tokens]" if choices else "[batch, tokens]"
    if len(lead) != (3 if choices else 2):
        raise ValueError(
            f"the inputs must be {layout}, got a leading shape {lead}; add the missing axis with "
            "x[None]."
        )
    length = lead[-1]
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
    if named["attention_mask"] is not None:
        check_mask(named["attention_mask"], "attention_mask")
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


def check_mask(mask, name: str) -> None:
    """Raises ValueError for a mask that is neither of integers nor of booleans."""
    if not (jnp.issubdtype(mask.dtype, jnp.integer) or mask.dtype == bool):
        raise ValueError(
            f"{name} has dtype {mask.dtype}; give integers or booleans, 1 or True for "
            "real tokens (not the additive form)."
        )


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
