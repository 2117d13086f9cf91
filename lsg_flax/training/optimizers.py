"""The optimizer: AdamW with clipping, a schedule, decay masks, layer-wise learning-rate decay,
parameters frozen by path, and a moving average of the trainable parameters.

Axes: L layers.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsg_flax.models import Params

Schedule = Literal["linear", "cosine", "constant"]
_RATES = 4096  # computed at once


def make_schedule(
    learning_rate: float, *, total_steps: int, warmup_steps: int = 0, schedule: Schedule = "linear"
) -> optax.Schedule:
    """Returns the learning rate of each step: a linear rise from 0 to `learning_rate` in
    `warmup_steps`, then `schedule`; step for step as Hugging Face's
    `get_..._schedule_with_warmup`.

    Args:
        total_steps: the step at which "linear" (a straight line) and "cosine" (half a wave) reach
            0.

    Raises:
        ValueError: for steps that do not fit, or an unknown schedule.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be in 0..{total_steps - 1}, below "
            f"total_steps={total_steps}."
        )
    falling = {
        "linear": lambda steps: optax.linear_schedule(learning_rate, 0.0, steps),
        "cosine": lambda steps: optax.cosine_decay_schedule(learning_rate, steps),
        "constant": lambda steps: optax.constant_schedule(learning_rate),
    }
    if schedule not in falling:
        raise ValueError(f"schedule={schedule!r} must be one of {', '.join(falling)}.")
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules(
        [warmup, falling[schedule](total_steps - warmup_steps)], [warmup_steps]
    )


