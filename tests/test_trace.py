"""The way of one call through the package: `lsg-flax predict` goes down to the kernel, and does not
wander. Frames of Flax and JAX in between do not count."""

import itertools
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from golden_data import GOLDEN
from test_structure import PACKAGE, PARTS

from lsg_flax import cli, convert_from_torch

MOST_CLIMBS, MOST_STRETCHES = 8, 2  # issue 9; when this was written: 0 and 1
Stack = tuple[str, ...]  # files of the package, the caller first, neighbours that are the same once


class Trace(NamedTuple):
    """What one `lsg-flax predict` does.

    Attributes:
        stacks: the different call stacks on which a file of kernels/ is entered.
        into_hub: file that calls and file that is called, for calls into hub/ from outside.
    """

    stacks: set[Stack]
    into_hub: set[tuple[str, str]]


def files_above(frame) -> Iterator[str]:
    """The files of the package on the call stack, the called one first."""
    prefix = f"{PACKAGE}/"
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(prefix):
            yield file.removeprefix(prefix).removesuffix(".py")
        frame = frame.f_back


def part_of(file: str) -> str:
    return file.split("/")[0]


def climbs(stack: Stack) -> int:
    """How often a lower part of the table of imports calls a higher one."""
    places = [PARTS.index(part_of(file)) for file in stack]
    return sum(below < above for below, above in itertools.pairwise(places))


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    folder, found = tmp_path_factory.mktemp("trace"), Trace(set(), set())
    documents = folder / "documents.jsonl"
    documents.write_text(json.dumps({"input_ids": [2, 7, 8, 3]}) + "\n")

    def record(frame, event, _):
        code = frame.f_code
        if event != "call" or code.co_name == "<module>":
            return
        if code.co_filename.startswith(f"{PACKAGE}/kernels/"):
            stack = [file for file, _ in itertools.groupby(files_above(frame))][::-1]
            found.stacks.add(tuple(stack[stack.index("cli/predict") :]))
        elif code.co_filename.startswith(f"{PACKAGE}/hub/"):
            called, caller = itertools.islice(files_above(frame), 2)
            if part_of(caller) != "hub":
                found.into_hub.add((caller, called))

    options = ["--outputs", "logits", "--buckets", "37", "--batch-size", "3"]  # not compiled so far
    model = GOLDEN / "bert_sequence_classification"
    convert_from_torch._leaf_shapes.cache_clear()  # other tests load this model too
    before = sys.getprofile()
    sys.setprofile(record)
    try:
        code = cli.main(["predict", str(model), str(documents), str(folder / "out"), *options])
    finally:
        sys.setprofile(before)
    assert code == 0 and (folder / "out").read_text()
    return found


def test_the_kernel_is_entered_while_loading_and_while_predicting(trace):
    """For the shapes of the parameters, and for the program: what the other tests look at."""
    passed = [set(map(part_of, stack)) for stack in trace.stacks]
    assert any("hub" in parts for parts in passed)
    assert any({"pipelines", "inference"} <= parts for parts in passed)


def test_the_way_to_the_kernel_goes_down(trace):
    for stack in trace.stacks:
        shown = " ->\n".join(stack)
        assert climbs(stack) <= MOST_CLIMBS, f"{climbs(stack)} climbs:\n{shown}"


def test_no_file_is_entered_again_and_again(trace):
    for stack in trace.stacks:
        often = sorted(file for file in set(stack) if stack.count(file) > MOST_STRETCHES)
        assert not often, f"{often}:\n" + " ->\n".join(stack)


def test_the_hub_is_an_opened_checkpoint(trace):
    """The command asks that alone; its tensors are read by who makes parameters of them."""
    assert trace.into_hub == {
        ("cli/predict", "hub/checkpoint"),
        ("models/layout", "hub/weights"),
    }


def test_climbs_are_counted():
    assert climbs(("cli/predict", "hub/load", "models/model", "kernels/xla")) == 0
    assert climbs(("cli/predict", "models/model", "hub/load", "models/model", "cli/shared")) == 2
