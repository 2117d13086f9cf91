"""Checkpoints of a training state: Orbax writes them in the background, whole or not at all.

A folder has one subfolder per step, named by its number. Beside the state a checkpoint holds the
position in the data (one entry per process) and the metrics of its evaluation. `run.json` in the
same folder holds the settings of the run; they are compared when a run resumes.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.utils import checkpoint_steps

from lsg_flax.files import check_folder, differences, read_json, write_aside
from lsg_flax.locks import PlaceTaken, locked

BestMode = Literal["max", "min"]
RUN = "run.json"


class SaveError(RuntimeError):
    """A checkpoint could not be written; those written before are intact."""


def check_interval(record: str, every: int | None) -> None:
    """Raises ValueError unless `every` is None or a whole number of steps, at least 1."""
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(
            f"{record}(every={every!r}): give a whole number of steps of at least 1, or None."
        )


@dataclasses.dataclass(frozen=True)
class Saving:
    """When a run's state is saved, besides at its end, and which checkpoints are kept.

    Attributes:
        folder: folder of the checkpoints; created if needed.
        every: steps between two checkpoints.
        keep: how many of the last checkpoints are kept.
        best: name of a metric; the checkpoint with its best value is kept as well.
        mode: whether "max" or "min" of the metric is best.
        settings: settings of the run, as nested dicts that JSON can represent. They are written to
            run.json; a run can be resumed only with the same settings.

    Raises:
        ValueError: for a folder that is a file, if `keep` is not positive, or for an unknown mode.
    """

    folder: str | os.PathLike
    every: int | None = None
    keep: int = 3
    best: str | None = None
    mode: BestMode = "max"
    settings: dict[str, Any] | None = None

    def __post_init__(self):
        check_folder("folder", self.folder)
        check_interval("Saving", self.every)
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} must be at least 1.")
        if self.mode not in get_args(BestMode):
            raise ValueError(f"mode={self.mode!r} must be 'max' or 'min'.")


class Checkpoints:
    """An open folder of checkpoints, for use in a `with`; leaving it waits for the last write.

    With several processes, all of them make the same calls.
    """

    def __init__(self, saving: Saving):
        """Opens the folder for writing.

        Raises:
            PlaceTaken: if another run has it open; Orbax would delete what that run writes.
        """
        self.path, self._best = pathlib.Path(saving.folder), saving.best
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked_for_run(self.path))
            with _damage_named(self.path):
                self._checkpointer = _checkpointer(saving)
            self._lock = stack.pop_all()
        self._writing: int | None = None

    def save(
        self,
        state: Any,
        *,
        data: Any = None,
        scores: dict[str, float] | None = None,
        waiting: Any = None,
    ) -> None:
        """Starts saving the state as the checkpoint of its step. Waits for an earlier save, and
        returns when the state is copied off the devices, so that the next step may overwrite it.

        Args:
            data: position in the data, any value that JSON can represent; each process passes its
                own.
            scores: scores of an evaluation; `best` is one of them.
            waiting: count of early stopping, any value that JSON can represent.

        Raises:
            ValueError: if the step already exists, or `best` is not among the scores.
            SaveError: if the save before this one, or the copying, failed.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps:
            raise ValueError(
                f"{self.path} already has a checkpoint of step {step}; resume from it, or choose "
                "another folder."
            )
        if self._best is not None and scores and self._best not in scores:
            raise ValueError(
                f"best={self._best!r} is not among the metrics of the evaluation; choose one of "
                f"{sorted(scores)}."
            )
        metrics = {name: float(value) for name, value in (scores or {}).items()} or None
        places = {"data": _of_all_processes(data)} | ({"waiting": waiting} if waiting else {})
        self._writing = step
        with self._explained():
            self._checkpointer.save_async(
                step, state, force=True, metrics=metrics, custom_metadata=places
            )

    def wait(self) -> None:
        """Waits until nothing is being written any more.

        Raises:
            SaveError: if the write failed.
        """
        with self._explained():
            self._checkpointer.wait()
        self._writing = None

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, in ascending order."""
        return [s.step for s in self._checkpointer.checkpoints if s.step != self._writing]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failed, self._writing = self._writing, None
            intact = [step for step in saved_steps(self.path) if step != failed]
            raise SaveError(
                f"the checkpoint of step {failed} could not be written to {self.path}: {error}. "
                f"The checkpoints of steps {intact} there are intact; free disk space, or repair "
                "what the message says, and run again to resume from the last one."
            ) from error

    def close(self) -> None:
        """Waits for the last write and releases the folder."""
        try:
            self.wait()
        finally:
            with self._lock, contextlib.suppress(Exception):  # `wait` has already raised it
                self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            return self.close()
        with contextlib.suppress(SaveError):  # the error that is being raised matters more
            self.close()


@contextlib.contextmanager
def locked_for_run(folder: pathlib.Path) -> Iterator[None]:
    """Locks a folder for this run, inside a `with`: its first process holds the lock, and all of
    its processes fail if another run holds it.

    Raises:
        OSError: as `locks.locked`.
    """
    with contextlib.ExitStack() as stack:
        refused: OSError | None = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locked(folder))
            except OSError as error:
                refused = error
        if jax.process_count() > 1:
            stops = multihost_utils.broadcast_one_to_all(np.int32(refused is not None))
            if stops and refused is None:
                refused = PlaceTaken(f"the first process of this run could not lock {folder}.")
        if refused is not None:
            raise refused
        yield


def save_state(path: str | os.PathLike, state: Any, *, keep: int = 3, data: Any = None) -> None:
    """Saves the state under `path`/<its step> and returns when it is written. An interrupted save
    leaves nothing that is ever restored. All but the last `keep` checkpoints are deleted.

    Raises:
        ValueError: if `keep` is not positive or the step already exists.
        SaveError: if it cannot be written.
    """
    with Checkpoints(Saving(path, keep=keep)) as checkpoints:
        checkpoints.save(state, data=data)


def restore_state(path: str | os.PathLike, abstract_state: Any, *, step: int | None = None) -> Any:
    """Restores the state saved at `step`, by default the last one.

    Args:
        abstract_state: a state of the same structure, concrete or of `jax.ShapeDtypeStruct`; the
            result has its dtypes and shardings, so a run may resume on another mesh.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is of another model or optimizer (both sides are listed).
    """
    return restore(path, abstract_state, step=step)[0]


def restore(
    path: str | os.PathLike, abstract_state: Any, *, step: int | None = None
) -> tuple[Any, Any]:
    """Restores the state as `restore_state` does, and the position in the data (None if none was
    saved).

    Raises:
        FileNotFoundError, ValueError: as `restore_state`; also if another number of processes saved
            it and their positions in the data differ.
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
    with contextlib.ExitStack() as stack:
        with _damage_named(path, step):
            checkpointer = stack.enter_context(ocp.training.Checkpointer(_absolute(path)))
            saved = checkpointer.metadata(step)
            if saved.metadata is None:
                raise ValueError("the names and shapes of its arrays cannot be read")
        _check_same_tree(path, saved.metadata, abstract)
        places = (saved.custom_metadata or {}).get("data", [None])
        with _damage_named(path, step):
            state = checkpointer.load(step, abstract)
        return state, _own(places, path)


