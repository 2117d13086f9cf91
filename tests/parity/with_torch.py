"""What needs torch beside lsg_flax: reading .bin files, refusing pickles, and today's transformers
reading what we saved. `python with_torch.py SITE_PACKAGES REFERENCE_DIR SAVED_DIR OUT_DIR`

Runs with lsg_flax's interpreter; torch comes from the end of the path, out of the reference
environment, unless it is installed.
"""

import json
import pathlib
import sys

sys.path.append(sys.argv[1])

import flax.traverse_util
import numpy as np
import torch
import transformers

import lsg_flax
from lsg_flax.hub.weights import open_tensors
from lsg_flax.models import FAMILIES

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


read_bins()
facts = {"bfloat16": read_bfloat16(), "errors": errors(), "transformers": current_transformers()}
(OUT / "facts.json").write_text(json.dumps(facts))
