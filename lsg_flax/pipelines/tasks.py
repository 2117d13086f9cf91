"""The tasks of pipelines: they turn a text into rows for the model, and the outputs into an answer.
Tasks whose answers are spans of the text are in spans.py.

A task is a frozen dataclass whose fields are its options, with Hugging Face's names. Answers are
those of transformers 4.37, except for the differences listed in `pipelines.pipeline`.

Axes: B batch, T tokens, U tokens with an output (masked ones), V vocabulary, Y labels, D model
width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.special import softmax

from lsg_flax.files import valid_text
from lsg_flax.hub import Tokenizer
from lsg_flax.inference import Encoding, Result, Runnable, Select
from lsg_flax.models import Model, ModelConfig

Function = Literal["sigmoid", "softmax", "none"]


class PipelineError(ValueError):
    """An error that concerns every document, so that no document is skipped because of it."""


class ModelRow(NamedTuple):
    """One row for the model, and the fast tokenizer's encoding of it (None for a slow one)."""

    inputs: Encoding
    encoding: Any


@dataclass(frozen=True)
class Reader:
    """Turns texts into rows: a tokenizer with the limits of the model."""

    tokenizer: Tokenizer
    config: ModelConfig
    max_length: int
    truncation: bool

    def rows(self, *texts: str, **options: Any) -> list[ModelRow]:
        """Returns the rows of a text or a pair of texts: one row unless `options` ask for
        windows."""
        cut = {"truncation": True, "max_length": self.max_length} if self.truncation else {}
        encoded = self.tokenizer(*texts, verbose=False, **(cut | options))
        several = encoded["input_ids"] and isinstance(encoded["input_ids"][0], list)
        names = ["input_ids", "attention_mask"]
        names += ["token_type_ids"] if self.config.segments > 1 else []
        columns = {name: encoded[name] for name in names if name in encoded}
        columns = columns if several else {name: [column] for name, column in columns.items()}
        length = max(map(len, columns["input_ids"]))
        if length > self.max_length:
            raise ValueError(
                f"the text {texts[0][:60]!r} has {length} tokens, more than {self.max_length}, "
                "which this pipeline reads: "
                f"{self.config.or_convert('pass truncation=True to cut it', length)}."
            )
        details = encoded.encodings or [None] * len(columns["input_ids"])
        return [
            ModelRow(dict(zip(columns, row, strict=True)), detail)
            for *row, detail in zip(*columns.values(), details, strict=True)
        ]

    def need_offsets(self, task: str) -> None:
        """Raises ValueError for a tokenizer without the positions of tokens in the text."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise PipelineError(
                f"{task} needs the positions of tokens in the text, which the slow tokenizer "
                f"{type(self.tokenizer).__name__} does not give; use a fast one (AutoTokenizer "
                "with use_fast=True, or a folder with tokenizer.json)."
            )


@dataclass(frozen=True)
class PipelineTask:
    """The base of tasks; fields are options."""

    heads: ClassVar[dict[str, tuple[str, ...]]]  # tasks of models -> the outputs wanted

    @property
    def option_names(self) -> list[str]:
        """The names of the options."""
        return [field.name for field in fields(self)]

    def with_options(self, **options: Any) -> "PipelineTask":
        """Returns the task with other options; raises ValueError for unknown ones."""
        unknown = sorted(options.keys() - set(self.option_names))
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no options {unknown}; it has {self.option_names}."
            )
        return replace(self, **options)

    def program(
        self, model: Model, tokenizer: Tokenizer | None, mesh: Mesh | None = None
    ) -> Runnable | None:
        """Returns the program to run instead of one model call, or None; raises ValueError for
        options that do not fit the model."""
        return None

    def items(self, inputs: Any, question: Any, context: Any) -> Any:
        """Returns the documents from the caller's arguments: a single one, a list, or an iterator;
        raises ValueError for arguments of another task."""
        if question is not None or context is not None:
            raise ValueError("question= and context= are for question-answering; give the text.")
        return inputs

    def rows(self, reader: Reader, item: Any) -> list[ModelRow]:
        """Returns the rows of one document; raises ValueError for one that is no text or too
        long."""
        return reader.rows(a_text(item))

    def select(self, reader: Reader, rows: list[ModelRow]) -> Select | None:
        """Returns the function that selects which outputs leave the device; None for all."""
        return None

    def answer(self, reader: Reader, item: Any, rows: list[ModelRow], outputs: list[Result]) -> Any:
        """Returns the answer for one document; raises NotImplementedError in this base class."""
        raise NotImplementedError

    def entry(self, answer: Any) -> dict[str, Any]:
        """Returns the fields of a document's line in a file, beside its id."""
        return {"answer": answer}

    def alone(self, item: Any, answer: Any) -> Any:
        """Returns the answer for a document that was passed on its own, not in a list."""
        return answer


