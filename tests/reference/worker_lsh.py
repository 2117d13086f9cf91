"""One more kind of worker.py's cases, known to it where this module is imported. Runs in the
reference environment.

reformer_attention: lsh (or else local), config (of ReformerConfig), dtype?
    in   query (of lsh the keys too), key, value [n,h,t,d]; mask? [n,t], rotations? [h,d,hashes,
         rotations // 2]; cotangent [n,h,t,d]
    out  context, grad_query, grad_key (of lsh zeros), grad_value
reformer_generation: config, count; with the parameters of reformer_numbers.py, and its rotations
         number 0 in every layer and step
    in   prompt [t]
    out  tokens [t + count], written greedily with a cache, in float64
"""

from unittest import mock

import torch
import transformers
import worker
from reformer_numbers import drawn, rotations
from transformers.models.reformer.modeling_reformer import LocalSelfAttention, LSHSelfAttention


def run_reformer_attention(case, inputs, folder):
    dtype, (_, h, _, d) = worker.torch_dtype(case), inputs["query"].shape
    names = ("query_key", "value") if case["lsh"] else ("query", "key", "value")
    fields = dict(num_attention_heads=h, attention_head_size=d, hidden_size=len(names) * h * d)
    config = transformers.ReformerConfig(
        **fields, **case["config"], axial_pos_embds=False, local_attention_probs_dropout_prob=0.0
    )
    module = (LSHSelfAttention if case["lsh"] else LocalSelfAttention)(config).eval().to(dtype)
    parts = torch.eye(fields["hidden_size"], dtype=dtype).chunk(len(names))
    for name, part in zip(names, parts, strict=True):  # each projection picks its own features
        getattr(module, name).weight.data = part
    mask = torch.from_numpy(inputs["mask"]) if "mask" in inputs else None
    rotations = torch.from_numpy(inputs.get("rotations", worker.np.zeros(0))).to(dtype)

    def drawn(shape, **_):
        return rotations.reshape(shape)

    def forward(query, key, value):
        given = (query, value + 0 * key) if case["lsh"] else (query, key, value)
        states = torch.cat([x.transpose(1, 2).flatten(2) for x in given], dim=-1)
        with mock.patch.object(torch, "randn", drawn):
            context = module(states, attention_mask=mask).hidden_states
        return context.unflatten(2, (h, d)).transpose(1, 2)

    outputs = worker.with_gradients(forward, inputs, dtype)
    return {name: x.astype("float32") for name, x in outputs.items()}, {}


def run_reformer_generation(case, inputs, folder):
    model = transformers.ReformerModelWithLMHead(transformers.ReformerConfig(**case["config"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(drawn(name, parameter.shape)))
    model.double().eval()

    def same(shape, **_):
        return torch.from_numpy(rotations(0, shape)).double()

    with mock.patch.object(torch, "randn", same):
        tokens = model.generate(
            worker.to_torch(inputs["prompt"], torch.float64)[None],
            max_new_tokens=case["count"],
            do_sample=False,
            eos_token_id=None,
            use_cache=True,
        )
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return {"tokens": tokens[0].numpy()}, {"parameters": shapes}


worker.KINDS["reformer_generation"] = run_reformer_generation
worker.KINDS["reformer_attention"] = run_reformer_attention
