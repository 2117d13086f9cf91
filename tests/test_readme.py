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


def test_map_names_every_module():
    text = README.read_text()
    package = README.parent / "lsg_flax"
    modules = [p.name for p in package.rglob("*.py") if p.name != "__init__.py"]
    assert not [name for name in modules if name not in text]
