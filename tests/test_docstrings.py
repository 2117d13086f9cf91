"""Docstrings of public names: they say shapes, units, errors and where a method comes from."""

import ast
import builtins
import collections
import functools
import importlib
import inspect
import pathlib
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated

import jax
import numpy as np
from jaxtyping import Array, Float

import lsg_flax
from lsg_flax.checks import require

PACKAGE = pathlib.Path(lsg_flax.__file__).parent
PAGES = PACKAGE.parent / "docs" / "api"

SHAPE = re.compile(r"(?<!\w)\[[\w*.+ ,-]+\]")  # such as [B, T, D]
SPECIAL = ("__init__", "__post_init__", "__call__")  # these may be documented by their class


def public_names() -> dict[str, type | types.FunctionType]:
    """The classes and functions of the faces, and of the modules that docs/api shows as a whole."""
    folders = [p.parent.relative_to(PACKAGE.parent).parts for p in PACKAGE.rglob("__init__.py")]
    faces = [".".join(parts) for parts in folders if parts[-1] != "cli"]
    pages = "".join(page.read_text() for page in sorted(PAGES.glob("*.md")))
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


@functools.cache
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


# -------------------------------------------------------------------------------------------- units

# What a number counts, or which kind of number without a unit it is.
COUNTED = (
    "bytes?|[KMG]iB|seconds?|FLOPs|cycles|tokens?|characters?|words?|lines?|texts?|documents?|"
    "examples?|rows?|records?|labels?|classes|pairs?|positions?|blocks?|windows?|chunks?|slots?|"
    "buckets?|rounds?|heads?|features?|layers?|groups?|streams|segments|representatives|keys|"
    "globals|queries|questions|answers|candidates|beams?|batch(es)?|microbatches|steps?|epochs?|"
    "passes|evaluations?|checkpoints?|plans|programs|processes|devices|chips|shards|stacks?|"
    "numbers? of|how (many|often)|shares?|probabilit(y|ies)|factors?|multiple|multiplied|divided|"
    "power|norm|scores?|logarithm|radians|standard deviation|zeros"
)
# Names of quantities -> the units that they may have; other numbers may have any of COUNTED.
UNITS = {
    r"memory|capacity|needed|total|\w*bytes": "bytes|[KMG]iB",
    r"\w*seconds|times?|roofline|timeout|interval": "seconds",
    r"(min|max)_\w*(tokens|len)|\w*lengths?|\w*buckets": "tokens|positions|slots|buckets|steps",
    r"\w*dropout\w*|\w*probability|\w*_rate|recall|\w*share": "probabilit(y|ies)|shares?",
    r"warmup(_steps)?|(total_)?steps|every|\w+_every": "steps?",
}
# Numbers that name something, or that have neither unit nor scale.
NAMES = r"\w*seed|(\w+_)?ids?|\w*index|\w*numbers?|layer|axis|sep|state|status|\w*shape|\w*eps"
NAMES += "|learning_rate|weight_decay"
REFERS = r"\b(?:as|by|for|in|of|see)\s+`([\w.]+)`"


