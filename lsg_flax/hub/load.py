"""Checkpoints as folders: Hugging Face's config.json with model.safetensors (whole or sharded) or
pytorch_model.bin.

Reading gives numpy arrays by name; writing happens in a temporary folder whose files are renamed
into place at the end.
"""

import functools
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.typing import Dtype
from jax.sharding import Mesh

from lsg_flax.convert_from_torch import params_from_torch, params_to_torch
from lsg_flax.files import read_json, written_aside
from lsg_flax.hub.sentence_files import MODULES, carry_modules, read_modules
from lsg_flax.hub.to_lsg import LSGOptions, to_lsg
from lsg_flax.hub.tokenizer_files import read_tokenizer
from lsg_flax.hub.weights import CONFIG, WEIGHTS, open_tensors
from lsg_flax.models import EncoderConfig, Model, Params, family_of
from lsg_flax.patterns import LSGConfig
from lsg_flax.sharding import shardings_for

_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.model"]


def from_pretrained(
    path_or_id: str | os.PathLike,
    task: str | None = None,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    check: bool = False,
    mesh: Mesh | None = None,
    **config_overrides: Any,
) -> tuple[Model, Params]:
    """Loads a model and its parameters from a local folder or a hub id: plain, LSG, or saved by
    lsg_flax.

    Args:
        path_or_id: folder with config.json and weights, or the name of a repository on the Hugging
            Face hub.
        task: which head; None takes that of `architectures` in config.json (the base model where
            there is none). A "causal_lm" is always a decoder (`is_decoder=True`), since otherwise
            every token would see its successor.
        dtype: of the computation (float32, bfloat16, float16).
        param_dtype: of the parameters.
        check: also look for NaN and infinity in the weights.
        mesh: place the parameters on it as `sharding.shardings_for` says; of safetensors every
            device then reads its part, and no host ever holds the whole.
        **config_overrides: fields of config.json to change, such as `num_labels=3` or
        `sparsity_type="lsh"`.

    Returns:
        A Linen module for `model.apply({"params": params}, input_ids=...)`, and its parameters.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: for an unsupported model_type or setting, tensors that do not match the config,
            a damaged file.
    """
    folder = resolve(path_or_id)
    values = read_config(folder)
    config = EncoderConfig.from_dict(values).with_overrides(**config_overrides)
    task = task or task_of(values, config)
    model = Model(config_for(task, config), task, dtype=dtype, param_dtype=param_dtype)
    place = None if mesh is None else functools.partial(_place, mesh)
    params = params_from_torch(open_tensors(folder), model, place)
    if check:
        check_finite(params)
    return model, params


def save_pretrained(
    path: str | os.PathLike, model: Model, params: Params, tokenizer: Any = None
) -> None:
    """Writes config.json and model.safetensors (and the tokenizer's files) so that PyTorch's class
    of the same name loads them.

    The folder is written aside and renamed file by file at the end: an interrupted save leaves old
    files as they were.

    Raises:
        ValueError: if `params` are not those of `model`.
        OSError: if the files cannot be written.
    """
    tensors = params_to_torch(params, model)
    path = pathlib.Path(path)
    with written_aside(path) as aside:
        safetensors.numpy.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(
            json.dumps(config_values(model, tensors), indent=2, sort_keys=True) + "\n"
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)


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
    """Turns a checkpoint into an LSG one that reads `max_sequence_length` tokens, with the same
    weights.

    Options and numbers are those of the reference's LSGConverter, see `to_lsg.LSGOptions`. A folder
    of sentence-transformers stays one, with the new length.

    Args:
        source: folder or hub id of a plain or LSG checkpoint, with its tokenizer.
        target: folder to save the result and the tokenizer to; None only returns it.
        task, check: as in `from_pretrained`.
        **lsg_overrides: fields of `LSGConfig` and of config.json, such as `num_global_tokens=7` or
        `block_size=64`.

    Raises:
        ValueError: for options that do not fit the source, and as `from_pretrained`.
    """
    root = resolve(source)
    modules = read_modules(root)
    folder = modules[0][1] if modules else root
    names = {f.name for f in fields(LSGConfig)}
    chosen = {name: lsg_overrides.pop(name) for name in names & lsg_overrides.keys()}
    model, params = from_pretrained(folder, task, check=check, **lsg_overrides)
    if modules and task is None and model.task != "base":
        warnings.warn(
            f"the {model.task} model is saved without the {MODULES} of {root}; pass task='base' "
            "for an embedding model.",
            stacklevel=2,
        )
    tokenizer = read_tokenizer(folder)
    options = LSGOptions(
        max_sequence_length,
        random_global_init,
        global_positional_stride,
        keep_first_global_token,
        resize_lsg,
        use_token_ids,
        seed,
    )
    model, params = make_lsg(model, params, tokenizer, options=options, pattern=chosen)
    if target is not None:
        with written_aside(pathlib.Path(target)) as aside:
            save_pretrained(aside, model, params, tokenizer)
            if modules and model.task == "base":
                carry_modules(root, modules, aside, max_sequence_length)
    return model, params


