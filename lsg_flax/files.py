"""Files: JSON read with care, and folders whose files appear all together or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any


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


def write_json(folder: pathlib.Path, files: dict[str, Any]) -> None:
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
