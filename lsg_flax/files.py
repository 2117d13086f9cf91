"""Files: strict reading of lines and JSON; files and folders are written completely or not at all,
by one process at a time (locks.py).

All readers of lines agree: lines end in \\n or \\r\\n, a byte order mark is not part of the text, a
place is FILE:NUMBER, and the same fault in a line has the same message everywhere.
"""

import collections
import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from lsg_flax.locks import holds, locked, refusals

Json = dict[str, Any]  # a JSON object

_POINTER = b"version https://git-lfs.github.com/spec/"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MOST_LEVELS = 100  # of a JSON file; deeper ones can be read, but not written again
_UNFINISHED = ".lsg-flax-unfinished-"  # prefix of temporary names; nobody else uses it


class Line(NamedTuple):
    """A line of a file."""

    place: str  # FILE:NUMBER, for messages
    number: int  # from 1
    raw: bytes  # without the end of the line

    def text(self) -> str:
        """Returns the text of the line; raises ValueError for bytes that are not UTF-8."""
        return utf8_text(self.raw.decode(errors="surrogateescape"))

    def json_object(self) -> Json:
        """Returns the JSON object in the line; raises ValueError if there is something else."""
        text = self.text()
        try:
            values = json.loads(text, object_pairs_hook=_named_once)
        except RepeatedName:
            raise
        except (ValueError, RecursionError) as error:  # recursion: ten thousand brackets
            raise ValueError(f"not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a line must be a JSON object, got {text.strip():.60}")
        return values


class RepeatedName(ValueError):
    """An object has a name twice; Python's reader would silently take the last one."""


def _named_once(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise RepeatedName(f"the name {counts.most_common(1)[0][0]!r} is there twice; remove one")
    return values


def read_lines(file: pathlib.Path, *, blank: bool = True) -> Iterator[Line]:
    """Yields the lines of a file, one at a time; blank lines only if `blank` is set.

    In a .jsonl a blank line is never a row. In a .txt it is not a text to train on, but it is an
    empty text where each line gets an output.
    """
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            raw = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
            if blank or raw.decode(errors="replace").strip():
                raw = raw.removesuffix(b"\n").removesuffix(b"\r")
                yield Line(f"{file}:{number}", number, raw)


def whole_file(file: pathlib.Path, number: int) -> Line:
    """Returns a whole file as one line, whose place is the file's name."""
    return Line(str(file), number, file.read_bytes().removeprefix(_BYTE_ORDER_MARK))


def id_in(content: Json, place: int | str) -> Any:
    """Returns the id of an object, or `place` if it has none; raises ValueError for an id that JSON
    cannot represent."""
    name = content.get("id", place)
    try:
        json.dumps(name, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"its id {name!r:.60} has NaN or infinity, which JSON does not allow"
        ) from error
    return name


def utf8_text(text: str) -> str:
    """Returns the text, which was read with "surrogateescape"; raises ValueError if its bytes are
    not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid UTF-8 at character {error.start}") from error
    return text


def valid_text(text: str) -> str:
    """Returns the text; raises ValueError for a lone surrogate (half of a character), which JSON
    and Python allow, but no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"a lone surrogate (half of a character, {half}) at character {error.start}"
        ) from error
    return text


def check_pointer(file: pathlib.Path) -> None:
    """Raises ValueError for the pointer that git-lfs leaves instead of a large file."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{file} is a git-lfs pointer, not the file itself; run `git lfs pull` in "
                f"{file.parent}, or give the hub id to download the checkpoint."
            )


def is_blank(text: str) -> bool:
    """Returns whether a text has no visible character, only spaces, control characters and format
    characters such as U+200B."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def read_json(file: pathlib.Path, kind: type = dict) -> Any:
    """Returns the object (or, with `kind=list`, the list) in a JSON file.

    Raises:
        ValueError: if the file is damaged, has a name twice, or has something else.
    """
    check_pointer(file)
    try:
        values = json.loads(file.read_text("utf-8-sig"), object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:  # recursion: ten thousand brackets
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, kind):
        wanted = "an object" if kind is dict else f"a {kind.__name__}"
        raise ValueError(f"{file} must contain {wanted}, but contains a {type(values).__name__}.")
    if _is_deeper(values, _MOST_LEVELS):
        raise ValueError(f"{file} is nested deeper than the {_MOST_LEVELS} allowed levels.")
    return values


def _is_deeper(values: Any, levels: int) -> bool:
    """Returns whether lists and objects are nested in more than `levels` levels."""
    layer = [values]
    for _ in range(levels + 1):
        layer = [v for v in layer if isinstance(v, dict | list)]
        layer = [v for each in layer for v in (each.values() if isinstance(each, dict) else each)]
    return bool(layer)


