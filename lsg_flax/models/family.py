"""What a family of checkpoints is: names of classes and tensors in PyTorch, side by side with the
places in our parameter tree. The families themselves are in families.py.

A row is `kind, torch name, our path`. `{0}` stands for the layer's number in PyTorch (`{0}` and
`{1}` for group and layer where groups are shared); ours are stacked along leading axes. Kinds:
"dense" (weight, transposed, and bias), "norm" (weight and bias), "embedding" (weight), "kernel"
(weight, transposed), "bias" (one tensor as it is).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from lsg_flax.models.config import EncoderConfig
from lsg_flax.models.heads import Head
from lsg_flax.models.task import TASKS, Task

Rows = tuple[tuple[str, str, str], ...]

# kind -> (suffix in PyTorch, leaf of ours, transposed)
_KINDS = {
    "dense": ((".weight", "/kernel", True), (".bias", "/bias", False)),
    "norm": ((".weight", "/scale", False), (".bias", "/bias", False)),
    "embedding": ((".weight", "/embedding", False),),
    "bias": (("", "", False),),
    "kernel": ((".weight", "/kernel", True),),
}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


@dataclass(frozen=True)
class Key:
    """One tensor in PyTorch and the leaf it goes to, `layer` being its place on the leaf's leading
    axes."""

    torch: str
    path: str
    transposed: bool
    layer: tuple[int, ...] | None


@dataclass(frozen=True)
class HeadTable:
    """A task's class name (after the family's), module and rows.

    Attributes:
        pooled: whether the model has the pooler.
        tied: names that repeat another tensor -> that tensor's name.
        task: the task's record, if it is not that of `TASKS`.
    """

    architecture: str
    module: Callable[..., Head]
    rows: Rows = ()
    pooled: bool = False
    tied: dict[str, str] = field(default_factory=dict)
    untied_rows: Rows = ()  # in their place if config.tie_word_embeddings is false
    task: Task | None = None


@dataclass(frozen=True)
class Family:
    """Everything that distinguishes a family, read from here by conversion, `hub` and `to_lsg`."""

    model_type: str
    architecture: str  # first part of the class names
    prefix: str  # of the encoder's tensors in a model with a head
    encoder: Rows
    pooler: Rows
    heads: dict[str, HeadTable]
    ignored: tuple[str, ...] = _BUFFERS  # by name behind the prefix
    positions_after_padding: bool = False  # counted from pad_token_id + 1 over real tokens
    position_offset: int = 0  # rows of the position table before that of the first token
    globals_with_segment: bool = True  # whether conversion adds segment 0 to the globals
    always_projects: bool = False  # embeddings and padding, even if the sizes are the same

    @property
    def module(self) -> str:
        """The file of the reference's remote code."""
        return f"modeling_lsg_{self.model_type.replace('-', '_')}"

    @property
    def auto_classes(self) -> dict[str, str]:
        """For auto_map: Hugging Face's auto classes -> names behind the family's."""
        tasks = sorted((self.task(name).auto_class or "", name) for name in self.heads)
        named = {auto: self.heads[name].architecture for auto, name in tasks if auto}
        return {"AutoConfig": "Config"} | named

    def class_name(self, task: str, *, lsg: bool) -> str:
        """Name of the PyTorch class for a task."""
        return ("LSG" if lsg else "") + self.architecture + self.head(task).architecture

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

    def task(self, name: str) -> Task:
        """The record of a task.

        Raises:
            ValueError: if the family has no such head.
        """
        return self.head(name).task or TASKS[name]

    def task_of(self, class_name: str) -> str | None:
        """The task of a PyTorch class by its name, None if it is not of this family."""
        names = {self.class_name(task, lsg=False): task for task in self.heads}
        return names.get(class_name.removeprefix("LSG"))

    def keys(self, task: str, config: EncoderConfig) -> list[Key]:
        """Every tensor of a model, with its prefix."""
        head = self.head(task)
        prefix = "" if task == "base" else f"{self.prefix}."
        without = [] if config.lsg else ["global_embeddings"]
        without += [] if config.type_vocab_size else ["token_type_embeddings"]
        without += [] if self.projects(config) else ["embeddings_project"]
        without += [] if config.add_cross_attention else ["cross_attention"]
        encoder = [row for row in self.encoder if not any(part in row[2] for part in without)]
        encoder += self.pooler if head.pooled else ()
        own = (*head.rows, *(() if config.tie_word_embeddings else head.untied_rows))
        return [
            *(key for row in encoder for key in _expand(row, config.stack, prefix)),
            *(key for row in own for key in _expand(row, config.stack, "")),
        ]

    def projects(self, config: EncoderConfig) -> bool:
        """Whether there is a projection from the embeddings to the layers."""
        return self.always_projects or config.embedding_width != config.hidden_size

    def tied_names(self, task: str, *, tied: bool) -> dict[str, str]:
        """Tensors that repeat another one, name to name; those of an own decoder kernel do not."""
        own = (
            set()
            if tied
            else {key.torch for row in self.head(task).untied_rows for key in _expand(row, (), "")}
        )
        return {name: source for name, source in self.head(task).tied.items() if name not in own}


def _expand(row: tuple[str, str, str], stack: tuple[int, ...], prefix: str) -> Iterator[Key]:
    kind, torch, path = row
    for suffix, leaf, transposed in _KINDS[kind]:
        if "{" not in torch:
            yield Key(prefix + torch + suffix, path + leaf, transposed, None)
            continue
        for place in np.ndindex(*stack):
            yield Key(prefix + torch.format(*place) + suffix, path + leaf, transposed, place)


def modern_name(name: str) -> str:
    """LayerNorm's parameters were called gamma and beta in old checkpoints."""
    return re.sub(
        r"LayerNorm\.gamma$",
        "LayerNorm.weight",
        re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name),
    )
