"""Makes a plan in this process: compiles the program and reads the compiler's output."""

import dataclasses
import re
import time
from typing import Any

import jax

from lsg_flax import sharding
from lsg_flax.chips import Gpu, Topology, Tpu, parse_topology
from lsg_flax.planning.hlo import ProgramReport, read_loop, read_program
from lsg_flax.planning.program import planned_model, sharded_program
from lsg_flax.planning.settings import ChipMemory, GenerationPlan, Plan, PlanSettings
from lsg_flax.topologies import capacity_of, devices_of, memory_share


def compile_plan(settings: PlanSettings) -> Plan:
    """Makes a plan in this process, whose environment must be that of `topologies.environment_for`.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `plan`.
    """
    topology = parse_topology(settings.topology)
    mesh = sharding.make_mesh(
        **{"data": None} | settings.mesh,  # pyright: ignore[reportArgumentType]
        devices=devices_of(topology),
    )
    model, settings, notes = planned_model(settings)
    settings = dataclasses.replace(settings, mesh=dict(mesh.shape))
    planned = sharded_program(model, settings, mesh)
    settings, memory = planned.settings, planned.memory
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = planned.function.lower(*planned.arguments)
    try:
        with jax.set_mesh(mesh):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said, seconds = str(error), time.perf_counter() - start
        needed, capacity = out_of_memory(said)  # raises if it is another error
        return Plan(settings, notes, memory, capacity, needed, False, said, None, seconds, {})
    seconds = time.perf_counter() - start
    memory = _measured(memory, compiled.memory_analysis(), topology)
    room = capacity_of(topology)
    fits = room is None or memory.total <= room  # for GPUs XLA accepts programs of any size
    if topology.chip and isinstance(topology.chip.compiler, Gpu):
        notes += (
            f"JAX takes {memory_share():.0%} of a GPU's memory, unless XLA_CLIENT_MEM_FRACTION "
            "says otherwise",
        )
    text, generation = compiled.as_text() or "", None
    if planned.reads is None:
        program = read_program(text)
    else:
        prefill, program = read_loop(text)
        generation = GenerationPlan(planned.reads, prefill, _times(topology, prefill))
    times, needed = _times(topology, program), memory.total
    return Plan(
        *(settings, notes, memory, room, needed, fits, None, program, seconds, times, generation)
    )


def _measured(memory: ChipMemory, stats: Any, topology: Topology) -> ChipMemory:
    known = memory.parameters + memory.optimizer + memory.batch
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # For a TPU the temporaries at the program's peak: XLA accepts or refuses by this number, and
    # the sum of all temporaries would count memory that is reused. The temporaries of a CPU or a
    # GPU are one allocation, which includes reuse; a CPU's peak leaves them out.
    peak = stats.peak_memory_in_bytes - stats.argument_size_in_bytes - outputs
    on_tpu = topology.chip and isinstance(topology.chip.compiler, Tpu)
    return dataclasses.replace(
        memory,
        outputs=outputs,
        temporaries=peak if on_tpu else stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        padding=max(stats.argument_size_in_bytes - known, 0),
    )


def out_of_memory(message: str) -> tuple[int, int]:
    """Reads the bytes needed and available from XLA's refusal of a program.

    Raises:
        RuntimeError: if the message is another error.
    """
    number = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({number}\) exceeds available HBM \({number}\)", message) or re.search(
        rf"Used {number} of {number} hbm", message
    )
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise RuntimeError(f"the compiler refused this program: {message[:2000]}")
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, available = (float(found[i]) * units[found[i + 1]] for i in (1, 3))
    return int(needed), int(available)


def _times(topology: Topology, program: ProgramReport) -> dict[str, float]:
    chip = topology.chip
    if chip is None:
        return {}
    times = {
        "compute": program.flops / chip.flops,
        "memory": program.bytes / chip.bandwidth,
        "communication": sum(c.wire_bytes for c in program.collectives) / chip.links,
    }
    if isinstance(chip.compiler, Tpu) and program.cycles:
        times["compiler"] = program.cycles / chip.compiler.clock
    return times
