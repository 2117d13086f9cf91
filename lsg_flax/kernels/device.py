"""The device that a program is compiled for."""

import jax


def device_kind() -> str:
    """Its kind in lower case, "cpu" or one that names the chip, as "tpu v5 lite" does: that of the
    ambient mesh, where a program is compiled for another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.device_kind).lower()
