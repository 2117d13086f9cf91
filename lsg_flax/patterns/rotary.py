"""Rotary positions within windows (RoPE, arXiv 2104.09864), and their lengths by xpos (arXiv
2212.10554), in the numbers of local-attention's `rotary.py`.

Axes: B batch, N heads, H head width, T tokens.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 10_000.0


@dataclass(frozen=True)
class Rotary:
    """Rotates pairs of features by the place in the window; a score then depends on how far query
    and key are apart.

    `xpos_base`: by xpos, the longer a key is ago the smaller is its score, by a power of distance /
    `xpos_base`; None leaves lengths alone.
    """

    xpos_base: float | None = None

    def rotate(
        self, x: Float[Array, "B N H T"], window: int, first: int, *, centre: int, sign: int
    ) -> Float[Array, "B N H T"]:
        """Tokens in whole windows, the first of each at place `first`.

        Args:
            centre: the place at which xpos changes no length.
            sign: of the power of xpos: 1 for queries, -1 for keys.
        """
        batch, heads, width, length = x.shape
        cosine, sine, size = self._tables(width, first + np.arange(window), centre, sign)
        cells = x.reshape(batch, heads, 2, width // 2, length // window, window).astype(jnp.float32)
        real, imaginary = cells[:, :, 0], cells[:, :, 1]  # [B, N, H / 2, windows, places]
        turned = (real * cosine - imaginary * sine, imaginary * cosine + real * sine)
        rotated = jnp.stack([size * part for part in turned], axis=2)
        return rotated.reshape(x.shape).astype(x.dtype)

    def _tables(self, width: int, places: np.ndarray, centre: int, sign: int):
        """Cosine, sine and size, [1, 1, H / 2, 1, places], in float32 as the reference has them."""
        even = np.arange(0, width, 2, dtype=np.float32)[None, None, :, None, None]
        places = places.astype(np.float32)
        angle = places * (1.0 / np.float32(THETA) ** (even / np.float32(width)))
        if self.xpos_base is None:
            return np.cos(angle), np.sin(angle), np.float32(1.0)
        shrink = (even + np.float32(0.4 * width)) / np.float32(1.4 * width)
        return np.cos(angle), np.sin(angle), shrink ** (sign * (places - centre) / self.xpos_base)
