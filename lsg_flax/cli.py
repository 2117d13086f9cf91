"""The command line: `lsg-flax convert` makes long-document checkpoints, `lsg-flax inspect` shows
one, `lsg-flax embed` turns texts into vectors."""

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_args

import flax
import jax
import safetensors
from rich.console import Console
from rich.table import Table

import lsg_flax
from lsg_flax import embeddings, hub
from lsg_flax.config import MAX_GLOBAL_TOKENS, SPARSITY_TYPES, EncoderConfig, LSGConfig
from lsg_flax.models.families import family_of
from lsg_flax.models.heads import Task
from lsg_flax.to_lsg import LSGOptions

ERROR, INTERRUPTED = 2, 130
_PIPED_WIDTH = 120
_DEFAULTS = LSGOptions()
_PATTERN = ("num_global_tokens", "block_size", "sparse_block_size", "sparsity_factor")
# safetensors' names of dtypes
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_DESCRIPTION = "LSG attention (local + sparse + global) for BERT-like checkpoints, in JAX."
_EXAMPLES = """examples:
  lsg-flax convert bert-base-uncased ./bert-4096 --max-sequence-length 4096 --num-global-tokens 7
  lsg-flax convert ./bert-4096 ./bert-16384 --max-sequence-length 16384 --resize-lsg
  lsg-flax inspect ./bert-4096 --check
  lsg-flax embed ./minilm-4096 documents.jsonl vectors.npy"""
_CONVERT = """Make an LSG checkpoint of SOURCE that reads long documents with the same weights.

Nothing is trained: positions repeat, and global tokens start as [CLS] and [MASK]. The result is
written to TARGET in Hugging Face's format, for lsg_flax.from_pretrained and for PyTorch's LSG
classes. If anything fails, files that were in TARGET stay as they were."""
_INSPECT = """Show the config and the tensors of a checkpoint: plain, LSG, or saved by lsg_flax.

Reads the headers of safetensors files only, unless --check is given."""
_EMBED = """Write one vector for each text of INPUT.

INPUT is a .txt with one text per line, or a .jsonl of objects with "text" and, if wanted, "id".
OUTPUT is a .npy array [texts, width], or a .jsonl of objects with "id" and "embedding"; it gets its
name when it is complete. MODEL is a folder of sentence-transformers, converted or not; with
--pooling any base checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0, or 2 after an error, which is one message on stderr.
    """
    arguments = _parser().parse_args(argv)
    # transformers, asked for a tokenizer, would advise to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with _plain_warnings():
            arguments.run(arguments)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        expected = isinstance(error, ValueError | OSError | ImportError)
        kind = "" if expected else f"unexpected {type(error).__name__}: "
        _say(f"error: {kind}{error}" + ("" if expected else " (--debug shows where)"))
        return ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lsg-flax",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = f"%(prog)s {lsg_flax.__version__} (jax {jax.__version__}, flax {flax.__version__})"
    parser.add_argument("--version", action="version", version=versions)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, add, description in (
        ("convert", _add_convert, _CONVERT),
        ("inspect", _add_inspect, _INSPECT),
        ("embed", _add_embed, _EMBED),
    ):
        command = commands.add_parser(
            name,
            parents=[common],
            help=description.split("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
    return parser


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_convert)
    command.add_argument("source", metavar="SOURCE", help="folder, or id on the Hugging Face hub")
    command.add_argument("target", metavar="TARGET", help="folder for the result")
    command.add_argument(
        "--max-sequence-length",
        type=int,
        default=_DEFAULTS.max_sequence_length,
        metavar="N",
        help="tokens that the result reads (default: %(default)s)",
    )
    command.add_argument(
        "--task",
        choices=get_args(Task),
        metavar="TASK",
        help=f"head of the result (default: that of SOURCE); one of {', '.join(get_args(Task))}",
    )
    pattern = command.add_argument_group(
        "attention pattern", "defaults are those of an LSG SOURCE, otherwise as shown"
    )
    about = {
        "num_global_tokens": f"learned tokens that see and are seen by all, 1..{MAX_GLOBAL_TOKENS}",
        "block_size": "tokens per local block",
        "sparse_block_size": "sparse representatives on either side; 0 for none",
        "sparsity_factor": "tokens that a representative stands for; 0 for none",
    }
    for name in _PATTERN:
        text = f"{about[name]} (default: {getattr(LSGConfig, name)})"
        command_name = "--" + name.replace("_", "-")
        pattern.add_argument(command_name, type=int, metavar="N", help=text)
    pattern.add_argument(
        "--sparsity-type",
        choices=SPARSITY_TYPES,
        metavar="TYPE",
        help="how representatives are chosen: "
        f"{', '.join(SPARSITY_TYPES)} (default: {LSGConfig.sparsity_type})",
    )
    _add_global_options(command.add_argument_group("global tokens and positions"))
    command.add_argument(
        "--check", action="store_true", help="refuse weights with NaN or infinity in them"
    )


def _add_global_options(group) -> None:
    group.add_argument(
        "--random-global-init",
        action="store_true",
        help="draw globals from the distribution of the word embeddings, not from [MASK]",
    )
    group.add_argument(
        "--global-positional-stride",
        type=int,
        default=_DEFAULTS.global_positional_stride,
        metavar="N",
        help="distance between the positions of neighbouring globals (default: %(default)s)",
    )
    group.add_argument(
        "--keep-first-global-token",
        action="store_true",
        help="leave the first global as it is (LSG SOURCE only)",
    )
    group.add_argument(
        "--resize-lsg", action="store_true", help="change the positions only (LSG SOURCE only)"
    )
    group.add_argument(
        "--no-token-ids",
        dest="use_token_ids",
        action="store_false",
        help="do not add the embedding of segment 0 to the globals",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=_DEFAULTS.seed,
        metavar="N",
        help="of the random draws (default: %(default)s)",
    )


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_inspect)
    command.add_argument("path", metavar="PATH", help="folder, or id on the Hugging Face hub")
    command.add_argument(
        "--check",
        action="store_true",
        help="load the weights too: they must fit the config and be finite",
    )


