"""Translates error messages of the library for the command line: `broken_lines="skip"`, an argument
in Python, becomes the flag `--on-error skip`."""

import argparse
import ast
import re
from typing import Any

_CALL = r"(?<![\w.])[\w.]+\((?:[^()]|\([^()]*\))*\)"  # advice in Python stays Python
_VALUE = r"""'[^']*'|"[^"]*"|[(\[{][^()\[\]{}]*[)\]}]|\.\.\.|[-+.~/]*\w(?:[\w.+/-]*\w)?"""
_ARGUMENT = re.compile(
    rf"""{_CALL}
    |(?<![\w.'"/-])([a-z]\w*)(?:\.([a-z]\w*))?  # a name such as mesh or mesh.data
    =(?:({_VALUE})|(?=[\s;,.)]|$))""",
    re.VERBOSE,
)
_CONVERT = re.compile(
    r"lsg_flax\.convert_checkpoint\(source, target(?:, max_sequence_length=(\d+))?"
    r"(, resize_lsg=True)?\)"
)


def in_flags(message: str, arguments: argparse.Namespace) -> str:
    """Returns the message with the library's arguments replaced by the command's flags. With a
    settings file, only settings that were given as flags are replaced."""
    for words, flags in arguments.spelled.items():
        message = message.replace(words, flags)
    message = _CONVERT.sub(_convert_command, message)
    options = re.findall(r"^  (-.*)", arguments.command.format_help(), re.MULTILINE)
    found = re.findall(r"--[a-z][\w-]*", " ".join(options))
    flags = {flag[2:].replace("-", "_"): flag for flag in found}
    if getattr(arguments, "config", None) is not None:
        given = {name for name, value in vars(arguments).items() if value is not None}
        flags = {name: flag for name, flag in flags.items() if name in given}

    def translate(found: re.Match) -> str:
        name, entry, value = found.groups()
        if entry in flags:  # lsg.block_size
            return f"{flags[entry]} {_words(value)}".rstrip()
        if name not in flags:
            return found[0]
        if entry:
            return f"{flags[name]} {entry}={_words(value)}"
        if value in ("False", "None"):
            return flags.get(f"no_{name}", f"no {flags[name]}")
        return flags[name] if value in ("True", None) else f"{flags[name]} {_words(value)}"

    return _ARGUMENT.sub(translate, message)


def _convert_command(found: re.Match) -> str:
    length = f" --max-sequence-length {found[1]}" if found[1] else ""
    return f"lsg-flax convert SOURCE TARGET{length}{' --resize-lsg' if found[2] else ''}"


def _words(text: str | None) -> str:
    """Returns a Python value as it is typed on the command line."""
    try:
        value: Any = ast.literal_eval(text or "")
    except (ValueError, SyntaxError):
        value = ...
    if value in (..., (), [], {}):  # cannot be typed
        return text or ""
    if isinstance(value, dict):
        return ",".join(f"{name}={entry}" for name, entry in value.items())
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return repr(value) if value == "" or str(value) != str(value).strip() else str(value)
