"""Run the PyTorch reference on a batch of cases, in the reference environment (see README.md).

    python worker.py JOB_DIR

JOB_DIR/job.json is a list of cases, each {"name", "kind", ...}. A case reads JOB_DIR/<name>.npz if
there is one and writes JOB_DIR/<name>.out.npz (arrays) and <name>.out.json (other facts), or
<name>.error.txt (a traceback), and the worker goes on; it exits with 1 if any case failed.

Axes: n batch, h heads, t tokens without globals, g globals, d head size, s sparse representatives.
Masks in are boolean, True = real; masks out are additive, 0 or finfo.min. Always eval mode.

Kinds, their fields (? = optional) and arrays:

selection: config
    in   key, value [n,h,t,d], query? [n,h,t,d], mask? [n,t]
    out  sparse_key, sparse_value [n,h,s,d], sparse_mask [n,h,1,s]
attention: config, causal?
    in   query, key, value [n,h,g+t,d], mask? [n,t], cotangent? [n,h,g+t,d]
    out  context [n,h,g+t,d] (the reference merges the heads; here they are split again)
standalone_attention: class, options
    in   query, key, value [n,h,t,d], mask? [n,t] or [n,t,t], cotangent? [n,h,t,d]
    out  context [n,h,t,d]
local_attention: options (of LocalAttention; without dim there are no rotary positions)
    in   query, key, value [n,h,t,d], mask? [n,t], attn_bias? [h,w,s], cotangent? [n,h,t,d]
    out  context [n,h,t,d]
model: class, checkpoint, config?, output_hidden_states?, grad_of?, own_query_embedder?, part?
    in   arguments of the model's forward by name, labels included; weight_<output>?
    out  every output by name, hidden_states.<i>, weighted_loss, grad.<parameter>; reader_logits,
         relevance included, of RealmReader, which keeps them to itself
    json missing_keys, unexpected_keys, mismatched_keys
make_model: class, config, out, scale?, safe_serialization?, max_shard_size?, tokenizer?,
         own_query_embedder?
    json parameters (name -> shape)
convert: checkpoint, options?, config?, architecture?, out?
    out  position_embeddings, global_embeddings [512,E], and whatever was drawn:
         global_samples, global_noise [512,E], position_noise [512-rows,E]
    json class, config, model_max_length

- own_query_embedder: RealmScorer gets a second embedder; part: the attribute of the model that is
  run, such as the reader of RealmForOpenQA.
- Folders (checkpoint, out) are relative to JOB_DIR or absolute.
- config: fields of the LSG config class. In `model` they replace those of config.json before the
  config validates itself; in `convert` they are the converter's extra keywords, not validated.
- cotangent adds grad_query, grad_key, grad_value of sum(context * cotangent).
- weighted_loss = sum over the weight_<output> arrays of sum(output * weight); grad_of names the
  parameters to differentiate it by ("all"). The gradient of a tied parameter is the sum over its
  uses.
- seed? (default 0) seeds torch before the case, so that no case depends on those before it;
  dtype? (default float32) is a torch dtype name.
- LSH draws new rotations in each round. Here they are lsh_rotations(heads, head_size, hashes), a
  function of shape alone: all rounds and layers of one shape share them, and numpy repeats them.
"""

import contextlib
import importlib
import inspect
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from local_attention import LocalAttention  # noqa: E402
from lsg_converter import LSGConverter, attention_layers  # noqa: E402
from lsg_converter.bert.modeling_lsg_bert import LSGBertConfig, LSGSelfAttention  # noqa: E402
from torch.distributions import multivariate_normal  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(2)


def lsh_rotations(heads, head_size, hashes):
    """[heads, head_size, hashes]: stands in for the reference's unseeded draw."""
    generator = np.random.default_rng([heads, head_size, hashes])
    return generator.standard_normal((heads, head_size, hashes)).astype(np.float32)


@contextlib.contextmanager
def fixed_lsh_rotations(sparsity_type):
    """Replace the one torch.randn pattern of LSH, (1, h, 1, d, hashes), and only for LSH."""
    randn = torch.randn

    def patched(*size, **kwargs):
        if len(size) == 5 and size[0] == size[2] == 1:
            return torch.from_numpy(lsh_rotations(size[1], size[3], size[4]))[None, :, None]
        return randn(*size, **kwargs)

    with mock.patch.object(torch, "randn", patched if sparsity_type == "lsh" else randn):
        yield