def _add_embed(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_embed)
    command.add_argument("model", metavar="MODEL", help="folder, or id on the Hugging Face hub")
    command.add_argument("input", metavar="INPUT", help=" or ".join(embeddings.TEXTS))
    command.add_argument("output", metavar="OUTPUT", help=" or ".join(embeddings.VECTORS))
    command.add_argument(
        "--pooling",
        choices=get_args(embeddings.Pooling),
        metavar="MODE",
        help=f"instead of MODEL's own; one of {', '.join(get_args(embeddings.Pooling))}",
    )
    command.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale vectors to length 1, or do not (default: as MODEL says)",
    )
    command.add_argument(
        "--max-length", type=int, metavar="N", help="tokens after which a text is cut"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="texts at once (default: %(default)s)",
    )


def _embed(arguments: argparse.Namespace) -> None:
    embeddings.check_suffix(arguments.output, embeddings.VECTORS)  # before the work, not after
    names, texts = embeddings.read_texts(arguments.input)
    embedder = embeddings.Embedder.from_pretrained(
        arguments.model,
        pooling=arguments.pooling,
        normalize=arguments.normalize,
        max_length=arguments.max_length,
    )
    vectors = embedder.embed(texts, batch_size=arguments.batch_size, progress=sys.stderr.isatty())
    embeddings.write_vectors(arguments.output, names, vectors)
    _console().print(
        f"wrote {arguments.output}: {vectors.shape[0]:,} vectors of {vectors.shape[1]}, texts cut "
        f"at {embedder.max_length:,} tokens"
    )


def _convert(arguments: argparse.Namespace) -> None:
    target = pathlib.Path(arguments.target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"TARGET {target} is a file; give a folder, or a new name for one.")
    if target.is_dir() and os.path.isdir(arguments.source) and target.samefile(arguments.source):
        raise ValueError(f"SOURCE and TARGET are both {target}; give another folder as TARGET.")
    replaces = (target / hub.CONFIG).exists()
    given = {name: getattr(arguments, name) for name in (*_PATTERN, "sparsity_type")}
    console = _console()
    with console.status(f"converting {arguments.source}"):
        model, params = lsg_flax.convert_checkpoint(
            arguments.source,
            target,
            task=arguments.task,
            check=arguments.check,
            **{f.name: getattr(arguments, f.name) for f in fields(LSGOptions)},
            **{name: value for name, value in given.items() if value is not None},
        )
    config: EncoderConfig = model.config
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = arguments.max_sequence_length
    console.print(
        f"{'replaced' if replaces else 'wrote'} {target}: {config.model_type} for {model.task}, "
        f"{tokens:,} tokens, {count:,} parameters"
    )
    if config.lsg:
        console.print(_pattern_in_words(config.lsg))
    console.print(f"next: lsg_flax.from_pretrained({str(target)!r}), or lsg-flax inspect {target}")


