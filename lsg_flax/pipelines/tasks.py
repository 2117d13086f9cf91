"""The tasks of pipelines: from a text to rows for the model, and from its outputs to the answer.
Those whose answers are places in the text are in spans.py.

A task is a frozen dataclass: its fields are the options, by Hugging Face's names. Answers are those
of transformers 4.37 but for what `pipelines.pipeline` lists.

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
from jaxtyping import Float

from lsg_flax.files import valid_text
from lsg_flax.hub import Tokenizer
from lsg_flax.inference import Encoding, Result, Runnable, Select
from lsg_flax.models import Model, ModelConfig

Function = Literal["sigmoid", "softmax", "none"]


class PipelineError(ValueError):
    """What is wrong is wrong for every document: none is skipped for it."""


class ModelRow(NamedTuple):
    """One row for the model, and what a fast tokenizer knows of it (None from a slow one)."""

    inputs: Encoding
    encoding: Any


@dataclass(frozen=True)
class Reader:
    """The tokenizer, and what the model takes of it."""

    tokenizer: Tokenizer
    config: ModelConfig
    max_length: int
    truncation: bool

    def rows(self, *texts: str, **options: Any) -> list[ModelRow]:
        """A text or a pair of them, in one row unless `options` ask for windows."""
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
        """Raises ValueError for a tokenizer that does not know where in the text a token lies."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise PipelineError(
                f"{task} needs the places of tokens in the text, which "
                f"{type(self.tokenizer).__name__} as a slow tokenizer does not know; give a fast "
                "one (AutoTokenizer with use_fast=True, or a folder with tokenizer.json)."
            )


@dataclass(frozen=True)
class PipelineTask:
    """What a pipeline does; fields are its options."""

    heads: ClassVar[dict[str, tuple[str, ...]]]  # tasks of models -> the outputs wanted

    @property
    def option_names(self) -> list[str]:
        """The options that there are."""
        return [field.name for field in fields(self)]

    def with_options(self, **options: Any) -> "PipelineTask":
        """The task with other options; raises ValueError for those that it does not have."""
        unknown = sorted(options.keys() - set(self.option_names))
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no options {unknown}; it has {self.option_names}."
            )
        return replace(self, **options)

    def program(
        self, model: Model, tokenizer: Tokenizer | None, mesh: Mesh | None = None
    ) -> Runnable | None:
        """What is run in place of one call of the model; raises ValueError for options that do not
        fit the model."""
        return None

    def items(self, inputs: Any, question: Any, context: Any) -> Any:
        """The documents in what the caller gave: a single one, a list, or an iterator."""
        if question is not None or context is not None:
            raise ValueError("question= and context= are for question-answering; give the text.")
        return inputs

    def rows(self, reader: Reader, item: Any) -> list[ModelRow]:
        """The rows of one document."""
        return reader.rows(a_text(item))

    def select(self, reader: Reader, rows: list[ModelRow]) -> Select | None:
        """What of the outputs leaves the device."""
        return None

    def answer(self, reader: Reader, item: Any, rows: list[ModelRow], outputs: list[Result]) -> Any:
        """The answer for one document."""
        raise NotImplementedError

    def entry(self, answer: Any) -> dict[str, Any]:
        """What a line of a file says of a document beside its id."""
        return {"answer": answer}

    def alone(self, item: Any, answer: Any) -> Any:
        """The answer of a document that was given by itself, not in a list."""
        return answer


