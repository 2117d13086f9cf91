"""Saves checkpoints: config.json, weights, and the other files that belong to them."""

import dataclasses
import json
import os
import pathlib
import warnings
from typing import Any

import numpy as np

from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.files import check_folder, read_json, save_tensors, write_json, written_aside
from lsg_flax.hub import beside
from lsg_flax.hub.card import Card, card_text, table
from lsg_flax.hub.card_files import takes_card, write_card
from lsg_flax.hub.checkpoint import Checkpoint, open_checkpoint
from lsg_flax.hub.pytorch_code import auto_map_of, carry_code, installed_code
from lsg_flax.hub.sentence_files import (
    SentenceSettings,
    carry_modules,
    write_sentence_settings,
)
from lsg_flax.hub.to_lsg import LSGOptions
from lsg_flax.hub.tokenizer_files import Tokenizer, origin, portable_class, save_tokenizer
from lsg_flax.hub.weights import CONFIG, GENERATION, WEIGHTS
from lsg_flax.models import Model, Params, family_of

_OF_A_RUN = ("checkpoints", "log/metrics.jsonl", "best")  # in the folder that training writes


def save_pretrained(
    path: str | os.PathLike,
    model: Model,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    source: Checkpoint | None = None,
) -> None:
    """Writes config.json and model.safetensors (and the tokenizer's files), which PyTorch's class
    of the same name can load.

    The tokenizer's files are copies of those that it was read from, with its `model_max_length`,
    unless its tokens were changed since. For an LSG model the PyTorch code of its classes and an
    `auto_map` are added, if that code is beside the tokenizer or `source`, or lsg-converter is
    installed. Files are written to a temporary folder and moved one by one at the end: an
    interrupted save leaves old files unchanged.

    Args:
        path: the folder; created if needed.
        model, params: what to save.
        tokenizer: a tokenizer of transformers; None for none.
        source: the checkpoint that the model was made from, whose other files are copied (licence,
            generation_config.json; not README.md, which describes another model).

    Raises:
        TypeError: if the tokenizer is a name.
        ValueError: if `params` are not those of `model`.
        OSError: if the files cannot be written.
    """
    path = pathlib.Path(path)
    if isinstance(tokenizer, str | os.PathLike):
        raise TypeError(
            f"tokenizer={tokenizer!r} is a name; give a tokenizer object, such as "
            f"AutoTokenizer.from_pretrained({tokenizer!r}) of transformers, or None to save none."
        )
    with written_aside(path) as aside:
        _write(aside, model, params, tokenizer, source)
        keep_documents(path, aside)
        stale = beside.stale_files(path, aside, settings=False)
    if stale:
        warnings.warn(
            f"{path} still has {', '.join(stale)} of another model, which other programs may "
            f"read instead of the new {WEIGHTS}; remove what you do not need.",
            stacklevel=2,
        )


def save_sentence_model(
    path: str | os.PathLike,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    settings: SentenceSettings,
    *,
    source: Checkpoint | None = None,
) -> None:
    """Saves as `save_pretrained`, with sentence-transformers' files beside it; if anything fails,
    nothing is written. Pooling "global" is written as sentence-transformers' name for the first
    token.

    Raises:
        ValueError, OSError: as `save_pretrained`.
    """
    path = pathlib.Path(path)
    with written_aside(path) as aside:
        save_pretrained(aside, model, params, tokenizer, source=source)
        write_sentence_settings(aside, settings, width=model.config.hidden_size)
        keep_documents(path, aside)


def _write(
    folder: pathlib.Path,
    model: Model,
    params: Params,
    tokenizer: Tokenizer | None,
    source: Checkpoint | None,
    *,
    readme: bool = False,
) -> None:
    tensors = params_to_torch(params, model)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    places = [source.root, source.folder] if source else []
    for place in dict.fromkeys(places):
        beside.carry_documents(place, folder, readme=readme)
    generation = model.config.other("generation_config", None)
    if generation and not (folder / GENERATION).exists():
        write_json(folder, {GENERATION: generation})
    if tokenizer is not None:
        family, named = family_of(model.config.model_type), None
        if model.config.lsg and family.lsg_type:
            named = model.config.other("tokenizer_class", f"{family.class_prefix}Tokenizer")
        save_tokenizer(tokenizer, folder, class_name=named)
        places += filter(None, [origin(tokenizer)])
    code = carry_code(auto_map_of(model), places + installed_code(model), folder)
    values = config_values(model, tensors, code)
    if code and tokenizer is not None:
        # AutoTokenizer does not know the config class of that code.
        values["tokenizer_class"] = portable_class(tokenizer)
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def keep_documents(path: pathlib.Path, new: pathlib.Path) -> None:
    """Keeps documents such as licences in `path` if those in `new`, whose files will replace them,
    differ: removes them from `new`, with a warning."""
    others = beside.others_files(path, new, ours=True)
    if kept := [name for name in others if beside.is_document(name)]:
        for name in kept:
            (new / name).unlink()
        warnings.warn(
            f"{path} keeps its {', '.join(kept)}, but the model that is saved there has different "
            "ones; check which are right.",
            stacklevel=3,
        )


