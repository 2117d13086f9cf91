"""Help of a setting, kept beside its field: its group in `lsg-flax train --help` and its text."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

Group = Literal["data", "model", "training", "refinements", "devices", "run"]


class Help(NamedTuple):
    """What a setting means (about), and what happens if it is not given (unset)."""

    group: Group
    about: str
    unset: str = "none"
    choices: Callable[[], tuple[str, ...]] | None = None  # the allowed texts


of_data, of_model, of_training, of_refinements, of_devices, of_run = (
    functools.partial(Help, group) for group in get_args(Group)
)