class _MaskLogits(NamedTuple):
    """The logits [B, U, V] at the first `places` mask tokens, instead of all [B, T, V]."""

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
    """Words for mask tokens: per text a list of {"score", "token", "token_str", "sequence"}, for
    several masks a list of such lists.

    Attributes:
        top_k: words per mask.
        targets: words to choose from; each must be one token.
    """

    heads: ClassVar = {"masked_lm": ("logits",), "pretraining": ("prediction_logits",)}
    top_k: int = 5
    targets: str | Sequence[str] | None = None

    def __post_init__(self):
        check_positive(top_k=self.top_k)

    def rows(self, reader, item):
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
        mask = reader.tokenizer.mask_token_id
        most = max(row.inputs["input_ids"].count(mask) for row in rows)
        return _MaskLogits(mask, 1 << (most - 1).bit_length())  # few values, few compilations

    def answer(self, reader, item, rows, outputs):
        ids = np.array(rows[0].inputs["input_ids"])
        candidates = self._candidates(reader)
        answers = []
        masked = np.flatnonzero(ids == reader.tokenizer.mask_token_id)
        for place, scores in zip(masked, softmax(outputs[0]["mask_logits"]), strict=False):
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
    """Labels of texts or {"text", "text_pair"}: {"label", "score"}.

    Attributes:
        top_k: how many labels, best first (None: all), as a list; "best" is the best one by itself.
        function_to_apply: from logits to scores. By default that of the config's problem_type:
            none for regression, sigmoid for several labels per text or where there is only one
            label, else softmax.
    """

    heads: ClassVar = {"sequence_classification": ("logits",)}
    top_k: int | Literal["best"] | None = "best"
    function_to_apply: Function | None = None

    def __post_init__(self):
        check_choice("function_to_apply", self.function_to_apply, (None, *get_args(Function)))
        if self.top_k not in ("best", None):
            check_positive(top_k=self.top_k)

    def rows(self, reader, item):
        if not isinstance(item, dict):
            return super().rows(reader, item)
        if not {"text"} <= item.keys() <= {"text", "text_pair"}:
            raise ValueError(f"a document has {sorted(item)}; give 'text' and maybe 'text_pair'.")
        return reader.rows(*(a_text(item[n]) for n in ("text", "text_pair") if n in item))

    def answer(self, reader, item, rows, outputs):
        scores = self._scores(reader.config, outputs[0]["logits"])
        labels = [
            {"label": reader.config.labels[i], "score": float(scores[i])}
            for i in np.argsort(-scores, kind="stable")
        ]
        return labels[0] if self.top_k == "best" else labels[: self.top_k]

    def alone(self, item, answer):
        return [answer] if self.top_k == "best" and isinstance(item, str) else answer

    def _scores(self, config: ModelConfig, logits: np.ndarray) -> np.ndarray:
        function = self.function_to_apply
        if function is None:
            several = config.problem_type == "multi_label_classification" or config.num_labels == 1
            function = "sigmoid" if several else "softmax"
            function = "none" if config.problem_type == "regression" else function
        if function == "softmax":
            return softmax(logits)
        return 1 / (1 + np.exp(-logits)) if function == "sigmoid" else logits


@dataclass(frozen=True)
class FeatureExtraction(PipelineTask):
    """The states [T, D] of a text's tokens, special ones included and padding not, as a numpy array
    (transformers gives nested lists with an axis of 1 in front)."""

    heads: ClassVar = {"base": ("last_hidden_state",)}

    def answer(self, reader, item, rows, outputs):
        return outputs[0]["last_hidden_state"]


def in_float32(result: Result) -> Result:
    """An output's numbers, of half precision maybe, for NumPy and JSON; token ids as they are."""
    return {
        name: values if np.issubdtype(values.dtype, np.integer) else values.astype(np.float32)
        for name, values in result.items()
    }


def a_text(item: object) -> str:
    """The text, or a ValueError that says what was given."""
    if not isinstance(item, str):
        raise ValueError(f"a document must be a text, got {type(item).__name__}: {item!r:.60}.")
    return valid_text(item)


def check_positive(**numbers: object) -> None:
    """Raises ValueError for anything but a whole number from 1."""
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name}={number!r} must be a whole number of at least 1.")


def check_choice(name: str, value: object, allowed: Iterable) -> None:
    """Raises ValueError for a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}.")


def softmax(logits: Float[np.ndarray, "*N Y"]) -> Float[np.ndarray, "*N Y"]:
    """Over the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)
