"""What the commands share: how a command is declared, and how they speak."""

import argparse
import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Console

from lsg_flax.cli.flags import in_flags
from lsg_flax.data import DatasetPart
from lsg_flax.patterns import MAX_GLOBAL_TOKENS, SPARSITY_TYPES, LSGConfig
from lsg_flax.pipelines import COLUMNS
from lsg_flax.progress import say
from lsg_flax.sharding import AXES

# A parser, a group of its options, its commands: argparse has no public types for the latter two.
Options = Any
Commands = Any

NEEDED = "(required"  # in the help of an option that argparse does not ask for by itself
_PIPED_WIDTH = 120
_NUMBERS = ("num_global_tokens", "block_size", "sparse_block_size", "sparsity_factor")


class _RequiredFirst(argparse.RawDescriptionHelpFormatter):
    """What must be given, maybe in a file of settings, comes first, and is the usage."""

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
    """Declares a command; its `run` gets the parsed arguments. The first line of the description
    is its help in the list of commands, and stands above its options, the rest below; `spelled`
    says what of the library's messages the command calls otherwise, where its flags have not the
    names of arguments."""
    about, _, more = description.partition("\n\n")
    command = commands.add_parser(
        name, help=about, description=about, epilog=more, formatter_class=_RequiredFirst
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run, command=command, spelled=spelled)
    return command


def add_number(options: Options, flag: str, about: str, default: int | None = None) -> None:
    """Declares an option that is a whole number; its help says the default."""
    about += "" if default is None else " (default: %(default)s)"
    options.add_argument(flag, type=int, default=default, metavar="N", help=about)


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for a number, or one of several, that is under 1."""
    for name in names:
        given = getattr(arguments, name)
        several = given if isinstance(given, list) else [given]
        if any(number is not None and number < 1 for number in several):
            raise ValueError(f"{name}={given} must be at least 1.")


def add_choice(
    options: Options, flag: str, about: str, choices: Collection[str], default: str | None = None
) -> None:
    """Declares an option that is one of some words; its help lists them and says the default."""
    about += f": {', '.join(choices)}" + ("" if default is None else " (default: %(default)s)")
    options.add_argument(flag, choices=choices, default=default, metavar="NAME", help=about)


def add_switch(options: Options, flag: str, about: str) -> None:
    """Declares an option without a value."""
    options.add_argument(flag, action="store_true", help=about)


def add_pattern(command: argparse.ArgumentParser) -> None:
    """Declares the options of the attention pattern, for `given_pattern`."""
    pattern = command.add_argument_group(
        "attention pattern", "defaults are those of an LSG SOURCE, otherwise as shown"
    )
    about = {
        "num_global_tokens": f"learned tokens that see and are seen by all, 1..{MAX_GLOBAL_TOKENS}",
        "block_size": "tokens per local block",
        "sparse_block_size": "sparse representatives on either side; 0 for none",
        "sparsity_factor": "tokens that a representative stands for; 0 for none",
    }
    for name in _NUMBERS:
        text = f"{about[name]} (default: {getattr(LSGConfig, name)})"
        add_number(pattern, "--" + name.replace("_", "-"), text)
    usual = f"how representatives are chosen (default: {LSGConfig.sparsity_type})"
    add_choice(pattern, "--sparsity-type", usual, SPARSITY_TYPES)


def given_pattern(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `LSGConfig` that were given."""
    given = {name: getattr(arguments, name) for name in (*_NUMBERS, "sparsity_type")}
    return {name: value for name, value in given.items() if value is not None}


def pattern_in_words(lsg: LSGConfig) -> str:
    """What a token attends to, as a sentence."""
    sparse = (
        f"{2 * lsg.sparse_block_size} sparse ({lsg.sparsity_type}, 1 for {lsg.sparsity_factor}), "
        if lsg.is_sparse
        else ""
    )
    return (
        f"a token attends to {3 * lsg.block_size} local, {sparse}"
        f"{lsg.num_global_tokens} global ones; up to {2 * lsg.block_size} tokens to all"
    )


def mesh_axes(text: str) -> dict[str, int]:
    """The type of an option such as data=4,sequence=2."""
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
    """The type of an option such as text=body,label=area."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,...")
    return {name.strip(): value.strip() for name, _, value in pairs}


def add_columns(options: Options) -> None:
    """Declares what the columns of INPUT are called."""
    about = f"what columns are called, such as text=body; {', '.join(COLUMNS)} (default: so)"
    options.add_argument("--columns", type=name_values, metavar="NAME=VALUE,...", help=about)


def add_dataset(options: Options) -> None:
    """Declares which part of INPUT is read where that is a dataset, for `source_of`."""
    about = "of a dataset: which one, needed where there are several, such as test"
    options.add_argument("--split", metavar="NAME", help=about)
    about = "of a dataset: second argument of load_dataset"
    options.add_argument("--subset", metavar="NAME", help=about)


def source_of(arguments: argparse.Namespace) -> DatasetPart:
    """INPUT, as readers of documents take it."""
    return DatasetPart(arguments.input, arguments.subset, arguments.split)


def yaml_values(text: str) -> dict[str, Any]:
    """The type of an option such as num_beams=4,early_stopping=true, as a YAML file has them."""
    import yaml

    try:
        return {name: yaml.safe_load(value) for name, value in name_values(text).items()}
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,... of YAML") from None


def console() -> Console:
    """Writes to stdout: as wide as the terminal, or 120 characters where there is none."""
    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _PIPED_WIDTH
    return made


@contextlib.contextmanager
def plain_warnings(arguments: argparse.Namespace) -> Iterator[None]:
    """Shows a warning's message, in the command's words, without the line of code that gave it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(
            f"warning: {in_flags(str(message), arguments)}"
        )
        yield
