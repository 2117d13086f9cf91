"""The encoder-decoder: two stacks over one word table.

Axes: B batch, T tokens, U tokens with an output, S keys (the encoder's states), D model
width, V vocabulary, E embedding width.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from lsg_flax.models.architecture import Shift
from lsg_flax.models.attention_layers import EncoderStates
from lsg_flax.models.config_seq2seq import EncoderDecoderConfig
from lsg_flax.models.encoder import BodyOutput, Encoder, Remat
from lsg_flax.models.inputs import Inputs, encoder_states
from lsg_flax.models.layers import Context, Embedding
from lsg_flax.models.task import IGNORED
from lsg_flax.patterns import Cache
from lsg_flax.sharding import constrain


@dataclass(frozen=True)
class EncoderDecoder:
    """Both stacks. Their modules become submodules of the model that calls them.

    Attributes:
        encoder, decoder: the contexts of the stacks.
        remat, unroll, keep_states: see `Encoder`.
    """

    config: EncoderDecoderConfig
    encoder: Context
    decoder: Context
    remat: Remat = "none"
    unroll: int = 1
    keep_states: bool = False

    def words(self) -> Float[Array, "V E"]:
        """Returns the word table that the stacks share."""
        config, context = self.config, self.decoder
        size = (config.vocab_size, config.hidden_size, config.initializer_range)
        table = Embedding(*size, context.param_dtype, name="shared")()
        return constrain(table.astype(context.dtype), "vocab", "columns")

    def encode(self, inputs: Inputs, words: Float[Array, "V E"]) -> BodyOutput:
        """Runs the encoder; its states start with the globals if the decoder sees them."""
        run = (self.remat, self.unroll, self.keep_states, False, self.config.passed_globals > 0)
        return Encoder(self.encoder, *run, name="encoder")(inputs, words=words)

    def decode(
        self,
        inputs: Inputs,
        memory: EncoderStates | None,
        cache: Cache | None,
        words: Float[Array, "V E"],
    ) -> BodyOutput:
        """Runs the decoder; a cache already has the keys and values of `memory`."""
        run = (self.remat, self.unroll, self.keep_states, True)
        return Encoder(self.decoder, *run, name="decoder")(inputs, memory, cache, words)

    def memory(self, states: Any, mask: Any, batch: int) -> EncoderStates:
        """Returns the checked encoder states that the decoder attends to.

        Args:
            states: [B, S, D], from `encode` or passed by the caller, maybe in a tuple as in
                PyTorch.
            mask: [B, T], of the encoder's tokens; None if all are real.
            batch: number of rows of the decoder's inputs.

        Raises:
            ValueError: for states that do not fit the model or the mask.
        """
        split, width = self.config.passed_globals, self.config.hidden_size
        states = states[0] if isinstance(states, tuple | list) else states
        shape = tuple(getattr(states, "shape", ()))
        tokens = mask.shape[1] if mask is not None else max(sum(shape[1:2]) - split, 1)
        if shape != (batch, split + tokens, width):
            raise ValueError(
                f"encoder_outputs {shape} must be [batch={batch}, {split} global tokens + "
                f"{'tokens' if mask is None else tokens}, hidden_size={width}]: the rows of the "
                "decoder's inputs, and the encoder's output for attention_mask "
                "(pass_global_tokens_to_decoder decides whether it has globals)."
            )
        if mask is not None:
            mask = jnp.pad(jnp.asarray(mask), ((0, 0), (split, 0)), constant_values=1)
            if self.config.lsg and self.config.lsg.mask_first_token:
                # The reference's encoder changes its caller's mask in place, and the decoder gets
                # that mask; without a mask its decoder sees the first token.
                mask = mask.at[:, split].set(jnp.zeros((), mask.dtype))
        context = self.decoder
        seen = encoder_states(states, mask, context.config, batch, cache=None, dtype=context.dtype)
        assert seen is not None
        return seen


def shift_right(
    ids: Integer[Array, "B T"], config: EncoderDecoderConfig, shift: Shift
) -> Integer[Array, "B T"]:
    """Makes a decoder's inputs from its labels (-100 is padding), as `Architecture.shift` says.

    Raises:
        ValueError: if the config lacks a token that is needed.
    """
    start, pad = config.decoder_start_token_id, config.pad_token_id
    start = pad if shift == "last_token" else start
    if pad is None or start is None:
        raise ValueError(
            f"this {config.model_type} model has pad_token_id={pad} and decoder_start_token_id="
            f"{config.decoder_start_token_id}, which are needed to make decoder_input_ids: give "
            "decoder_input_ids, or pass the missing token to from_pretrained."
        )
    ids = jnp.where(ids == IGNORED, pad, ids)
    if shift == "start_token":
        first = jnp.full_like(ids[:, :1], start)
    else:
        last = jnp.sum(ids != pad, axis=1, keepdims=True) - 1
        first = jnp.take_along_axis(ids, last, axis=1)
    return jnp.concatenate([first, ids[:, :-1]], axis=1)


def last_eos(
    states: Float[Array, "B U D"], ids: ArrayLike, eos_token_id: int | None
) -> Float[Array, "B 1 D"]:
    """Returns the state at the last end token of every row; under jit NaN for a row without one.

    Raises:
        ValueError: outside jit, for rows without end tokens, or with different numbers of them.
    """
    ends: Bool[Array, "B T"] = jnp.asarray(ids) == eos_token_id
    if not isinstance(ids, jax.core.Tracer):
        counts = (np.asarray(ids) == eos_token_id).sum(axis=1)
        if (counts != counts[0]).any() or counts[0] == 0 or ends.shape != states.shape[:2]:
            raise ValueError(
                f"rows are classified by the state at their last eos_token_id={eos_token_id}, so "
                "all must have the same number of them, at least one, but they have "
                f"{counts.tolist()}; input_ids {ends.shape} and decoder inputs {states.shape[:2]} "
                "must have the same shape. Let the tokenizer add special tokens, and truncate "
                "texts before it does."
            )
    place = jnp.max(jnp.where(ends, jnp.arange(ends.shape[1])[None], -1), axis=1)[:, None, None]
    return jnp.where(place < 0, jnp.nan, jnp.take_along_axis(states, place, axis=1))
