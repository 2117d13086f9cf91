"""The environment in which the tests compile: cheap XLA flags, and JAX's persistent cache of
compiled programs. Importing this module sets it for 8 devices, so it comes before jax; processes
that a test starts inherit it.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re

JAXLIB = importlib.metadata.version("jaxlib")
CHEAP = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if JAXLIB.startswith(("0.9.", "0.10.")):  # others end the process at a flag that they do not know
    CHEAP.append("--xla_cpu_use_fusion_emitters=false")  # half the time to compile
LIMIT = 2 * 2**30  # bytes


def xla_flags(devices: int) -> str:
    """For XLA_FLAGS: cheap compilation, that many CPU devices, and what the user has set."""
    ours = [f"--xla_force_host_platform_device_count={devices}", *CHEAP]
    own = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in ours]
    names = {flag.split("=")[0] for flag in ours}
    return " ".join([*ours, *(flag for flag in own if flag.split("=")[0] not in names)])


def folder() -> pathlib.Path:
    """A folder for this JAX, these flags and this kind of processor: what it holds can be run."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    told = [*CHEAP, platform.machine(), platform.processor(), features]
    key = hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
    return _root() / f"jaxlib-{JAXLIB}-{key}"


def _root() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "lsg_flax_tests"


def set_up(devices: int) -> None:
    """Sets the environment of this process and of those that it starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = xla_flags(devices)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder()))
    # Small programs too: there are thousands, and loading one takes a tenth of compiling it.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def prune() -> None:
    """Removes the oldest programs of our own folder where they take more than LIMIT."""
    found = [(file.stat(), file) for file in _root().rglob("*-cache")]
    size = sum(stat.st_size for stat, _ in found)
    for stat, file in sorted(found, key=lambda pair: pair[0].st_mtime):
        if size <= LIMIT:
            return
        file.unlink(missing_ok=True)
        size -= stat.st_size


# A test may start a process with another number, which imports this module again.
_given = re.search(r"device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
set_up(devices=int(_given[1]) if _given else 8)
