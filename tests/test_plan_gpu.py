"""Plans for GPUs that are not there: what is read of their programs, what they are told, errors."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from lsg_flax import chips, cli, topologies
from lsg_flax.planning import PlanSettings, custom_calls, plan
from lsg_flax.planning.hlo import read_program
from lsg_flax.training.flops import peak_flops

TINY = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPUS = [name for name, chip in chips.CHIPS.items() if isinstance(chip.compiler, chips.Gpu)]


def tiny_plan(folder, **changes) -> PlanSettings:
    file = folder / "config.json"
    file.write_text(json.dumps(TINY))
    given = {"source": str(file), "topology": "h100:8", "task": "sequence_classification"}
    given |= {"max_length": 128, "mode": "inference", "attention": "full"}
    return PlanSettings(**given | changes)


def program(*calls: str) -> str:
    """A program of these instructions, in a loop of four rounds."""
    lines = "\n".join(f"  {call}" for call in calls)
    return f"""HloModule m, is_scheduled=true
%cond (c: (s32[])) -> pred[] {{
  %limit = s32[] constant(4)
  %c = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}
%body (b: (s32[])) -> (s32[]) {{
  %b = (s32[]) parameter(0)
  %x = bf16[6,100,64]{{2,1,0}} get-tuple-element(%b), index=0
  %w = bf16[6,64,32]{{2,1,0}} get-tuple-element(%b), index=0
  %bias = f32[6,100,32]{{2,1,0}} get-tuple-element(%b), index=0
{lines}
  ROOT %t = (s32[]) tuple(%b)
}}
ENTRY %main (p: s32[]) -> (s32[]) {{
  %p = s32[] parameter(0)
  %start = (s32[]) tuple(%p)
  ROOT %loop = (s32[]) while(%start), condition=%cond, body=%body
}}
"""


def test_products_of_cublas_count_without_their_workspace():
    """6 products of [100, 64] and [64, 32], added to what is there (recorded lines)."""
    axes = '"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]'
    axes += ',"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]'
    config = f'backend_config={{"gemm_backend_config":{{"beta":1,"dot_dimension_numbers":{{{axes}}}'
    call = (
        "%m = (f32[6,100,32]{2,1,0}, s8[4194304]{0}) custom-call(%x, %w, %bias), "
        f'custom_call_target="__cublas$lt$matmul", {config}}}}}'
    )
    report = read_program(program(call))
    assert report.flops == 4 * 2 * 6 * 100 * 64 * 32
    operands = 2 * 6 * (100 * 64 + 64 * 32)
    assert report.bytes == 4 * (operands + 2 * 4 * 6 * 100 * 32)
    assert report.kernels == report.unknown_kernels == 0


def kernel(target: str, config: str = "") -> str:
    return (
        f'%k = bf16[6,100,64]{{2,1,0}} custom-call(%x), custom_call_target="{target}", '
        f'metadata={{op_name="jit(f)/layers/transpose(jvp(some_kernel))/pallas_call"}}{config}'
    )


@pytest.mark.parametrize("metadata", ["", ', frontend_attributes={kernel_metadata={\n"a":"b"\n}}'])
def test_a_kernel_has_the_work_that_it_declares(metadata):
    declared = '{"cost_estimate":{"flops":"1230","transcendentals":"7","bytes_accessed":"456"}}'
    text = program(kernel("tpu_custom_call", f"{metadata}, backend_config={declared}"))
    report = read_program(text)
    assert (report.flops, report.bytes) == (4 * 1230, 4 * 456)
    assert (report.kernel_flops, report.kernel_bytes) == (4 * 1230, 4 * 456)
    assert (report.kernels, report.unknown_kernels) == (4, 0)


@pytest.mark.parametrize("target", ["__gpu$xla.gpu.triton", "mosaic_gpu_v2", "tpu_custom_call"])
def test_a_kernel_of_unknown_work_is_told_and_one_with_a_formula_is_counted(target, monkeypatch):
    text = program(kernel(target))
    report = read_program(text)
    array = 2 * 6 * 100 * 64
    assert (report.flops, report.bytes) == (0, 4 * 2 * array)
    assert (report.kernels, report.unknown_kernels) == (4, 4)
    assert report.kernel_flops == report.kernel_bytes == 0

    def formula(call: custom_calls.KernelCall) -> custom_calls.KernelWork:
        return custom_calls.KernelWork(5.0 * call.operands[0].dims[1], call.results[0].bytes)

    monkeypatch.setitem(custom_calls.FORMULAS, "some_kernel", formula)
    report = read_program(text)
    assert (report.flops, report.bytes) == (4 * 500, 4 * array)
    assert (report.kernels, report.unknown_kernels) == (4, 0)


def test_sorts_gathers_and_scatters_are_counted():
    report = read_program(
        program(
            "%s = bf16[6,100,64]{2,1,0} sort(%x), dimensions={2}, to_apply=%less",
            "%g = bf16[6,64]{1,0} gather(%x, %bias), slice_sizes={1,1,64}",
            '%k = (f32[6,4]{1,0}, s32[6,4]{1,0}) custom-call(%bias), custom_call_target="TopK"',
        )
    )
    assert (report.sorts, report.gathers, report.scatters) == (8, 4, 0)


@pytest.mark.parametrize("name", ["h300:8", "h100:9", "h100:2x4", "h100", "l4:0"])
def test_gpus_that_are_not_known_raise(name):
    with pytest.raises(ValueError, match=f"'{name}' is unknown; .*'h100:8'.* 8 GPUs of one host"):
        chips.parse_topology(name)


@pytest.mark.parametrize("parent", [None, True])
def test_a_missing_plugin_is_asked_for(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: parent if name == "jax_plugins" else None
    )
    with pytest.raises(ImportError, match=r"h100:8 needs JAX's CUDA plugin.*jax-cuda12-pjrt=="):
        plan(tiny_plan(tmp_path))


def test_what_fits_a_gpu_is_what_jax_takes_of_it(monkeypatch):
    topology = chips.parse_topology("h100:8")
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    whole = chips.CHIPS["h100"].memory
    assert topologies.capacity_of(topology) == int(0.75 * whole)
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, ".9")
            assert topologies.capacity_of(topology) == int(0.9 * whole)
            for wrong in ("most", "1.5", "0"):
                patch.setenv(name, wrong)
                with pytest.raises(ValueError, match=f"{name}='{wrong}' in the environment"):
                    topologies.capacity_of(topology)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", "h200"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
    ],
)
def test_the_peak_of_a_device(kind, chip):
    assert peak_flops(kind) == chips.CHIPS[chip].flops
    assert peak_flops("NVIDIA L40S") is None


needs_plugin = pytest.mark.skipif(
    not topologies.has_cuda_plugin(), reason="JAX's CUDA plugin is not installed: make gpu-plan"
)

COMPILE = """
import sys
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from lsg_flax import chips, topologies
for name in sys.argv[1:]:
    device = topologies.devices_of(chips.parse_topology(f"{name}:1"))[0]
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    assert "__cublas$" in jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile().as_text()
    print(device.device_kind)
"""


@pytest.mark.slow
@needs_plugin
def test_the_compiler_knows_each_gpu():
    environment = topologies.environment_for(chips.parse_topology("h100:1"))
    command = [sys.executable, "-c", COMPILE, *GPUS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [chips.CHIPS[name].compiler.name for name in GPUS]


@pytest.mark.slow
@needs_plugin
def test_a_real_gpu_compilation_of_inference(tmp_path, monkeypatch):
    """FLOPs are those of the model: one row of 128 tokens on each GPU."""
    found = plan(tiny_plan(tmp_path))
    tokens, width, mlp, layers = 128, 128, 256, 2
    layer = 4 * width * width + 2 * width * mlp + 2 * tokens * width
    head = width * width + width * 2  # the pooler and two labels, of one token
    assert found.fits and found.program.flops == pytest.approx(
        2 * (layers * tokens * layer + head), rel=0.002
    )  # rows of the head are filled up to eight
    assert found.program.unknown_kernels == found.program.unknown_loops == 0
    assert found.capacity < chips.CHIPS["h100"].memory and found.refusal is None
    assert found.times.keys() == {"compute", "memory", "communication"}
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.00001")  # where XLA still takes it
    full = plan(tiny_plan(tmp_path))
    assert not full.fits and full.program == found.program
    assert full.needed == found.needed > full.capacity


@pytest.mark.slow
@needs_plugin
def test_a_real_gpu_compilation_of_a_training_step(tmp_path, capsys):
    """Gradients of the layers' kernels, and of others, are summed over the GPUs."""
    source, written = tiny_plan(tmp_path).source, tmp_path / "plan.json"
    flags = "--topology h100:4 --batch-size 8 --max-length 256 --block-size 64"
    command = ["plan", source, "--task", "sequence_classification", *flags.split()]
    assert cli.main([*command, "--sparse-block-size", "64", "--json", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "fits: " in shown and "JAX takes 75% of a GPU's memory" in shown
    found = json.loads(written.read_text())["shown"][0]
    summed = sum(c["runs"] * c["bytes"] for c in found["program"]["collectives"] if c["group"] == 4)
    width, mlp, layers = (
        TINY[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    assert summed >= 2 * layers * (4 * width**2 + 2 * width * mlp)  # in bfloat16
    assert found["memory"]["temporaries"] > 0 and found["program"]["flops"] > 0


FUSED = ["kernels alone", "xla", "norm", "pooling, causal", "first token, dropout"]
FUSED += ["float32, width 128", "blocks of 256"]


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize(("gpu", "names"), [("h100", FUSED), ("a100", FUSED[:3])])
def test_a_real_gpu_compilation_of_the_attention_kernels(gpu, names):
    """Forward and backward, a row on each of two GPUs, whose work is counted; without a selection
    each array is read by the forward kernel, and by those of queries and keys of the backward."""
    environment = topologies.environment_for(chips.parse_topology(f"{gpu}:2"))
    file = pathlib.Path(__file__).parent / "gpu_attention.py"
    command = [sys.executable, str(file), f"{gpu}:2", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in names:
        row = found[name]
        assert not row["sorts"] + row["gathers"] + row["scatters"], name
        assert not row["collectives"], name
        assert (row["kernels"], row["unknown_kernels"]) == (0 if name == "xla" else 5, 0), name
    alone, norm, xla = (found[name] for name in [*FUSED[:1], "norm", "xla"])
    tokens, heads, width, seen = 1024, 4, 64, 3 * 128 + 2 * 128 + 1
    assert alone["flops"] == (2 + 3 + 4) * 2 * tokens * heads * width * seen
    array = 2 * tokens * heads * width  # bytes
    assert alone["bytes"] < 26 * array and alone["temporaries"] < array / 10
    assert norm["bytes"] < 0.25 * xla["bytes"]
    assert norm["temporaries"] < 0.3 * xla["temporaries"]
