"""The record of a family of checkpoints: its config.json, its PyTorch classes, its tensors with
their paths in our parameter tree, its architecture, and how it is converted to LSG."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config import EncoderConfig, ModelConfig
from lsg_flax.models.config_json import Dialect
from lsg_flax.models.heads import Head
from lsg_flax.models.layout import Layout, Shape, Storage, leaf_of
from lsg_flax.models.outputs import ModelOutput
from lsg_flax.models.task import Task


class Row(NamedTuple):
    """A module of PyTorch and its path in our tree.

    `{0}` in its name stands for the layer's number (`{0}` and `{1}` for group and layer if layers
    share parameters in groups); ours are stacked along leading axes.
    """

    torch: str
    path: str
    layout: Layout


Rows = tuple[Row, ...]
# From a head's outputs, the task's arrays, the config and the shape of input_ids.
Finish = Callable[[ModelOutput, Mapping[str, Any], ModelConfig, tuple[int, ...]], ModelOutput]


@dataclass(frozen=True)
class Key:
    """One PyTorch tensor and the leaf of our tree that it belongs to; `layer` is its index on the
    leaf's leading axes."""

    torch: str
    path: str
    storage: Storage
    layer: tuple[int, ...] | None

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the tensor's shape, given that of our leaf without its leading axes.

        Raises:
            ValueError: if the layout cannot store such a leaf.
        """
        if self.storage.rank not in (None, len(shape)):
            raise ValueError(
                f"the row of {self.torch} has a {self.storage.says} layout, which stores "
                f"{self.storage.rank} axes, but {self.path} is {list(shape)}; give the row another "
                "layout."
            )
        return self.storage.torch_shape(shape)


@dataclass(frozen=True)
class HeadTable:
    """A family's head for a task.

    Attributes:
        class_suffix: end of the PyTorch class's name, after the family's prefix.
        module: the module in heads.py.
        pooled: whether the model has the pooler.
        tied: names of tensors that repeat another one -> that tensor's name.
        untied_rows: rows that replace them if config.tie_word_embeddings is false.
        body: rows of the body instead of the family's, if the model has only a part of it.
        at_last_eos: whether the head reads one state, that at the last end token of the inputs.
        finish: a function without parameters that is applied to the head's outputs.
        part: the name of this model as a part of larger ones, whose files can be loaded as well.
        embedders: names of the embedders of a model that compares texts, each a model of the task
            "embedder": that of candidates, and that of queries if it is another.
    """

    task: Task
    class_suffix: str
    module: Callable[..., Head]
    rows: Rows = ()
    pooled: bool = False
    tied: dict[str, str] = field(default_factory=dict)
    untied_rows: Rows = ()
    body: Rows | None = None
    at_last_eos: bool = False
    finish: Finish | None = None
    part: str = ""
    embedders: Callable[[ModelConfig], tuple[str, ...]] | None = None


class PositionTable(NamedTuple):
    """A table of positions, and how it gets more rows: by repeating the trained ones ("tile"), or
    by computing them ("sinusoid")."""

    path: str
    extended_by: Literal["tile", "sinusoid"] = "tile"


@dataclass(frozen=True)
class ToLSG:
    """How a family's checkpoint is converted to LSG (lsg_converter's LSGConverter): the paths of
    the tables that the conversion reads and writes.

    Attributes:
        positions: tables that get more rows.
        globals: table of the global embeddings, which is written.
        words: table of the word embeddings.
        segments: table whose row 0 is added to the globals; None to add nothing.
        lengths: fields of the config that are set to the new number of tokens.
    """

    positions: tuple[PositionTable, ...]
    globals: str
    words: str
    segments: str | None = None
    lengths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Everything that is specific to a family.

    Attributes:
        class_prefix: first part of the PyTorch class names.
        prefix: prefix of the body's tensors in a model with a head.
        encoder, pooler: rows of these parts; `encoder` has those of all stacks.
        tables: the heads.
        to_lsg: how checkpoints are converted to LSG; None if they cannot be.
        dialect: how the family writes config.json.
        architecture: what the layers compute.
        given: names and path of a module that the user passes.
        config_type: the class that config.json is read as.
        tf_names: pairs (regular expression, replacement) for names in TensorFlow's checkpoints.
        ignored: tensors that are not parameters, by name after the prefix; `*` matches any text.
        other_names, other_types: further prefixes of its class names, and further model_types.
        lsg_type: the model_type of LSG checkpoints if PyTorch has no LSG classes of the family;
            None if it has, since those use the family's own model_type.
        describes_itself: whether config.json has the class and the dtype of the weights.
    """

    model_type: str
    class_prefix: str
    prefix: str
    encoder: Rows
    pooler: Rows
    tables: tuple[HeadTable, ...]
    to_lsg: ToLSG | None
    dialect: Dialect = Dialect()  # noqa: RUF009 (never changed)
    architecture: Architecture = Architecture()  # noqa: RUF009 (never changed)
    given: Row | None = None
    config_type: type[ModelConfig] = EncoderConfig
    tf_names: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ("embeddings.position_ids", "embeddings.token_type_ids")
    other_names: tuple[str, ...] = ()
    other_types: tuple[str, ...] = ()
    lsg_type: str | None = None
    describes_itself: bool = True

    @property
    def heads(self) -> dict[str, HeadTable]:
        """The heads by the name of their task."""
        return {table.task.name: table for table in self.tables}

    @property
    def beginning(self) -> str:
        """How the names of the body's tensors begin in a model with a head."""
        return f"{self.prefix}." if self.prefix else ""

    def auto_map(self) -> dict[str, str]:
        """Returns config.json's `auto_map`: Hugging Face's auto classes -> file and class of the
        reference's code."""
        tables = sorted(self.tables, key=lambda table: table.task.auto_class or "")
        suffixes = {t.task.auto_class: t.class_suffix for t in tables if t.task.auto_class}
        module = f"modeling_lsg_{self.model_type.replace('-', '_')}"
        return {
            auto: f"{module}.LSG{self.class_prefix}{suffix}"
            for auto, suffix in {"AutoConfig": "Config", **suffixes}.items()
        }

    def class_name(self, task: str, *, lsg: bool) -> str:
        """Returns the name of the PyTorch class for a task."""
        return ("LSG" if lsg else "") + self.class_prefix + self.head(task).class_suffix

    def head(self, task: str) -> HeadTable:
        """Returns the head for a task.

        Raises:
            ValueError: if the family has no such head.
        """
        if task not in self.heads:
            raise ValueError(
                f"task={task!r} is unknown for {self.model_type}; it has {', '.join(self.heads)}."
            )
        return self.heads[task]

    def contains(self, own: str, task: str) -> bool:
        """Whether a checkpoint with the head `own` has the trained head of another task too, such
        as that of masked_lm in one of pretraining. Tasks name their `classifier` alike, but each
        is another.

        Raises:
            ValueError: if the family has no head for the task.
        """
        wanted = {row.torch for row in self.head(task).rows}
        return "classifier" not in wanted and wanted <= {row.torch for row in self.head(own).rows}

    def task_of(self, class_name: str) -> str | None:
        """Returns the task of a PyTorch class; None if the class is not of this family."""
        names = {
            prefix + table.class_suffix: task
            for task, table in self.heads.items()
            for prefix in (self.class_prefix, *self.other_names)
        }
        return names.get(class_name.removeprefix("LSG"))

    def keys(self, task: str, config: ModelConfig) -> list[Key]:
        """Returns every tensor of a model, with its prefix."""
        head, keys = self.head(task), []
        if head.embedders:
            inner = self.keys("embedder", config)
            names = head.embedders(config)
            return [
                replace(key, torch=f"{name}.{key.torch}", path=f"{name}/{key.path}")
                for name in names
                for key in inner
            ]
        prefix = "" if task == "base" else self.beginning
        for row in self.encoder if head.body is None else head.body:
            stack = config.stacks.get(row.path.split("/")[0])
            if stack is None or self._has(stack, row):
                keys += _expand(row, {} if stack is None else stack.layers_of(row.path), prefix)
        own = (*head.rows, *(() if config.tie_word_embeddings else head.untied_rows))
        keys += [key for row in self.pooler if head.pooled for key in _expand(row, {}, prefix)]
        return keys + [key for row in own for key in _expand(row, {}, "")]

    def given_keys(self, config: ModelConfig, shapes: Mapping[str, Shape]) -> list[Key]:
        """Returns every tensor of the module that the user passes, given the paths and shapes of
        the model's parameters."""
        keys, given = [], self.given
        for path, shape in shapes.items():
            if given is None or not path.startswith(f"{given.path}/"):
                continue
            module, _, name = path.rpartition("/")
            torch = given.torch + module.removeprefix(given.path).replace("/", ".")
            row = Row(torch, module, (leaf_of(name, len(shape) - 1),))  # the first axis is layers
            keys += _expand(row, config.stacks[path.split("/")[0]].layers_of(path), "")
        return keys

    def _has(self, stack: EncoderConfig, row: Row) -> bool:
        without = list(stack.lacks)
        without += [] if self.architecture.projects(stack) else ["embeddings_project"]
        return not any(part in row.path for part in without)

    def tied_names(self, task: str, *, tied: bool) -> dict[str, str]:
        """Returns tensors that repeat another one -> that tensor. With `tied` false those of the
        decoder's own kernel are not among them."""
        head = self.head(task)
        own = set() if tied else {k.torch for row in head.untied_rows for k in _expand(row, {}, "")}
        return {name: source for name, source in head.tied.items() if name not in own}


def _expand(row: Row, layers: dict[tuple[int, ...], tuple[int, ...]], prefix: str) -> Iterator[Key]:
    for leaf in row.layout:
        for place, number in layers.items() if "{" in row.torch else ((None, ()),):
            name = row.torch.format(*number)
            yield Key(prefix + name + leaf.torch, row.path + leaf.ours, leaf.storage, place)


def modern_name(name: str) -> str:
    """Returns the current name of a tensor: in old checkpoints LayerNorm has gamma and beta, which
    transformers' `from_pretrained` renames too."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
