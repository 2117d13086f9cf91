"""`lsg-flax generate`: continues texts.

Axes: B batch, T tokens.
"""

import argparse
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import lsg_flax
from lsg_flax import hub
from lsg_flax.cli.shared import (
    READING_SPELLED,
    add_columns,
    add_command,
    add_dataset,
    add_on_error,
    check_positive,
    check_result,
    console,
    source_of,
)
from lsg_flax.files import Json, check_apart, check_output, valid_text, write_aside
from lsg_flax.generation import Sample
from lsg_flax.locks import locked_file
from lsg_flax.models import MOST_TOKENS, TASKS, Model, ModelConfig, Params
from lsg_flax.pipelines import (
    TEXTS,
    TextLines,
    line_number,
    read_texts,
    unskipped,
    warn_of_none,
    warn_of_skipped,
)
from lsg_flax.progress import Bar, count_of
from lsg_flax.training import LARGEST_SEED, Precision

_DESCRIPTION = """Continue texts with a decoder.

With --prompt the continuation is printed. Otherwise INPUT is a .txt with one text per line, a
.jsonl, .csv or .parquet (a file, a folder or a pattern), or a hub dataset, with "text" and
optionally "id"; OUTPUT gets one line of JSON per text, {"id", "text", "finish_reason"}, and appears
under its name once it is complete. MODEL is a causal_lm with its tokenizer; generation ends at the
tokenizer's end-of-text token (finish_reason "stop") or after --max-new-tokens ("length"). Prompts
of similar length are batched and padded on the left, which shifts the blocks of LSG attention in a
padded prompt; --batch-size 1 avoids this.

  lsg-flax generate ./writer --prompt "Once upon a time" --do-sample --top-p 0.9
  lsg-flax generate ./writer prompts.jsonl continuations.jsonl --max-new-tokens 100"""


