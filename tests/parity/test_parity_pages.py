"""The PyTorch of docs/from_pytorch.md runs as it stands, and lsg_flax's side gives its numbers."""

import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from golden_data import GOLDEN

PAGE = pathlib.Path(__file__).parents[2] / "docs/from_pytorch.md"
SHOW = "\nimport numpy; numpy.save('pytorch.npy', logits.numpy())\n"


@pytest.mark.filterwarnings("ignore:weights for task")
def test_both_sides_of_the_page_agree(tmp_path, monkeypatch):
    """PyTorch converts and runs; what lsg_flax reads of its folder gives the same logits."""
    python = str(pathlib.Path(os.environ["LSG_REFERENCE_PYTHON"]).absolute())
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "bert_to_convert_512", "path/to/bert")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    torch = [block for block in blocks if "lsg_converter" in block]
    assert len(torch) == 2
    pathlib.Path("page.py").write_text("\n".join(torch) + SHOW)
    done = subprocess.run([python, "page.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {}
    for block in blocks:
        if "from_pretrained(" in block and block not in torch:
            exec(compile("import lsg_flax\n" + block, PAGE.name, "exec"), names)
    np.testing.assert_allclose(names["logits"], np.load("pytorch.npy"), atol=1e-5)
