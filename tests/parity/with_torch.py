"""What needs torch beside lsg_flax: reading .bin files, refusing pickles, and today's transformers
reading what we saved. `python with_torch.py SITE_PACKAGES REFERENCE_DIR SAVED_DIR OUT_DIR`

Runs with lsg_flax's interpreter; torch comes from the end of the path, out of the reference
environment, unless it is installed.
"""

import json
import pathlib
import re
import shutil
import sys
import warnings

sys.path.append(sys.argv[1])

import flax.traverse_util
import numpy as np
import safetensors.torch
import torch
import transformers

import lsg_flax
from lsg_flax.hub.weights import open_tensors
from lsg_flax.models import FAMILIES

# To transformers 5; and Reformer, which has parity tests of its own.
UNKNOWN = ("realm", "local-transformer", "reformer")
FAMILIES = {name: each for name, each in FAMILIES.items() if name not in UNKNOWN}
REFERENCE, SAVED, OUT = map(pathlib.Path, sys.argv[2:])


def read_bins():
    for name in ("bin", "bin_sharded"):
        _, params = lsg_flax.from_pretrained(REFERENCE / f"file_{name}")
        np.savez(OUT / f"{name}.npz", **flax.traverse_util.flatten_dict(params, sep="/"))


def read_bfloat16():
    exact = {"a": torch.randn(3, 2), "b": torch.tensor(2.5)}
    folder = OUT / "half"
    folder.mkdir()
    torch.save({k: v.bfloat16() for k, v in exact.items()}, folder / "pytorch_model.bin")
    tensors = open_tensors(folder)
    return {
        name: [
            str(tensors[name].dtype),
            bool((tensors[name] == v.bfloat16().float().numpy()).all()),
        ]
        for name, v in exact.items()
    }


def errors():
    """Message of the ValueError that each bad file gives."""
    good = (REFERENCE / "file_bin" / "pytorch_model.bin").read_bytes()
    bad = {"code": {"w": pathlib.PurePosixPath("x")}, "list": [torch.zeros(2)], "number": {"a": 1}}
    found = {}
    for name in (*bad, "truncated", "garbage", "empty"):
        folder = OUT / name
        folder.mkdir()
        file = folder / "pytorch_model.bin"
        if name in bad:
            torch.save(bad[name], file)
        else:
            contents = {"truncated": good[: len(good) // 2], "garbage": b"<html></html>"}
            file.write_bytes(contents.get(name, b""))
        try:
            open_tensors(folder)
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
    return found


def same(folder, expected) -> bool | str:
    """Whether the folder holds these parameters."""
    read = flax.traverse_util.flatten_dict(lsg_flax.from_pretrained(folder)[1], sep="/")
    wrong = [path for path in expected if not np.array_equal(read[path], expected[path])]
    return not wrong or f"others at {wrong}"


def stored_otherwise():
    """Whether a model is the same from everything that PyTorch users write of it."""
    source = SAVED / "plain_roberta_masked_lm"
    expected = flax.traverse_util.flatten_dict(lsg_flax.from_pretrained(source)[1], sep="/")
    model = transformers.RobertaForMaskedLM.from_pretrained(source)
    state = model.state_dict()
    decoder = "lm_head.decoder.weight"
    compiled = torch.compile(model).state_dict()
    assert all(name.startswith("_orig_mod.") for name in compiled)
    ways = {
        "parameters": dict(model.named_parameters()),
        "pairs": list(model.named_parameters()),
        "views": {n: torch.stack([t, t], -1)[..., 1] for n, t in state.items()},
        "lightning": {
            "state_dict": {f"model.{n}": t for n, t in state.items()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
            "epoch": 3,
        },
        "wrapped": {f"module.{n}": t for n, t in state.items()},
        "compiled": compiled,
        "twin": {
            n: t for n, t in state.items() if n != "roberta.embeddings.word_embeddings.weight"
        },
        "own": {n: t for n, t in state.items() if n != decoder},
    }
    found = {}
    for name, tree in ways.items():
        folder = copied(source, name)
        torch.save(tree, folder / "pytorch_model.bin")
        found[name] = same(folder, expected)
    for family in FAMILIES.values():
        task = "masked_lm" if "masked_lm" in family.heads else "conditional_generation"
        source = SAVED / f"plain_{family.model_type}_{task}"
        expected = flax.traverse_util.flatten_dict(lsg_flax.from_pretrained(source)[1], sep="/")
        name = family.class_name(task, lsg=False)
        model = getattr(transformers, name).from_pretrained(source)
        folder = copied(source, f"save_model_{family.model_type}")
        safetensors.torch.save_model(model, str(folder / "model.safetensors"))
        found[folder.name] = same(folder, expected)
    return found


def copied(source, name: str) -> pathlib.Path:
    """A folder with the source's config.json."""
    folder = OUT / name
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    return folder


def odd_kinds():
    """What is said of tensors that numpy does not have, where a weight should be."""
    source = SAVED / "plain_roberta_masked_lm"
    state = transformers.RobertaForMaskedLM.from_pretrained(source).state_dict()
    name = "lm_head.dense.weight"
    weight = state[name]
    kinds = {
        "float8": weight.to(torch.float8_e4m3fn),
        "quantized": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "sparse": weight.to_sparse(),
        "meta": weight.to("meta"),
        "int8": weight.to(torch.int8),
    }
    found = {}
    for kind, tensor in kinds.items():
        folder = copied(source, f"kind_{kind}")
        torch.save(state | {name: tensor}, folder / "pytorch_model.bin")
        try:
            lsg_flax.from_pretrained(folder)
            found[kind] = "no error"
        except ValueError as error:
            found[kind] = str(error)
    return found


def broken_bins(count: int = 150):
    """Errors that are not ours of cut and changed files; of the others nothing can be said, since
    a changed value cannot be seen."""
    good = (REFERENCE / "file_bin" / "pytorch_model.bin").read_bytes()
    folder = copied(REFERENCE / "file_bin", "broken")
    drawn, wrong = np.random.default_rng(0), []
    for number in range(count):
        contents = bytearray(good)
        if number % 3 == 0:
            del contents[int(drawn.integers(len(contents))) :]
        for place in drawn.integers(len(contents), size=number % 3 * 4):
            contents[place] = drawn.integers(256)
        (folder / "pytorch_model.bin").write_bytes(contents)
        try:
            lsg_flax.from_pretrained(folder)
        except (ValueError, FileNotFoundError) as error:
            ours = re.search(r"pytorch_model\.bin|\.(weight|bias)", str(error))
            if type(error) is not ValueError or not ours or "weights_only" in str(error):
                wrong.append(repr(error))
        except Exception as error:
            wrong.append(repr(error))
    return wrong


def current_transformers():
    found = {}
    for family in FAMILIES.values():
        for task in family.heads:
            name = family.class_name(task, lsg=False)
            _, info = getattr(transformers, name).from_pretrained(
                SAVED / f"plain_{family.model_type}_{task}", output_loading_info=True
            )
            found[name] = {key: sorted(map(str, value)) for key, value in info.items()}
    return found


warnings.simplefilter("ignore")  # names that are cut short, heads that are drawn
read_bins()
facts = {
    "stored_otherwise": stored_otherwise(),
    "odd_kinds": odd_kinds(),
    "broken_bins": broken_bins(),
}
facts |= {"bfloat16": read_bfloat16(), "errors": errors(), "transformers": current_transformers()}
(OUT / "facts.json").write_text(json.dumps(facts))
