"""The plan: what is read from a compiled program, the settings, the search, the command."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from jax.sharding import NamedSharding, PartitionSpec
from tiny_config import spelled

from lsg_flax import chips, cli, sharding, topologies
from lsg_flax.models import FAMILIES, TASKS
from lsg_flax.patterns import SPARSITY_TYPES
from lsg_flax.planning import plan
from lsg_flax.planning import search as plan_search
from lsg_flax.planning.compile import compile_plan, out_of_memory
from lsg_flax.planning.hlo import Collective, read_loop, read_program
from lsg_flax.planning.program import abstract_batch, planned_model, sharded_program
from lsg_flax.planning.roofline import draw_roofline, roofline_figure
from lsg_flax.planning.settings import (
    ChipMemory,
    GenerationPlan,
    Plan,
    PlanSettings,
    StepReads,
)
from lsg_flax.training import losses

TINY = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
LSG = {"block_size": 16, "sparse_block_size": 16}


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def settings_of(source, **changes) -> PlanSettings:
    given = {
        "source": source,
        "topology": "cpu:8",
        "task": "sequence_classification",
        "max_length": 128,
        "lsg": LSG,
        "dtype": "float32",
    }
    return PlanSettings(**given | changes)


# ------------------------------------------------------------------------- reading a program


def compiled_text(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_flops_count_every_round_of_nested_loops():
    weights = jnp.ones((3, 5, 24, 24))

    def inner(x, w):
        return jnp.tanh(x @ w), None

    def run(x, weights):
        return jax.lax.scan(lambda x, w: jax.lax.scan(inner, x, w), x, weights)[0]

    report = read_program(compiled_text(run, jnp.ones((10, 24)), weights))
    assert report.flops == 2 * 10 * 24 * 24 * 15
    assert report.unknown_loops == 0 and report.collectives == ()


def test_a_loop_of_unknown_length_is_named():
    def run(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100.0, lambda x: jnp.tanh(x @ w), x)

    report = read_program(compiled_text(run, jnp.ones((8, 8)), jnp.ones((8, 8))))
    assert report.unknown_loops == 1 and report.flops == 2 * 8**3


def test_bytes_of_slices_are_not_those_of_the_whole():
    table = jnp.ones((100, 1000))

    def run(table):
        def add(total, row):
            return total + row, None

        return jax.lax.scan(add, jnp.zeros(1000), table)[0]

    moved = read_program(compiled_text(run, table)).bytes
    assert 4 * 100 * 1000 <= moved < 6 * 4 * 100 * 1000  # not 100 x the table


@pytest.mark.parametrize(
    ("spec", "kind", "size", "runs"),
    [
        (PartitionSpec(None, "data"), "all-reduce", 4 * 6 * 7, 1),
        (PartitionSpec("data"), "all-gather", 4 * 8 * 6, 1),
    ],
)
def test_collectives_of_a_sharded_product(spec, kind, size, runs):
    """[6, 8] @ [8, 7] with the contracted axis cut is summed; cut rows are gathered."""
    mesh = sharding.make_mesh()
    whole = NamedSharding(mesh, PartitionSpec())
    shape = (6, 8) if kind == "all-reduce" else (8, 6)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    other = PartitionSpec("data") if kind == "all-reduce" else PartitionSpec()
    w = jax.ShapeDtypeStruct((shape[1], 7), jnp.float32, sharding=NamedSharding(mesh, other))

    def run(x, w):
        return x @ w if kind == "all-reduce" else jax.lax.with_sharding_constraint(x, whole)

    text = jax.jit(run, out_shardings=whole).lower(x, w).compile().as_text()
    assert read_program(text).collectives == (Collective(kind, runs, size, 8),)


def test_collectives_in_a_loop_count_every_round():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def shift(x):
        def once(x, _):
            return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

        return jax.lax.psum(jax.lax.scan(once, x, None, length=5)[0], "data")

    spec = PartitionSpec("fsdp")
    run = jax.shard_map(shift, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((12, 3), jnp.float32, sharding=NamedSharding(mesh, spec))
    found = {c.kind: c for c in read_program(compiled_text(run, x)).collectives}
    permute, reduce = found["collective-permute"], found["all-reduce"]
    assert (permute.runs, permute.bytes) == (5, 4 * 3 * 3)
    assert (reduce.runs, reduce.bytes, reduce.group) == (1, 4 * 3 * 3, 2)
    assert permute.wire_bytes == 5 * 36 and reduce.wire_bytes == 36


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}", 3),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_0'}", 2),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4),
    ],
)
def test_every_way_to_write_groups(written, group):
    text = f"""HloModule m
ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, {written}, to_apply=%add
}}
"""
    assert read_program(text).collectives == (Collective("all-reduce", 1, 16, group),)


def test_a_tpu_program_counts_dilated_batches_cycles_and_on_chip_memory_right():
    """12 x 8 products of [128, 64] and [64, 640] as TPUs compile them (recorded lines): only pairs
    that meet an element count; S(1) is not main memory."""
    buffer = 'custom-call(), custom_call_target="AllocateBuffer"'
    window = "window={size=12x8 stride=11x7 lhs_dilate=12x8}, dim_labels=01fb_01io->01bf"
    query = "bf16[12,8,64,128]{3,2,1,0:T(8,128)(2,1)S(1)}"
    key = "bf16[12,8,64,640]{3,2,1,0:T(8,128)(2,1)}"
    scores = "f32[12,8,128,640]{3,2,1,0:T(8,128)S(1)}"
    carried = "(s32[]{:T(128)}, f32[2]{0:T(128)})"
    cycles = 'backend_config={"window_config":{"estimated_cycles":"1826"}}'
    text = f"""HloModule m, is_scheduled=true
