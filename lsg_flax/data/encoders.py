"""Chooses the encoder that reads the rows of a task."""

from typing import Any

from lsg_flax.data.files import Problems
from lsg_flax.data.options import DataOptions
from lsg_flax.data.pairs import PairExampleEncoder
from lsg_flax.data.tasks import (
    ChoiceExampleEncoder,
    ExampleEncoder,
    PackedTextEncoder,
    QuestionExampleEncoder,
    TargetTextExampleEncoder,
    TextExampleEncoder,
    WordExampleEncoder,
)
from lsg_flax.models import TASKS, Examples

_ENCODERS: dict[Examples, type[ExampleEncoder]] = {
    "words": WordExampleEncoder,
    "question": QuestionExampleEncoder,
    "choices": ChoiceExampleEncoder,
    "text_to_text": TargetTextExampleEncoder,
    "pairs": PairExampleEncoder,
}


def make_encoder(
    options: DataOptions, tokenizer: Any, labels: tuple[str, ...] | None, problems: Problems
) -> ExampleEncoder:
    """Returns the encoder of the task's examples.

    Raises:
        ValueError: for a tokenizer that cannot be used for the task.
    """
    examples = TASKS[options.task].examples or "text"
    if examples == "masked_text" and tokenizer.mask_token_id is None:
        raise ValueError(
            f"{options.task} needs a tokenizer with a mask token; this one has none. Use another "
            "tokenizer, or another task such as causal_lm."
        )
    kind = PackedTextEncoder if options.packed else _ENCODERS.get(examples, TextExampleEncoder)
    return kind(options, tokenizer, labels, problems)
