"""What is known of TPU chips, and topologies of them by name: "v5e:2x4" is eight v5e chips, "cpu:8"
eight devices that this machine's processor plays."""

import math
import os
import re
from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """Peak numbers of one chip.

    Attributes:
        memory: bytes that a program can use, as XLA states when it refuses one (libtpu 0.0.42); the
            published capacity is a little more.
        flops: matrix FLOP/s in bfloat16.
        bandwidth: bytes/s of main memory.
        links: bytes/s that the chip sends to its neighbours over all links together.
        clock: Hz, what XLA's cycle estimates are divided by: `flops` over the products per cycle of
            the chip's matrix units (4 of 128 x 128 per v5e, 8 per v4 and v5p, 4 of 256 x 256 per
            v6e).
        kinds: what JAX's `device_kind` of it contains.
        accelerator: a value for TPU_ACCELERATOR_TYPE.
        config: the name that makes one device of a chip's two cores, where it is not the default.
    """

    memory: int
    flops: float
    bandwidth: float
    links: float
    clock: float
    kinds: tuple[str, ...]
    accelerator: str
    config: str | None = None


# Sources: "system architecture" pages of Google Cloud's TPU documentation (peak compute, HBM
# bandwidth, inter-chip interconnect in Gbit/s: v4 2400, v5e 1600, v5p 4800, v6e 3584).
CHIPS: dict[str, Chip] = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1228e9, 300e9, 1.05e9, ("TPU v4",), "v4-8", "megacore"),
    "v5e": Chip(
        int(15.75 * GIB), 197e12, 819e9, 200e9, 1.5e9, ("TPU v5 lite", "TPU v5e"), "v5litepod-8"
    ),
    "v5p": Chip(int(95.74 * GIB), 459e12, 2765e9, 600e9, 1.75e9, ("TPU v5", "TPU v5p"), "v5p-8"),
    "v6e": Chip(
        int(31.25 * GIB), 918e12, 1640e9, 448e9, 1.75e9, ("TPU v6 lite", "TPU v6e"), "v6e-8"
    ),
}
_MOST_CHIPS, _MOST_DEVICES = 1 << 14, 512
_EXAMPLES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}


class Topology(NamedTuple):
    """Devices that need not be there; `chip` is None for "cpu"."""

    name: str
    kind: str
    devices: int

    @property
    def chip(self) -> Chip | None:
        """What is known of its chips."""
        return CHIPS.get(self.kind)


def parse_topology(name: str) -> Topology:
    """Reads "v5e:2x4" or "cpu:8".

    Raises:
        ValueError: for an unknown chip or another form.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", name)
    kind, sizes = (found[1], [int(n) for n in found[2].split("x")]) if found else ("", [])
    known = kind in CHIPS and len(sizes) == _EXAMPLES[kind].count("x") + 1
    count = math.prod(sizes)
    most = _MOST_DEVICES if kind == "cpu" else _MOST_CHIPS
    if not (known or (kind == "cpu" and len(sizes) == 1)) or not 1 <= count <= most:
        raise ValueError(
            f"topology={name!r} is unknown; give chip:shape as in "
            f"{', '.join(repr(e) for e in _EXAMPLES.values())}, or 'cpu:8' for eight devices on "
            f"this machine; at most {_MOST_CHIPS:,} chips, or {_MOST_DEVICES} such devices."
        )
    return Topology(name, kind, count)


def environment_for(topology: Topology) -> dict[str, str]:
    """This process's environment with what a process must find when it imports jax to compile for
    `topology`."""
    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", environment.get("XLA_FLAGS", "")
    )
    if topology.chip is None:
        flags += f" --xla_force_host_platform_device_count={topology.devices}"
    else:
        environment |= {
            "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server: there is none
            "TPU_ACCELERATOR_TYPE": topology.chip.accelerator,
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes no chip, so several may compile at once
        }
    return environment | {"XLA_FLAGS": flags.strip()}


def devices_of(topology: Topology) -> list:
    """The devices to compile for, in a process started with `environment_for`.

    Raises:
        ValueError: for a shape that does not exist, or CPU devices that this process does not have.
        ImportError: if libtpu is missing.
    """
    import jax
    from jax.experimental import topologies

    if topology.chip is None:
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise ValueError(
                f"{topology.name} needs {topology.devices} CPU devices, this process has "
                f"{len(devices)}; start it with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}."
            )
        return devices[: topology.devices]
    check_libtpu()
    options: dict[str, Any] = {}
    if topology.chip.config:
        options["chip_config_name"] = topology.chip.config
    if topology.name.endswith(":1x1"):  # a host of v5e and v6e has one, four or eight chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{topology.name} is no topology that libtpu knows: {error}") from error
    return list(described.devices)


def check_libtpu() -> None:
    """Raises ImportError if TPU programs cannot be compiled here."""
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "compiling for a TPU needs libtpu, on Linux x86-64: pip install 'lsg-flax[plan]'. "
            "Without it --topology cpu:8 plans for eight devices on this machine."
        )
