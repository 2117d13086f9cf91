"""The texts of an index's blocks: fixed-width bytes in a .npy, or the lines of a file. Pickles are
read only on request, and then only bytes and strings are allowed in them.
"""

import os
import pathlib
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lsg_flax.checks import require
from lsg_flax.files import check_pointer, file_aside, is_blank
from lsg_flax.pipelines import TEXTS, read_texts

BLOCK_RECORDS = "block_records.npy"
_CONVERTER = (
    "records are never unpickled by default. Convert the file once: `lsg-flax index MODEL {file} "
    "FOLDER --unpickle-records` (or lsg_flax.open_qa.unpickle_records) allows only bytes and texts"
)
_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
_LET_IN = {
    **{(module, name): name for module in _ARRAYS for name in ("_reconstruct", "scalar")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # bytes, as protocol 2 writes them
}


class Records:
    """The texts of blocks by number, decoded on demand.

    Attributes:
        place: the file, for error messages.
    """

    def __init__(self, values: Sequence[bytes] | np.ndarray, place: str | os.PathLike):
        """Takes UTF-8 bytes, [blocks], in memory or mapped from a file; raises ValueError if there
        are none."""
        self.values, self.place = values, str(place)
        require(len(values) > 0, f"{place} has no blocks; an index needs at least one.")

    def __len__(self) -> int:
        return len(self.values)

    def texts(self, numbers: Iterable[int]) -> list[str]:
        """Returns the texts of these blocks; raises ValueError, with the block's number, for one
        that is not UTF-8."""
        return [self._text(number) for number in numbers]

    def _text(self, number: int) -> str:
        try:
            return bytes(self.values[number]).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"block {number} of {self.place} is not valid UTF-8 ({error}); write the records "
                "again, from texts in UTF-8."
            ) from error


def open_records(path: str | os.PathLike) -> Records:
    """Opens the records in a file, or in a folder's block_records.npy.

    Args:
        path: a .npy of fixed-width bytes (`dtype("S...")`, one dimension), which is mapped and not
            read; a .txt with a block on each line, or a .jsonl of objects with "text".

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for a pickle, an array of another kind, a damaged file, no blocks, an empty line
            or text.
    """
    file = pathlib.Path(path)
    file = file / BLOCK_RECORDS if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; records are a .npy, .txt or .jsonl.")
    check_pointer(file)
    if file.suffix == ".npy":
        return Records(_mapped(file), file)
    if file.suffix not in TEXTS:
        raise ValueError(f"{file} must end in .npy, {' or '.join(TEXTS)}.")
    lines = read_texts(file, skippable=False)
    empty = [p for p, text in zip(lines.places, lines.texts, strict=True) if is_blank(text)]
    if empty:
        raise ValueError(f"{empty[0]} is an empty block, one of {len(empty)}; remove them.")
    return Records([text.encode() for text in lines.texts], file)


def _mapped(file: pathlib.Path) -> np.ndarray:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        said = str(error)
        if "pickle" in said or "Python objects" in said:
            advice = _CONVERTER.format(file=file)
            raise ValueError(f"{file} holds pickled objects or no array, and {advice}.") from error
        raise ValueError(f"{file} is damaged: {said}; copy or create it again.") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind != "S" or values.ndim != 1:
        kind = f"{getattr(values, 'dtype', 'no')} array {getattr(values, 'shape', '')}"
        raise ValueError(
            f"{file} holds a {kind}; records must be an array with one dimension of fixed-width "
            "bytes in UTF-8, as lsg_flax.open_qa.write_records writes it."
        )
    return values


def write_records(file: str | os.PathLike, records: Records) -> None:
    """Writes a .npy of fixed-width bytes, as wide as the longest text. A temporary file is renamed
    when it is complete.

    Raises:
        ValueError: if a text ends in a zero byte, which such arrays lose.
        OSError: if it cannot be written.
    """
    lost = next((i for i, value in enumerate(records.values) if value[-1:] == b"\0"), None)
    if lost is not None:
        raise ValueError(f"block {lost} of {records.place} ends in a zero byte; remove it.")
    width, shape = max(map(len, records.values)), (len(records),)
    with file_aside(pathlib.Path(file)) as aside:
        written = np.lib.format.open_memmap(aside, "w+", np.dtype(f"S{width}"), shape)
        for number, value in enumerate(records.values):
            written[number] = value
        written.flush()


def unpickle_records(file: str | os.PathLike) -> Records:
    """Reads the records in a pickled object array, such as the published block_records.npy, into
    memory. Only a few of NumPy's own classes are allowed in it, so no code of the file runs.

    Raises:
        ValueError: if it holds anything but a one-dimensional array of bytes or texts.
    """
    file = pathlib.Path(file)
    with file.open("rb") as opened:
        try:
            version = np.lib.format.read_magic(opened)
            header = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
            shape, _, dtype = getattr(np.lib.format, header)(opened)
            values = _BytesAlone(opened).load() if dtype.hasobject else None
        except (ValueError, EOFError, IndexError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} is not an array of pickled bytes: {error}.") from error
    if values is None:
        raise ValueError(f"{file} holds {dtype} {shape}, not a pickle; use open_records.")
    if not isinstance(values, np.ndarray) or values.ndim != 1:
        raise ValueError(f"{file} holds {type(values).__name__} {shape}, not a list of blocks.")
    kinds = {type(value).__name__ for value in values if not isinstance(value, bytes | str)}
    if kinds:
        raise ValueError(f"{file} holds {', '.join(sorted(kinds))}; blocks must be bytes or texts.")
    return Records([v.encode() if isinstance(v, str) else bytes(v) for v in values], file)


class _BytesAlone(pickle.Unpickler):
    """An unpickler that refuses every class and function that an array of bytes does not need."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _LET_IN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
