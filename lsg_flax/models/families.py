"""Families of checkpoints as data: names of classes and tensors in PyTorch, side by side with the
places in our parameter tree.

A row is `kind, torch name, our path`. `{0}` stands for the layer's number in PyTorch (`{0}` and
`{1}` for group and layer where groups are shared); ours are stacked along leading axes. Kinds:
"dense"
(weight, transposed, and bias), "norm" (weight and bias), "embedding" (weight),
    "bias" (one tensor as it is).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from lsg_flax.config import EncoderConfig
from lsg_flax.models import heads
from lsg_flax.models.heads import Head, Task

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
_AUTO: dict[Task, str] = {
    "base": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "multiple_choice": "AutoModelForMultipleChoice",
    "pretraining": "AutoModelForPreTraining",
    "question_answering": "AutoModelForQuestionAnswering",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}


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
        loss: of `losses.TARGETS`, if it is not the task's.
    """

    architecture: str
    module: Callable[..., Head]
    rows: Rows = ()
    pooled: bool = False
    tied: dict[str, str] = field(default_factory=dict)
    untied_rows: Rows = ()  # in their place if config.tie_word_embeddings is false
    loss: str | None = None


@dataclass(frozen=True)
class Family:
    """Everything that distinguishes a family, read from here by conversion, `hub` and `to_lsg`."""

    model_type: str
    architecture: str  # first part of the class names
    prefix: str  # of the encoder's tensors in a model with a head
    encoder: Rows
    pooler: Rows
    heads: dict[Task, HeadTable]
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
        named = {
            auto: self.heads[task].architecture
            for task, auto in _AUTO.items()
            if task in self.heads
        }
        return {"AutoConfig": "Config"} | named

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

    def keys(self, task: Task, config: EncoderConfig) -> list[Key]:
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

    def tied_names(self, task: Task, *, tied: bool) -> dict[str, str]:
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


_EMBEDDINGS, _LAYERS = "encoder/embeddings", "encoder/layers"


def _tables(*names: str) -> Rows:
    return tuple(("embedding", f"embeddings.{n}", f"{_EMBEDDINGS}/{n}") for n in names)


def _encoder(layer: str, *names: str) -> Rows:
    """Embeddings and layers, from the names of query, key, value, output, its norm, up, down and
    its norm behind `layer`."""
    ours = ("attention/query", "attention/key", "attention/value", "attention/output")
    ours += ("attention_norm", "mlp_up", "mlp_down", "mlp_norm")
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return (
        *_tables(*tables, "global_embeddings"),
        ("norm", "embeddings.LayerNorm", f"{_EMBEDDINGS}/layer_norm"),
        *(
            ("norm" if path.endswith("norm") else "dense", f"{layer}.{name}", f"{_LAYERS}/{path}")
            for name, path in zip(names, ours, strict=True)
        ),
    )


