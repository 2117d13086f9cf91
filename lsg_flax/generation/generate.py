"""Text generation: `generate`.

Axes: B batch, T tokens of the prompt.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import ArrayLike

from lsg_flax.checks import require
from lsg_flax.generation.beam import Beams
from lsg_flax.generation.loop import Decoding, Texts, decode, decode_shown
from lsg_flax.generation.options import (
    GenerateCall,
    GenerateOptions,
    choose_options,
    decoding_of,
    token_ids,
)
from lsg_flax.generation.prompt import (
    Space,
    check_call,
    check_ends,
    check_ids,
    check_mask,
    check_mesh,
    check_model,
    check_rows,
    check_scored,
    decoder_prompt,
    fill_for_encoder,
    placed,
    space_for,
)
from lsg_flax.generation.rules import Text
from lsg_flax.generation.steps import (
    CausalModel,
    Decoder,
    ModelDecoder,
    Prompt,
    RereadingDecoder,
    RollingDecoder,
    rolls,
    two_stacks,
)

Generated = Integer[np.ndarray, "Rows Length"]


@overload
def generate(
    model: CausalModel,
    params: Mapping[str, Any],
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    return_scores: Literal[False] = False,
    **call: Unpack[GenerateCall],
) -> Generated: ...


@overload
def generate(
    model: CausalModel,
    params: Mapping[str, Any],
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    return_scores: Literal[True],
    **call: Unpack[GenerateCall],
) -> tuple[Generated, Float[np.ndarray, "Rows"]]: ...


def generate(
    model: CausalModel,
    params: Mapping[str, Any],
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    return_scores: bool = False,
    **call: Unpack[GenerateCall],
) -> Generated | tuple[Generated, Float[np.ndarray, "Rows"]]:
    """Continues prompts with a causal model, or generates texts for them with an encoder-decoder.
    The tokens are those of transformers' `generate`, in the same layout.

    Prompts are padded to a bucket, which does not change the result, so that one compilation serves
    all prompts of a bucket with the same options.

    Args:
        model, params: a causal_lm or an encoder-decoder, and its parameters.
        input_ids: prompts, [B, T]; those of a causal model must be padded on the left.
        attention_mask: [B, T], 1 for real tokens. By default all tokens are real; for an
            encoder-decoder those that are not pad_token_id.
        return_scores: whether to return the score of each text too, with beam search: its
            log-probability divided by a power of its length (`length_penalty`).
        **call: transformers' options by its names, such as `max_new_tokens`, `num_beams`,
            `do_sample`, `top_p`; and arguments of this call: `key` (random key for sampling),
            `mesh` (rows are sharded over data and fsdp), `stream` (called with each new token of a
            single row), `bucket`, `use_cache`, `decoder_input_ids`, `position_ids` and others. See
            `generation.GenerateOptions` and `generation.GenerateCall` for all of them. Options that
            are not given come from the checkpoint; None switches an option off.

    Returns:
        [B * num_return_sequences, length]: the prompts (for an encoder-decoder those of the
        decoder), followed by the new tokens and then pad_token_id. With `return_scores` also the
        scores, [B * num_return_sequences].

    Raises:
        ValueError: for prompts that exceed the model's positions, options that contradict each
            other, and a model that gives NaN.
    """
    check_model(model, params)
    mesh = call.get("mesh")
    ready = prepare(model, input_ids, attention_mask, call)
    searches = isinstance(ready.how.picker, Beams)
    require(searches or not return_scores, "return_scores=True needs num_beams > 1.")
    if mesh is not None:
        check_mesh(mesh, params, len(ready.text.tokens))
    own = ModelDecoder(params, model)
    beyond = rolls(model) and ready.text.tokens.shape[-1] - 1 > model.max_length
    decoder: Decoder[Any] = RollingDecoder(own) if beyond else own
    if not call.get("use_cache", True):
        names = ("position_ids", "encoder_hidden_states", "encoder_attention_mask")
        used = [name for name in names if call.get(name) is not None]
        require(
            not (two_stacks(model) or beyond or used),
            "use_cache=False needs a model without an encoder, texts within its positions, and "
            f"nothing but prompts and their mask (given: {used}); leave it out.",
        )
        decoder = RereadingDecoder(own)
    found = _written(decoder, ready, call)
    check_scored(np.asarray(found.broken))
    tokens = _laid_out(found, int(ready.text.limit), ready.how)
    tokens = tokens.astype(np.asarray(input_ids).dtype)
    return (tokens, np.asarray(found.scores).ravel()) if return_scores else tokens


class Ready(NamedTuple):
    """The inputs of the generation loop, made from a call of `generate`."""

    prompt: Prompt
    text: Text
    how: Decoding


def prepare(
    model: CausalModel,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    call: GenerateCall,
) -> Ready:
    """Checks a call of `generate`, with `input_ids` and `attention_mask` [B, T], and pads it to its
    bucket; returns the inputs of the loop. Raises ValueError as `generate`."""
    chosen = choose_options(model.config, call)
    how = decoding_of(chosen, model.config.vocab_size)
    check_call(call.get("key"), call.get("stream"), sampled=chosen["do_sample"])
    ids = check_ids("input_ids", input_ids, model.config.vocab_size)
    mask = check_mask(ids, attention_mask)
    if two_stacks(model):
        if attention_mask is None and how.pad not in how.rules.eos_token_id:
            mask = check_rows(ids != chosen.get("pad_token_id", -1))
        prompt, written, space = _answered(model, ids, mask, chosen, call)
    else:
        prompt, written, space = _continued(model, ids, mask, chosen, call)
    text = _text_of(written, space, how, chosen, prompt, ids.shape[1])
    require(
        call.get("stream") is None
        or (not isinstance(how.picker, Beams) and text.tokens.shape[:2] == (1, 1)),
        f"stream shows the tokens of a single text, not of {len(ids)} rows with num_beams="
        f"{chosen['num_beams']}, num_return_sequences={how.returned}: give one row, and "
        "num_beams=1, num_return_sequences=1.",
    )
    return Ready(prompt, text, how)


def _written(decoder: Decoder[Any], ready: Ready, call: GenerateCall) -> Texts:
    """Runs the loop, on the mesh if there is one."""
    prompt, text, how = ready
    key, show, mesh = call.get("key"), call.get("stream"), call.get("mesh")
    key = jax.random.key(0) if key is None else key  # not used without sampling
    with contextlib.ExitStack() as around:
        if mesh is not None:
            prompt, text = placed(mesh, prompt, text)
            around.enter_context(jax.set_mesh(mesh))
        if show is None:
            return decode(decoder, prompt, text, key, how=how)
        return decode_shown(decoder, prompt, text, key, how=how, show=show)


def check_options(model: CausalModel, options: GenerateOptions) -> None:
    """Raises ValueError for options of `generate` that contradict each other or do not fit the
    model; for an encoder-decoder it checks everything that does not depend on a text."""
    chosen = choose_options(model.config, options)
    decoding_of(chosen, model.config.vocab_size)
    if two_stacks(model):
        begun = decoder_prompt(1, chosen, options, model.config.vocab_size)
        space_for(model, begun.shape[1], chosen, bucket=1)


def _continued(
    model: CausalModel,
    ids: np.ndarray,
    mask: np.ndarray,
    chosen: Mapping[str, Any],
    call: GenerateCall,
) -> tuple[Prompt, np.ndarray, Space]:
    """Returns a causal model's inputs, the tokens that are continued, and the space for new
    ones."""
    require(
        call.get("decoder_input_ids") is None,
        "decoder_input_ids are for an encoder-decoder; this model continues input_ids.",
    )
    check_ends(mask)
    positions = call.get("position_ids")
    space = space_for(model, ids.shape[1], chosen, call.get("bucket", 64), positions)
    seen = slice(-model.max_length, None) if rolls(model) else slice(None)
    rows = {"input_ids": ids[:, seen], "attention_mask": mask[:, seen], "position_ids": positions}
    prompt = {name: _filled(x, space.fill) for name, x in rows.items() if x is not None}
    memory = ("encoder_hidden_states", "encoder_attention_mask")
    given = {name: call.get(name) for name in memory}
    return prompt | {name: x for name, x in given.items() if x is not None}, ids, space


def _answered(
    model: CausalModel,
    ids: np.ndarray,
    mask: np.ndarray,
    chosen: Mapping[str, Any],
    call: GenerateCall,
) -> tuple[Prompt, np.ndarray, Space]:
    """Returns the same as `_continued` for an encoder-decoder."""
    names = ("position_ids", "encoder_hidden_states", "encoder_attention_mask")
    used = [name for name in names if call.get(name) is not None]
    require(
        not used, f"{used} need a model without an encoder, but this one has one; leave them out."
    )
    bucket = call.get("bucket", 64)
    begun = decoder_prompt(len(ids), chosen, call, model.config.vocab_size)
    space = space_for(model, begun.shape[1], chosen, bucket)
    fill = fill_for_encoder(model, ids.shape[1], bucket)
    pad = chosen.get("pad_token_id", 0)
    prompt = {"input_ids": _filled(ids, fill, pad), "attention_mask": _filled(mask, fill)}
    prompt["decoder_input_ids"] = _filled(begun, space.fill, pad)
    if begun.shape[1] > 1:
        prompt["decoder_attention_mask"] = _filled(np.ones(begun.shape, bool), space.fill)
    return prompt, begun, space


def _filled(rows: ArrayLike, fill: int, value: int = 0) -> np.ndarray:
    return np.pad(np.asarray(rows), ((0, 0), (0, fill)), constant_values=value)


def _text_of(
    written: np.ndarray,
    space: Space,
    how: Decoding,
    chosen: Mapping[str, Any],
    prompt: Prompt,
    source_length: int,
) -> Text:
    batch, length = written.shape
    tokens = np.repeat(_filled(written, space.width - length)[:, None], how.beams, axis=1)
    numbers = (jnp.asarray(n, jnp.int32) for n in (length, length, space.limit))
    text = Text(jnp.asarray(tokens, jnp.int32), *numbers)
    if how.rules.encoder_no_repeat_ngram_size:
        source = jnp.asarray(prompt["input_ids"], jnp.int32)
        text = text._replace(source=source, source_length=jnp.asarray(source_length, jnp.int32))
    forced = token_ids("forced_bos_token_id", chosen.get("forced_bos_token_id", ()))
    if forced:
        require(
            len(forced) in (1, batch),
            f"forced_bos_token_id has {len(forced)} ids: give one, or one for each of the {batch} "
            "rows.",
        )
        text = text._replace(first=jnp.broadcast_to(jnp.asarray(forced, jnp.int32), (batch,)))
    return text


def _laid_out(found: Texts, limit: int, how: Decoding) -> Generated:
    """Returns the texts as rows of one width. Texts of beam search have no end token, so the first
    of the end tokens is added if there is room."""
    tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)[..., None]
    width = int(lengths.max())
    if isinstance(how.picker, Beams):
        width = min(width + 1, limit)
        end = (*how.rules.eos_token_id, how.pad)[0]
        places = np.arange(tokens.shape[-1])
        behind = np.where(places == lengths, end, how.pad)
        tokens = np.where(places < lengths, tokens, behind)
    return tokens[..., :width].reshape(-1, width)
