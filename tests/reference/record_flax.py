"""Records tests/golden/albert_plain_flax: weights of a Flax class of Hugging Face, which
transformers 5 no longer has, and what it computes.

    python tests/reference/record_flax.py SITE_PACKAGES_OF_THE_REFERENCE

Runs with lsg_flax's interpreter, for its JAX; transformers 4 comes from the reference environment,
by links to it and to what it needs of its own age.
"""

import importlib
import json
import pathlib
import sys
import tempfile

OUT = pathlib.Path(__file__).parents[1] / "golden" / "albert_plain_flax"
OF_ITS_AGE = ("transformers", "tokenizers", "huggingface_hub")
SIZES = {
    "vocab_size": 13,
    "embedding_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_hidden_groups": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 16,
}


def main(site_packages: pathlib.Path) -> None:
    links = pathlib.Path(tempfile.mkdtemp())
    for name in OF_ITS_AGE:
        for file in (site_packages / name, *site_packages.glob(f"{name}-*info")):
            (links / file.name).symlink_to(file)
    sys.path.insert(0, str(links))
    sys.path.append(str(site_packages))
    import flax.serialization
    import numpy as np
    import transformers

    config = transformers.AlbertConfig(**SIZES, architectures=["AlbertForPreTraining"])
    module = importlib.import_module("transformers.models.albert.modeling_albert_plain_flax")
    model = module.FlaxAlbertForPreTraining(config, seed=0)
    ids = np.array([[2, 5, 6, 7, 8, 3]])
    outputs = model(ids)
    OUT.mkdir(exist_ok=True)
    (OUT / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(model.params))
    (OUT / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    arrays = {name: np.asarray(outputs[name]) for name in ("prediction_logits", "sop_logits")}
    np.savez(OUT / "outputs.npz", input_ids=ids, **arrays)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
