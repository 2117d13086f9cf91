"""Rotary positions within windows (RoPE, arXiv 2104.09864), optionally scaled (xpos, arXiv
2212.10554), with the numbers of local-attention's `rotary.py`.

Axes: B batch, N heads, H head width, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsg_flax.checks import require

THETA = 10_000.0


@dataclass(frozen=True)
class Rotary:
    """Rotates pairs of features by the position in the window, so that scores depend on the
    distance between query and key (arXiv 2104.09864; xpos: arXiv 2212.10554).

    Attributes:
        xpos_base: with xpos, scores shrink with the distance of a key, by a power of distance /
            `xpos_base`, both in tokens; None for no xpos.
    """

    xpos_base: float | None = None

    def rotate(
        self,
        x: Float[Array, "B N H T"],
        window: int,
        first: int | Int[Array, ""],
        *,
        centre: int,
        sign: int,
    ) -> Float[Array, "B N H T"]:
        """Rotates tokens.

        Args:
            x: queries or keys, whole windows.
            window: tokens per window.
            first: position of the first token of each window.
            centre: the position at which xpos does not scale.
            sign: sign of the power of xpos: 1 for queries, -1 for keys.
        """
        batch, heads, width, length = x.shape
        cosine, sine, size = self._tables(width, first + np.arange(window), centre, sign)
        cells = x.reshape(batch, heads, 2, width // 2, length // window, window).astype(jnp.float32)
        real, imaginary = cells[:, :, 0], cells[:, :, 1]  # [B, N, H / 2, windows, places]
        turned = (real * cosine - imaginary * sine, imaginary * cosine + real * sine)
        rotated = jnp.stack([size * part for part in turned], axis=2)
        return rotated.reshape(x.shape).astype(x.dtype)

    def of_a_place(self, width: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the angle in radians by which each pair of the `width` features of a head rotates
        from one position to the next, and the logarithm of its scale factor."""
        angles = frequencies(width)
        growth = np.zeros_like(angles)
        if self.xpos_base is not None:
            growth = np.log(_shrink(width)) / np.float32(self.xpos_base)
        return tuple(angles.tolist()), tuple(growth.tolist())

    def _tables(self, width: int, places: Any, centre: int, sign: int):
        """Cosine, sine and scale, [1, 1, H / 2, 1, places], in float32 as in the reference."""
        numbers: Any = np if isinstance(places, np.ndarray) else jnp
        places = places.astype(np.float32)[None, None, None, None]
        angle = places * frequencies(width)[None, None, :, None, None]
        if self.xpos_base is None:
            return numbers.cos(angle), numbers.sin(angle), np.float32(1.0)
        shrink = _shrink(width)[None, None, :, None, None]
        size = shrink ** (sign * (places - centre) / self.xpos_base)
        return numbers.cos(angle), numbers.sin(angle), size


def frequencies(width: int) -> Float[np.ndarray, "_"]:
    """Returns the angles in radians by which the pairs of a head of `width` features rotate from
    one position to the next (arXiv 2104.09864)."""
    even = np.arange(0, width, 2, dtype=np.float32)
    return 1.0 / np.float32(THETA) ** (even / np.float32(width))


def _shrink(width: int) -> Float[np.ndarray, "_"]:
    """The scale factors of xpos between two positions `xpos_base` apart."""
    even = np.arange(0, width, 2, dtype=np.float32)
    return (even + np.float32(0.4 * width)) / np.float32(1.4 * width)


def rotary_of(
    width: int, window_size: int, *, used: bool, xpos: bool, base: float | None
) -> Rotary | None:
    """Makes the record from local-attention's options for heads of `width` features and windows of
    `window_size` tokens, with `base` in tokens too; None if not `used`. (local-attention's
    `rotary.py`)

    Raises:
        ValueError: for options that contradict each other, and heads of odd width.
    """
    require(used or not xpos, "use_xpos=True scales rotary positions: set use_rotary_pos_emb=True.")
    require(xpos or base is None, f"xpos_scale_base={base} is for use_xpos=True.")
    require(
        not used or width % 2 == 0,
        f"rotary positions rotate pairs of features, but heads have the odd width {width}: give an "
        "even width, or use_rotary_pos_emb=False.",
    )
    if not xpos:
        return Rotary() if used else None
    base = window_size // 2 if base is None else base
    require(base > 0, f"xpos_scale_base={base} must be positive (window_size // 2 by default).")
    return Rotary(float(base))