def sections_of(text: str) -> dict[str, str]:
    """The parts of a docstring by their headings; "" is what stands before the first one."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Example):\n", text, flags=re.MULTILINE)
    found = {"": parts[0]}
    for heading, part in zip(parts[1::2], parts[2::2], strict=True):
        found[heading] = found.get(heading, "") + part
    return found


def entries_of(text: str) -> dict[str, str]:
    """What a docstring says of each argument or attribute."""
    found, sections = {}, sections_of(text)
    lines = sections.get("Args", "") + "\n" + sections.get("Attributes", "")
    for names, said in re.findall(r"^ {4}([*\w, ]+): (.*(?:\n {5,}.*)*)", lines, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"\w+", names), said)
    return found


@functools.cache
def docstring_of(item: type | types.FunctionType) -> str:
    return ast.get_docstring(source_of(item)) or ""


def members_of(owner: type) -> dict[str, types.FunctionType]:
    """The public methods and properties that are written in a class."""
    file = inspect.getfile(owner)
    found = {name: function_of(member) for name, member in vars(owner).items()}
    return {
        name: function
        for name, function in found.items()
        if function and function.__code__.co_filename == file
        if name in SPECIAL or name[0] != "_"
    }


@functools.cache
def docstrings() -> dict[str, dict[str, str]]:
    """The docstrings of public names by their last parts, and those of members, such as
    "Predictor.stream". That of a class contains those of its construction and call."""
    found = collections.defaultdict(dict)
    for name, item in public_names().items():
        texts, short = [docstring_of(item)], name.split(".")[-1]
        for member, function in members_of(item).items() if isinstance(item, type) else ():
            found[f"{short}.{member}"][name] = docstring_of(function)
            texts += [docstring_of(function)] if member in SPECIAL else []
        found[short][name] = "\n\n".join(texts)
    return found


def named_in(text: str, pattern: str) -> dict[str, str]:
    """The docstrings of public names of which a text speaks; the pattern finds their names."""
    found = re.findall(pattern, text, re.IGNORECASE)
    ends = [".".join(name.split(".")[-n:]) for name in found for n in (1, 2)]
    return {end: "\n".join(docstrings()[end].values()) for end in ends if end in docstrings()}


def is_quantity(name: str, kind: ast.expr | None) -> bool:
    """Whether it is a number that needs a unit."""
    if kind is None or re.fullmatch(NAMES, name):
        return False
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
        kind = kind.slice.elts[0]
    text = re.sub(r"(Callable|Literal)\[.*\]", "", ast.unparse(kind))
    is_array = "Int[" in text and name.endswith(("length", "lengths"))
    return is_array or bool(re.search(r"\b(int|float)\b", text))


def has_unit(name: str, said: str) -> bool:
    units = next((unit for names, unit in UNITS.items() if re.fullmatch(names, name)), COUNTED)
    return bool(re.search(rf"\b({units})\b", said, re.IGNORECASE))


def gives_unit(name: str, *texts: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether the first text with an entry for an argument or attribute, or one before it with
    sentences that name it, says its unit, or refers to a public name that does."""
    for text in texts:
        prose, entry = sections_of(text)[""], entries_of(text).get(name)
        sentences = re.split(r"(?<=[.:;])\s", prose if f"`{name}`" not in text else text)
        named = " ".join(s for s in sentences if re.search(rf"\b{name}\b", s))
        others = named_in(entry or prose, REFERS)
        seen |= {text}
        if has_unit(name, entry or named) or any(
            gives_unit(name, other, seen=seen) for other in others.values() if other not in seen
        ):
            return True
        if entry:
            return False
    return False


def unitless_of(function: types.FunctionType, *texts: str) -> set[str]:
    """The numbers among arguments and result of a function of which the texts say no unit."""
    node, sections = source_of(function), sections_of(texts[0])
    kinds = {p.arg: p.annotation for p in [*node.args.args, *node.args.kwonlyargs]}
    found = {n for n, kind in kinds.items() if is_quantity(n, kind) and not gives_unit(n, *texts)}
    result = sections[""] + sections.get("Returns", "")
    says = has_unit(function.__name__, result) or named_in(result, REFERS)
    return found | (
        {"result"} if is_quantity(function.__name__, node.returns) and not says else set()
    )


def unitless_of_class(owner: type) -> set[str]:
    """The numbers among the fields of a class and its bases, and of its methods, without a unit. A
    setting has a help text instead of an entry."""
    ours = ("lsg_flax.", owner.__module__)
    bases = [base for base in owner.__mro__ if base.__module__.startswith(ours)]
    texts, found = [docstring_of(base) for base in bases], set()
    for field in (node for base in bases for node in source_of(base).body):
        if isinstance(field, ast.AnnAssign) and is_quantity(field.target.id, field.annotation):
            words = [getattr(node, "value", None) for node in ast.walk(field.annotation)]
            name, help_ = field.target.id, " ".join(word for word in words if isinstance(word, str))
            found |= set() if has_unit(name, help_) or gives_unit(name, *texts) else {name}
    for name, function in members_of(owner).items():
        own = [docstring_of(member) for base in bases if (member := members_of(base).get(name))]
        found |= {f"{name}: {part}" for part in unitless_of(function, *own, *texts)}
    return found


def test_public_docstrings_say_units():
    """Of all numbers that are arguments, fields or results."""
    lacks = {}
    for name, item in public_names().items():
        is_class = isinstance(item, type)
        lacks[name] = unitless_of_class(item) if is_class else unitless_of(item, docstring_of(item))
    text = "\n".join(f"{name} has no units of {parts}" for name, parts in lacks.items() if parts)
    assert not text, text


