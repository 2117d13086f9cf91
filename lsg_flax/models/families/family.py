"""What a family of checkpoints is: its config.json, its classes and tensors in PyTorch side by side
with the places in our parameter tree, what it computes, and how it becomes LSG."""

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
    """A module of PyTorch and its place in our tree.

    `{0}` in its name stands for the layer's number (`{0}` and `{1}` for group and layer where
    groups are shared); ours are stacked along leading axes.
    """

    torch: str
    path: str
    layout: Layout


Rows = tuple[Row, ...]
# From a head's outputs, the task's arrays, the config and the shape of input_ids.
Finish = Callable[[ModelOutput, Mapping[str, Any], ModelConfig, tuple[int, ...]], ModelOutput]


@dataclass(frozen=True)
class Key:
    """One tensor in PyTorch and the leaf it goes to, `layer` being its place on the leaf's leading
    axes."""

    torch: str
    path: str
    storage: Storage
    layer: tuple[int, ...] | None

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from that of our leaf without its leading axes.

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
    """A task's head.

    Attributes:
        class_suffix: the class name behind the family's.
        module: of heads.py.
        pooled: whether the model has the pooler.
        tied: names that repeat another tensor -> that tensor's name.
        untied_rows: in their place if config.tie_word_embeddings is false.
        body: rows of the body in place of the family's, where the model has a part of it only.
        at_last_eos: the head is given one state, that at the last end token of the inputs.
        finish: what is made of the head's outputs without parameters.
        part: the name by which models of several parts have this one; it is read out of their
            files, too.
        embedders: names of the parts of a model that compares, each a model of the task "embedder":
            of the candidates, and of queries where they have their own.
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
    """A table of positions, and how it gets more rows: the trained ones again and again ("tile"),
    or computed anew ("sinusoid")."""

    path: str
    extended_by: Literal["tile", "sinusoid"] = "tile"


@dataclass(frozen=True)
class ToLSG:
    """How a family's checkpoint becomes LSG: the paths of tables that the conversion reads and
    writes.

    Attributes:
        segments: whose row 0 is added to the globals; None to add nothing.
        lengths: fields of the config that become the new number of tokens.
    """

    positions: tuple[PositionTable, ...]
    globals: str
    words: str
    segments: str | None = None
    lengths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """All that distinguishes a family.

    Attributes:
        class_prefix: first part of the class names.
        prefix: of the body's tensors in a model with a head.
        encoder, pooler: rows of these parts; `encoder` has all stacks.
        given: where a module lies that the user gives.
        config_type: what its config.json is read as.
        tf_names: what to replace in names of TensorFlow's checkpoints, as regular expressions.
        ignored: tensors that are not parameters, by name behind the prefix, `*` being any text.
        other_names, other_types: further beginnings of its class names, and model_types.
        lsg_type: the model_type of LSG checkpoints where PyTorch has no LSG classes of the family;
            None where it has, which read the family's own.
        to_lsg: None where there is no such thing.
        describes_itself: config.json names the class and the dtype of the weights.
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
        """By the name of the task."""
        return {table.task.name: table for table in self.tables}

    @property
    def beginning(self) -> str:
        """Of the names of the body's tensors in a model with a head."""
        return f"{self.prefix}." if self.prefix else ""

    def auto_map(self) -> dict[str, str]:
        """Hugging Face's auto classes -> the reference's remote code, file and class."""
        tables = sorted(self.tables, key=lambda table: table.task.auto_class or "")
        suffixes = {t.task.auto_class: t.class_suffix for t in tables if t.task.auto_class}
        module = f"modeling_lsg_{self.model_type.replace('-', '_')}"
        return {
            auto: f"{module}.LSG{self.class_prefix}{suffix}"
            for auto, suffix in {"AutoConfig": "Config", **suffixes}.items()
        }

    def class_name(self, task: str, *, lsg: bool) -> str:
        """Name of the PyTorch class for a task."""
        return ("LSG" if lsg else "") + self.class_prefix + self.head(task).class_suffix

    def head(self, task: str) -> HeadTable:
        """The table of a task's head.

        Raises:
            ValueError: if the family has no such head.
        """
        if task not in self.heads:
            raise ValueError(
                f"task={task!r} is unknown for {self.model_type}; it has {', '.join(self.heads)}."
            )
        return self.heads[task]

    def task_of(self, class_name: str) -> str | None:
        """The task of a PyTorch class by its name, None if it is not of this family."""
        names = {
            prefix + table.class_suffix: task
            for task, table in self.heads.items()
            for prefix in (self.class_prefix, *self.other_names)
        }
        return names.get(class_name.removeprefix("LSG"))

    def keys(self, task: str, config: ModelConfig) -> list[Key]:
        """Every tensor of a model, with its prefix."""
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
        """Every tensor of the module that the user gives, by the paths and shapes of a model's
        parameters."""
        keys, given = [], self.given
        for path, shape in shapes.items():
            if given is None or not path.startswith(f"{given.path}/"):
                continue
            module, _, name = path.rpartition("/")
            torch = given.torch + module.removeprefix(given.path).replace("/", ".")
            row = Row(torch, module, (leaf_of(name, len(shape) - 1),))  # one axis is of layers
            keys += _expand(row, config.stacks[path.split("/")[0]].layers_of(path), "")
        return keys

    def _has(self, stack: EncoderConfig, row: Row) -> bool:
        without = list(stack.lacks)
        without += [] if self.architecture.projects(stack) else ["embeddings_project"]
        return not any(part in row.path for part in without)

    def tied_names(self, task: str, *, tied: bool) -> dict[str, str]:
        """Tensors that repeat another one, name to name; those of an own decoder kernel do not."""
        head = self.head(task)
        own = set() if tied else {k.torch for row in head.untied_rows for k in _expand(row, {}, "")}
        return {name: source for name, source in head.tied.items() if name not in own}


def _expand(row: Row, layers: dict[tuple[int, ...], tuple[int, ...]], prefix: str) -> Iterator[Key]:
    for leaf in row.layout:
        for place, number in layers.items() if "{" in row.torch else ((None, ()),):
            name = row.torch.format(*number)
            yield Key(prefix + name + leaf.torch, row.path + leaf.ours, leaf.storage, place)


def modern_name(name: str) -> str:
    """LayerNorm's parameters were called gamma and beta in old checkpoints."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