def check_target(target: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Raises ValueError if the target is the source or inside it, also through links, or if it has
    a training run or a model that is not a conversion (source and target may have been mixed
    up)."""
    check_folder("target", target)
    place = pathlib.Path(target).resolve()
    for source in (checkpoint.root, checkpoint.folder):
        if any(p.exists() and p.samefile(source) for p in (place, *place.parents)):
            raise ValueError(
                f"the target {target} is the source {source} or inside it, where nothing is "
                "written; give another folder."
            )
    if run := [name for name in _OF_A_RUN if os.path.lexists(place / name)]:
        raise ValueError(
            f"the target {target} has a training run ({', '.join(run)}), whose model is not "
            "replaced; give another folder, or remove that run first."
        )
    if (place / CONFIG).exists() and not _is_conversion(place / CONFIG):
        raise ValueError(
            f"the target {target} has a config.json that no conversion has written; "
            "give another folder, or remove that model first."
        )


def _is_conversion(config: pathlib.Path) -> bool:
    try:
        return read_json(config).get("base_model_prefix") == "lsg"
    except ValueError:
        return False


def write_converted(
    target: pathlib.Path,
    checkpoint: Checkpoint,
    model: Model,
    params: Params,
    tokenizer: Tokenizer | None,
    *,
    base: str,
    options: LSGOptions,
) -> None:
    """Saves a conversion with the documents of its source and a model card.

    Args:
        base: the source as the user named it.
        options: the options of the conversion, for the card.

    Raises:
        ValueError: if files of another model would remain beside it, or other files or a trained
            model be replaced.
    """
    ours = (target / CONFIG).exists()  # see `check_target`
    with written_aside(target) as aside:
        _write(aside, model, params, tokenizer, checkpoint, readme=True)
        if checkpoint.modules and model.task == "base":
            carry_modules(checkpoint.root, checkpoint.modules, aside, model.max_length)
        if takes_card(target):
            card, name = _card_of_conversion(base, options, checkpoint), target.resolve().name
            made = open_checkpoint(aside)
            write_card(aside, card_text(card, name, made, checkpoint, base))
        if stale := beside.stale_files(target, aside, settings=True):
            raise ValueError(
                f"{target} has {', '.join(stale)} of another model, which would be read together "
                "with the new files; remove them, or give another folder."
            )
        if lost := beside.lost_tensors(target, aside) if ours else []:
            raise ValueError(
                f"the target {target} has a model that this conversion does not make, trained or "
                f"converted otherwise ({len(lost)} of its tensors differ, such as {lost[0]}); give "
                "another folder, or remove that model first."
            )
        if others := beside.others_files(target, aside, ours=ours):
            raise ValueError(
                f"{target} has {', '.join(others)}, not written by a conversion of this source, "
                "which new files would replace; move them away, or give another folder."
            )


def _card_of_conversion(base: str, options: LSGOptions, source: Checkpoint) -> Card:
    """Makes the contents of a conversion's card."""
    place, reads = pathlib.Path(base), Model(source.config).max_length
    about = (
        f"`{place.resolve().name if place.exists() else base}`, converted by lsg_flax to read "
        f"{options.max_sequence_length:,} tokens instead of {reads:,}, by LSG attention (local + "
        "sparse + global, arXiv 2210.15497). Its weights are the same; nothing was trained."
    )
    rows = {f"`{name}`": value for name, value in dataclasses.asdict(options).items()}
    return Card(about, {"Settings of the conversion": table(rows)})


def config_values(
    model: Model,
    tensors: dict[str, np.ndarray] | None = None,
    auto_map: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Returns the fields of config.json for `model`, with PyTorch's class as `architectures` and
    the `auto_map` of the code beside it. `tensors`, with PyTorch's names and shapes such as
    [out, in], give the torch_dtype."""
    config, family = model.config, family_of(model.config.model_type)
    values = config.to_dict()
    if not family.describes_itself:
        return values
    values["architectures"] = [family.class_name(model.task, lsg=config.lsg is not None)]
    if config.lsg and family.lsg_type:  # otherwise PyTorch would load it with full attention
        values["model_type"] = family.lsg_type
    for name in ("auto_map", "generation_config"):  # the latter has its own file
        values.pop(name, None)
    if auto_map:
        values["auto_map"] = auto_map
    if tensors:
        values.pop("dtype", None)  # transformers 5's name of torch_dtype
        values["torch_dtype"] = str(next(iter(tensors.values())).dtype)
    return values
