"""Writes a notebook that carries the package: one file to upload to a rented runtime.

    python examples/standalone_notebook.py dist/lsg_flax-*.whl dist/long_classifier.ipynb

`make package` runs it. The notebook is long_classifier.ipynb with one cell more, which writes the
wheel beside it; the cell that installs finds it there.
"""

import argparse
import base64
import json
import pathlib

NOTEBOOK = pathlib.Path(__file__).with_name("long_classifier.ipynb")


def carrying(notebook: dict, wheel: pathlib.Path) -> dict:
    """Returns the notebook with a cell before its first code cell that writes the wheel."""
    source = (
        "# @title The package lsg_flax, which the next cell installs\n"
        "import base64, pathlib\n\n"
        f'pathlib.Path("{wheel.name}").write_bytes(base64.b64decode(\n'
        f'    "{base64.b64encode(wheel.read_bytes()).decode()}"\n))'
    )
    hidden = {"cellView": "form", "jupyter": {"source_hidden": True}}  # in Colab, in Jupyter
    cell = {"cell_type": "code", "id": "wheel", "metadata": hidden}
    cell |= {"execution_count": None, "outputs": [], "source": source.splitlines(keepends=True)}
    first = next(n for n, c in enumerate(notebook["cells"]) if c["cell_type"] == "code")
    cells = notebook["cells"]
    return notebook | {"cells": [*cells[:first], cell, *cells[first:]]}


def main(argv: list[str] | None = None) -> None:
    """Reads the wheel and writes the notebook."""
    parser = argparse.ArgumentParser(description="Write a notebook that carries a wheel.")
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    arguments = parser.parse_args(argv)
    notebook = carrying(json.loads(NOTEBOOK.read_text("utf-8")), arguments.wheel)
    arguments.output.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
