"""The device that a program is compiled for."""

import jax

TILE_ROWS = 16  # of bfloat16 on a TPU


def device_kind() -> str:
    """Returns the device's kind in lower case, such as "cpu" or "tpu v5 lite"; that of the ambient
    mesh if a program is compiled for another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.device_kind).lower()


def is_gpu() -> bool:
    """Whether the device is an NVIDIA GPU; JAX's own name is "gpu"."""
    return device_kind().startswith(("nvidia", "gpu", "cuda"))


def rows_to_fill(count: int) -> int:
    """Returns how many rows to add to an array of whole blocks and `count` other rows so that it
    fills the tiles of a TPU's memory. For other sizes XLA chooses a layout with batches inside
    tiles, and kernels then start with copies."""
    return -count % TILE_ROWS if count and "tpu" in device_kind() else 0
