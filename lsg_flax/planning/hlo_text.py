"""Parses the text of a compiled program into computations of instructions, with their arrays and
loops."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")

_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Instruction(NamedTuple):
    """One instruction; shape, arguments and attributes are as printed."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns all computations by their names, and the name of the entry computation.

    Raises:
        ValueError: if the text is not that of a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _lines(text):
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            instruction = _instruction(bool(found[1]), found[2], found[3])
            current[instruction.name] = instruction
    if not entry:
        raise ValueError(
            "this is not the text of a compiled program, because it has no ENTRY computation; give "
            "compiled.as_text()."
        )
    return computations, entry


def _lines(text: str) -> list[str]:
    """Returns a line for each instruction, whose attributes (a kernel's metadata) may have line
    breaks."""
    lines: list[str] = []
    for line in text.splitlines():
        begins = not line or line == "}" or line.startswith(" ")
        if lines and lines[-1].startswith(" ") and not begins:
            lines[-1] += line
        else:
            lines.append(line)
    return lines


def _instruction(is_root: bool, name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    shape, call = rest[: end + 1], rest[end + 1 :].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    arguments, attributes = call[opening + 1 : closing], call[closing + 1 :].lstrip(", ")
    return Instruction(name, shape, call[:opening], arguments, attributes, is_root)


def _closing(text: str, opening: int) -> int:
    """Returns the position of the bracket that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"a bracket is not closed in {text[:80]!r}; give compiled.as_text().")


class Array(NamedTuple):
    """One array of a shape.

    Attributes:
        in_memory: whether it is in the chip's main memory; layouts have S(1) for on-chip memory.
    """

    dims: tuple[int, ...]
    bytes: int
    in_memory: bool


def arrays_of(shape: str) -> list[Array]:
    """Returns the arrays of a shape; several for a tuple."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        bits = re.search(r"\d+", dtype)
        width = _BYTES.get(dtype, int(bits[0]) / 8 if bits else 0)
        if dtype.startswith("f8"):
            width = 1
        found.append(Array(sizes, math.ceil(math.prod(sizes) * width), "S(" not in layout))
    return found


def called_by(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs."""
    names = []
    for one, several in _CALLED.findall(instruction.attributes):
        names += [one] if one else re.findall(r"%?([\w.\-]+)", several)
    return names


def conditions_of(loop: Instruction) -> list[str]:
    """Returns the name of the computation that decides whether a loop continues."""
    return re.findall(r"condition=%?([\w.\-]+)", loop.attributes)


def rounds_of(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """Returns how often a loop runs, as XLA states it or from the only `counter < constant` of its
    condition (counters start at 0); None if it is unknown."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    inside = [i for name in conditions_of(loop) for i in _with_fusions(computations, name)]
    limits = [
        int(i.arguments)
        for i in inside
        if i.opcode == "constant" and i.shape.startswith(("s32[]", "u32[]"))
    ]
    compares = [i for i in inside if i.opcode == "compare" and "direction=LT" in i.attributes]
    return limits[0] if len(limits) == len(compares) == 1 else None


def _with_fusions(computations, name: str) -> list[Instruction]:
    own = list(computations[name].values())
    inner = [c for i in own if i.opcode == "fusion" for c in called_by(i)]
    return own + [i for c in inner for i in _with_fusions(computations, c)]
