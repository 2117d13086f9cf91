"""The shape of the project: who imports whom, no torch, and the parameter trees of every model.

python tests/test_structure.py    records tests/golden/parameter_trees.json anew
"""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import flax.traverse_util
import pytest
from tiny_config import OF_TRANSFORMERS, spelled

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.models import FAMILIES, ModelConfig, read_config

PACKAGE = pathlib.Path(lsg_flax.__file__).parent
DESIGN = pathlib.Path(__file__).parent.parent / "docs" / "design.md"
TREES = pathlib.Path(__file__).parent / "golden" / "parameter_trees.json"

# What each file or folder may import of lsg_flax, lowest first: a part imports only those above its
# own line, so there is no cycle. (docs/design.md: import direction)
MAY_IMPORT = {
    **dict.fromkeys(
        ("buckets", "checks", "chips", "figures", "kernels", "locks", "progress", "sharding"), ""
    ),
    "files": "locks",
    "topologies": "chips",
    "patterns": "checks kernels sharding",
    "attention": "checks kernels patterns sharding",
    "adapters": "attention patterns",
    "models": "checks kernels patterns sharding",
    "tensor_names": "models",
    "convert_from_torch": "models tensor_names",
    "hub": "convert_from_torch files locks models patterns progress sharding tensor_names",
    "generation": "checks sharding",
    "data": "buckets files models progress",
    "inference": "buckets files locks models progress sharding",
    "training": "buckets checks chips data figures files generation hub locks models patterns "
    "progress sharding",
    "pipelines": "buckets data files generation hub inference locks models progress",
    "open_qa": "buckets checks convert_from_torch files hub inference locks models pipelines "
    "progress sharding",
    "planning": "chips figures files generation hub inference models patterns sharding topologies "
    "training",
    "__init__": "attention generation hub models open_qa patterns pipelines",
    "cli": "__init__ chips data files generation hub inference locks models open_qa patterns "
    "pipelines planning progress sharding training",
}
PARTS = list(MAY_IMPORT)
MODULES = sorted(str(p.relative_to(PACKAGE).with_suffix("")) for p in PACKAGE.rglob("*.py"))


def imports_of(file: pathlib.Path) -> set[tuple[str, str]]:
    """What a file imports of lsg_flax, inside functions too: module and name."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(a.name, "") for a in node.names if a.name.split(".")[0] == "lsg_flax"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            if node.module and node.module.split(".")[0] == "lsg_flax":
                found |= {(node.module, a.name) for a in node.names}
    return found


FACES = {
    (f"lsg_flax.{folder.parent.name}", name)
    for folder in PACKAGE.glob("*/__init__.py")
    for _, name in imports_of(folder)
}


def part_of(module: str, name: str = "") -> str:
    """lsg_flax.models.heads -> models; lsg_flax and sharding -> sharding; lsg_flax -> __init__."""
    _, *inner = module.split(".")
    return inner[0] if inner else name if name in MAY_IMPORT else "__init__"


def arrows_of(part: str) -> set[str]:
    """The other parts that a part imports."""
    files = [m for m in MODULES if m.split("/")[0] == part]
    used = {part_of(*pair) for m in files for pair in imports_of(PACKAGE / f"{m}.py")}
    return used - {part}


def test_every_part_has_its_line_in_the_table():
    assert {m.split("/")[0] for m in MODULES} == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_imports_are_the_arrows_of_the_table(part):
    """No other one, and none in the table that nobody uses."""
    assert arrows_of(part) == set(MAY_IMPORT[part].split())


def test_the_arrows_have_no_cycle():
    for place, part in enumerate(PARTS):
        assert set(MAY_IMPORT[part].split()) <= set(PARTS[:place]), part


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_is_imported_by_its_face(module):
    own = module.split("/")[0]
    for source, name in imports_of(PACKAGE / f"{module}.py"):
        inside = part_of(source, name) == own
        assert inside or source.count(".") < 2, f"{module} reaches into {source}"
        submodule = f"{source.removeprefix('lsg_flax.')}/{name}" in MODULES
        listed = (source, name) in FACES  # plan is a function, and a file too
        assert inside or listed or not submodule, f"{module} takes {name}.py of {source}"
        assert not name.startswith("_"), f"{module} takes the private {name} of {source}"


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")))
def test_a_face_lists_one_name_a_line(folder):
    """And holds nothing else, so that it is the list of what is public."""
    tree = ast.parse((PACKAGE / folder / "__init__.py").read_text())
    assert ast.get_docstring(tree), folder
    if folder == "cli":  # the commands' entry point
        return
    for node in tree.body[1:]:
        assert isinstance(node, ast.ImportFrom), f"{folder}: line {node.lineno}"
        (alias,) = node.names
        assert alias.asname == alias.name, f"{folder}: line {node.lineno}"


def test_imports_are_found(tmp_path):
    file = tmp_path / "x.py"
    lines = ["import lsg_flax", "def f():", "    from lsg_flax.models import Model"]
    file.write_text("\n".join([*lines, "from lsg_flax import hub, lsg_attention"]))
    found = {part_of(*pair) for pair in imports_of(file)}
    assert found == {"__init__", "models", "hub"}


@pytest.mark.parametrize("module", MODULES)
def test_the_body_of_a_function_is_at_most_50_lines(module):
    """From the first line of its first statement to its last line, functions inside it included;
    the signature and the docstring do not count."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 50, f"{module}: {node.name} has {length} lines"


def test_a_type_name_means_one_thing():
    """Classes, and aliases such as `Params = dict[str, Any]`, of any module."""
    where: dict[str, list[str]] = {}
    for module in MODULES:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names += [node.targets[0].id]
        for name in names:
            if re.fullmatch(r"_?[A-Z][A-Za-z]*[a-z][A-Za-z]*", name):
                where.setdefault(name.lstrip("_"), []).append(module)
    assert {n: modules for n, modules in where.items() if len(modules) > 1} == {}


def test_an_axis_letter_means_one_thing():
    """The legends of all modules are parts of the one in docs/design.md."""
    rows = re.findall(r"^\| ([A-Z]) \| ([^|]+) \|$", DESIGN.read_text(), re.MULTILINE)
    legend = {letter: meaning.strip() for letter, meaning in rows}
    for module in MODULES:
        text = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text())) or ""
        found = re.search(r"Axes: (.*?)(?:\n\n|$)", text, re.DOTALL)
        axes = re.sub(r"\s+", " ", found[1] if found else "")
        for letter, meaning in re.findall(r"(?:^|, |and )([A-Z]) (\w[^,.;(]*)", axes):
            assert meaning.startswith(legend[letter]), f"{module}: {letter} {meaning}"


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


def config_of(model_type: str, lsg: LSGConfig | None) -> ModelConfig:
    return read_config(spelled(model_type, SIZES)).with_overrides(lsg=lsg)


def parameter_trees() -> dict[str, dict[str, list[int]]]:
    """Path -> shape of every family, task and kind of attention."""
    trees = {}
    for family in (FAMILIES[name] for name in OF_TRANSFORMERS):
        for kind, lsg in (("plain", None), ("lsg", LSGConfig())):
            config = config_of(family.model_type, lsg)
            for task in family.heads:
                model = lsg_flax.Model(config, task)
                leaves = flax.traverse_util.flatten_dict(model.abstract_params(), sep="/")
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
