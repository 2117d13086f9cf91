"""Exports an encoder-decoder as two programs that generate text together and need only JAX to run:
the encoder, and a step of the decoder.

docs/inference.md shows how to run them where lsg_flax is not installed.

Axes: B batch, T tokens, V vocabulary.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lsg_flax.inference.export import (
    Build,
    ParametersPlace,
    Platform,
    check_flatbuffers,
    input_shapes,
    placed,
    write_programs,
)
from lsg_flax.models import Model, Params

_INPUTS = ("input_ids", "attention_mask")
Flat = dict[str, jax.Array]  # leaves of a tree by their paths


def export_texts(
    model: Model,
    params: Params,
    folder: str | os.PathLike,
    *,
    length: int,
    max_new_tokens: int,
    batch_size: int | None = None,
    platforms: Sequence[Platform] = ("cpu",),
    parameters: ParametersPlace | None = None,
) -> tuple[pathlib.Path, ...]:
    """Writes "encoder.stablehlo" and "step.stablehlo" into a folder.

    The encoder takes `input_ids` and `attention_mask`, int32 [B, T], and returns a cache: a dict of
    arrays with the keys and values of the document that the decoder attends to, and room for
    generated tokens. The step takes a cache and the last token of each row, int32 [B, 1], first
    `decoder_start_token_id`; it returns the logits of the next token, [B, V], and the next cache.
    With `parameters="beside"` they are in "parameters.safetensors", and a dict of them is the first
    argument of both programs.

    Args:
        model, params: an encoder-decoder of the task conditional_generation, and its parameters.
        folder: where to write the files.
        length: number of tokens T of each document; shorter ones must be padded and masked.
        max_new_tokens: number of steps that a cache has room for; after the last one logits are
            NaN.
        batch_size, platforms, parameters: as in `export_model`.

    Returns:
        The paths of the files.

    Raises:
        ImportError, ValueError, OSError: as `export_model`.
    """
    check_flatbuffers()
    if not (model.has_two_stacks and model.task_record.generates):
        raise ValueError(
            f"export_texts needs an encoder-decoder for conditional_generation, got "
            f"{model.config.model_type} for {model.task}; use export_model for its outputs."
        )
    if not 1 <= max_new_tokens <= model.max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be in 1..{model.max_length}, the positions of "
            "the decoder."
        )
    shapes = input_shapes(model, length, batch_size, _INPUTS, ("logits",), platforms)
    build = Build(platforms, batch_size, placed(params, parameters))
    token = jax.ShapeDtypeStruct((shapes[0].shape[0], 1), np.int32)
    empty = functools.partial(_empty_cache, model, max_new_tokens)
    with jax.sharding.use_abstract_mesh(build.target):
        like = jax.eval_shape(empty, flax.traverse_util.flatten_dict(params, sep="/"), *shapes)

    def read(flat: Flat, input_ids: jax.Array, attention_mask: jax.Array) -> Flat:
        return _named(empty(flat, input_ids, attention_mask))

    def step(flat: Flat, kept: Flat, tokens: jax.Array) -> tuple[jax.Array, Flat]:
        cache = jax.tree.unflatten(jax.tree.structure(like), [kept[n] for n in _named(like)])
        output = _applied(model, flat, decoder_input_ids=tokens, cache=cache)
        return output.logits[:, 0], _named(output.cache)

    files = {
        pathlib.Path(folder) / "encoder.stablehlo": build.serialized(read, params, shapes),
        pathlib.Path(folder) / "step.stablehlo": build.serialized(
            step, params, (_named(like), token)
        ),
    }
    return write_programs(files, build, params, pathlib.Path(folder) / "parameters.safetensors")


def _empty_cache(
    model: Model, slots: int, flat: Flat, input_ids: jax.Array, attention_mask: jax.Array
) -> Any:
    """Makes the cache before the decoder's first token: that of a prompt of one token, with this
    token removed."""
    first = jnp.zeros((input_ids.shape[0], 1), jnp.int32)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": first}
    cache = _applied(model, flat, **inputs, cache_length=slots).cache
    tokens = jax.tree.map(jnp.zeros_like, cache.layers.tokens)
    return cache._replace(
        layers=cache.layers._replace(tokens=tokens),
        length=jnp.zeros_like(cache.length),
        position=cache.position - cache.length,
    )


def _applied(model: Model, flat: Flat, **inputs: Any) -> Any:
    return model.apply({"params": flax.traverse_util.unflatten_dict(flat, sep="/")}, **inputs)


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}
