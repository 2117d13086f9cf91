"""tests/reference/worker.py with five more kinds, for `python worker_job.py JOB_DIR`. Runs in the
reference environment.

strict_load: class, checkpoint, own_query_embedder?
    json keys (in the file), after load_state_dict(strict=True) raised nothing
auto: class (AutoModel...), checkpoint (with the remote code in it)
    json class, missing_keys, unexpected_keys
generate: class, checkpoint, calls (each {"inputs": [part, ...], "options": {...}})
    in   <part>.<argument of generate>
    out  tokens_<number of the call> and, with beams, scores_<number>
    json missing_keys, unexpected_keys, mismatched_keys
tensorflow: class, config
    in   the variables of a checkpoint of TensorFlow by their names
    out  the tensors of the model that load_tf_weights makes of them
ranking_loss: scale
    in   anchors, candidates
    out  loss, and its gradients of both: cross entropy of scaled cosines, the own one being right,
         as sentence-transformers' MultipleNegativesRankingLoss computes it
"""

import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))

import torch
import transformers
import worker
import worker_local  # noqa: F401 (makes its kind known)
import worker_lsh  # noqa: F401
import worker_reformer  # noqa: F401
from safetensors.torch import load_file


def run_strict_load(case, inputs, folder):
    path = folder / case["checkpoint"]
    fields = json.loads((path / "config.json").read_text())
    cls = worker.model_class(case["class"], fields["model_type"])
    config = cls.config_class.from_pretrained(path)
    model = cls(config, **worker.second_embedder(case, config))
    tensors = load_file(path / "model.safetensors")
    model.load_state_dict(tensors, strict=True)
    return {}, {"keys": sorted(tensors)}


def run_ranking_loss(case, inputs, folder):
    given = {name: torch.tensor(array, requires_grad=True) for name, array in inputs.items()}
    anchors, candidates = (torch.nn.functional.normalize(x, dim=1) for x in given.values())
    scores = anchors @ candidates.T * case["scale"]
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
    loss.backward()
    outputs = {f"grad.{name}": worker.to_numpy(x.grad) for name, x in given.items()}
    return outputs | {"loss": worker.to_numpy(loss)}, {}


def run_auto(case, inputs, folder):
    model, info = getattr(transformers, case["class"]).from_pretrained(
        str(folder / case["checkpoint"]), trust_remote_code=True, output_loading_info=True
    )
    lists = {key: info[key] for key in ("missing_keys", "unexpected_keys")}
    return {}, {"class": type(model).__name__, **lists}


def run_generate(case, inputs, folder):
    model, info = worker.load_model(case, folder)
    model.eval()
    outputs = {}
    for number, call in enumerate(case["calls"]):
        named = {tuple(key.split(".")): array for key, array in inputs.items()}
        arrays = {
            name: worker.to_torch(array, model.dtype)
            for (part, name), array in named.items()
            if part in call["inputs"]
        }
        found = model.generate(
            **arrays, **call["options"], return_dict_in_generate=True, output_scores=True
        )
        outputs[f"tokens_{number}"] = worker.to_numpy(found.sequences)
        if "sequences_scores" in found:
            outputs[f"scores_{number}"] = worker.to_numpy(found.sequences_scores)
    lists = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return outputs, {key: sorted(map(str, info[key])) for key in lists}


def run_tensorflow(case, inputs, folder):
    module = types.SimpleNamespace(
        list_variables=lambda path: [(name, array.shape) for name, array in inputs.items()],
        load_variable=lambda path, name: inputs[name],
    )
    sys.modules["tensorflow"] = types.SimpleNamespace(train=module)
    cls = worker.model_class(case["class"], case["config"]["model_type"])
    model = cls(cls.config_class(**case["config"]))
    try:
        cls.load_tf_weights(model, model.config, "checkpoint")
    finally:
        del sys.modules["tensorflow"]
    return {name: worker.to_numpy(t) for name, t in model.state_dict().items()}, {}


worker.KINDS |= {
    "strict_load": run_strict_load,
    "auto": run_auto,
    "generate": run_generate,
    "tensorflow": run_tensorflow,
    "ranking_loss": run_ranking_loss,
}

if __name__ == "__main__":
    worker.torch.set_num_threads(1)  # several wait for each other longer than tiny models compute
    sys.exit(worker.main(Path(sys.argv[1]).resolve()))
