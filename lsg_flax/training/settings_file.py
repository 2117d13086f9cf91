"""Reads the settings of a run from a YAML file and from values that override it."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from lsg_flax.training.coerce import check_names, read_yaml
from lsg_flax.training.settings import REQUIRED, Settings, coerced_values


def read_settings(
    file: str | os.PathLike | None, given: Mapping[str, Any] | None = None
) -> Settings:
    """Reads settings from a YAML file; values in `given` override those of the file. Mappings such
    as `columns` are overridden entry by entry.

    Args:
        file: the YAML file; None uses only `given`.
        given: values by the names of `Settings`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a YAML mapping, for unknown or missing names, and as
            `Settings`.
    """
    values = {} if file is None else read_yaml(pathlib.Path(file))
    known = [f.name for f in dataclasses.fields(Settings)]
    check_names("settings" if file is None else str(file), values, known)
    for name, value in (given or {}).items():
        before = values.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = {**before, **value}
        values[name] = value
    check_names("settings", values, known)
    missing = [name for name in REQUIRED if values.get(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be given"
            + (" as flags or in a YAML file." if file is None else f", as flags or in {file}.")
        )
    return Settings(**coerced_values(values))
