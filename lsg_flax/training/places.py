"""Checks of the folders that a run writes to: they must not hold its data, its model, or models
that it has not made."""

import pathlib

from lsg_flax import hub
from lsg_flax.data import files_at
from lsg_flax.files import check_folder, lies_in
from lsg_flax.training.settings import Words
from lsg_flax.training.states import saved_steps


def check_run_folder(
    output: pathlib.Path, source: hub.Checkpoint, data: tuple[Words | None, ...]
) -> None:
    """Raises ValueError unless OUTPUT is new or from an earlier call of the same run, and none of
    its files are, or would become, data."""
    check_folder("output", output)
    for words in data:
        for file in files_at(words or ()):
            if lies_in(file, output):
                raise ValueError(
                    f"output={output} holds the data file {file}; give a folder without data."
                )
        for path in [words] if isinstance(words, str) else words or ():
            folder = pathlib.Path(path)
            if folder.is_dir() and folder.resolve() in (place := output.resolve(), *place.parents):
                raise ValueError(
                    f"output={output} is inside the data folder {path}, so the run's files would "
                    "be read as data; give another folder."
                )
    if output.is_dir() and any(output.samefile(place) for place in (source.root, source.folder)):
        raise ValueError(f"output={output} is the model to train; give another folder.")
    there = sorted(file.name for file in output.iterdir()) if output.is_dir() else []
    taken = [name for name in there if name == "best" or hub.is_model_file(name)]
    if taken and not saved_steps(output / "checkpoints"):
        raise ValueError(
            f"output={output} holds a model that this run has not made ({', '.join(taken)}), which "
            "is not overwritten; give another folder."
        )


def check_cache_folder(cache: pathlib.Path, source: hub.Checkpoint, data: Words) -> None:
    """Raises ValueError if the cache is the folder of the model or of the data."""
    places = [source.root, source.folder, *(file.parent for file in files_at(data))]
    for place in places:
        if cache.resolve() == place.resolve():
            raise ValueError(
                f"cache={cache} holds the model or the data; give a folder of its own, or leave it "
                "out."
            )
