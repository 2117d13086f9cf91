"""The input arrays of a model, checked before anything is computed.

Axes: B batch, C choices, T tokens, S keys (an encoder's states), D model width.
"""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from lsg_flax.models.attention_layers import EncoderStates
from lsg_flax.models.config import EncoderConfig, ModelConfig
from lsg_flax.patterns import Cache, are_texts, slots_for


class Inputs(NamedTuple):
    """The arrays of a call, [B, T] or [B, C, T]; embeddings have one more axis."""

    input_ids: Any = None
    attention_mask: Any = None
    token_type_ids: Any = None
    position_ids: Any = None
    inputs_embeds: Any = None
    segment_ids: Any = None

    @property
    def lead(self) -> tuple[int, ...]:
        """The common [B, T] or [B, C, T]."""
        return tuple(
            self.inputs_embeds.shape[:-1] if self.input_ids is None else self.input_ids.shape
        )

    @property
    def rank(self) -> int:
        """The number of axes that ids have, or would have; 0 if nothing is given."""
        return max(getattr(self.input_ids, "ndim", 0), getattr(self.inputs_embeds, "ndim", 1) - 1)

    def padded(self, extra: int, filler: int) -> "Inputs":
        """Returns a copy with padding at the end of the ids or embeddings; masks are unchanged."""
        if not extra:
            return self
        if self.input_ids is None:
            embeds = jnp.pad(self.inputs_embeds, ((0, 0), (0, extra), (0, 0)))
            return self._replace(inputs_embeds=embeds)
        ids = jnp.pad(self.input_ids, ((0, 0), (0, extra)), constant_values=filler)
        return self._replace(input_ids=ids)

    def _without(self, wrong: Any) -> "Inputs":
        """Returns a copy whose invalid rows have out-of-range ids, or NaN for embeddings, so that
        their outputs are NaN."""
        if self.input_ids is not None:  # int32, since -1 must be representable
            ids = jnp.where(wrong[:, None], -1, self.input_ids.astype(jnp.int32))
            return self._replace(input_ids=ids)
        embeds = jnp.where(wrong[:, None, None], jnp.nan, self.inputs_embeds)
        return self._replace(inputs_embeds=embeds)

    def flattened(self, texts: int = 0, block: int = 1) -> "Inputs":
        """Returns checked inputs as JAX arrays with choices merged into the batch. Under jit a row
        with an invalid mask or invalid segments gets out-of-range ids, or NaN for embeddings.

        Args:
            texts: the largest number of segments in a row.
            block: segments start at multiples of this number of tokens.
        """
        drop = len(self.lead) - 1
        arrays = (None if a is None else jnp.asarray(a) for a in self)
        flat = Inputs(*(a if a is None else a.reshape(-1, *a.shape[drop:]) for a in arrays))
        right: Any = None
        if isinstance(self.attention_mask, jax.core.Tracer) and flat.attention_mask.dtype != bool:
            right = ((flat.attention_mask == 0) | (flat.attention_mask == 1)).all(axis=1)
        if isinstance(self.segment_ids, jax.core.Tracer):
            texts_right = are_texts(flat.segment_ids, texts, block)
            right = texts_right if right is None else right & texts_right
        return flat if right is None else flat._without(~right)


def check_inputs(
    inputs: Inputs, config: EncoderConfig, limit: int, *, rank: int, of: str = ""
) -> None:
    """Checks inputs before anything is computed.

    Args:
        inputs: the arrays.
        config: of the stack that reads them.
        limit: number of positions that the model has.
        rank: number of axes of `input_ids`.
        of: prefix of the arrays' names in messages: "decoder_" for a decoder's.

    Raises:
        ValueError: for arrays that do not fit the model or each other.
    """
    for name, array in inputs._asdict().items():
        if array is not None and not hasattr(array, "shape"):
            raise ValueError(
                f"{of}{name} is a {type(array).__name__}; give a numpy or JAX array "
                '(tokenizer(..., return_tensors="np")).'
            )
        _check_sharding(array, of + name)
    given = sum(array is not None for array in (inputs.input_ids, inputs.inputs_embeds))
    if given != 1:
        raise ValueError(f"give either {of}input_ids or {of}inputs_embeds, got {given} of the two.")
    _check_shapes(inputs, config, limit, rank, of)
    if inputs.attention_mask is not None:
        _check_mask(inputs.attention_mask, f"{of}attention_mask")
    if config.type_vocab_size == 0 and inputs.token_type_ids is not None:
        raise ValueError(
            f"{config.model_type} has no segments (type_vocab_size=0): leave token_type_ids out."
        )
    for name, field in (("input_ids", "vocab_size"), ("token_type_ids", "type_vocab_size")):
        check_ids(getattr(inputs, name), of + name, config, field, getattr(config, field))
    check_ids(inputs.position_ids, f"{of}position_ids", config, *config.position_limit)


