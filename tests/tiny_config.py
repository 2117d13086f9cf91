"""Sizes of tiny models by EncoderConfig's names, as each family's config.json has them."""

import math

from lsg_flax.models import FAMILIES, EncoderDecoderConfig
from lsg_flax.models.config_json import DIALECTS

SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
OF_STACKS = {
    "num_hidden_layers": "{}_layers",
    "num_attention_heads": "{}_attention_heads",
    "intermediate_size": "{}_ffn_dim",
}
OF_BOTH = {
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# Those that become LSG, all of transformers; LocalTransformer and Reformer have tests of their own.
OF_TRANSFORMERS = [name for name, family in FAMILIES.items() if family.to_lsg]


def has_two_stacks(family: str) -> bool:
    return FAMILIES[family].config_type is EncoderDecoderConfig


def spelled(family: str, values: dict) -> dict:
    """Fields of config.json with the model_type; of an encoder-decoder both stacks get them."""
    spelled = {"model_type": family}
    for name, value in values.items():
        names = [name]
        if has_two_stacks(family):
            sides = OF_STACKS.get(name, OF_BOTH.get(name, name))
            names = sorted({sides.format(side) for side in ("encoder", "decoder")})
        spelled |= {DIALECTS[family].names.get(n, n): value for n in names}
    for name, same in DIALECTS[family].equal.items():
        spelled.setdefault(name, values[same])
    for name, (default, of) in DIALECTS[family].groups.items():
        spelled.setdefault(name, math.gcd(min(default, 2), *(values[size] for size in of)))
    return spelled
