"""The device that a program is compiled for."""

import jax

TILE_ROWS = 16  # of bfloat16 on a TPU


def device_kind() -> str:
    """Its kind in lower case, "cpu" or one that names the chip, as "tpu v5 lite" does: that of the
    ambient mesh, where a program is compiled for another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.device_kind).lower()


def is_gpu() -> bool:
    """Whether it is one of NVIDIA's; JAX's own name is "gpu"."""
    return device_kind().startswith(("nvidia", "gpu", "cuda"))


def rows_to_fill(count: int) -> int:
    """Rows to add to an array, of whole blocks and `count` others, so that it fills the tiles of
    the device's memory. XLA turns arrays of other sizes on TPUs to a layout of batches within
    tiles, and kernels then begin with copies."""
    return -count % TILE_ROWS if count and "tpu" in device_kind() else 0
