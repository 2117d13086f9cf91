"""What is said of a setting where it stands: its group in `lsg-flax train --help`, and its text."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

Group = Literal["data", "model", "training", "refinements", "devices", "run"]


class Help(NamedTuple):
    """What a setting is, and what is done where it is not given."""

    group: Group
    about: str
    unset: str = "none"
    choices: Callable[[], tuple[str, ...]] | None = None  # of a text that is one of several


of_data, of_model, of_training, of_refinements, of_devices, of_run = (
    functools.partial(Help, group) for group in get_args(Group)
)