def saved_waiting(path: str | os.PathLike, step: int) -> Any:
    """Returns the value that was saved as `waiting` at a step; None if there is no such value or
    checkpoint."""
    if step not in saved_steps(path):
        return None
    with _damage_named(path, step), ocp.training.Checkpointer(_absolute(path)) as checkpointer:
        return (checkpointer.metadata(step).custom_metadata or {}).get("waiting")


def saved_steps(path: str | os.PathLike) -> list[int]:
    """Returns the steps of the checkpoints under `path`, in ascending order; empty if there is no
    such folder."""
    if not pathlib.Path(path).is_dir():
        return []
    return sorted(checkpoint_steps(_absolute(path)))  # asks no other process


def best_step(path: str | os.PathLike, metric: str, *, mode: BestMode = "max") -> int:
    """Returns the step of the checkpoint under `path` where `metric` was best; of equal ones the
    last.

    Raises:
        FileNotFoundError: if no checkpoint has the metric.
    """
    saved = {step: m for step, m in _saved_metrics(path).items() if metric in (m or {})}
    if not saved:
        raise FileNotFoundError(
            f"no checkpoint in {path} has the metric {metric!r}; its steps are "
            f"{saved_steps(path)}. Only a step that is both evaluated and saved has metrics."
        )
    return max(saved, key=lambda step: (_rank(saved[step], metric, mode), step))


