"""The optimizer: AdamW with clipping, a schedule, decay masks and parameters frozen by path."""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import flax.traverse_util
import jax
import numpy as np
import optax

from lsg_flax.models import Params

Schedule = Literal["linear", "cosine", "constant"]
_RATES = 4096  # that are computed together


def make_schedule(
    learning_rate: float, *, total_steps: int, warmup_steps: int = 0, schedule: Schedule = "linear"
) -> optax.Schedule:
    """The learning rate of each step: a linear rise from 0 in `warmup_steps`, then what `schedule`
    says, step for step as Hugging Face's `get_..._schedule_with_warmup`.

    Args:
        total_steps: where "linear" (a straight line) and "cosine" (half a wave) reach 0.

    Raises:
        ValueError: for steps that do not fit, or an unknown schedule.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must lie in 0..{total_steps - 1}, below "
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
    """The rates of a schedule as numbers, by the step from 0. Many steps are computed at once: to
    ask the device at each step would be to wait for the steps that it has been given."""

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
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, with the learning rates of `make_schedule`. Biases,
    LayerNorm's parameters and what is never trained do not decay.

    Args:
        frozen: regular expression, searched in paths such as "encoder/layers/mlp_up/kernel";
            parameters that match keep every bit and have no moments. They do not count in the
            norm, so their gradients are not even computed.

    Returns:
        The optimizer; its moments are of the parameters' dtype, so keep those float32.

    Raises:
        ValueError: for steps that do not fit, an unknown schedule, or a pattern that matches no
            parameter or all of them (when the optimizer is initialised).
    """
    rates = make_schedule(
        learning_rate, total_steps=total_steps, warmup_steps=warmup_steps, schedule=schedule
    )
    adamw = optax.adamw(rates, b1, b2, eps, weight_decay=weight_decay, mask=_decays)
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
    return _by_path(params, lambda path: path.split("/")[-1] not in ("bias", "scale", "buffer"))


def _label_frozen(params: Params, pattern: str) -> Params:
    paths = list(flax.traverse_util.flatten_dict(params, sep="/"))
    left = [path for path in paths if not re.search(pattern, path)]
    trained = [path for path in left if path.split("/")[-1] != "buffer"]
    if not trained or left == paths:
        raise ValueError(
            f"frozen={pattern!r} matches {'no' if left == paths else 'every'} parameter; it is "
            f"searched in paths such as {paths[:4]}."
        )
    return _by_path(params, lambda path: "frozen" if re.search(pattern, path) else "trained")