def read_schedule(rates: optax.Schedule) -> Callable[[int], float]:
    """Returns a function from the step (from 0) to the learning rate as a float. Many steps are
    computed at once: asking the device at each step would wait for all steps queued on it."""

    @functools.lru_cache(maxsize=1)
    def part(number: int) -> np.ndarray:
        steps = np.arange(number * _RATES, (number + 1) * _RATES)
        return np.broadcast_to(np.asarray(jax.jit(rates)(steps)), steps.shape)

    return lambda step: float(part(step // _RATES)[step % _RATES])


def make_optimizer(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: Schedule = "linear",
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    frozen: str | None = None,
    layerwise_lr_decay: float | None = None,
    ema_decay: float | None = None,
) -> optax.GradientTransformation:
    """Returns AdamW (arXiv 1711.05101, by optax's `adamw`) after clipping by the global norm, with
    the learning rates of transformers' `get_linear_schedule_with_warmup` and its like. Biases,
    LayerNorm's parameters and buffers have no weight decay.

    Args:
        learning_rate, schedule: the rate after warmup, and how it changes from then on.
        total_steps, warmup_steps: steps of the run, and those in which the rate rises.
        weight_decay: times the learning rate, the share of a parameter that a step subtracts.
        max_grad_norm: largest global norm of the gradients; None does not clip.
        b1, b2: shares of the old moments that a step keeps.
        frozen: regular expression, searched in paths such as "encoder/layers/mlp_up/kernel";
            parameters that match keep every bit and have no optimizer state. They do not count in
            the norm, so their gradients are not even computed.
        layerwise_lr_decay: the learning rate of each layer, from the head down, as a share of that
            of the layer above (arXiv 2106.08254); see `layer_rates`.
        ema_decay: keeps a moving average of the trainable parameters, as TensorFlow's
            ExponentialMovingAverage with `num_updates`; the largest share of the old average that a
            step keeps.

    Returns:
        The optimizer; its state (moments) has the parameters' dtype, so keep those float32.

    Raises:
        ValueError: for steps or decays that do not fit, an unknown schedule, a pattern that matches
            no parameter or all of them, and layers without an order (when the optimizer is
            initialised).
    """
    rates = make_schedule(
        learning_rate, total_steps=total_steps, warmup_steps=warmup_steps, schedule=schedule
    )
    adamw = optax.adamw(rates, b1, b2, eps, weight_decay=weight_decay, mask=_decays)
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    optimizer = optax.chain(clip, adamw)
    if frozen is not None:
        labels = functools.partial(_label_frozen, pattern=frozen)
        both: Any = {"trained": optimizer, "frozen": optax.set_to_zero()}
        optimizer = optax.multi_transform(both, labels)
    if layerwise_lr_decay is not None:
        optimizer = optax.chain(optimizer, _scale_by_layer(layerwise_lr_decay))
    if ema_decay is not None:
        learns = functools.partial(_learns, frozen=frozen)
        optimizer = optax.chain(optimizer, optax.masked(average_params(ema_decay), learns))
    return optimizer


def check_decay(name: str, decay: float) -> None:
    """Raises ValueError for a decay outside (0, 1]."""
    if not 0 < decay <= 1:
        raise ValueError(f"{name}={decay} must be above 0 and at most 1.")


def layer_rates(params: Params, decay: float) -> Params:
    """Returns the factor of each parameter's learning rate (layer-wise learning-rate decay).

    It is 1 for the head and all else after the layers, `decay` for the last layer, its square for
    the layer before, and so on; with L layers it is `decay` ** (L + 1) for the embeddings. Stacked
    layers have a vector [L, 1, ...]. Each stack of an encoder-decoder counts on its own; word
    embeddings that both share take the factor of the deeper stack. A group of ALBERT's layers
    counts as one layer. The factors are those of BEiT's fine-tuning (arXiv 2106.08254; its
    optim_factory.py).

    Raises:
        ValueError: if layers are stacked by their kind of attention and so have no order, as in a
            Reformer.
    """
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    unordered = [path for path in flat if re.search(r"/\w+_layers/", path)]
    if unordered:
        raise ValueError(
            f"layerwise_lr_decay={decay} needs layers that are stacked in their order, but those "
            f"of this model are stacked by their kind of attention ({unordered[0]}); leave it out."
        )
    depths = {
        path.partition("layers/")[0]: leaf.shape[0]
        for path, leaf in flat.items()
        if "/layers/" in path
    }
    deepest = max(depths.values(), default=0)

    def rate(path: str) -> Any:
        stack, layers, _ = path.partition("layers/")
        if layers and stack in depths:
            depth = depths[stack]
            rates = decay ** np.arange(depth, 0, -1, dtype=np.float32)
            return rates.reshape(-1, *[1] * (flat[path].ndim - 1))  # [L, 1, ...]
        if re.search(r"(^|/)(shared|embeddings\w*)/", path):
            own = path.partition("embeddings")[0]
            return np.float32(decay ** (depths.get(own, deepest) + 1))
        return np.float32(1.0)

    return _by_path(params, rate)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Scales AdamW's updates, weight decay included, as a learning rate per parameter would."""
    check_decay("layerwise_lr_decay", decay)

    def init(params: Any) -> optax.EmptyState:
        layer_rates(params, decay)  # raises early if layers have no order
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        rates = layer_rates(params, decay)
        return jax.tree.map(lambda update, rate: update * rate, updates, rates), state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


class AverageState(NamedTuple):
    """Number of updates, and the moving average of the trainable parameters."""

    updates: jax.Array
    averaged_params: Params


def average_params(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that keeps a moving average of the parameters in float32.

    It does not change the updates, and must come after all transformations that do. At update n
    (from 0) the old average counts min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage with `num_updates`, so that the initial parameters are soon forgotten.

    Raises:
        ValueError: for a decay outside (0, 1].
    """
    check_decay("ema_decay", decay)

    def init(params: Params) -> AverageState:
        copied: Params = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return AverageState(jnp.zeros((), jnp.int32), copied)

    def update(
        updates: Params, state: AverageState, params: Params | None = None
    ) -> tuple[Params, AverageState]:
        assert params is not None
        kept = jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
        new: Any = optax.apply_updates(params, updates)
        average: Any = optax.incremental_update(new, state.averaged_params, 1 - kept)
        return updates, AverageState(state.updates + 1, average)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def averaged(params: Params, opt_state: Any) -> Params:
    """Returns the parameters, with trainable ones replaced by their moving averages if the
    optimizer's state has some."""
    average = optax.tree_utils.tree_get(opt_state, "averaged_params")
    if average is None:
        return params

    def pick(own: jax.Array, mean: Any) -> jax.Array:
        return own if isinstance(mean, optax.MaskedNode) else mean.astype(own.dtype)

    return jax.tree.map(pick, params, average)


def _by_path(params: Params, value: Callable[[str], Any]) -> Params:
    """Returns a tree like `params` whose leaves are `value(path)`."""
    paths = flax.traverse_util.flatten_dict(params, sep="/")
    return flax.traverse_util.unflatten_dict({path: value(path) for path in paths}, sep="/")


def _decays(params: Params) -> Params:
    return _by_path(params, lambda path: path.split("/")[-1] not in ("bias", "scale", "buffer"))


def _learns(params: Params, frozen: str | None) -> Params:
    """Returns which parameters are trained."""
    pattern = "^$" if frozen is None else frozen

    def learns(path: str) -> bool:
        return path.split("/")[-1] != "buffer" and not re.search(pattern, path)

    return _by_path(params, learns)


def _label_frozen(params: Params, pattern: str) -> Params:
    paths = list(flax.traverse_util.flatten_dict(params, sep="/"))
    left = [path for path in paths if not re.search(pattern, path)]
    trained = [path for path in left if path.split("/")[-1] != "buffer"]
    if not trained or left == paths:
        raise ValueError(
            f"frozen={pattern!r} matches {'no' if left == paths else 'every'} parameter; give a "
            f"pattern that matches some, but not all, of the paths such as {paths[:4]}."
        )
    return _by_path(params, lambda path: "frozen" if re.search(pattern, path) else "trained")
