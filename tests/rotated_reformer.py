"""A Reformer with the parameters and rotations of reference/reformer_numbers.py, as the reference's
generation is recorded with, and compared live."""

import dataclasses
import json
import pathlib
from typing import Any

import safetensors.numpy
from reference.reformer_numbers import drawn, rotations

import lsg_flax
from lsg_flax.models import Model
from lsg_flax.patterns import LSH


@dataclasses.dataclass(frozen=True)
class WithRotations:
    """A model that hashes with the recorded rotations, in every layer the same."""

    model: Model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def max_length(self) -> int:
        return self.model.max_length

    def apply(self, variables, **inputs):
        config = self.config
        pattern = config.pattern("lsh", config.lsh_attn_chunk_length + 1)
        assert isinstance(pattern, LSH)
        shape = pattern.rotations_shape(config.num_attention_heads, config.head_dim)
        given = [rotations(0, shape)] * config.attn_layers.count("lsh")
        return self.model.apply(variables, **inputs, lsh_rotations=given)


def drawn_model(
    folder: pathlib.Path, config: dict[str, Any], shapes: dict[str, Any]
) -> tuple[WithRotations, Any]:
    """The model of a config, read from a folder to write it to, and its parameters."""
    values = {"model_type": "reformer", "architectures": ["ReformerModelWithLMHead"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values | config))
    tensors = {name: drawn(name, shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    model, params = lsg_flax.from_pretrained(folder)
    return WithRotations(model), params
