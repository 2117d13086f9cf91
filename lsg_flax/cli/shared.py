"""Shared parts of the commands: options that several have, and output to the terminal."""

import argparse
import contextlib
import pathlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from rich.console import Console

from lsg_flax.cli.flags import in_flags
from lsg_flax.data import DatasetPart
from lsg_flax.files import read_lines
from lsg_flax.patterns import MAX_GLOBAL_TOKENS, SPARSITY_TYPES, LSGConfig
from lsg_flax.pipelines import COLUMNS, BrokenLines, head_named
from lsg_flax.progress import count_of, say
from lsg_flax.sharding import AXES

# Options is a parser or a group of options, Commands its subparsers; argparse has no public types
# for groups and subparsers.
Options = Any
Commands = Any

# Words of messages about INPUT for the commands that read documents, and about the mesh.
READING_SPELLED = {"text_column='": "columns='text=", "broken_lines=": "on_error="}
_FEWER_DEVICES = " To use fewer, pass devices=jax.devices()[:n]."
DEVICES_SPELLED = {_FEWER_DEVICES: " To use fewer, give --devices N."}
NEEDED = "(required"  # in the help of a required option that may also come from a settings file
_PIPED_WIDTH = 120
_NUMBERS = ("num_global_tokens", "block_size", "sparse_block_size", "sparsity_factor")


class _RequiredFirst(argparse.RawDescriptionHelpFormatter):
    """Shows required options first, and only these in the usage line."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        needed = [a for a in actions if _is_needed(a) or not a.option_strings]
        rest = argparse.Action([], "options", nargs="?", metavar="options")
        super().add_usage(usage, [*needed, rest], [], prefix)

    def add_arguments(self, actions: Any) -> None:
        super().add_arguments(sorted(actions, key=lambda action: not _is_needed(action)))


def _is_needed(action: argparse.Action) -> bool:
    return action.required or NEEDED in (action.help or "")


def add_command(
    commands: Commands,
    name: str,
    description: str,
    run: Callable[[argparse.Namespace], None],
    spelled: Mapping[str, str] = MappingProxyType({}),
) -> argparse.ArgumentParser:
    """Declares a command; its `run` gets the parsed arguments.

    Args:
        description: its first paragraph is the help in the list of commands and is shown above the
            options, the rest below them.
        spelled: words in the library's messages, and what the command says instead, for flags that
            are not named as the library's arguments.
    """
    about, _, more = description.partition("\n\n")
    command = commands.add_parser(
        name, help=about, description=about, epilog=more, formatter_class=_RequiredFirst
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run, command=command, spelled={_FEWER_DEVICES: ""} | {**spelled})
    return command


def add_number(options: Options, flag: str, about: str, default: int | None = None) -> None:
    """Declares an option with a whole number; its help says the default."""
    about += "" if default is None else " (default: %(default)s)"
    options.add_argument(flag, type=int, default=default, metavar="N", help=about)


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for an option whose number, or one of whose numbers, is below 1."""
    for name in names:
        given = getattr(arguments, name)
        several = given if isinstance(given, list) else [given]
        if any(number is not None and number < 1 for number in several):
            raise ValueError(f"{name}={given} must be at least 1.")


def add_choice(
    options: Options, flag: str, about: str, choices: Collection[str], default: str | None = None
) -> None:
    """Declares an option with a choice of words; its help lists them and says the default."""
    about += f": {', '.join(choices)}" + ("" if default is None else " (default: %(default)s)")
    options.add_argument(flag, choices=choices, default=default, metavar="NAME", help=about)


def add_task(options: Options, about: str, choices: Collection[str]) -> None:
    """Declares --task, which takes the names of pipelines too."""
    about += f": {', '.join(choices)}; or a name of a pipeline: ner, sentiment-analysis, ..."
    options.add_argument("--task", type=head_named, choices=choices, metavar="NAME", help=about)


def add_switch(options: Options, flag: str, about: str) -> None:
    """Declares an option without a value."""
    options.add_argument(flag, action="store_true", help=about)


def add_pattern(command: argparse.ArgumentParser) -> None:
    """Declares the options of LSG attention, for `given_pattern`."""
    pattern = command.add_argument_group(
        "attention pattern", "default: the model's own pattern if it has one, otherwise as shown"
    )
    about = {
        "num_global_tokens": f"learned tokens that see and are seen by all, 1..{MAX_GLOBAL_TOKENS}",
        "block_size": "tokens per local block",
        "sparse_block_size": "sparse tokens on each side; 0 for none",
        "sparsity_factor": "tokens that a sparse token stands for; 0 for none",
    }
    for name in _NUMBERS:
        text = f"{about[name]} (default: {getattr(LSGConfig, name)})"
        add_number(pattern, "--" + name.replace("_", "-"), text)
    usual = f"how sparse tokens are chosen (default: {LSGConfig.sparsity_type})"
    add_choice(pattern, "--sparsity-type", usual, SPARSITY_TYPES)