_BERT_ATTENTION = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
_BERT_ENCODER = (
    *_encoder(
        "encoder.layer.{0}",
        *(f"attention.{name}" for name in _BERT_ATTENTION),
        *("intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    *(
        (kind, f"encoder.layer.{{0}}.crossattention.{name}", f"{_LAYERS}/cross_attention{ours}")
        for kind, name, ours in zip(
            ("dense",) * 4 + ("norm",),
            _BERT_ATTENTION,
            ("/query", "/key", "/value", "/output", "_norm"),
            strict=True,
        )
    ),
)
_POOLER: Rows = (("dense", "pooler.dense", "pooler/dense"),)


def _language_model(
    encoder: str, transform: str, norm: str, bias: str, kernel: str, path: str = "head"
) -> dict:
    """A language model's head from its tensors' names: rows, what is tied, and the kernel that
    takes the place of the word table where it is not."""
    tied = {f"{kernel}.weight": f"{encoder}.embeddings.word_embeddings.weight"}
    if bias != f"{kernel}.bias":
        tied[f"{kernel}.bias"] = bias
    return {
        "rows": (
            ("dense", transform, f"{path}/transform"),
            ("norm", norm, f"{path}/layer_norm"),
            ("bias", bias, f"{path}/bias"),
        ),
        "tied": tied,
        "untied_rows": (("kernel", kernel, path),),
    }


def _classifier(
    module: Callable[..., Head] = heads.SequenceClassificationHead, *, pooled: bool = False
) -> dict:
    return {
        "module": module,
        "rows": (("dense", "classifier", "head/classifier"),),
        "pooled": pooled,
    }


def _common_heads(
    question_answering: Callable[..., Head] = heads.QuestionAnsweringHead,
) -> dict[Task, HeadTable]:
    """The heads that are the same everywhere."""
    return {
        "token_classification": HeadTable(
            "ForTokenClassification", **_classifier(heads.TokenClassificationHead)
        ),
        "question_answering": HeadTable(
            "ForQuestionAnswering",
            question_answering,
            (("dense", "qa_outputs", "head/outputs"),),
        ),
    }


def _pooled_heads() -> dict[Task, HeadTable]:
    """The heads that classify by the pooler's output."""
    return {
        "base": HeadTable("Model", heads.BaseHead, pooled=True),
        "sequence_classification": HeadTable(
            "ForSequenceClassification", **_classifier(pooled=True)
        ),
        "multiple_choice": HeadTable(
            "ForMultipleChoice", **_classifier(heads.MultipleChoiceHead, pooled=True)
        ),
    }


_BERT_LM = _language_model(
    "bert",
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias",
    "cls.predictions.decoder",
)
_BERT_PRETRAINING = _language_model(
    "bert",
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias",
    "cls.predictions.decoder",
    "head/masked_lm",
)
_NEXT_SENTENCE: Rows = (("dense", "cls.seq_relationship", "head/seq_relationship"),)

BERT = Family(
    model_type="bert",
    architecture="Bert",
    prefix="bert",
    encoder=_BERT_ENCODER,
    pooler=_POOLER,
    heads={
        **_pooled_heads(),
        **_common_heads(),
        "masked_lm": HeadTable("ForMaskedLM", heads.LanguageModelHead, **_BERT_LM),
        "causal_lm": HeadTable("LMHeadModel", heads.LanguageModelHead, **_BERT_LM),
        "pretraining": HeadTable(
            "ForPreTraining",
            heads.PretrainingHead,
            (*_BERT_PRETRAINING.pop("rows"), *_NEXT_SENTENCE),
            pooled=True,
            **_BERT_PRETRAINING,
        ),
        "next_sentence_prediction": HeadTable(
            "ForNextSentencePrediction", heads.NextSentenceHead, _NEXT_SENTENCE, pooled=True
        ),
    },
)


def _roberta(model_type: str, architecture: str) -> Family:
    """RoBERTa and its descendants differ in names only."""
    language_model = _language_model(
        "roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"
    )
    module = partial(heads.LanguageModelHead, act="gelu")
    return Family(
        model_type=model_type,
        architecture=architecture,
        prefix="roberta",
        encoder=_BERT_ENCODER,
        pooler=_POOLER,
        heads={
            **_pooled_heads(),
            **_common_heads(),
            "masked_lm": HeadTable("ForMaskedLM", module, **language_model),
            "causal_lm": HeadTable("ForCausalLM", module, **language_model),
            "sequence_classification": HeadTable(
                "ForSequenceClassification",
                partial(heads.FirstTokenHead, act="tanh", dropout_first=True),
                (
                    ("dense", "classifier.dense", "head/dense"),
                    ("dense", "classifier.out_proj", "head/classifier"),
                ),
            ),
        },
        positions_after_padding=True,
        position_offset=2,
        globals_with_segment=False,
    )


_ELECTRA_LM = _language_model(
    "electra",
    "generator_predictions.dense",
    "generator_predictions.LayerNorm",
    "generator_lm_head.bias",
    "generator_lm_head",
)
_ELECTRA_LM_HEAD = partial(heads.LanguageModelHead, act="gelu")

ELECTRA = Family(
    model_type="electra",
    architecture="Electra",
    prefix="electra",
    encoder=(
        *_BERT_ENCODER,
        ("dense", "embeddings_project", "encoder/embeddings_project"),
    ),
    pooler=(),
    heads={
        "base": HeadTable("Model", heads.BaseHead),
        **_common_heads(),
        "masked_lm": HeadTable("ForMaskedLM", _ELECTRA_LM_HEAD, **_ELECTRA_LM),
        "causal_lm": HeadTable("ForCausalLM", _ELECTRA_LM_HEAD, **_ELECTRA_LM),
        "pretraining": HeadTable(
            "ForPreTraining",
            heads.DiscriminatorHead,
            (
                ("dense", "discriminator_predictions.dense", "head/dense"),
                ("dense", "discriminator_predictions.dense_prediction", "head/prediction"),
            ),
            loss="discriminator",
        ),
        "sequence_classification": HeadTable(
            "ForSequenceClassification",
            partial(heads.FirstTokenHead, act="gelu", dropout_first=True),
            (
                ("dense", "classifier.dense", "head/dense"),
                ("dense", "classifier.out_proj", "head/classifier"),
            ),
        ),
        "multiple_choice": HeadTable(
            "ForMultipleChoice",
            heads.SequenceSummaryHead,
            (
                ("dense", "sequence_summary.summary", "head/dense"),
                ("dense", "classifier", "head/classifier"),
            ),
        ),
    },
)

_DISTILBERT_CLASSIFIER: Rows = (
    ("dense", "pre_classifier", "head/dense"),
    ("dense", "classifier", "head/classifier"),
)

DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBert",
    prefix="distilbert",
    encoder=_encoder(
        "transformer.layer.{0}",
        *(f"attention.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")),
        *("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
    ),
    pooler=(),
    heads={
        "base": HeadTable("Model", heads.BaseHead),
        **_common_heads(
            partial(heads.QuestionAnsweringHead, dropout_field="qa_dropout", dropout_default=0.1)
        ),
        "token_classification": HeadTable(
            "ForTokenClassification",
            **_classifier(partial(heads.TokenClassificationHead, of_hidden=True)),
        ),
        "masked_lm": HeadTable(
            "ForMaskedLM",
            heads.LanguageModelHead,
            **_language_model(
                "distilbert",
                "vocab_transform",
                "vocab_layer_norm",
                "vocab_projector.bias",
                "vocab_projector",
            ),
        ),
        "sequence_classification": HeadTable(
            "ForSequenceClassification",
            partial(heads.FirstTokenHead, act="relu"),
            _DISTILBERT_CLASSIFIER,
        ),
        "multiple_choice": HeadTable(
            "ForMultipleChoice",
            partial(heads.FirstTokenHead, act="relu", choices=True),
            _DISTILBERT_CLASSIFIER,
        ),
    },
)

