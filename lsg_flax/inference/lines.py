"""A file of JSON lines, one per document, written so that a killed run resumes where it stopped.

Lines are written to `TARGET.partial` in whole windows. `TARGET.partial.journal` has the settings
and, after each window, the number of finished documents, the number of bytes of their lines, and a
digest of what was read. Lines are on the disk before the journal records them, so anything after
the journal's last entry is removed and computed again. At the end `TARGET.partial` is renamed to
TARGET, and the journal is deleted.

A window is sorted by length, so its documents are finished in another order than that of the file.
If it takes long, `TARGET.partial.ahead` keeps the lines of those that are finished, and is deleted
with the end of the window.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from lsg_flax.files import check_file, differences, sync_folder, write_aside
from lsg_flax.locks import explained, locked_file, refusal
from lsg_flax.progress import count_of

Unfinished = Literal["continue", "replace"]
KEPT_EVERY = 30.0  # seconds after which finished lines of an unfinished window are kept


class Document(NamedTuple):
    """One document of the input."""

    name: Any  # its id
    raw: bytes  # its line or file
    place: str  # FILE:NUMBER, for messages
    content: Any
    rows: Any = None  # its rows for the model, if they were made before


class ResumableLines:
    """The writer of such a file, a context manager: `skip` the finished documents, `write` the
    others.

    At the end of the `with` block the file gets its final name. After an error or a kill finished
    documents are kept.

    Attributes:
        target, partial, journal: the files.
        finished: number of documents whose lines are on the disk, in whole windows.
        restored: number of further lines that an earlier run has kept of an unfinished window.
    """

    def __init__(
        self,
        target: str | os.PathLike,
        settings: Mapping[str, Any],
        *,
        unfinished: Unfinished = "continue",
    ):
        """Sets the names of the files; no file is touched before `with`.

        Args:
            target: the file to write; an old one is kept until the new one is complete.
            settings: everything that decides the contents of lines, as JSON values.
            unfinished: what to do with a partial file: "continue" it, or "replace" it.

        Raises:
            ValueError: for another value of `unfinished`.
        """
        if unfinished not in get_args(Unfinished):
            allowed = ", ".join(get_args(Unfinished))
            raise ValueError(f"unfinished={unfinished!r} must be one of {allowed}.")
        self.target = pathlib.Path(target)
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        self.journal = self.target.with_name(f"{self.target.name}.partial.journal")
        self.finished = self.restored = self._begun = 0
        self._ahead = _LinesAhead(self.target.with_name(f"{self.target.name}.partial.ahead"))
        self._kept_at = time.monotonic()
        self._settings: dict[str, Any] = json.loads(json_line(settings))
        self._unfinished = unfinished
        self._digest = hashlib.sha256()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "ResumableLines":
        """Opens the files.

        Raises:
            ValueError: if the partial file is damaged or of a run with other settings; the message
                says what differs.
            OSError: if nothing can be written there, or another process is writing it.
        """
        with contextlib.ExitStack() as stack, self._explained():
            check_file(self.target)
            stack.enter_context(locked_file(self.target))
            if self._unfinished == "replace":
                self._remove()
            self._last = self._find()
            self.finished = self._begun = self._last["documents"]
            self._kept_at = time.monotonic()
            # Unbuffered: closing must not retry a write that failed.
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
            elif self.finished or self._ahead.lines:
                error.add_note(f"{self._kept()}.")
            else:
                self._remove()

    def skip(self, documents: Iterator[Document]) -> None:
        """Skips the finished documents.

        Raises:
            ValueError: if they are not those of the partial file; the message has the first
                difference.
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

    def ahead(self, documents: Sequence[Document]) -> dict[int, str]:
        """Returns the lines of the next window that an earlier run has kept, by place in the
        window; it has kept none if the window's documents are others."""
        before, self._begun = self._begun, self._begun + len(documents)
        found = self._ahead.of(before, documents)
        self.restored += len(found)
        return found

    def due(self) -> bool:
        """Returns whether it is time to `keep` lines."""
        return time.monotonic() - self._kept_at >= KEPT_EVERY

    def keep(self, documents: Sequence[Document], lines: Mapping[int, str]) -> None:
        """Keeps lines of the unfinished window, by place; they are on the disk when this returns.

        Raises:
            OSError: as `write`.
        """
        with self._explained():
            self._ahead.keep(self.finished, documents, lines)
        self._kept_at = time.monotonic()

    def write(
        self, documents: Sequence[Document], lines: Sequence[str] | Mapping[int, str]
    ) -> None:
        """Writes a window: one line for each document, on the disk when this returns.

        Args:
            documents: of the window.
            lines: text of each document's line, by the document's place in the window.

        Raises:
            OSError: if it cannot be written, for example because the disk is full; documents that
                were finished before are kept.
        """
        data = "".join(f"{lines[place]}\n" for place in range(len(documents))).encode()
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
            if self._ahead.lines:
                self._ahead.drop()
        self._last, self.finished, self._kept_at = entry, entry["documents"], time.monotonic()

    def _read(self, document: Document) -> None:
        self._digest.update(len(document.raw).to_bytes(8, "little") + document.raw)

    def _append(self, entry: Mapping[str, Any]) -> None:
        _write(self._entries, f"{json_line(entry)}\n".encode())

    def _find(self) -> dict[str, Any]:
        """Returns the journal's last entry, after checking the partial file; starts a new journal
        if there is none, or no document is finished."""
        start = {"documents": 0, "bytes": 0, "digest": self._digest.hexdigest()}
        if not self.journal.exists():
            if self.partial.exists():
                raise ValueError(
                    f"{self.partial} has no journal beside it, so no run can continue it; remove "
                    'it, or pass unfinished="replace".'
                )
            self._ahead.drop()  # a kill may have left it alone
            self._begin()
            return start
        settings, *entries = self._read_journal()
        last = {**start, **(entries[-1] if entries else {})}
        kept = self._ahead.find(last["documents"])
        if not last["documents"] and not kept:  # nothing is lost, so other settings are allowed
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
            os.replace(self.target, self.partial)  # killed before the journal was deleted
        self.partial.touch()
        size = self.partial.stat().st_size
        if size < last["bytes"]:
            raise ValueError(
                self._foreign(f"it has {size} bytes and must have at least {last['bytes']}")
            )
        return last

    def _begin(self) -> None:
        """Writes a journal without entries, completely or not at all."""
        write_aside(self.journal, f"{json_line(self._settings)}\n".encode())
        self.partial.touch()
        sync_folder(self.partial.parent)

    def _read_journal(self) -> list[dict[str, Any]]:
        """Reads settings and entries; removes an incomplete last line."""
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
        self._ahead.drop()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Adds to errors of the system which documents are kept."""
        try:
            yield
        except OSError as error:
            if explained(error):
                raise
            kept = [self._kept()] if self.finished or self._ahead.lines else []
            raise refusal(error, self.partial, *kept) from error

    def _kept(self) -> str:
        finished = self.finished + len(self._ahead.lines)
        are = "is" if finished == 1 else "are"
        return (
            f"{count_of(finished, 'finished document')} {are} kept in {self.partial}; "
            "the same call or command continues with the others"
        )

    def _foreign(self, reason: str) -> str:
        return (
            f"{self.partial} cannot be continued: {reason}\nUse the settings and documents of its "
            'run, or pass unfinished="replace" to start over.'
        )


class _LinesAhead:
    """The file of lines that are finished before their window. It begins with the number of
    documents before the window and a digest of the window's documents; a line [place, line] for
    each document follows. If it is damaged, or of other documents, they are computed again."""

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.lines: dict[int, str] = {}  # those in the file
        self._of: dict[str, Any] = {}  # the window that the file is of

    def find(self, before: int) -> int:
        """Reads the file that an earlier run left if it is of the window behind so many documents;
        returns the number of its lines."""
        if not self.file.exists():
            return 0
        data = self.file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a kill may have cut off the last line
        try:
            self._of, *pairs = map(json.loads, whole.splitlines())
            self.lines = dict(pairs) if self._of["documents"] == before else {}
        except (ValueError, TypeError, KeyError):
            self.lines = {}
        if self.lines:
            os.truncate(self.file, len(whole))
        else:
            self.drop()
        return len(self.lines)

    def of(self, before: int, documents: Sequence[Document]) -> dict[int, str]:
        """Returns the lines in the file if they are of this window."""
        if self._of.get("documents") != before:
            return {}
        if self._of != _window_of(before, documents):
            self.drop()
        return dict(self.lines)

    def keep(self, before: int, documents: Sequence[Document], lines: Mapping[int, str]) -> None:
        """Adds the lines that are not in the file yet."""
        new = {place: line for place, line in lines.items() if place not in self.lines}
        if not new:
            return
        records: list[Any] = [[place, line] for place, line in new.items()]
        if not self.lines:
            self._of = _window_of(before, documents)
            records.insert(0, self._of)
        with self.file.open("ab" if self.lines else "wb", buffering=0) as opened:
            _write(opened, "".join(f"{json_line(record)}\n" for record in records).encode())
        if not self.lines:
            sync_folder(self.file.parent)
        self.lines |= new

    def drop(self) -> None:
        """Removes the file."""
        self.file.unlink(missing_ok=True)
        self.lines, self._of = {}, {}


def _window_of(before: int, documents: Sequence[Document]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.raw).to_bytes(8, "little") + document.raw)
    return {"documents": before, "window": digest.hexdigest()}


def json_line(values: Any) -> str:
    """Returns values as JSON; numpy arrays and numbers are allowed."""
    return json.dumps(values, default=lambda value: np.asarray(value).tolist())


def _write(file: Any, data: bytes) -> None:
    """Writes all data and waits until it is on the disk."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())
