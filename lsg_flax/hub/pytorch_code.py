"""The PyTorch code of LSG models, which is copied into a folder so that config.json can refer to
it. It is never run."""

import importlib.util
import json
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from lsg_flax.hub.checkpoint import Checkpoint
from lsg_flax.hub.weights import CONFIG
from lsg_flax.models import Model, family_of

_PACKAGE, _INSTALL = "lsg_converter", "pip install lsg-converter 'transformers<4.44'"


def carry_code(
    auto_map: Mapping[str, Any], places: Sequence[pathlib.Path], target: pathlib.Path
) -> dict[str, str]:
    """Copies the modules of an auto_map ("module.Class") whose class is in one of the folders to
    `target`; returns these entries. No code is run."""
    found = {}
    for auto_class, reference in auto_map.items():
        if not (isinstance(reference, str) and re.fullmatch(r"\w+\.\w+", reference)):
            continue  # a path, or code of another repository
        module, name = reference.split(".")
        files = (place / f"{module}.py" for place in places)
        file = next((file for file in files if file.is_file()), None)
        if file and re.search(rf"^class {name}\b", file.read_text(errors="replace"), re.MULTILINE):
            shutil.copyfile(file, target / file.name)
            found[auto_class] = reference
    return found


def installed_code(model: Model) -> list[pathlib.Path]:
    """Returns the folders of an installed lsg-converter with the code of an LSG model; empty if it
    is not installed."""
    found = importlib.util.find_spec(_PACKAGE) if model.config.lsg else None
    places = found.submodule_search_locations if found else None
    return [pathlib.Path(place) / _folder_name(model.config.model_type) for place in places or ()]


def auto_map_of(model: Model) -> dict[str, Any]:
    """Returns the `auto_map` that config.json should have if PyTorch's code is available."""
    if model.config.lsg:
        return family_of(model.config.model_type).auto_map()
    given = json.loads(model.config.extra).get("auto_map")
    return given if isinstance(given, dict) else {}


def in_pytorch(checkpoint: Checkpoint, place: str | None = None) -> str:
    """Returns how to load a checkpoint in PyTorch, as text for users; from its folder, or
    `place`."""
    family, folder = family_of(checkpoint.config.model_type), place or str(checkpoint.folder)
    lsg = checkpoint.config.lsg is not None
    name = family.class_name(checkpoint.head or "base", lsg=lsg)
    if not family.describes_itself:
        return f"local_attention.{name}(**keywords of {CONFIG}).load_state_dict(its safetensors)"
    if not lsg:
        return f"transformers.{name}.from_pretrained({folder!r})"
    if family.lsg_type:
        return f"not possible: {name} exists only in lsg_flax, PyTorch has no LSG attention for it"
    module = f"modeling_lsg_{_folder_name(family.model_type)}"
    auto_map = checkpoint.values.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    auto_class = next((auto for auto, r in auto_map.items() if r == f"{module}.{name}"), None)
    if auto_class and (checkpoint.folder / f"{module}.py").is_file():
        return (
            f"{auto_class}.from_pretrained({folder!r}, trust_remote_code=True), transformers<4.44"
        )
    where = f"{_PACKAGE}.{_folder_name(family.model_type)}.{module}"
    named = ", which auto_map names," if auto_class else ""
    return (
        f"from {where} import {name}; {name}.from_pretrained({folder!r}) "
        f"({_INSTALL}; {module}.py{named} is not in the folder, so auto classes cannot load it)"
    )


def _folder_name(model_type: str) -> str:
    return model_type.replace("-", "_")