def make_lsg(
    model: Model,
    params: Params,
    tokenizer: Any,
    *,
    options: LSGOptions,
    pattern: dict[str, Any],
) -> tuple[Model, Params]:
    """`convert_checkpoint` in memory; the tokenizer then says how many tokens are read.

    Args:
        tokenizer: of the model, for the ids of [CLS] and [MASK]; None takes those of config.json.
        pattern: fields of `LSGConfig` in place of the model's or the usual ones.

    Raises:
        ValueError: for options that do not fit the model.
    """
    lsg = replace(model.config.lsg, **pattern) if model.config.lsg else LSGConfig(**pattern)
    extra = json.loads(model.config.extra)
    bos, mask = extra.get("bos_token_id"), extra.get("mask_token_id")
    if tokenizer is not None:
        bos = next(
            (i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id, bos) if i is not None),
            None,
        )
        mask = mask if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        tokenizer.model_max_length = options.max_sequence_length
    params, config = to_lsg(
        params, model.config, options, lsg=lsg, bos_token_id=bos, mask_token_id=mask
    )
    return model.clone(config=config), params


def resolve(path_or_id: str | os.PathLike, files: Sequence[str] = _HUB_FILES) -> pathlib.Path:
    """The local folder of a checkpoint, downloaded from the hub if it is not one already.

    Args:
        files: patterns of what to download.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a repository.
    """
    folder = pathlib.Path(path_or_id)
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{name} is not a folder; give the folder that holds {CONFIG}, or a hub id such as "
            "'bert-base-uncased'."
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is neither a local folder nor a repository that the hub gave us: {error}"
        ) from error


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        FileNotFoundError, ValueError: if there is none, it is not JSON, or names no supported
            family.
    """
    file = folder / CONFIG
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; it holds {sorted(p.name for p in folder.iterdir())[:10]}."
        )
    values = read_json(file)
    family_of(values.get("model_type", "<none>"))
    return values


def config_values(model: Model, tensors: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """The fields of config.json for `model`, with the class that PyTorch should make of it."""
    config, family = model.config, family_of(model.config.model_type)
    lsg = config.lsg is not None
    values = config.to_dict()
    values["architectures"] = [family.class_name(model.task, lsg=lsg)]
    if lsg:
        values["auto_map"] = family.auto_map()
    if tensors:
        values.pop("dtype", None)  # the same, as transformers 5 calls it
        values["torch_dtype"] = str(next(iter(tensors.values())).dtype)
    return values


def config_for(task: str, config: EncoderConfig) -> EncoderConfig:
    """The config as a model of the task has it.

    Raises:
        ValueError: if the family has no such head.
    """
    return config.with_overrides(**family_of(config.model_type).head(task).task.fixed)


def task_of(values: dict[str, Any], config: EncoderConfig) -> str:
    """The task that `architectures` in config.json names; the base model's where there is none.

    Raises:
        ValueError: for the name of another class.
    """
    family = family_of(config.model_type)
    architectures = values.get("architectures") or [family.class_name("base", lsg=False)]
    if isinstance(architectures, str):  # as the reference's converter leaves it in memory
        architectures = [architectures]
    task = family.task_of(architectures[0])
    if task is None:
        names = [family.class_name(task, lsg=False) for task in family.heads]
        raise ValueError(
            f"architectures={architectures} in {CONFIG} is none of {names}; pass task=, one of "
            f"{', '.join(family.heads)}."
        )
    return task


def _place(mesh: Mesh, path: str, read, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = shardings_for({path: leaf}, mesh)[path]
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def check_finite(params: Params) -> None:
    """Raises ValueError naming every parameter that holds NaN or infinity."""
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    broken = [path for path, leaf in leaves.items() if not bool(jnp.isfinite(leaf).all())]
    if broken:
        raise ValueError(
            f"NaN or infinity in {len(broken)} of {len(leaves)} parameters: "
            f"{', '.join(broken[:12])}."
        )
