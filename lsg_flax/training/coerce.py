"""Turns values from YAML files and flags into the types that the fields of `Settings` have."""

import difflib
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lsg_flax.checks import short
from lsg_flax.files import valid_text

# YAML 1.1 reads these as numbers, which is rarely meant: 1:30 would be 90, 010 would be 8.
_OLD_NUMBER = re.compile(r".*:.*|[-+]?0[0-7_]+")


def check_names(where: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError for an unknown name; the error suggests the most similar known name."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? It" if near else "it"
            raise ValueError(
                f"{where}: {name!r} is unknown; {hint} must be one of {', '.join(known)}."
            )


def read_yaml(file: pathlib.Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not valid YAML, has a name twice, or is not a mapping; with the
            line where it is known.
    """
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file; give a YAML file with settings.")
    try:
        loader = _strict_loader(file)(file.read_text(encoding="utf-8-sig"))
        try:
            values = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise ValueError(f"{place} is not valid YAML: {error.problem}{hint}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} must have lines such as 'model: ./bert-4096', but its content is a "
            f"{type(values).__name__}."
        )
    return values


def _strict_loader(file: pathlib.Path) -> Any:
    """Returns a loader that accepts only texts as keys, and each key once.

    PyYAML's own loader would silently keep the last of equal keys. Dates and the number forms of
    `_OLD_NUMBER` stay texts.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if key.tag.endswith(":merge"):
                    raise ValueError(
                        f"{file}:{line}: '<<' is not supported; write the settings out."
                    )
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str):
                    raise ValueError(f"{file}:{line}: the name {name!r} is not text; quote it.")
                if name in lines:
                    raise ValueError(
                        f"{file}:{line}: {name!r} is already in line {lines[name]}; remove one."
                    )
                lines[name] = line
            return super().construct_mapping(node, deep)

        def construct_object(self, node, deep=False):
            try:
                return super().construct_object(node, deep)
            except (ValueError, LookupError, AttributeError) as error:
                if not isinstance(node, yaml.ScalarNode):
                    raise
                raise ValueError(
                    f"{file}:{node.start_mark.line + 1}: {short(node.value)} cannot be read as "
                    f"{node.tag.rpartition(':')[2]}; give another value, or quote a text."
                ) from error

        def resolve(self, kind, value, implicit):
            tag = super().resolve(kind, value, implicit)
            number = tag.endswith((":int", ":float")) and _OLD_NUMBER.fullmatch(value)
            return self.DEFAULT_SCALAR_TAG if number or tag.endswith(":timestamp") else tag

    return Strict


def coerced(name: str, value: Any, hint: Any) -> Any:
    """Returns the value in the type of its annotation `hint`.

    Raises:
        ValueError: if that is not possible; the error says what the value should be.
    """
    kind: Any
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value is None and types.NoneType in parts:
            return None
        rest = [part for part in parts if part is not types.NoneType]
        if len(rest) > 1:  # one text, or a list of texts
            rest = [str] if isinstance(value, str | os.PathLike) else rest[1:]
        return coerced(name, value, rest[0])
    if kind is Literal:
        if value not in parts:
            raise ValueError(f"{name}={short(value)} must be one of {', '.join(map(str, parts))}.")
        return value
    if kind is tuple and isinstance(value, list | tuple) and value:
        return tuple(coerced(name, item, parts[0]) for item in value)
    if kind is dict and isinstance(value, Mapping):
        return {str(key): coerced(f"{name}.{key}", v, parts[1]) for key, v in value.items()}
    if kind is str and isinstance(value, str | os.PathLike):
        if not os.fspath(value).strip():
            raise ValueError(f"{name}={short(value)} is empty; give a value or leave it out.")
        if "\0" in os.fspath(value):
            raise ValueError(
                f"{name}={short(value)} has a NUL character, which no name can have; remove it."
            )
        try:
            return valid_text(os.fspath(value))
        except ValueError as error:
            raise ValueError(f"{name}={short(value)} has {error}.") from error
    if kind is float and not isinstance(value, bool | list | dict):
        try:
            number = float(str(value))  # YAML reads 1e-4, without a dot, as text
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    if kind is Any or (kind in (int, bool) and type(value) is kind):
        return value
    wanted = {
        tuple: "a list of at least one value",
        dict: "a mapping of names to values",
        str: "a text",
        float: "a number",
        int: "a whole number",
        bool: "true or false",
    }
    quoted = (
        "; quote it in a YAML file" if kind is str and not isinstance(value, list | dict) else ""
    )
    raise ValueError(f"{name}={short(value)} must be {wanted[kind]}{quoted}.")
