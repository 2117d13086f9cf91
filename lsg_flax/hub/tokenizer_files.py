"""Tokenizers as their files in a checkpoint's folder."""

import pathlib
from typing import Any

# transformers': its import takes seconds, and its own annotations differ between versions.
Tokenizer = Any

_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "vocab.json")
_FILES += ("sentencepiece.bpe.model", "spiece.model")


def read_tokenizer(folder: pathlib.Path) -> Tokenizer | None:
    """The tokenizer in `folder`, None if there are no tokenizer files."""
    if not any((folder / name).exists() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))
