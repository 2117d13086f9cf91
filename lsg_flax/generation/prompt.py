"""Checks prompts, and computes their padding to a bucket and the space for new tokens.

Axes: B batch, T tokens of the prompt.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Integer
from numpy.typing import ArrayLike

from lsg_flax.checks import require, short
from lsg_flax.generation.rules import Text, check_whole
from lsg_flax.generation.steps import CausalModel, Prompt, rolls, two_stacks
from lsg_flax.sharding import batch_shardings, check_devices


def check_model(model: object, params: object) -> None:
    """Raises ValueError unless given a model and its parameters, for example if swapped."""
    given = set(params) if isinstance(params, Mapping) else set()
    require(
        isinstance(model, CausalModel) and given not in (set(), {"params"}),
        "generate takes a model and its parameters, as returned by lsg_flax.from_pretrained(...), "
        f"not {_kind(model)} and {_kind(params)}.",
    )
    config = getattr(model, "config", None)
    require(
        getattr(config, "vocab_size", 1) != 0,
        "this model has num_tokens=None: it takes embeddings and returns states, so it cannot "
        "generate tokens; give a model with num_tokens.",
    )


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{name} of {short(sorted(map(str, value)))}" if isinstance(value, Mapping) else name


def check_ids(name: str, given: ArrayLike, vocabulary: int) -> Integer[np.ndarray, "B T"]:
    """Returns token ids as an array; raises ValueError if they are not [B, T] in the vocabulary."""
    try:
        ids = np.asarray(given)
    except ValueError as error:
        raise ValueError(
            f"{name} has rows of different lengths; pad documents with tokenizer(..., "
            "padding=True) and pass its attention_mask, or call generate once for each length."
        ) from error
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{name} must be integers [batch, tokens], at least one of each, got {ids.dtype} "
            f"{ids.shape}."
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"{name} are in {ids.min()}..{ids.max()}, but vocab_size={vocabulary} allows "
            f"0..{vocabulary - 1}; tokenizer and checkpoint do not belong together."
        )
    return ids


def check_mask(
    ids: Integer[np.ndarray, "B T"], attention_mask: ArrayLike | None
) -> Bool[np.ndarray, "B T"]:
    """Returns the mask as an array, by default all real; raises ValueError if it is invalid."""
    given = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask)
    if given.shape != ids.shape or not np.isin(given, (0, 1)).all():
        raise ValueError(
            f"attention_mask {given.shape} must have the shape of input_ids {ids.shape}, with 1 "
            "for real tokens and 0 for padding."
        )
    return check_rows(given.astype(bool))


def check_rows(mask: Bool[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """Returns the mask; raises ValueError for rows of padding only."""
    empty = np.flatnonzero(~mask.any(axis=1)).tolist()
    require(
        not empty,
        f"rows {short(empty)} of input_ids are only padding: leave them out, or give at least one "
        "real token in each (attention_mask 1; without a mask anything but pad_token_id).",
    )
    return mask


def check_scored(broken: Bool[np.ndarray, "B"]) -> None:
    """Raises ValueError for rows whose tokens were chosen by scores that are NaN."""
    require(
        not broken.any(),
        f"the model gives NaN for rows {short(np.flatnonzero(broken).tolist())} of input_ids, so "
        "no text can be generated: look for NaN or infinity in its parameters, or compute in "
        "float32, which overflows later than float16 and bfloat16.",
    )


def check_ends(mask: Bool[np.ndarray, "B T"]) -> None:
    """Raises ValueError for a prompt that ends in padding, where it would be continued."""
    if not mask[:, -1].all():
        raise ValueError(
            f"rows {np.flatnonzero(~mask[:, -1]).tolist()} of the prompt end in padding; pad on "
            "the left (tokenizer.padding_side = 'left')."
        )


def decoder_prompt(
    batch: int, chosen: Mapping[str, Any], given: Mapping[str, Any], vocabulary: int
) -> Integer[np.ndarray, "B T"]:
    """Returns the decoder's prompt: the start token, and after it `decoder_input_ids`, without the
    start token if a row already has it."""
    start, prompt = chosen.get("decoder_start_token_id"), given.get("decoder_input_ids")
    require(
        start is not None or (prompt is not None and "decoder_start_token_id" in given),
        "the model has no decoder_start_token_id to begin with: give one (transformers uses "
        "bos_token_id), or decoder_input_ids and decoder_start_token_id=None to begin with these.",
    )
    first = None if start is None else np.full((batch, 1), start)
    if prompt is None:
        assert first is not None
        return first
    ids = check_ids("decoder_input_ids", prompt, vocabulary)
    require(
        len(ids) == batch,
        f"decoder_input_ids {ids.shape} must have the {batch} rows of input_ids.",
    )
    if first is not None and (ids[:, 0] != start).all():
        ids = np.concatenate([first, ids], axis=1)
    return ids


def check_call(key: Any, stream: Any, *, sampled: bool) -> None:
    """Raises ValueError for an invalid random key, and a stream that is not a function.

    Args:
        key: the random key.
        stream: the function that shows tokens.
        sampled: whether a key is needed.
    """
    kind, shape = getattr(key, "dtype", np.dtype(object)), getattr(key, "shape", None)
    typed = jax.dtypes.issubdtype(kind, jax.dtypes.prng_key) and shape == ()
    require(
        not sampled or typed or (kind == np.uint32 and shape == (2,)),
        f"do_sample=True needs a random key: give key=jax.random.key(seed), not {key!r}.",
    )
    require(
        stream is None or callable(stream),
        f"stream={stream!r} must be a function of one token id, such as print.",
    )


class Space(NamedTuple):
    """The space of a text: padding after the prompt, the largest number of tokens, and the width of
    the array, which is the same for all prompts of a bucket."""

    fill: int
    limit: int
    width: int


def _or_convert(model: CausalModel, remedy: str, tokens: int) -> str:
    """What to do, for a message; configs of other libraries' models know no conversion."""
    advise = getattr(model.config, "or_convert", None)
    return remedy if advise is None else advise(remedy, tokens)


