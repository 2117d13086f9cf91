"""Tasks as records. They define what a task is for losses, scores, data, batches, plans and
exports; the heads of the families refer to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

IGNORED = -100  # a label that losses and scores ignore, as in PyTorch

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
# How an output is compared with its labels. "class": an index of the last axis; "next_token": the
# class of the following token; "yes_or_no": a number per token; "problem_type": as the config's
# problem_type says; "position": the index of a token; "own_of_tokens", "own_of_rows": the model
# computes the loss itself, as a mean over its labels (those that `mlm_mask` keeps), or over rows.
Loss = Literal[
    "class", "next_token", "yes_or_no", "problem_type", "position", "own_of_tokens", "own_of_rows"
]
# What a row of data contains: see `data.Columns`. The labels of "masked_text" and "running_text"
# are their own tokens, those of "text_to_text" the tokens of the text to generate.
Examples = Literal[
    "text", "words", "question", "choices", "masked_text", "running_text", "text_to_text", "pairs"
]


# How outputs are scored, and the names of the scores.
Scorer = Literal[
    "classes", "several_labels", "numbers", "entities", "spans", "perplexity", "retrieval"
]
SCORES: dict[Scorer, tuple[str, ...]] = {
    "classes": ("accuracy", "macro_f1"),
    "several_labels": ("accuracy", "micro_f1", "macro_f1"),
    "numbers": ("mse", "pearson"),
    "entities": ("accuracy", "precision", "recall", "f1"),
    "spans": ("exact_match", "f1"),
    "perplexity": ("perplexity",),
    "retrieval": ("recall@1", "recall@10", "mrr@10", "ndcg@10"),
}
PROBLEM_SCORERS: dict[ProblemType, Scorer] = {
    "single_label_classification": "classes",
    "multi_label_classification": "several_labels",
    "regression": "numbers",
}


class Target(NamedTuple):
    """One term of a task's loss.

    Attributes:
        output: the field of `ModelOutput` that is trained.
        labels: name of the array of the batch that it is compared with.
        loss: how it is compared, see `Loss`.
        weight: factor of the term in the sum.
    """

    output: str
    labels: str
    loss: Loss
    weight: float = 1.0


@dataclass(frozen=True)
class Task:
    """A task: what a head computes, and how it is trained and scored.

    Attributes:
        name: the name for `from_pretrained(task=...)`.
        auto_class: Hugging Face's auto class; None if there is none.
        targets: the terms of the loss; empty for a task that is not trained.
        input_rank: number of axes of `input_ids`: 2 for [batch, tokens], 3 for
            [batch, choices, tokens].
        per_token: the outputs that have a token axis after the batch axis.
        scorer: how evaluation scores the outputs, beside the loss; "problem_type" chooses by the
            config's problem_type from `PROBLEM_SCORERS`.
        fixed: values of the config that every model of the task has.
        named_labels: whether the labels are the config's, which have names.
        examples: what a row of training data contains; None if data files cannot be read for it.
        generates: whether the outputs are scores of the next token, from which text is generated.
        arrays: arrays that the model takes beside its inputs, including the labels of a loss that
            it computes itself.
        alone: whether the model also accepts a single row without a batch axis.
        learned_by: the task of the models that are trained for this one, if it is another: the loss
            is computed from their outputs.

    Raises:
        ValueError: for an unknown input_rank, scorer, kind of examples or loss.
    """

    name: str
    auto_class: str | None = None
    targets: tuple[Target, ...] = ()
    input_rank: int = 2
    per_token: tuple[str, ...] = ()
    scorer: Scorer | Literal["problem_type"] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict, hash=False)
    named_labels: bool = False
    examples: Examples | None = None
    generates: bool = False
    arrays: tuple[str, ...] = ()
    alone: bool = False
    learned_by: str | None = None

    def __post_init__(self):
        known: dict[str, tuple[Any, ...]] = {
            "input_rank": (2, 3),
            "scorer": (None, "problem_type", *SCORES),
            "examples": (None, *get_args(Examples)),
        }
        given = [(name, getattr(self, name), known[name]) for name in known]
        given += [("loss", target.loss, get_args(Loss)) for target in self.targets]
        for name, value, allowed in given:
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} of the task {self.name!r} is unknown; choose one of "
                    f"{', '.join(map(str, allowed))}."
                )

    @property
    def is_trained(self) -> bool:
        """Whether the task has a loss."""
        return bool(self.targets or self.learned_by)

    @property
    def model_task(self) -> str:
        """The task of the models that are trained for this one."""
        return self.learned_by or self.name

    def scorer_for(self, problem: ProblemType) -> Scorer | None:
        """Returns how outputs are scored if the config's problem_type is `problem`."""
        return PROBLEM_SCORERS[problem] if self.scorer == "problem_type" else self.scorer


