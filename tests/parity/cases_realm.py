"""The random cases of REALM, whose heads take more arrays than those of the other families, and
which has no LSG classes in PyTorch."""

import json

import numpy as np
from cases import VOCABULARY, generator_of, random_mask, random_sizes
from golden_data import GOLDEN
from jobs import Case
from safetensors.numpy import load_file
from tensorflow_names import OF_TENSORFLOW, in_tensorflow

from lsg_flax.models import FAMILIES

TASKS = ("base", "embedder", "scorer", "knowledge_augmented_encoder", "reader")
TIMES = 3  # of each head
COUNTS = ("num_candidates", "max_span_width", "reader_beam_size")


def realm_sizes(generator) -> dict:
    """Fields of config.json."""
    sizes = random_sizes(generator, "realm") | {
        "retriever_proj_size": int(generator.integers(3, 9)),
        "span_hidden_size": int(generator.integers(3, 9)),
        "num_block_records": 7,
        "searcher_beam_size": 6,
        "pad_token_id": 0,
    }
    return sizes | {name: int(generator.integers(1, 5)) for name in COUNTS}


def tokens(generator, *lead: int) -> dict[str, np.ndarray]:
    """Ragged ids, their mask and segments."""
    mask = random_mask(generator, int(np.prod(lead[:-1])), lead[-1]).reshape(lead)
    ids = np.where(mask, generator.integers(5, VOCABULARY, lead), 0)
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "token_type_ids": generator.integers(0, 2, lead).astype(np.int32),
    }


def realm_inputs(generator, task: str, config: dict) -> dict[str, np.ndarray]:
    """Arguments of a head, labels included, and the weights of what is differentiated."""
    length, count = int(generator.integers(8, 30)), config["num_candidates"]
    numbers = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    if task == "reader":
        return blocks(generator, config, length)
    if task == "knowledge_augmented_encoder":
        labels = generator.integers(0, VOCABULARY, (2, length))
        inputs = tokens(generator, 2, count, length)
        # PyTorch drops the gradient of padding's own embedding, which only labels there can make.
        chosen = (generator.random((2, length)) < 0.5) & inputs["attention_mask"].all(1)
        inputs |= {
            "relevance_score": 3 * numbers(2, count),
            "labels": np.where(chosen, labels, -100),
            "weight_loss": np.float32(1),
        }
        if generator.random() < 0.7:
            inputs["mlm_mask"] = (generator.random((2, length)) < 0.5).astype(np.int32)
        return inputs
    inputs = tokens(generator, 2, length)
    if task == "base":
        return inputs | {"weight_pooler_output": numbers(2, config["hidden_size"])}
    if task == "embedder":
        return inputs | {"weight_projected_score": numbers(2, config["retriever_proj_size"])}
    candidates = tokens(generator, 2, count, int(generator.integers(5, 20)))
    inputs |= {f"candidate_{name}": array for name, array in candidates.items()}
    return inputs | {"weight_relevance_score": numbers(2, count)}


def blocks(generator, config: dict, length: int) -> dict[str, np.ndarray]:
    """A question's blocks with up to three answers each: some beyond the end, some wider than the
    spans."""
    beams, found = config["reader_beam_size"], config["searcher_beam_size"]
    inputs = tokens(generator, found, length)
    real = inputs.pop("attention_mask").astype(bool)
    real[0, 4], inputs["input_ids"][0, 4] = True, 5
    inside = real & (np.arange(length) > 3)
    starts = generator.integers(4, length - 1, (found, 3))
    wide = config["max_span_width"] + 2
    ends = starts + generator.integers(0, wide, (found, 3))
    row = np.arange(found)[:, None]
    seen = inside[row, starts] & inside[row, np.minimum(ends, length - 1)]
    none = (generator.random((found, 3)) < 0.2) | ~seen
    starts, ends = np.where(none, -1, starts), np.where(none, -1, ends)
    read = {name: array[:beams] for name, array in inputs.items()}
    return read | {
        "attention_mask": real[:beams].astype(np.int32),
        "relevance_score": 2 * generator.standard_normal(found).astype(np.float32),
        "block_mask": inside,
        "start_positions": starts,
        "end_positions": ends,
        "has_answers": (ends >= 0).any(1),
        "weight_loss": np.float32(1),
    }


def realm_cases() -> dict[str, Case]:
    """Random models of every head and a run of each with all gradients; scorers with one embedder
    and with two; a reader and an embedder out of one file."""
    cases: dict[str, Case] = {}
    for task in TASKS:
        for i in range(TIMES):
            add(cases, f"realm_{task}_{i}", task, own=task == "scorer" and i > 0)
    generator = generator_of("realm open_qa")
    config = realm_sizes(generator)
    name = "realm_open_qa"
    cases[f"make_{name}"] = made(name, "RealmForOpenQA", config, generator)
    for part in ("reader", "embedder"):
        run = {"kind": "model", "class": "RealmForOpenQA", "checkpoint": name, "part": part}
        inputs = realm_inputs(generator, part, config)
        cases[f"{name}_{part}"] = Case(run, inputs)
    for kind, folder in OF_TENSORFLOW.items():
        config = json.loads((GOLDEN / folder / "config.json").read_text())
        run = {"kind": "tensorflow", "class": config["architectures"][0], "config": config}
        tensors = load_file(GOLDEN / folder / "model.safetensors")
        cases[f"tensorflow_{kind}"] = Case(run, in_tensorflow(tensors, kind))
    return cases


def add(cases, name: str, task: str, *, own: bool) -> None:
    generator = generator_of(name)
    config = realm_sizes(generator)
    cls = FAMILIES["realm"].class_name(task, lsg=False)
    fields = {"own_query_embedder": True} if own else {}
    cases[f"make_{name}"] = made(name, cls, config, generator, **fields)
    run = {"kind": "model", "class": cls, "checkpoint": name, "grad_of": "all", **fields}
    cases[name] = Case(run, realm_inputs(generator, task, config))


def made(name: str, cls: str, config: dict, generator, **fields) -> Case:
    seed = int(generator.integers(2**31))
    common = {"kind": "make_model", "config": config, "out": name, "seed": seed}
    return Case(common | {"class": cls} | fields)