# ------------------------------------------------------------------------------------------ sources

# A paper, or a class, function or file of a project whose behaviour is reproduced.
PROJECTS = (
    "transformers|lsg_converter|local-attention|lucidrains|sentence-transformers|PEFT|PyTorch|Flax|"
    "JAX|optax|rouge-score|seqeval|scikit-learn|SQuAD"
)
SOURCE = re.compile(
    r"arXiv\s+\d{4}\.\d{5}|doi 10\.|"
    rf"\b({PROJECTS})('s?)?(\s\d[\d.]*('s)?)?\s+(`[\w.]+`|[A-Z]\w*[A-Z]\w*|\(?`\w+\.py`\)?)"
)
# Modules and names that are this project's own: they read, check, place, plan or pass on. All other
# names say where they come from, and so must any that is added.
OWN = """
buckets convert_from_torch data.cache data.cut data.files data.load data.options generation.loop
generation.steps hub.beside hub.card hub.card_files hub.checkpoint hub.download hub.push
hub.pytorch_code hub.save hub.sentence_files hub.tokenizer_files hub.weights inference.export
inference.export_texts inference.lines inference.predictor inference.program inference.results
kernels.device kernels.spec kernels.tpu_plan kernels.windows models.call models.config_json
models.families.registry models.segments models.task open_qa.records patterns.arguments
patterns.cache patterns.halo patterns.operations patterns.segments pipelines.broken
pipelines.documents planning.plan planning.search planning.settings sharding training.coerce
training.evaluation training.finetune training.help training.log training.loop training.reports
training.settings training.settings_file training.states training.survey

EvalBatch EvalBatches eval_batches choose_options Text from_pretrained accepts check_segments
masked_softmax Family HeadTable Key Row check_pooling embed_blocks build_index Answer Beam keep_rows
write_rows Runtime with_globals_behind pad_to_blocks TextLines check_suffix read_texts write_vectors
Written check_fields predict_file head_named PipelineTask frozen_beside label_shape targets_of
TrainState init_state trained_params Preempted
"""


def has_source(text: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a docstring names its source, or begins with a public name that does."""
    others = named_in(sections_of(text)[""], r"`([\w.]+)`").values()
    seen |= {text}
    return bool(SOURCE.search(text)) or any(has_source(o, seen) for o in others if o not in seen)


def test_public_docstrings_name_their_source():
    """Unless they are the project's own; OWN has nothing else."""
    lacking, needed = [], set()
    for name, item in public_names().items():
        module, short = item.__module__.removeprefix("lsg_flax."), name.split(".")[-1]
        own = {module, short} & {*OWN.split()}
        if not has_source(docstrings()[short][name]):
            needed |= own
            lacking += [] if own else [name]
    assert not lacking, f"name the source (see SOURCE) or add to OWN: {', '.join(lacking)}"
    assert needed == {*OWN.split()}, {*OWN.split()} - needed


def test_missing_units_and_sources_are_found():
    def bare(max_length: int, limit: int | None, seed: int, name: str) -> tuple[int, ...]:
        """Says max_length, and what it is.

        Args:
            limit: the largest one.
        """

    class Record:
        """Has `tokens`.

        Attributes:
            memory: in rows.
            every: steps.
        """

        memory: int
        every: int | None
        tokens: int
        share: Annotated[float, "which part"]
        warmup: Annotated[float, "in steps"]

        def limit(self, rows: int) -> float:
            """Returns it in bytes, see `default_buckets`."""

    said = "Returns rows.\n\nArgs:\n    max_length: in rows.\n    limit: as in `default_buckets`."
    assert unitless_of(bare, docstring_of(bare)) == {"max_length", "limit", "result"}
    assert unitless_of(bare, said) == {"max_length"}
    assert unitless_of(bare, said.replace("in rows", "in tokens")) == set()
    assert unitless_of_class(Record) == {"memory", "share", "limit: rows"}
    assert has_source("See `lsg_attention`.") and has_source("As transformers' `generate`.")
    assert not has_source(
        "See `default_buckets`, of transformers.\n\nArgs:\n    x: `lsg_attention`"
    )
