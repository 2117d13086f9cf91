"""Loads checkpoints, and converts them to read long documents."""

import os
import pathlib
import warnings
from dataclasses import fields, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh

from lsg_flax.hub.checkpoint import Checkpoint, open_checkpoint
from lsg_flax.hub.save import check_target, write_converted
from lsg_flax.hub.sentence_files import MODULES
from lsg_flax.hub.to_lsg import LSGOptions, to_lsg
from lsg_flax.hub.tokenizer_files import Tokenizer
from lsg_flax.locks import locked
from lsg_flax.models import Model, Params
from lsg_flax.patterns import LSGConfig
from lsg_flax.progress import count_of


def from_pretrained(
    path_or_id: str | os.PathLike,
    task: str | None = None,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    check: bool = False,
    mesh: Mesh | None = None,
    global_attention: nn.Module | None = None,
    **config_overrides: Any,
) -> tuple[Model, Params]:
    """Loads a model and its parameters from a checkpoint: a plain Hugging Face one, an LSG one, or
    one that lsg_flax saved.

    Args:
        path_or_id: folder with config.json and weights, or the name of a repository on the Hugging
            Face hub.
        task: the head to load. By default that of `architectures` in config.json, or the base model
            if there is none. Weights that the checkpoint lacks are drawn from a seed, and one
            warning lists them. A "causal_lm" is always a decoder (`is_decoder=True`), because
            otherwise every token would see its successor.
        dtype: of the computation (float32, bfloat16, float16).
        param_dtype: of the parameters.
        check: whether to check the weights for NaN and infinity.
        mesh: the mesh to place the parameters on, sharded as `sharding.shardings_for` says. From
            safetensors every device then reads only its part, and no host ever holds the whole.
        global_attention: the Flax module of a LocalTransformer's global attention layers, see
            `Model`. If config.json lists no such layers, all layers get one. If the checkpoint has
            no weights for them, they are drawn from a seed, and one warning lists them.
        **config_overrides: fields of config.json to change, such as `num_labels=3` or
            `sparsity_type="lsh"`.

    Returns:
        A Linen module and its parameters, for
        `model.apply({"params": params}, input_ids=...)`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: for an unsupported model_type or setting, tensors that do not match the config,
            and damaged files.
    """
    checkpoint = open_checkpoint(path_or_id, model_type=config_overrides.pop("model_type", None))
    return checkpoint.load(
        task,
        dtype=dtype,
        param_dtype=param_dtype,
        mesh=mesh,
        check=check,
        global_attention=global_attention,
        **config_overrides,
    )


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike | None = None,
    *,
    max_sequence_length: int = 4096,
    task: str | None = None,
    random_global_init: bool = False,
    global_positional_stride: int = 64,
    keep_first_global_token: bool = False,
    resize_lsg: bool = False,
    use_token_ids: bool = True,
    seed: int = 123,
    check: bool = False,
    **lsg_overrides: Any,
) -> tuple[Model, Params]:
    """Converts a checkpoint to an LSG one that reads `max_sequence_length` tokens, with the same
    weights.

    Options and numbers are those of lsg_converter's LSGConverter. A sentence-transformers folder
    remains one, with the new length.

    Args:
        source: folder or hub id of a plain or LSG checkpoint, with its tokenizer.
        target: folder to save the result and the tokenizer to; None to only return it.
        max_sequence_length: number of tokens that the new model reads.
        task, check: as in `from_pretrained`.
        random_global_init: whether to draw the global embeddings from the distribution of the word
            table instead of using [MASK].
        global_positional_stride: positions from one global to the next.
        keep_first_global_token: whether to keep global 0 unchanged (LSG sources only).
        resize_lsg: whether to change only the positions (LSG sources only). Otherwise the globals
            of such a source are initialised anew, as in the reference, with a warning.
        use_token_ids: whether to add the embedding of segment 0 to the globals.
        seed: seed of the random draws.
        **lsg_overrides: fields of `LSGConfig` and of config.json, such as `num_global_tokens=7` or
            `block_size=64`.

    Returns:
        The new model and its parameters, as `from_pretrained`.

    Raises:
        FileNotFoundError: if there is no source.
        ValueError: for options that do not fit the source, and as `from_pretrained`.
        OSError: if another process is writing to `target`, or it cannot be written.
    """
    checkpoint = open_checkpoint(source, model_type=lsg_overrides.pop("model_type", None))
    options = LSGOptions(
        max_sequence_length,
        random_global_init,
        global_positional_stride,
        keep_first_global_token,
        resize_lsg,
        use_token_ids,
        seed,
    )
    if target is None:
        return _converted(checkpoint, task, options, lsg_overrides, check=check)[:2]
    check_target(target, checkpoint)
    reads = Model(checkpoint.config).max_length
    if 0 < max_sequence_length < reads:
        warnings.warn(
            f"max_sequence_length={max_sequence_length} is less than the {reads} tokens that "
            f"{source} reads: {target} will read no more than {max_sequence_length}.",
            stacklevel=2,
        )
    with locked(pathlib.Path(target)):
        converted = _converted(checkpoint, task, options, lsg_overrides, check=check)
        write_converted(
            pathlib.Path(target), checkpoint, *converted, base=str(source), options=options
        )
    return converted[:2]


