"""Locks: one process at a time writes a place; and what the system refuses to write. The system
frees a lock when its process dies, so what a killed one leaves behind blocks nobody.

A lock is `flock` on a small file that says who holds it. On Linux it holds over NFS too, between
hosts; where a file system or Windows has no such lock, a warning says that nothing keeps two
processes apart.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import socket
import stat
import time
import warnings
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on the disk"),
    errno.EFBIG: "allow larger files (ulimit -f)",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a place that may be written"),
}
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)  # EACCES on some file systems
_WHO = {"process", "host", "since"}  # what a lock says
_MOST = 1000  # bytes of it
_held: set[str] = set()  # places, by this process


class PlaceTaken(OSError):
    """Another process writes there."""


@contextlib.contextmanager
def refusals(place: pathlib.Path) -> Iterator[None]:
    """Says what to do where the system refuses to write to the place. Libraries in Rust say the
    system's number in words."""
    try:
        yield
    except Exception as error:
        said = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else said and int(said[1])
        file = error.filename if isinstance(error, OSError) else None
        path = pathlib.Path(file or place)
        read = place.parent not in (path, *path.parents)
        if number is None or number not in _ADVICE or read or explained(error):
            raise
        shown = place if place in path.parents else path
        raise refusal(OSError(number, os.strerror(number)), shown) from error


def explained(error: Exception) -> bool:
    """Whether it is an error of the system that already says what to do, or one of ours."""
    return isinstance(error, OSError) and (
        error.errno is None or isinstance(error.__cause__, Exception)
    )


def refusal(error: OSError, place: pathlib.Path, kept: str = "nothing is written") -> OSError:
    """What the system refuses, with what is left and what to do about it."""
    advice = _ADVICE.get(error.errno or 0)
    message = f"{error.strerror}; {kept}" + (f"; {advice} and run again" if advice else "")
    return OSError(error.errno, message, str(error.filename or place))


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """This process alone writes into the folder, which is made; one that was made and stays empty
    is removed again.

    Raises:
        PlaceTaken: if another one does; the message says which.
        OSError: if the folder cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder, or a new name for one.")
    made = not folder.exists()
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked_by(folder / ".lock", folder):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@contextlib.contextmanager
def locked_file(file: pathlib.Path) -> Iterator[None]:
    """This process alone writes the file, whose folder is made.

    Raises:
        PlaceTaken, OSError: as `locked`.
    """
    with refusals(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with _locked_by(file.with_name(f"{file.name}.lock"), file):
        yield


def holds(place: pathlib.Path) -> bool:
    """Whether this process has the file or folder locked."""
    return str(place.absolute()) in _held


@contextlib.contextmanager
def _locked_by(lock: pathlib.Path, place: pathlib.Path) -> Iterator[None]:
    """Holds the file `lock`, which then vanishes."""
    handle, name = _take(lock, place), str(place.absolute())
    _held.add(name)
    try:
        yield
    finally:
        _held.discard(name)
        with contextlib.suppress(OSError):  # before it is free: then it may be the next one's
            lock.unlink()
        os.close(handle)


def _take(lock: pathlib.Path, place: pathlib.Path) -> int:
    """An open file that is locked, and is the one that has the name."""
    while True:
        with refusals(place):
            handle = _open(lock)
        try:
            _flock(handle, place)
            if _is(handle, lock):
                _check_ours(handle, lock)
                who = {"process": os.getpid(), "host": socket.gethostname(), "since": _now()}
                os.ftruncate(handle, 0)
                with contextlib.suppress(OSError):  # on a full disk it holds, but says nothing
                    os.write(handle, json.dumps(who).encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # of a process that has ended in between and removed the name


def _open(lock: pathlib.Path) -> int:
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, folder, socket
            raise _foreign(lock) from error
        raise


def _check_ours(handle: int, lock: pathlib.Path) -> None:
    """Raises FileExistsError for a file that is somebody's and no lock."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise _foreign(lock)
    text = _read(handle)
    try:
        ours = not text or json.loads(text).keys() == _WHO
    except (ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise _foreign(lock)


def _read(handle: int) -> bytes:
    """What a lock says; writing begins at its start again."""
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, _MOST)
    os.lseek(handle, 0, os.SEEK_SET)
    return text


def _foreign(lock: pathlib.Path) -> FileExistsError:
    return FileExistsError(
        f"{lock} is needed as a lock, and is there as something else, which is left as it is; move "
        "it away, or give another place."
    )


def _flock(handle: int, place: pathlib.Path) -> None:
    reason = "this system has no flock"
    if fcntl is not None:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise PlaceTaken(
                    f"another process writes {place}: {_who(handle)}. Wait until it has ended, or "
                    "give another place."
                ) from error
            reason = str(error)
    warnings.warn(
        f"{place} cannot be locked ({reason}); see to it that no other process writes there.",
        stacklevel=2,
    )


def _is(handle: int, lock: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _who(handle: int) -> str:
    try:
        who = json.loads(_read(handle))
        return f"process {who['process']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is about to write it
        return "it has just begun"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
