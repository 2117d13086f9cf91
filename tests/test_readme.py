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
    """By its name, or by that of its folder."""
    text = README.read_text()
    modules = (README.parent / "lsg_flax").rglob("*.py")
    named = {m: m.name in text or f"lsg_flax/{m.parent.name}" in text for m in modules}
    assert not [m for m, is_named in named.items() if not is_named and m.name != "__init__.py"]
