"""The model card of a folder, README.md, as a file: which ones lsg_flax wrote, so that no card of
anybody else is replaced."""

import hashlib
import pathlib
import re
import warnings

from lsg_flax.files import write_aside

CARD = "README.md"
SOURCE_CARD = "README.source.md"  # the card of what a checkpoint was converted from
_SIGNATURE = "\n<!-- of lsg_flax, which replaces this card unless it was edited: {} -->\n"
_SIGNED = re.compile(re.escape(_SIGNATURE).replace(r"\{\}", "([0-9a-f]{16})") + r"\Z")


def signed(text: str) -> str:
    """A card's text with a digest of it at the end, which no longer fits once it is edited."""
    return text + _SIGNATURE.format(_digest(text))


def is_own_card(file: pathlib.Path) -> bool:
    """Whether lsg_flax wrote this card, and nobody has edited it since."""
    if not file.is_file():
        return False
    text = file.read_bytes().decode(errors="replace")
    found = _SIGNED.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def source_card(folder: pathlib.Path) -> pathlib.Path | None:
    """The card that somebody wrote of the checkpoint in a folder, or of what it was converted from;
    None if there is none."""
    places = [folder / SOURCE_CARD] if is_own_card(folder / CARD) else [folder / CARD]
    return next((file for file in places if file.is_file()), None)


def takes_card(folder: pathlib.Path) -> bool:
    """Whether a folder may get a new card; warns where the one there is somebody's own."""
    file = folder / CARD
    if not file.exists() or is_own_card(file):
        return True
    warnings.warn(
        f"{file} was written or edited by hand and stays as it is; move it away to get a new "
        "card there.",
        stacklevel=3,
    )
    return False


def write_card(folder: pathlib.Path, text: str) -> None:
    """Writes a card whole or not at all, where `takes_card` says so."""
    if takes_card(folder):
        write_aside(folder / CARD, signed(text).encode())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
