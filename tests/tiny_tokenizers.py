"""Checkpoints with tokenizers as people have them: the files of the slow tokenizers that RoBERTa,
XLM-RoBERTa, CamemBERT, ALBERT and SqueezeBERT came with, trained on a few words, beside a tiny
model."""

import io
import json
import pathlib

import flax.traverse_util
import jax.numpy as jnp
import pytest
from tiny_config import spelled

import lsg_flax
from lsg_flax.models import EncoderConfig

FAMILIES = ("roberta", "xlm-roberta", "camembert", "albert", "squeezebert")
TEXTS = ["the quick brown fox jumps over the lazy dog", "a text of words", "Zoë is naïve"] * 20
TEXT, PAIR = "the quick naïve fox <mask> 東京", "some words"
SIZES = {
    "vocab_size": 310,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 66,
}
_ALBERT = {
    **{"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_piece": "<pad>"},
    **{"control_symbols": ["[CLS]", "[SEP]"], "user_defined_symbols": ["[MASK]"]},
}


def write_tokenizer(folder: pathlib.Path, model_type: str) -> None:
    """vocab.json and merges.txt, vocab.txt, or a sentencepiece model."""
    if model_type == "squeezebert":
        from tokenizers.implementations import BertWordPieceTokenizer

        pieces = BertWordPieceTokenizer()
        pieces.train_from_iterator(TEXTS, 300, show_progress=False)
        pieces.save_model(str(folder))
        return
    if model_type == "roberta":
        from tokenizers.implementations import ByteLevelBPETokenizer

        trained = ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trained.train_from_iterator(TEXTS, 300, special_tokens=special, show_progress=False)
        trained.save_model(str(folder))
        return
    sentencepiece = pytest.importorskip("sentencepiece")
    name = "spiece.model" if model_type == "albert" else "sentencepiece.bpe.model"
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=written,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **(_ALBERT if model_type == "albert" else {}),
    )
    (folder / name).write_bytes(written.getvalue())


def tiny_model(model_type: str, task: str = "masked_lm", **fields):
    """A model and its parameters, all of them zeros."""
    narrow = {"embedding_size": 8} if model_type == "albert" else {}
    config = EncoderConfig.from_dict(spelled(model_type, SIZES | narrow | fields))
    model = lsg_flax.Model(config, task)
    leaves = flax.traverse_util.flatten_dict(model.abstract_params(), sep="/")
    zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    return model, flax.traverse_util.unflatten_dict(zeros, sep="/")


def write_source(folder: pathlib.Path, model_type: str, **fields) -> pathlib.Path:
    """A checkpoint with its tokenizer, and what else lies in such folders."""
    lsg_flax.save_pretrained(folder, *tiny_model(model_type, **fields))
    write_tokenizer(folder, model_type)
    (folder / "README.md").write_text(f"# {model_type}\r\n")
    (folder / "LICENSE").write_text("licence")
    (folder / "generation_config.json").write_text('{"bos_token_id":0}')
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file that is not hidden, by its name."""
    files = (p for p in folder.rglob("*") if p.is_file())
    names = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    return {name: data for name, data in names.items() if not name.startswith(".")}


def config_of_tokenizer(folder: pathlib.Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


def write_words(folder: pathlib.Path, *, size: int = 31) -> pathlib.Path:
    """A tokenizer of the words w5, w6, ... with BART's special tokens, for the golden models."""
    import tokenizers
    import transformers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(5, size))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    pieces = [("<s>", 0), ("</s>", 2)]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=pieces
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    named = dict(zip(names, special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
    return folder
