"""Tokenizers as files in a checkpoint's folder: reads them, and copies them to other folders."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Mapping
from typing import Any

from lsg_flax.files import check_pointer, read_json
from lsg_flax.hub.beside import TOKENIZER_FILES, matches
from lsg_flax.hub.download import cached_folder
from lsg_flax.hub.json_text import with_field
from lsg_flax.hub.weights import CONFIG

# A tokenizer of transformers: importing its class takes seconds, and its annotations differ between
# versions.
Tokenizer = Any

_IMPORTING = threading.Lock()
_CONFIG = "tokenizer_config.json"
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", _CONFIG)
# Classes that newer versions of transformers lack -> an equal class that they have.
_SAME_AS = dict.fromkeys(("RealmTokenizer", "RealmTokenizerFast"), "BertTokenizerFast")
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
# Settings that may change while the vocabulary is the same, and are then changed in the file.
_SETTINGS = ("model_max_length", "padding_side", "truncation_side")


def read_tokenizer(folder: str | os.PathLike) -> Tokenizer | None:
    """Reads the tokenizer in `folder`; returns None if there are no tokenizer files.

    Raises:
        ImportError: if sentencepiece is needed to read it, and is not installed.
        ValueError: for damaged files, or if some are missing.
    """
    folder = pathlib.Path(folder)
    there = [name for name in (*_VOCABULARIES, *_SENTENCEPIECE) if (folder / name).exists()]
    if not there:
        return None
    for name in there:
        check_pointer(folder / name)
    models = [name for name in there if name in _SENTENCEPIECE]
    packages = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if models and packages and "tokenizer.json" not in there:
        raise ImportError(
            f"{folder / models[0]} is a sentencepiece model without a tokenizer.json; reading it "
            f"needs {' and '.join(packages)}: pip install 'lsg-flax[sentencepiece]'."
        )
    transformers = _transformers()
    try:
        name = _SAME_AS.get(_settings(folder).get("tokenizer_class"), "AutoTokenizer")
        known = _config_beside(folder) if name == "AutoTokenizer" else {}
        tokenizer = getattr(transformers, name).from_pretrained(str(folder), **known)
        tokenizer("\u2603")  # fails if the vocabulary has no token for unknown characters
    except BaseException as error:  # a panic in Rust is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{folder} has {', '.join(there)}, from which transformers cannot make a tokenizer "
            f"({error or type(error).__name__}); copy or download them again."
        ) from error
    # Without these files transformers 5 makes a tokenizer without words, or without merges.
    needed = [tokenizer.vocab_files_names.get(name) for name in ("vocab_file", "merges_file")]
    lacking = [name for name in needed if name and not (folder / name).exists()]
    if lacking and "tokenizer.json" not in there:
        raise ValueError(
            f"{folder} has {', '.join(there)}, but {type(tokenizer).__name__} also needs "
            f"{' and '.join(lacking)}, or tokenizer.json; copy or download them again."
        )
    return tokenizer


def _transformers() -> Any:
    """Imports transformers, which is slow, only when it is needed. Its module replaces itself while
    it is imported: without the lock a second thread would get the one without classes."""
    with _IMPORTING:
        import transformers
    return transformers


def _config_beside(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the config to pass for a model_type that transformers does not know, with the
    tokenizer's class; otherwise transformers would read config.json as another model's, with a
    warning."""
    transformers = _transformers()

    file = folder / CONFIG
    values = read_json(file) if file.is_file() else {}
    if values.get("model_type", "bert") in transformers.CONFIG_MAPPING:
        return {}
    named: dict[str, Any] = {"tokenizer_class": values.get("tokenizer_class")}
    return {"config": transformers.PretrainedConfig(**named)}


def save_tokenizer(
    tokenizer: Tokenizer, target: pathlib.Path, *, class_name: str | None = None
) -> None:
    """Writes a tokenizer's files.

    They are copies of those that it was read from, byte for byte except for settings that may
    change, above all `model_max_length`; so all versions of transformers read them as before. If
    the tokenizer's tokens or behaviour were changed since, transformers writes new files.

    Args:
        tokenizer: the tokenizer.
        target: the folder.
        class_name: added as tokenizer_class if the files have none, for a config.json whose
            model_type transformers does not know.
    """
    source = origin(tokenizer)
    fresh = None if source is None else _read_again(source)
    if source is None or fresh is None or _identity(fresh) != _identity(tokenizer):
        tokenizer.save_pretrained(target)
        return
    names = (*TOKENIZER_FILES, *tokenizer.vocab_files_names.values())
    for file in sorted(source.iterdir()):
        if file.is_file() and (matches(file.name, names) or file.name in _code_of(source)):
            shutil.copyfile(file, target / file.name)
    changed = {
        name: getattr(tokenizer, name)
        for name in _SETTINGS
        if getattr(tokenizer, name) != getattr(fresh, name)
    }
    file = target / _CONFIG
    text = file.read_bytes().decode() if file.exists() else "{}\n"
    if class_name and "tokenizer_class" not in json.loads(text):
        changed["tokenizer_class"] = class_name
    if changed:
        for name, value in changed.items():
            text = with_field(text, name, value)
        file.write_bytes(text.encode())


def check_languages(tokenizer: Tokenizer, given: Mapping[str, str | None]) -> None:
    """Raises ValueError for language codes, by the names of their options, that a multilingual
    tokenizer does not have."""
    known = sorted(tokenizer.all_special_tokens)
    if not set(given.values()) <= set(known):
        words = ", ".join(f"{name}={code!r}" for name, code in given.items())
        raise ValueError(f"{words}: both must be languages of the tokenizer, among {known}.")


def origin(tokenizer: Tokenizer) -> pathlib.Path | None:
    """Returns the folder that a tokenizer was read from; None if it is not on this machine."""
    name = str(getattr(tokenizer, "name_or_path", None) or "")
    if name and os.path.isdir(name):
        return pathlib.Path(name)
    return cached_folder(name) if name else None


def portable_class(tokenizer: Tokenizer) -> str:
    """Returns the name of the tokenizer's class that every version of transformers knows."""
    name = type(tokenizer).__name__
    generic = "PreTrainedTokenizerFast"
    return generic if name in (generic, "TokenizersBackend") else name.removesuffix("Fast")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _read_again(folder: pathlib.Path) -> Tokenizer | None:
    """Reads the tokenizer again; None if the files are missing or damaged now."""
    try:
        return read_tokenizer(folder)
    except (ImportError, ValueError):
        return None


def _identity(tokenizer: Tokenizer) -> list[Any]:
    """Everything that decides which ids the tokenizer gives for a text."""
    known = [type(tokenizer), str(tokenizer.special_tokens_map), tokenizer.chat_template]
    if not tokenizer.is_fast:
        ignored = {"name_or_path", *_SETTINGS}
        options = {k: str(v) for k, v in tokenizer.init_kwargs.items() if k not in ignored}
        return [*known, options, tokenizer.get_vocab()]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return [*known, backend | {"truncation": None, "padding": None}]  # left by the last call


def _settings(folder: pathlib.Path) -> Any:
    file = folder / _CONFIG
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def _code_of(folder: pathlib.Path) -> set[str]:
    """The modules of custom tokenizer code that tokenizer_config.json refers to."""
    named = _settings(folder).get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    references = named if isinstance(named, list) else [named]
    plain = (r for r in references if isinstance(r, str) and re.fullmatch(r"\w+\.\w+", r))
    return {f"{reference.split('.')[0]}.py" for reference in plain}
