"""Training as pure functions: the optimizer, one jitted step, checkpoints of the training state,
and a plain loop around them. The losses are those of losses.py.

Nothing here knows about devices: place the state and the batch with `NamedSharding`, and the same
step runs on a mesh.

Axes: M microbatches, B batch, T tokens.
"""

import functools
import math
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from lsg_flax.losses import (
    Batch,
    Metrics,
    Params,
    batch_metrics,
    loss_sums,
    target_counts,
    weighted_mean,
)
from lsg_flax.losses import loss_fn as loss_fn
from lsg_flax.models.model import Model


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on: `key` is the run's, each step folds its number into it."""

    step: Any  # int32 scalar; like all leaves an array, or abstract for `restore_state`
    params: Params
    opt_state: Any
    key: Any  # a jax.random.key


def init_state(
    params: Params, optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    """The state before the first step. Parameters and key are copied, since steps donate it."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.copy(key))


# Optimizer


def make_optimizer(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    frozen: str | None = None,
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; the learning rate rises linearly from 0 in
    `warmup_steps` and falls linearly to 0 at `total_steps`, step for step as Hugging Face's
    `get_linear_schedule_with_warmup`. Biases and LayerNorm's parameters do not decay.

    Args:
        frozen: regular expression, searched in paths such as "encoder/layers/mlp_up/kernel";
            parameters that match keep every bit and have no moments. They do not count in the
            norm, so their gradients are not even computed.

    Raises:
        ValueError: for steps that do not fit, or a pattern that matches no parameter or all of
            them (when the optimizer is initialised).
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must lie in 0..{total_steps - 1}, below "
            f"total_steps={total_steps}."
        )
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup_steps),
            optax.linear_schedule(learning_rate, 0.0, total_steps - warmup_steps),
        ],
        [warmup_steps],
    )
    adamw = optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=_decays)
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    optimizer = optax.chain(clip, adamw)
    if frozen is None:
        return optimizer
    return optax.multi_transform(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        functools.partial(_label_frozen, pattern=frozen),
    )


def _by_path(params: Params, value: Callable[[str], Any]) -> Params:
    """A tree like `params` whose leaves are values of their paths."""
    paths = flax.traverse_util.flatten_dict(params, sep="/")
    return flax.traverse_util.unflatten_dict({path: value(path) for path in paths}, sep="/")


def _decays(params: Params) -> Params:
    return _by_path(params, lambda path: path.split("/")[-1] not in ("bias", "scale"))


def _label_frozen(params: Params, pattern: str) -> Params:
    paths = list(flax.traverse_util.flatten_dict(params, sep="/"))
    matching = sum(bool(re.search(pattern, path)) for path in paths)
    if matching in (0, len(paths)):
        raise ValueError(
            f"frozen={pattern!r} matches {'no' if not matching else 'every'} parameter; it is "
            f"searched in paths such as {paths[:4]}."
        )
    return _by_path(params, lambda path: "frozen" if re.search(pattern, path) else "trained")


# The step


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation, accumulate_steps: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step as a jitted function `(state, batch) -> (state, metrics)`.

    The state is donated: use the returned one. With `accumulate_steps` M > 1 every array of the
    batch has a leading axis of M microbatches, [M, B, ...], run one after the other. Each one's
    summed losses are divided by the number of labels that count in all M together, so the gradient
    is that of one batch of M * B, however the labels are spread (dropout masks differ). Gradients
    are summed in float32. Recompute activations with `model.clone(remat="full")`.

    Returns:
        The step. Its metrics are those of `loss_fn` (over all microbatches) and `update_norm`, the
        global norm of the parameters' change.

    Raises:
        ValueError: while tracing, for a batch that does not fit.
    """
    if accumulate_steps < 1:
        raise ValueError(f"accumulate_steps={accumulate_steps} must be at least 1.")

    def gradients(params, batch, counts, key):
        def loss(params):
            return weighted_mean(model, loss_sums(model, params, batch, key), counts)

        return jax.value_and_grad(loss)(params)

    def accumulated(params, batch, counts, key):
        def add(total, numbered):
            number, microbatch = numbered
            parts = gradients(params, microbatch, counts, jax.random.fold_in(key, number))
            return jax.tree.map(lambda t, p: t + p.astype(jnp.float32), total, parts), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        numbers = jnp.arange(accumulate_steps)
        total, _ = jax.lax.scan(add, (jnp.float32(0.0), zeros), (numbers, batch))
        return total

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = target_counts(model, batch)
        key = jax.random.fold_in(state.key, state.step)
        if accumulate_steps > 1:
            _check_microbatches(batch, accumulate_steps)
            loss, grads = accumulated(state.params, batch, counts, key)
        else:
            loss, grads = gradients(state.params, batch, counts, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = batch_metrics(loss, batch, counts) | {"update_norm": optax.tree.norm(updates)}
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)  # type: ignore[attr-defined]
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def _check_microbatches(batch: Batch, count: int) -> None:
    shapes = {name: tuple(array.shape) for name, array in batch.items()}
    if any(not shape or shape[0] != count for shape in shapes.values()):
        raise ValueError(
            f"with accumulate_steps={count} every array is [{count}, batch, ...], got {shapes}; "
            f"reshape with x.reshape({count}, -1, *x.shape[1:])."
        )


# Checkpoints


def save_state(path: str | os.PathLike, state: TrainState, *, keep: int = 3) -> None:
    """Saves the state under `path`/<its step>, atomically (a folder that an interruption leaves
    unfinished is never restored), and deletes all but the last `keep`.

    Raises:
        ValueError: if `keep` is not positive or the step is there already.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1.")
    step = int(state.step)
    policy: Any = ocp.training.preservation_policies.LatestN(keep)
    with ocp.training.Checkpointer(_absolute(path), preservation_policy=policy) as checkpointer:
        if step in [saved.step for saved in checkpointer.checkpoints]:
            raise ValueError(
                f"{path} has a checkpoint of step {step} already; continue from it, or choose "
                "another folder."
            )
        checkpointer.save(step, state, force=True)


def restore_state(
    path: str | os.PathLike, abstract_state: TrainState, *, step: int | None = None
) -> TrainState:
    """The state saved at `step`, the last one by default.

    Args:
        abstract_state: a state of the same structure, concrete or of `jax.ShapeDtypeStruct`; the
            result takes its dtypes and shardings, so another mesh may continue.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is that of another model or optimizer (both sides are listed).
    """
    steps = saved_steps(path)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"{path} has no checkpoint{'' if step is None else f' of step {step}'}; it has the "
            f"steps {steps}."
        )
    step = steps[-1] if step is None else step
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        abstract_state,
    )
    with ocp.training.Checkpointer(_absolute(path)) as checkpointer:
        _check_same_tree(path, checkpointer.metadata(step).metadata, abstract)
        return checkpointer.load(step, abstract)


def saved_steps(path: str | os.PathLike) -> list[int]:
    """The steps of the checkpoints under `path`, in order; empty if there is no such folder."""
    if not pathlib.Path(path).is_dir():
        return []
    with ocp.training.Checkpointer(_absolute(path)) as checkpointer:
        return sorted(saved.step for saved in checkpointer.checkpoints)


def _absolute(path: str | os.PathLike) -> str:
    return str(pathlib.Path(path).absolute())


def _check_same_tree(path, saved: Any, wanted: Any) -> None:
    """Compares names and shapes before Orbax reads, whose own message does not name the leaf."""
    saved, wanted = _shapes_by_name(saved), _shapes_by_name(wanted)
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    shapes = [
        f"{name}: {saved[name]} in the checkpoint, {wanted[name]} wanted"
        for name in sorted(saved.keys() & wanted.keys() - {"key"})
        if saved[name] != wanted[name]
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"the checkpoint in {path} is of another model or optimizer: it lacks {missing[:8]}, "
            f"has beside {unexpected[:8]}, and of another shape are {shapes[:8]}."
        )


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


# The loop


def fit(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    batch_at: Callable[[int], Batch],
    *,
    steps: int,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    evaluate_every: int | None = None,
    checkpoints: str | os.PathLike | None = None,
    save_every: int | None = None,
    keep: int = 3,
    progress: bool = True,
) -> tuple[TrainState, list[Metrics]]:
    """Runs a train step until `state.step == steps`.

    Args:
        step: from `make_train_step`.
        state: where to start. It is donated; if `checkpoints` holds a later one, that is used.
        batch_at: the batch of step n (from 0), a pure function: so a resumed run sees the
            same data and repeats the loss curve bit for bit.
        evaluate: metrics of a state, every `evaluate_every` steps and at the end.
        checkpoints: a folder for `save_state`, every `save_every` steps and at the end.
        progress: show a bar with the loss and tokens per second.

    Returns:
        The last state, and one dict per step run here: `step` (from 1), `seconds` since the start,
        the step's metrics and, where it was evaluated, those of `evaluate`.

    Raises:
        FloatingPointError: at a loss that is not finite; the step is named, and no checkpoint is
            written of it.
        ValueError: for intervals without their use, or the other way round.
    """
    if (evaluate_every and not evaluate) or (save_every and not checkpoints):
        raise ValueError("evaluate_every needs evaluate, and save_every needs checkpoints.")
    if checkpoints is not None and (saved_steps(checkpoints) or [0])[-1] > int(state.step):
        state = restore_state(checkpoints, state)
    first, start, history = int(state.step), time.perf_counter(), []
    waiting: tuple[int, Metrics] | None = None  # read one step late, so that the device never waits
    with tqdm(total=steps, initial=first, unit="step", disable=not progress) as bar:

        def settle():
            if waiting is not None:
                history.append(_record(*waiting, time.perf_counter() - start))
                read = sum(record["tokens"] for record in history)
                rate = read / max(history[-1]["seconds"], 1e-9)
                bar.set_postfix_str(f"loss {history[-1]['loss']:.4f}, {rate:,.0f} tokens/s", False)
                bar.update()

        for number in range(first + 1, steps + 1):
            state, metrics = step(state, batch_at(number - 1))
            settle()
            waiting = number, metrics
            last = number == steps
            evaluates = evaluate and (last or (evaluate_every and number % evaluate_every == 0))
            saves = checkpoints and (last or (save_every and number % save_every == 0))
            if last or evaluates or saves:
                settle()
                waiting = None
            if evaluates and evaluate:
                history[-1] |= evaluate(state)
            if saves and checkpoints:
                save_state(checkpoints, state, keep=keep)
    return state, history


def _record(number: int, metrics: Metrics, seconds: float) -> Metrics:
    values = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"the loss is {values['loss']} at step {number} ({values['tokens']:.0f} tokens, "
            f"{values['targets']:.0f} targets); lower the learning rate, look at this batch's "
            "labels and ids, or compute in float32."
        )
    return {"step": number, "seconds": seconds} | values
