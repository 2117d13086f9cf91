"""Checkpoints that lsg_flax writes, and what the reference shall do with them."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from cases import (
    COMPARED,
    GRADIENTS_OF,
    HEADS,
    KINDS,
    SEED,
    generator_of,
    random_inputs,
    random_model,
    random_sizes,
)
from jobs import Case, Results, ask
from tiny_config import has_two_stacks
from unread import unread_by

import lsg_flax
from lsg_flax.models import FAMILIES, read_config
from lsg_flax.models.config_json import DIALECTS
from lsg_flax.patterns.config import SPARSITY_TYPES

PLAIN_RUN = ("base", "masked_lm", "pretraining", "multiple_choice")
CONVERTED = {
    "default": {"max_sequence_length": 700, "num_global_tokens": 4},
    "options": {
        "max_sequence_length": 1500,
        "global_positional_stride": 16,
        "use_token_ids": False,
        "random_global_init": True,
        "seed": 7,
        "num_global_tokens": 2,
        "sparsity_type": "pooling",
    },
}
BLOCKS = {"block_size": 8, "sparse_block_size": 8}


def random_params(model: lsg_flax.Model, generator, scale: float = 0.2) -> dict:
    """Parameters all of which matter: norms around 1, everything else around 0."""
    leaves = flax.traverse_util.flatten_dict(model.abstract_params(), sep="/")
    return flax.traverse_util.unflatten_dict(
        {
            path: jnp.asarray(
                path.endswith("/scale") + scale * generator.standard_normal(leaf.shape), jnp.float32
            )
            for path, leaf in leaves.items()
        },
        sep="/",
    )


@contextlib.contextmanager
def installed_converter(folder: pathlib.Path) -> Iterator[None]:
    """The reference's package, whose code is copied and not run, as if it were installed here."""
    package = ask("from importlib.util import find_spec; print(find_spec('lsg_converter').origin)")
    folder.mkdir()
    (folder / "lsg_converter").symlink_to(pathlib.Path(package).parent, target_is_directory=True)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def write_checkpoints(folder: pathlib.Path, reference: Results) -> dict[str, Case]:
    """Saves models of every head, LSG and plain, and conversions; returns the cases for them."""
    cases: dict[str, Case] = {}
    for i, (family, task) in enumerate(HEADS):
        kind = SPARSITY_TYPES[(i + SEED + 3) % 7]
        for name in KINDS[family]:
            sparsity = kind if name == "lsg" else None
            write(cases, folder, f"{name}_{family}_{task}", family, task, sparsity)
    for i, family in enumerate(COMPARED):
        for kind in KINDS[family]:
            sparsity = SPARSITY_TYPES[(i + SEED) % 7] if kind == "lsg" else None
            name = f"{kind}_{family}_unread"
            task = GRADIENTS_OF[family] if has_two_stacks(family) else "token_classification"
            write(cases, folder, name, family, task, sparsity)
            add_unread(folder / name / "config.json", family, lsg=sparsity is not None)
    untied = {"tie_word_embeddings": False}
    write(cases, folder, "lsg_bert_masked_lm_untied", "bert", "masked_lm", "norm", **untied)
    cross = "plain_bert_causal_lm_cross"
    write(cases, folder, cross, "bert", "causal_lm", None, add_cross_attention=True)
    width = lsg_flax.from_pretrained(folder / cross)[0].config.hidden_size
    states = generator_of(cross).standard_normal((2, 7, width)).astype(np.float32)
    inputs = {**cases[cross].inputs, "encoder_hidden_states": states}
    cases[cross] = cases[cross]._replace(inputs=inputs)
    for name, options in CONVERTED.items():
        source = reference.folder / "convert_512"
        with installed_converter(folder / f"installed_{name}"):
            lsg_flax.convert_checkpoint(source, folder / f"converted_{name}", **options, **BLOCKS)
        inputs = random_inputs(generator_of(name), "masked_lm", BLOCKS)
        run = {"class": "LSGBertForMaskedLM", "checkpoint": f"converted_{name}"}
        cases[f"converted_{name}"] = Case({"kind": "model", **run}, inputs)
        cases[f"auto_{name}"] = Case({"kind": "auto", **run, "class": "AutoModelForMaskedLM"})
        again = {"keep_first_global_token": True, "max_sequence_length": 900}
        cases[f"again_{name}"] = Case({"kind": "convert", **run, "options": again})
    return cases


def add_unread(file: pathlib.Path, family: str, *, lsg: bool) -> None:
    """Adds what the family does not read; and of what it reads by two names, one that loses."""
    values = json.loads(file.read_text())
    for name in DIALECTS[family].also:
        theirs = DIALECTS[family].names[name]
        values |= {name: values[theirs], theirs: 5}
    file.write_text(json.dumps(unread_by(family, lsg=lsg) | values))


def write(cases, folder: pathlib.Path, name: str, family, task, kind, **fields) -> None:
    generator = generator_of(f"saved_{name}")
    values = (
        random_model(generator, family, task, kind) if kind else random_sizes(generator, family)
    )
    if task == "question_answering":
        values["num_labels"] = 2
    lsg = {"base_model_prefix": "lsg"} if kind else {"is_decoder": task == "causal_lm"}
    config = read_config(values | lsg | fields)
    if has_two_stacks(family):
        config = config.with_overrides(**FAMILIES[family].head(task).task.fixed)
    model = lsg_flax.Model(config, task)
    lsg_flax.save_pretrained(folder / name, model, random_params(model, generator))
    common = {"class": FAMILIES[family].class_name(task, lsg=bool(kind)), "checkpoint": name}
    cases[f"strict_{name}"] = Case({"kind": "strict_load", **common})
    inputs = random_inputs(generator, task, values)
    cases[name] = Case({"kind": "model", **common}, inputs)
