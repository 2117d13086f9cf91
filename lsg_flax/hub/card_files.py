"""The model card of a folder, README.md, as a file. Cards that lsg_flax wrote are recognised, so
that no other card is replaced."""

import hashlib
import pathlib
import re
import warnings

from lsg_flax.files import write_aside

CARD = "README.md"
SOURCE_CARD = "README.source.md"  # the card of the checkpoint that this one was converted from
_SIGNATURE = "\n<!-- of lsg_flax, which replaces this card unless it was edited: {} -->\n"
_SIGNED = re.compile(re.escape(_SIGNATURE).replace(r"\{\}", "([0-9a-f]{16})") + r"\Z")


def signed(text: str) -> str:
    """Returns a card's text with its digest at the end, which no longer matches after an edit."""
    return text + _SIGNATURE.format(_digest(text))


def is_own_card(file: pathlib.Path) -> bool:
    """Whether lsg_flax wrote this card and nobody has edited it since."""
    if not file.is_file():
        return False
    text = file.read_bytes().decode(errors="replace")
    found = _SIGNED.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def source_card(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the card that somebody wrote for the checkpoint in a folder, or for the one that it
    was converted from; None if there is none."""
    places = [folder / SOURCE_CARD] if is_own_card(folder / CARD) else [folder / CARD]
    return next((file for file in places if file.is_file()), None)


def takes_card(folder: pathlib.Path) -> bool:
    """Whether a folder may get a new card; warns if it has a card that lsg_flax did not write."""
    file = folder / CARD
    if not file.exists() or is_own_card(file):
        return True
    warnings.warn(
        f"{file} was written or edited by hand and is kept; move it away to get a new card there.",
        stacklevel=3,
    )
    return False


def write_card(folder: pathlib.Path, text: str) -> None:
    """Writes a card if `takes_card` allows it, completely or not at all."""
    if takes_card(folder):
        write_aside(folder / CARD, signed(text).encode())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
