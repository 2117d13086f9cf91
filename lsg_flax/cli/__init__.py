"""The command line `lsg-flax`: one module per command, each with `add` (its options) and `run`."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

import flax
import jax

import lsg_flax
from lsg_flax.cli import (
    ask,
    convert,
    data,
    doctor,
    embed,
    evaluate,
    generate,
    index,
    inspect,
    plan,
    predict,
    summarize,
    train,
)
from lsg_flax.cli.flags import in_flags
from lsg_flax.cli.shared import plain_warnings
from lsg_flax.progress import say, told
from lsg_flax.training import SaveError

ERROR, INTERRUPTED = 2, 130
_EXPECTED = (ValueError, OSError, ImportError, SaveError, FloatingPointError)
_COMMANDS = (  # in the order of --help
    *(
        convert,
        inspect,
        data,
        train,
        evaluate,
        predict,
        summarize,
        embed,
        generate,
        plan,
        index,
        ask,
        doctor,
    ),
)

_DESCRIPTION = "LSG attention (local + sparse + global) for BERT-like checkpoints, in JAX."
_EXAMPLES = """examples:
  lsg-flax convert bert-base-uncased ./bert-4096 --max-sequence-length 4096 --num-global-tokens 7
  lsg-flax convert ./bert-4096 ./bert-16384 --max-sequence-length 16384 --resize-lsg
  lsg-flax inspect ./bert-4096 --check
  lsg-flax train --model ./bert-4096 --task sequence_classification \\
      --train-data train.jsonl --eval-data eval.jsonl --output ./areas
  lsg-flax evaluate ./areas held_out.csv --output ./scores
  lsg-flax predict ./areas documents.jsonl answers.jsonl
  lsg-flax summarize ./lsg-bart-arxiv papers/ summaries.jsonl --num-beams 4
  lsg-flax embed ./minilm-4096 documents.jsonl vectors.npy
  lsg-flax generate ./writer --prompt "Once upon a time" --do-sample --top-p 0.9
  lsg-flax index ./realm corpus.jsonl ./realm-corpus
  lsg-flax ask ./realm-corpus "who wrote the song of Troy?"
  lsg-flax plan ./bert-4096 --task sequence_classification --topology v5e:2x4 --batch-size 32"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0, 2 after an error (which prints one message to stderr) or without
        arguments (which prints the help there), or 130 after Ctrl-C.
    """
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return ERROR
    arguments = parser.parse_args(argv)
    if not arguments.debug:  # Orbax also logs tracebacks of errors that are one message here
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_no_damage)
    # When it loads a tokenizer, transformers would advise to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be invalid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with plain_warnings(arguments), told(arguments.command.prog.split()[-1]):
            arguments.run(arguments)
    except KeyboardInterrupt as error:  # its notes say what is kept
        kept = " ".join(getattr(error, "__notes__", ()))
        say(f"interrupted: {kept}".removesuffix(": "))
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        expected = isinstance(error, _EXPECTED)
        kind = "" if expected else f"unexpected {type(error).__name__}: "
        say(
            f"error: {kind}{in_flags(str(error), arguments)}"
            + ("" if expected else " (--debug shows where)")
        )
        return ERROR
    return 0


def _is_no_damage(record: logging.LogRecord) -> bool:
    return not record.exc_info and "metadata" not in record.getMessage().lower()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lsg-flax",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = f"%(prog)s {lsg_flax.__version__} (jax {jax.__version__}, flax {flax.__version__})"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser
