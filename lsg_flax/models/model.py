"""The model of a task: a body with a head, one call signature for all.

Axes: B batch, C choices, T tokens, S keys (an encoder's states), D model width, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from lsg_flax.models.config import EncoderConfig
from lsg_flax.models.encoder import Encoder, Remat
from lsg_flax.models.families import Family, HeadTable, family_of
from lsg_flax.models.heads import Pooler
from lsg_flax.models.inputs import (
    Inputs,
    check_inputs,
    check_step,
    encoder_states,
    slots_of_cache,
)
from lsg_flax.models.layers import Context, Implementation
from lsg_flax.models.outputs import ModelOutput, Params
from lsg_flax.models.task import Task
from lsg_flax.patterns import Cache, checked_value, require, whole
from lsg_flax.sharding import check_heads


class Model(nn.Module):
    """A body with the head of one task; parameters are {"encoder": ..., "pooler": ..., "head":
    ...}, as far as the task has them.

    Attributes:
        config: sizes, family, kind of attention; its type says which body.
        task: one of `TASKS`.
        dtype, param_dtype: of the computation and of the parameters; softmax and LayerNorm
            statistics are float32 in any case.
        remat, unroll, implementation: run-time choices about the stack of layers (see `Encoder`)
            and attention (see `lsg_attention`); change them by `model.clone(remat="full")`.
    """

    config: EncoderConfig
    task: str = "base"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: Remat = "none"
    unroll: int = 1
    implementation: Implementation | None = None

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
            ValueError: for shapes or dtypes that do not fit, ids beyond their tables, and masks
                that hold other values than 0 and 1. Under jit values cannot be read: there such an
                id or mask gives NaN.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions=True is not possible: LSG attention never forms the [tokens, "
                "tokens] probabilities, and what it forms block by block is not kept. To look at "
                "the pattern use lsg_flax.attention.lsg_attention_reference."
            )
        self._check_run()
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        rank = self.task_record.input_rank
        check_inputs(inputs, self.config, self.max_length, rank=rank)
        check_heads(self.config.num_attention_heads)
        slots = self._slots(inputs, cache, cache_length, train=train)
        batch, width = inputs.lead[0], self.config.hidden_size
        if self.is_initializing() and self.config.add_cross_attention and cache is None:
            encoder_hidden_states = jnp.zeros((batch, 1, width), self.dtype)
        memory = encoder_states(
            encoder_hidden_states,
            encoder_attention_mask,
            self.config,
            batch,
            cache=cache,
            dtype=self.dtype,
        )
        context = self._context(slots, train=train)
        body = self._body(context, keep_states=output_hidden_states)
        last, states, words, cache = body(inputs.flattened(), memory, cache)
        pooled = Pooler(context, name="pooler")(last) if self.head_table.pooled else None
        output = self.head_table.module(context, name="head")(last, pooled, words)
        if rank == 3 and output.logits is not None:
            logits = output.logits.reshape(-1, inputs.lead[1])  # [B, C]
            output = dataclasses.replace(output, logits=logits)
        return dataclasses.replace(output, hidden_states=states, cache=cache)

    def _check_run(self) -> None:
        """Raises ValueError for run-time fields that no computation can have."""
        for name in ("dtype", "param_dtype"):
            dtype = getattr(self, name)
            try:
                floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
            except TypeError:  # PyTorch's, or no dtype at all
                floating = False
            require(
                floating,
                f"{name}={dtype!r} must be a type of JAX's real numbers, such as jnp.float32, "
                "jnp.bfloat16 or jnp.float16.",
            )
        checked_value("unroll", self.unroll, int, whole(1, 2**16))

    def _context(self, slots: int, *, train: bool) -> Context:
        return Context(
            self.config,
            self.family.architecture,
            self.dtype,
            self.param_dtype,
            train,
            implementation=self.implementation,
            slots=slots,
        )

    def _body(self, context: Context, *, keep_states: bool) -> nn.Module:
        """What runs between the inputs and the head."""
        match self.config:
            case EncoderConfig(is_decoder=causal):
                run = (self.remat, self.unroll, keep_states)
                return Encoder(context, causal, *run, name="encoder")

    def _slots(
        self, inputs: Inputs, cache: Cache | None, cache_length: int | None, *, train: bool
    ) -> int:
        """How many slots a new cache has, 0 for none; raises for what a cache cannot do."""
        if cache is None and cache_length is None:
            return 0
        config = self.config
        if not self.task_record.fixed.get("is_decoder") or not config.is_decoder or train:
            raise ValueError(
                "a cache is for decoding: it needs task='causal_lm' with is_decoder=True and "
                f"train=False, not task={self.task!r}, is_decoder={config.is_decoder}, "
                f"train={train}."
            )
        if cache is not None and cache_length is not None:
            raise ValueError("give either a cache, or cache_length for a new one.")
        if cache is not None:
            check_step(inputs, cache, config)
        return (
            0
            if cache_length is None
            else slots_of_cache(inputs, config, self.max_length, cache_length)
        )

    @property
    def family(self) -> Family:
        """The family of the config's model_type."""
        return family_of(self.config.model_type)

    @property
    def head_table(self) -> HeadTable:
        """The family's head of the task."""
        return self.family.head(self.task)

    @property
    def task_record(self) -> Task:
        """What the task is."""
        return self.head_table.task

    @property
    def max_length(self) -> int:
        """How many tokens the model reads at most: those that the position table has rows for."""
        return self.config.max_position_embeddings - self.family.architecture.first_row(self.config)

    def example_inputs(self) -> dict[str, Any]:
        """The smallest input that the model takes: what shapes are inferred from."""
        return {"input_ids": np.zeros((1,) * (self.task_record.input_rank - 1) + (2,), np.int32)}

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters; nothing is computed."""
        example = self.example_inputs()
        return jax.eval_shape(lambda key: self.init(key, **example)["params"], jax.random.key(0))
