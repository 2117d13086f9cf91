"""Downloads repositories of the Hugging Face hub to local folders: only the files that a checkpoint
needs, and only once."""

import os
import pathlib
from collections.abc import Iterable, Sequence

from lsg_flax.hub.beside import TOKENIZER_FILES, is_document, matches
from lsg_flax.hub.sentence_files import MODULES, PROMPTS, SENTENCE_CONFIGS, read_modules
from lsg_flax.hub.weights import (
    BIN,
    BIN_INDEX,
    CONFIG,
    INDEX,
    MSGPACK,
    MSGPACK_INDEX,
    WEIGHTS,
)

CONFIG_FILES = (f"*{CONFIG}", MODULES)
TOKENIZER_ALONE = (CONFIG, *TOKENIZER_FILES)
_CODE = ("modeling_lsg_*.py", "tokenization_*.py")  # copied along, never run
_SETTINGS = (CONFIG, MODULES, PROMPTS, SENTENCE_CONFIGS, *TOKENIZER_FILES, *_CODE)
# Formats of weights, the preferred one first: the file that shows the format, and all its files.
_WEIGHTS = (
    (WEIGHTS, (WEIGHTS,)),
    (INDEX, (INDEX, "*.safetensors")),
    (BIN, (BIN,)),
    (BIN_INDEX, (BIN_INDEX, "pytorch_model-*.bin")),
    (MSGPACK, (MSGPACK,)),
    (MSGPACK_INDEX, (MSGPACK_INDEX,)),  # refused with its own message
)


def resolve(path_or_id: str | os.PathLike, files: Sequence[str] | None = None) -> pathlib.Path:
    """Returns the local folder of a checkpoint, after downloading it if it is a hub id.

    Args:
        path_or_id: a folder or a hub id.
        files: patterns of the files to download; by default all that the checkpoint needs, with
            weights in one format. Without a network the files downloaded before are used.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a repository.
    """
    folder = pathlib.Path(path_or_id)
    if not os.fspath(path_or_id).strip():
        raise FileNotFoundError(
            f"the model is {str(path_or_id)!r}, which is empty; give a folder ('.' is the current "
            "one) or a hub id."
        )
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{name} is not a folder; give the folder that holds {CONFIG}, or a hub id such as "
            "'bert-base-uncased'."
        )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _download(name, files)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is neither a local folder nor a repository that the hub let us download: "
            f"{error}"
        ) from error


def cached_folder(name: str) -> pathlib.Path | None:
    """Returns the local copy of a repository that was downloaded before; None if there is none."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def needed_files(there: Sequence[str], modules: Iterable[str] = ()) -> list[str]:
    """Returns the files of a repository that a checkpoint needs: weights in one format, config,
    tokenizer, and the documents that are copied along.

    Args:
        there: all files of the repository.
        modules: folders of sentence-transformers' modules in it, of which everything is needed
            except weights in a second format.
    """
    needed = []
    for folder in ("", *modules):
        start = f"{folder}/" if folder else ""
        inside = [name.removeprefix(start) for name in there if name.startswith(start)]
        inside = [name for name in inside if "/" not in name]
        weights = next((files for sign, files in _WEIGHTS if sign in inside), ())
        needed += [
            start + name
            for name in inside
            if matches(name, (*weights, *_SETTINGS))
            or (name.endswith((".json", ".txt")) if folder else is_document(name))
        ]
    return needed


def _download(name: str, files: Sequence[str] | None) -> pathlib.Path:
    import huggingface_hub

    first = [CONFIG, MODULES] if files is None else list(files)
    folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=first))
    if files is not None:
        return folder
    try:
        there = huggingface_hub.HfApi().list_repo_files(name)
    except Exception as error:  # offline: the error type depends on huggingface_hub's version
        places = [folder, *(place for _, place in read_modules(folder))]
        if any((place / sign).exists() for place in places for sign, _ in _WEIGHTS):
            return folder
        raise FileNotFoundError(f"its weights were not downloaded before; {error}") from error
    modules = [place.relative_to(folder).as_posix() for _, place in read_modules(folder)]
    needed = needed_files(there, [place for place in modules if place != "."])
    return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=needed))
