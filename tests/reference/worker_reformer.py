"""One more kind of worker.py's cases, known to it where this module is imported. Runs in the
reference environment.

reformer: class; checkpoint (a folder) or config (with the parameters of reformer_numbers.py);
         scale?, out? (a folder to write such a checkpoint to), grad_of?, output_hidden_states?,
         dtype? (results are float32)
    in   arguments of the model's forward by name, labels included; weight_<output>?
    out  every output by name, hidden_states.<i>, weighted_loss, grad.<parameter> of weighted_loss +
         loss, as far as there are these
    json parameters (name -> shape), hashings (the shapes of the rotations that it asked for, which
         are those of reformer_numbers.py)

With grad_of it is in training mode, for otherwise it has no gradients: dropout must be 0.
"""

import contextlib
from unittest import mock

import torch
import transformers
import worker
from reformer_numbers import drawn, rotations


@contextlib.contextmanager
def fixed_rotations(dtype):
    """In place of the reference's own. Yields the list of their shapes."""
    shapes = []

    def randn(shape, **kwargs):
        shapes.append(list(shape))
        return torch.from_numpy(rotations(len(shapes) - 1, shape)).to(dtype)

    with mock.patch.object(torch, "randn", randn):
        yield shapes


def reformer(case, folder):
    cls = getattr(transformers, case["class"])
    if "checkpoint" in case:
        model, info = cls.from_pretrained(folder / case["checkpoint"], output_loading_info=True)
        assert not any(info.values()), info
        return model
    model = cls(transformers.ReformerConfig(**case["config"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = drawn(name, parameter.shape, case.get("scale", 0.3))
            parameter.copy_(torch.from_numpy(value))
    if "out" in case:
        model.save_pretrained(folder / case["out"])
    return model


def run_reformer(case, inputs, folder):
    model = reformer(case, folder)
    grad_of = case.get("grad_of", [])
    dtype = worker.torch_dtype(case)
    model.to(dtype).train(bool(grad_of))
    arguments = {
        name: worker.to_torch(value, dtype)
        for name, value in inputs.items()
        if not name.startswith("weight_")
    }
    with torch.set_grad_enabled(bool(grad_of)), fixed_rotations(dtype) as shapes:
        options = {"use_cache": False} if case["class"] == "ReformerModelWithLMHead" else {}
        states = case.get("output_hidden_states", False)
        result = model(**arguments, output_hidden_states=states, **options)
        outputs = {n: v for n, v in result.items() if isinstance(v, torch.Tensor)}
        for number, state in enumerate(result.get("hidden_states") or ()):
            outputs[f"hidden_states.{number}"] = state
        terms = [
            (outputs[name.removeprefix("weight_")] * torch.from_numpy(weight)).sum()
            for name, weight in inputs.items()
            if name.startswith("weight_")
        ]
        if terms:
            outputs["weighted_loss"] = sum(terms)
        hashings = len(shapes)
        if grad_of:  # those within reversible layers come by backward() alone
            (sum(terms) + outputs.get("loss", 0.0)).backward()
    there = dict(model.named_parameters())
    grad_of = list(there) if grad_of == "all" else [name for name in grad_of if name in there]
    for name in grad_of:
        gradient = there[name].grad
        outputs[f"grad.{name}"] = torch.zeros_like(there[name]) if gradient is None else gradient
    report = {"parameters": {name: list(p.shape) for name, p in there.items()}}
    report["hashings"] = shapes[:hashings]
    return {name: worker.to_numpy(value.float()) for name, value in outputs.items()}, report


worker.KINDS["reformer"] = run_reformer
