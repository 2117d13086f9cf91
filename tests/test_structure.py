"""The shape of the project: who imports whom, no torch, and the parameter trees of every model.

python tests/test_structure.py    records tests/golden/parameter_trees.json anew
"""

import ast
import json
import os
import pathlib
import subprocess
import sys

import flax.traverse_util
import jax
import pytest

import lsg_flax
from lsg_flax.config import EncoderConfig, LSGConfig
from lsg_flax.convert_from_torch import example_ids
from lsg_flax.models.families import FAMILIES

PACKAGE = pathlib.Path(lsg_flax.__file__).parent
TREES = pathlib.Path(__file__).parent / "golden" / "parameter_trees.json"

# What each part may import of lsg_flax; a folder is one part. (docs/design: import direction)
FILES = {"models", "config", "convert_from_torch", "to_lsg"}
MAY_IMPORT = {
    "config": set(),
    "sharding": set(),
    "generation": set(),
    "blocked": set(),
    "kernels": {"config"},
    "sparsity": {"config"},
    "halo": set(),
    "attention": {"blocked", "halo", "sharding", "sparsity", "kernels", "config"},
    "adapters": {"attention", "config"},
    "decoding": {"attention", "blocked", "sparsity", "config"},
    "layers": {"attention", "blocked", "halo", "decoding", "config", "sharding"},
    "models": {"layers", "attention", "decoding", "config", "sharding"},
    "convert_from_torch": {"models", "config"},
    "to_lsg": {"models", "config"},
    "files": set(),
    "sentence_files": {"files"},
    "hub": {*FILES, "files", "sentence_files", "sharding"},
    "data": {"files"},
    "losses": {"models", "config"},
    "chips": set(),
    "optimizers": set(),
    "checkpoints": {"files"},
    "progress": {"models", "config", "losses", "chips"},
    "metrics": {"models", "config", "losses", "sharding"},
    "training": {
        *FILES,
        *("hub", "losses", "data", "sharding"),
        *("optimizers", "checkpoints", "progress", "metrics"),
    },
    "finetune_settings": {"config", "data", "models", "optimizers", "sharding"},
    "finetune": {
        *FILES,
        *("hub", "losses", "data", "sharding", "checkpoints", "progress", "metrics", "training"),
        "finetune_settings",
    },
    "hlo_report": set(),
    "plan": {
        *FILES,
        *("files", "sentence_files", "hub", "sharding", "losses"),
        *("training", "inference", "chips", "hlo_report"),
    },
    "plan_search": {"plan", "models", "hlo_report"},
    "resumable_lines": set(),
    "inference": {*FILES, "hub", "data", "sharding", "resumable_lines"},
    "export": {*FILES, "files", "inference"},
    "embeddings": {*FILES, "files", "sentence_files", "hub", "inference"},
    "pipeline_tasks": {"config", "inference"},
    "pipeline_spans": {"pipeline_tasks"},
    "pipelines": {*FILES, "hub", "inference", "pipeline_tasks", "pipeline_spans"},
    "predict_files": {
        *("models", "convert_from_torch", "inference"),
        *("resumable_lines", "pipeline_tasks", "pipeline_spans"),
    },
}
MAY_IMPORT |= {"__init__": {*MAY_IMPORT}, "cli": {"__init__", *MAY_IMPORT}}


def part_of(module: str) -> str:
    """lsg_flax.models.heads -> models; lsg_flax -> __init__."""
    return [*module.split("."), "__init__"][1]


