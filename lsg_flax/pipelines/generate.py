"""The tasks of pipelines that generate text with `lsg_flax.generate`.

Axes: B batch, T tokens.
"""

import contextlib
import functools
import json
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsg_flax.generation import OPTION_NAMES, GenerateOptions, check_options, generate
from lsg_flax.hub import Tokenizer, check_languages
from lsg_flax.inference import json_line
from lsg_flax.models import Model, ModelConfig, Params
from lsg_flax.pipelines.tasks import PipelineTask, a_text

_LIMITS = {"max_length", "max_new_tokens"}


@dataclass(frozen=True)
class Text2TextGeneration(PipelineTask):
    """Generates text with an encoder-decoder: {"generated_text"}, or a list of these if
    num_return_sequences asks for several. (transformers' Text2TextGenerationPipeline)

    The options of `generate` are options too; `max_length` then limits generated tokens. Defaults
    are the checkpoint's, first those in its task_specific_params for the task; their `prefix`, or
    that of config.json, is put before each text.

    Attributes:
        clean_up_tokenization_spaces: whether to remove spaces before punctuation.
        seed: seed of sampling with do_sample; equal batches give equal samples.
        written: the options of `generate`.
    """

    heads: ClassVar = {"conditional_generation": ("sequences",)}
    task: ClassVar = "text2text-generation"  # in a checkpoint's task_specific_params
    key: ClassVar = "generated_text"
    clean_up_tokenization_spaces: bool = False
    seed: int = 0
    written: GenerateOptions = field(default_factory=GenerateOptions)

    @property
    def option_names(self):
        """The names of the options, those of `generate` included."""
        own = [name for name in super().option_names if name != "written"]
        return [*own, *OPTION_NAMES]

    def with_options(self, **options):
        """Returns the task with other options. Of `max_length` and `max_new_tokens` the last given
        one counts. Raises ValueError for unknown options."""
        before: dict[str, Any] = {**self.written}
        given = {name: options.pop(name) for name in OPTION_NAMES if name in options}
        if given.keys() & _LIMITS:  # these exclude each other: the last given one counts
            before = {name: value for name, value in before.items() if name not in _LIMITS}
        written = dict(sorted({**before, **given}.items()))
        return replace(super().with_options(**options), written=written)

    def rows(self, reader, item):
        """Returns the rows of the prefix and one text; raises ValueError as other tasks, and for
        task_specific_params of the checkpoint that are no objects."""
        prefix = self._stored(reader.config).get("prefix", reader.config.other("prefix", None))
        return reader.rows((prefix or "") + a_text(item))

    def program(self, model, tokenizer, mesh=None):
        """Returns a program that runs `generate`; raises ValueError for options that do not fit the
        model, and a tokenizer with other special tokens than the checkpoint's."""
        if tokenizer is not None:
            _check_tokenizer(tokenizer, model.config)
        stored = self._stored(model.config)
        if stored:  # defaults of the checkpoint, which the caller may override
            others = json.loads(model.config.extra)
            others["generation_config"] = model.config.other("generation_config", {}) | stored
            extra = json.dumps(others, sort_keys=True)
            model = model.clone(config=replace(model.config, extra=extra))
        return _text_program(
            model, json_line(self._options(model.config, tokenizer)), self.seed, mesh
        )

    def _stored(self, config: ModelConfig) -> Mapping[str, Any]:
        """The checkpoint's settings for this task."""
        by_task = _task_specific(config)
        return by_task.get(self._name_among(by_task)) or {}

    def _name_among(self, names: Collection[str]) -> str:
        """The checkpoint's name of this task."""
        return self.task

    def _options(self, config: ModelConfig, tokenizer: Tokenizer | None) -> Mapping[str, Any]:
        """The options of `generate`."""
        return self.written

    def answer(self, reader, item, rows, outputs):
        """Returns the text, or the texts if several are generated."""
        answers = [{self.key: self._text(reader.tokenizer, ids)} for ids in outputs[0]["sequences"]]
        return answers[0] if len(answers) == 1 else answers

    def _text(self, tokenizer: Tokenizer, ids: np.ndarray) -> str:
        cleaned = {"clean_up_tokenization_spaces": self.clean_up_tokenization_spaces}
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True, **cleaned)

    def alone(self, item, answer):
        """Returns a list even of one text, as transformers does."""
        return [answer] if isinstance(answer, dict) else answer


@dataclass(frozen=True)
class Summarization(Text2TextGeneration):
    """Generates summaries: {"summary_text"}; otherwise as `Text2TextGeneration`. In files the
    summary is in "summary"."""

    task: ClassVar = "summarization"
    key: ClassVar = "summary_text"

    def entry(self, answer):
        """Returns {"summary": ...}."""
        several = isinstance(answer, list)
        return {"summary": [a[self.key] for a in answer] if several else answer[self.key]}


