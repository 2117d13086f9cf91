"""Tokenizers as their files in a checkpoint's folder."""

import pathlib
from typing import Any


def read_tokenizer(folder: pathlib.Path) -> Any | None:
    """The tokenizer in `folder`, None if there are no tokenizer files."""
    if not any(
        (folder / name).exists()
        for name in (
            "tokenizer.json",
            "vocab.txt",
            "tokenizer_config.json",
            "vocab.json",
            "sentencepiece.bpe.model",
            "spiece.model",
        )
    ):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))