def _inspect(arguments: argparse.Namespace) -> None:
    folder = hub.resolve(arguments.path)
    values = hub.read_config(folder)
    config = EncoderConfig.from_dict(values)
    tensors = _stored_tensors(folder)
    console = _console()
    console.print(_config_table(folder, values, config))
    if config.lsg:
        console.print(_pattern_in_words(config.lsg))
    console.print(_tensor_table(tensors))
    if arguments.check:
        with console.status("checking the weights"):
            model, _ = lsg_flax.from_pretrained(folder, check=True)
        console.print(f"checked: the weights fit a {model.task} model and are finite")


class _Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


def _stored_tensors(folder: pathlib.Path) -> dict[str, _Stored]:
    """Shapes and dtypes by name: from the headers of safetensors files, otherwise by reading."""
    if (folder / hub.WEIGHTS).exists():
        return _header(folder / hub.WEIGHTS)
    if (folder / hub.INDEX).exists():
        stored: dict[str, _Stored] = {}
        for shard in sorted(set(hub.read_index(folder, hub.INDEX).values())):
            stored |= _header(folder / shard)
        return stored
    return {
        name: _Stored(tensor.shape, str(tensor.dtype))
        for name, tensor in hub.read_tensors(folder).items()
    }


def _header(file: pathlib.Path) -> dict[str, _Stored]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: _Stored(tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), str(s.get_dtype())))
                for name, s in slices.items()
            }
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or cut short ({error}); copy or download it again."
        ) from error


def _config_table(folder: pathlib.Path, values: Mapping[str, Any], config: EncoderConfig) -> Table:
    table = Table(title=f"config of {folder}", title_justify="left")
    table.add_column("field")
    table.add_column("value", overflow="fold")
    architectures = values.get("architectures") or ["none: loads as the base model"]
    table.add_row("architectures", ", ".join(architectures))
    table.add_row("tasks", ", ".join(family_of(config.model_type).heads))
    table.add_row("attention", "LSG" if config.lsg else "full")
    for f in fields(config):
        if f.name not in ("lsg", "extra", "labels"):
            table.add_row(f.name, _shown(getattr(config, f.name)))
    table.add_row("labels", ", ".join(config.labels))
    if config.lsg:
        table.add_section()
        for f in fields(config.lsg):
            table.add_row(f.name, _shown(getattr(config.lsg, f.name)))
    others = sorted(json.loads(config.extra).keys() - {"architectures"})
    if others:
        table.add_section()
        table.add_row("kept, not used", ", ".join(others))
    return table


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def _tensor_table(tensors: Mapping[str, _Stored]) -> Table:
    """One row for the tensors that differ by the layer's number only."""
    rows: dict[tuple[str, _Stored], list[str]] = {}
    for name, stored in tensors.items():
        pattern = re.sub(r"\.(\d+)\.", ".*.", name, count=1)
        rows.setdefault((pattern, stored), []).append(name)
    table = Table(title=f"{len(tensors)} tensors", title_justify="left", show_footer=True)
    counts = [math.prod(stored.shape) for stored in tensors.values()]
    table.add_column("path (* is the layer)", "total", overflow="fold")
    table.add_column("shape")
    table.add_column("dtype", ", ".join(sorted({stored.dtype for stored in tensors.values()})))
    table.add_column("parameters", f"{sum(counts):,}", justify="right")
    for (pattern, stored), names in sorted(rows.items(), key=lambda row: _order(row[0][0])):
        path = names[0] if len(names) == 1 else pattern
        layers = f"{len(names)} x " if len(names) > 1 else ""
        count = len(names) * math.prod(stored.shape)
        table.add_row(path, f"{layers}{list(stored.shape)}", stored.dtype, f"{count:,}")
    return table


def _order(path: str) -> tuple[int, str]:
    """Embeddings, layers, the rest."""
    return (0 if "embeddings" in path else 1 if "*" in path else 2), path


def _pattern_in_words(lsg: LSGConfig) -> str:
    sparse = (
        f"{2 * lsg.sparse_block_size} sparse ({lsg.sparsity_type}, 1 for {lsg.sparsity_factor}), "
        if lsg.is_sparse
        else ""
    )
    return (
        f"a token attends to {3 * lsg.block_size} local, {sparse}"
        f"{lsg.num_global_tokens} global ones; up to {2 * lsg.block_size} tokens to all"
    )


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=_PIPED_WIDTH)
    return console


def _say(message: str) -> None:
    print(f"lsg-flax: {message}", file=sys.stderr)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows a warning's message without the line of code that gave it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        yield


if __name__ == "__main__":
    sys.exit(main())