@dataclass(frozen=True)
class Translation(Text2TextGeneration):
    """Generates translations: {"translation_text"}; otherwise as `Text2TextGeneration`.

    Attributes:
        src_lang, tgt_lang: language codes of a multilingual tokenizer, such as mBART's "en_XX"; or
            those of a checkpoint with settings for several pairs, such as "translation_en_to_ro".
            The tokenizer is set to src_lang, as in transformers.
    """

    task: ClassVar = "translation"
    key: ClassVar = "translation_text"
    src_lang: str | None = None
    tgt_lang: str | None = None

    def rows(self, reader, item):
        """Returns the rows of one text in src_lang; raises ValueError for languages that the
        tokenizer or the checkpoint does not have."""
        tokenizer = reader.tokenizer
        if self._has_languages(reader.config, tokenizer) and tokenizer.src_lang != self.src_lang:
            tokenizer.src_lang = self.src_lang
        return super().rows(reader, item)

    def _name_among(self, names):
        names = [name for name in names if name.startswith(self.task)]
        if self.src_lang and self.tgt_lang:  # en_XX and ro_RO are translation_en_to_ro
            return f"{self.task}_{self.src_lang[:2]}_to_{self.tgt_lang[:2]}"
        if len(names) > 1:
            raise ValueError(
                f"the checkpoint has settings for {names}: give src_lang and tgt_lang, or one of "
                "these names as the task."
            )
        return names[0] if names else self.task

    def _options(self, config, tokenizer):
        if tokenizer is None or not self._has_languages(config, tokenizer):
            return self.written
        first = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(self.tgt_lang)}
        return {**first, **self.written}

    def _has_languages(self, config: ModelConfig, tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer is multilingual; raises ValueError for unknown languages, and if it
        needs languages and none are given."""
        given = {"src_lang": self.src_lang, "tgt_lang": self.tgt_lang}
        words = ", ".join(f"{name}={code!r}" for name, code in given.items())
        if not hasattr(tokenizer, "src_lang"):
            by_task = _task_specific(config)
            if any(given.values()) and self._name_among(by_task) not in by_task:
                name = type(tokenizer).__name__
                raise ValueError(
                    f"{words}: {name} has no languages, and config.json has settings only for "
                    f"{sorted(by_task)}; leave them out."
                )
            return False
        check_languages(tokenizer, given)
        return True


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises ValueError if the tokenizer's end or padding token is not the checkpoint's."""
    for name in ("eos_token", "pad_token"):
        given, wanted = getattr(tokenizer, f"{name}_id"), getattr(config, f"{name}_id")
        if wanted is not None and given != wanted:
            raise ValueError(
                f"the tokenizer's {name} is {getattr(tokenizer, name)!r} with the id {given}, but "
                f"config.json has {name}_id={wanted}: tokenizer and checkpoint do not belong "
                "together; give the one that the model was trained with."
            )


def _task_specific(config: ModelConfig) -> dict[str, dict[str, Any] | None]:
    """The checkpoint's settings by names of tasks of pipelines."""
    found = config.other("task_specific_params", None) or {}
    fits = isinstance(found, dict) and all(isinstance(v, dict | None) for v in found.values())
    if not fits:
        raise ValueError(
            f"task_specific_params={found!r:.80} in config.json must be an object with an object "
            "for each task; correct it or remove it."
        )
    return found


class TextProgram:
    """The program that a `Predictor` runs instead of the model: `generate` on batches."""

    def __init__(self, model: Model, options: str, seed: int, mesh: Mesh | None):
        """Checks the options, given as JSON."""
        self._model, self._mesh = model, mesh
        self._options: GenerateOptions = json.loads(options)
        self._key = jax.random.key(seed)
        self._shapes: set[tuple[int, ...]] = set()
        check_options(model, self._options)

    @property
    def compilations(self) -> int:
        """The number of compiled programs: one for each shape of a batch."""
        return len(self._shapes)

    def start(self, params: Params, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns the tokens [B, returned texts, T] of a batch."""
        real = np.any(batch["attention_mask"], axis=1, keepdims=True)[:, 0]
        rows = np.where(real, np.arange(len(real)), 0)  # empty rows would generate to the limit
        ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
        self._shapes.add(ids.shape)
        key = jax.random.fold_in(self._key, zlib.crc32(ids.tobytes()))  # equal after resuming
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            # The batch is already padded to a bucket.
            given = {**self._options, "key": key, "bucket": 1}
            tokens = generate(self._model, params, ids, mask, **given)
        return {"sequences": jnp.asarray(tokens.reshape(len(ids), -1, tokens.shape[-1]))}


_text_program: Callable[..., TextProgram] = functools.lru_cache(maxsize=16)(TextProgram)
