"""Families of checkpoints as data: names of classes and tensors in PyTorch, side by side with the
places in our parameter tree.

A row is `kind, torch name, our path`. `{layer}` stands for the layer number in PyTorch; ours are
stacked along a leading axis. Kinds: "dense" (weight, transposed, and bias), "norm" (weight and
bias), "embedding" (weight),
    "bias" (one tensor as it is).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from lsg_flax.models.heads import Task

Rows = tuple[tuple[str, str, str], ...]

# kind -> (suffix in PyTorch, leaf of ours, transposed)
_KINDS = {
    "dense": ((".weight", "/kernel", True), (".bias", "/bias", False)),
    "norm": ((".weight", "/scale", False), (".bias", "/bias", False)),
    "embedding": ((".weight", "/embedding", False),),
    "bias": (("", "", False),),
    "kernel": ((".weight", "/kernel", True),),
}


@dataclass(frozen=True)
class Key:
    """One tensor in PyTorch and the leaf it goes to, `layer` being its place on the leaf's leading
    axis."""

    torch: str
    path: str
    transposed: bool
    layer: int | None


@dataclass(frozen=True)
class HeadTable:
    """A task's class name (after the family's) and rows; `tied` maps names that repeat another
    tensor to that tensor's name."""

    architecture: str
    rows: Rows = ()
    tied: dict[str, str] = field(default_factory=dict)
    untied_rows: Rows = ()  # in their place if config.tie_word_embeddings is false


@dataclass(frozen=True)
class Family:
    """Everything that distinguishes a family, read from here by conversion, `hub` and `to_lsg`."""

    model_type: str
    architecture: str  # first part of the class names
    prefix: str  # of the encoder's tensors in a model with a head
    encoder: Rows
    pooler: Rows
    heads: dict[Task, HeadTable]
    ignored: tuple[str, ...] = ()  # buffers, by name behind the prefix
    position_offset: int = 0  # rows of the position table before that of the first token
    module: str = ""  # of the reference's remote code, for auto_map
    auto_classes: dict[str, str] = field(default_factory=dict)

    def class_name(self, task: Task, *, lsg: bool) -> str:
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
        return self.heads[task]  # type: ignore[index]

    def task_of(self, class_name: str) -> Task | None:
        """The task of a PyTorch class by its name, None if it is not of this family."""
        names: dict[str, Task] = {self.class_name(task, lsg=False): task for task in self.heads}
        return names.get(class_name.removeprefix("LSG"))

    def keys(
        self, task: Task, *, layers: int, lsg: bool, tied: bool, cross: bool = False
    ) -> list[Key]:
        """Every tensor of a model, with its prefix."""
        head = self.head(task)
        prefix = "" if task == "base" else f"{self.prefix}."
        encoder = [row for row in self.encoder if lsg or "global_embeddings" not in row[2]]
        encoder = [row for row in encoder if cross or "cross_attention" not in row[2]]
        encoder += self.pooler if pools(task) else ()
        own = (*head.rows, *(() if tied else head.untied_rows))
        return [
            *(key for row in encoder for key in _expand(row, layers, prefix)),
            *(key for row in own for key in _expand(row, layers, "")),
        ]

    def tied_names(self, task: Task, *, tied: bool) -> dict[str, str]:
        """Tensors that repeat another one, name to name; those of an own decoder kernel do not."""
        own = (
            set()
            if tied
            else {key.torch for row in self.head(task).untied_rows for key in _expand(row, 0, "")}
        )
        return {name: source for name, source in self.head(task).tied.items() if name not in own}


def pools(task: Task) -> bool:
    """Whether a task's model has the pooler."""
    return task in (
        "base",
        "pretraining",
        "next_sentence_prediction",
        "sequence_classification",
        "multiple_choice",
    )


def _expand(row: tuple[str, str, str], layers: int, prefix: str) -> Iterator[Key]:
    kind, torch, path = row
    for suffix, leaf, transposed in _KINDS[kind]:
        if "{layer}" not in torch:
            yield Key(prefix + torch + suffix, path + leaf, transposed, None)
            continue
        for layer in range(layers):
            yield Key(prefix + torch.format(layer=layer) + suffix, path + leaf, transposed, layer)


def modern_name(name: str) -> str:
    """LayerNorm's parameters were called gamma and beta in old checkpoints."""
    return re.sub(
        r"LayerNorm\.gamma$",
        "LayerNorm.weight",
        re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name),
    )


