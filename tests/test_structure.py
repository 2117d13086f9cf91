"""The shape of the project: who imports whom, no torch, docstrings, and the parameter trees of
every model.

python tests/test_structure.py    records tests/golden/parameter_trees.json anew
"""

import ast
import builtins
import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator

import flax.traverse_util
import jax
import numpy as np
import pytest
from jaxtyping import Array, Float
from tiny_config import OF_TRANSFORMERS, spelled

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.checks import require
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


# ----------------------------------------------------------------------- docstrings of public names

SHAPE = re.compile(r"(?<!\w)\[[\w*.+ ,-]+\]")  # such as [B, T, D]
SPECIAL = ("__init__", "__post_init__", "__call__")  # these may be documented by their class


def public_names() -> dict[str, type | types.FunctionType]:
    """The classes and functions of the faces, and of the modules that docs/api shows as a whole."""
    folders = [p.parent.relative_to(PACKAGE.parent).parts for p in PACKAGE.rglob("__init__.py")]
    faces = [".".join(parts) for parts in folders if parts[-1] != "cli"]
    pages = "".join(page.read_text() for page in sorted(DESIGN.parent.glob("api/*.md")))
    whole = re.findall(r"automodule:: (lsg_flax\.\w+)$", pages, re.MULTILINE)
    found = {}
    for module in map(importlib.import_module, [*faces, *whole]):
        home = module.__name__ if module.__name__ in whole else "lsg_flax."
        for name, item in vars(module).items():
            kind = inspect.unwrap(item) if callable(item) else None
            is_ours = str(getattr(kind, "__module__", "")).startswith(home) and name[0] != "_"
            if is_ours and isinstance(kind, type | types.FunctionType):
                found[f"{kind.__module__}.{name}"] = kind
    return found


def function_of(member: object) -> types.FunctionType | None:
    """The function of a method or property; None for what is none."""
    for name in ("fget", "func", "__func__"):
        member = getattr(member, name, None) or member
    member = inspect.unwrap(member) if callable(member) else None
    return member if isinstance(member, types.FunctionType) else None


def source_of(item: type | types.FunctionType) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(item))).body[0]


