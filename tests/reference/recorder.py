"""What record_golden.py records with: cases run by worker.py and gathered into files, and inputs
that are functions of their shape.

Axes: n batch, h heads, t tokens without globals, d head size.
"""

import functools
import json
from pathlib import Path

import numpy as np
import worker

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
VOCABULARY = 31


class Recorder:
    """Runs cases and gathers their arrays by file, equal ones once, and the manifest."""

    def __init__(self):
        self.files, self.seen, self.manifest = {}, {}, {}

    def add(self, file, name, kind, inputs, **fields):
        if name in self.manifest:
            raise ValueError(f"two cases are called {name}")
        outputs, report = worker.run_case(dict(name=name, kind=kind, **fields), inputs, GOLDEN)
        entry = dict(file=f"{file}.npz", kind=kind, **fields)
        entry["inputs"] = {k: self.store(file, f"{name}/{k}", v) for k, v in inputs.items()}
        entry["outputs"] = {k: self.store(file, f"{name}/{k}", v) for k, v in outputs.items()}
        self.manifest[name] = entry | ({"report": report} if any(report.values()) else {})

    def store(self, file, key, array):
        if not np.isfinite(array).all():
            raise ValueError(f"{key} is not finite")
        content = (file, array.dtype.str, array.shape, array.tobytes())
        key = self.seen.setdefault(content, key)
        self.files.setdefault(file, {})[key] = array
        return key

    def write(self):
        for file, arrays in self.files.items():
            np.savez_compressed(GOLDEN / f"{file}.npz", **arrays)
        compact = functools.partial(json.dumps, separators=(",", ":"))
        lines = (f"{compact(name)}:{compact(entry)}" for name, entry in self.manifest.items())
        (GOLDEN / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def record_alone(record, file):
    """What `record` adds, all of it in one file: every other entry of the manifest is kept as it
    is, byte for byte."""
    recorder = Recorder()
    record(recorder)
    manifest = GOLDEN / "golden.json"
    others = [line for line in manifest.read_text().splitlines()[1:-1] if file not in line]
    recorder.write()
    own = manifest.read_text().splitlines()[1:-1]
    lines = [line.rstrip(",") for line in (*others, *own)]
    manifest.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    json.loads(manifest.read_text())


# ---------------------------------------------------------------------------------------------
# Inputs, each a function of its shape


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def token_ids(*shape):
    return np.random.default_rng(shape).integers(5, VOCABULARY, shape).astype(np.int32)


def query_key_value(n, h, t, d, *, mask=None, gradients=False, key_heads=None):
    query, key, value, cotangent = normal(4, n, h, t, d)
    inputs = dict(query=query, key=key[:, :key_heads], value=value[:, :key_heads])
    inputs |= {} if mask is None else dict(mask=mask)
    return inputs | (dict(cotangent=cotangent) if gradients else {})


def ragged(n, t):
    """[n,t], True = real: rows of 0.45 t and 0.85 t tokens, so the first ends in padding blocks."""
    lengths = [max(1, int(t * (0.45 + 0.4 * (i % 2)))) for i in range(n)]
    return np.arange(t) < np.array(lengths)[:, None]


def leaks(config, mask, *, types=("bos_pooling",)):
    """{strict_reference: True} if some group is all padding, which the reference then unmasks."""
    factor, kind = config.get("sparsity_factor", 2), config["sparsity_type"]
    if kind == "lsh" and factor == config.get("sparse_block_size"):
        kind = "bos_pooling"
    if kind not in types or factor <= 1 or mask.reshape(len(mask), -1, factor).any(-1).all():
        return {}
    return dict(strict_reference=True)


def blocks_of(mask, block_size):
    """The mask as the reference pads it: to whole blocks, when longer than two."""
    t = mask.shape[-1]
    return np.pad(mask, ((0, 0), (0, -t % block_size if t > 2 * block_size else 0)))
