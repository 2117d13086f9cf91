"""Training as pure functions: the state, one jitted step, and a plain loop around it. The losses
are those of losses.py, the optimizer is that of optimizers.py, files are written by states.py
and log.py.

The step knows nothing of devices: under `jax.set_mesh(mesh)`, with state and batch placed by
sharding.py, it runs on a mesh, which `fit(mesh=...)` does.

Axes: M microbatches, B batch, T tokens.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jaxtyping import PRNGKeyArray

from lsg_flax.models import Model, Params
from lsg_flax.sharding import shard, shard_batch, sharded_init, shardings_for
from lsg_flax.training.log import CompilationCounter, RunLog, peak_flops
from lsg_flax.training.losses import (
    Batch,
    Metrics,
    batch_metrics,
    loss_sums,
    target_counts,
    weighted_mean,
)
from lsg_flax.training.losses import loss_fn as loss_fn
from lsg_flax.training.optimizers import make_optimizer as make_optimizer
from lsg_flax.training.states import Checkpoints, Mode, check_settings, restore, saved_steps
from lsg_flax.training.states import restore_state as restore_state
from lsg_flax.training.states import save_state as save_state

Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on: `key` is the run's, each step folds its number into it."""

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
    """The state before the first step. Parameters and key are copied, since steps donate it.

    Args:
        mesh: place the state on it; no device ever holds the optimizer's state whole.
    """

    def init(params: Params, key: PRNGKeyArray) -> TrainState:
        copied = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), copied, optimizer.init(copied), jnp.copy(key))

    if mesh is None:
        return init(params, key)
    return sharded_init(init, params, key, mesh=mesh)


# The step


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation, accumulate_steps: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step as a jitted function `(state, batch) -> (state, metrics)`. Under
    `jax.set_mesh(mesh)`, with state and batch placed by sharding.py, it runs on that mesh.

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

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
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
        return _placed(new), metrics

    return jax.jit(train_step, donate_argnums=0)


def _placed(state: TrainState) -> TrainState:
    """On the ambient mesh the new state lies as the old one, whatever XLA would like better:
    another layout would compile the next step anew."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(state, shardings_for(state, mesh))


def _check_microbatches(batch: Batch, count: int) -> None:
    shapes = {name: tuple(array.shape) for name, array in batch.items()}
    if any(not shape or shape[0] != count for shape in shapes.values()):
        raise ValueError(
            f"with accumulate_steps={count} every array is [{count}, batch, ...], got {shapes}; "
            f"reshape with x.reshape({count}, -1, *x.shape[1:])."
        )


# The loop


class BatchesAt:
    """Batches from a pure function of the step (from 0); an iterator whose place can be saved."""

    def __init__(self, function: Callable[[int], Batch], *, step: int = 0):
        """Begins with `function(step)`."""
        self._function, self._step = function, step

    def __iter__(self) -> "BatchesAt":
        return self

    def __next__(self) -> Batch:
        self._step += 1
        return self._function(self._step - 1)

    def get_state(self) -> dict[str, int]:
        """The place: the step of the next batch."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a place."""
        self._step = state["step"]


class Preempted(SystemExit):
    """The run was asked to stop, by SIGTERM or Ctrl-C, and has saved its state. Where nobody
    catches it the program ends, with the exit status that is usual for the signal.

    Attributes:
        step: the step that was saved.
    """

    def __init__(self, step: int, status: int):
        super().__init__(status)
        self.step = step


