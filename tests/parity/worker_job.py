"""tests/reference/worker.py with two more kinds, for `python worker_job.py JOB_DIR`. Runs in the
reference environment.

strict_load: class, checkpoint
    json keys (in the file), after load_state_dict(strict=True) raised nothing
auto: class (AutoModel...), checkpoint (with the remote code in it)
    json class, missing_keys, unexpected_keys
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))

import transformers
import worker
from safetensors.torch import load_file


def run_strict_load(case, inputs, folder):
    path = folder / case["checkpoint"]
    fields = json.loads((path / "config.json").read_text())
    cls = worker.model_class(case["class"], fields["model_type"])
    model = cls(cls.config_class.from_pretrained(path))
    tensors = load_file(path / "model.safetensors")
    model.load_state_dict(tensors, strict=True)
    return {}, {"keys": sorted(tensors)}


def run_auto(case, inputs, folder):
    model, info = getattr(transformers, case["class"]).from_pretrained(
        str(folder / case["checkpoint"]), trust_remote_code=True, output_loading_info=True
    )
    lists = {key: info[key] for key in ("missing_keys", "unexpected_keys")}
    return {}, {"class": type(model).__name__, **lists}


worker.KINDS |= {"strict_load": run_strict_load, "auto": run_auto}

if __name__ == "__main__":
    sys.exit(worker.main(Path(sys.argv[1]).resolve()))