def stored_settings(path: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the settings in `path`/run.json; None if there is no such file, and raises ValueError
    if it is damaged."""
    file = pathlib.Path(path) / RUN
    return read_json(file) if file.exists() else None


def check_settings(
    path: str | os.PathLike, settings: dict[str, Any], *, follows: Collection[str] = ()
) -> None:
    """Compares the settings of a run with those in `path`/run.json. The file is written if it is
    missing, or if its run has saved no checkpoint yet.

    Args:
        settings: what must be the same to resume the run, such as the model's config, the task, and
            the settings of optimizer and batches, as nested dicts that JSON can represent.
        follows: names in `settings` whose values follow from the others. The error names them only
            if nothing else differs.

    Raises:
        ValueError: if they differ, with each field; or if there are checkpoints without settings.
    """
    stored, steps = stored_settings(path), saved_steps(path)
    wanted = json.loads(json.dumps(settings))  # tuples are lists in JSON
    if stored is not None and steps:
        missing = "(not set)"
        different = {
            path: "{}: {} then, {} now".format(
                path, *(value if value is missing else json.dumps(value) for value in values)
            )
            for path, *values in differences(stored, wanted, missing)
        }
        own = [words for path, words in different.items() if path.split(".")[0] not in follows]
        if different:
            raise ValueError(
                f"the run in {path} has other settings: {'; '.join(own or different.values())}. "
                "Resume it with its own, or choose another folder for a new run."
            )
    elif steps:
        raise ValueError(
            f"{path} has checkpoints of steps {steps} but no {RUN}, so their settings are "
            "unknown; resume without settings, or choose another folder."
        )
    elif jax.process_index() == 0:
        write_aside(pathlib.Path(path) / RUN, f"{json.dumps(wanted, indent=2)}\n".encode())


def _checkpointer(saving: Saving) -> Any:
    """Returns Orbax's checkpointer; it keeps what `saving` says and saves whenever it is called."""
    policies: Any = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(saving.keep)]
    if saving.best is not None:
        rank = functools.partial(_rank, name=saving.best, mode=saving.mode)
        kept.append(policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False))
    preserved: Any = policies.AnyPreservationPolicy(kept)
    always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    return ocp.training.Checkpointer(
        _absolute(saving.folder),
        preservation_policy=preserved,
        save_decision_policy=always,
        cleanup_tmp_directories=True,
    )


@contextlib.contextmanager
def _damage_named(path: str | os.PathLike, step: int | None = None) -> Iterator[None]:
    """Raises ValueError with the checkpoint that cannot be read and what to do; Orbax's own errors
    do not say it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, FileNotFoundError) as error:
        steps = saved_steps(path)
        without_step = (s for s in reversed(steps) if not _scores_readable(path, s))
        step = next(without_step, step if step is not None else steps[-1] if steps else None)
        if step is None:
            raise
        before = [s for s in steps if s < step]
        goes_on = f"resume from step {before[-1]}" if before else "start over"
        raise ValueError(
            f"the checkpoint {pathlib.Path(path) / str(step)} cannot be read "
            f"({error!s:.200}); if it is damaged, delete this folder to {goes_on}."
        ) from error


def _scores_readable(path: str | os.PathLike, step: int) -> bool:
    """Returns whether a checkpoint's scores are valid JSON; Orbax reads those of all checkpoints
    when it opens a folder."""
    file = pathlib.Path(path) / str(step) / "metrics" / "metrics"
    try:
        return not file.exists() or isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def _absolute(path: str | os.PathLike) -> str:
    return str(pathlib.Path(path).absolute())


def _saved_metrics(path: str | os.PathLike) -> dict[int, dict[str, float] | None]:
    if not pathlib.Path(path).is_dir():
        return {}
    with _damage_named(path), ocp.training.Checkpointer(_absolute(path)) as checkpointer:
        return {saved.step: saved.metrics for saved in checkpointer.checkpoints}


def _rank(metrics: dict[str, float] | None, name: str, mode: BestMode) -> float:
    """Returns a rank of metrics, higher is better; a checkpoint without the metric is worst."""
    value = (metrics or {}).get(name)
    return float("-inf") if value is None else value if mode == "max" else -value


def _of_all_processes(data: Any) -> list[Any]:
    """Returns the `data` of all processes, in their order."""
    try:
        text = json.dumps(data).encode()
    except TypeError as error:
        raise TypeError(
            "the state of the batches must be a value that JSON can represent, got "
            f"{type(data).__name__}: {error}."
        ) from error
    if jax.process_count() == 1:
        return [data]
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).reshape(-1)
    row = np.zeros(int(sizes.max()), np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def _own(places: list[Any], path: Any) -> Any:
    """Returns this process's entry or, if the number of processes changed, the common one."""
    if len(places) == jax.process_count():
        return places[jax.process_index()]
    if any(place != places[0] for place in places):
        raise ValueError(
            f"{path} was saved by {len(places)} processes at different positions in their data, "
            f"and cannot be resumed by {jax.process_count()}; use {len(places)} processes."
        )
    return places[0]


def _check_same_tree(path, saved: Any, wanted: Any) -> None:
    """Raises ValueError with the names and shapes that differ; Orbax's own error has no names."""
    different = differences(_shapes_by_name(saved), _shapes_by_name(wanted))
    missing = [name for name, there, _ in different if there is None]
    unexpected = [name for name, _, here in different if here is None]
    shapes = [
        f"{name}: {there} in the checkpoint, {here} wanted"
        for name, there, here in different
        if None not in (there, here) and name != "key"
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"the checkpoint in {path} is of another model or optimizer; missing in it: "
            f"{missing[:8]}, unexpected in it: {unexpected[:8]}, of another shape: {shapes[:8]}. "
            "Give the model and optimizer that it was saved with."
        )


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