def add(commands: Any) -> None:
    """Declares the command and its options."""
    command = add_command(commands, "generate", _DESCRIPTION, run, READING_SPELLED)
    command.add_argument("model", metavar="MODEL", help="folder, or id on the Hugging Face hub")
    command.add_argument("input", metavar="INPUT", nargs="?", help=" or ".join(TEXTS))
    command.add_argument("output", metavar="OUTPUT", nargs="?", help="file for lines of JSON")
    about = "text to continue, instead of files; may be repeated"
    command.add_argument("--prompt", metavar="TEXT", action="append", help=about)
    what = command.add_argument_group("what is written")
    for name, kind, about in (
        ("--max-new-tokens", int, "maximum tokens to generate"),
        ("--temperature", float, "the logits are divided by it; with --do-sample"),
        ("--top-k", int, "sample from the N most likely tokens; with --do-sample"),
        (
            "--top-p",
            float,
            "sample from the fewest tokens that have probability X; with --do-sample",
        ),
        ("--seed", int, "seed of sampling; batch number i uses N + i"),
    ):
        default = {"--max-new-tokens": 64, "--temperature": 1.0, "--seed": 0}.get(name)
        shown = "all" if default is None else default
        text = f"{about} (default: {shown})"
        metavar = "N" if kind is int else "X"
        what.add_argument(name, type=kind, default=default, metavar=metavar, help=text)
    about = "sample tokens instead of taking the most likely one"
    what.add_argument("--do-sample", action="store_true", help=about)
    how = command.add_argument_group("how it is computed")
    how.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="texts at once (default: 8)"
    )
    how.add_argument(
        "--dtype",
        choices=get_args(Precision),
        default="float32",
        metavar="NAME",
        help=f"dtype of the computation: {', '.join(get_args(Precision))} (default: float32)",
    )
    add_columns(how, ("id", "text"))
    add_dataset(how)
    add_on_error(how)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    _check_numbers(arguments)
    lines = _read(arguments)
    if arguments.output is None:
        for row in _continued(lines, arguments):
            print(row["text"])  # rich's console would wrap long lines
        return
    check_apart(arguments.output, arguments.model)
    target, done = pathlib.Path(arguments.output), check_result(arguments, "text", "finish_reason")
    with locked_file(target):
        rows = _continued(lines, arguments)
        write_aside(target, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    warn_of_none(len(rows), arguments.input)
    console().print(f"{done} {target}: {count_of(len(rows), 'continuation')}")


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ValueError, before the model is read, for numbers that no model allows."""
    check_positive(arguments, "max_new_tokens", "batch_size")
    if not 0 <= arguments.seed <= LARGEST_SEED:
        raise ValueError(f"seed={arguments.seed} must be in 0..{LARGEST_SEED}.")
    if not math.isfinite(arguments.temperature):
        raise ValueError(f"temperature={arguments.temperature} must be a positive number.")
    sample = Sample(arguments.temperature, arguments.top_k, arguments.top_p)
    if not arguments.do_sample and sample != Sample():
        raise ValueError(
            "--temperature, --top-k and --top-p need --do-sample: without it the most likely token "
            "is always taken."
        )


def _continued(lines: TextLines, arguments: argparse.Namespace) -> list[Json]:
    """Returns a line of OUTPUT for each prompt that is continued."""
    checkpoint = hub.open_checkpoint(arguments.model)
    tokenizer, task = checkpoint.tokenizer, checkpoint.task
    if tokenizer is None:
        raise FileNotFoundError(f"{checkpoint.folder} has no tokenizer; copy its files there.")
    if task == "conditional_generation":
        raise ValueError(
            f"{checkpoint.folder} is an encoder-decoder, which cannot continue texts: use lsg-flax "
            "summarize MODEL INPUT OUTPUT, lsg-flax predict for other answers than summaries, or "
            'lsg_flax.pipeline("text2text-generation", MODEL).'
        )
    if not TASKS[task].fixed.get("is_decoder"):
        raise ValueError(
            f"{checkpoint.folder} is a {task} checkpoint, which cannot continue texts: give a "
            "causal_lm checkpoint, such as one from lsg-flax train --task causal_lm."
        )
    model, params = checkpoint.load(dtype=jnp.dtype(arguments.dtype).type)
    ends = _ends(model, tokenizer)
    prompts = _encode(tokenizer, lines.texts, ends)
    fitting = _fitting(lines.places, prompts, model, arguments)
    written = _continue(model, params, [prompts[i] for i in fitting], ends, arguments)
    rows = []
    for place, tokens in zip(fitting, written, strict=True):
        ids = list(itertools.takewhile(lambda token: token not in ends, tokens))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        reason = "stop" if len(ids) < len(tokens) else "length"  # as OpenAI's API calls them
        rows.append({"id": lines.names[place], "text": text, "finish_reason": reason})
    return rows


def _read(arguments: argparse.Namespace) -> TextLines:
    """Reads the prompts; raises ValueError unless they come from one source."""
    files = [file for file in (arguments.input, arguments.output) if file is not None]
    if arguments.prompt is not None and not files:
        places = [f"--prompt {text[:60]!r}" for text in arguments.prompt]
        for place, text in zip(places, arguments.prompt, strict=True):
            try:
                valid_text(text)
            except ValueError as error:
                raise ValueError(f"{place}: {error}.") from error
        return TextLines(places, arguments.prompt, places)
    if arguments.prompt is not None or len(files) < 2:
        raise ValueError(
            "give either --prompt TEXT, or INPUT and OUTPUT; got "
            + (" ".join(files) or "neither")
            + (" and --prompt." if arguments.prompt else ".")
        )
    check_output(arguments.output, arguments.input)
    columns = arguments.columns or {}
    return read_texts(source_of(arguments), broken_lines=arguments.on_error, columns=columns)


def _ends(model: Model, tokenizer: Any) -> list[int]:
    """Returns the tokens that end a text: the tokenizer's, or the config's, or the separator that
    training puts between texts."""
    given = (
        tokenizer.eos_token_id,
        model.config.other("eos_token_id", None),
        tokenizer.sep_token_id,
    )
    first = next((ids for ids in given if ids is not None), [])
    return np.atleast_1d(np.asarray(first, int)).tolist()


def _encode(tokenizer: Any, texts: Sequence[str], ends: list[int]) -> list[list[int]]:
    """Returns tokens as in training, without the end-of-text token: nothing would follow it."""
    encoded = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    closing = (*ends, tokenizer.sep_token_id)
    return [ids[:-1] if ids and ids[-1] in closing else ids for ids in encoded]


def _fitting(
    places: Sequence[str],
    prompts: Sequence[Sequence[int]],
    model: Model,
    arguments: argparse.Namespace,
) -> list[int]:
    """Returns which prompts fit the model; raises ValueError for one that does not, unless broken
    lines are skipped."""
    limit = MOST_TOKENS if model.rolls else model.max_length
    fitting, skipped = [], []
    for number, (place, ids) in enumerate(zip(places, prompts, strict=True)):
        try:
            _check_length(place, len(ids), arguments.max_new_tokens, limit, model.config)
        except ValueError as error:
            if arguments.input is None or arguments.max_new_tokens > limit:  # then none can fit
                raise
            if arguments.on_error == "raise":
                raise unskipped(place, error) from error
            skipped.append(line_number(place))
        else:
            fitting.append(number)
    if skipped:
        warn_of_skipped(skipped, arguments.input)
    return fitting


def _check_length(place: str, length: int, new: int, limit: int, config: ModelConfig) -> None:
    fits = limit - new + 1  # the last new token is never read
    if not 1 <= length <= fits:
        remedy = config.or_convert("Shorten the prompt", max(length, 1) + new - 1)
        raise ValueError(
            f"{place} has {length} tokens, but with --max-new-tokens {new} a prompt must have "
            f"1 to {max(fits, 0)}: this checkpoint reads {limit}. {remedy}."
        )


def _continue(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    ends: list[int],
    arguments: argparse.Namespace,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, with those behind its end, in the order of the
    prompts."""
    size, pad = arguments.batch_size, model.config.pad_token_id
    pad = (ends or [0])[0] if pad is None else pad
    names = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
    options = {name: getattr(arguments, name) for name in names}
    options |= {"eos_token_id": ends or None, "pad_token_id": pad}
    found: list[list[int]] = [[] for _ in prompts]
    with Bar("texts", total=len(prompts), shown=True) as bar:
        for number, places in enumerate(_batches(model, prompts, size)):
            width = len(prompts[places[0]])
            ids = np.full((len(places), width), pad)
            mask = np.zeros(ids.shape, bool)
            for row, place in enumerate(places):
                ids[row, width - len(prompts[place]) :] = prompts[place]
                mask[row, width - len(prompts[place]) :] = True
            key = jax.random.key(arguments.seed + number)
            inputs = {"attention_mask": mask, "position_ids": _positions(model, mask), "key": key}
            tokens = lsg_flax.generate(model, params, ids, **inputs, **options)[:, width:]
            for place, row in zip(places, tokens.tolist(), strict=True):
                found[place] = row
            bar.update(len(places))
    return found


def _batches(
    model: Model, prompts: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[int, ...]]:
    """Yields the numbers of the prompts of each batch, the longest first. If padding on the left
    would shift positions, a batch has only prompts of one length."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    alike = (lambda i: len(prompts[i])) if model.counts_positions else (lambda i: 0)
    for _, group in itertools.groupby(order, key=alike):
        places = tuple(group)
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _positions(model: Model, mask: np.ndarray) -> np.ndarray | None:
    """Returns positions [B, T], counted from each row's first real token; None for a family that
    counts them so itself."""
    if model.counts_positions or model.family.architecture.positions == "behind_padding":
        return None
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)
