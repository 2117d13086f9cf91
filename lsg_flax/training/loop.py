"""The training loop: runs a train step over batches, with evaluation, saving (states.py) and
logging (log.py)."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from lsg_flax.models import Batch
from lsg_flax.progress import Compiled, count_of, doing, say
from lsg_flax.sharding import shard, shard_batch
from lsg_flax.training.log import CompilationCounter, Logging, RunLog, StepRecorder
from lsg_flax.training.losses import Metrics
from lsg_flax.training.states import (
    Checkpoints,
    Saving,
    check_interval,
    check_settings,
    restore,
    saved_steps,
    saved_waiting,
)
from lsg_flax.training.step import TrainState, TrainStep
from lsg_flax.training.stopping import EarlyStopping, Stop, Waiting


class BatchesAt:
    """Batches from a pure function of the step (from 0); as an iterator with a position to save."""

    def __init__(self, function: Callable[[int], Batch], *, step: int = 0):
        """Starts with the batch `function(step)`."""
        self._function, self._step = function, step

    def __iter__(self) -> "BatchesAt":
        return self

    def __next__(self) -> Batch:
        self._step += 1
        return self._function(self._step - 1)

    def get_state(self) -> dict[str, int]:
        """Returns the position: the step of the next batch."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to a position."""
        self._step = state["step"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a run is evaluated.

    Attributes:
        function: returns the metrics of a state.
        every: steps between two calls; the last step is always evaluated.
        stopping: ends the run early, and saves it, once its metrics stop improving.

    Raises:
        ValueError: if `every` is not a whole number of at least 1.
    """

    function: Callable[[TrainState], Metrics]
    every: int | None = None
    stopping: EarlyStopping | None = None

    def __post_init__(self):
        check_interval("Evaluation", self.every)


def fit(
    step: TrainStep,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    steps: int,
    mesh: jax.sharding.Mesh | None = None,
    microbatches: bool = False,
    evaluation: Evaluation | None = None,
    saving: Saving | None = None,
    logging: Logging | None = None,
) -> tuple[TrainState, list[Metrics]]:
    """Runs a train step until `state.step == steps`, or `evaluation.stopping` ends the run.

    With `saving`, a killed run that is started again with the same arguments resumes from the last
    checkpoint with the batches that it would have seen, and its losses are the same, on CPU bit for
    bit. With `saving`, SIGTERM and Ctrl-C let the step finish, save, and raise `Preempted`; a
    second Ctrl-C interrupts at once.

    Args:
        step: train step from `make_train_step`.
        state: the state to start from. It is donated. If `saving.folder` has a later state, that
            one is used.
        batches: dicts of arrays, at least as many as steps. With `saving` their iterator has
            `get_state()` (JSON) and `set_state(state)`, as Grain's and `BatchesAt(function)` do.
        mesh: from `sharding.make_mesh`. State and batches are sharded over it; with several
            processes each passes its own rows of every batch.
        microbatches: batches are [M, B, ...], for a step with `accumulate_steps`; only needed with
            a mesh.
        evaluation: which metrics of the state are computed, and when.
        saving: when checkpoints are written (in the background), and where.
        logging: what is shown and logged; by default only a progress bar.

    Returns:
        The last state, and one dict per step run here: `step` (from 1), `seconds` since the start,
        `tokens_per_second` of the last ten seconds, `memory_gib` (peak so far), `compilations` of
        the step so far, the step's metrics and, if it was evaluated, those of `evaluation`.

    Raises:
        FloatingPointError: at a loss that is not finite; the error says at which step, and no
            checkpoint of it is written.
        Preempted: see above.
        SaveError: if a checkpoint cannot be written.
        OSError: if another run has the folder of checkpoints open.
        ValueError: if options need others that are missing, if the settings differ from those of
            the run to be resumed, or if the batches end too early.
    """
    _check_options(evaluation, saving, mesh)
    iterator, logging, compiled = iter(batches), logging or Logging(), Compiled()
    with contextlib.ExitStack() as stack:
        state, saver = _begin(stack, state, iterator, mesh=mesh, saving=saving)
        first = int(state.step)
        patience = _Patience(evaluation, saving and saved_waiting(saving.folder, first))
        stop = stack.enter_context(Stop(active=saver is not None))
        out = stack.enter_context(RunLog(logging, first=first, steps=steps))
        counter = stack.enter_context(CompilationCounter(step))
        told = StepRecorder(out, counter, logging.learning_rate)
        for number in range(first + 1, steps + 1):
            if patience.ended:
                patience.say(number - 1, steps)
                break
            batch = _next(iterator, number, steps)
            work = logging.flops(batch) if logging.flops else None
            if mesh is not None:
                batch = shard_batch(batch, mesh, microbatches=microbatches)
            with compiled.call(batch):
                state, metrics = step(state, batch)
            told.add(number, metrics, work)
            stops, last = stop.reached(number), number == steps
            evaluates = evaluation and not stops and (last or _due(number, evaluation.every))
            saves = stops or last or (saving and _due(number, saving.every))
            if evaluates or saves:
                told.read()  # raises if the loss is not finite, before that state is saved
                scores = patience.see(_evaluated(evaluation, state)) if evaluates else {}
                told.finish(scores)
                if saver is not None and (saves or patience.ended):
                    place = iterator.get_state()  # type: ignore[attr-defined]
                    saver.save(state, data=place, scores=scores, waiting=patience.waiting)
            if stops and saver is not None and not last:
                saver.wait()
                raise stop.preempted(number, saver.path)
    return state, told.history


def _check_options(
    evaluation: Evaluation | None, saving: Saving | None, mesh: jax.sharding.Mesh | None
) -> None:
    if saving and saving.best is not None and not evaluation:
        raise ValueError(
            f"best={saving.best!r} needs evaluation, which computes it; give evaluation too."
        )
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes share this run, so it needs a mesh over all their "
            "devices: mesh=sharding.make_mesh()."
        )


def _begin(
    stack: contextlib.ExitStack,
    state: TrainState,
    iterator: Iterator[Batch],
    *,
    mesh: jax.sharding.Mesh | None,
    saving: Saving | None,
) -> tuple[TrainState, Checkpoints | None]:
    """Enters the mesh and opens the checkpoints until `stack` ends; returns the state to start
    from, sharded over the mesh, and the checkpoints."""
    if mesh is not None:
        state = shard(state, mesh)
        stack.enter_context(jax.set_mesh(mesh))
    if saving is None:
        return state, None
    saver = stack.enter_context(Checkpoints(saving))  # first: it locks out other runs
    return _resumed(state, iterator, saving), saver


def _resumed(state: TrainState, iterator: Iterator[Batch], saving: Saving) -> TrainState:
    """Returns the state to start from, and moves `iterator` to its position in the data."""
    if not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        raise ValueError(
            "checkpoints keep the position in the data, but batches "
            f"({type(iterator).__name__}) have no get_state() and set_state(); give Grain's "
            "iterator, data.train_batches, or BatchesAt(function of the step)."
        )
    folder = saving.folder
    if saving.settings is not None:
        check_settings(folder, saving.settings)
    saved, begun = saved_steps(folder), int(state.step)
    if not saved or saved[-1] < begun:
        return state
    state, place = restore(folder, state)
    if place is not None:
        iterator.set_state(place)  # pyright: ignore[reportAttributeAccessIssue]
    elif saved[-1] > begun:
        raise ValueError(
            f"the checkpoint of step {saved[-1]} in {folder} has no position in the data; restore "
            "it with restore_state, and give fit that state and batches that begin there."
        )
    return state


class _Patience:
    """Counts how long a run has waited for better scores, for early stopping."""

    def __init__(self, evaluation: Evaluation | None, saved: Any):
        """Starts from the count in a checkpoint; None if there is none."""
        self._rule = evaluation.stopping if evaluation else None
        self.waiting: Waiting | None = self._rule and saved and Waiting(*saved)

    def see(self, scores: Metrics) -> Metrics:
        """Takes an evaluation's scores, and returns them."""
        if self._rule is not None:
            self.waiting = self._rule.after(self.waiting, scores)
        return scores

    @property
    def ended(self) -> bool:
        return self._rule is not None and self._rule.ends(self.waiting)

    def say(self, number: int, steps: int) -> None:
        """Prints why the run ends."""
        if self._rule is not None and self.waiting is not None and jax.process_index() == 0:
            say(
                f"stopping early, after {number:,} of {steps:,} steps: {self._rule.metric} did not "
                f"improve in {count_of(self.waiting.evaluations, 'evaluation')}; the best was "
                f"{self.waiting.best:.4f}"
            )


def _evaluated(evaluation: Evaluation | None, state: TrainState) -> Metrics:
    assert evaluation is not None
    with doing("evaluating"):
        return evaluation.function(state)


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
