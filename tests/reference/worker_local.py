"""One more kind of worker.py's cases, known to it where this module is imported. Runs in the
reference environment.

local_transformer: checkpoint (a folder with config.json and model.safetensors, loaded strictly) or
         options (of LocalTransformer, with the parameters of local_numbers.py), scale?, grad_of?,
         out? (a folder to write such a checkpoint to), generate? (how many tokens, greedily,
         without a cache), global_attn_layer? (true for `Causal`)
    in   x [n,t] or [n,t,d], mask? [n,t], weight? of the outputs; with_loss? asks for the loss too,
         which may be of a token more than there are positions
    out  outputs, loss, weighted_loss, grad.<parameter> of weighted_loss + loss, tokens [n,generate]
    json state_dict (name -> shape)
"""

import json

import torch
import worker
from local_attention import LocalTransformer
from local_numbers import drawn
from safetensors.torch import load_file, save_file


class Causal(torch.nn.Module):
    """A global attention layer, of one head."""

    def __init__(self, dim):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim)
        self.to_qkv = torch.nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = torch.nn.Linear(dim, dim)

    def forward(self, x):
        query, key, value = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        return self.to_out(
            torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        )


def local_transformer(case, folder):
    if "options" in case:
        layer = Causal(case["options"]["dim"]) if case.get("global_attn_layer") else None
        model = LocalTransformer(**case["options"], global_attn_layer=layer)
        names = {name for name, _ in model.named_parameters()}
        tensors = {
            name: torch.from_numpy(drawn(name, tensor.shape, case.get("scale", 0.3)))
            if name in names
            else tensor
            for name, tensor in model.state_dict().items()
        }
    else:
        path = folder / case["checkpoint"]
        fields = json.loads((path / "config.json").read_text())
        model = LocalTransformer(**{k: v for k, v in fields.items() if k != "model_type"})
        tensors = load_file(path / "model.safetensors")
    model.load_state_dict(tensors, strict=True)
    if "out" in case:
        (folder / case["out"]).mkdir()
        fields = {"model_type": "local-transformer"} | case["options"]
        (folder / case["out"] / "config.json").write_text(json.dumps(fields))
        save_file(model.state_dict(), folder / case["out"] / "model.safetensors")
    return model.eval()


def run_local_transformer(case, inputs, folder):
    model = local_transformer(case, folder)
    x, mask = worker.to_torch(inputs["x"], torch.float32), inputs.get("mask")
    mask = None if mask is None else torch.from_numpy(mask)
    outputs = dict(outputs=model(x[:, : model.max_seq_len], mask=mask))
    total = 0.0
    if "weight" in inputs:
        total = outputs["weighted_loss"] = (
            outputs["outputs"] * torch.from_numpy(inputs["weight"])
        ).sum()
    if "with_loss" in inputs:
        outputs["loss"] = model(x, return_loss=True)
        total = total + outputs["loss"]
    grad_of = case.get("grad_of", [])
    if grad_of == "all":
        grad_of = [name for name, _ in model.named_parameters()]
    there = dict(model.named_parameters())
    grad_of = [name for name in grad_of if name in there]
    if grad_of:
        gradients = torch.autograd.grad(total, [there[name] for name in grad_of])
        outputs |= {f"grad.{n}": g for n, g in zip(grad_of, gradients, strict=True)}
    if "generate" in case:
        options = dict(temperature=0.0, use_kv_cache=False)
        outputs["tokens"] = model.generate(x, case["generate"], **options)
    report = {"state_dict": {n: list(t.shape) for n, t in model.state_dict().items()}}
    return {name: worker.to_numpy(value) for name, value in outputs.items()}, report


worker.KINDS["local_transformer"] = run_local_transformer
