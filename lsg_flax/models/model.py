"""The model of a task: the encoder with a head, one call signature for all.

Axes: B batch, C choices, T tokens, D model width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from lsg_flax.models.config import EncoderConfig
from lsg_flax.models.encoder import Encoder, Remat
from lsg_flax.models.families import family_of
from lsg_flax.models.heads import Pooler
from lsg_flax.models.inputs import CallInputs, check_inputs, check_mask
from lsg_flax.models.layers import Memory
from lsg_flax.models.outputs import ModelOutput
from lsg_flax.models.task import Task
from lsg_flax.patterns import Cache, slots_for
from lsg_flax.sharding import check_heads


class Model(nn.Module):
    """An encoder with the head of one task; parameters are {"encoder": ..., "pooler": ..., "head":
    ...}, as far as the task has them.

    Attributes:
        config: sizes, family, kind of attention.
        task: one of `TASKS`.
        dtype, param_dtype: of the computation and of the parameters; softmax and LayerNorm
            statistics are float32 in any case.
        remat, unroll: run-time choices about the stack of layers, see `Encoder`; change them by
            `model.clone(remat="full")`.
    """

    config: EncoderConfig
    task: str = "base"
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
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache: Cache | None = None,
        cache_length: int | None = None,
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
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S] (all real by
                default), what a model with `add_cross_attention` attends to. A cache keeps them.
            cache_length: for a causal_lm, also return `cache` with room for at least this many
                tokens, `input_ids` included. Rows must end with their last real token (pad on the
                left); slots behind the last real token of all rows are free again, so padding all
                rows to a bucket changes nothing.
            cache: of the last call. The input is then one more token, [B, 1], of the same lengths
                of arrays for every step, and `position_ids` counts on by default. An "lsh" rng must
                be that of the first call. With a cache, logits are [B, 1, V], of the last token.
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
        inputs = CallInputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        check_inputs(inputs, self.config, self.max_length, choices=self.task == "multiple_choice")
        check_heads(self.config.num_attention_heads)
        slots = _check_cache(self, inputs, cache, cache_length, train=train)
        memory = self._memory(encoder_hidden_states, encoder_attention_mask, inputs.lead, cache)
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
            slots=slots,
            name="encoder",
        )
        last, states, words, cache = encoder(
            *(inputs.flattened() if choices else inputs.arrays()), memory=memory, cache=cache
        )
        head = family_of(self.config.model_type).head(self.task)
        pooled = Pooler(**part, name="pooler")(last) if head.pooled else None
        output = head.module(**part, name="head")(last, pooled, words)
        if choices and output.logits is not None:
            output = dataclasses.replace(
                output, logits=output.logits.reshape(-1, choices)
            )  # [B, C]
        return dataclasses.replace(output, hidden_states=states, cache=cache)

    @property
    def task_record(self) -> Task:
        """What the task is."""
        return family_of(self.config.model_type).task(self.task)

    @property
    def max_length(self) -> int:
        """How many tokens the model reads at most: those that the position table has rows for."""
        offset = family_of(self.config.model_type).position_offset
        return self.config.max_position_embeddings - offset

    def _memory(self, states, mask, lead: tuple[int, ...], cache: Cache | None) -> Memory | None:
        """What cross-attention sees, checked."""
        if states is None and mask is not None:
            raise ValueError("encoder_attention_mask is given without encoder_hidden_states.")
        if states is not None and (not self.config.add_cross_attention or cache is not None):
            raise ValueError(
                "encoder_hidden_states are given, but "
                + (
                    "this model has add_cross_attention=False."
                    if cache is None
                    else "the cache has their keys and values: leave them out."
                )
            )
        if not self.config.add_cross_attention or cache is not None:
            return None
        width = self.config.hidden_size
        if states is None and self.is_initializing():
            states = jnp.zeros((lead[0], 1, width), self.dtype)
        if states is None:
            raise ValueError(
                "add_cross_attention=True needs encoder_hidden_states, [batch, tokens, "
                f"hidden_size={width}]."
            )
        if states.ndim != 3 or (states.shape[0], states.shape[2]) != (lead[0], width):
            raise ValueError(
                f"encoder_hidden_states {tuple(states.shape)} must be [batch={lead[0]}, tokens, "
                f"hidden_size={width}]."
            )
        if mask is None:
            mask = jnp.ones(states.shape[:2], bool)
        if tuple(mask.shape) != tuple(states.shape[:2]):
            raise ValueError(
                f"encoder_attention_mask {tuple(mask.shape)} must be [batch, tokens] = "
                f"{tuple(states.shape[:2])}, as encoder_hidden_states."
            )
        check_mask(mask, "encoder_attention_mask")
        return Memory(jnp.asarray(states, self.dtype), jnp.asarray(mask).astype(bool))


def _check_cache(
    model: Model, inputs: CallInputs, cache: Cache | None, cache_length: int | None, *, train: bool
) -> int:
    """Raises for what a cache cannot do; returns the slots of a new one, 0 for none."""
    if cache is None and cache_length is None:
        return 0
    config, lead, mask = model.config, inputs.lead, inputs.named["attention_mask"]
    if model.task != "causal_lm" or not config.is_decoder or train:
        raise ValueError(
            "a cache is for decoding: it needs task='causal_lm' with is_decoder=True and "
            f"train=False, not task={model.task!r}, is_decoder={config.is_decoder}, train={train}."
        )
    if cache is not None and cache_length is not None:
        raise ValueError("give either a cache, or cache_length for a new one.")
    if cache is not None:
        _check_step(lead, cache, config)
        return 0
    assert cache_length is not None
    length, limit = max(cache_length, lead[1]), model.max_length
    if cache_length < lead[1]:
        raise ValueError(f"cache_length={cache_length} has no room for the {lead[1]} tokens given.")
    if length > limit and inputs.named["position_ids"] is None:
        raise ValueError(
            f"cache_length={cache_length} is more than the {limit} positions of this checkpoint; "
            "decode fewer tokens, or convert it with a larger max_sequence_length."
        )
    if mask is not None and not isinstance(mask, jax.core.Tracer):
        ends = np.max(np.where(np.asarray(mask, bool), np.arange(1, lead[1] + 1), 0), axis=1)
        if (ends != ends[0]).any() or ends[0] == 0:
            raise ValueError(
                "the rows of a prompt must end together: their last real tokens are at "
                f"{(ends - 1).tolist()} (-1: none). Pad on the left "
                "(tokenizer.padding_side = 'left')."
            )
    return slots_for(length, config.lsg)


def _check_step(lead: tuple[int, ...], cache: Cache, config: EncoderConfig) -> None:
    batch, globals_ = cache.position.shape[0], config.lsg.num_global_tokens if config.lsg else 0
    if lead != (batch, 1):
        raise ValueError(
            f"with a cache the input is one token of each of its {batch} rows, [{batch}, 1], not "
            f"{list(lead)}; give a prompt without a cache."
        )
    slots = cache.layers.tokens.key.shape[-1] - globals_
    if not isinstance(cache.length, jax.core.Tracer) and int(cache.length) >= slots:
        raise ValueError(
            f"the cache is full: all its {slots} slots are in use. Begin with a larger "
            "cache_length."
        )
