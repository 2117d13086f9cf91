"""Tasks as records, the one home of what a task is: losses, scores, data, batches, plans and
exports read it, and the families' heads name it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

IGNORED = -100  # a label that does not count, as in PyTorch

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
# How an output answers its labels. "class": one of the last axis; "next_token": the class of the
# token behind; "yes_or_no": a number per token; "problem_type": as the config's problem_type says;
# "position": one of the tokens; "own_of_tokens", "own_of_rows": the model computes the loss itself,
# a mean over its labels, of which `mlm_mask` may leave some out, or over rows.
Loss = Literal[
    "class", "next_token", "yes_or_no", "problem_type", "position", "own_of_tokens", "own_of_rows"
]
# What a row of data holds: see `data.Columns`. The tokens of "masked_text" and "running_text" are
# their own labels, those of "text_to_text" the ones of the text to write.
Examples = Literal[
    "text", "words", "question", "choices", "masked_text", "running_text", "text_to_text", "pairs"
]


# How answers are scored, and the names of the scores.
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
        output: field of `ModelOutput` that answers.
        labels: array of the batch that it is compared with.
        weight: of the term in the sum.
    """

    output: str
    labels: str
    loss: Loss
    weight: float = 1.0


@dataclass(frozen=True)
class Task:
    """What a head is for.

    Attributes:
        name: what `from_pretrained(task=...)` is given.
        auto_class: Hugging Face's, None where there is none.
        targets: the terms of the loss; none for a task that is not trained.
        input_rank: axes of `input_ids`: [batch, tokens], or [batch, choices, tokens].
        per_token: the outputs that have an axis of tokens behind that of the batch.
        scorer: how an evaluation scores the answers beside the loss; "problem_type" as the config's
            says, by `PROBLEM_SCORERS`.
        fixed: values of the config that every model of the task has.
        named_labels: whether the labels are the config's, which have names.
        examples: what a row of training data holds; None where there is no reader.
        generates: whether the outputs are scores of the next token, so that text is made of them.
        arrays: what the model takes beside its inputs, labels of a loss of its own included.
        alone: whether a row is also taken without the axis of the batch.
        learned_by: the task of the models that learn it, where that is not its own: the loss is one
            of their outputs.
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
        """Whether there is a loss."""
        return bool(self.targets or self.learned_by)

    @property
    def model_task(self) -> str:
        """The task of the models that learn it."""
        return self.learned_by or self.name

    def scorer_for(self, problem: ProblemType) -> Scorer | None:
        """How answers are scored where the config's problem_type is `problem`."""
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
# Texts as vectors, of whose angles the losses are.
EMBEDDING = Task("embedding", scorer="retrieval", examples="pairs", learned_by="base")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(BASE, MASKED_LM, CAUSAL_LM, PRETRAINING, NEXT_SENTENCE_PREDICTION),
        *(SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING, MULTIPLE_CHOICE),
        *(CONDITIONAL_GENERATION, EMBEDDING),
    )
}

# What other families pretrain: ELECTRA finds replaced tokens, ALBERT tells the order of segments.
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

# What finds texts and answers in them (REALM).
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
