"""Progress of long work on stderr: a bar on a terminal; otherwise (a log file, a pipe) a plain line
every ten seconds, also while weights are read or a program compiles, and when `Bar.tell` is called.

Nothing is shown unless it is asked for: a command asks with `told`, a call with progress=True by
its `Bar`. Work inside such work describes itself with `doing`.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

INTERVAL = 10.0  # seconds from line to line


class _Work:
    """Work that is running."""

    def words(self) -> str:
        raise NotImplementedError


class _Lines:
    """Prints lines about all running work, the outermost first, while there is any."""

    def __init__(self):
        self._works: list[_Work] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._said = 0.0  # time of the last line

    def __bool__(self) -> bool:
        return bool(self._works)

    def begin(self, work: _Work) -> None:
        with self._lock:
            self._works.append(work)
            if len(self._works) == 1:
                self._ended = threading.Event()
                threading.Thread(target=self._tell, args=(self._ended,), daemon=True).start()

    def end(self, work: _Work) -> None:
        with self._lock:
            if work in self._works:
                self._works.remove(work)
            if not self._works:
                self._ended.set()

    def _tell(self, ended: threading.Event) -> None:
        while not ended.wait(INTERVAL):
            with self._lock:
                words = "; ".join(work.words() for work in self._works)
            if words and time.monotonic() - self._said >= INTERVAL:
                self.say(words)

    def say(self, words: str) -> None:
        """Prints a line now; the next one follows after an interval."""
        self._said = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            tqdm.write(f"lsg-flax: {words}", file=sys.stderr)
            sys.stderr.flush()


_lines = _Lines()


def say(words: str) -> None:
    """Prints a line to stderr, above the bar if there is one."""
    _lines.say(words)


def count_of(number: int, noun: str) -> str:
    """Returns a number and what it counts, such as "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


class _Doing(_Work):
    def __init__(self, about: str):
        self._about, self._start = about, time.monotonic()

    def words(self) -> str:
        return f"{self._about}, {_clock(time.monotonic() - self._start)} so far"


class Bar(_Work):
    """Counts finished items, inside a `with` or until `close`."""

    def __init__(
        self, unit: str, *, total: int | None = None, initial: int = 0, about: str = "", shown: bool
    ):
        """Starts counting.

        Args:
            unit: what is counted, such as "documents".
            total: number of items; None if unknown.
            initial: number of items that were done before.
            about: what is done with them, such as "tokenizing".
            shown: show the progress.
        """
        self.done, self._total, self._unit = initial, total, unit
        self._about, self._note, self._shown = about, "", shown
        self._start = self._first = time.monotonic(), initial
        terminal = sys.stderr.isatty()
        if shown and initial and initial != total:
            done = f"{initial:,}" + ("" if total is None else f" of {total:,}")
            say(f"resumes after {done} {unit}, which were done before")
        self._drawn = tqdm(
            desc=about or None,
            total=total,
            initial=initial,
            unit=f" {unit}",
            disable=not (shown and terminal),
        )
        if shown and not terminal:
            _lines.begin(self)

    def update(self, count: int, note: str = "") -> None:
        """Adds `count` finished items; `note` is shown after the numbers."""
        self.done, self._note = self.done + count, note
        if self._first is self._start:  # the time before the first items went into compiling
            self._first = time.monotonic(), self.done
        if note:
            self._drawn.set_postfix_str(note, refresh=False)
        self._drawn.update(count)

    def tell(self) -> None:
        """Prints the progress now, on a terminal too."""
        if self._shown:
            say(self.words())

    def words(self) -> str:
        """Returns the text of a line."""
        now, (first, done) = time.monotonic(), self._first
        of = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._about}: " * bool(self._about) + f"{self.done:,}{of} {self._unit}"]
        rate = (self.done - done) / max(now - first, 1e-9)
        if rate:
            parts.append(f"{rate:,.3g} per second" if rate < 100 else f"{rate:,.0f} per second")
        else:
            parts.append(f"{_clock(now - self._start[0])} so far")
        if rate and self._total is not None:
            parts.append(f"{_clock((self._total - self.done) / rate)} left")
        return ", ".join([*parts, *filter(None, [self._note])])

    def close(self) -> None:
        """Ends the bar."""
        self._drawn.close()
        _lines.end(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def told(about: str) -> Iterator[None]:
    """Prints lines about this work, inside a `with`, if stderr is not a terminal."""
    with contextlib.nullcontext() if sys.stderr.isatty() else _begun(about):
        yield


@contextlib.contextmanager
def doing(about: str) -> Iterator[None]:
    """Adds this work to the lines, inside a `with`, if it is part of work that prints lines."""
    with _begun(about) if _lines else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _begun(about: str) -> Iterator[None]:
    work = _Doing(about)
    _lines.begin(work)
    try:
        yield
    finally:
        _lines.end(work)


class Compiled:
    """Remembers the shapes of batches that a program was compiled for."""

    def __init__(self):
        self._shapes: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()

    def call(self, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Returns a context to call the program in; it says that the program compiles, at the first
        batch of a shape."""
        shapes = tuple((name, np.shape(batch[name])) for name in sorted(batch))
        if shapes in self._shapes:
            return contextlib.nullcontext()
        self._shapes.add(shapes)
        length = dict(shapes).get("input_ids", ())[-1:]
        return doing(f"compiling for {length[0]:,} tokens" if length else "compiling")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