class _MaskLogits(NamedTuple):
    """Selects the logits [B, U, V] at the first `places` mask tokens, instead of all [B, T, V]."""

    mask_token_id: int
    places: int

    def __call__(
        self, outputs: dict[str, jax.Array], batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        (logits,) = outputs.values()
        masked = (batch["input_ids"] == self.mask_token_id).astype(jnp.int32)
        _, places = jax.lax.top_k(masked, min(self.places, masked.shape[1]))  # in their order
        return {"mask_logits": jnp.take_along_axis(logits, places[..., None], axis=1)}


@dataclass(frozen=True)
class FillMask(PipelineTask):
    """Predicts words for mask tokens: per text a list of {"score", "token", "token_str",
    "sequence"}, where "score" is a probability; for several masks a list of such lists.
    (transformers' FillMaskPipeline)

    Attributes:
        top_k: words per mask.
        targets: words to choose from; each must be one token.

    Raises:
        ValueError: if top_k is not a whole number of at least 1.
    """

    heads: ClassVar = {"masked_lm": ("logits",), "pretraining": ("prediction_logits",)}
    top_k: int = 5
    targets: str | Sequence[str] | None = None

    def __post_init__(self):
        check_positive(top_k=self.top_k)

    def rows(self, reader, item):
        """Returns the rows of one text; raises ValueError as other tasks, and if the tokenizer or
        the text has no mask token."""
        tokenizer = reader.tokenizer
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token, so nothing can be filled in.")
        rows = super().rows(reader, item)
        if tokenizer.mask_token_id not in rows[0].inputs["input_ids"]:
            left = " after truncation" if reader.truncation else ""
            raise ValueError(
                f"no mask token {tokenizer.mask_token} in {item[:60]!r}{left}; write it where a "
                "word is wanted."
            )
        return rows

    def select(self, reader, rows):
        """Returns the function that selects the logits of mask tokens."""
        mask = reader.tokenizer.mask_token_id
        most = max(row.inputs["input_ids"].count(mask) for row in rows)
        return _MaskLogits(mask, 1 << (most - 1).bit_length())  # few values, few compilations

    def answer(self, reader, item, rows, outputs):
        """Returns the words for each mask; raises ValueError for `targets` that are not one known
        token each."""
        ids = np.array(rows[0].inputs["input_ids"])
        candidates = self._candidates(reader)
        answers = []
        masked = np.flatnonzero(ids == reader.tokenizer.mask_token_id)
        for place, scores in zip(masked, softmax(outputs[0]["mask_logits"], axis=-1), strict=False):
            best = candidates[np.argsort(-scores[candidates], kind="stable")[: self.top_k]]
            words = [
                self._word(reader.tokenizer, ids, place, token, len(masked) == 1) for token in best
            ]
            answers.append([{"score": float(scores[w["token"]])} | w for w in words])
        return answers[0] if len(answers) == 1 else answers

    def _word(self, tokenizer, ids, place, token, only_mask: bool) -> dict[str, int | str]:
        filled = ids.copy()
        filled[place] = token
        text = tokenizer.decode(
            filled[filled != tokenizer.pad_token_id].tolist(),
            skip_special_tokens=only_mask,  # would hide the other masks
        )
        word = tokenizer.decode([int(token)])
        return {"token": int(token), "token_str": word, "sequence": text}

    def _candidates(self, reader: Reader) -> np.ndarray:
        if self.targets is None:
            return np.arange(reader.config.vocab_size)
        words = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        vocabulary, found = reader.tokenizer.get_vocab(), {}
        for word in words:
            ids = reader.tokenizer(word, add_special_tokens=False)["input_ids"]
            found[word] = [vocabulary[word]] if word in vocabulary else ids
        unknown = reader.tokenizer.unk_token_id
        wrong = {
            word: reader.tokenizer.convert_ids_to_tokens(ids)
            for word, ids in found.items()
            if len(ids) != 1 or (ids[0] == unknown and word != reader.tokenizer.unk_token)
        }
        if wrong or not words:
            raise ValueError(
                f"targets must be words that are one known token each; these are not: {wrong}."
                if words
                else "targets is empty; leave it out to choose from all words."
            )
        return np.unique([ids[0] for ids in found.values()])


@dataclass(frozen=True)
class TextClassification(PipelineTask):
    """Labels texts, or pairs {"text", "text_pair"}: {"label", "score"}. (transformers'
    TextClassificationPipeline)

    Attributes:
        top_k: number of labels in a list, best first (None for all); "best" for the best label
            without a list.
        function_to_apply: function from logits to scores. By default that of the config's
            problem_type: none for regression, sigmoid for several labels per text or if there is
            only one label, else softmax.

    Raises:
        ValueError: for an unknown function, and a top_k that is neither "best", None nor a whole
            number of at least 1.
    """

    heads: ClassVar = {"sequence_classification": ("logits",)}
    top_k: int | Literal["best"] | None = "best"
    function_to_apply: Function | None = None

    def __post_init__(self):
        check_choice("function_to_apply", self.function_to_apply, (None, *get_args(Function)))
        if self.top_k not in ("best", None):
            check_positive(top_k=self.top_k)

    def rows(self, reader, item):
        """Returns the rows of a text or a pair; raises ValueError as other tasks, and for a dict
        with other keys."""
        if not isinstance(item, dict):
            return super().rows(reader, item)
        if not {"text"} <= item.keys() <= {"text", "text_pair"}:
            raise ValueError(f"a document has {sorted(item)}; give 'text' and maybe 'text_pair'.")
        return reader.rows(*(a_text(item[n]) for n in ("text", "text_pair") if n in item))

    def answer(self, reader, item, rows, outputs):
        """Returns the labels with their scores, best first."""
        scores = self._scores(reader.config, outputs[0]["logits"])
        labels = [
            {"label": reader.config.labels[i], "score": float(scores[i])}
            for i in np.argsort(-scores, kind="stable")
        ]
        return labels[0] if self.top_k == "best" else labels[: self.top_k]

    def alone(self, item, answer):
        """Returns the best label of a text in a list, that of a pair without one, as transformers
        does."""
        return [answer] if self.top_k == "best" and isinstance(item, str) else answer

    def _scores(self, config: ModelConfig, logits: np.ndarray) -> np.ndarray:
        function = self.function_to_apply
        if function is None:
            several = config.problem_type == "multi_label_classification" or config.num_labels == 1
            function = "sigmoid" if several else "softmax"
            function = "none" if config.problem_type == "regression" else function
        if function == "softmax":
            return softmax(logits, axis=-1)
        return 1 / (1 + np.exp(-logits)) if function == "sigmoid" else logits


@dataclass(frozen=True)
class FeatureExtraction(PipelineTask):
    """Returns the states [T, D] of a text's tokens, with special tokens and without padding, as a
    numpy array (transformers' FeatureExtractionPipeline returns nested lists with a leading axis
    of 1)."""

    heads: ClassVar = {"base": ("last_hidden_state",)}

    def answer(self, reader, item, rows, outputs):
        """Returns the states [T, D]."""
        return outputs[0]["last_hidden_state"]


def in_float32(result: Result) -> Result:
    """Converts outputs to float32, for NumPy and JSON; integers such as token ids are unchanged."""
    return {
        name: values if np.issubdtype(values.dtype, np.integer) else values.astype(np.float32)
        for name, values in result.items()
    }


def a_text(item: object) -> str:
    """Returns the text; raises ValueError, with what was given, if it is not one."""
    if not isinstance(item, str):
        raise ValueError(f"a document must be a text, got {type(item).__name__}: {item!r:.60}.")
    return valid_text(item)


def check_max_length(model: Model, length: int) -> None:
    """Raises ValueError for a number of tokens that the model does not read."""
    longest = model.max_length
    if not 1 <= length <= longest:
        remedy = model.config.or_convert("give fewer", max(length, longest + 1))
        raise ValueError(
            f"max_length={length} must be in 1..{longest}, what this model reads; {remedy}."
        )


def check_positive(**numbers: object) -> None:
    """Raises ValueError unless all numbers are integers of at least 1."""
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name}={number!r} must be a whole number of at least 1.")


def check_choice(name: str, value: object, allowed: Iterable) -> None:
    """Raises ValueError if a value is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}.")