def fit(
    step: Step,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    steps: int,
    mesh: jax.sharding.Mesh | None = None,
    microbatches: bool = False,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    evaluate_every: int | None = None,
    checkpoints: str | os.PathLike | None = None,
    save_every: int | None = None,
    keep: int = 3,
    best: str | None = None,
    mode: Mode = "max",
    settings: dict[str, Any] | None = None,
    log: str | os.PathLike | None = None,
    tensorboard: bool = False,
    flops: Callable[[Batch], float] | None = None,
    progress: bool = True,
) -> tuple[TrainState, list[Metrics]]:
    """Runs a train step until `state.step == steps`.

    With `checkpoints`, a run that was killed and is started again with the same arguments goes on
    from the last checkpoint with the batches it would have seen, and its losses are the same, on
    CPU bit for bit. SIGTERM and Ctrl-C then let the step finish, save, and raise `Preempted`; a
    second Ctrl-C interrupts at once.

    Args:
        step: from `make_train_step`.
        state: where to start. It is donated; if `checkpoints` holds a later one, that is used.
        batches: dicts of arrays, at least as many as steps. With `checkpoints` their iterator has
            `get_state()` (JSON) and `set_state(state)`, as Grain's and `BatchesAt(function)` do.
        mesh: from `sharding.make_mesh`. State and batches are placed on it; with several processes
            each gives its own rows of every batch.
        microbatches: batches are [M, B, ...], for a step with `accumulate_steps`; only a mesh
            needs to know.
        evaluate: metrics of a state, every `evaluate_every` steps and at the end.
        checkpoints: a folder, written in the background every `save_every` steps and at the end,
            with the last `keep` and the one where the metric `best` of `evaluate` was best (`mode`
            "max" or "min").
        settings: of the run, nested dicts of what JSON can hold; kept in `checkpoints`/run.json,
            and those of a run to be continued must be the same.
        log: a folder for metrics.jsonl, one line per step, and with `tensorboard` event files.
        flops: model FLOPs of a batch, such as `partial(progress.train_flops, model)`: gives the
            utilisation `mfu` on chips that `progress.PEAK_FLOPS` knows.
        progress: show a bar.

    Returns:
        The last state, and one dict per step run here: `step` (from 1), `seconds` since the start,
        `tokens_per_second`, `compilations` of the step so far, the step's metrics and, where it was
        evaluated, those of `evaluate`.

    Raises:
        FloatingPointError: at a loss that is not finite; the step is named, and no checkpoint is
            written of it.
        Preempted: see above.
        SaveError: if a checkpoint cannot be written.
        ValueError: for options without their use, for other settings than those of the run to be
            continued, and if the batches end too early.
    """
    _check_options(evaluate, evaluate_every, checkpoints, save_every, best, mesh)
    iterator = iter(batches)
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            state = shard(state, mesh)
            stack.enter_context(jax.set_mesh(mesh))
        state = _resumed(state, iterator, checkpoints, settings)
        first = int(state.step)
        saver = _saver(stack, checkpoints, keep, best, mode)
        stop = stack.enter_context(_Stop(active=saver is not None))
        log_options: dict[str, Any] = {"tensorboard": tensorboard, "progress": progress}
        out = stack.enter_context(RunLog(log, first=first, steps=steps, **log_options))
        told = _Recorder(out, stack.enter_context(CompilationCounter(step)))
        for number in range(first + 1, steps + 1):
            batch = _next(iterator, number, steps)
            work = flops(batch) if flops else None
            if mesh is not None:
                batch = shard_batch(batch, mesh, microbatches=microbatches)
            state, metrics = step(state, batch)
            told.add(number, metrics, work)
            stops, last = stop.reached(number), number == steps
            evaluates = not stops and (last or _due(number, evaluate_every))
            saves = stops or last or _due(number, save_every)
            if evaluates or saves:
                told.read()  # raises at a loss that is not finite: nothing is saved of it
                scores = evaluate(state) if evaluate and evaluates else {}
                told.finish(scores)
                if saver is not None and saves:
                    place = iterator.get_state()  # type: ignore[attr-defined]
                    saver.save(state, data=place, metrics=_judged(scores, best))
            if stops and saver is not None and not last:
                saver.wait()
                raise stop.preempted(number, checkpoints)
    return state, told.history


def _check_options(evaluate, evaluate_every, checkpoints, save_every, best, mesh) -> None:
    if (evaluate_every and not evaluate) or (save_every and not checkpoints):
        raise ValueError("evaluate_every needs evaluate, and save_every needs checkpoints.")
    if best is not None and not (evaluate and checkpoints):
        raise ValueError(f"best={best!r} needs evaluate, which gives it, and checkpoints.")
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes share this run, so it needs a mesh over all their "
            "devices: mesh=sharding.make_mesh()."
        )


def _resumed(state: TrainState, iterator: Iterator, folder, settings) -> TrainState:
    """The state to begin with; `iterator` goes to its place in the data."""
    if folder is None:
        return state
    if not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        raise ValueError(
            f"checkpoints keep the place in the data, but batches ({type(iterator).__name__}) have "
            "no get_state() and set_state(); give Grain's iterator, data.train_batches, or "
            "BatchesAt(function of the step)."
        )
    if settings is not None:
        check_settings(folder, settings)
    saved, begun = saved_steps(folder), int(state.step)
    if not saved or saved[-1] < begun:
        return state
    state, place = restore(folder, state)
    if place is not None:
        iterator.set_state(place)  # pyright: ignore[reportAttributeAccessIssue]
    elif saved[-1] > begun:
        raise ValueError(
            f"the checkpoint of step {saved[-1]} in {folder} has no place in the data; restore it "
            "with restore_state, and give fit that state and batches that begin there."
        )
    return state


