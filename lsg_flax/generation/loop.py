"""Text generation: the prompt in one call, then one token at a time, in one compiled program.

It needs of a model what `lsg_flax.Model` offers: `apply` with a cache, `config` and `max_length`.

Axes: B batch, T tokens of the prompt, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Sampling(NamedTuple):
    """How a token is drawn: the most likely one, or from the likeliest ones at a temperature."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def generate(
    model: Any,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray | None = None,
    position_ids: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    bucket: int = 64,
) -> Int[np.ndarray, "B Total"]:
    """Continues prompts, greedily by default.

    Prompts are filled up to a multiple of `bucket` tokens, which does not change the result: one
    compilation serves all prompts of a bucket, for the same `max_new_tokens` and options.

    Args:
        model, params: a causal_lm.
        input_ids, attention_mask: [B, T], shorter rows padded on the left.
        max_new_tokens: the most that are generated; fewer if all rows have ended.
        eos_token_id: one or more tokens that end a row; None for none.
        pad_token_id: what follows an ended row, the config's by default.
        do_sample: draw tokens, with `key`. `temperature` divides the logits, `top_k` keeps the
            likeliest k, then `top_p` the fewest that together have this probability.
        position_ids: [B, T], counted on from the last; by default the model's own.
        encoder_hidden_states, encoder_attention_mask: for a model with cross-attention.
        bucket: see above.

    Returns:
        The prompts as given, and behind them the new tokens.

    Raises:
        ValueError: for input that the model has no place for, or options that do not fit together.
    """
    sampling = _checked(Sampling(do_sample, temperature, top_k, top_p), key)
    ids, mask = _checked_prompt(model, input_ids, attention_mask)
    ends = () if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    if ends and pad is None:
        raise ValueError("rows that end need a pad_token_id to be filled with: give one.")
    fill = _filling(model, ids.shape[1], max_new_tokens, bucket, position_ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    inputs = {
        name: np.pad(np.asarray(x), ((0, 0), (0, fill)))
        for name, x in inputs.items()
        if x is not None
    } | {
        "encoder_hidden_states": encoder_hidden_states,
        "encoder_attention_mask": encoder_attention_mask,
    }
    key = jax.random.key(0) if key is None else key  # not used by greedy decoding
    tokens, count = _run(
        model, params, inputs, key, steps=max_new_tokens, sampling=sampling, ends=ends, pad=pad
    )
    return np.concatenate([ids, np.asarray(tokens)[:, : int(count)].astype(ids.dtype)], axis=1)


def pick(logits: Float[Array, "B V"], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, "B"]:
    """The next token of every row."""
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        lowest = lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.top_p is not None:
        falling = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
        kept = jnp.roll(before, 1, axis=-1).at[:, 0].set(0.0) < sampling.top_p  # [B, V]
        lowest = jnp.where(kept, falling, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)


class _State(NamedTuple):
    cache: Any
    tokens: Int[Array, "B New"]
    generated: Int[Array, ""]  # tokens so far
    ended: Bool[Array, "B"]
    key: PRNGKeyArray


@partial(jax.jit, static_argnames=("model", "steps", "sampling", "ends", "pad"))
def _run(model, params, inputs, key, *, steps: int, sampling: Sampling, ends, pad):
    """Tokens [B, steps], and how many of them were generated."""
    batch, width = inputs["input_ids"].shape
    apply = partial(model.apply, {"params": params})

    def written(state: _State, logits) -> _State:
        key, draw = jax.random.split(state.key)
        token = pick(logits[:, 0], sampling, draw).astype(state.tokens.dtype)
        token = jnp.where(state.ended, pad, token) if ends else token
        ended = state.ended | jnp.isin(token, jnp.asarray(ends, token.dtype))
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.generated, 1)
        return _State(state.cache, tokens, state.generated + 1, ended, key)

    def step(state: _State) -> _State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.generated - 1, 1, axis=1)
        output = apply(last, cache=state.cache)
        return written(state._replace(cache=output.cache), output.logits)

    prompt = apply(**inputs, cache_length=width + steps - 1)  # the last token is not fed again
    tokens, ended = jnp.zeros((batch, steps), jnp.int32), jnp.zeros(batch, bool)
    state = _State(prompt.cache, tokens, jnp.zeros((), jnp.int32), ended, key)
    state = lax.while_loop(
        lambda s: (s.generated < steps) & ~s.ended.all(), step, written(state, prompt.logits)
    )
    return state.tokens, state.generated


def _checked(sampling: Sampling, key) -> Sampling:
    if not sampling.do_sample and sampling != Sampling():
        raise ValueError(
            f"temperature, top_k and top_p need do_sample=True, got {sampling}; without it the "
            "likeliest token is taken."
        )
    if sampling.do_sample and key is None:
        raise ValueError("do_sample=True draws with a key: give key=jax.random.key(seed).")
    if sampling.temperature <= 0:
        raise ValueError(
            f"temperature={sampling.temperature} must be positive; do_sample=False is greedy."
        )
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ValueError(f"top_k={sampling.top_k} must be at least 1, or None for all.")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p={sampling.top_p} must lie in (0, 1], or None for all.")
    return sampling


def _checked_prompt(model, input_ids, attention_mask):
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"input_ids must be integers [batch, tokens], at least one of each, got {ids.dtype} "
            f"{ids.shape}."
        )
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"input_ids lie in {ids.min()}..{ids.max()}, but vocab_size="
            f"{model.config.vocab_size} allows 0..{model.config.vocab_size - 1}."
        )
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask, bool)
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {mask.shape} must have the shape of input_ids {ids.shape}."
        )
    if not mask[:, -1].all():
        raise ValueError(
            f"rows {np.flatnonzero(~mask[:, -1]).tolist()} of the prompt end in padding; pad on "
            "the left (tokenizer.padding_side = 'left')."
        )
    return ids, mask


def _filling(model, length: int, max_new_tokens: int, bucket: int, position_ids) -> int:
    """Slots to append to the prompt for its bucket, as far as there are positions.

    Raises:
        ValueError: if the positions do not reach.
    """
    if max_new_tokens < 1 or bucket < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and bucket={bucket} must be at least 1.")
    given = position_ids is not None
    last = int(np.asarray(position_ids)[:, -1].max()) if given else length - 1
    limit = model.config.max_position_embeddings if given else model.max_length
    if last + max_new_tokens > limit:  # the last token needs no position
        raise ValueError(
            f"max_new_tokens={max_new_tokens} behind a prompt of {length} tokens needs "
            f"{last + max_new_tokens} positions, and this checkpoint has {limit}: at most "
            f"{max(limit - last, 0)} fit. Shorten the prompt, or convert the checkpoint with a "
            "larger max_sequence_length."
        )
    fill = -length % bucket
    return fill if given else min(fill, limit - (length + max_new_tokens - 1))
