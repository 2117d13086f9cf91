"""Model cards of a run: the training data, the settings and the scores of a model."""

import dataclasses
import pathlib
from typing import Any

import jax
import yaml

from lsg_flax.data import TokenizedDataset
from lsg_flax.hub import (
    Card,
    card_text,
    check_push,
    open_checkpoint,
    push_folder,
    table,
    write_card,
)
from lsg_flax.progress import count_of
from lsg_flax.training.log import SCORED, read_log
from lsg_flax.training.settings import Settings, Words
from lsg_flax.training.source import SourceModel

# Fields that say where files are or what is shown; they do not change the model.
_PLACES = (
    *("output", "cache", "push_to_hub", "tensorboard", "picture", "log_every", "keep"),
    *("report_to", "run_name"),
)


def check_publishing(settings: Settings) -> None:
    """Raises before training if the hub would refuse the model; see `hub.check_push`."""
    if settings.push_to_hub is not None and jax.process_index() == 0:
        check_push(settings.push_to_hub)


def publish(
    settings: Settings, source: SourceModel, train: TokenizedDataset, step: int, best: int | None
) -> str | None:
    """Writes the model cards of a run and pushes the model to the hub if `push_to_hub` is set.

    A card that somebody else has written is kept. The best model is pushed, or the last one if
    there is no best. Only the first process writes and pushes.

    Args:
        train: the training data.
        step: the step of the model in OUTPUT.
        best: the step of the model in OUTPUT/best; None if there is none.

    Returns:
        The address of the pushed model; None if nothing was pushed.

    Raises:
        hub.PushError: if the model could not be pushed.
    """
    if jax.process_index() > 0:
        return None
    output = pathlib.Path(settings.output)
    steps = {output: step} | ({} if best is None else {output / "best": best})
    for folder, of in steps.items():
        made, card = open_checkpoint(folder), _card(settings, train, of)
        name = settings.push_to_hub or output.resolve().name
        write_card(folder, card_text(card, name, made, source.checkpoint, settings.model))
    return None if settings.push_to_hub is None else push_folder([*steps][-1], settings.push_to_hub)


def _card(settings: Settings, train: TokenizedDataset, step: int) -> Card:
    """Returns the card of the model of a step."""
    scores = _scores_at(pathlib.Path(settings.output) / "log", step)
    learned, held_out = (_shown(data) for data in (settings.train_data, settings.eval_data))
    rows: dict[str, object] = {
        "data": learned,
        "rows": f"{len(train):,}",
        "tokens of a row": ", ".join(f"{name} {n:,}" for name, n in train.spread.items()),
        "truncated": train.cut.words(train.options["max_length"]) or "nothing",
    }
    sections = {"Training data": table(rows)}
    if scores:
        values = {name: f"{value:.4f}" for name, value in scores.items()}
        sections[f"Scores on {held_out}"] = table(values, ("score", "value"))
    sections["Settings of `lsg-flax train`"] = f"```yaml\n{_given(settings)}```"
    about = (
        f"`{_shown(settings.model)}`, trained for {settings.task} by lsg_flax, "
        f"{count_of(step, 'step')}, in {settings.dtype}."
    )
    return Card(about, sections, scores, held_out)


def _shown(value: Words | None) -> str:
    """Returns the names of data; of files only the last part, since a card is for other people."""
    return ", ".join(_name(part) for part in ([value] if isinstance(value, str) else value or ()))


def _name(value: Any) -> Any:
    """Returns a value; of a text that is a path on this machine only its last part."""
    if not isinstance(value, str):
        return value
    place = pathlib.Path(value)
    return place.absolute().name if place.is_absolute() or place.exists() else value


def _scores_at(log: pathlib.Path, step: int) -> dict[str, float]:
    """Returns the scores of a step; empty if that step was not evaluated."""
    records = [record for record in read_log(log) if record["step"] == step]
    record = records[-1] if records else {}
    return {n.removeprefix(SCORED): v for n, v in record.items() if n.startswith(SCORED)}


def _given(settings: Settings) -> str:
    """Returns the settings that differ from their defaults, as the YAML of a settings file."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value == default or field.name in _PLACES:
            continue
        values[field.name] = (
            [_name(part) for part in value] if isinstance(value, tuple) else _name(value)
        )
    return yaml.safe_dump(values, sort_keys=False)
