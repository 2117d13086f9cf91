"""The model of a task: a body with a head, with one call signature for all families.

Axes: B batch, C choices, T tokens, S keys (an encoder's states), D model width, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array

from lsg_flax.checks import require
from lsg_flax.models.call import Call, check_packable, check_run, refuse, refuse_attentions
from lsg_flax.models.config import EncoderConfig, ModelConfig
from lsg_flax.models.config_local import LocalTransformerConfig
from lsg_flax.models.config_reformer import ReformerConfig
from lsg_flax.models.config_seq2seq import EncoderDecoderConfig
from lsg_flax.models.encoder import BodyOutput, Encoder, Remat
from lsg_flax.models.families import Family, HeadTable, family_of
from lsg_flax.models.heads import Pooler
from lsg_flax.models.inputs import (
    Inputs,
    check_ids,
    check_inputs,
    check_step,
    encoder_states,
    slots_of_cache,
)
from lsg_flax.models.layers import Context, Implementation
from lsg_flax.models.local_transformer import LocalTransformer, check_given
from lsg_flax.models.outputs import ModelOutput, Params
from lsg_flax.models.realm import candidates_of, relevance
from lsg_flax.models.reformer import Reformer, Rotations
from lsg_flax.models.segments import block_of, check_segments, count_segments, first_states
from lsg_flax.models.seq2seq import EncoderDecoder, last_eos, shift_right
from lsg_flax.models.task import IGNORED, Task
from lsg_flax.patterns import Cache

MOST_TOKENS = 2**28  # that a model without positions accepts


class Model(nn.Module):
    """A body with the head of one task, as a Linen module; its numbers are those of the
    PyTorch class, such as transformers' BertForMaskedLM or lsg_converter's LSGBertForMaskedLM.

    Its parameters are {"shared": ..., "encoder": ..., "decoder": ..., "pooler": ..., "head": ...},
    those of them that the family and the task have.

    Attributes:
        config: sizes, family and attention pattern; its type selects the body.
        task: name of the task, one of `TASKS` that the family has.
        dtype, param_dtype: of the computation and of the parameters; softmax and LayerNorm
            statistics are always float32.
        remat, unroll, implementation: run-time settings of the layers (see `Encoder`) and of
            attention (see `lsg_attention`); change them with `model.clone(remat="full")`.
        global_attention: for a LocalTransformer, the Flax module in front of the layers that
            layers_insert_global_attn lists. It is called with [B, T, D] and, if it accepts them,
            the keywords attention_mask [B, T] and train.
    """

    config: ModelConfig
    task: str = "base"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: Remat = "none"
    unroll: int = 1
    implementation: Implementation | None = None
    global_attention: nn.Module | None = None

    @nn.compact
    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        *,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        decoder_inputs_embeds=None,
        encoder_outputs=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache: Cache | None = None,
        cache_length: int | None = None,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        lsh_rotations=None,
        segment_ids=None,
        num_segments: int | None = None,
        **arrays: Any,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            input_ids: token ids, [B, T] ([B, C, T] for multiple choice). Either these or
                `inputs_embeds` must be given.
            attention_mask: [B, T], 1 or True for real tokens; by default all tokens are real.
            token_type_ids, position_ids: [B, T]; by default segment 0 and 0..T-1.
            inputs_embeds: [B, T, D], instead of `input_ids`.
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds: the decoder's inputs,
                for encoder-decoders. By default BART and mBART shift `input_ids` to the right, as
                PyTorch does.
            encoder_outputs: for encoder-decoders, `encoder_last_hidden_state` of an earlier call,
                instead of `input_ids`; `attention_mask` is still that of the encoder's tokens.
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S] (all real by
                default): what a decoder with cross-attention attends to. A cache keeps them.
            cache: the `cache` that the last call returned. The (decoder's) input is then one more
                token, [B, 1]; by default `position_ids` continues from the last position. All steps
                have the same array shapes. An "lsh" rng must be that of the first call. Logits are
                then [B, 1, V], those of the last token.
            cache_length: for causal_lm and conditional_generation, also return a `cache` with room
                for at least this many tokens, those given to the decoder included. All rows must
                end with a real token in the same column (pad on the left); slots after it are free,
                so padding all rows to a bucket changes nothing. With 0 the logits are the same, and
                no cache is returned.
            train: whether dropout is on; needs rngs={"dropout": key}.
            output_hidden_states: whether to return the outputs of the embeddings and every layer.
            output_attentions: not supported; True raises ValueError.
            lsh_rotations: for a Reformer, one array [heads, head width, hashes, rotations // 2] per
                LSH layer that hashes. By default, or if empty, they are drawn with the "lsh" rng,
                or a fixed seed if there is none.
            segment_ids: [B, T], for several texts packed into one row: 1 for the tokens of the
                first text, 2 for the second, 0 for padding. Each text must start at the start of a
                block of the LSG pattern. It has the outputs that it has in a row of its own;
                outputs for a whole text are [B, num_segments, ...]. `attention_mask` can be left
                out.
            num_segments: the largest number of texts in a row; by default, with LSG attention, the
                number of blocks in a row.
            **arrays: further arrays that the task's record lists (`task.arrays`): for REALM the
                candidates, relevance, masks and labels; see realm.py.

        Returns:
            A `ModelOutput` with the fields of the task.

        Raises:
            ValueError: for shapes or dtypes that do not fit, ids beyond their tables, and masks
                with values other than 0 and 1. Under jit, where values cannot be read, such an id
                or mask gives NaN.
        """
        refuse_attentions(output_attentions)
        check_run(self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}, self.unroll)
        check_given(self.config, self.global_attention)
        arrays = self._given(arrays)
        ids = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, segment_ids
        inputs = Inputs(*ids)
        targets = Inputs(
            decoder_input_ids, decoder_attention_mask, inputs_embeds=decoder_inputs_embeds
        )
        call = Call(cache, cache_length, train, output_hidden_states)
        call = call._replace(texts=self._texts(segment_ids, num_segments, call))
        states = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if not isinstance(self.config, ReformerConfig):
            refuse("only a Reformer takes them", lsh_rotations=lsh_rotations or None)
        if self.counts_positions:
            refuse("the family counts positions itself", position_ids=position_ids)
        if self.has_two_stacks:
            refuse("an encoder-decoder takes encoder_outputs instead", **states)
            return self._run_both(inputs, targets, encoder_outputs, call)
        others = {f"decoder_{name}": array for name, array in targets._asdict().items()}
        refuse("only encoder-decoders take them", encoder_outputs=encoder_outputs, **others)
        if self.head_table.embedders:
            return self._compare(inputs, arrays, call)
        rotations = tuple(map(jnp.asarray, lsh_rotations or ()))
        return self._run_one(inputs, states, call, arrays, rotations)

    def _given(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arrays that are not None; raises ValueError for one that the task does not take."""
        arrays = {name: array for name, array in arrays.items() if array is not None}
        unknown = sorted(arrays.keys() - {*self.task_record.arrays})
        require(
            not unknown,
            f"task={self.task!r} does not take {', '.join(unknown)}; beside the inputs it takes "
            f"{', '.join(self.task_record.arrays) or 'nothing'}.",
        )
        return arrays

    def _texts(self, segment_ids: Any, num_segments: int | None, call: Call) -> int:
        """The largest number of texts in a row; 0 if each row is one text. Raises ValueError if
        the model or the call allows only that."""
        if segment_ids is not None:
            cached = call.cache is not None or call.cache_length is not None
            check_packable(self.config, self.head_table, cached=cached)
        per_text = self.head_table.pooled or not self.task_record.per_token
        return count_segments(segment_ids, num_segments, self.answering_stack, answers=per_text)

    def _compare(self, inputs: Inputs, arrays: dict[str, Any], call: Call) -> ModelOutput:
        """Runs queries and their candidates, each through its embedder, and scores them."""
        first, *own = (
            model.clone(name=name, parent=self) for name, model in self.embedders.items()
        )
        query = (own[0] if own else first)(**inputs._asdict(), train=call.train)
        candidates = candidates_of(arrays, inputs)
        check_inputs(candidates, self.answering_stack, self.max_length, rank=3, of="candidate_")
        flat = candidates.flattened()._asdict()
        return relevance(query, first(**flat, train=call.train), candidates.lead)

    def _run_one(
        self,
        inputs: Inputs,
        states: dict[str, Any],
        call: Call,
        arrays: dict[str, Any],
        rotations: Rotations,
    ) -> ModelOutput:
        """Runs a model with one stack: an encoder, or a decoder on its own."""
        stack, rank = self.answering_stack, self.task_record.input_rank
        rank -= self.task_record.alone and inputs.rank == rank - 1
        if inputs.input_ids is not None or self.task != "base":
            stack.check_tokens()
        check_inputs(inputs, stack, self.max_length, rank=rank)
        context = self._context(stack, call, self._slots(inputs, call))
        if call.texts:
            check_segments(inputs.segment_ids, call.texts, stack, self.max_length)
        batch, width = inputs.lead[0], stack.hidden_size
        hidden, mask = states.values()
        if self.is_initializing() and stack.add_cross_attention and call.cache is None:
            hidden = jnp.zeros((batch, 1, width), self.dtype)
        required = isinstance(self.config, EncoderConfig)
        options = {"cache": call.cache, "dtype": self.dtype, "required": required}
        memory = encoder_states(hidden, mask, stack, batch, **options)
        flat, run = inputs.flattened(call.texts, block_of(stack)), self._run(call)
        match self.config:
            case EncoderDecoderConfig():
                stacks = EncoderDecoder(self.config, context, context, *run)
                body = stacks.decode(flat, memory, call.cache, stacks.words())
            case LocalTransformerConfig():
                body = LocalTransformer(context, *run, name="encoder")(flat, call.cache)
            case ReformerConfig():
                body = Reformer(context, *run, name="encoder")(flat, rotations, call.cache)
            case _:
                encoder = Encoder(context, *run, causal=stack.is_decoder, name="encoder")
                body = encoder(flat, memory, call.cache)
        output = self._answer(context, body, body.last, flat.segment_ids)
        if finish := self.head_table.finish:
            if not self.is_initializing():
                output = finish(output, arrays, self.config, inputs.lead)
        elif rank == 3 and output.logits is not None:
            logits = output.logits.reshape(-1, inputs.lead[1])  # [B, C]
            output = dataclasses.replace(output, logits=logits)
        return dataclasses.replace(output, hidden_states=body.states, cache=call.kept(body.cache))

    def _run_both(
        self, inputs: Inputs, targets: Inputs, encoder_outputs: Any, call: Call
    ) -> ModelOutput:
        """Runs an encoder and a decoder; with a cache only the decoder."""
        config = self.config
        assert isinstance(config, EncoderDecoderConfig)
        targets = self._targets(inputs, targets)
        check_inputs(targets, config.decoder, self.max_length, rank=2, of="decoder_")
        context = self._context(config.decoder, call, self._slots(targets, call))
        encoder = self._context(config.encoder, call)
        stacks = EncoderDecoder(config, encoder, context, *self._run(call))
        words, encoded, memory = stacks.words(), None, None
        if call.cache is not None:
            given = inputs._asdict() | {"encoder_outputs": encoder_outputs}
            refuse("the cache already has the encoder's keys and values", **given)
        else:
            if encoder_outputs is None:
                check_inputs(inputs, config.encoder, self.max_length, rank=2)
                encoded = stacks.encode(inputs.flattened(), words)
                encoder_outputs = encoded.last
            else:
                given = {"input_ids": inputs.input_ids, "inputs_embeds": inputs.inputs_embeds}
                refuse("encoder_outputs replace them", **given)
            memory = stacks.memory(encoder_outputs, inputs.attention_mask, targets.lead[0])
        body = stacks.decode(targets.flattened(), memory, call.cache, words)
        last = body.last
        if self.head_table.at_last_eos:
            if inputs.input_ids is None:
                raise ValueError(
                    "rows are classified by the last end token of input_ids: give them."
                )
            last = last_eos(last, inputs.input_ids, config.eos_token_id)
        return dataclasses.replace(
            self._answer(context, body, last),
            encoder_last_hidden_state=None if memory is None else memory.states,
            encoder_hidden_states=encoded and encoded.states,
            decoder_hidden_states=body.states,
            cache=call.kept(body.cache),
        )

    def _run(self, call: Call) -> tuple[Remat, int, bool]:
        return self.remat, self.unroll, call.keep_states

    def _answer(
        self, context: Context, body: BodyOutput, last: Array, segments: Array | None = None
    ) -> ModelOutput:
        texts, first = context.texts, last
        if segments is not None:  # each text as a row that has its first state
            first = first_states(last, segments, texts).reshape(-1, 1, last.shape[-1])
        pooled = Pooler(context, name="pooler")(first) if self.head_table.pooled else None
        last = last if self.task_record.per_token else first
        output = self.head_table.module(context, name="head")(last, pooled, body.words)
        return output.by_text(texts, self.task_record.per_token) if texts else output

    def _targets(self, inputs: Inputs, targets: Inputs) -> Inputs:
        """The decoder's inputs, by default made from the encoder's if the family does so."""
        if targets.input_ids is not None or targets.inputs_embeds is not None:
            return targets
        if inputs.input_ids is None or not self.family.architecture.shifts_inputs:
            raise ValueError(
                "give decoder_input_ids or decoder_inputs_embeds: this "
                f"{self.config.model_type} model makes them from "
                + ("input_ids, and there are none." if inputs.input_ids is None else "labels only.")
            )
        return targets._replace(
            input_ids=self.shift_right(jnp.asarray(inputs.input_ids), "input_ids")
        )

    def shift_right(self, ids: Array, name: str = "labels") -> Array:
        """Makes the decoder's inputs from its labels, both [B, T], as the family's PyTorch class
        does. Raises ValueError, in which ids are called `name`, for ids that are not [B, T] or
        beyond the vocabulary, and if the config lacks a token that is needed."""
        assert isinstance(self.config, EncoderDecoderConfig)
        require(ids.ndim == 2, f"{name} must be [batch, tokens], got {ids.shape}.")
        read = jnp.where(ids == IGNORED, 0, ids)
        check_ids(read, name, self.config, "vocab_size", self.config.vocab_size)
        return shift_right(ids, self.config, self.family.architecture.shift)

    def _context(self, stack: EncoderConfig, call: Call, slots: int = 0) -> Context:
        architecture, config, rates = self.family.architecture, self.config, {}
        module = self.global_attention
        if isinstance(config, EncoderDecoderConfig):
            architecture = dataclasses.replace(architecture, embedding_scale=config.scale_embedding)
            side = "decoder" if stack.is_decoder else "encoder"
            rates["layerdrop"] = getattr(config, f"{side}_layerdrop")
            rates["activation_dropout"] = config.activation_dropout
        return Context(
            stack,
            architecture,
            self.dtype,
            self.param_dtype,
            call.train,
            implementation=self.implementation,
            slots=slots,
            texts=call.texts,
            # Linen has bound the module to this one, but its parameters are not this module's.
            global_attention=module if module is None else module.unbind()[0],
            **rates,
        )

    def _slots(self, inputs: Inputs, call: Call) -> int:
        """The number of slots of a new cache, 0 for none; raises ValueError if none is possible."""
        cache, length, stack = call.cache, call.cache_length, self.answering_stack
        if cache is None and length is None:
            return 0
        if not self.task_record.generates or not stack.is_decoder or call.train:
            tasks = [name for name, head in self.family.heads.items() if head.task.generates]
            raise ValueError(
                f"a cache is for decoding: it needs a task of {tasks} with is_decoder=True and "
                f"train=False, got task={self.task!r}, is_decoder={stack.is_decoder}, "
                f"train={call.train}."
            )
        if cache is not None and length is not None:
            raise ValueError("give either a cache, or cache_length for a new one.")
        if isinstance(stack, ReformerConfig) and length != 0:
            stack.check_cache()
        if cache is not None:
            check_step(inputs, cache, stack)
        if length is None:
            return 0
        return slots_of_cache(inputs, stack, self.max_length, length or inputs.lead[1])

    @property
    def embedders(self) -> dict[str, "Model"]:
        """The embedders of REALM's scorer, by name; empty for all other models."""
        names = self.head_table.embedders
        return {name: self.clone(task="embedder") for name in names(self.config)} if names else {}

    @property
    def has_two_stacks(self) -> bool:
        """Whether the model has both an encoder and a decoder."""
        return isinstance(self.config, EncoderDecoderConfig) and not self._is_causal

    @property
    def counts_positions(self) -> bool:
        """Whether the family numbers positions itself and takes no `position_ids`."""
        return isinstance(self.config, EncoderDecoderConfig | LocalTransformerConfig)

    @property
    def rolls(self) -> bool:
        """Whether generated texts may exceed the number of positions (see `generation.steps`)."""
        return isinstance(self.config, LocalTransformerConfig)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names (in `config.stacks`) of the stacks that the model has; that of the head is last."""
        names = tuple(self.config.stacks)
        return names if self.has_two_stacks else names[-1:]

    @property
    def answering_stack(self) -> EncoderConfig:
        """The config of the stack whose output the head reads."""
        return self.config.stacks[self.parts[-1]]

    @property
    def _is_causal(self) -> bool:
        return bool(self.task_record.fixed.get("is_decoder"))

    @property
    def family(self) -> Family:
        """The family of the config's `model_type`."""
        return family_of(self.config.model_type)

    @property
    def head_table(self) -> HeadTable:
        """The family's head for the task."""
        return self.family.head(self.task)

    @property
    def task_record(self) -> Task:
        """The record of the task."""
        return self.head_table.task

    @property
    def max_length(self) -> int:
        """The largest number of tokens that the model reads: the usable rows of positions."""
        stack = self.answering_stack
        if not stack.vocab_size:  # the model reads embeddings, to which it adds no positions
            return MOST_TOKENS
        _, rows = stack.position_limit
        rows = min(rows, stack.max_position_embeddings)
        return rows - self.family.architecture.first_row(stack)

    def example_inputs(self) -> dict[str, Any]:
        """The smallest input that the model accepts, as NumPy arrays, for shape inference."""
        ids = np.zeros((1,) * (self.task_record.input_rank - 1) + (2,), np.int32)
        if isinstance(self.config, EncoderDecoderConfig):  # the head may look for an end token
            ids += self.config.eos_token_id or 0
        if not self.config.vocab_size:
            return {"inputs_embeds": np.zeros((*ids.shape, self.config.hidden_size), np.float32)}
        others = {"decoder_input_ids": ids} if self.has_two_stacks else {}
        others |= {"candidate_input_ids": ids[None]} if self.embedders else {}
        return {"input_ids": ids} | others

    def abstract_params(self) -> Params:
        """The parameters, each as a `jax.ShapeDtypeStruct`; nothing is computed."""
        example = self.example_inputs()
        return jax.eval_shape(lambda key: self.init(key, **example)["params"], jax.random.key(0))
