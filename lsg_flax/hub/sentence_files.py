"""The files of sentence-transformers beside a checkpoint: its modules and their settings.

modules.json lists the Transformer (in the folder itself or a subfolder), a Pooling, and optionally
a Normalize; each of the latter has its own folder.
"""

import pathlib
import shutil
from typing import Any, NamedTuple, get_args

from lsg_flax.files import read_json, write_json
from lsg_flax.hub.json_text import with_field
from lsg_flax.models import Pooling

Modules = list[tuple[str, pathlib.Path]]
MODULES, SENTENCES = "modules.json", "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
SENTENCE_CONFIGS = "sentence_*_config.json"  # some models have other names for SENTENCES
_PREFIX = "pooling_mode_"
# sentence-transformers' names. It knows no globals; their state is that of the first token.
_NAMES: dict[Pooling, str] = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "max": "max_tokens",
    "global": "cls_token",
}


def read_modules(folder: pathlib.Path) -> Modules:
    """Returns class name and folder of each module of a sentence-transformers model, the
    Transformer first; empty if there is no modules.json.

    Raises:
        ValueError: if modules.json is damaged, or its first module is not a Transformer.
    """
    if not (folder / MODULES).exists():
        return []
    modules = []
    for module in read_json(folder / MODULES, list):
        given = module if isinstance(module, dict) else {}
        kind, path = given.get("type"), given.get("path")
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ValueError(f"{folder / MODULES}: {module} has no type or no path.")
        place = pathlib.PureWindowsPath(path)  # understands both kinds of slashes, and drives
        if place.anchor or ".." in place.parts or (modules and not place.parts):
            raise ValueError(f"{folder / MODULES}: {kind} must have a subfolder, not {path!r}.")
        modules.append((kind.rpartition(".")[2], folder / path))
    if not modules or not modules[0][0].endswith("Transformer"):  # there is also MLMTransformer
        kinds = [kind for kind, _ in modules]
        raise ValueError(f"{folder / MODULES} lists {kinds}; the first must be a Transformer.")
    return modules


def read_sentence_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns sentence-transformers' settings of the Transformer in `folder`."""
    file = _sentence_config(folder)
    return read_json(file) if file else {}


def carry_modules(root: pathlib.Path, modules: Modules, target: pathlib.Path, length: int) -> None:
    """Copies the files that make `target` a sentence-transformers model like `root`, for a
    Transformer that is in `target` itself and reads `length` tokens."""
    if modules[0][1] == root:
        shutil.copyfile(root / MODULES, target / MODULES)
    else:
        listed = read_json(root / MODULES, list)
        listed[0]["path"] = ""
        write_json(target, {MODULES: listed})
    file, text = _sentence_config(modules[0][1]), "{}\n"
    if file:
        read_json(file)  # raises if it is not an object
        text = file.read_bytes().decode()
    (target / SENTENCES).write_bytes(with_field(text, "max_seq_length", length).encode())
    for _, folder in modules[1:]:
        if folder.is_dir():  # a module without settings may have none
            shutil.copytree(folder, target / folder.relative_to(root), dirs_exist_ok=True)


def _sentence_config(folder: pathlib.Path) -> pathlib.Path | None:
    """The file of settings, under any of its names."""
    files = [folder / SENTENCES, *sorted(folder.glob(SENTENCE_CONFIGS))]
    return next((file for file in files if file.exists()), None)


class SentenceSettings(NamedTuple):
    """How texts become embeddings, as sentence-transformers' files say.

    Attributes:
        pooling: how the states of a text's tokens become one vector.
        normalize: whether vectors are scaled to length 1.
        max_length: number of tokens to which texts are truncated, special tokens included; None if
            the files do not say.
        do_lower_case: whether texts are lower-cased before tokenization.
    """

    pooling: Pooling
    normalize: bool = False
    max_length: int | None = None
    do_lower_case: bool = False


def read_sentence_settings(
    root: pathlib.Path, modules: Modules, pooling: Pooling | None
) -> SentenceSettings:
    """Reads the settings of the folder `root` with these modules.

    Args:
        root: the folder.
        modules: from `read_modules`.
        pooling: replaces the folder's own; required without modules.

    Raises:
        FileNotFoundError, ValueError: for files that are missing or damaged, and for modules and
            settings that lsg_flax does not support.
    """
    if not modules:
        if pooling is None:
            raise ValueError(
                f"{root} has no {MODULES}, which would say how to pool; pass pooling=, one of "
                f"{', '.join(get_args(Pooling))}."
            )
        return SentenceSettings(pooling)
    kinds = [kind for kind, _ in modules]
    if kinds not in (known := ["Transformer", "Pooling"], [*known, "Normalize"]):
        raise ValueError(
            f"{root / MODULES} lists {kinds}; supported are Transformer, Pooling and then, "
            "optionally, Normalize."
        )
    prompts = root / PROMPTS
    if prompts.exists() and read_json(prompts).get("default_prompt_name"):
        raise ValueError(
            f"{prompts} puts a prompt before every text (default_prompt_name), which is not "
            "supported; set it to null and add the prompt to your texts."
        )
    settings = read_sentence_config(modules[0][1])
    length = settings.get("max_seq_length")
    if not isinstance(length, int | None):
        raise ValueError(f"max_seq_length={length!r} in {modules[0][1]} must be a whole number.")
    return SentenceSettings(
        pooling or _read_pooling(modules[1][1] / "config.json"),
        "Normalize" in kinds,
        length,
        bool(settings.get("do_lower_case")),
    )


def _read_pooling(file: pathlib.Path) -> Pooling:
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; pass pooling=.")
    values = read_json(file)
    chosen = [n.removeprefix(_PREFIX) for n, on in values.items() if n.startswith(_PREFIX) and on]
    new_form = values.get("pooling_mode", [])  # instead of the flags: "mean", or a list
    chosen += [new_form] if isinstance(new_form, str) else new_form
    modes: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max"}
    modes |= {_NAMES[mode]: mode for mode in modes.values()}
    if len(chosen) != 1 or chosen[0] not in modes:
        raise ValueError(
            f"{file} asks for {' and '.join(map(str, chosen)) or 'no pooling'}; supported is one "
            "of mean_tokens, cls_token, max_tokens. You can pass pooling= instead."
        )
    return modes[chosen[0]]


def write_sentence_settings(
    folder: pathlib.Path, settings: SentenceSettings, *, width: int
) -> None:
    """Writes sentence-transformers' files. It knows no globals: "global" is written as "cls".

    Args:
        folder: the folder of the checkpoint.
        settings: what to write.
        width: number of features of an embedding.
    """
    modules = ["Transformer", "Pooling", *["Normalize"] * settings.normalize]
    package = "sentence_transformers.models"
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{package}.{kind}"}
        for i, kind in enumerate(modules)
    ]
    flags = {_PREFIX + name: name == _NAMES[settings.pooling] for name in _NAMES.values()}
    sentences = {"max_seq_length": settings.max_length, "do_lower_case": settings.do_lower_case}
    files = {
        MODULES: listed,
        SENTENCES: sentences,
        "1_Pooling/config.json": {"word_embedding_dimension": width} | flags,
    }
    write_json(folder, files)
