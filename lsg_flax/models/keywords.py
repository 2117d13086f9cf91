"""Arguments of Hugging Face's `from_pretrained` that are not fields of a config, but that people
pass out of habit and model cards print: which are ignored, and what to write instead."""

import warnings
from typing import Any

_DOWNLOAD = (
    "download it first, folder = huggingface_hub.snapshot_download(name, {name}=...), and give the "
    "folder"
)
_CLONE = "it is a run-time setting: model = model.clone({to}) after from_pretrained"
_CALL = "it is an argument of the call: model.apply({{'params': params}}, ..., {name}=...)"
# Ignored here -> why.
_IGNORED = {
    "trust_remote_code": "no code of a checkpoint is ever executed",
    "pass_global_tokens_to_decoder": "encoders have no decoder to pass global tokens to",
    "lsg_num_pre_rounds": "the PyTorch classes ignore it too, because the field is called "
    "lsh_num_pre_rounds",
    "ignore_mismatched_sizes": "a head of another size is always initialised again",
    "from_pt": "PyTorch's weights are always read",
    "low_cpu_mem_usage": "weights are always read one by one",
    "use_safetensors": "safetensors are preferred if the folder has them",
    "use_cache": "generation makes a cache when it needs one",
    "return_dict": "outputs always have names",
}
# Written differently here -> how.
_INSTEAD = {
    "torch_dtype": "write dtype=jnp.float16 for the computation, param_dtype=jnp.float16 for the "
    "parameters",
    **dict.fromkeys(("revision", "cache_dir", "force_download", "token"), _DOWNLOAD),
    **dict.fromkeys(("local_files_only", "proxies"), _DOWNLOAD),
    "use_auth_token": _DOWNLOAD.replace("{name}", "token"),
    "subfolder": "give the path of the folder itself",
    "variant": "give a folder whose weights have the usual name, model.safetensors",
    "device_map": "write mesh=lsg_flax.sharding.make_mesh(...)",
    "architecture": "write task=, such as task='masked_lm'",
    "model_type": "give it to lsg_flax.from_pretrained or hub.open_checkpoint, which read the "
    "fields by it",
    "config": "give the fields to change, such as num_labels=3",
    "attn_implementation": _CLONE.format(to="implementation=..."),
    "implementation": _CLONE.format(to="implementation=..."),
    "global_attn_layer": "give a Flax module, global_attention=",
    "remat": _CLONE.format(to="remat='full'"),
    "gradient_checkpointing": _CLONE.format(to="remat='full'"),
    "unroll": _CLONE.format(to="unroll=..."),
    "output_hidden_states": _CALL,
    "output_attentions": "LSG attention never computes the probabilities",
    **dict.fromkeys(
        ("quantization_config", "load_in_8bit", "load_in_4bit"),
        "quantised weights are not supported; write param_dtype=jnp.bfloat16 to halve their memory",
    ),
    **dict.fromkeys(
        ("from_tf", "from_flax"), "give a folder with model.safetensors or pytorch_model.bin"
    ),
}


def heed_keywords(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments without those that are ignored here, which one warning lists.

    Raises:
        ValueError: for arguments that are written differently here; the message says how.
    """
    for name, value in given.items():
        if name in _INSTEAD:
            raise ValueError(
                f"{name}={value!r} is not a field of a config; {_INSTEAD[name].format(name=name)}."
            )
    ignored = [f"{name} ({_IGNORED[name]})" for name in given if name in _IGNORED]
    if ignored:
        warnings.warn(f"ignored: {'; '.join(ignored)}.", stacklevel=6)
    return {name: value for name, value in given.items() if name not in _IGNORED}
