"""Compilation for absent chips: the environment that a process needs, the devices to compile for,
and errors that say what is missing."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from lsg_flax.chips import Chip, Gpu, Topology, Tpu

_SHARE = 0.75  # share of a GPU's memory that JAX allocates by default
_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_HERE = "Without it --topology cpu:8 plans for eight devices on this machine."


def environment_for(topology: Topology) -> dict[str, str]:
    """Returns the environment in which a process must import jax to compile for `topology`: this
    process's environment with further variables."""
    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    given = environment.get("XLA_FLAGS", "")
    flags = [re.sub(r"--xla_force_host_platform_device_count=\d+", "", given)]
    if topology.chip is None:
        flags.append(f"--xla_force_host_platform_device_count={topology.devices}")
    elif isinstance(topology.chip.compiler, Gpu):
        # XLA chooses a Triton kernel's tiles by trying them on the GPU. Without a GPU it chooses
        # poor ones, and finds none for some odd numbers of rows; with this flag cuBLAS is used.
        flags.insert(0, "--xla_gpu_enable_triton_gemm=false")
    else:
        environment |= {
            "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
            "TPU_ACCELERATOR_TYPE": topology.chip.compiler.accelerator,
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so several may compile at once
        }
    return environment | {"XLA_FLAGS": " ".join(flags).strip()}


def devices_of(topology: Topology) -> list[Any]:
    """Returns the devices to compile for, in a process started with `environment_for`.

    Raises:
        ValueError: for a shape that does not exist, or CPU devices that this process does not have.
        ImportError: if the compiler is missing.
    """
    check_compiler(topology)
    if topology.chip is None:
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise ValueError(
                f"{topology.name} needs {topology.devices} CPU devices, but this process has "
                f"{len(devices)}; start it with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}."
            )
        return devices[: topology.devices]
    compiler = topology.chip.compiler
    if isinstance(compiler, Gpu):
        platform, options = "cuda", _gpu_options(topology, topology.chip, compiler)
    else:
        platform, options = "tpu", _tpu_options(topology, compiler)
    try:
        described = topologies.get_topology_desc(topology.name, platform, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{topology.name} is not a topology that this compiler knows: {error}"
        ) from error
    return list(described.devices)


def _tpu_options(topology: Topology, tpu: Tpu) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if tpu.config:
        options["chip_config_name"] = tpu.config
    if topology.name.endswith(":1x1"):  # a host of v5e and v6e has one, four or eight chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    return options


def _gpu_options(topology: Topology, chip: Chip, gpu: Gpu) -> dict[str, Any]:
    """Returns the options for one host of GPUs: the fields of XLA's GpuTargetConfigProto, and the
    topology."""
    reserved = 1024 * (gpu.capability >= (8, 0))  # bytes of each block that CUDA keeps
    device: dict[str, int | float] = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": gpu.shared - reserved,
        "shared_memory_per_core": gpu.shared,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": chip.memory,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    major, minor = gpu.capability
    fields += f" cuda_compute_capability {{ major: {major} minor: {minor} }}"
    target = f'gpu_device_info {{ {fields} }} platform_name: "CUDA" '
    target += f'dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{gpu.name}"'
    return {"target_config": target, "topology": f"1x1x{topology.devices}"}


def check_compiler(topology: Topology) -> None:
    """Raises ImportError if programs for the topology cannot be compiled here."""
    if topology.chip is None:
        return
    if isinstance(topology.chip.compiler, Tpu):
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(
                f"compiling for {topology.name} needs libtpu, on Linux x86-64: "
                f"pip install 'lsg-flax[plan]'. {_HERE}"
            )
    elif not has_cuda_plugin():
        version = jax.lib.__version__
        raise ImportError(
            f"compiling for {topology.name} needs JAX's CUDA plugin, on Linux, but no GPU, driver "
            f"or other NVIDIA package: run pip install --no-deps --target cuda_plugin "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}, and set "
            f"PYTHONPATH=cuda_plugin. {_HERE}"
        )


def has_cuda_plugin() -> bool:
    """Whether programs for GPUs can be compiled here."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    names = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return any(importlib.util.find_spec(name) for name in names)


def capacity_of(topology: Topology) -> int | None:
    """Returns the bytes that a program can use on a chip; for a GPU the share of its memory that
    JAX allocates in this environment; None for a CPU.

    Raises:
        ValueError: if the environment has an invalid share.
    """
    chip = topology.chip
    if chip is None or isinstance(chip.compiler, Tpu):
        return chip and chip.memory
    return int(chip.memory * memory_share())


def memory_share() -> float:
    """Returns the share of a GPU's memory that JAX allocates.

    Raises:
        ValueError: if the environment has a share that is not above 0 and at most 1.
    """
    name = next((name for name in _SHARES if os.environ.get(name)), None)
    if name is None:
        return _SHARE
    given = os.environ[name]
    share = float(given) if re.fullmatch(r"\d*\.?\d+", given) else 0.0
    if not 0 < share <= 1:
        raise ValueError(
            f"{name}={given!r} in the environment must be a number above 0 and at most 1: the "
            f"share of a GPU's memory that JAX allocates. Unset, it is {_SHARE}."
        )
    return share