def space_for(
    model: CausalModel,
    length: int,
    chosen: Mapping[str, Any],
    bucket: int,
    position_ids: ArrayLike | None = None,
) -> Space:
    """Returns the space for a prompt of `length` tokens; raises ValueError if the options or the
    model's positions leave none."""
    check_whole("bucket", bucket, 1)
    name = "max_new_tokens" if "max_new_tokens" in chosen else "max_length"
    value = chosen.get(name, 20)
    check_whole(name, value, 1)
    new = value if name == "max_new_tokens" else value - length
    seq2seq = two_stacks(model)
    given = position_ids is not None
    last = int(np.asarray(position_ids)[:, -1].max()) if given else length - 1
    limit = model.config.max_position_embeddings if given else model.max_length
    if last + max(new, 1) > limit and not rolls(model):  # the last token needs no position
        needed = last + max(new, 1)
        raise ValueError(
            f"{name}={value} after a prompt of {length} tokens needs {needed} positions, but this "
            f"checkpoint has {limit}: at most {max(limit - last, 0)} fit. "
            f"{_or_convert(model, 'Shorten the prompt', needed)}."
        )
    require(
        new > 0,
        f"max_length={value} leaves no room after a prompt of {length} tokens: give a larger one, "
        "or max_new_tokens.",
    )
    for least, most in (("min_length", length + new), ("min_new_tokens", new)):
        require(
            chosen.get(least, 0) <= most,
            f"{least}={chosen.get(least)} is more than the {most} tokens that {name}={value} "
            f"allows: give a smaller {least} (None for no minimum) or a larger {name}.",
        )
    bucket = min(bucket, 8) if seq2seq else bucket  # a decoder's prompts are short
    fill = 0 if seq2seq and length == 1 else -length % bucket
    room = length if name == "max_length" else length + new - 1
    room = room if room <= limit else length  # for a model that rolls
    fill = fill if given else max(min(fill, limit - room), 0)
    filled = length + fill
    return Space(fill, length + new, filled + new if name != "max_length" else max(filled, value))


def fill_for_encoder(model: CausalModel, length: int, bucket: int) -> int:
    """Returns the padding of an encoder's input to its bucket, limited by the model's positions. Up
    to two blocks LSG attention is full attention, so padding must not exceed two blocks there."""
    pattern, limit = model.config.lsg, model.max_length
    if pattern is not None:
        short = length <= 2 * pattern.block_size
        limit = min(limit, 2 * pattern.block_size) if short else limit
        bucket = bucket if short else math.lcm(bucket, pattern.block_size)
    return max(min(-length % bucket, limit - length), 0)


def check_mesh(mesh: Mesh, params: Mapping[str, Any], batch: int) -> None:
    """Raises ValueError if the parameters are not on the mesh, or it does not divide the rows."""
    require(
        isinstance(mesh, Mesh), f"mesh={mesh!r} must be one of lsg_flax.sharding.make_mesh(...)."
    )
    check_devices(mesh)
    batch_shardings({"input_ids": jax.ShapeDtypeStruct((batch,), np.int32)}, mesh)
    devices = set(mesh.devices.flat)
    for leaf in jax.tree.leaves(params):
        found = leaf.devices() if isinstance(leaf, jax.Array) else set()
        require(
            found == devices,
            f"params are on {len(found)} devices, but mesh has {len(devices)}: load them with "
            "from_pretrained(..., mesh=mesh), or place them with sharding.shard(params, mesh).",
        )


def placed(mesh: Mesh, prompt: Prompt, text: Text) -> tuple[Prompt, Text]:
    """Places both on the mesh: rows over the batch axes, an encoder's tokens over sequence."""
    rows = {name: x for name in ("tokens", "first") if (x := getattr(text, name)) is not None}
    prompt = jax.device_put(prompt, batch_shardings(prompt, mesh))
    source = None if text.source is None else prompt["input_ids"]
    rows = jax.device_put(rows, batch_shardings(rows, mesh))
    return prompt, text._replace(**rows, source=source)
