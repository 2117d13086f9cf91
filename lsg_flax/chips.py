"""Data of TPU chips and GPUs, and topologies of them by name: "v5e:2x4" is eight v5e chips,
"h100:8" eight GPUs of one host, "cpu:8" eight devices simulated by this machine's processor."""

import math
import re
from typing import NamedTuple

GIB = 2**30


class Tpu(NamedTuple):
    """The settings of a TPU chip for libtpu, and its clock.

    Attributes:
        clock: Hz, to convert XLA's cycle estimates to seconds: the chip's FLOP/s over the products
            per cycle of its matrix units (4 of 128 x 128 per v5e, 8 per v4 and v5p, 4 of 256 x 256
            per v6e).
        accelerator: value of TPU_ACCELERATOR_TYPE.
        config: name of the chip config in which a chip's two cores are one device, if that is not
            the default.
    """

    clock: float
    accelerator: str
    config: str | None = None


class Gpu(NamedTuple):
    """The data that XLA reads from CUDA about a present GPU, and must be told about an absent one.

    Attributes:
        name: JAX's `device_kind`.
        capability: CUDA's compute capability.
        cores: number of streaming multiprocessors.
        units: number of float32 units per multiprocessor.
        threads: largest number of threads per multiprocessor.
        shared: bytes of shared memory per multiprocessor.
        cache: bytes of the level-2 cache.
        clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    shared: int
    cache: int
    clock: float


class Chip(NamedTuple):
    """Peak numbers of one chip.

    Attributes:
        memory: bytes of memory. For a TPU those that a program can use, as XLA states when it
            refuses one (libtpu 0.0.42; the published capacity is a little more); for a GPU all that
            CUDA reports.
        flops: matrix FLOP/s in bfloat16, without sparsity (a T4's in float16, as it has no
            bfloat16).
        bandwidth: bytes/s of main memory.
        links: bytes/s that the chip sends to its neighbours over all links together.
        kinds: parts of JAX's `device_kind` by which it is recognised.
        compiler: further data for its compiler.
    """

    memory: int
    flops: float
    bandwidth: float
    links: float
    kinds: tuple[str, ...]
    compiler: Tpu | Gpu


# Sources: "system architecture" pages of Google Cloud's TPU documentation (peak compute, HBM
# bandwidth, inter-chip interconnect in Gbit/s: v4 2400, v5e 1600, v5p 4800, v6e 3584); NVIDIA's
# data sheets (the SXM forms, A100 with 80 GB; half of NVLink's two-way bandwidth, of an L4 and a
# T4 that of PCIe 4.0 and 3.0), memory and the compiler's data as CUDA reports them.
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        *(int(30.75 * GIB), 275e12, 1228e9, 300e9, ("TPU v4",)), Tpu(1.05e9, "v4-8", "megacore")
    ),
    "v5e": Chip(
        *(int(15.75 * GIB), 197e12, 819e9, 200e9, ("TPU v5 lite", "TPU v5e")),
        Tpu(1.5e9, "v5litepod-8"),
    ),
    "v5p": Chip(
        *(int(95.74 * GIB), 459e12, 2765e9, 600e9, ("TPU v5", "TPU v5p")), Tpu(1.75e9, "v5p-8")
    ),
    "v6e": Chip(
        *(int(31.25 * GIB), 918e12, 1640e9, 448e9, ("TPU v6 lite", "TPU v6e")),
        Tpu(1.75e9, "v6e-8"),
    ),
    "a100": Chip(
        *(85_100_068_864, 312e12, 2039e9, 300e9, ("A100",)),
        Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164 << 10, 40 << 20, 1.41),
    ),
    "h100": Chip(
        *(84_942_979_072, 989e12, 3352e9, 450e9, ("H100",)),
        Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 << 10, 50 << 20, 1.98),
    ),
    "h200": Chip(
        *(151_397_597_184, 989e12, 4800e9, 450e9, ("H200", "GH200")),
        Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 228 << 10, 50 << 20, 1.98),
    ),
    "b200": Chip(
        *(191_514_411_008, 2250e12, 7672e9, 900e9, ("B200",)),
        Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 228 << 10, 132_644_864, 1.965),
    ),
    "l4": Chip(
        *(int(22.03 * GIB), 121e12, 300e9, 32e9, ("L4",)),
        Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 100 << 10, 48 << 20, 2.04),
    ),
    "t4": Chip(
        *(15_843_721_216, 65e12, 320e9, 16e9, ("T4",)),
        Gpu("Tesla T4", (7, 5), 40, 64, 1024, 64 << 10, 4 << 20, 1.59),
    ),
}
# Limits of a TPU slice, of one GPU host, and of devices simulated by a processor.
_MOST_CHIPS, _MOST_GPUS, _MOST_DEVICES = 1 << 14, 8, 512
_SHAPES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}
_SHAPES |= {name: f"{name}:8" for name, chip in CHIPS.items() if isinstance(chip.compiler, Gpu)}


class Topology(NamedTuple):
    """A topology of devices, which need not be present; `chip` is None for "cpu"."""

    name: str
    kind: str
    devices: int

    @property
    def chip(self) -> Chip | None:
        """The data of its chips."""
        return CHIPS.get(self.kind)


def parse_topology(name: str) -> Topology:
    """Reads "v5e:2x4", "h100:8" or "cpu:8".

    Raises:
        ValueError: for an unknown chip or another form.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", name)
    kind, sizes = (found[1], [int(n) for n in found[2].split("x")]) if found else ("", [])
    example = (_SHAPES | {"cpu": "cpu:8"}).get(kind)
    known = example is not None and len(sizes) == example.count("x") + 1
    count = math.prod(sizes)
    if not known or not 1 <= count <= _most(kind):
        raise ValueError(
            f"topology={name!r} is unknown; give chip:shape as in "
            f"{', '.join(repr(e) for e in _SHAPES.values())}, or 'cpu:8' for eight devices on "
            f"this machine; at most {_MOST_CHIPS:,} TPU chips, {_MOST_GPUS} GPUs of one host, or "
            f"{_MOST_DEVICES} CPU devices."
        )
    return Topology(name, kind, count)


def _most(kind: str) -> int:
    if kind == "cpu":
        return _MOST_DEVICES
    return _MOST_GPUS if isinstance(CHIPS[kind].compiler, Gpu) else _MOST_CHIPS
