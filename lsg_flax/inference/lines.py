"""A file of JSON lines, one per document, written so that a killed run continues where it stopped.

Lines go to `TARGET.partial` in whole windows. `TARGET.partial.journal` says what is being made, and
after each window how many documents are finished, how many bytes their lines take, and a digest of
what was read. Lines reach the disk before the journal speaks of them, so whatever lies behind the
journal's last entry is cut off and made again. Both files vanish when TARGET gets its name.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from lsg_flax.files import check_file, differences, sync_folder, write_aside
from lsg_flax.locks import explained, locked_file, refusal

Unfinished = Literal["continue", "replace"]


class Document(NamedTuple):
    """One document of the input."""

    name: Any  # its id
    raw: bytes  # all that it says
    place: str  # where it stands, for messages
    content: Any
    rows: Any = None  # what the model reads of it, where that was found out before


class ResumableLines:
    """The writer; `with` it, `skip` the documents that are finished, `write` the others.

    At the end of the `with` the file gets its name. After an error or a kill what is finished is
    kept, if that is anything.

    Attributes:
        target, partial, journal: the files.
        finished: documents whose lines are on the disk.
    """

    def __init__(
        self,
        target: str | os.PathLike,
        settings: Mapping[str, Any],
        *,
        unfinished: Unfinished = "continue",
    ):
        """Names the files; nothing is touched before `with`.

        Args:
            target: the file to make; an old one stays until the new one is complete.
            settings: all that decides what a line says, JSON values.
            unfinished: what to do with a partial file: continue it, or begin anew.

        Raises:
            ValueError: for another value of `unfinished`.
        """
        if unfinished not in get_args(Unfinished):
            allowed = ", ".join(get_args(Unfinished))
            raise ValueError(f"unfinished={unfinished!r} must be one of {allowed}.")
        self.target = pathlib.Path(target)
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        self.journal = self.target.with_name(f"{self.target.name}.partial.journal")
        self.finished = 0
        self._settings: dict[str, Any] = json.loads(json_line(settings))
        self._unfinished = unfinished
        self._digest = hashlib.sha256()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "ResumableLines":
        """Opens the files.

        Raises:
            ValueError: if the partial file is another run's or damaged; says what differs.
            OSError: if nothing can be written there, or another process writes it.
        """
        with contextlib.ExitStack() as stack, self._explained():
            check_file(self.target)
            stack.enter_context(locked_file(self.target))
            if self._unfinished == "replace":
                self._remove()
            self._last = self._find()
            self.finished = self._last["documents"]
            # Unbuffered: what could not be written must not be tried again when closing.
            self._lines = stack.enter_context(self.partial.open("r+b", buffering=0))
            self._entries = stack.enter_context(self.journal.open("ab", buffering=0))
            self._lines.truncate(self._last["bytes"])
            self._lines.seek(self._last["bytes"])
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._open:
            if error is None:
                with self._explained():
                    self._append(self._last | {"complete": True})
                    os.replace(self.partial, self.target)
                    sync_folder(self.target.parent)
                    self.journal.unlink()
            elif self.finished:
                error.add_note(f"{self._kept()}.")
            else:
                self._remove()

    def skip(self, documents: Iterator[Document]) -> None:
        """Passes over the documents that are finished.

        Raises:
            ValueError: if they are not those of the partial file; the first that differs is named.
        """
        with self.partial.open("rb") as lines:
            for number, line in enumerate(itertools.islice(lines, self.finished)):
                document = next(documents, None)
                if document is None:
                    raise ValueError(self._foreign(f"the input ends after {number} documents"))
                written, name = json.loads(line)["id"], json.loads(json_line(document.name))
                if written != name:
                    raise ValueError(
                        self._foreign(f"{document.place} is {name!r} and was {written!r}")
                    )
                self._read(document)
        if self.finished and self._digest.hexdigest() != self._last["digest"]:
            raise ValueError(
                self._foreign("the ids are the same, but not what the finished documents say")
            )

    def write(self, documents: Sequence[Document], lines: Sequence[str]) -> None:
        """Adds a window: one line for each document, on the disk when this returns.

        Raises:
            OSError: if it cannot be written, as on a full disk; what was finished before is kept.
        """
        data = "".join(f"{line}\n" for _, line in zip(documents, lines, strict=True)).encode()
        for document in documents:
            self._read(document)
        with self._explained():
            _write(self._lines, data)
            entry = {
                "documents": self.finished + len(documents),
                "bytes": self._last["bytes"] + len(data),
                "digest": self._digest.hexdigest(),
            }
            self._append(entry)
        self._last, self.finished = entry, entry["documents"]

    def _read(self, document: Document) -> None:
        self._digest.update(len(document.raw).to_bytes(8, "little") + document.raw)

    def _append(self, entry: Mapping[str, Any]) -> None:
        _write(self._entries, f"{json_line(entry)}\n".encode())

    def _find(self) -> dict[str, Any]:
        """The journal's last entry, with the partial file it speaks of; a new journal if there is
        none, or none of its documents is finished."""
        start = {"documents": 0, "bytes": 0, "digest": self._digest.hexdigest()}
        if not self.journal.exists():
            if self.partial.exists():
                raise ValueError(
                    f"{self.partial} has no journal beside it, so no run can continue it; remove "
                    'it, or pass unfinished="replace".'
                )
            self._begin()
            return start
        settings, *entries = self._read_journal()
        last = {**start, **(entries[-1] if entries else {})}
        if not last["documents"]:  # nothing to lose, so nothing holds a run to its first settings
            self._remove()
            self._begin()
            return start
        changes = [
            f"{path}: it was {before!r} and is {now!r}"
            for path, before, now in differences(settings, self._settings)
        ]
        if changes:
            raise ValueError(self._foreign("\n  ".join(["these settings differ:", *changes])))
        renamed = last.pop("complete", False) and not self.partial.exists()
        if renamed and self.target.exists() and self.target.stat().st_size == last["bytes"]:
            os.replace(self.target, self.partial)  # killed before the journal could vanish
        self.partial.touch()
        size = self.partial.stat().st_size
        if size < last["bytes"]:
            raise ValueError(
                self._foreign(f"it has {size} bytes and must have at least {last['bytes']}")
            )
        return last

    def _begin(self) -> None:
        """A journal without entries, whole or not at all."""
        write_aside(self.journal, f"{json_line(self._settings)}\n".encode())
        self.partial.touch()
        sync_folder(self.partial.parent)

    def _read_journal(self) -> list[dict[str, Any]]:
        """Settings and entries; half a line, written last, is cut off."""
        data = self.journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(self._foreign(f"{self.journal.name} is damaged: {error}")) from error
        if not records or not all(isinstance(record, dict) for record in records):
            raise ValueError(self._foreign(f"{self.journal.name} is damaged"))
        if len(whole) < len(data):
            os.truncate(self.journal, len(whole))
        return records

    def _remove(self) -> None:
        self.partial.unlink(missing_ok=True)  # first: without a journal it could not be continued
        self.journal.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what is kept when the system refuses."""
        try:
            yield
        except OSError as error:
            if explained(error):
                raise
            kept = [self._kept()] if self.finished else []
            raise refusal(error, self.partial, *kept) from error

    def _kept(self) -> str:
        return (
            f"{self.finished} finished documents are kept in {self.partial}; the same call "
            "continues with the others"
        )

    def _foreign(self, reason: str) -> str:
        return (
            f"{self.partial} cannot be continued: {reason}\nGive what its run was given, or pass "
            'unfinished="replace" to begin anew.'
        )


def json_line(values: Any) -> str:
    """JSON, numpy's arrays and numbers included."""
    return json.dumps(values, default=lambda value: np.asarray(value).tolist())


def _write(file: Any, data: bytes) -> None:
    """All of it, on the disk."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())
