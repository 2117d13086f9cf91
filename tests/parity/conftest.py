"""Live comparison with the PyTorch reference. Skipped unless LSG_REFERENCE_PYTHON names the
interpreter of its environment (tests/reference/README.md); `make parity` sets it.

LSG_PARITY_SEED chooses other random configurations; a failure prints the configuration it ran.
"""

import os
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent
REFERENCE = os.environ.get("LSG_REFERENCE_PYTHON")
MARK = "<!-- measured: make families -->"
COLUMNS = (
    *(f"{kind} {way}" for way in ("PyTorch -> JAX", "JAX -> PyTorch") for kind in ("LSG", "plain")),
    *("gradients", "converts"),
)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="set LSG_REFERENCE_PYTHON, or run `make parity`")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.parity)
            # Heads are drawn and odd patterns tried here on purpose; the numbers are what counts.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not REFERENCE:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    from jobs import DIFFERENCES, TABLE

    for (family, _), row in TABLE.items():
        for column, difference in row.items():
            group = f"{column}, {family}"
            DIFFERENCES[group] = max(DIFFERENCES.get(group, 0.0), difference)
    if DIFFERENCES:
        terminalreporter.section("largest absolute differences to the PyTorch reference")
    for group, difference in sorted(DIFFERENCES.items()):
        terminalreporter.write_line(f"{group:<40}{difference:.2e}")


def pytest_sessionfinish():
    """Writes the table of families and heads where LSG_FAMILIES_TABLE says (`make families`)."""
    from jobs import TABLE

    if TABLE and (file := os.environ.get("LSG_FAMILIES_TABLE")):
        rows = [
            f"| {family} | {task} | " + " | ".join(cell(row, c) for c in COLUMNS) + " |"
            for (family, task), row in sorted(TABLE.items())
        ]
        head = ["family", "head", *(column.replace("->", "to") for column in COLUMNS)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head))]
        path = pathlib.Path(file)
        before = path.read_text().split(MARK)[0]
        path.write_text(before + MARK + "\n\n" + "\n".join([*lines, *rows]) + "\n")


def cell(row: dict[str, float], column: str) -> str:
    """A measured difference, or nothing where none was measured."""
    return f"{row[column]:.0e}" if column in row else ""


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """What the reference makes of every case of cases.py, in one process."""
    import jobs
    from cases import CASES

    return jobs.run(CASES, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory, reference):
    """What it makes of checkpoints that lsg_flax wrote, in one more process."""
    import jobs
    from saved import write_checkpoints

    folder = tmp_path_factory.mktemp("saved")
    return jobs.run(write_checkpoints(folder, reference), folder)


@pytest.fixture
def fixed_rotations(monkeypatch):
    """The rotations that the worker puts in place of the reference's random ones."""
    from jobs import rotations

    from lsg_flax.patterns import sparsity

    monkeypatch.setattr(
        sparsity,
        "lsh_rotations",
        lambda key, config, *, num_heads, head_dim: rotations(config, num_heads, head_dim),
    )