def imports_of(file: pathlib.Path) -> set[str]:
    """Parts of lsg_flax that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {part_of(a.name) for a in node.names if a.name.split(".")[0] == "lsg_flax"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            if node.module == "lsg_flax":
                names = {a.name for a in node.names}
                found |= {name if name in MAY_IMPORT else "__init__" for name in names}
            elif node.module and node.module.startswith("lsg_flax."):
                found.add(part_of(node.module))
    return found


MODULES = sorted(str(p.relative_to(PACKAGE).with_suffix("")) for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    part = module.split("/")[0]
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {part} may import"
    wrong = imports_of(PACKAGE / f"{module}.py") - MAY_IMPORT[part] - {part}
    assert not wrong, f"{module} imports {sorted(wrong)}; it may import {sorted(MAY_IMPORT[part])}"


def test_the_arrows_have_no_cycle():
    done: set[str] = set()
    while ready := {p for p, of in MAY_IMPORT.items() if p not in done and of <= done}:
        done |= ready
    assert done == set(MAY_IMPORT)


def test_the_arrows_are_checked(tmp_path):
    file = tmp_path / "x.py"
    lines = ["import lsg_flax", "def f():", "    from lsg_flax.models.model import Model"]
    file.write_text("\n".join([*lines, "from lsg_flax import hub, lsg_attention"]))
    assert imports_of(file) == {"__init__", "models", "hub"}


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_inside_functions_only(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    top = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for n in ast.walk(f)
        if isinstance(n, ast.Import | ast.ImportFrom)
    }
    for node in (n for n in top if id(n) not in inside):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        assert not {str(n).split(".")[0] for n in names} & {"torch", "tensorflow"}, module


@pytest.mark.slow
def test_importing_everything_needs_no_torch(tmp_path):
    """In a process where torch cannot be imported at all, with a checkpoint loaded and run."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    folder = TREES.parent / "bert_masked_lm"
    parts = [m.replace("/", ".").removesuffix(".__init__") for m in MODULES if m != "__init__"]
    code = "\n".join(
        [
            "import sys",
            *(f"import lsg_flax.{part}" for part in parts),
            f"model, params = lsg_flax.from_pretrained({str(folder)!r})",
            "assert 'torch' not in sys.modules",
        ]
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    poisoned = subprocess.run([sys.executable, "-c", "import torch"], env=environment, stderr=-3)
    assert poisoned.returncode == 1


# -------------------------------------------------------------------------------- parameter trees

SIZES = {
    "vocab_size": 13,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 32,
}


def config_of(model_type: str, lsg: LSGConfig | None) -> EncoderConfig:
    return EncoderConfig.from_dict({"model_type": model_type, **SIZES}).with_overrides(lsg=lsg)


def parameter_trees() -> dict[str, dict[str, list[int]]]:
    """Path -> shape of every family, task and kind of attention."""
    trees = {}
    for family in FAMILIES.values():
        for kind, lsg in (("plain", None), ("lsg", LSGConfig())):
            config = config_of(family.model_type, lsg)
            for task in family.heads:
                model = lsg_flax.Model(config, task)
                shapes = jax.eval_shape(
                    lambda model=model: model.init(jax.random.key(0), example_ids(model))
                )
                leaves = flax.traverse_util.flatten_dict(shapes["params"], sep="/")
                trees[f"{family.model_type} {kind} {task}"] = {
                    path: list(leaf.shape) for path, leaf in sorted(leaves.items())
                }
    return trees


@pytest.mark.slow
def test_parameter_trees_are_those_on_record():
    """A changed tree breaks users' saved parameters: record it anew only on purpose."""
    recorded, now = json.loads(TREES.read_text()), parameter_trees()
    assert list(now) == list(recorded)
    for name, tree in now.items():
        assert tree == recorded[name], f"{name}; python tests/test_structure.py records it anew"


def test_every_parameter_is_on_one_key_of_the_table():
    """And each key's path exists: the table and the model know the same leaves."""
    for name, tree in json.loads(TREES.read_text()).items():
        model_type, kind, task = name.split()
        config = config_of(model_type, LSGConfig() if kind == "lsg" else None)
        keys = FAMILIES[model_type].keys(task, config)
        assert {key.path for key in keys} == set(tree), name
        assert len({key.torch for key in keys}) == len(keys), name


if __name__ == "__main__":
    trees = (f"{json.dumps(name)}: {json.dumps(tree)}" for name, tree in parameter_trees().items())
    TREES.write_text("{\n" + ",\n".join(trees) + "\n}\n")
    print(f"wrote {TREES}")
