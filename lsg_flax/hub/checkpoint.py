"""An opened checkpoint: a Hugging Face folder as one value, which knows its config and reads
tokenizer and weights on demand."""

import functools
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh

from lsg_flax.convert_from_torch import has_head, params_from_torch
from lsg_flax.files import read_json
from lsg_flax.hub.download import resolve
from lsg_flax.hub.sentence_files import Modules, read_modules
from lsg_flax.hub.tokenizer_files import Tokenizer, read_tokenizer
from lsg_flax.hub.weights import CONFIG, GENERATION, Tensors, open_tensors
from lsg_flax.models import (
    LocalTransformerConfig,
    Model,
    ModelConfig,
    Params,
    class_names,
    family_of,
    model_type_of,
    read_config,
)
from lsg_flax.progress import doing
from lsg_flax.sharding import shardings_for
from lsg_flax.tensor_names import has_own_part


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, opened by `open_checkpoint`.

    Attributes:
        root: the folder that was opened.
        folder: the folder of config.json and the weights; for sentence-transformers it may be
            inside root.
        values: the fields of config.json; those of generation_config.json are one of them.
        config: the checked config.
        modules: class name and folder of each module of sentence-transformers; empty for other
            checkpoints.
    """

    root: pathlib.Path
    folder: pathlib.Path
    values: dict[str, Any]
    config: ModelConfig
    modules: Modules

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of PyTorch's classes in config.json; usually one, empty if there are none."""
        return class_names(self.values)

    @property
    def head(self) -> str | None:
        """The task of the class in `architectures`, or the config's usual task if there is none;
        None for a class that the family does not have."""
        family = family_of(self.config.model_type)
        if not self.architectures:
            return self.config.usual_task
        return family.task_of(self.architectures[0])

    @property
    def task(self) -> str:
        """The task, as `head`.

        Raises:
            ValueError: if the family does not have the class in `architectures`.
        """
        family = family_of(self.config.model_type)
        if self.head is None:
            raise ValueError(
                f"architectures={list(self.architectures)} in {CONFIG} is none of "
                f"{[family.class_name(task, lsg=False) for task in family.heads]}; pass task=, one "
                f"of {', '.join(family.heads)}."
            )
        return self.head

    def require_head(self, task: str) -> None:
        """Raises ValueError if the checkpoint has no trained head for the task. "base" needs none.
        If config.json has no class of the family, the names of the weights decide."""
        family = family_of(self.config.model_type)
        if task == "base" or task == self.head:
            return
        if self.architectures and self.head:
            found = family.contains(self.head, task)
        else:
            found = has_head(self.tensors, self.config, task)
        if not found:
            names = ", ".join(self.architectures) or "a model without a head"
            raise ValueError(
                f"{self.root} is {names} and has no head for {task}; train that head first "
                "(lsg-flax train), or give the task that the model was trained for."
            )

    def config_for(self, task: str, **overrides: Any) -> ModelConfig:
        """Returns the config for a model of the task, with other values for some fields.

        Raises:
            ValueError: if the family has no such head, or the config no such field.
        """
        fixed = family_of(self.config.model_type).head(task).task.fixed
        return self.config.with_overrides(**overrides).with_overrides(**fixed)

    def _own_parts(self, task: str) -> dict[str, Any]:
        """Settings of a scorer that only its tensors tell, since PyTorch's config.json does not."""
        compares = family_of(self.config.model_type).head(task).embedders
        if not compares or not has_own_part(self.tensors, "query_embedder", "embedder"):
            return {}
        return {"own_query_embedder": True}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """A new tokenizer, read from the folder's files; None if there are none."""
        return read_tokenizer(self.folder)

    @property
    def tensors(self) -> Tensors:
        """The tensors by their PyTorch names, see `weights.open_tensors`."""
        return open_tensors(self.folder)

    def load(
        self,
        task: str | None = None,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        mesh: Mesh | None = None,
        check: bool = False,
        global_attention: nn.Module | None = None,
        **config_overrides: Any,
    ) -> tuple[Model, Params]:
        """Loads the model and its parameters; arguments are those of `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained`.
        """
        task = task or self.task
        config = self.config_for(task, **(self._own_parts(task) | config_overrides))
        if global_attention is not None and isinstance(config, LocalTransformerConfig):
            config = config.with_global_layers()
        model = Model(config, task, dtype, param_dtype, global_attention=global_attention)
        place = None if mesh is None else functools.partial(_place, mesh)
        with doing("reading the weights"):
            params = params_from_torch(self.tensors, model, place)
            if check:
                _check_finite(params)
        return model, params


def open_checkpoint(
    path_or_id: str | os.PathLike,
    files: Sequence[str] | None = None,
    *,
    model_type: str | None = None,
) -> Checkpoint:
    """Opens a checkpoint: a folder, a config.json, or a hub repository, which is downloaded.

    Args:
        path_or_id: the folder, file or hub id.
        files: patterns of the files to download; by default all that are needed. With
            `CONFIG_FILES` only the config can be read, not the weights.
        model_type: how config.json is read; by default as its own model_type says, or that of
            `architectures`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: for a damaged config.json or modules.json, an unsupported model_type or setting.
    """
    file, modules = pathlib.Path(path_or_id), []
    root = file.parent
    if file.suffix != ".json" or not file.is_file():
        root = resolve(path_or_id, files)
        modules = read_modules(root)
        file = (modules[0][1] if modules else root) / CONFIG
    if not file.is_file():
        there = sorted(p.name for p in file.parent.glob("*"))[:10]
        raise FileNotFoundError(f"{file.parent} has no {CONFIG}; it has {there}.")
    values = read_json(file)
    if (file.parent / GENERATION).is_file():
        values["generation_config"] = read_json(file.parent / GENERATION)
    try:
        values["model_type"] = model_type or model_type_of(values)
        config = read_config(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Checkpoint(root, file.parent, values, config, modules)


def _place(mesh: Mesh, path: str, read, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = shardings_for({path: leaf}, mesh)[path]
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _check_finite(params: Params) -> None:
    """Raises ValueError, with their paths, if parameters have NaN or infinity."""
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    broken = [path for path, leaf in leaves.items() if not bool(jnp.isfinite(leaf).all())]
    if broken:
        raise ValueError(
            f"NaN or infinity in {len(broken)} of {len(leaves)} parameters: "
            f"{', '.join(broken[:12])}."
        )
