"""Record tests/golden/realm_plain_open_qa from the PyTorch reference, in its environment (see
README.md): a tiny RealmForOpenQA with its tokenizer and block records, and what it answers.

    python tests/reference/record_open_qa.py [--out FOLDER] [--model FOLDER] [--seed N]

With --model the folder is one that is there already, and only answers are written. Records are
fixed-width bytes, which both read.

answers.npz has, for call N: ids_N, mask_N, types_N, the question; answers_N, JSON of the answers'
ids or null; train_N; and what came out: predicted_N, blocks_N (numbers of the blocks found) and
FIELD_N of the reader's output. candidates is JSON of [texts, pairs, max_length], candidates_FIELD
what RealmTokenizer.batch_encode_candidates makes of them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import RealmConfig, RealmForOpenQA, RealmRetriever, RealmTokenizerFast

OUTPUT = Path(__file__).resolve().parents[1] / "golden" / "realm_plain_open_qa"
WORDS = "the a of in and by was is who what where wrote built found river tower song city poet king"
NAMES = "arno eiffel paris dante florence homer troy wren london nile cairo bach leip ##zig ##s . ?"
BLOCKS = [
    "the river arno is in florence . dante was a poet of florence",
    "eiffel built the tower in paris",
    "the song of troy was by homer , the poet",
    "wren built the city of london and the tower",
    "cairo is a city by the river nile",
    "bach found a king in leipzig and wrote the song",
    "the poet dante wrote the song of florence . the king of paris found the song in the city",
    "the king of troy was found in the river",
    "who was homer ? homer was a poet",
    "paris",
    "the tower of london is by the river",
    "the city of cairo was built by the king . the city is in the sand of the nile and the sun is "
    "hot in the city of cairo where the king was built a tower",
]
CALLS = [
    ("who built the tower in paris ?", ["eiffel"], False),
    ("who built the tower in paris ?", ["eiffel"], True),
    ("where is the river arno ?", None, False),
    ("what was the song by dante ?", ["the song of florence", "dante", "king"], False),
    ("what was the song by dante ?", ["the song of florence", "dante", "king"], True),
    ("who was in leipzig ?", ["bach found a king in"], True),
    ("who ?", ["nile", "the sun"], False),
]
FIELDS = ("loss", "retriever_loss", "reader_loss", "retriever_correct", "reader_correct")
FIELDS += ("block_idx", "candidate", "start_pos", "end_pos")
CANDIDATES = [
    [["who wrote", "the king of troy was found in the river"], ["paris", "a b c"]],
    [["the song", "troy"], ["the tower of london is by the river", "is it"]],
    9,
]


def make(folder, seed):
    """Saves the model with all that belongs to it."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list("abcdefghijklmnopqrstuvwxyz,")
    vocabulary = dict.fromkeys([*special, *WORDS.split(), *NAMES.split(), *letters])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    tokenizer = RealmTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True)
    config = RealmConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        retriever_proj_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        span_hidden_size=10,
        max_span_width=5,
        reader_beam_size=3,
        searcher_beam_size=7,
        reader_seq_len=30,
        num_block_records=len(BLOCKS),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    model = RealmForOpenQA(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.4)
                if name.lower().endswith(("norm.weight", "normalization.weight")):
                    tensor.add_(1)
        for parameter in model.embedder.cls.LayerNorm.parameters():
            parameter.mul_(0.1)  # so that not always the first block is the best
    model.save_pretrained(folder)
    retriever = RealmRetriever(np.array([block.encode() for block in BLOCKS]), tokenizer)
    retriever.save_pretrained(folder)


def answers(folder):
    """What the model in the folder answers, as arrays."""
    retriever = RealmRetriever.from_pretrained(folder)
    model, info = RealmForOpenQA.from_pretrained(
        folder, retriever=retriever, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer, arrays = retriever.tokenizer, {}
    seen = []

    def call(blocks, *given, **options):
        seen.append(blocks.numpy())
        return RealmRetriever.__call__(retriever, blocks, *given, **options)

    model.retriever = call
    for number, (question, texts, train) in enumerate(CALLS):
        encoded = tokenizer([question], return_tensors="pt", return_token_type_ids=True)
        ids = None
        if texts is not None:
            ids = tokenizer(texts, add_special_tokens=False).input_ids
        with torch.no_grad():
            found = model.train(train)(**encoded, answer_ids=ids)
        shorts = (("ids", "input_ids"), ("mask", "attention_mask"), ("types", "token_type_ids"))
        arrays |= {f"{short}_{number}": encoded[name].numpy() for short, name in shorts}
        arrays |= {f"answers_{number}": json.dumps(ids), f"train_{number}": np.array(train)}
        arrays |= {f"predicted_{number}": found.predicted_answer_ids.numpy()}
        arrays |= {f"blocks_{number}": seen.pop()}
        for field in FIELDS:
            value = getattr(found.reader_output, field)
            if value is not None:
                arrays[f"{field}_{number}"] = value.numpy()
    texts, pairs, length = CANDIDATES
    encoded = tokenizer.batch_encode_candidates(
        texts, text_pair=pairs, max_length=length, truncation=True, return_tensors="np"
    )
    arrays |= {f"candidates_{name}": value for name, value in encoded.items()}
    return arrays | {"candidates": json.dumps(CANDIDATES)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args()
    if options.model is None:
        make(options.out, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    found = answers(options.model or options.out)
    np.savez_compressed(options.out / "answers.npz", **found)
    print(f"{options.out}: {len(CALLS)} calls")


if __name__ == "__main__":
    main()
