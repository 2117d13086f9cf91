"""Files: lines and JSON are read with care; files and folders appear whole or not at all.

What all readers of lines agree on: lines end in \\n or \\r\\n, a byte order mark is no part of the
text, a place is called FILE:NUMBER, and what is wrong with a line has the same words everywhere.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]  # an object as JSON holds it

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line of a file."""

    place: str  # FILE:NUMBER, for messages
    number: int  # from 1
    raw: bytes  # without the end of the line

    def text(self) -> str:
        """Raises ValueError for bytes that are not UTF-8."""
        return valid_text(self.raw.decode(errors="surrogateescape"))

    def json_object(self) -> Json:
        """The object that the line holds; raises ValueError, which says what it holds instead."""
        text = self.text()
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # recursion: ten thousand brackets
            raise ValueError(f"not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a line must be a JSON object, got {text.strip():.60}")
        return values


def read_lines(file: pathlib.Path, *, blank: bool = True) -> Iterator[Line]:
    """The lines of a file, one at a time; without `blank`, those that hold anything.

    In a .jsonl a blank line is no row anywhere. In a .txt it is none to train on; where an output
    belongs to each line, it is an empty text.
    """
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            raw = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
            if blank or raw.decode(errors="replace").strip():
                raw = raw.removesuffix(b"\n").removesuffix(b"\r")
                yield Line(f"{file}:{number}", number, raw)


def valid_text(text: str) -> str:
    """The text; raises ValueError for lone surrogates, which JSON can hold, and which stand for
    bytes that are not UTF-8: tokenizers cannot read them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid UTF-8 at character {error.start}") from error
    return text


def read_json(file: pathlib.Path, kind: type = dict) -> Any:
    """The object (or, by `kind`, the list) in a JSON file.

    Raises:
        ValueError: if the file is damaged or holds something else.
    """
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, kind):
        wanted = "an object" if kind is dict else f"a {kind.__name__}"
        raise ValueError(f"{file} must hold {wanted}, but holds a {type(values).__name__}.")
    return values


def write_json(folder: pathlib.Path, files: Json) -> None:
    """Writes a JSON file for each relative name."""
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def differences(before: Any, now: Any, missing: Any = None) -> list[tuple[str, Any, Any]]:
    """Where two trees of dicts differ: path such as "optimizer.seed", value before, value now;
    `missing` stands for one that is not there."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [("", before, now)]
    return [
        (f"{key}.{path}".rstrip("."), *values)
        for key in sorted(before.keys() | now.keys())
        for path, *values in differences(before.get(key, missing), now.get(key, missing), missing)
    ]


def check_output(output: str | os.PathLike, source: str | os.PathLike) -> None:
    """Raises ValueError if the file to write is the one that is read, also through a link."""
    places = pathlib.Path(output), pathlib.Path(source)
    if all(place.exists() for place in places) and places[0].samefile(places[1]):
        raise ValueError(f"{output} is the input {source}; give another file for the output.")


def write_aside(file: pathlib.Path, data: bytes) -> None:
    """Writes a file whole or not at all, on the disk when this returns; its folder is made. For one
    writer at a time: until it has its name it is called FILE.new, which the next call replaces
    after a kill."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.new")
    try:
        with aside.open("wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """The names in a folder on the disk as well; not every system opens folders."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder whose files move to `path` if all goes well, and vanish if not."""
    created = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=path))
    try:
        (aside / "new").mkdir()
        yield aside / "new"
        _move_files(aside / "new", path, kept=aside / "old")
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):  # not empty: someone else writes there
                path.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move_files(source: pathlib.Path, target: pathlib.Path, *, kept: pathlib.Path) -> None:
    """Moves all files or none: replaced ones are linked into `kept` and come back if a move
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
