"""Reports of a run, beside its own log, to TensorBoard, Weights & Biases and MLflow.

Each package finds the place to report to in its own way, such as by a login, WANDB_PROJECT or
MLFLOW_TRACKING_URI.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from lsg_flax.files import read_json, write_aside
from lsg_flax.training.coerce import check_names

IDS = "reported.json"  # the services' ids of the run, so that a resumed run continues there
_INSTALL = {
    "tensorboard": ("tensorboardX", "pip install 'lsg-flax[tensorboard]'"),
    "wandb": ("wandb", "pip install wandb"),
    "mlflow": ("mlflow", "pip install mlflow"),
}
REPORTS = tuple(_INSTALL)


@dataclasses.dataclass(frozen=True)
class Reporting:
    """Where a run is reported.

    Attributes:
        to: some of "tensorboard", "wandb", "mlflow".
        run_name: name of the run there; None leaves it to the package.
        settings: settings of the run, shown beside its curves.

    Raises:
        ValueError: for an unknown name in `to`.
        ImportError: if a package is not installed.
    """

    to: tuple[str, ...] = ()
    run_name: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_names("report_to", self.to, REPORTS)
        for name in self.to:
            _package(name)


@runtime_checkable
class Report(Protocol):
    """An open report, which takes the numbers of steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Reports the numbers of a step."""

    def close(self, *, failed: bool) -> None:
        """Ends the report."""


def open_reports(
    reporting: Reporting, folder: str | os.PathLike | None, *, first: int
) -> list[Report]:
    """Opens the reports in `reporting.to`.

    Args:
        folder: folder of the run's log, where the services' ids of the run are kept; None does not
            keep them.
        first: number of steps that are done already.
    """
    opened: list[Report] = []
    for name in reporting.to:
        ids = _Ids(None if folder is None else pathlib.Path(folder), name)
        opened.append(_OPEN[name](reporting, ids, first))
    return opened


class _Ids:
    """The id of this run in one of the services."""

    def __init__(self, folder: pathlib.Path | None, name: str):
        self.folder, self._name = folder, name
        self._all: dict[str, str] = {}
        if folder is not None and (folder / IDS).exists():
            self._all = read_json(folder / IDS)

    def get(self) -> str | None:
        return self._all.get(self._name)

    def keep(self, value: str) -> None:
        if self.folder is not None and value != self.get():
            written = json.dumps(self._all | {self._name: value})
            write_aside(self.folder / IDS, f"{written}\n".encode())


class _TensorBoard:
    def __init__(self, reporting: Reporting, ids: _Ids, first: int):
        # File names have seconds: a run that resumes at once must not replace its own file.
        suffix = f".{uuid.uuid4().hex}"
        writer = _package("tensorboard").SummaryWriter
        self._board = writer(str(ids.folder), purge_step=first + 1, filename_suffix=suffix)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._board.close()


class _WandB:
    """W&B drops steps that a resumed run computes again; their numbers are the same."""

    def __init__(self, reporting: Reporting, ids: _Ids, first: int):
        known, where = ids.get(), ids.folder and str(ids.folder)
        self._run = _package("wandb").init(
            id=known,
            resume="allow" if known else None,
            name=reporting.run_name,
            config=dict(reporting.settings),
            dir=where,
        )
        ids.keep(self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """MLflow would keep both numbers of a step that is logged twice, and can delete neither: steps
    that a resumed run computes again, and that are there, are not logged. They are the same."""

    def __init__(self, reporting: Reporting, ids: _Ids, first: int):
        self._package, known = _package("mlflow"), ids.get()
        run = self._package.start_run(run_id=known, run_name=None if known else reporting.run_name)
        if known is None:
            settings = {name: str(value) for name, value in reporting.settings.items()}
            self._package.log_params(settings)
        client = self._package.MlflowClient()
        self._logged = {
            name: {m.step for m in client.get_metric_history(known, name) if m.step > first}
            for name in (run.data.metrics if known else ())
        }
        ids.keep(run.info.run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        new = {n: value for n, value in values.items() if step not in self._logged.get(n, ())}
        if new:
            self._package.log_metrics(new, step=step, synchronous=False)

    def close(self, *, failed: bool) -> None:
        self._package.end_run("FAILED" if failed else "FINISHED")


_OPEN: dict[str, Callable[[Reporting, _Ids, int], Report]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def _package(name: str) -> Any:
    package, install = _INSTALL[name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"report_to={name!r} needs the package {package}: {install}.") from error
