"""Progress bar and metric logs of a run (JSON lines, TensorBoard and others), with compilation
counts and the share of the chip's peak FLOP/s that is used."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import numpy as np

from lsg_flax.files import check_folder, write_aside
from lsg_flax.models import Batch
from lsg_flax.progress import INTERVAL, Bar
from lsg_flax.training.flops import peak_flops
from lsg_flax.training.losses import Metrics
from lsg_flax.training.reports import Report, Reporting, open_reports

_SHOWN = {  # in the progress bar
    "loss": "loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "learning_rate": "learning rate {:.3g}",
    "memory_gib": "{:.2f} GiB at most",
    "mfu": "MFU {:.1%}",
    "compilations": "compiled {}x",
}
_GIB = 2**30
METRICS = "metrics.jsonl"
SCORED = "eval_"  # prefix of the names of an evaluation's scores


class CompilationCounter:
    """Counts how often XLA compiles a jitted function, inside a `with`. A program that JAX loads
    from its persistent cache counts too.

    Attributes:
        count: compilations so far.
    """

    def __init__(self, function: Callable):
        self.count = 0
        self._names = {f"jit({function.__name__})", function.__name__}

    def _listen(self, event: str, duration_secs: float, **details: Any) -> None:
        if event.endswith("/backend_compile_duration") and details.get("fun_name") in self._names:
            self.count += 1

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


@dataclasses.dataclass(frozen=True)
class Logging:
    """What a run shows and logs.

    Attributes:
        folder: folder of metrics.jsonl, which gets one line per step; None writes nothing.
        tensorboard: write event files there too, with the package tensorboardX.
        flops: function that returns the model FLOPs of a batch, such as
            `partial(train_flops, model)`; it gives the utilisation `mfu`, a share, on chips that
            `PEAK_FLOPS` knows.
        progress: show a progress bar, or lines if stderr is not a terminal.
        every: steps between two lines; by default there is one every ten seconds. Evaluated steps
            and the last one always have a line.
        learning_rate: function that returns the learning rate of a step (from 0), which is shown
            and logged too.
        reporting: other services that get the numbers of the log.

    Raises:
        ValueError: if the folder is a file, or for tensorboard without a folder.
        ImportError: if a package that reporting needs is not installed.
    """

    folder: str | os.PathLike | None = None
    tensorboard: bool = False
    flops: Callable[[Batch], float] | None = None
    progress: bool = True
    every: int | None = None
    learning_rate: Callable[[int], float] | None = None
    reporting: Reporting = dataclasses.field(default_factory=Reporting)

    def __post_init__(self):
        if self.folder is not None:
            check_folder("folder", self.folder)
        if self.tensorboard and "tensorboard" not in self.reporting.to:
            more = dataclasses.replace(self.reporting, to=(*self.reporting.to, "tensorboard"))
            object.__setattr__(self, "reporting", more)
        if "tensorboard" in self.reporting.to and self.folder is None:
            raise ValueError("tensorboard=True needs a folder to write to; give folder=FOLDER too.")


class RunLog:
    """Progress bar and log files of a run, inside a `with`; only process 0 shows and writes."""

    def __init__(self, logging: Logging, *, first: int = 0, steps: int):
        """Opens the files.

        Args:
            first: number of steps that are done already. Lines of later steps, which a killed run
                has logged but not saved, are deleted.
            steps: number of the last step.
        """
        speaks = jax.process_index() == 0
        self._logging, self._steps = logging, steps
        self._lines = None
        self._reports: list[Report] = []
        if logging.folder is not None and speaks:
            file = pathlib.Path(logging.folder) / METRICS
            file.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(file, first)
            self._lines = file.open("a", buffering=1)  # each line goes out when it is whole
        if speaks:
            self._reports = open_reports(logging.reporting, logging.folder, first=first)
        bar_shown = logging.progress and speaks
        self._bar = Bar("steps", total=steps, initial=first, shown=bar_shown)

    def write(self, record: Metrics) -> None:
        """Logs and shows the record of a step: `step`, `loss`, and whatever else it has."""
        number, every = record["step"], self._logging.every
        if self._lines is not None:
            self._lines.write(json.dumps(record) + "\n")
        for report in self._reports:
            report.write(number, {name: record[name] for name in record if name != "step"})
        self._bar.update(number - self._bar.done, _summary(record))
        evaluated = any(name.startswith(SCORED) for name in record)
        if evaluated or number == self._steps or (every and number % every == 0):
            self._bar.tell()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.close()
        if self._lines is not None:
            self._lines.close()
        for report in self._reports:
            report.close(failed=kind is not None)


def _summary(record: Metrics) -> str:
    parts = [text.format(record[name]) for name, text in _SHOWN.items() if name in record]
    parts += [f"{name} {record[name]:.4f}" for name in record if name.startswith(SCORED)]
    return ", ".join(parts)


def _peak_memory() -> float | None:
    """Returns the peak memory so far in GiB: of the fullest device of this process or, if devices
    do not count it (CPU), of the process. None if it is unknown."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [
        found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found
    ]
    if peaks:
        return max(peaks) / _GIB
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def read_log(folder: pathlib.Path) -> list[Metrics]:
    """Returns the records of a run's steps in a folder; empty if there is no log."""
    file = folder / METRICS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _drop_after(file: pathlib.Path, last: int) -> None:
    """Deletes the lines of steps after `last`, and an incomplete last line of a killed run."""
    if not file.exists():
        return
    text = file.read_text()
    whole, kept = text.splitlines(keepends=True), []
    for number, line in enumerate(whole, 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(whole):
                break
            raise ValueError(
                f"line {number} of {file} is not the record of a step: {line[:80]!r}; repair or "
                "move the file, or log to another folder."
            ) from error
        if step <= last and line.endswith("\n"):
            kept.append(line)
    if "".join(kept) != text:
        write_aside(file, "".join(kept).encode())


class StepRecorder:
    """Passes metrics from the device to the log. It reads them one step late, so that the device
    never waits for the host."""

    def __init__(
        self,
        out: RunLog,
        compilations: CompilationCounter,
        learning_rate: Callable[[int], float] | None = None,
    ):
        self.history: list[Metrics] = []
        self._learning_rate = learning_rate
        self._out, self._compilations = out, compilations
        self._start = self._last = time.perf_counter()
        self._waiting: tuple[int, Metrics, float | None, int] | None = None
        # The time of a single step gives no rate: the next step runs while its metrics are read,
        # and may be done by then.
        self._recent: collections.deque[np.ndarray] = collections.deque()
        self._sums = np.zeros(3)  # sums of the recent seconds, tokens, FLOPs
        peak = peak_flops(jax.local_devices()[0].device_kind)
        self._peak = peak and peak * jax.local_device_count()

    def add(self, number: int, metrics: Metrics, work: float | None) -> None:
        """Takes a step's metrics, and logs those of the step before."""
        if self._waiting is not None:
            self.read()
            self.finish({})
        self._waiting = number, metrics, work, self._compilations.count

    def read(self) -> None:
        """Waits for the metrics of the step that was added last."""
        assert self._waiting is not None
        number, metrics, work, compilations = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in metrics.items()}
        _check_finite(number, values)
        now = time.perf_counter()
        took, self._last = max(now - self._last, 1e-9), now
        record = {"step": number, "seconds": now - self._start} | values
        seconds, tokens, flops = self._of_interval(took, values["tokens"], work or 0.0)
        record |= {"tokens_per_second": tokens / seconds, "compilations": compilations}
        if self._learning_rate is not None:
            record["learning_rate"] = self._learning_rate(number - 1)
        if (memory := _peak_memory()) is not None:
            record["memory_gib"] = memory
        if work is not None and self._peak:
            record["mfu"] = flops / seconds / self._peak
        self.history.append(record)

    def _of_interval(self, *step: float) -> list[float]:
        """Returns the sums of seconds, tokens and FLOPs over this step and those before it, back to
        about INTERVAL seconds."""
        self._recent.append(np.array(step))
        self._sums += self._recent[-1]
        while self._sums[0] - self._recent[0][0] >= INTERVAL:
            self._sums -= self._recent.popleft()
        return self._sums.tolist()

    def finish(self, scores: Metrics) -> None:
        """Logs the step that was read last, with the scores of its evaluation."""
        taken = sorted(scores.keys() & self.history[-1].keys())
        if taken:
            raise ValueError(
                f"the evaluation returns {taken}, which are names of a step's own metrics; use "
                "other names."
            )
        self.history[-1] |= {name: float(value) for name, value in scores.items()}
        self._out.write(self.history[-1])
        self._last = time.perf_counter() if scores else self._last


def _check_finite(number: int, values: Metrics) -> None:
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"the loss is {values['loss']} at step {number} ({values['tokens']:.0f} tokens, "
            f"{values['targets']:.0f} targets); lower the learning rate, look at this batch's "
            "labels and ids, or compute in float32."
        )
