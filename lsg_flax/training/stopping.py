"""Stopping a run before its last step: after a signal, which raises an exception between two steps,
or early, because its score stops improving."""

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from lsg_flax.training.states import BestMode

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Waiting(NamedTuple):
    """The best score so far, and the number of evaluations since then without a better one."""

    best: float
    evaluations: int


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stops a run after `patience` evaluations in a row that do not improve on the best score by
    more than `threshold`, as transformers' EarlyStoppingCallback.

    Attributes:
        metric: name of one of the evaluation's metrics.
        patience: number of evaluations.
        threshold: a difference of scores.
        mode: whether "max" or "min" of it is best.

    Raises:
        ValueError: for a patience below 1 or a negative threshold.
    """

    metric: str
    patience: int
    threshold: float = 0.0
    mode: BestMode = "min"

    def __post_init__(self):
        if self.patience < 1 or self.threshold < 0:
            raise ValueError(
                f"patience={self.patience} must be at least 1, and threshold={self.threshold} at "
                "least 0."
            )

    def after(self, waiting: Waiting | None, scores: Mapping[str, float]) -> Waiting:
        """Returns the updated count after an evaluation with these scores.

        Raises:
            ValueError: if the metric is not among them.
        """
        if self.metric not in scores:
            raise ValueError(
                f"metric={self.metric!r} is not among the metrics of the evaluation; choose one of "
                f"{sorted(scores)}."
            )
        score, sign = float(scores[self.metric]), 1 if self.mode == "max" else -1
        if waiting is None or sign * (score - waiting.best) > self.threshold:
            return Waiting(score, 0)
        best = score if sign * (score - waiting.best) > 0 else waiting.best
        return Waiting(best, waiting.evaluations + 1)

    def ends(self, waiting: Waiting | None) -> bool:
        """Returns whether the run ends."""
        return waiting is not None and waiting.evaluations >= self.patience


class Preempted(SystemExit):
    """Raised after SIGTERM or Ctrl-C, once the run has saved its state. If nothing catches it, the
    program ends with the usual exit status for the signal.

    Attributes:
        step: the step that was saved.
    """

    def __init__(self, step: int, status: int):
        super().__init__(status)
        self.step = step


class Stop:
    """Catches SIGTERM and Ctrl-C inside a `with`, so that the loop can stop between two steps.

    With several processes JAX's preemption service catches SIGTERM, tells the other processes, and
    agrees on the step to stop at; Ctrl-C is passed on to it as SIGTERM.
    """

    def __init__(self, *, active: bool):
        own = active and threading.current_thread() is threading.main_thread()
        self._several = jax.process_count() > 1
        self._active, self._noted, self._before = active, None, {}
        self._signals = () if not own else (signal.SIGINT,) if self._several else _STOPPING

    def __enter__(self) -> "Stop":
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])  # a second one acts at once
        print(f"\n{signal.Signals(number).name}: finishing this step", file=sys.stderr)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Returns whether the run shall stop after this step; all processes agree."""
        if self._active and self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted is not None

    def preempted(self, step: int, folder: str | os.PathLike) -> Preempted:
        """Tells the user how to resume, and returns the exception to raise."""
        if jax.process_index() == 0:
            print(
                f"stopped after step {step}, which is saved in {folder}; start the same command "
                "again to resume from there.",
                file=sys.stderr,
            )
        return Preempted(step, 128 + (self._noted or signal.SIGTERM))