def given_pattern(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `LSGConfig` that were given as flags."""
    given = {name: getattr(arguments, name) for name in (*_NUMBERS, "sparsity_type")}
    return {name: value for name, value in given.items() if value is not None}


def pattern_in_words(lsg: LSGConfig) -> str:
    """Returns a sentence that says what a token attends to."""
    sparse = (
        f"{2 * lsg.sparse_block_size} sparse ({lsg.sparsity_type}, factor {lsg.sparsity_factor}), "
        if lsg.is_sparse
        else ""
    )
    return (
        f"a token attends to {3 * lsg.block_size} local, {sparse}"
        f"{count_of(lsg.num_global_tokens, 'global token')}; full attention up to "
        f"{2 * lsg.block_size} tokens"
    )


def mesh_axes(text: str) -> dict[str, int]:
    """Parses an option such as data=4,sequence=2."""
    try:
        mesh = {name: int(size) for name, size in name_values(text).items()}
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not AXIS=N,... with whole numbers, as in data=4,sequence=2"
        ) from None
    if not set(mesh) <= set(AXES):
        raise argparse.ArgumentTypeError(f"{text!r}: the axes are {', '.join(AXES)}")
    return mesh


def name_values(text: str) -> dict[str, str]:
    """Parses an option such as text=body,label=area."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,...")
    return {name.strip(): value.strip() for name, _, value in pairs}


class _Deprecated(argparse.Action):
    """The action of an old flag, which the help does not show: it says what to use instead."""

    def __init__(self, *arguments: Any, instead: str, **options: Any):
        super().__init__(*arguments, help=argparse.SUPPRESS, **options)
        self._instead = instead

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        instead = self._instead.format(values)
        say(f"warning: {self.option_strings[0]} is deprecated: use {instead}")
        setattr(namespace, self.dest, values)


def add_deprecated(options: Options, flag: str, instead: str, **more: Any) -> None:
    """Declares an old flag.

    Args:
        instead: what to use, where {} is the flag's value.
        more: further arguments of `add_argument`, such as the `dest` of the new flag.
    """
    options.add_argument(flag, action=_Deprecated, instead=instead, **more)


def add_on_error(options: Options) -> None:
    """Declares what is done with broken lines of INPUT."""
    choices = get_args(BrokenLines)
    add_choice(options, "--on-error", "what to do with broken lines", choices, "raise")
    old = {"dest": "on_error", "choices": choices, "default": argparse.SUPPRESS}
    add_deprecated(options, "--broken-lines", "--on-error {}", **old)


def add_columns(options: Options, names: Collection[str] = COLUMNS) -> None:
    """Declares the names of the columns of INPUT."""
    about = f"names of the columns, such as text=body (default: {', '.join(names)})"
    options.add_argument("--columns", type=name_values, metavar="NAME=VALUE,...", help=about)


def add_dataset(options: Options) -> None:
    """Declares which part of a hub dataset is read, for `source_of`."""
    about = "split of a hub dataset, such as test; needed if there are several"
    options.add_argument("--split", metavar="NAME", help=about)
    about = "subset (configuration) of a hub dataset"
    options.add_argument("--subset", metavar="NAME", help=about)


def source_of(arguments: argparse.Namespace) -> DatasetPart:
    """Returns INPUT, --subset and --split as one value, for functions that read documents."""
    return DatasetPart(arguments.input, arguments.subset, arguments.split)


def check_result(arguments: argparse.Namespace, *names: str, some: bool = False) -> str:
    """Returns "replaced" if OUTPUT exists, else "wrote", for the line that a command ends with.

    Args:
        arguments: of the command; its `output` is one that `files.check_output` allows.
        names: what its lines have beside "id".
        some: whether a line may have only some of `names`.

    Raises:
        ValueError: if OUTPUT is not empty, nor a result of this command: its first line has other
            names, or it is no array [texts, width] of float32.
    """
    file, command = pathlib.Path(arguments.output), arguments.command.prog
    if not file.exists():
        return "wrote"
    found = _unlike_result(file, names, some) if file.stat().st_size else None
    if found is not None:
        raise ValueError(
            f"{file} exists and is no result of {command}: {found}. It is not replaced; give "
            "another OUTPUT, or remove it."
        )
    return "replaced"


def _unlike_result(file: pathlib.Path, names: Collection[str], some: bool) -> str | None:
    """Returns how a file differs from a result, in words; None if it does not."""
    try:
        if file.suffix == ".npy":
            array = np.load(file, mmap_mode="r")
            alike = array.ndim == 2 and array.dtype == np.float32
            return None if alike else f"it is an array of {array.dtype} {list(array.shape)}"
        keys = next(read_lines(file)).json_object().keys()
    except (ValueError, EOFError):
        return "it is no array of numbers" if file.suffix == ".npy" else "its first line is no JSON"
    written, missing = keys - {"id"}, set(names) - keys
    if "id" in keys and written and written <= set(names) and (some or not missing):
        return None
    return f"its first line has {', '.join(keys) or 'nothing'}"


def yaml_values(text: str) -> dict[str, Any]:
    """Parses an option such as num_beams=4,early_stopping=true, with values as in YAML."""
    import yaml

    try:
        return {name: yaml.safe_load(value) for name, value in name_values(text).items()}
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,... of YAML") from None


class _Output(Console):
    """Breaks no line of text, so that paths stay whole; tables are as wide as the console."""

    def print(self, *objects: Any, **options: Any) -> None:
        options.setdefault("soft_wrap", all(isinstance(x, str) for x in objects))
        super().print(*objects, **options)


def console() -> Console:
    """Returns a console for stdout, as wide as the terminal, or 120 characters without one."""
    made = _Output(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _PIPED_WIDTH
    return made


@contextlib.contextmanager
def plain_warnings(arguments: argparse.Namespace) -> Iterator[None]:
    """Shows only the message of warnings, with the command's flags, inside a `with`."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(
            f"warning: {in_flags(str(message), arguments)}"
        )
        yield
