"""The options of a model call, and checks of options that a model cannot have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lsg_flax.checks import checked_value, require, whole
from lsg_flax.models.config import EncoderConfig, ModelConfig
from lsg_flax.models.families import HeadTable
from lsg_flax.patterns import Cache, check_packing
from lsg_flax.sharding import check_heads


class Call(NamedTuple):
    """The options of a model call.

    Attributes:
        texts: the largest number of texts in a row; 0 if each row is one text.
    """

    cache: Cache | None
    cache_length: int | None
    train: bool
    keep_states: bool
    texts: int = 0

    def kept(self, cache: Cache | None) -> Cache | None:
        """The cache to return; None if the call asks for none."""
        return None if self.cache_length == 0 else cache


def refuse(why: str, **given: Any) -> None:
    """Raises ValueError if any of the arrays is given."""
    names = [name for name, array in given.items() if array is not None]
    if names:
        raise ValueError(f"leave {', '.join(names)} out: {why}.")


def refuse_attentions(wanted: bool) -> None:
    """Raises ValueError if attention probabilities are asked for."""
    require(
        not wanted,
        "output_attentions=True is not supported: LSG attention never computes the "
        "[tokens, tokens] probabilities, and those of its blocks are not kept. To look at the "
        "pattern use lsg_flax.attention.lsg_attention_reference.",
    )


def check_run(config: ModelConfig, dtypes: Mapping[str, Any], unroll: int) -> None:
    """Raises ValueError for invalid dtypes and `unroll`, and if the ambient mesh does not divide
    the heads."""
    for name, dtype in dtypes.items():
        try:
            floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:  # a dtype of PyTorch, or no dtype at all
            floating = False
        require(
            floating,
            f"{name}={dtype!r} must be a floating-point dtype of JAX, such as jnp.float32, "
            "jnp.bfloat16 or jnp.float16.",
        )
    for stack in config.stacks.values():
        check_heads(stack.num_attention_heads)
    checked_value("unroll", unroll, int, whole(1, 2**16))


def check_packable(config: ModelConfig, table: HeadTable, *, cached: bool = False) -> None:
    """Raises ValueError if a model cannot read several texts packed into one row.

    Args:
        config: of the model.
        table: the model's head.
        cached: whether a cache is asked for, which packed rows do not allow.
    """
    require(
        type(config) is EncoderConfig,
        "segment_ids need an encoder or decoder like BERT, not a "
        f"{config.model_type} model, whose positions or attention span the whole row; give each "
        "text its own row.",
    )
    require(
        table.task.input_rank == 2 and not table.embedders and not table.finish,
        f"segment_ids are not supported for task={table.task.name!r}; give each text its own row.",
    )
    assert isinstance(config, EncoderConfig)
    require(
        not config.add_cross_attention,
        "segment_ids with add_cross_attention=True: all texts of a row would see the same encoder "
        "states; give each text its own row.",
    )
    require(
        not cached,
        "segment_ids with a cache: a decoder continues one text per row; leave out segment_ids, or "
        "cache and cache_length.",
    )
    if config.lsg:
        check_packing(config.lsg)