# -------------------------------------------------------------------------------------------------
# Arrays in and out


def to_torch(array, dtype):
    """Floats in `dtype`, integers as int64, booleans kept; a copy, as some code edits in place."""
    tensor = torch.from_numpy(np.array(array, order="C"))
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor if tensor.dtype == torch.bool else tensor.long()


def to_numpy(tensor):
    """float32 for the half types, which numpy lacks."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


def torch_dtype(case):
    return getattr(torch, case.get("dtype", "float32"))


def additive_mask(mask, batch, length, dtype):
    """[n,t] -> [n,1,1,t] or [n,t,t] -> [n,1,t,t], 0 where True, else finfo.min; None is True."""
    if mask is None:
        return torch.zeros(batch, 1, 1, length, dtype=dtype)
    visible = torch.from_numpy(np.array(mask, dtype=bool)).to(dtype)
    visible = visible[:, None, None] if visible.ndim == 2 else visible[:, None]
    return (1 - visible) * torch.finfo(dtype).min


def with_gradients(forward, inputs, dtype):
    """Call `forward(query, key, value)`; with a cotangent in `inputs`, also the three gradients."""
    names = ("query", "key", "value")
    tensors = [to_torch(inputs[name], dtype) for name in names]
    if "cotangent" not in inputs:
        with torch.no_grad():
            return {"context": to_numpy(forward(*tensors))}
    for tensor in tensors:
        tensor.requires_grad_()
    context = forward(*tensors)
    gradients = torch.autograd.grad((context * to_torch(inputs["cotangent"], dtype)).sum(), tensors)
    return {
        "context": to_numpy(context),
        **{
            f"grad_{name}": to_numpy(gradient)
            for name, gradient in zip(names, gradients, strict=True)
        },
    }


# -------------------------------------------------------------------------------------------------
# Attention


def self_attention(config, heads, head_size, *, causal):
    """The reference's BERT self-attention; its projections are never called."""
    size = dict(
        hidden_size=heads * head_size, num_attention_heads=heads, attention_probs_dropout_prob=0.0
    )
    return LSGSelfAttention(LSGBertConfig(**size, **config, is_decoder=causal)).eval()


def run_selection(case, inputs, folder):
    dtype = torch_dtype(case)
    n, h, t, d = inputs["key"].shape
    module = self_attention(case["config"], h, d, causal=False)
    query, key, value = (
        to_torch(inputs.get(name, inputs["key"]), dtype) for name in ("query", "key", "value")
    )
    mask = additive_mask(inputs.get("mask"), n, t, dtype)
    with torch.no_grad(), fixed_lsh_rotations(module.sparsity_type):
        outputs = module.get_sparse_elements(query, key, value, mask)
    names = ("sparse_key", "sparse_value", "sparse_mask")
    return dict(zip(names, map(to_numpy, outputs), strict=True)), {}


def run_attention(case, inputs, folder):
    dtype = torch_dtype(case)
    n, h, length, d = inputs["query"].shape
    module = self_attention(case["config"], h, d, causal=case.get("causal", False))
    t = length - module.num_global_tokens

    def forward(query, key, value):
        product = module.causal_forward if module.is_causal else module.not_causal_forward
        (merged,) = product(
            query, key, value, attention_mask=additive_mask(inputs.get("mask"), n, t, dtype)
        )
        return merged.reshape(n, length, h, d).transpose(1, 2)  # [n,g+t,h*d] -> [n,h,g+t,d]

    with fixed_lsh_rotations(module.sparsity_type):
        return with_gradients(forward, inputs, dtype), {}


def run_standalone_attention(case, inputs, folder):
    dtype = torch_dtype(case)
    n, _, t, _ = inputs["query"].shape
    module = getattr(attention_layers, case["class"])(
        **case["options"], attention_dropout_prob=0.0
    ).eval()

    def forward(query, key, value):
        mask = additive_mask(inputs["mask"], n, t, dtype) if "mask" in inputs else None
        return module(query, key, value, mask)

    return with_gradients(forward, inputs, dtype), {}


def run_local_attention(case, inputs, folder):
    dtype = torch_dtype(case)
    module = LocalAttention(**case["options"], autopad=True).eval()
    more = {n: to_torch(inputs[n], dtype) for n in ("mask", "attn_bias") if n in inputs}
    return with_gradients(lambda *x: module(*x, **more), inputs, dtype), {}


# -------------------------------------------------------------------------------------------------
# Models


def model_class(name, model_type):
    """LSG classes from the reference's module of that family, all others from transformers."""
    if not name.startswith("LSG"):
        inner = transformers.models.realm.modeling_realm  # has the base model, which is not public
        return getattr(inner if name == "RealmBertModel" else transformers, name)
    family = model_type.replace("-", "_")
    return getattr(importlib.import_module(f"lsg_converter.{family}.modeling_lsg_{family}"), name)


def load_model(case, folder):
    path = folder / case["checkpoint"]
    fields = {**json.loads((path / "config.json").read_text()), **case.get("config", {})}
    cls = model_class(case["class"], fields["model_type"])
    config = cls.config_class.from_dict(fields)
    kwargs = dict(config=config, torch_dtype=torch_dtype(case), output_loading_info=True)
    model, info = cls.from_pretrained(path, **kwargs, **second_embedder(case, config))
    return getattr(model, case["part"]) if "part" in case else model, info


def second_embedder(case, config):
    """Without it, from_pretrained reads the weights of both embedders of a RealmScorer into one."""
    own = case.get("own_query_embedder")
    return {"query_embedder": transformers.RealmEmbedder(config)} if own else {}


def save_model(model, path, **kwargs):
    """save_pretrained, without the copy of the reference's source that its auto classes leave."""
    with (
        mock.patch.multiple(type(model), _auto_class=None),
        mock.patch.multiple(type(model.config), _auto_class=None),
    ):
        model.save_pretrained(path, **kwargs)


def run_model(case, inputs, folder):
    model, loading = load_model(case, folder)
    model.eval()
    accepted = inspect.signature(model.forward).parameters
    unknown = [name for name in inputs if name not in accepted and not name.startswith("weight_")]
    if unknown:
        raise ValueError(
            f"{unknown} are not arguments of {case['class']}.forward: {list(accepted)}"
        )
    arguments = {k: to_torch(v, model.dtype) for k, v in inputs.items() if k in accepted}
    spans = {}
    if isinstance(model, transformers.RealmReader):  # which adds the relevance in place
        keep = lambda module, given, made: spans.update(reader_logits=made[0])  # noqa: E731
        model.qa_outputs.register_forward_hook(keep)
    if "encoder_outputs" in arguments:
        arguments["encoder_outputs"] = (arguments["encoder_outputs"],)
    grad_of = case.get("grad_of", [])
    if grad_of == "all":
        grad_of = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with (
        torch.set_grad_enabled(bool(grad_of)),
        fixed_lsh_rotations(getattr(model.config, "sparsity_type", None)),
    ):
        result = model(
            **arguments,
            output_hidden_states=case.get("output_hidden_states", False),
            return_dict=True,
        )
        outputs = dict(spans)
        for name, value in result.items():
            if isinstance(value, torch.Tensor):
                outputs[name] = value
            elif name.endswith("hidden_states"):
                outputs.update({f"{name}.{i}": hidden for i, hidden in enumerate(value)})
        weights = {
            k.removeprefix("weight_"): v for k, v in inputs.items() if k.startswith("weight_")
        }
        if weights:
            terms = [
                (outputs[name] * to_torch(weight, model.dtype)).sum()
                for name, weight in weights.items()
            ]
            outputs["weighted_loss"] = sum(terms)
    if grad_of:
        # get_parameter knows a tied parameter by each of its names.
        gradients = torch.autograd.grad(
            outputs["weighted_loss"],
            [model.get_parameter(name) for name in grad_of],
            materialize_grads=True,
        )
        outputs.update(
            {f"grad.{name}": gradient for name, gradient in zip(grad_of, gradients, strict=True)}
        )
    report = {
        key: sorted(map(str, loading[key]))
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return {name: to_numpy(value) for name, value in outputs.items()}, report


def randomise(model, scale):
    """Draw every trainable parameter: layer norm weights around 1, all others around 0; and the
    bias of logits and the embeddings of blocks, which are buffers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                centre = float("norm" in name.lower() and name.endswith("weight"))
                parameter.copy_(centre + scale * torch.randn(parameter.shape))
        for name, buffer in model.named_buffers():
            if name in ("final_logits_bias", "block_emb"):
                buffer.copy_(scale * torch.randn(buffer.shape))


def run_make_model(case, inputs, folder):
    cls = model_class(case["class"], case["config"].get("model_type", "bert"))
    config = cls.config_class(**case["config"])
    model = cls(config, **second_embedder(case, config))
    randomise(model, case.get("scale", 0.2))
    kwargs = {key: case[key] for key in ("safe_serialization", "max_shard_size") if key in case}
    save_model(model, folder / case["out"], **kwargs)
    if case.get("tokenizer", False):
        save_tiny_tokenizer(folder / case["out"], model.config)
    return {}, {"parameters": {name: list(p.shape) for name, p in model.named_parameters()}}


def save_tiny_tokenizer(path, config):
    """A BERT tokenizer of `vocab_size` words: [PAD] [UNK] [CLS] [SEP] [MASK] w5 w6 ..."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{i}" for i in range(len(words), config.vocab_size)]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    length = config.max_position_embeddings
    transformers.BertTokenizerFast(
        str(path / "vocab.txt"), model_max_length=length
    ).save_pretrained(path)


