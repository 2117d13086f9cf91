"""A run that is asked to stop: signals noted between two steps, and the exception that tells it."""

import os
import signal
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Preempted(SystemExit):
    """The run was asked to stop, by SIGTERM or Ctrl-C, and has saved its state. Where nobody
    catches it the program ends, with the exit status that is usual for the signal.

    Attributes:
        step: the step that was saved.
    """

    def __init__(self, step: int, status: int):
        super().__init__(status)
        self.step = step


class Stop:
    """Notes SIGTERM and Ctrl-C inside a `with`, for the loop to act on between two steps.

    With several processes JAX's preemption service notes SIGTERM, tells the others, and agrees on
    the step to stop at; Ctrl-C is passed on to it.
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
        """Whether the run shall stop behind this step; all processes agree."""
        if self._active and self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted is not None

    def preempted(self, step: int, folder: str | os.PathLike) -> Preempted:
        """The exception, after a word to the user."""
        if jax.process_index() == 0:
            print(
                f"stopped behind step {step}, which is saved in {folder}; start the same command "
                "again to go on from there.",
                file=sys.stderr,
            )
        return Preempted(step, 128 + (self._noted or signal.SIGTERM))