BASE = Task("base", "AutoModel", per_token=("last_hidden_state",))
MASKED_LM = Task(
    "masked_lm",
    "AutoModelForMaskedLM",
    (Target("logits", "labels", "class"),),
    per_token=("logits",),
    scorer="perplexity",
    examples="masked_text",
)
CAUSAL_LM = Task(
    "causal_lm",
    "AutoModelForCausalLM",
    (Target("logits", "labels", "next_token"),),
    per_token=("logits",),
    scorer="perplexity",
    fixed={"is_decoder": True},
    examples="running_text",
    generates=True,
)
PRETRAINING = Task(
    "pretraining",
    "AutoModelForPreTraining",
    (
        Target("prediction_logits", "labels", "class"),
        Target("seq_relationship_logits", "next_sentence_label", "class"),
    ),
    per_token=("prediction_logits",),
)
NEXT_SENTENCE_PREDICTION = Task(
    "next_sentence_prediction",
    targets=(Target("logits", "labels", "class"),),
    scorer="classes",
)
SEQUENCE_CLASSIFICATION = Task(
    "sequence_classification",
    "AutoModelForSequenceClassification",
    (Target("logits", "labels", "problem_type"),),
    scorer="problem_type",
    named_labels=True,
    examples="text",
)
TOKEN_CLASSIFICATION = Task(
    "token_classification",
    "AutoModelForTokenClassification",
    (Target("logits", "labels", "class"),),
    per_token=("logits",),
    scorer="entities",
    named_labels=True,
    examples="words",
)
QUESTION_ANSWERING = Task(
    "question_answering",
    "AutoModelForQuestionAnswering",
    (
        Target("start_logits", "start_positions", "position", 0.5),
        Target("end_logits", "end_positions", "position", 0.5),
    ),
    per_token=("start_logits", "end_logits"),
    scorer="spans",
    fixed={"num_labels": 2},  # PyTorch's classes count start and end as labels
    examples="question",
)
MULTIPLE_CHOICE = Task(
    "multiple_choice",
    "AutoModelForMultipleChoice",
    (Target("logits", "labels", "class"),),
    input_rank=3,
    scorer="classes",
    examples="choices",
)
CONDITIONAL_GENERATION = Task(
    "conditional_generation",
    "AutoModelForSeq2SeqLM",
    (Target("logits", "labels", "class"),),
    per_token=("logits",),
    scorer="perplexity",
    examples="text_to_text",
    generates=True,
)
# Texts as embeddings; the losses compare their angles.
EMBEDDING = Task("embedding", scorer="retrieval", examples="pairs", learned_by="base")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(BASE, MASKED_LM, CAUSAL_LM, PRETRAINING, NEXT_SENTENCE_PREDICTION),
        *(SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING, MULTIPLE_CHOICE),
        *(CONDITIONAL_GENERATION, EMBEDDING),
    )
}

# Pretraining of other families: ELECTRA detects replaced tokens, ALBERT the order of segments.
REPLACED_TOKENS = Task(
    "pretraining",
    "AutoModelForPreTraining",
    (Target("logits", "labels", "yes_or_no"),),
    per_token=("logits",),
)
SENTENCE_ORDER = Task(
    "pretraining",
    "AutoModelForPreTraining",
    (
        Target("prediction_logits", "labels", "class"),
        Target("sop_logits", "sentence_order_label", "class"),
    ),
    per_token=("prediction_logits",),
)

# Tasks of REALM: retrieving texts, and finding answers in them.
EMBEDDER = Task("embedder")
SCORER = Task(
    "scorer",
    arrays=tuple(
        f"candidate_{name}"
        for name in ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")
    ),
)
KNOWLEDGE_AUGMENTED_ENCODER = Task(
    "knowledge_augmented_encoder",
    targets=(Target("loss", "labels", "own_of_tokens"),),
    input_rank=3,
    arrays=("relevance_score", "labels", "mlm_mask"),
)
READER = Task(
    "reader",
    targets=(Target("loss", "has_answers", "own_of_rows"),),
    input_rank=3,
    arrays=("relevance_score", "block_mask", "start_positions", "end_positions", "has_answers"),
    alone=True,
)