# -------------------------------------------------------------------------------------------------
# Conversion


@contextlib.contextmanager
def recorded_draws(drawn):
    """Note what a conversion draws: for random globals, and for positions short of 512."""
    standard_normal, sample = (
        multivariate_normal._standard_normal,
        multivariate_normal.MultivariateNormal.sample,
    )

    def record(name, tensor):
        drawn[name] = tensor.detach().clone()
        return tensor

    def patched_normal(mean, std):
        return mean + std * record("position_noise", torch.randn(mean.shape))

    with (
        mock.patch.object(
            multivariate_normal,
            "_standard_normal",
            lambda *a, **k: record("global_noise", standard_normal(*a, **k)),
        ),
        mock.patch.object(
            multivariate_normal.MultivariateNormal,
            "sample",
            lambda *a: record("global_samples", sample(*a)),
        ),
        mock.patch.object(torch, "normal", patched_normal),
    ):
        yield


def run_convert(case, inputs, folder):
    drawn = {}
    converter = LSGConverter(**case.get("options", {}))
    with recorded_draws(drawn):
        # A string: the reference hands it on to APIs that want one.
        model, tokenizer = converter.convert_from_pretrained(
            str(folder / case["checkpoint"]), case.get("architecture"), **case.get("config", {})
        )
    if "out" in case:
        save_model(model, folder / case["out"])
        tokenizer.save_pretrained(folder / case["out"])
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embeddings.weight", "global_embeddings.weight")):
            drawn[name.split(".")[-2]] = parameter
    dropped = ("auto_map", "_name_or_path")  # long, and of this machine
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in dropped}
    report = {
        "class": type(model).__name__,
        "config": config,
        "model_max_length": tokenizer.model_max_length,
    }
    return {name: to_numpy(value) for name, value in drawn.items()}, report


# -------------------------------------------------------------------------------------------------
# The worker

KINDS = {
    "selection": run_selection,
    "attention": run_attention,
    "standalone_attention": run_standalone_attention,
    "local_attention": run_local_attention,
    "model": run_model,
    "make_model": run_make_model,
    "convert": run_convert,
}


def run_case(case, inputs, folder):
    """(arrays out, facts) of one case; `inputs` holds numpy arrays, `folder` anchors its paths."""
    torch.manual_seed(case.get("seed", 0))
    return KINDS[case["kind"]](case, inputs, folder)


def main(folder):
    failures = 0
    for case in json.loads((folder / "job.json").read_text()):
        base = str(folder / case["name"])
        for suffix in (".out.npz", ".out.json", ".error.txt"):
            Path(base + suffix).unlink(missing_ok=True)
        try:
            inputs = dict(np.load(base + ".npz")) if Path(base + ".npz").exists() else {}
            outputs, report = run_case(case, inputs, folder)
            np.savez(base + ".out.npz", **outputs)
            Path(base + ".out.json").write_text(json.dumps(report))
        except Exception:
            failures += 1
            Path(base + ".error.txt").write_text(traceback.format_exc())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