def write_json(folder: pathlib.Path, files: Json) -> None:
    """Writes a JSON file for each relative name."""
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def differences(before: Any, now: Any, missing: Any = None) -> list[tuple[str, Any, Any]]:
    """Returns where two trees of dicts differ: a path such as "optimizer.seed", the value before,
    the value now; `missing` stands for a missing value."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [("", before, now)]
    return [
        (f"{key}.{path}".rstrip("."), *values)
        for key in sorted(before.keys() | now.keys())
        for path, *values in differences(before.get(key, missing), now.get(key, missing), missing)
    ]


def check_output(output: str | os.PathLike, *sources: str | os.PathLike) -> None:
    """Checks the name of an output file.

    Raises:
        OSError: for a folder or a device.
        ValueError: if the output, or a temporary file of it, is one of the inputs, also through a
            link; and for a .txt in a folder that is read.
    """
    place = check_file(output)
    for source in map(pathlib.Path, sources):
        within = source.is_dir() and place.parent.exists() and place.parent.samefile(source)
        if within and place.suffix == ".txt":
            raise ValueError(f"{place} would be one of the texts in {source}; give another file.")
        own = ("", ".partial", ".partial.journal", ".partial.ahead")
        ends = (place.with_name(f"{place.name}{end}") for end in own)
        for taken in (*ends, _aside(place)):
            if taken.exists() and source.exists() and taken.samefile(source):
                raise ValueError(
                    f"{taken} is the input {source}; give another file for the output."
                )


def lies_in(file: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Returns whether a file, or what it links to, is somewhere inside a folder."""
    inside, place = pathlib.Path(folder).resolve(), pathlib.Path(file)
    places = (place.resolve(), place.parent.resolve() / place.name)
    return any(inside in found.parents for found in places)


def check_apart(output: str | os.PathLike, model: str | os.PathLike) -> None:
    """Raises ValueError for an output that already exists as a file in a model's folder."""
    if os.path.lexists(output) and lies_in(output, model):
        raise ValueError(
            f"{output} is a file in the folder of the model, {model}; give another file for the "
            "output."
        )


def check_file(file: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a file to write; raises OSError for a folder or a device."""
    place = pathlib.Path(file)
    if not os.fspath(file).strip():
        raise FileNotFoundError(f"{os.fspath(file)!r} is not a name; give the name of a file.")
    if place.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give the name of a file.")
    stream = os.path.abspath(place).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    if stream or (place.exists() and not place.is_file()):
        raise OSError(f"{file} is a stream or a device; give the name of a file.")
    return place


def check_folder(name: str, folder: str | os.PathLike) -> None:
    """Raises ValueError for a setting, a folder, whose path is a file or goes through a file."""
    place = pathlib.Path(folder)
    if not os.fspath(folder).strip():
        raise ValueError(f"{name}={os.fspath(folder)!r} is not a name; give a folder.")
    found = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not found.is_dir():
        what = "is" if found == place else f"is inside {found}, which is"
        raise ValueError(f"{name}={folder} {what} a file; give a folder, or a new name for one.")


def write_aside(file: pathlib.Path, data: bytes) -> None:
    """Writes a file completely or not at all, see `file_aside`."""
    with file_aside(file) as aside:
        aside.write_bytes(data)


@contextlib.contextmanager
def file_aside(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary file to write, inside a `with`, which is renamed to `file` if no error
    occurs. It is then on the disk (fsync). Its folder is created.

    There may be one writer at a time: the temporary file of a killed writer is replaced.
    """
    aside = _aside(file)
    try:
        with refusals(file):
            check_file(file).parent.mkdir(parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)  # a link would be followed
            yield aside
            with aside.open("rb+") as opened:
                os.fsync(opened.fileno())
            os.replace(aside, file)
    except BaseException:
        with contextlib.suppress(OSError):  # if nothing could be written, nothing is there
            aside.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def save_tensors(
    file: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file with the permissions of the umask; safetensors itself makes it
    readable only for its owner."""
    file.touch()
    mode = file.stat().st_mode
    safetensors.numpy.save_file(dict(tensors), file, metadata=metadata)
    file.chmod(mode)


def _aside(file: pathlib.Path) -> pathlib.Path:
    return file.with_name(f"{_UNFINISHED}{file.name}")


def sync_folder(folder: pathlib.Path) -> None:
    """Writes the names in a folder to the disk (fsync), on systems that can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary folder, inside a `with`, whose files move to `path` if no error occurs and
    are deleted otherwise. One process at a time writes there; leftovers of killed processes are
    removed.

    Raises:
        OSError: if another process writes there, or nothing can be written.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(refusals(path))
        if not holds(path):
            stack.enter_context(locked(path))
        for left in path.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=path))
        stack.callback(shutil.rmtree, aside, ignore_errors=True)
        (aside / "new").mkdir()
        yield aside / "new"
        _move_files(aside / "new", path, kept=aside / "old")


def _move_files(source: pathlib.Path, target: pathlib.Path, *, kept: pathlib.Path) -> None:
    """Moves all files or none: replaced files are linked into `kept`, and restored if a move
    fails."""
    moved = []
    try:
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            place, old = (folder / file.relative_to(source) for folder in (target, kept))
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                old.parent.mkdir(parents=True, exist_ok=True)
                _link(place, old)
            os.replace(file, place)
            moved.append((place, old))
    except BaseException:
        for place, old in moved:
            if old.exists():
                os.replace(old, place)
            else:
                place.unlink()
        raise


def _link(file: pathlib.Path, place: pathlib.Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # a file system without hard links
        shutil.copy2(file, place)
