"""Fills a mask with a checkpoint converted to LSG: the first example of the models' cards.

    python examples/fill_mask.py [--checkpoint FOLDER_OR_HUB_ID] [--text "Paris is the ..."]

Any checkpoint with a masked language model works, such as bert-base-uncased. Without one, a toy
BERT is first trained on a few sentences about capitals, and knows nothing else. Expected then, in
about a minute on 2 CPU cores: "capital" before all other words, with a score over 0.9.
"""

import argparse
import itertools
import pathlib
import tempfile

import jax
import numpy as np
from transformers import AutoTokenizer

import lsg_flax
from lsg_flax import hub, training

TEXT = "Paris is the [MASK] of France."
CITIES = {"Paris": "France", "Rome": "Italy", "Madrid": "Spain", "Berlin": "Germany"}
FACTS = [
    *(f"{city} is the capital of {country} ." for city, country in CITIES.items()),
    *(f"{city} is a big city in {country} ." for city, country in CITIES.items()),
    *(f"the people of {country} love {city} ." for city, country in CITIES.items()),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def toy_checkpoint(folder: pathlib.Path, steps: int) -> float:
    """Trains a tiny BERT on FACTS, saves it as Hugging Face does, and returns its last loss."""
    words = sorted({word.lower() for fact in FACTS for word in fact.split()})
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = lsg_flax.EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = lsg_flax.Model(config, "masked_lm")
    batch = dict(tokenizer(FACTS, padding=True, return_tensors="np"))
    params = jax.jit(model.init)(jax.random.key(0), batch["input_ids"])["params"]

    def batch_at(step: int) -> dict[str, np.ndarray]:
        """Every sentence with one word masked, another one in each step."""
        ids = batch["input_ids"]
        lengths = batch["attention_mask"].sum(axis=1)
        places = np.random.default_rng(step).integers(1, lengths - 1)
        masked = np.arange(ids.shape[1])[None] == places[:, None]
        return {
            "input_ids": np.where(masked, tokenizer.mask_token_id, ids),
            "attention_mask": batch["attention_mask"],
            "labels": np.where(masked, ids, -100),
        }

    optimizer = training.make_optimizer(5e-3, total_steps=steps, warmup_steps=steps // 10)
    state = training.init_state(params, optimizer, jax.random.key(1))
    step = training.make_train_step(model, optimizer)
    quiet = training.Logging(progress=False)
    state, history = training.fit(
        step, state, training.BatchesAt(batch_at), steps=steps, logging=quiet
    )
    lsg_flax.save_pretrained(folder, model, state.params, tokenizer)
    return history[-1]["loss"]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Prints and returns the words for the mask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a masked language model; a toy one by default")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--steps", type=int, default=300, help="training steps of the toy")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        source = options.checkpoint or folder
        if not options.checkpoint:
            loss = toy_checkpoint(pathlib.Path(folder), options.steps)
            print(f"a toy model, {options.steps} steps on {len(FACTS)} sentences, loss {loss:.2f}")
        model = lsg_flax.convert_checkpoint(source, task="masked_lm", max_sequence_length=4096)
        tokenizer = hub.read_tokenizer(hub.resolve(source))
        fill = lsg_flax.pipeline("fill-mask", model, tokenizer)
        words = fill(options.text.replace("[MASK]", tokenizer.mask_token))
    for word in itertools.chain.from_iterable(w if isinstance(w, list) else [w] for w in words):
        print(f"{word['score']:.3f}  {word['token_str']:<12} {word['sequence']}")
    return words


if __name__ == "__main__":
    main()
