"""The README's Python runs as it stands, on a tiny checkpoint in place of the reader's."""

import pathlib
import re
import shutil

import pytest
from golden_data import GOLDEN

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore:weights for task")
def test_readme_block(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/bert")
    exec(compile(block, str(README), "exec"), {})


def test_map_names_every_part():
    """Each file and folder of the package by its name."""
    text, package = README.read_text(), README.parent / "lsg_flax"
    parts = {p.name for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    missing = [part for part in sorted(parts - {"__init__.py"}) if f"`{part}" not in text]
    assert not [part for part in missing if f"lsg_flax/{part}" not in text]