_BERT_LAYER = "encoder.layer.{layer}"
_BERT_ENCODER: Rows = (
    ("embedding", "embeddings.word_embeddings", "encoder/embeddings/word_embeddings"),
    ("embedding", "embeddings.position_embeddings", "encoder/embeddings/position_embeddings"),
    ("embedding", "embeddings.token_type_embeddings", "encoder/embeddings/token_type_embeddings"),
    ("embedding", "embeddings.global_embeddings", "encoder/embeddings/global_embeddings"),
    ("norm", "embeddings.LayerNorm", "encoder/embeddings/layer_norm"),
    ("dense", f"{_BERT_LAYER}.attention.self.query", "encoder/layers/attention/query"),
    ("dense", f"{_BERT_LAYER}.attention.self.key", "encoder/layers/attention/key"),
    ("dense", f"{_BERT_LAYER}.attention.self.value", "encoder/layers/attention/value"),
    ("dense", f"{_BERT_LAYER}.attention.output.dense", "encoder/layers/attention/output"),
    ("norm", f"{_BERT_LAYER}.attention.output.LayerNorm", "encoder/layers/attention_norm"),
    *(
        ("dense", f"{_BERT_LAYER}.crossattention.{torch}", f"encoder/layers/cross_attention/{ours}")
        for torch, ours in (
            ("self.query", "query"),
            ("self.key", "key"),
            ("self.value", "value"),
            ("output.dense", "output"),
        )
    ),
    (
        "norm",
        f"{_BERT_LAYER}.crossattention.output.LayerNorm",
        "encoder/layers/cross_attention_norm",
    ),
    ("dense", f"{_BERT_LAYER}.intermediate.dense", "encoder/layers/mlp_up"),
    ("dense", f"{_BERT_LAYER}.output.dense", "encoder/layers/mlp_down"),
    ("norm", f"{_BERT_LAYER}.output.LayerNorm", "encoder/layers/mlp_norm"),
)


def _bert_language_model(path: str) -> Rows:
    return (
        ("dense", "cls.predictions.transform.dense", f"{path}/transform"),
        ("norm", "cls.predictions.transform.LayerNorm", f"{path}/layer_norm"),
        ("bias", "cls.predictions.bias", f"{path}/bias"),
    )


_BERT_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_BERT_LM_HEAD = {
    "rows": _bert_language_model("head"),
    "tied": _BERT_TIED,
    "untied_rows": (("kernel", "cls.predictions.decoder", "head"),),
}
_BERT_NEXT_SENTENCE: Rows = (("dense", "cls.seq_relationship", "head/seq_relationship"),)
_CLASSIFIER: Rows = (("dense", "classifier", "head/classifier"),)

BERT = Family(
    model_type="bert",
    architecture="Bert",
    prefix="bert",
    encoder=_BERT_ENCODER,
    pooler=(("dense", "pooler.dense", "pooler/dense"),),
    heads={
        "base": HeadTable("Model"),
        "masked_lm": HeadTable("ForMaskedLM", **_BERT_LM_HEAD),
        "causal_lm": HeadTable("LMHeadModel", **_BERT_LM_HEAD),
        "pretraining": HeadTable(
            "ForPreTraining",
            rows=(*_bert_language_model("head/masked_lm"), *_BERT_NEXT_SENTENCE),
            tied=_BERT_TIED,
            untied_rows=(("kernel", "cls.predictions.decoder", "head/masked_lm"),),
        ),
        "next_sentence_prediction": HeadTable(
            "ForNextSentencePrediction", rows=_BERT_NEXT_SENTENCE
        ),
        "sequence_classification": HeadTable("ForSequenceClassification", rows=_CLASSIFIER),
        "token_classification": HeadTable("ForTokenClassification", rows=_CLASSIFIER),
        "question_answering": HeadTable(
            "ForQuestionAnswering", rows=(("dense", "qa_outputs", "head/outputs"),)
        ),
        "multiple_choice": HeadTable("ForMultipleChoice", rows=_CLASSIFIER),
    },
    ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
    module="modeling_lsg_bert",
    auto_classes={
        "AutoConfig": "Config",
        "AutoModel": "Model",
        "AutoModelForCausalLM": "LMHeadModel",
        "AutoModelForMaskedLM": "ForMaskedLM",
        "AutoModelForMultipleChoice": "ForMultipleChoice",
        "AutoModelForPreTraining": "ForPreTraining",
        "AutoModelForQuestionAnswering": "ForQuestionAnswering",
        "AutoModelForSequenceClassification": "ForSequenceClassification",
        "AutoModelForTokenClassification": "ForTokenClassification",
    },
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (BERT,)}


def family_of(model_type: str) -> Family:
    """The family that config.json names.

    Raises:
        ValueError: for a model_type that is not supported.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; supported are {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
