"""LSG and local attention as the `attention_fn` of Flax's attention layers, Linen and NNX.

Axes: B batch (any number of axes here), T tokens, S keys, N heads, K key heads, H head width.
"""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lsg_flax.attention import attend_windows, lsg_attention
from lsg_flax.patterns import GlobalTokens, Local, LSGConfig, Runtime

_MASK = (
    "this attention can only hide padding, the same keys from every query, and with causal=True "
    "later tokens. Pass the layer mask[..., None, None, :] of a [batch, tokens] mask"
)


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """`lsg_attention` or `local_attention` in place of `flax.linen.dot_product_attention` (or
    `flax.nnx`'s):
    `nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=AttentionFn(LSGConfig()))`.

    The layer's parameters stay as they are. Up to two blocks of tokens its numbers are those of
    ordinary attention as well. Two records with equal settings are equal and have the same hash, so
    that the modules that use them share one compilation.

    The layer's `mask` has Flax's meaning: nonzero means seen. It may hide only padding, and later
    tokens if `causal` is on; the outputs at padded positions have no meaning. Prefer a mask of
    [B, 1, 1, T]: one of [T, T] costs quadratic memory and must be compared with the pattern. Any
    other mask raises ValueError; under jit, where its values cannot be read, the output is NaN.

    Attributes:
        config: the pattern: an `LSGConfig`, or `Local` windows.
        causal: whether a token sees no later token. NNX layers may set it per call,
            `is_causal=True`.
        global_tokens: as in `lsg_attention`. "first_token" suits a sequence that starts with a
            [CLS] or BOS token, "none" any other; "prepended" is for models that put
            `config.num_global_tokens` learned vectors in front themselves. `Local` windows have no
            globals and ignore it.
    """

    config: LSGConfig | Local
    causal: bool = False
    global_tokens: GlobalTokens = "first_token"

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K H"],
        bias: Any = None,
        mask: Shaped[Array, "..."] | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: PRNGKeyArray | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> Float[Array, "*B T N H"]:
        """Computes the attention; Flax's layers call it with these argument names.

        Args:
            query, key, value: projected inputs.
            mask: see the class.
            broadcast_dropout: ignored; dropout is drawn for every weight on its own.
            dropout_rng, dropout_rate, deterministic: dropout of attention weights, and its
                probability.
            dtype: of the computation.
            is_causal: as `causal` of the class, for this call.

        Returns:
            The attended values, [*B, T, N, H].

        Raises:
            ValueError: for cross-attention, cached decoding, masks of another form, and arguments
                that this attention does not support: `bias`, `precision`, `module` (Flax's
                `sow_weights=True`).
        """
        del broadcast_dropout
        _refuse(bias=bias, precision=precision, module=module)
        if query.shape[-3] != key.shape[-3]:
            raise ValueError(
                f"this attention is self-attention, but there are {query.shape[-3]} queries and "
                f"{key.shape[-3]} keys; for cross-attention and decode=True leave attention_fn "
                "as Flax has it."
            )
        shape = query.shape
        query, key, value = (
            x.reshape(-1, *x.shape[-3:]) for x in promote_dtype(query, key, value, dtype=dtype)
        )
        causal, train = self._is_causal(is_causal), dropout_rate > 0 and not deterministic
        real, fits = (None, True) if mask is None else _padding(mask, shape, causal)
        dropout = (dropout_rate, dropout_rng) if train else (0.0, None)
        if isinstance(self.config, Local):
            run = Runtime(*dropout)
            context = attend_windows(query, key, value, real, pattern=self.config, run=run)
        else:
            context = lsg_attention(
                query,
                key,
                value,
                real,
                config=self.config,
                causal=causal,
                global_tokens=self.global_tokens,
                dropout_rate=dropout[0],
                dropout_key=dropout[1],
            )
        context = context.reshape(shape)
        return context if fits is True else jnp.where(fits, context, jnp.nan)

    def _is_causal(self, of_call: bool) -> bool:
        causal = self.causal or of_call
        if isinstance(self.config, Local) and causal != self.config.causal:
            raise ValueError(
                f"causal={causal} of the layer, but the windows are Local(causal="
                f"{self.config.causal}); set both to the same value."
            )
        return causal


def _refuse(**arguments) -> None:
    remedies = {
        "bias": "add relative positions by rotating query and key instead",
        "precision": 'set it around the call: jax.default_matmul_precision("highest")',
        "module": "the weights are never formed, so sow_weights=True has nothing to store",
    }
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"this attention takes no {name}={value!r}; {remedies[name]}.")


def _padding(mask, shape: tuple[int, ...], causal: bool):
    """Returns a mask of Flax as [B, T], with B as one axis, and whether it loses nothing: True, or
    under jit a boolean array."""
    *batch, length, heads, _ = shape
    full = (*batch, heads, length, length)
    padded = (1,) * (len(full) - mask.ndim) + mask.shape
    allowed = len(padded) == len(full) and padded[-1] == length
    if not allowed or any(size not in (1, of) for size, of in zip(padded, full, strict=True)):
        raise ValueError(f"mask {mask.shape} does not fit [batch, heads, T, T] = {full}. {_MASK}.")
    mask = mask.astype(bool).reshape(padded)  # [*B, 1 or N, 1 or T, T]
    real = mask.any(axis=(-3, -2))  # [*B, T]
    flat = jnp.broadcast_to(real, (*batch, length)).reshape(-1, length)
    if mask.shape[-3] == mask.shape[-2] == 1:
        return flat, True
    fits = _says_no_more(mask, real, causal)
    if isinstance(fits, jax.core.Tracer):
        return flat, fits
    if not fits:
        raise ValueError(f"mask {mask.shape} hides more than padding (causal={causal}). {_MASK}.")
    return flat, True


def _says_no_more(mask, real, causal: bool):
    """Whether every query sees all real keys (the earlier ones if causal). A query that is padding
    may see nothing, as in the masks of `nn.make_attention_mask`."""
    expected = real[..., None, None, :]  # [*B, 1, 1, T]
    if causal and mask.shape[-2] > 1:
        order = jnp.tri(mask.shape[-1], dtype=bool)
        order = order.reshape((1,) * (mask.ndim - 2) + order.shape)
        mask, expected = mask & order, expected & order
    same = (mask == expected).all(axis=-1)  # [*B, 1 or N, 1 or T]
    if mask.shape[-2] > 1:
        same |= ~mask.any(axis=-1) & ~real[..., None, :]
    return same.all()
