"""The demo's data: bundles of source files, as in a code review, and the areas that they touch.

Every document joins excerpts of two to four files of Python's standard library, each from another
area, in random order; the labels are the areas. So the evidence is spread over the whole document
by construction: its first 512 tokens lie within the first file. Training and held-out documents
share no file: a hash of a file's name decides.
"""

import hashlib
import pathlib
import sysconfig
from dataclasses import dataclass
from typing import Any

import numpy as np

# Area -> modules and packages of the standard library; those that a Python lacks are left out.
AREAS = {
    "concurrency": "asyncio concurrent multiprocessing threading queue sched selectors subprocess",
    "dates and numbers": "_pydecimal _pydatetime datetime fractions statistics random calendar "
    "colorsys zoneinfo numbers _strptime",
    "e-mail": "email mailbox smtplib imaplib poplib nntplib quopri mimetypes",
    "files and archives": "zipfile tarfile gzip bz2 lzma shutil tempfile filecmp pathlib posixpath "
    "ntpath glob fileinput",
    "language tools": "ast dis tokenize inspect importlib lib2to3 pickletools modulefinder "
    "symtable "
    "pyclbr py_compile",
    "markup": "xml html plistlib",
    "network": "http urllib socket socketserver ssl ftplib wsgiref xmlrpc telnetlib",
    "testing": "unittest doctest pdb bdb trace profile pstats timeit tracemalloc test/support",
}
EXCERPT = (700, 1300)  # tokens of a file in a document
FILES = (2, 4)  # files in a document
HELD_OUT = 0.3


@dataclass(frozen=True)
class Document:
    """Token ids, one 0 or 1 per area, and the files that it is made of."""

    ids: list[int]
    labels: tuple[float, ...]
    files: tuple[str, ...]

    def cut(self, length: int) -> "Document":
        """What a model that reads `length` tokens sees of it; the last token stays [SEP]."""
        if len(self.ids) <= length:
            return self
        return Document(self.ids[: length - 1] + self.ids[-1:], self.labels, self.files)


def documents(
    tokenizer: Any, *, training: int, held_out: int, length: int, seed: int
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of up to `length` tokens, the same for a seed and a Python.

    Raises:
        FileNotFoundError: if this Python has no sources of an area.
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for area, names in AREAS.items():
        for name, text in _sources(names.split()):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= EXCERPT[0]:
                parts[_is_held_out(name)].setdefault(area, []).append((name, ids))
    lacking = [area for area in AREAS if any(len(part.get(area, ())) < 2 for part in parts)]
    if lacking:
        raise FileNotFoundError(
            f"this Python's library ({_library()}) has too few sources for {lacking}; use one that "
            "was installed with its .py files."
        )
    special = tokenizer.cls_token_id, tokenizer.sep_token_id
    return tuple(  # type: ignore[return-value]
        [
            _bundle(np.random.default_rng([seed, place, n]), part, special, length)
            for n in range(count)
        ]
        for place, (part, count) in enumerate(zip(parts, (training, held_out), strict=True))
    )


def _library() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def _sources(names: list[str]) -> list[tuple[str, str]]:
    files = []
    for name in names:
        found = [_library() / f"{name}.py", *sorted((_library() / name).rglob("*.py"))]
        files += [file for file in found if file.is_file()]
    return [
        (str(file.relative_to(_library())), file.read_text("utf-8", errors="replace"))
        for file in files
    ]


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT


def _bundle(generator, files: dict[str, Any], special: tuple[int, int], length: int) -> Document:
    start, end = special
    chosen = generator.permutation(list(AREAS))[: generator.integers(FILES[0], FILES[1] + 1)]
    ids, names = [start], []
    for area in chosen:
        name, text = files[area][generator.integers(len(files[area]))]
        size = int(generator.integers(EXCERPT[0], min(EXCERPT[1], len(text)) + 1))
        first = int(generator.integers(len(text) - size + 1))
        ids += [*text[first : first + size], end]
        names.append(name)
    labels = tuple(float(area in chosen) for area in AREAS)
    return Document(ids, labels, tuple(names)).cut(length)
