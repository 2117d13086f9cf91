"""Text generation: the prompt in one call, then one token at a time, in one compiled program.

Axes: B batch, T tokens of the prompt, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray
from numpy.typing import ArrayLike

from lsg_flax.generation.prompt import check_prompt, slots_to_fill
from lsg_flax.generation.sampling import Picker, Sample, pick, picker_of
from lsg_flax.generation.steps import CausalModel, Decoder, ModelDecoder, Prompt


def generate(
    model: CausalModel,
    params: Mapping[str, Any],
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray | None = None,
    position_ids: ArrayLike | None = None,
    encoder_hidden_states: ArrayLike | None = None,
    encoder_attention_mask: ArrayLike | None = None,
    bucket: int = 64,
) -> Integer[np.ndarray, "B Total"]:
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
    picker = picker_of(Sample(temperature, top_k, top_p), do_sample=do_sample)
    if do_sample and key is None:
        raise ValueError("do_sample=True draws with a key: give key=jax.random.key(seed).")
    ids, mask = check_prompt(model, input_ids, attention_mask)
    ends = () if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    if ends and pad is None:
        raise ValueError("rows that end need a pad_token_id to be filled with: give one.")
    fill = slots_to_fill(model, ids.shape[1], max_new_tokens, bucket, position_ids)
    rows = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    prompt = {
        name: np.pad(np.asarray(x), ((0, 0), (0, fill)))
        for name, x in rows.items()
        if x is not None
    } | {
        "encoder_hidden_states": encoder_hidden_states,
        "encoder_attention_mask": encoder_attention_mask,
    }
    key = jax.random.key(0) if key is None else key  # not used by greedy decoding
    options = {"steps": max_new_tokens, "picker": picker, "ends": ends, "pad": pad or 0}
    tokens, count = decode(ModelDecoder(params, model), prompt, key, **options)
    return np.concatenate([ids, np.asarray(tokens)[:, : int(count)].astype(ids.dtype)], axis=1)


class Progress(NamedTuple):
    """What is carried from step to step."""

    state: Any  # the decoder's
    tokens: Int[Array, "B Steps"]  # int32; 0 where none is generated yet
    generated: Int[Array, ""]  # int32; tokens of each row so far
    ended: Bool[Array, "B"]
    key: PRNGKeyArray


@partial(jax.jit, static_argnames=("steps", "picker", "ends", "pad"))
def decode(
    decoder: Decoder[Any],
    prompt: Prompt,
    key: PRNGKeyArray,
    *,
    steps: int,
    picker: Picker,
    ends: tuple[int, ...] = (),
    pad: int = 0,
) -> tuple[Int[Array, "B Steps"], Int[Array, ""]]:
    """At most `steps` new tokens, and how many there are when all rows have ended: by one of
    `ends`, which `pad` follows."""

    def write(progress: Progress, logits: Float[Array, "B V"]) -> Progress:
        key, draw = jax.random.split(progress.key)
        token = pick(logits, picker, draw).astype(progress.tokens.dtype)  # [B]
        token = jnp.where(progress.ended, pad, token) if ends else token
        ended = progress.ended | jnp.isin(token, jnp.asarray(ends, token.dtype))
        place = progress.generated
        tokens = lax.dynamic_update_slice_in_dim(progress.tokens, token[:, None], place, axis=1)
        return Progress(progress.state, tokens, place + 1, ended, key)

    def step(progress: Progress) -> Progress:
        place = progress.generated - 1
        last = lax.dynamic_index_in_dim(progress.tokens, place, axis=1, keepdims=False)
        logits, state = decoder.step(progress.state, last)
        return write(progress._replace(state=state), logits)

    batch, width = prompt["input_ids"].shape
    logits, state = decoder.start(prompt, width + steps - 1)  # the last token is not fed again
    tokens, ended = jnp.zeros((batch, steps), jnp.int32), jnp.zeros(batch, bool)
    first = write(Progress(state, tokens, jnp.zeros((), jnp.int32), ended, key), logits)
    last = lax.while_loop(lambda p: (p.generated < steps) & ~p.ended.all(), step, first)
    return last.tokens, last.generated