%cond (c: (s32[], f32[2])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(4)
  %c = {carried} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %limit), direction=LT
}}
%fused (a: bf16[12,8,64,128], b: bf16[12,8,64,640]) -> f32[12,8,128,640] {{
  %a = {query} parameter(0)
  %b = {key} parameter(1)
  ROOT %conv = {scores} convolution(%a, %b), {window}
}}
%body (c.1: (s32[], f32[2])) -> (s32[], f32[2]) {{
  %c.1 = {carried} parameter(0)
  %x = {query} {buffer}
  %y = {key} {buffer}
  %f = {scores} fusion(%x, %y), kind=kOutput, calls=%fused, {cycles}
  ROOT %t = {carried} tuple(%c.1, %c.1)
}}
ENTRY %main (p: f32[2]) -> f32[2] {{
  %p = f32[2]{{0:T(128)}} parameter(0)
  %zero = s32[]{{:T(128)}} constant(0)
  %start = {carried} tuple(%zero, %p)
  %w = {carried} while(%start), condition=%cond, body=%body
  ROOT %out = f32[2]{{0:T(128)}} get-tuple-element(%w), index=1
}}
"""
    report = read_program(text)
    assert report.flops == 4 * 2 * 96 * 128 * 640 * 64
    assert report.cycles == 4 * 1826 and report.unknown_loops == 0
    assert report.bytes == 4 * 2 * 96 * 64 * 640  # b alone


def test_a_fusion_may_make_several_arrays_without_a_tuple():
    """Of a reduction of pairs, as TPUs compile an argmin (recorded lines); S(1) is not main
    memory."""
    kept = "f32[8,4]{0,1:T(4,128)}"
    numbers = "s32[8,4]{0,1:T(4,128)}"
    pair = "(s32[8]{0:T(128)}, s32[8]{0:T(128)S(1)})"
    text = f"""HloModule m, is_scheduled=true
