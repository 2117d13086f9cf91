"""Tensors of golden models as the published checkpoints of TensorFlow name and lay them out."""

import numpy as np

OF_TENSORFLOW = {
    "reader": "realm_reader",
    "finetuned_embedder": "realm_embedder",
    "pretrained_embedder": "realm_embedder",
    "encoder": "realm_knowledge_augmented_encoder",
}
WORDS = {
    "reader": {
        "realm.": "reader.module.bert.",
        "cls.": "reader.module.cls.",
        "qa_outputs.dense_intermediate": "reader.dense",
        "qa_outputs.dense_output": "reader.dense_1",
        "qa_outputs.layer_normalization": "reader.layer_normalization",
    },
    "finetuned_embedder": {
        "realm.": "module.module.module.module.bert.",
        "cls.predictions": "module.module.module.module.CLS.predictions",
        "cls.": "module.module.module.",
        "CLS": "cls",
    },
    "pretrained_embedder": {
        "realm.": "module.module.module.bert.",
        "cls.predictions": "module.module.module.CLS.predictions",
        "cls.": "module.module.",
        "CLS": "cls",
    },
    "encoder": {"realm.": "bert."},
}


def in_tensorflow(tensors: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Without the decoder, which is the word table there, and with what training leaves."""
    found = dict(
        _renamed(name, tensor, WORDS[kind])
        for name, tensor in tensors.items()
        if name != "cls.predictions.decoder.weight"
    )
    (first, *_) = found
    return found | {"global_step": np.zeros(1, np.int64), f"{first}/adam_m": np.ones(12)}


def _renamed(name: str, tensor: np.ndarray, words: dict[str, str]) -> tuple[str, np.ndarray]:
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    module, _, end = name.rpartition(".")
    of_norm = "norm" in module.lower()
    ends = {"weight": "gamma" if of_norm else "kernel", "bias": "beta" if of_norm else "bias"}
    if module.endswith("predictions"):
        ends["bias"] = "output_bias"
    name = module if module.endswith("_embeddings") else f"{module}.{ends[end]}"
    name = name.replace("layer.", "layer_").replace(".", "/")
    return name, np.ascontiguousarray(tensor.T) if name.endswith("kernel") else tensor