def _check_sharding(array: Any, name: str) -> None:
    sharding = None if array is None else jax.typeof(array).sharding
    if sharding is not None and sharding.mesh.explicit_axes and any(sharding.spec):
        raise ValueError(
            f"{name} is sharded over mesh axes of the type Explicit, {sharding.spec}, which models "
            "cannot follow; make the mesh with lsg_flax.sharding.make_mesh, or with "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * number_of_axes)."
        )


def _check_shapes(inputs: Inputs, config: EncoderConfig, limit: int, rank: int, of: str) -> None:
    lead = inputs.lead
    layout = "[batch, choices, tokens]" if rank == 3 else "[batch, tokens]"
    if len(lead) != rank:
        raise ValueError(
            f"the {of}inputs must be {layout}, got a leading shape {lead}; add the missing axis "
            "with x[None]."
        )
    length, embeds = lead[-1], inputs.inputs_embeds
    if length > limit and inputs.position_ids is None and inputs.segment_ids is None:
        says = {"max_position_embeddings": config.max_position_embeddings}
        says |= dict((config.position_limit,))
        raise ValueError(
            f"{length} {of}tokens are more than the {limit} positions of this checkpoint "
            f"({', '.join(f'{name}={count}' for name, count in says.items())}); "
            f"{config.or_convert('truncate them', length)}."
        )
    if 0 in lead:
        raise ValueError(f"the inputs are {layout} = {lead}; there must be at least one of each.")
    _check_real(embeds, "inputs_embeds")
    if embeds is not None and embeds.shape[-1] != config.embedding_width:
        name = "embedding_size" if config.embedding_size else "hidden_size"
        raise ValueError(
            f"{of}inputs_embeds {embeds.shape} must end in {name}={config.embedding_width}."
        )
    for name in ("attention_mask", "token_type_ids", "position_ids", "segment_ids"):
        array = getattr(inputs, name)
        allowed = [lead, *[(1, *lead[1:])] * (name == "position_ids")]
        if array is not None and tuple(array.shape) not in allowed:
            raise ValueError(
                f"{of}{name} has shape {tuple(array.shape)}, but the {of}inputs are {layout} = "
                f"{lead}; they must be equal."
            )


def _check_real(array, name: str) -> None:
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}; give floating-point numbers.")


def _check_mask(mask, name: str) -> None:
    if not (jnp.issubdtype(mask.dtype, jnp.integer) or mask.dtype == bool):
        raise ValueError(
            f"{name} has dtype {mask.dtype}; give integers or booleans, 1 or True for "
            "real tokens (not the additive form)."
        )
    if isinstance(mask, jax.core.Tracer) or mask.dtype == bool:
        return
    others = sorted({*np.unique(np.asarray(mask)).tolist()} - {0, 1})
    if others:
        raise ValueError(
            f"{name} has the values {str(others[:5])[1:-1]}; give 1 for real tokens and 0 for "
            "padding. Texts packed into one row are told apart by segment_ids."
        )


def _where_masked(array: Any, mask: Any, otherwise: int | float) -> Any:
    """The array, with `otherwise` in rows whose mask has values other than 0 and 1."""
    if mask.dtype == bool:
        return array
    is_mask = ((mask == 0) | (mask == 1)).all(axis=1)
    return jnp.where(is_mask.reshape(-1, *(1,) * (array.ndim - 1)), array, otherwise)


def check_ids(ids, name: str, config: ModelConfig, field: str, limit: int) -> None:
    """Raises ValueError for ids that are not integers or, outside jit, are beyond the rows of a
    table; `field` is the setting of config.json that limits them."""
    if ids is None:
        return
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {ids.dtype}; they must be integers.")
    if isinstance(ids, jax.core.Tracer):
        return
    values = np.asarray(ids)
    if values.min() < 0 or values.max() >= limit:
        remedy = {
            "prod(axial_pos_shape)": "; a position needs a row and a column there",
            "max_position_embeddings": "; "
            + config.or_convert("give smaller ones", int(values.max()) + 1),
            "vocab_size": "; tokenizer and checkpoint do not belong together",
        }.get(field, "")
        raise ValueError(
            f"{name} are in {values.min()}..{values.max()}, but {field}={limit} allows "
            f"0..{limit - 1}{remedy}."
        )


