"""What a call of a model asks for beside the answer, and what of it no model has."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lsg_flax.checks import checked_value, require, whole
from lsg_flax.models.config import EncoderConfig, ModelConfig
from lsg_flax.models.families import HeadTable
from lsg_flax.patterns import Cache, check_packing
from lsg_flax.sharding import check_heads


class Call(NamedTuple):
    """What a call asks for beside the answer.

    `texts`: how many a row has at most; 0 where it is one text.
    """

    cache: Cache | None
    cache_length: int | None
    train: bool
    keep_states: bool
    texts: int = 0

    def kept(self, cache: Cache | None) -> Cache | None:
        """The cache, where one is asked for."""
        return None if self.cache_length == 0 else cache


def refuse(why: str, **given: Any) -> None:
    """Raises ValueError for arrays that are given."""
    names = [name for name, array in given.items() if array is not None]
    if names:
        raise ValueError(f"leave {', '.join(names)} out: {why}.")


def check_run(config: ModelConfig, dtypes: Mapping[str, Any], unroll: int) -> None:
    """Raises ValueError for run-time fields that no computation can have, and for heads that the
    ambient mesh cannot cut."""
    for name, dtype in dtypes.items():
        try:
            floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:  # PyTorch's, or no dtype at all
            floating = False
        require(
            floating,
            f"{name}={dtype!r} must be a type of JAX's real numbers, such as jnp.float32, "
            "jnp.bfloat16 or jnp.float16.",
        )
    for stack in config.stacks.values():
        check_heads(stack.num_attention_heads)
    checked_value("unroll", unroll, int, whole(1, 2**16))


def check_packable(config: ModelConfig, table: HeadTable, *, cached: bool = False) -> None:
    """Raises ValueError for a model that cannot keep several texts of a row apart, and for a
    cache.

    Args:
        table: of the model's head.
        cached: whether a cache is asked for.
    """
    require(
        type(config) is EncoderConfig,
        "segment_ids are for encoders and decoders of the BERT family, not for a "
        f"{config.model_type} model, whose positions or attention go over the whole row; give each "
        "text its own row.",
    )
    require(
        table.task.input_rank == 2 and not table.embedders and not table.finish,
        f"segment_ids are not for task={table.task.name!r}; give each text its own row.",
    )
    assert isinstance(config, EncoderConfig)
    require(
        not config.add_cross_attention,
        "segment_ids with add_cross_attention=True: texts of a row would see the same encoder's "
        "states; give each text its own row.",
    )
    require(
        not cached,
        "segment_ids with a cache: a decoder writes on one text in each row; leave segment_ids, or "
        "cache and cache_length, out.",
    )
    if config.lsg:
        check_packing(config.lsg)
