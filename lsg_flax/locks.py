"""Locks, so that one process at a time writes to a place, and errors of writing with advice. The
system frees a lock when its process dies, so the lock file of a killed process blocks nobody.

A lock is `flock` on a small file that says who holds it. On Linux it also works over NFS, between
hosts. If a file system or Windows has no such lock, a warning says that nothing keeps two processes
apart.
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
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free disk space"),
    errno.EFBIG: "allow larger files (ulimit -f)",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a place that is writable"),
}
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)  # EACCES on some file systems
_WHO = {"process", "host", "since"}  # names in a lock file
_MOST = 1000  # bytes that are read of it
_held: set[str] = set()  # places that this process has locked


class PlaceTaken(OSError):
    """Another process writes to the place."""


@contextlib.contextmanager
def refusals(place: pathlib.Path) -> Iterator[None]:
    """Adds what to do to errors of the system when it refuses to write to a place, inside a `with`.

    Libraries in Rust have the number of the system's error only in their message.
    """
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
    """Returns whether an error already says what to do: it is ours, or was handled before."""
    return isinstance(error, OSError) and (
        error.errno is None or isinstance(error.__cause__, Exception)
    )


def refusal(error: OSError, place: pathlib.Path, kept: str = "nothing is written") -> OSError:
    """Returns the system's error with what is written (`kept`) and what to do added."""
    advice = _ADVICE.get(error.errno or 0)
    message = f"{error.strerror}; {kept}" + (f"; {advice} and run again" if advice else "")
    return OSError(error.errno, message, str(error.filename or place))


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Locks a folder for this process, inside a `with`. The folder is created if needed, and then
    removed again if it stays empty.

    Raises:
        PlaceTaken: if another process has locked it; the error says which.
        OSError: if the folder cannot be created or written.
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
    """Locks a file for this process, inside a `with`. Its folder is created if needed.

    Raises:
        PlaceTaken, OSError: as `locked`.
    """
    with refusals(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with _locked_by(file.with_name(f"{file.name}.lock"), file):
        yield


def holds(place: pathlib.Path) -> bool:
    """Returns whether this process has locked the file or folder."""
    return str(place.absolute()) in _held


@contextlib.contextmanager
def _locked_by(lock: pathlib.Path, place: pathlib.Path) -> Iterator[None]:
    """Locks the file `lock` inside a `with`, and then deletes it."""
    handle, name = _take(lock, place), str(place.absolute())
    _held.add(name)
    try:
        yield
    finally:
        _held.discard(name)
        with contextlib.suppress(OSError):  # before unlocking: later it may belong to the next one
            lock.unlink()
        os.close(handle)


def _take(lock: pathlib.Path, place: pathlib.Path) -> int:
    """Returns an open, locked file that is still the one at the path `lock`."""
    while True:
        with refusals(place):
            handle = _open(lock)
        try:
            _flock(handle, place)
            if _is(handle, lock):
                _check_ours(handle, lock)
                who = {"process": os.getpid(), "host": socket.gethostname(), "since": _now()}
                os.ftruncate(handle, 0)
                with contextlib.suppress(OSError):  # on a full disk it still locks, but stays empty
                    os.write(handle, json.dumps(who).encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # another process ended in the meantime and deleted its file


def _open(lock: pathlib.Path) -> int:
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, folder, socket
            raise _foreign(lock) from error
        raise


def _check_ours(handle: int, lock: pathlib.Path) -> None:
    """Raises FileExistsError for a file that is not a lock, but somebody's own."""
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
    """Returns the content of a lock file, and moves back to its start for writing."""
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, _MOST)
    os.lseek(handle, 0, os.SEEK_SET)
    return text


def _foreign(lock: pathlib.Path) -> FileExistsError:
    return FileExistsError(
        f"{lock} is needed as a lock, but already exists as something else and is left as it is; "
        "move it away, or give another place."
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
        f"{place} cannot be locked ({reason}); make sure that no other process writes there.",
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
    except (OSError, ValueError, KeyError, TypeError):  # it has not written it yet
        return "it has just started"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