%pick (a: s32[], b: s32[], c: s32[], d: s32[]) -> (s32[], s32[]) {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  %c = s32[] parameter(2)
  %d = s32[] parameter(3)
  ROOT %t = (s32[], s32[]) tuple(%a, %b)
}}
%fused (p: f32[8,4]) -> (s32[8], s32[8]) {{
  %p = {kept} parameter(0)
  %ages = {numbers} convert(%p)
  %places = {numbers} iota(), iota_dimension=1
  %most = s32[]{{:T(128)}} constant(2147483647)
  %zero = s32[]{{:T(128)}} constant(0)
  ROOT %r = {pair} reduce(%ages, %places, %most, %zero), dimensions={{1}}, to_apply=%pick
}}
ENTRY %main (p: f32[8,4]) -> s32[8] {{
  %p = {kept} parameter(0)
  %f = {pair} fusion(%p), kind=kLoop, calls=%fused
  ROOT %out = s32[8]{{0:T(128)}} get-tuple-element(%f), index=0
}}
"""
    assert read_program(text).bytes == 4 * 8 * 4 + 4 * 8  # the operand, and one of both results


def test_a_loop_of_unknown_length_is_read_apart():
    """Four products before it, and three in each round."""

    def run(x, w):
        def products(x, count):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=count)[0]

        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: products(x, 3), products(x, 4))

    text = compiled_text(run, jnp.ones((8, 8)), jnp.ones((8, 8)))
    once, a_round = read_loop(text)
    assert (once.flops, a_round.flops) == (4 * 2 * 8**3, 3 * 2 * 8**3)
    assert (once.unknown_loops, a_round.unknown_loops) == (0, 0)
    whole = read_program(text)
    assert once.bytes + a_round.bytes == whole.bytes and whole.unknown_loops == 1
    with pytest.raises(ValueError, match="has no loop with an unknown number of rounds"):
        read_loop(compiled_text(jnp.tanh, jnp.ones(8)))


def test_text_that_is_no_program_raises():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("HloModule m\n")


# ------------------------------------------------------------------------- plans


@pytest.mark.slow
def test_a_plan_of_a_training_step(source):
    found = compile_plan(settings_of(source, mesh={"data": 4, "fsdp": 2}, batch_size=8))
    half, whole = (compile_plan_memory(source, fsdp=n) for n in (2, 1))
    assert found.memory.parameters == half < whole
    # AdamW keeps two moments of every parameter and two counters
    assert 0 < found.memory.optimizer - 2 * found.memory.parameters <= 16
    # a row per chip: 128 ids, masks and segments, and a label
    assert found.memory.batch == 4 * (3 * 128 + 1)
    assert found.fits and found.capacity is None and found.roofline is None
    assert found.needed == found.memory.total
    # activations too: at least what each layer keeps of its row for the backward pass, in float32
    model, _, _ = planned_model(settings_of(source))
    kept = model.config.num_hidden_layers * model.config.intermediate_size
    assert found.memory.temporaries > 4 * 128 * kept
    assert {"all-reduce", "all-gather"} <= {c.kind for c in found.program.collectives}
    assert found.settings.mesh == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert "converted to 128 tokens; the checkpoint reads 64" in " ".join(found.notes)
    assert Plan.from_json(found.to_json()) == found


def test_a_plan_counts_adapters_and_averages(source):
    """Adapters of rank 4 at two projections of each layer; pooler and head learn with them."""
    adapters = 2 * 4 * (16 + 16 + 16 + 32)
    learns = adapters + 16 * 16 + 16 + 16 * 2 + 2
    lora = {"lora_r": 4, "lora_target_modules": ("query", "mlp_up")}

    def memory(**changes) -> ChipMemory:
        model, settings, _ = planned_model(settings_of(source, **changes))
        return sharded_program(model, settings, sharding.make_mesh(data=8)).memory

    whole, averaged, added = memory(), memory(ema_decay=0.9), memory(ema_decay=0.9, **lora)
    assert added.parameters - whole.parameters == 4 * (adapters + 1)  # and their scale
    assert added.optimizer == 3 * 4 * learns + 3 * 4  # moments, average; three counts
    assert averaged.optimizer - whole.optimizer == whole.parameters + 4


def compile_plan_memory(source, *, fsdp: int) -> int:
    """Bytes of parameters per chip, from real arrays placed on a mesh."""
    model, _, _ = planned_model(settings_of(source))
    mesh = sharding.make_mesh(fsdp=fsdp)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    placed = sharding.shard(params, mesh)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))


def test_matrix_flops_of_inference_are_those_of_the_model(source):
    """Full attention, one row per chip: projections, scores and contexts, pooler-free head."""
    found = compile_plan(settings_of(source, mode="inference", attention="full", lsg={}))
    tokens, width, mlp, layers = 128, 16, 32, 2
    layer = 4 * width * width + 2 * width * mlp + 2 * tokens * width
    head = width * width + width * 2  # the pooler and two labels, of one token
    assert found.program.flops == 2 * (layers * tokens * layer + head)
    assert found.memory.optimizer == 0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("task", "values"),
    [
        *((task, {}) for task in FAMILIES["bert"].heads if TASKS[task].targets),
        ("pretraining", {"model_type": "electra"}),
        ("sequence_classification", {"problem_type": "multi_label_classification"}),
        ("sequence_classification", {"num_labels": 1}),
    ],
)
def test_batches_are_what_the_losses_take(tmp_path, task, values, accumulate):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | values))
    settings = settings_of(str(file), task=task, accumulate=accumulate)
    model, settings, _ = planned_model(settings)
    batch = abstract_batch(model, settings)
    if accumulate > 1:
        assert {array.shape[0] for array in batch.values()} == {accumulate}
        batch = {n: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for n, a in batch.items()}
    assert {array.shape[0] for array in batch.values()} == {8 // accumulate}
    params = model.abstract_params()
    loss, _ = jax.eval_shape(lambda p, b: losses.loss_fn(model, p, b), params, batch)
    assert loss.shape == ()


# ------------------------------------------------------------------------- generation

SIZES = tiny_config.SIZES  # two layers of width 12, feed-forward 16, 23 words
WIDTH, MLP, VOCABULARY, LAYERS = 12, 16, 23, 2
TOKENS = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
CLASS = {"architectures": ["BartForConditionalGeneration"]}


@pytest.fixture
def bart(tmp_path):
    file = tmp_path / "bart.json"
    file.write_text(json.dumps(spelled("bart", SIZES) | TOKENS | CLASS))
    return str(file)


def written_by(source, **changes) -> PlanSettings:
    given = {"mode": "generate", "task": None, "max_length": 40, "batch_size": 8}
    given |= {"max_new_tokens": 9, "num_beams": 3, "lsg": {"block_size": 4, "sparse_block_size": 4}}
    return settings_of(source, **given | changes)


def caches_of(beams, slots, states):
    """Bytes per row of keys, values and masks in float32: of all beams, and of the encoder."""
    token = LAYERS * (2 * 4 * WIDTH + 1)
    return beams * slots * token, states * token


def assert_no_cache_leaves(found: Plan):
    """Texts do not meet: what is exchanged is smaller than the smallest cache of one layer."""
    exchanged = [*found.program.collectives, *found.generation.prefill.collectives]
    reads = found.generation.reads
    assert {"all-reduce"} <= {c.kind for c in found.program.collectives}  # whether all have ended
    assert max(c.bytes for c in exchanged) < min(reads.self_cache, reads.cross_cache) / LAYERS


@pytest.mark.slow
def test_a_plan_of_generation(bart):
    """Two rows of three beams on each of four devices: formulas for bytes and FLOPs of a step."""
    found = compile_plan(written_by(bart, topology="cpu:4"))
    rows, beams, new, states = 2, 3, 9, 41  # the encoder's tokens and a global
    reads = found.generation.reads
    own, cross = caches_of(beams, new, states)
    assert (reads.self_cache, reads.cross_cache) == (rows * own, rows * cross)
    # a decoder's layer: self-attention, the query and output of cross-attention, feed-forward
    kernels = LAYERS * (6 * WIDTH**2 + 2 * WIDTH * MLP)
    vectors = LAYERS * (7 * WIDTH + MLP + 3 * 2 * WIDTH) + 2 * WIDTH + VOCABULARY
    assert reads.weights == 4 * (kernels + vectors + VOCABULARY * WIDTH)
    attention = LAYERS * 2 * WIDTH * (new + states)  # a token's own key is a sum, no product
    of_token = 2 * (kernels + VOCABULARY * WIDTH + attention)
    assert found.program.flops == rows * beams * of_token
    assert found.program.unknown_loops == found.generation.prefill.unknown_loops == 0
    assert_no_cache_leaves(found)
    assert reads.total < found.program.bytes < found.generation.prefill.bytes
    assert found.memory.temporaries > reads.self_cache + reads.cross_cache
    assert Plan.from_json(found.to_json()) == found
    assert (found.settings.task, found.settings.num_beams) == ("conditional_generation", 3)


@pytest.mark.slow
def test_a_plan_of_generation_by_a_decoder_alone(source):
    """One row on each device: a global and 128 slots of keys, values and a mask, 64 representatives
    with a mask for each of two heads, and a query of the width."""
    found = compile_plan(settings_of(source, task="causal_lm", mode="generate", max_new_tokens=20))
    reads, width = found.generation.reads, 16
    tokens, chosen = 129 * (2 * 4 * width + 1), 64 * (2 * 4 * width + 2)
    assert reads.self_cache == 2 * (tokens + chosen + 4 * width)
    assert reads.cross_cache == 0 and found.settings.num_beams == 1
    assert 0 < found.program.flops < found.generation.prefill.flops


@pytest.mark.slow
def test_what_a_step_reads_on_a_mesh(bart):
    """Fully sharded weights are gathered, heads are cut, and along the sequence the encoder's."""
    model, settings, _ = planned_model(written_by(bart, topology="cpu:2"))

    def reads(**axes):
        mesh = sharding.make_mesh(**axes, devices=jax.devices()[: 2 if axes else 1])
        return sharded_program(model, settings, mesh).reads

    whole = reads()
    for axis, cut in (("fsdp", (1, 2, 2)), ("tensor", (2, 2, 2)), ("sequence", (1, 1, 2))):
        expected = [
            size / n for size, n in zip(dataclasses.astuple(whole), cut, strict=True)
        ]  # but for masks and odd sizes
        assert dataclasses.astuple(reads(**{axis: 2})) == pytest.approx(expected, rel=0.2), axis


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_a_decoder_has_a_length_of_its_own(bart, mode):
    """Rows of 40 tokens, and of 6 that are written; by default 128."""
    settings = written_by(bart, mode=mode, max_new_tokens=None, num_beams=None)
    assert planned_model(settings)[1].max_target_length == 128
    settings = dataclasses.replace(settings, max_target_length=6)
    model, settings, _ = planned_model(settings)
    shapes = {name: array.shape for name, array in abstract_batch(model, settings).items()}
    written = "labels" if mode == "train" else "decoder_input_ids"
    assert shapes == {"input_ids": (8, 40), "attention_mask": (8, 40), written: (8, 6)}
    planned = sharded_program(model, settings, sharding.make_mesh(data=8))
    assert planned.memory.batch == 4 * (2 * 40 + 6)
    jax.eval_shape(planned.function, *planned.arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"topology": "v9:2x2"}, "'v9:2x2' is unknown"),
        ({"topology": "v5e:2x2x2"}, "'v5e:2x2x2' is unknown"),
        ({"topology": "cpu:64"}, "needs 64 CPU devices"),
        (
            {"topology": "cpu:513"},
            "'cpu:513' is unknown; .* at most 16,384 TPU chips, 8 GPUs .* or 512 CPU devices",
        ),
        ({"mesh": {"data": 3}}, "does not fit 8 devices"),
        ({"batch_size": 12}, "12 rows, which data=8 cannot split evenly"),
        ({"task": "base"}, "task='base' has no loss"),
        ({"max_length": 0}, "must be at least 1"),
        ({"lsg": {"block_size": 15}}, "not divisible by"),
        ({"mode": "generate"}, "generates texts, but task='sequence_classification' does not"),
        (
            {"attention": "local", "lsg": {}},
            "attention='local': a bert model has no such attention",
        ),
        ({"max_target_length": 8}, "max_target_length=8 is for an encoder-decoder's task"),
        (
            {"mode": "generate", "task": "causal_lm", "max_new_tokens": 128},
            "max_new_tokens=128 leaves no room for a prompt in max_length=128",
        ),
    ],
)
def test_settings_that_do_not_fit_raise(source, changes, says):
    with pytest.raises(ValueError, match=says):
        compile_plan(settings_of(source, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mesh": {"rows": 2}}, "unknown mesh axes"),
        ({"accumulate": 3}, "divisible by accumulate=3"),
        ({"mode": "inference", "remat": "full"}, "inference has no backward pass"),
        ({"mode": "generate", "accumulate": 2}, "accumulate=2 is for mode='train', not 'generate'"),
        ({"num_beams": 4}, "num_beams=4 is for mode='generate', not 'train'"),
        ({"mode": "generate", "max_target_length": 9}, "for mode='train' or mode='inference'"),
        ({"mode": "generate", "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"attention": "full"}, "are LSG settings"),
        ({"mode": "inference", "ema_decay": 0.9}, "ema_decay=0.9 is for mode='train'"),
        ({"lora_target_modules": ("query",)}, r"lora_target_modules=.* need lora_r"),
    ],
)
def test_settings_that_cannot_be_raise_at_once(source, changes, says):
    with pytest.raises(ValueError, match=says):
        settings_of(source, **changes)


LOCAL = {
    "model_type": "local-transformer",
    **{"num_tokens": 64, "max_seq_len": 64, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8},
    "local_attn_window_size": 16,
}


@pytest.mark.parametrize(
    "changes", [{}, {"mode": "generate", "max_new_tokens": 8, "mesh": {"data": 8}}], ids=str
)
def test_a_local_transformer_is_planned_as_it_is(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps(LOCAL))
    usual = {"task": None, "max_length": None, "lsg": {}, "mesh": {"data": 4, "sequence": 2}}
    found = compile_plan(settings_of(str(tmp_path), **usual | changes))
    assert (found.settings.attention, found.settings.max_length) == ("local", 64)
    assert (found.settings.task, found.notes) == ("causal_lm", ())
    again = Plan.from_json(found.to_json()).settings
    assert again == found.settings and planned_model(again)[0].config.attention == "local"


@pytest.mark.parametrize(
    ("fields", "changes", "says"),
    [
        ({}, {"max_length": 65}, "local attention and 64 positions, .* leave max_length=65 out"),
        ({}, {"lsg": LSG}, "leave block_size, sparse_block_size out"),
        ({}, {"attention": "full"}, "leave attention='full' out"),
        ({"num_tokens": None}, {}, "num_tokens=None"),
    ],
)
def test_what_a_local_transformer_is_not_planned_as(tmp_path, fields, changes, says):
    (tmp_path / "config.json").write_text(json.dumps(LOCAL | fields))
    usual = {"task": None, "max_length": None, "lsg": {}}
    with pytest.raises(ValueError, match=says):
        planned_model(settings_of(str(tmp_path), **usual | changes))


def test_a_missing_libtpu_is_asked_for(source, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'lsg-flax\[plan\]'"):
        plan(settings_of(source, topology="v5e:2x4"))


def test_a_crash_of_the_compiler_is_told(source, monkeypatch):
    def crash(*_, **__):
        return subprocess.CompletedProcess([], -11, stdout="", stderr="Check failed: x")

    monkeypatch.setattr(subprocess, "run", crash)
    with pytest.raises(RuntimeError, match="exit code -11: Check failed: x"):
        plan(settings_of(source))


# As libtpu 0.0.42.1 said of a training step for v5e:2x4.
REFUSAL = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(85.64G) exceeds available HBM (15.75G)."
)


def test_a_refusal_is_read():
    needed, available = out_of_memory(REFUSAL)
    assert needed == int(85.64 * 2**30) and available == int(15.75 * 2**30)
    assert available == chips.CHIPS["v5e"].memory
    with pytest.raises(RuntimeError, match="Mosaic failed"):
        out_of_memory("INTERNAL: Mosaic failed to compile TPU kernel")


# ------------------------------------------------------------------------- the search


def fake_planner(fixed: float, per_row: dict[str, float], capacity: float = 100.0):
    """A chip whose memory is a straight line in the rows per chip and microbatch."""

    def planner(settings: PlanSettings) -> Plan:
        mesh = settings.mesh
        rows = settings.batch_size / settings.accumulate / plan_search.batch_shards(settings)
        own = fixed / (mesh["fsdp"] * mesh["sequence"])
        needed = own + per_row[settings.remat] * rows / mesh["sequence"]
        memory = ChipMemory(parameters=int(own), optimizer=0, batch=0)
        fits = needed <= capacity
        return Plan(settings, (), memory, int(capacity), int(needed), fits, None, None, 0.0, {})

    return planner


MESH = {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
COSTS = {"none": 9.0, "dots": 4.0, "full": 2.0}


@pytest.mark.parametrize(
    ("rows", "fixed", "costs", "expected"),
    [
        (20, 10.0, COSTS, {"remat": "dots"}),
        (40, 10.0, COSTS, {"remat": "full"}),
        (4, 150.0, COSTS, {"remat": "full", "mesh": MESH | {"data": 1, "fsdp": 8}}),
        (64, 8.0, COSTS, {"remat": "full", "accumulate": 2}),
        (512, 8.0, COSTS, {"remat": "full", "accumulate": 16}),
        (1, 8.0, dict.fromkeys(COSTS, 300.0), {"mesh": MESH | {"data": 1, "fsdp": 2}}),
    ],
)
def test_the_nearest_setting_that_fits(source, rows, fixed, costs, expected):
    planner = fake_planner(fixed, costs)
    refused = planner(settings_of(source, batch_size=8 * rows, mesh=MESH))
    assert not refused.fits
    found, tried = plan_search.nearest_that_fits(refused, planner)
    assert found is tried[-1] and found.fits and not any(p.fits for p in tried[:-1])
    for name, value in expected.items():
        if rows > 1:
            assert getattr(found.settings, name) == value
    if rows == 1:  # a single row is cut along its tokens
        assert found.settings.mesh["sequence"] == 4 and found.settings.mesh["fsdp"] == 2


def test_a_search_gives_up(source):
    planner = fake_planner(10.0, dict.fromkeys(COSTS, 1e9))
    refused = planner(settings_of(source, batch_size=8, mesh=MESH))
    found, tried = plan_search.nearest_that_fits(refused, planner)
    assert found is None and 0 < len(tried) <= 8
    assert len(plan_search.nearest_that_fits(refused, planner, max_compiles=2)[1]) == 2


@pytest.mark.parametrize("start", [1, 7, 500])
@pytest.mark.parametrize("fixed", [10.0, 91.0, 200.0])
def test_the_largest_batch_is_on_the_border(source, start, fixed):
    planner = fake_planner(fixed, COSTS)
    first = planner(settings_of(source, batch_size=8 * start, mesh=MESH))
    found, tried = plan_search.largest_batch(first, planner, max_compiles=20)
    rows = int((100 - fixed) // 9)
    if rows < 1:
        assert found is None
    else:
        assert found.settings.batch_size == 8 * rows
        assert rows + 1 in {p.settings.batch_size / 8 for p in (first, *tried)}
    assert len(tried) < 12


def test_a_cpu_has_no_batch_to_fill(source):
    settings = settings_of(source, mesh=MESH)
    unknown = dataclasses.replace(fake_planner(1.0, COSTS)(settings), capacity=None)
    with pytest.raises(ValueError, match=r"the memory of .* is unknown"):
        plan_search.largest_batch(unknown, fake_planner(1.0, COSTS))


# ------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(source, tmp_path, capsys):
    file = tmp_path / "plan.json"
    flags = "--topology cpu:4 --mode inference --batch-size 8 --mesh data=2,tensor=-1"
    lsg = "--max-length 128 --block-size 16 --sparse-block-size 16 --dtype float32"
    command = ["plan", source, "--task", "base", *flags.split(), *lsg.split()]
    assert cli.main([*command, "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "note: as converted to 128 tokens" in shown and "temporaries" in shown
    written = json.loads(file.read_text())
    assert written["shown"][0]["settings"]["mesh"]["tensor"] == 2
    assert written["shown"][0]["program"]["flops"] > 0
    assert [*tmp_path.glob(".lsg-flax*")] == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--mesh", "rows=2"], "the axes are data"),
        (["--mesh", "data:2"], "is not AXIS=N"),
        (["--remat", "some"], "invalid choice"),
    ],
)
def test_wrong_usage(source, capsys, flags, says):
    with pytest.raises(SystemExit):
        cli.main(["plan", source, "--topology", "cpu:8", "--batch-size", "8", *flags])
    assert says in capsys.readouterr().err


# ------------------------------------------------------------------------- the picture

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PICTURE = pathlib.Path("plan.png")


@pytest.fixture(scope="module")
def recorded() -> Plan:
    """RoBERTa-base for eight v5e chips, as docs/plan.md's command wrote it."""
    values = json.loads((DOCS / "roofline.json").read_text())
    return Plan.from_json(json.dumps(values["shown"][0]))


def drawn_points(figure, panel: int) -> dict[str, tuple[float, float]]:
    """What stands in a panel, by the words in front of the colon of its line in the legend."""
    lines = [
        line for line in figure.axes[panel].get_lines() if line.get_marker() not in ("", "None")
    ]
    return {
        line.get_label().split(":")[0]: tuple(line.get_xydata()[0])
        for line in lines
        if len(line.get_xydata())
    }


def test_a_plan_is_drawn_below_its_chips_roofs(recorded):
    """At FLOPs per byte and FLOP/s, by the published numbers of a v5e."""
    figure, program = roofline_figure(PICTURE, {"LSG": recorded}), recorded.program
    peak, memory, links = 197e12, 819e9, 200e9
    sent = sum(2 * 7 / 8 * c.runs * c.bytes for c in program.collectives)
    least = max(program.flops / peak, program.bytes / memory, sent / links)
    speed = program.flops / least
    kernels = program.kernel_flops / program.kernel_bytes
    assert 0 < program.kernel_flops < program.flops and program.kernels == 24
    expected = {
        "a step": (program.flops / program.bytes, speed),
        "custom kernels": (kernels, min(peak, kernels * memory)),
    }
    for panel, points in ((0, expected), (1, {"a step": (program.flops / sent, speed)})):
        drawn = drawn_points(figure, panel)
        assert drawn.keys() == points.keys()
        for name, point in points.items():
            assert drawn[name] == pytest.approx(point), name
    for axes, rate in zip(figure.axes, (memory, links), strict=True):
        roof = next(line for line in axes.get_lines() if line.get_color() == "black").get_xydata()
        assert roof[1] == pytest.approx((peak / rate, peak))
        assert roof[0, 1] == pytest.approx(roof[0, 0] * rate) and roof[2, 1] == peak
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for x, y in (*drawn_points(figure, list(figure.axes).index(axes)).values(), *roof):
            assert left <= x <= right and bottom <= y <= top
        assert "FLOPs per byte" in axes.get_xlabel() and "FLOP/s" in axes.get_ylabel()
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[:2] == ["LSG", f"a step: {1e3 * least:,.2f} ms at least, by its FLOPs"]
    assert figure.get_facecolor() == (1, 1, 1, 1)  # a page may be dark


def test_what_else_a_plan_may_have_is_drawn(recorded):
    """Generation, limits other than FLOPs, kernels of unknown work; one chip sends nothing."""
    program = recorded.program
    prefill, prefill_times = program._replace(collectives=()), {"compute": 0.5, "memory": 0.7}
    alone = dataclasses.replace(
        recorded,
        program=program._replace(collectives=(), unknown_kernels=2, kernel_flops=0.0),
        generation=GenerationPlan(StepReads(1, 1, 0), prefill, prefill_times),
    )
    figure = roofline_figure(PICTURE, {"one chip": alone})
    assert len(figure.axes) == 1
    assert drawn_points(figure, 0).keys() == {"a step", "before the first step"}
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[0] == "one chip (2 kernels of unknown work count no FLOPs)"
    assert said[2] == "before the first step: 700.00 ms at least, by its memory traffic"
    both = roofline_figure(PICTURE, {"one chip": alone, "eight": recorded})
    assert len(both.axes) == 2 and drawn_points(both, 1).keys() == {"a step"}


def test_a_plan_of_an_earlier_version_is_drawn_without_its_kernels(recorded):
    values = json.loads(recorded.to_json())
    for name in ("kernel_flops", "kernel_bytes"):
        del values["program"][name]
    figure = roofline_figure(PICTURE, {"LSG": Plan.from_json(json.dumps(values))})
    assert drawn_points(figure, 0).keys() == {"a step"}


def test_plans_that_cannot_be_drawn_say_why(recorded, tmp_path):
    file = tmp_path / "plan.png"
    refused = dataclasses.replace(recorded, fits=False, program=None, times={})
    with pytest.raises(ValueError, match=r"plan.png is not drawn: .* 0 of 1 plans for v5e"):
        draw_roofline(file, {"refused": refused})
    settings = dataclasses.replace(recorded.settings, topology="h100:8")
    other = dataclasses.replace(recorded, settings=settings)
    with pytest.raises(ValueError, match="2 of 2 plans for h100, v5e"):
        draw_roofline(file, {"TPU": recorded, "GPU": other})
    assert [*tmp_path.iterdir()] == []


def test_the_command_draws_what_it_shows(recorded, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lsg_flax.cli.plan.plan", lambda settings: recorded)
    command = ["plan", source, "--topology", "v5e:2x4", "--batch-size", "32"]
    assert cli.main([*command, "--picture", str(tmp_path / "a.png")]) == 0
    assert f"wrote {tmp_path}/a.png" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [*tmp_path.glob(".lsg-flax*")] == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--picture", "a.png", "--topology", "cpu:8"], "--topology cpu:8 has no known peaks"),
        (["--picture", "a.gif"], "a.gif must end in .png, .svg, .pdf"),
        (["--picture", "none/a.png"], "none is no folder to write a.png into"),
        (["--picture", "folder.png"], "folder.png is a folder"),
        (["--picture", "a.svg", "--json", "a.svg"], "--json and --picture both name a.svg"),
        (["--picture", "config.png"], "is the input"),
        (["--picture", "closed/a.png"], "closed cannot be written to; give a.png another folder"),
        (["--picture", "a.png", "no matplotlib"], "a.png is not drawn: it needs matplotlib"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_before_anything_is_compiled(
    tmp_path, capsys, monkeypatch, flags, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.png").write_text(json.dumps(TINY))
    for name in ("folder.png", "closed"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("os.access", lambda folder, _: folder.name != "closed")
    monkeypatch.setattr("lsg_flax.cli.plan.plan", lambda _: pytest.fail("it compiles"))
    if flags[-1] == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        flags = flags[:-1]
    command = ["plan", "config.png", "--topology", "v5e:2x4", "--batch-size", "8", *flags]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert {f.name for f in tmp_path.iterdir()} == {"config.png", "folder.png", "closed"}


@pytest.mark.slow
def test_an_error_of_the_other_process_is_one_line(source, capsys):
    command = ["plan", source, "--task", "base", "--topology", "cpu:2", "--batch-size", "3"]
    assert cli.main([*command, "--mode", "inference"]) == 2
    error = capsys.readouterr().err
    assert "3 rows, which data=2 cannot split evenly" in error and error.count("\n") == 1


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: lsg-flax[plan]"
)


@pytest.mark.slow
@needs_libtpu
def test_a_real_tpu_compilation(source):
    found = plan(settings_of(source, topology="v5e:2x4", dtype="bfloat16"))
    assert found.fits and found.capacity == chips.CHIPS["v5e"].memory
    assert found.program.cycles > 0 and found.program.unknown_loops == 0
    assert found.roofline == max(found.times[k] for k in ("compute", "memory", "communication"))
    full = plan(settings_of(source, topology="v5e:2x4", batch_size=2**20))
    assert not full.fits and full.needed > full.capacity and "exceeds" in full.refusal


@pytest.mark.slow
@needs_libtpu
def test_a_real_tpu_compilation_of_generation(tmp_path):
    """Beam search on four chips, eight rows of 2,048 tokens on each: a step moves little more than
    the weights and caches, and the chips exchange none of them."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    sizes |= {"vocab_size": 2048, "num_hidden_layers": LAYERS, "max_position_embeddings": 2048}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(spelled("bart", sizes) | TOKENS | CLASS))
    where = {"topology": "v5e:2x2", "dtype": "bfloat16", "param_dtype": "bfloat16"}
    search = {"batch_size": 32, "num_beams": 4, "max_new_tokens": 16}
    found = plan(written_by(str(file), max_length=2048, lsg={}, **search, **where))
    assert found.fits and found.program.unknown_loops == 0
    assert found.program.bytes < 1.3 * found.generation.reads.total
    assert_no_cache_leaves(found)


@pytest.mark.slow
@needs_libtpu
def test_a_real_tpu_compilation_of_attention_sorts_and_gathers_nothing():
    """Nor scatters, forward and backward, with any selection, causal, and in shards."""
    file = pathlib.Path(__file__).with_name("tpu_attention.py")
    environment = topologies.environment_for(chips.parse_topology("v5e:2x2"))
    environment |= {"PYTHONPATH": os.pathsep.join([str(file.parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == len(SPARSITY_TYPES) + 2 and not any(found.values()), found


@pytest.mark.slow
@needs_libtpu
def test_a_real_tpu_compilation_of_a_reformer_whose_memory_does_not_grow_with_depth(monkeypatch):
    """A training step's temporaries, of 12 layers and of 2."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "examples")
    example = importlib.import_module("reformer_long")
    few, many = (example.plan(4096, n, 64, "v5e:1x1")["temporaries"] for n in (2, 12))
    assert 0 < many <= 1.2 * few, (few, many)