def uncaught(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all that is below it, but not what stands under `try` with an `except`."""
    yield node
    caught = node.body if isinstance(node, ast.Try) and node.handlers else []
    for child in ast.iter_child_nodes(node):
        if child not in caught:
            yield from uncaught(child)


def errors_of(function: types.FunctionType, owner: type | None, seen: set) -> set[type]:
    """What a function raises: by itself, in private functions of its module or class, and in
    `require` and functions named check...; ValueError in such methods of other objects."""
    known, found = vars(builtins) | function.__globals__, set()
    for node in uncaught(source_of(function)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            error = known.get(ast.unparse(raised))
            found |= {error} if isinstance(error, type) else set()
        elif isinstance(node, ast.Call):
            name = re.sub(r"^(self|cls)\.", "", ast.unparse(node.func))
            called = function_of(getattr(owner, name, None) or known.get(name))
            is_ours = str(getattr(called, "__module__", "")).startswith("lsg_flax.")
            if is_ours and re.match(r"_[a-z]|require$|check", name) and called not in seen:
                found |= errors_of(called, owner, seen | {called})
            found |= {ValueError} if re.search(r"\.check(_\w+)?$", name) else set()
    return found


def is_said(error: type, text: str) -> bool:
    """Whether "raises" stands before the error or a more general one."""
    names = [e.__name__ for e in error.__mro__ if e not in (Exception, BaseException, object)]
    return bool(re.search(rf"[Rr]aises?\b.*\b({'|'.join(names)})\b", text, re.DOTALL))


def has_no_axes(annotation: ast.expr) -> bool:
    """Whether it is an array, but not one of jaxtyping such as Float[Array, "B T"]."""
    rest = re.sub(r"\w+\[[^\[\]]*'[^\[\]]*\]", "", ast.unparse(annotation))
    return bool(re.search(r"\b(Array|ndarray|ArrayLike)\b", rest))


def lacks_of(function: types.FunctionType, text: str, owner: type | None = None) -> set[str]:
    """The parts that the docstring of a function lacks: itself, errors, and shapes unless types
    give them. A parameter without a type is an array, or one of the method that is overridden."""
    node = source_of(function)
    parameters = [*node.args.args, *node.args.kwonlyargs]
    kinds = [p.annotation for p in parameters if p.arg not in ("self", "cls")]
    kinds += [node.returns or ast.Name("_")]
    overrides = owner and any(function.__name__ in vars(base) for base in owner.__mro__[1:-1])
    untyped = None in kinds and not overrides
    shapeless = untyped or any(has_no_axes(kind) for kind in kinds if kind)
    lacks = {e.__name__ for e in errors_of(function, owner, set()) if not is_said(e, text)}
    lacks |= {"shapes"} if shapeless and not SHAPE.search(text) else set()
    return lacks if text else {"docstring"} | lacks


def lacks_of_class(owner: type) -> dict[str, set[str]]:
    """The parts that the docstrings of a class and its public methods lack. A method without a
    docstring has that of the method that it overrides."""
    node = source_of(owner)
    said = ast.get_docstring(node) or ""  # __doc__ of a dataclass is never empty
    fields = [n.annotation for n in node.body if isinstance(n, ast.AnnAssign)]
    shapeless = any(map(has_no_axes, fields)) and not SHAPE.search(said)
    found = {"": ({"shapes"} if shapeless else set()) | (set() if said else {"docstring"})}
    for name, member in vars(owner).items():
        function, is_public = function_of(member), name in SPECIAL or name[0] != "_"
        # Not what dataclasses, NamedTuple and Protocol make.
        if function and is_public and function.__code__.co_filename == inspect.getfile(owner):
            texts = [vars(base)[name].__doc__ for base in owner.__mro__ if name in vars(base)]
            text = next(filter(None, texts), "")
            text += said if name in SPECIAL else ""
            found[f".{name}"] = lacks_of(function, text, owner)
    return found


def test_public_docstrings_give_errors_and_shapes():
    """And all public functions, classes and methods have one."""
    names, lacks = public_names(), {}
    assert len(names) > 250
    for name, item in names.items():
        is_class, text = isinstance(item, type), item.__doc__ or ""
        parts = lacks_of_class(item) if is_class else {"": lacks_of(item, text)}
        lacks |= {f"{name}{member}": sorted(part) for member, part in parts.items() if part}
    assert not lacks, "\n".join(f"{name} lacks {part}" for name, part in sorted(lacks.items()))


def test_lacking_parts_of_docstrings_are_found():
    def bare(x: np.ndarray, y: Float[Array, "B"]):
        """Says which array [B, T] y is, and names ValueError."""
        require(x is not y, "")

    class Record:
        """Raises TypeError."""

        x: jax.Array

        def __post_init__(self):
            require(self.x is not None, "")

        def says(self, y) -> Float[Array, "B"]:
            """Raises OSError: for a folder [B]."""
            raise NotADirectoryError(y)

        def catches(self):
            try:
                raise ValueError
            except ValueError:
                raise KeyError from None

    assert lacks_of(bare, bare.__doc__) == {"ValueError"}
    assert lacks_of(bare, "Takes x.") == {"ValueError", "shapes"}
    assert lacks_of(bare, "Raises ValueError for x [B].") == set()
    assert lacks_of_class(Record) == {
        "": {"shapes"},
        ".__post_init__": {"ValueError"},
        ".says": set(),
        ".catches": {"docstring", "KeyError"},
    }
    by_its_private_function = {"docstring", "FileNotFoundError", "ValueError"}
    assert lacks_of(function_of(lsg_flax.data.files_at), "") == by_its_private_function


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