def _converted(
    checkpoint: Checkpoint,
    task: str | None,
    options: LSGOptions,
    overrides: dict[str, Any],
    *,
    check: bool,
) -> tuple[Model, Params, Tokenizer | None]:
    """Converts a checkpoint in memory; returns model, parameters and tokenizer."""
    names = {f.name for f in fields(LSGConfig)}
    pattern = {name: value for name, value in overrides.items() if name in names}
    others = {name: value for name, value in overrides.items() if name not in names}
    model, params = checkpoint.load(task, check=check, **others)
    if checkpoint.modules and task is None and model.task != "base":
        warnings.warn(
            f"the {model.task} model is saved without the {MODULES} of {checkpoint.root}; pass "
            "task='base' for an embedding model.",
            stacklevel=3,
        )
    asked = options.resize_lsg or options.keep_first_global_token or options.random_global_init
    if model.config.lsg and not asked:
        warnings.warn(
            f"the {count_of(model.config.lsg.num_global_tokens, 'global token')} of "
            f"{checkpoint.root} are initialised anew, so what they were trained to is lost: pass "
            "resize_lsg=True to keep them.",
            stacklevel=3,
        )
    tokenizer = checkpoint.tokenizer
    return *make_lsg(model, params, tokenizer, options=options, pattern=pattern), tokenizer


def make_lsg(
    model: Model,
    params: Params,
    tokenizer: Tokenizer | None,
    *,
    options: LSGOptions,
    pattern: dict[str, Any],
) -> tuple[Model, Params]:
    """Converts a model to LSG in memory, as `convert_checkpoint`, and sets the tokenizer's
    `model_max_length`.

    Args:
        model, params: the source.
        tokenizer: the model's tokenizer, for the ids of [CLS] and [MASK]; None takes the ids of
            config.json.
        options: the options of the conversion.
        pattern: fields of `LSGConfig` that differ from the model's, or from the defaults.

    Raises:
        ValueError: for options that do not fit the model.
    """
    lsg = replace(model.config.lsg, **pattern) if model.config.lsg else LSGConfig(**pattern)
    values = model.config.to_dict()
    bos, mask = values.get("bos_token_id"), values.get("mask_token_id")
    if tokenizer is not None:
        known = (tokenizer.bos_token_id, tokenizer.cls_token_id, bos)
        bos = next((token for token in known if token is not None), None)
        mask = mask if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        tokenizer.model_max_length = options.max_sequence_length
    ids = {"bos_token_id": bos, "mask_token_id": mask}
    params, config = to_lsg(params, model.config, options, lsg=lsg, **ids)
    return model.clone(config=config), params