def encoder_states(
    states: Any,
    mask: Any,
    config: EncoderConfig,
    batch: int,
    *,
    cache: Cache | None,
    dtype: Dtype,
    required: bool = True,
) -> EncoderStates | None:
    """Returns the checked encoder states for cross-attention; None if the model has none, or a
    cache has them.

    Args:
        states: [B, S, D].
        mask: [B, S]; by default all are real.
        required: whether a model with cross-attention needs them.

    Raises:
        ValueError: for states that do not fit the model, or are missing.
    """
    if states is None and mask is not None:
        raise ValueError(
            "encoder_attention_mask is given without encoder_hidden_states; give both or none."
        )
    if states is not None and (not config.add_cross_attention or cache is not None):
        raise ValueError(
            "encoder_hidden_states are given, but "
            + (
                "this model has add_cross_attention=False."
                if cache is None
                else "the cache already has their keys and values: leave them out."
            )
        )
    if not config.add_cross_attention or cache is not None or (states is None and not required):
        return None
    width = config.hidden_size
    if states is None:
        raise ValueError(
            "add_cross_attention=True needs encoder_hidden_states, [batch, tokens, "
            f"hidden_size={width}]."
        )
    fits = states.ndim == 3 and (states.shape[0], states.shape[2]) == (batch, width)
    if not fits or 0 in states.shape:
        raise ValueError(
            f"encoder_hidden_states {tuple(states.shape)} must be [batch={batch}, tokens, "
            f"hidden_size={width}]."
        )
    _check_real(states, "encoder_hidden_states")
    if mask is None:
        mask = jnp.ones(states.shape[:2], bool)
    if tuple(mask.shape) != tuple(states.shape[:2]):
        raise ValueError(
            f"encoder_attention_mask {tuple(mask.shape)} must be [batch, tokens] = "
            f"{tuple(states.shape[:2])}, as encoder_hidden_states."
        )
    _check_mask(mask, "encoder_attention_mask")
    states = jnp.asarray(states, dtype)
    if isinstance(mask, jax.core.Tracer):
        states = _where_masked(states, mask, jnp.nan)
    return EncoderStates(states, jnp.asarray(mask).astype(bool))


def slots_of_cache(inputs: Inputs, config: EncoderConfig, limit: int, length: int) -> int:
    """Returns the number of slots of a new cache for `length` tokens.

    Args:
        inputs: the prompt.
        config: of the stack that decodes.
        limit: number of positions that the model has.
        length: number of tokens, those of the prompt included.

    Raises:
        ValueError: if `length` is less than the prompt or more than the positions, or rows of the
            prompt do not end together.
    """
    lead, mask = inputs.lead, inputs.attention_mask
    if length < lead[1]:
        raise ValueError(
            f"cache_length={length} has no room for the {lead[1]} tokens given; raise it."
        )
    if length > limit and inputs.position_ids is None:
        raise ValueError(
            f"cache_length={length} is more than the {limit} positions of this checkpoint; "
            f"{config.or_convert('decode fewer tokens', length)}."
        )
    if mask is not None and not isinstance(mask, jax.core.Tracer):
        ends = np.max(np.where(np.asarray(mask, bool), np.arange(1, lead[1] + 1), 0), axis=1)
        if (ends != ends[0]).any() or ends[0] == 0:
            raise ValueError(
                "the rows of a prompt must end together: their last real tokens are at "
                f"{(ends - 1).tolist()} (-1: none). Pad on the left "
                "(tokenizer.padding_side = 'left')."
            )
    return slots_for(length, config.kept_pattern)


def check_step(inputs: Inputs, cache: Cache, config: EncoderConfig) -> None:
    """Raises ValueError unless the input is one more token of each row and the cache has a free
    slot."""
    lead = inputs.lead
    batch, globals_ = cache.position.shape[0], config.lsg.num_global_tokens if config.lsg else 0
    if lead != (batch, 1):
        raise ValueError(
            f"with a cache the input is one token for each of its {batch} rows, [{batch}, 1], got "
            f"{list(lead)}; pass a prompt without a cache."
        )
    slots = cache.layers.tokens.key.shape[-1] - globals_
    if not isinstance(cache.length, jax.core.Tracer) and int(cache.length) >= slots:
        raise ValueError(
            f"the cache is full: all its {slots} slots are in use. Start with a larger "
            "cache_length."
        )
