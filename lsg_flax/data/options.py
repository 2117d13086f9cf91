"""Options of data: the task, and how rows become examples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from lsg_flax.data.files import OnError, TextUnit
from lsg_flax.models import TASKS, ProblemType

DEFAULT_PROBLEM: ProblemType = "single_label_classification"


def readable_tasks() -> list[str]:
    """Returns the names of the tasks whose rows can be read."""
    return [name for name, task in TASKS.items() if task.examples]


@dataclass(frozen=True)
class Columns:
    """Names of the data's columns. `id` and `text_pair` may be missing in a row.

    Attributes:
        label: label of a text, or the right choice; a list of labels for multi-label.
        tokens: the words of a text, for token classification; `tags` are their labels.
        answers: {"text": [...], "answer_start": [...]} as in SQuAD, both empty if the context has
            no answer.
        target: the text that the model learns to generate for `text`.
        positive: a text that belongs to `text` and shall get a similar embedding.
        negative: a text that does not belong to `text`, or a list of several.
        choices: the texts to choose from, each read as a pair with `text`.
    """

    id: str = "id"
    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    tokens: str = "tokens"
    tags: str = "tags"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    choices: str = "choices"
    target: str = "target"
    positive: str = "positive"
    negative: str = "negative"


@dataclass(frozen=True)
class DataOptions:
    """How rows become examples.

    Attributes:
        task: the task that the examples are for.
        max_length: maximum tokens of a row; longer texts are truncated, contexts of questions are
            split into windows, and joined texts of language models into pieces of this length.
        max_target_length: maximum tokens of a target text; longer ones are truncated; None
            truncates none.
        problem_type: what `sequence_classification` predicts.
        labels: names of the labels in the order of their ids; by default the names found in the
            data, sorted, or the numbers 0 to the largest. For evaluation data give those of the
            training data.
        width: regression: how many numbers a row has, by default as many as the first row. For
            evaluation data give that of the training data.
        with_labels: False reads data without labels, to predict them; for embeddings it makes the
            positive optional.
        pack: language models: join the texts and split them into pieces of `max_length`. False
            makes a row of each text.
        stride: question answering: tokens that consecutive windows share.
        token_type_ids: keep them if the tokenizer returns any; False for a model without them.
        text_unit: whether a line or a whole file counts as one text in .txt files.
        on_error: what to do with a broken row.
        columns: names of the columns.
        lower_case: embeddings: convert texts to lower case first.

    Raises:
        ValueError: for an unknown choice, or a number that is too small.
    """

    task: str
    max_length: int
    problem_type: ProblemType = DEFAULT_PROBLEM
    labels: tuple[str, ...] | None = None
    width: int | None = None
    with_labels: bool = True
    pack: bool = True
    stride: int = 128
    token_type_ids: bool = True
    text_unit: TextUnit = "line"
    on_error: OnError = "raise"
    columns: Columns = field(default_factory=Columns)
    max_target_length: int | None = None
    lower_case: bool = False

    def __post_init__(self):
        allowed: dict[str, Sequence[str]] = {
            "task": readable_tasks(),
            "problem_type": get_args(ProblemType),
            "text_unit": get_args(TextUnit),
            "on_error": get_args(OnError),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {list(choices)}."
                )
        self._check_numbers()
        self._check_labels()

    def _check_numbers(self) -> None:
        if self.max_length < 1 or self.stride < 0:
            raise ValueError(
                f"max_length={self.max_length} must be at least 1 and stride={self.stride} at "
                "least 0."
            )
        if self.width is not None and (self.problem_type != "regression" or self.width < 1):
            raise ValueError(
                f"width={self.width} must be at least 1, and is only for "
                f"problem_type='regression', not {self.problem_type!r}."
            )
        if self.max_target_length is not None:
            if not self.has_target_texts:
                raise ValueError(
                    f"max_target_length={self.max_target_length} is for tasks that generate text, "
                    f"not {self.task}; leave it out."
                )
            if self.max_target_length < 2:  # room only for special tokens
                raise ValueError(f"max_target_length={self.max_target_length} must be at least 2.")

    def _check_labels(self) -> None:
        named = [name for name, task in TASKS.items() if task.named_labels and task.examples]
        regression = self.problem_type == "regression"
        if self.labels is not None and (self.task not in named or regression):
            raise ValueError(
                f"labels={self.labels} are for {' and '.join(named)}, and not for regression; "
                "leave them out."
            )
        several = [
            name
            for name, task in TASKS.items()
            if any(target.loss == "problem_type" for target in task.targets)
        ]
        if self.task not in several and self.problem_type != DEFAULT_PROBLEM:
            raise ValueError(
                f"problem_type={self.problem_type!r} is for {' and '.join(several)}, not "
                f"{self.task}; leave it out."
            )
        names = [name for name in self.labels or () if name.strip()]
        if self.labels is not None and len(set(names)) < max(len(self.labels), 1):
            raise ValueError(
                f"labels={self.labels} must be different names, at least one and none empty."
            )

    @property
    def packed(self) -> bool:
        """Whether texts are joined and split into rows (`pack`)."""
        return self.pack and TASKS[self.task].examples in ("masked_text", "running_text")

    @property
    def has_target_texts(self) -> bool:
        """Whether a row has a target text."""
        return TASKS[self.task].examples == "text_to_text"

    @property
    def has_pairs(self) -> bool:
        """Whether a row has a text with positives or negatives."""
        return TASKS[self.task].examples == "pairs"

    @property
    def label_column(self) -> str | None:
        """The column of labels with names or ids from 0; None if there is none."""
        columns = {"text": self.columns.label, "words": self.columns.tags}
        task = TASKS[self.task]
        if not task.targets or not self.with_labels or self.problem_type == "regression":
            return None
        return columns.get(task.examples or "")