def _saver(stack: contextlib.ExitStack, folder, keep, best, mode) -> Any:
    if folder is None:
        return None
    return stack.enter_context(Checkpoints(folder, keep=keep, best=best, mode=mode))


def _due(number: int, every: int | None) -> bool:
    return bool(every) and number % every == 0


def _next(iterator: Iterator[Batch], number: int, steps: int) -> Batch:
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            f"the batches ended before step {number} of {steps}; give an iterator that repeats "
            "the data, or fewer steps."
        ) from None


def _judged(scores: Metrics, best: str | None) -> dict[str, float] | None:
    """What a checkpoint keeps of an evaluation."""
    if best is not None and scores and best not in scores:
        raise ValueError(f"best={best!r} is not among the metrics of evaluate: {sorted(scores)}.")
    return {name: float(value) for name, value in scores.items()} or None


class _Recorder:
    """Metrics on their way from the device to the log, read one step late, so that the device never
    waits for the host."""

    def __init__(self, out: RunLog, compilations: CompilationCounter):
        self.history: list[Metrics] = []
        self._out, self._compilations = out, compilations
        self._start = self._last = time.perf_counter()
        self._waiting: tuple[int, Metrics, float | None, int] | None = None
        peak = peak_flops(jax.local_devices()[0].device_kind)
        self._peak = peak and peak * jax.local_device_count()

    def add(self, number: int, metrics: Metrics, work: float | None) -> None:
        """Takes a step's metrics, and tells those of the step before."""
        if self._waiting is not None:
            self.read()
            self.finish({})
        self._waiting = number, metrics, work, self._compilations.count

    def read(self) -> None:
        """Waits for the step that was added last."""
        assert self._waiting is not None
        number, metrics, work, compilations = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in metrics.items()}
        _check_finite(number, values)
        now = time.perf_counter()
        took, self._last = max(now - self._last, 1e-9), now
        record = {"step": number, "seconds": now - self._start} | values
        record |= {"tokens_per_second": values["tokens"] / took, "compilations": compilations}
        if work is not None and self._peak:
            record["mfu"] = work / took / self._peak
        self.history.append(record)

    def finish(self, scores: Metrics) -> None:
        """Tells the step that was read last, with the scores of its evaluation."""
        self.history[-1] |= scores
        self._out.write(self.history[-1])
        self._last = time.perf_counter() if scores else self._last


def _check_finite(number: int, values: Metrics) -> None:
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"the loss is {values['loss']} at step {number} ({values['tokens']:.0f} tokens, "
            f"{values['targets']:.0f} targets); lower the learning rate, look at this batch's "
            "labels and ids, or compute in float32."
        )


class _Stop:
    """Notes SIGTERM and Ctrl-C inside a `with`, for the loop to act on between two steps.

    With several processes JAX's preemption service notes SIGTERM, tells the others, and agrees on
    the step to stop at; Ctrl-C is passed on to it.
    """

    def __init__(self, *, active: bool):
        own = active and threading.current_thread() is threading.main_thread()
        self._several = jax.process_count() > 1
        self._active, self._noted, self._before = active, None, {}
        self._signals = () if not own else (signal.SIGINT,) if self._several else _STOPPING

    def __enter__(self) -> "_Stop":
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self._noted = number
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])  # a second one acts at once
        print(f"\n{signal.Signals(number).name}: finishing this step", file=sys.stderr)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether the run shall stop behind this step; all processes agree."""
        if self._active and self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted is not None

    def preempted(self, step: int, folder: Any) -> Preempted:
        """The exception, after a word to the user."""
        if jax.process_index() == 0:
            print(
                f"stopped behind step {step}, which is saved in {folder}; start the same command "
                "again to go on from there.",
                file=sys.stderr,
            )
        return Preempted(step, 128 + (self._noted or signal.SIGTERM))


_STOPPING = (signal.SIGINT, signal.SIGTERM)
