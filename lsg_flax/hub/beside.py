"""Files of a checkpoint's folder beside config.json and the weights: which ones belong to the
model, are downloaded or copied with it, or would be read in another folder by mistake."""

import filecmp
import fnmatch
import os
import pathlib
import shutil
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from lsg_flax.hub.card_files import CARD, SOURCE_CARD, is_own_card, source_card
from lsg_flax.hub.sentence_files import MODULES, PROMPTS, SENTENCE_CONFIGS
from lsg_flax.hub.weights import CONFIG, GENERATION, WEIGHTS, open_tensors

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "*.model", "chat_template.*"),
)
_WEIGHT_FILES = (
    *("*.safetensors", "*.index.json", "pytorch_model*.bin", "flax_model*", "tf_model*"),
    *("model.ckpt*", "adapter_*", "model.npz"),
)
# By name, since other .json, .txt and .md may be somebody's data or notes.
_DOCUMENTS = (
    *("README*", "MODEL_CARD*", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "CITATION*"),
    *(GENERATION, "preprocessor_config.json", "processor_config.json", PROMPTS),
    *("label_map.json", "labels.json", "labels.txt", "label2id.json", "id2label.json"),
)
_SENTENCE_FILES = (MODULES, PROMPTS, SENTENCE_CONFIGS)
# Files that another conversion or save to the same folder overwrites.
_WRITTEN = (CONFIG, WEIGHTS, GENERATION, "tokenizer_config.json", MODULES, SENTENCE_CONFIGS)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_document(name: str) -> bool:
    """Whether a file is a document of the model, such as its card, licence or settings; weights,
    tokenizer and code are not."""
    return matches(name, _DOCUMENTS)


def is_model_file(name: str) -> bool:
    """Whether a file is one that models are loaded from: config, weights or tokenizer."""
    return matches(name, (CONFIG, *_WEIGHT_FILES, *TOKENIZER_FILES))


def carry_documents(source: pathlib.Path, target: pathlib.Path, *, readme: bool) -> None:
    """Copies the documents unchanged: a README only if `readme`, which says that it still holds,
    and the card under another name, because the copy gets its own card."""
    for file in sorted(source.iterdir()):
        tells_of_model = file.name.lower().startswith("readme")
        card = file.name in (CARD, SOURCE_CARD)
        if (
            file.is_file()
            and is_document(file.name)
            and not (tells_of_model and (card or not readme))
        ):
            shutil.copyfile(file, target / file.name)
    given = source_card(source) if readme else None
    if given is not None:
        shutil.copyfile(given, target / SOURCE_CARD)


def others_files(folder: pathlib.Path, new: pathlib.Path, *, ours: bool) -> list[str]:
    """Returns the files in `folder` that different files in `new` would replace.

    Args:
        ours: whether lsg_flax wrote the folder, so that config.json, weights and such may be
            replaced.
    """
    names = (str(file.relative_to(new)) for file in sorted(new.rglob("*")) if file.is_file())
    return [
        name
        for name in names
        if os.path.lexists(folder / name)
        and not (ours and matches(name, _WRITTEN))
        and not (name == CARD and is_own_card(folder / name))
        and not ((folder / name).is_file() and filecmp.cmp(folder / name, new / name, False))
    ]


def stale_files(folder: pathlib.Path, new: pathlib.Path, *, settings: bool) -> list[str]:
    """Returns files of an earlier model in `folder` that remain when the files in `new` are moved
    there, and that programs would read together with them.

    Args:
        settings: whether to include files of settings, not only weights and tokenizers.
    """
    written = {file.name for file in new.iterdir()}
    patterns = list(_WEIGHT_FILES)
    if any(matches(name, TOKENIZER_FILES) for name in written):
        patterns += TOKENIZER_FILES
    if settings:
        patterns += [*TOKENIZER_FILES, *_SENTENCE_FILES, GENERATION]
    there = sorted(file.name for file in folder.iterdir() if file.is_file())
    return [name for name in there if matches(name, patterns) and name not in written]


def lost_tensors(folder: pathlib.Path, new: pathlib.Path) -> list[str]:
    """Returns the tensors in `folder` that the model in `new` does not have, by PyTorch's names.

    A conversion trains nothing, so tables of another length have the same first rows: only a model
    that was trained, or made of another source or with other options, has such tensors.

    Raises:
        ValueError: if the weights in `folder` are damaged.
    """
    if not (folder / WEIGHTS).is_file():
        return []
    there, made = open_tensors(folder), open_tensors(new)
    return [name for name in there if name not in made or not _agree(there[name], made[name])]


def _agree(one: ArrayLike, other: ArrayLike) -> bool:
    """Whether two tensors are equal in the rows that both have."""
    one, other = (np.atleast_1d(np.asarray(tensor)) for tensor in (one, other))
    rows = min(len(one), len(other))
    alike = one.dtype == other.dtype and one.shape[1:] == other.shape[1:]
    return alike and one[:rows].tobytes() == other[:rows].tobytes()  # bytes, since NaN is not NaN
