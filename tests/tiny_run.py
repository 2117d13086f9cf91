"""A tiny model and tiny data of every kind, for the tests of fine-tuning."""

import json

import jax
import numpy as np
from golden_data import GOLDEN
from tiny_config import spelled
from tiny_tokenizers import write_words

import lsg_flax
from lsg_flax import LSGConfig, hub
from lsg_flax.models import EncoderConfig, read_config

PLAIN = GOLDEN / "bert_to_convert_512"
WORDS = [f"w{i}" for i in range(5, 30)]


def tiny_model(lsg: LSGConfig | None, seed: int):
    """A model that reads 16 tokens, without a head, and its parameters."""
    config = EncoderConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        lsg=lsg,
    )
    model = lsg_flax.Model(config, "base")
    return model, jax.jit(model.init)(jax.random.key(seed), np.zeros((1, 3), np.int32))["params"]


def save_tiny(folder):
    """It, with LSG attention, and a licence beside it."""
    lsg = LSGConfig(block_size=8, sparse_block_size=8, num_global_tokens=2)
    lsg_flax.save_pretrained(folder, *tiny_model(lsg, 0), hub.read_tokenizer(PLAIN))
    (folder / "LICENSE").write_text("licence")
    return folder


WRITER_LSG = LSGConfig(block_size=8, sparse_block_size=8, num_global_tokens=2)


def tiny_writer(lsg: LSGConfig | None = WRITER_LSG, **fields):
    """A BART that reads and writes 16 tokens."""
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    config = read_config(spelled("bart", sizes | fields)).with_overrides(lsg=lsg)
    model = lsg_flax.Model(config, "conditional_generation")
    return model, jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]


def save_tiny_writer(folder, lsg: LSGConfig | None = WRITER_LSG, **fields):
    model, params = tiny_writer(lsg, **fields)
    lsg_flax.save_pretrained(folder, model, params, hub.read_tokenizer(write_words(folder)))
    (folder / "LICENSE").write_text("licence")
    return folder


def texts(seed: int, count: int, least: int = 4, most: int = 30) -> list[list[str]]:
    generator = np.random.default_rng(seed)
    return [list(generator.choice(WORDS, generator.integers(least, most))) for _ in range(count)]


def row(task: str, words: list[str]) -> dict:
    """A row whose answer can be seen in the words."""
    text, first = " ".join(words), int(words[0][1:])
    if task == "token_classification":
        return {"tokens": words, "tags": ["B-low" if int(w[1:]) < 15 else "O" for w in words]}
    if task == "question_answering":
        answers = {"text": [words[-1]], "answer_start": [len(text) - len(words[-1])]}
        return {"question": "w5 w6", "context": text, "answers": answers}
    if task == "multiple_choice":
        return {"text": text, "choices": [words[0], words[-1]], "label": first % 2}
    if task == "conditional_generation":
        return {"text": text, "target": " ".join(words[:3])}
    if task == "embedding":
        return {"text": " ".join(words[:3]), "positive": text}
    if task == "named":  # by other names
        return {"article": text, "abstract": " ".join(words[:3])}
    kinds = {
        "single_label_classification": "low" if first < 17 else "high",
        "multi_label_classification": [name for name in ("w5", "w6", "w7") if name in words],
        "regression": first / 10,
    }
    return {"text": text, "label": kinds.get(task)}


def write(folder, task: str, *, rows: int = 24, seed: int = 0, name: str = "train.jsonl"):
    lines = [json.dumps(row(task, words)) + "\n" for words in texts(seed, rows)]
    (folder / name).write_text("".join(lines))
    return str(folder / name)