_ALBERT_NAMES = ("predictions.dense", "predictions.LayerNorm", "predictions.bias")
_ALBERT_PRETRAINING = _language_model(
    "albert", *_ALBERT_NAMES, "predictions.decoder", "head/masked_lm"
)

ALBERT = Family(
    model_type="albert",
    architecture="Albert",
    prefix="albert",
    encoder=(
        *_encoder(
            "encoder.albert_layer_groups.{0}.albert_layers.{1}",
            *(f"attention.{n}" for n in ("query", "key", "value", "dense", "LayerNorm")),
            *("ffn", "ffn_output", "full_layer_layer_norm"),
        ),
        ("dense", "encoder.embedding_hidden_mapping_in", "encoder/embeddings_project"),
    ),
    pooler=(("dense", "pooler", "pooler/dense"),),
    heads={
        **_pooled_heads(),
        **_common_heads(),
        "masked_lm": HeadTable(
            "ForMaskedLM",
            heads.LanguageModelHead,
            **_language_model("albert", *_ALBERT_NAMES, "predictions.decoder"),
        ),
        "pretraining": HeadTable(
            "ForPreTraining",
            heads.SentenceOrderHead,
            (
                *_ALBERT_PRETRAINING.pop("rows"),
                ("dense", "sop_classifier.classifier", "head/sentence_order/classifier"),
            ),
            pooled=True,
            loss="sentence_order",
            **_ALBERT_PRETRAINING,
        ),
    },
    always_projects=True,
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        BERT,
        _roberta("roberta", "Roberta"),
        _roberta("xlm-roberta", "XLMRoberta"),
        _roberta("camembert", "Camembert"),
        ELECTRA,
        DISTILBERT,
        ALBERT,
    )
}


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
