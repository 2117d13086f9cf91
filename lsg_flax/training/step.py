"""The state of a training run, and one train step as a jitted pure function.

The step does not depend on devices. It runs on a mesh if it is called under `jax.set_mesh(mesh)`
with state and batch sharded by sharding.py, as `fit(mesh=...)` does.

Axes: M microbatches, B batch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from lsg_flax.models import Batch, Model, Params
from lsg_flax.sharding import sharded_init, shardings_for
from lsg_flax.training.lora import merge_lora
from lsg_flax.training.losses import (
    Metrics,
    batch_metrics,
    label_options,
    loss_sums,
    target_counts,
    weighted_mean,
)
from lsg_flax.training.optimizers import averaged

TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


@flax.struct.dataclass
class TrainState:
    """The state that a run resumes from; each step folds its number into `key`."""

    step: Any  # int32 scalar; like all leaves an array, or abstract for `restore_state`
    params: Params
    opt_state: Any
    key: Any  # a jax.random.key


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
    """Returns the state before the first step. Parameters and key are copied, since steps donate
    the state.

    Args:
        mesh: mesh to shard the state over; no device ever holds the whole optimizer state.
    """

    def init(params: Params, key: PRNGKeyArray) -> TrainState:
        copied = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), copied, optimizer.init(copied), jnp.copy(key))

    if mesh is None:
        return init(params, key)
    return sharded_init(init, params, key, mesh=mesh)


def trained_params(state: TrainState) -> Params:
    """Returns the parameters of a state as they are evaluated and saved: moving averages, if there
    are any, instead of the parameters, and with adapters merged."""
    return merge_lora(averaged(state.params, state.opt_state))


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    accumulate_steps: int = 1,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> TrainStep:
    """Returns one optimizer step as a jitted function `(state, batch) -> (state, metrics)`. Under
    `jax.set_mesh(mesh)`, with state and batch sharded by sharding.py, it runs on that mesh.

    The state is donated: use the returned one. With `accumulate_steps` M > 1 every array of the
    batch has a leading axis of M microbatches, [M, B, ...], which run one after the other. The
    summed losses of each are divided by the number (or weights) of the labels that count in all M
    together, so the gradient is that of one batch of M * B, however the labels are spread (only
    dropout masks differ). Gradients are summed in float32. `model.clone(remat="full")` recomputes
    activations. `label_smoothing` and `class_weights` are as in `loss_fn`.

    Returns:
        The step. Its metrics are those of `loss_fn` (over all microbatches) and `update_norm`, the
        global norm of the update of the parameters.

    Raises:
        ValueError: for `accumulate_steps` below 1; while tracing, for a batch that does not fit.
    """
    if accumulate_steps < 1:
        raise ValueError(f"accumulate_steps={accumulate_steps} must be at least 1.")

    options = label_options(label_smoothing, class_weights)

    def gradients(params, batch, counts, key):
        def loss(params):
            sums = loss_sums(model, params, batch, key, options)
            return weighted_mean(model, sums, counts)

        return jax.value_and_grad(loss)(params)

    def compute(params, batch, key):
        counts = target_counts(model, batch, options)

        def of_part(params, part, key):
            return gradients(params, part, counts, key)

        if accumulate_steps > 1:
            check_microbatches(batch, accumulate_steps)
            loss, grads = accumulate_gradients(of_part, params, batch, key)
        else:
            loss, grads = of_part(params, batch, key)
        return grads, batch_metrics(loss, batch, target_counts(model, batch))

    return make_step(compute, optimizer)


def make_step(compute: Callable, optimizer: optax.GradientTransformation, *given: Any) -> TrainStep:
    """Returns one optimizer step for a loss of your own, a jitted function `(state, batch) ->
    (state, metrics)`. The state is donated, as in `make_train_step`.

    Args:
        compute: function `(params, batch, key, *given) -> (gradients, metrics)`. The gradients have
            the structure of `params`; `key` is another one in each step. `fit` needs the scalar
            metrics "loss" and "tokens", the number of real tokens.
        optimizer: as for `init_state`.
        *given: trees of arrays that `compute` needs, such as the parameters of a teacher.
    """

    def train_step(state: TrainState, batch: Batch, *given: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = compute(state.params, batch, key, *given)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"update_norm": optax.tree.norm(updates)}
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)  # type: ignore[attr-defined]
        return _placed(new), metrics

    jitted = jax.jit(train_step, donate_argnums=0)
    if not given:
        return jitted
    return functools.wraps(train_step)(lambda state, batch: jitted(state, batch, *given))


def accumulate_gradients(
    gradients: Callable, params: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Any, Params]:
    """Returns the float32 sums of the losses and gradients that `gradients(params, part, key)`
    returns for each microbatch of [M, B, ...], one after the other."""

    def add(total, numbered):
        number, part = numbered
        parts = gradients(params, part, jax.random.fold_in(key, number))
        return jax.tree.map(lambda t, p: t + p.astype(jnp.float32), total, parts), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    numbers = jnp.arange(len(jax.tree.leaves(batch)[0]))
    total, _ = jax.lax.scan(add, (jnp.float32(0.0), zeros), (numbers, batch))
    return total


def _placed(state: TrainState) -> TrainState:
    """Returns the new state with the shardings of the old one on the ambient mesh; otherwise XLA
    may choose others, and the next step would be compiled again."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(state, shardings_for(state, mesh))


def check_microbatches(batch: Batch, count: int) -> None:
    """Raises ValueError unless every array has a leading axis of `count` microbatches."""
    shapes = {name: tuple(array.shape) for name, array in batch.items()}
    if any(not shape or shape[0] != count for shape in shapes.values()):
        raise ValueError(
            f"with accumulate_steps={count} every array must be [{count}, batch, ...], got "
            f"{shapes}; reshape with x.reshape({count}, -1, *x.shape[1:])."
        )
