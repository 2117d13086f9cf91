"""Settings of a run from a YAML file, and from what is given beside it."""

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
    """Settings from a YAML file, those in `given` in place of the file's; the entries of
    mappings such as `columns` one by one.

    Args:
        file: None takes `given` alone.
        given: values by the names of `Settings`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no YAML mapping, unknown or missing names, and as
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
