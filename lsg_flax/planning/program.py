"""The program of a plan: the model that would run, its step, and the step's abstract arguments.

Axes: B batch, C choices, T tokens, M microbatches.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsg_flax import hub, inference, sharding, training
from lsg_flax.generation import ModelDecoder
from lsg_flax.models import Model, ModelConfig, family_of
from lsg_flax.patterns import LSGConfig
from lsg_flax.planning.generation import (
    generate_arguments,
    generate_call,
    jitted_generate,
    step_reads,
)
from lsg_flax.planning.settings import TARGET_LENGTH, ChipMemory, PlanSettings, StepReads

DEFAULT_LENGTH = 4096  # for a checkpoint with full attention, the default of `convert`
_CHOICES = 4  # for multiple choice


def planned_model(settings: PlanSettings) -> tuple[Model, PlanSettings, tuple[str, ...]]:
    """Returns the model that would run, the settings with task and length filled in, and notes on
    both.

    Raises:
        ValueError, FileNotFoundError: for an invalid source or settings.
    """
    checkpoint = hub.open_checkpoint(settings.source, hub.CONFIG_FILES)
    task = settings.task or checkpoint.task
    config = checkpoint.config_for(task)
    config.check_tokens()
    reads, fixed = Model(config, task).max_length, family_of(config.model_type).to_lsg is None
    length = settings.max_length
    if length is None:
        length = reads if config.lsg or fixed else DEFAULT_LENGTH
    if length < 1:
        raise ValueError(f"max_length={length} must be at least 1.")
    notes = []
    if fixed:
        settings = _as_it_is(settings, config, length, reads)
    elif settings.attention in ("local", "lsh"):
        own = settings.attention
        raise ValueError(
            f"attention={own!r}: a {config.model_type} model has no such attention; choose lsg or "
            "full."
        )
    elif settings.attention == "full":
        config = dataclasses.replace(config, lsg=None)
    else:
        if config.lsg is None:
            notes.append("LSG attention, as `lsg-flax convert` makes it of this checkpoint")
        pattern = config.lsg or LSGConfig()
        config = dataclasses.replace(config, lsg=dataclasses.replace(pattern, **settings.lsg))
    if length > reads:
        notes.append(f"as converted to {length:,} tokens; the checkpoint reads {reads:,}")
        positions = family_of(config.model_type).architecture.max_position_embeddings(length)
        config = config.with_overrides(max_position_embeddings=positions)
    model = Model(
        config,
        task,
        dtype=jnp.dtype(settings.dtype),
        param_dtype=jnp.dtype(settings.param_dtype),
        remat=settings.remat,
    )
    settings = dataclasses.replace(
        settings, task=task, max_length=length, **_written(model, settings)
    )
    return model, settings, tuple(notes)


def _as_it_is(settings: PlanSettings, config: ModelConfig, length: int, reads: int) -> PlanSettings:
    """Returns the settings with the attention of a family that cannot become LSG, whose checkpoints
    are planned unchanged; raises ValueError for settings that would change it."""
    own = config.attention
    if settings.lsg or settings.attention == "full" or length > reads:
        asked = [*settings.lsg, *([] if length <= reads else [f"max_length={length}"])]
        asked += [] if settings.attention != "full" else ["attention='full'"]
        raise ValueError(
            f"a {config.model_type} has {own} attention and {reads} positions, which lsg_flax "
            f"cannot change: leave {', '.join(asked)} out, or plan a config.json with other sizes."
        )
    return dataclasses.replace(settings, attention=own)


def _written(model: Model, settings: PlanSettings) -> dict[str, int]:
    """Returns the settings for the number of generated or target tokens; empty if there are none.

    Raises:
        ValueError: if generated or target tokens are requested and the task has none.
    """
    writes, given = model.task_record.generates, settings.max_target_length
    if settings.mode == "generate":
        if not writes:
            raise ValueError(
                f"mode='generate' generates texts, but task={model.task!r} does not: choose "
                "conditional_generation or causal_lm."
            )
        return {"max_new_tokens": settings.max_new_tokens or TARGET_LENGTH}
    if writes and model.has_two_stacks:
        return {"max_target_length": given or TARGET_LENGTH}
    if given is not None:
        raise ValueError(
            f"max_target_length={given} is for an encoder-decoder's task conditional_generation, "
            f"not for task={model.task!r} of {model.config.model_type}: leave it out."
        )
    return {}


class PlannedProgram(NamedTuple):
    """A program to compile.

    Attributes:
        function, arguments: the jitted function, and abstract arrays with their shardings.
        memory: bytes of the arguments.
        settings: the settings with defaults filled in.
        reads: bytes that a step of generation must read; None for other modes.
    """

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    memory: ChipMemory
    settings: PlanSettings
    reads: StepReads | None = None


def sharded_program(model: Model, settings: PlanSettings, mesh: Mesh) -> PlannedProgram:
    """Makes the program for the settings' mode.

    Raises:
        ValueError: for settings that do not fit the model or the mesh.
    """
    if settings.mode == "generate":
        return _generation(model, settings, mesh)
    batch = abstract_batch(model, settings)
    accumulates = settings.accumulate > 1
    batch = _placed(batch, sharding.batch_shardings(batch, mesh, microbatches=accumulates))
    if settings.mode == "inference":
        params = _placed_params(model, mesh)
        weights = ChipMemory(_bytes_per_chip(params), 0, _bytes_per_chip(batch))
        predict = jax.jit(lambda params, batch: inference.outputs_of(model, params, batch, None))
        return PlannedProgram(predict, (params, batch), weights, settings)
    lora = settings.lora_r and training.LoRA(settings.lora_r)
    if lora and settings.lora_target_modules:
        lora = dataclasses.replace(lora, target_modules=tuple(settings.lora_target_modules))
    frozen = training.frozen_beside(str(training.FROZEN["head"])) if lora else None
    options = {"frozen": frozen, "ema_decay": settings.ema_decay}
    optimizer = training.make_optimizer(1e-4, total_steps=1000, **options)

    def init(key: jax.Array) -> training.TrainState:
        params: Any = model.init(key, **model.example_inputs())["params"]
        params = training.add_lora(params, lora, key) if lora else params
        return training.init_state(params, optimizer, key)

    state = jax.eval_shape(init, jax.random.key(0))
    state = _placed(state, sharding.shardings_for(state, mesh))
    step: Any = training.make_train_step(model, optimizer, settings.accumulate)
    weights = ChipMemory(*map(_bytes_per_chip, (state.params, state.opt_state, batch)))
    return PlannedProgram(step, (state, batch), weights, settings)


def _generation(model: Model, settings: PlanSettings, mesh: Mesh) -> PlannedProgram:
    params, ready = _placed_params(model, mesh), generate_call(model, settings)
    arguments = generate_arguments(ready, mesh)
    weights = ChipMemory(_bytes_per_chip(params), 0, _bytes_per_chip(arguments))
    beams = ready.text.tokens.shape[1]
    return PlannedProgram(
        jitted_generate(ready),
        (ModelDecoder(params, model), *arguments),
        weights,
        dataclasses.replace(settings, num_beams=beams),
        step_reads(model, params, ready, mesh),
    )


def _placed_params(model: Model, mesh: Mesh) -> Any:
    params = model.abstract_params()
    return _placed(params, sharding.shardings_for(params, mesh))


def abstract_batch(model: Model, settings: PlanSettings) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch: [B, T], [B, C, T] for choices, [M, B, ...] with accumulation.

    Raises:
        ValueError: in training, for a task without a loss.
    """
    rows: tuple[int, ...] = (settings.batch_size // settings.accumulate,)
    rows = (settings.accumulate, *rows) if settings.accumulate > 1 else rows
    assert settings.max_length is not None
    choices = (_CHOICES,) * (model.task_record.input_rank - 2)
    tokens = (*rows, *choices, settings.max_length)
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if model.config.segments > 1 else []
    batch = dict.fromkeys(names, jax.ShapeDtypeStruct(tokens, np.int32))
    written = tokens
    if (length := settings.max_target_length) is not None:
        written = (*rows, length)
        if settings.mode == "inference":
            batch["decoder_input_ids"] = jax.ShapeDtypeStruct(written, np.int32)
    if settings.mode == "train":
        for target in training.targets_of(model):
            batch[target.labels] = training.label_shape(model, target, written)
    return batch


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _bytes_per_chip(tree: Any) -> int:
    """Returns the bytes per chip of abstract arrays with shardings, without random keys."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shape = leaf.sharding.shard_shape(leaf.shape)
            total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total
