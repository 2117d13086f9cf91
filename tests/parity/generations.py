"""The cases of generated tokens: encoder-decoders, plain and LSG, whose weights are PyTorch's or
ours, and calls of `generate` for each."""

import pathlib

import numpy as np
from cases import SEQ2SEQ, VOCABULARY, generator_of
from jobs import Case
from saved import random_params
from tiny_config import spelled

import lsg_flax
from lsg_flax.models import FAMILIES, read_config

BLOCK = 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
PATTERNS = {"bart": "norm", "mbart": "block_stride", "pegasus": "pooling"}
LENGTHS = (2 * BLOCK - 3, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK + 2)
TASK = "conditional_generation"
MODELS = [
    f"{weights}_{kind}_{family}"
    for weights in ("torch", "saved")
    for kind in ("plain", "lsg")
    for family in SEQ2SEQ
]
FORCED = {"bart": 0, "mbart": 9, "pegasus": 7}
ENDS = {family: [1 if family == "pegasus" else 2, 20, 21, 22] for family in SEQ2SEQ}
GREEDY = {"max_new_tokens": 12, "min_length": 5}
BEST = {
    "num_beams": 3,
    "num_return_sequences": 3,
    "early_stopping": True,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "max_length": 14,
}
OPEN = {"num_beams": 3, "length_penalty": 0.5, "max_length": 14, "repetition_penalty": 1.2}
NEVER = {"num_beams": 3, "early_stopping": "never", "min_new_tokens": 4, "max_length": 16}


def calls_of(weights: str, kind: str, family: str) -> list[dict]:
    """What is asked of a model: the names of the inputs, and the options."""
    first = {"forced_bos_token_id": FORCED[family], "eos_token_id": ENDS[family]}
    lengths = LENGTHS if (weights, kind) == ("torch", "lsg") else LENGTHS[-1:]
    asked = [BEST if kind == "lsg" else OPEN] + ([GREEDY] if weights == "torch" else [])
    calls = [([f"of_{n}"], options | first) for n in lengths for options in asked]
    if weights == "torch":
        calls += [([f"of_{LENGTHS[-1]}", "prompt"], NEVER)]
    # transformers begins an mBART without a start token with bos_token_id; here it has to be said.
    start = {"decoder_start_token_id": 6} if family == "mbart" else {}
    return [{"inputs": names, "options": options | start} for names, options in calls]


def inputs_of(generator, pad: int) -> dict[str, np.ndarray]:
    """Documents, the second of which is padded, and what the decoder shall begin with."""
    arrays = {"prompt.decoder_input_ids": generator.integers(7, VOCABULARY, (3, 2))}
    for length in LENGTHS:
        ids = generator.integers(4, VOCABULARY, (3, length))
        ids[1, length - int(generator.integers(2, length // 2)) :] = pad
        arrays |= {f"of_{length}.input_ids": ids, f"of_{length}.attention_mask": ids != pad}
    return arrays


def generation_cases(folder: pathlib.Path) -> dict[str, Case]:
    """The cases; saves the models whose weights are ours."""
    cases = {}
    for name in MODELS:
        weights, kind, family = name.split("_")
        generator, lsg = generator_of(f"generate {name}"), kind == "lsg"
        pattern = {"block_size": BLOCK, "sparse_block_size": BLOCK, "num_global_tokens": 2}
        pattern["sparsity_type"] = PATTERNS[family]
        fields = spelled(family, SIZES) | (pattern if lsg else {})
        cls = FAMILIES[family].class_name(TASK, lsg=lsg)
        if weights == "torch":
            seed = int(generator.integers(2**31))
            made = {"kind": "make_model", "config": fields, "out": name, "scale": 0.5}
            cases[f"make_{name}"] = Case(made | {"class": cls, "seed": seed})
        else:
            config = read_config(fields | ({"base_model_prefix": "lsg"} if lsg else {}))
            model = lsg_flax.Model(config.with_overrides(is_encoder_decoder=True), TASK)
            lsg_flax.save_pretrained(folder / name, model, random_params(model, generator, 0.5))
        pad = read_config(fields).pad_token_id
        run = {"kind": "generate", "class": cls, "checkpoint": name}
        run["calls"] = calls_of(weights, kind, family)
        cases[name] = Case(run, inputs_of(generator, pad))
    return cases
