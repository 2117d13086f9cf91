"""Makes the corpus and the questions of open_qa.py from documentation that every Python has.

An entry of an index is a name, such as `random.shuffle` or `str.title`, with what the docstring or
the page of the language's documentation says about it. The first sentence, a docstring's heading,
is removed from the corpus and becomes a question, whose answer is the name. So a block need not
contain any word of its question, as in the inverse cloze task (arXiv 1906.00300).
"""

import ast
import itertools
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import NamedTuple

WORDS = 100  # a block has so many or more, and at most 2.5 times as many
_ENTRY = re.compile(r"^( *)(?:class )?([a-z]\w*\.\w+)(\(.*\))\n\n((?:\1   .*\n|\n)+)", re.MULTILINE)


class Question(NamedTuple):
    """What is asked, the name that answers it, and the number of the block that has it."""

    text: str
    answer: str
    block: int

    @property
    def held_out(self) -> bool:
        """One in four is, by a hash of the name."""
        return zlib.crc32(self.answer.encode()) % 4 == 0


class Entry(NamedTuple):
    """A name (or none) and a text; and the question that was cut out of it, if there is one."""

    name: str
    text: str
    question: str | None = None


def entry(name: str, takes: str, about: str) -> Entry:
    """Cuts the first sentence out, unless it says the name or leaves too little to be found by."""
    words = about.split()
    first = re.split(r"(?<=[.:])\s", " ".join(words), maxsplit=1)[0].split()
    kept, last = words[len(first) :], name.rpartition(".")[2].strip("_").lower()
    if last in " ".join(first).lower() or not 4 <= len(first) <= 30 or len(kept) < 12:
        return Entry(name, f"{name}{takes} {' '.join(words)}")
    return Entry(name, f"{name}{takes} {' '.join(kept)}", f"What is it: {' '.join(first)[:-1]}?")


def of_modules() -> Iterator[tuple[str, list[Entry]]]:
    """The modules of the standard library, with their functions, classes and methods."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.glob("[a-z]*.py")):
        found, tree = [], ast.parse(file.read_text("utf-8"))
        nodes = [(file.stem, node) for node in tree.body]
        for within, node in nodes:  # which grows by the methods of classes
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            name, about = f"{within}.{node.name}", ast.get_docstring(node) or ""
            takes = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            if len(about.split()) >= 20:
                found.append(entry(name, takes, about))
            nodes += [(name, child) for child in node.body if isinstance(node, ast.ClassDef)]
        yield file.name, found


def of_pages() -> Iterator[tuple[str, list[Entry]]]:
    """The pages of the language's documentation: entries, and the paragraphs between them."""
    for page, text in sorted(topics.items()):
        found, place = [], 0
        for match in [*_ENTRY.finditer(text), None]:
            between = text[place : match.start() if match else len(text)]
            found += [Entry("", " ".join(part.split())) for part in between.split("\n\n")]
            if match:
                found.append(entry(*match.group(2, 3, 4)))
                place = match.end()
        yield f"topic {page}", found


def corpus(limit: int) -> tuple[list[str], list[Question]]:
    """At most `limit` blocks, which begin with the place that they are of, and their questions."""
    blocks, questions, seen = [], [], set()
    for place, entries in itertools.chain(of_modules(), of_pages()):
        words, asked = [], []
        if len(blocks) >= limit:
            break
        for one in [*entries, None]:
            if one is None or len(words) >= WORDS:
                blocks += [" ".join([f"{place}:", *words])] if words else []
                questions += [Question(*q, len(blocks) - 1) for q in asked]
                words, asked = [], []
            if one and not seen & {one.name or one.text}:
                seen.add(one.name or one.text)
                words += one.text.split()[: 3 * WORDS // 2]
                asked += [(one.question, one.name)] if one.question else []
    return blocks[:limit], [q for q in questions if q.block < limit]
