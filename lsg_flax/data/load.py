"""Tokenizes files once and caches the tokens on disk."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import filelock

from lsg_flax.data.cache import WORDS, ArrayFiles, DamagedCacheError, RowWriter, TokenizedDataset
from lsg_flax.data.encoders import make_encoder
from lsg_flax.data.files import DataSource, Paths, Problems, open_source
from lsg_flax.data.options import DataOptions
from lsg_flax.data.tasks import ExampleEncoder
from lsg_flax.data.values import label_number, labels_in, names_of_labels
from lsg_flax.files import check_folder, written_aside
from lsg_flax.models import TASKS
from lsg_flax.progress import Bar

_FORMAT = 2  # of the files in the cache; files of other formats are not used
_CHUNK = 256  # examples that are tokenized together and held in memory


def load_examples(
    paths: Paths,
    options: DataOptions,
    *,
    tokenizer: Any,
    subset: str | None = None,
    split: str = "train",
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> TokenizedDataset:
    """Tokenizes data, or opens the cached result of an earlier call with the same data, tokenizer
    and options.

    Args:
        paths: a .jsonl, .csv, .parquet or .txt file, a folder or pattern (`"data/*.jsonl"`)
            of files of one kind, a list of these, or a dataset's name for `datasets.load_dataset`.
        options: the task, and how rows become examples.
        tokenizer: a Hugging Face tokenizer.
        subset: of a dataset, its subset (configuration), the second argument of `load_dataset`.
        split: of a dataset, its split.
        cache: folder of the cache; by default `lsg_flax` in the user's cache folder.
        progress: show a bar with examples per second while tokenizing.

    Returns:
        The rows, which are read from disk when they are accessed.

    Raises:
        FileNotFoundError: if there are no files at `paths`.
        ValueError: for data without rows, a broken row (the error says file and line;
            `on_error="skip"` skips such rows and warns how many), or a tokenizer that cannot be
            used for the task.
        ImportError: if a library is needed to read the data; the error says which.
    """
    source = open_source(paths, subset=subset, split=split, text_unit=options.text_unit)
    contents = source.digest()
    key = _fingerprint(contents, options, tokenizer)
    folder = (_default_cache() if cache is None else pathlib.Path(cache)).absolute()
    check_folder("cache", folder)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f"{key}.lock"):  # other processes wait, and then use the result
        dataset = _open(folder / key)
        if dataset is None:
            shutil.rmtree(folder / key, ignore_errors=True)
            _tokenize(folder / key, key, source, options, tokenizer, progress)
            dataset = TokenizedDataset(folder / key)
    dataset.contents = contents[:12]
    if dataset.skipped:
        warnings.warn(
            f"{dataset.skipped} broken rows of {source.name} were skipped, the first of them: "
            + "; ".join(dataset.messages),
            stacklevel=2,
        )
    return dataset


def labels_for(
    paths: Paths,
    options: DataOptions,
    known: tuple[str, ...],
    *,
    subset: str | None = None,
    split: str = "train",
) -> tuple[str, ...]:
    """Returns the labels to read data with, for a head that has the labels `known`: these, if each
    label in the data is one of them by name or number; otherwise the data's own.

    It needs a pass over the rows; arguments and errors are those of `load_examples`.
    """
    source = open_source(paths, subset=subset, split=split, text_unit=options.text_unit)
    column = options.label_column or ""
    if names := source.label_names(column):  # label ids are positions in these names
        return tuple(names)
    found = labels_in(row.values.get(column) for row in source.rows(Problems("skip")))
    return known if all(_knows(known, label) for label in found) else names_of_labels(found)


def unknown_labels(
    paths: Paths,
    options: DataOptions,
    known: tuple[str, ...],
    *,
    subset: str | None = None,
    split: str = "train",
) -> list[str | int]:
    """Returns the labels in the data that a head for the labels `known` does not have; if a dataset
    has label ids, also those with another id than in `known`.

    It needs a pass over the rows; arguments and errors are those of `load_examples`.
    """
    source = open_source(paths, subset=subset, split=split, text_unit=options.text_unit)
    column = options.label_column or ""
    if names := source.label_names(column):
        return [name for place, name in enumerate(names) if known[place : place + 1] != (name,)]
    found = labels_in(row.values.get(column) for row in source.rows(Problems("skip")))
    return [label for label in sorted(found, key=str) if not _knows(known, label)]


def _knows(names: tuple[str, ...], label: str | int) -> bool:
    try:
        label_number(label, names)
    except ValueError:
        return False
    return True


def _default_cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lsg_flax"


def _open(folder: pathlib.Path) -> TokenizedDataset | None:
    if not any(folder.glob("*.bin")):  # no folder, or only what a killed run left behind
        return None
    try:
        return TokenizedDataset(folder)
    except DamagedCacheError as error:
        warnings.warn(f"{error} It is not used; the data is tokenized again.", stacklevel=3)
        return None


def _fingerprint(contents: str, options: DataOptions, tokenizer: Any) -> str:
    """Returns a hash of everything that the tokens depend on; `contents` is that of the data."""
    if getattr(tokenizer, "is_fast", False):
        reads = json.loads(tokenizer.backend_tokenizer.to_str())
        reads |= {"truncation": None, "padding": None}  # may be left from the last call
    else:
        settings = {name: str(value) for name, value in tokenizer.init_kwargs.items()}
        reads = [type(tokenizer).__name__, tokenizer.get_vocab(), settings]
    told = dataclasses.asdict(options)
    if options.has_target_texts:
        reads = [reads, getattr(tokenizer, "tgt_lang", None)]
    else:  # these fields were added later: older caches stay valid without them
        del told["max_target_length"], told["columns"]["target"]
    if TASKS[options.task].examples == "question":
        reads = [reads, WORDS]  # older ones lack it
    if not options.has_pairs:
        del told["lower_case"], told["columns"]["positive"], told["columns"]["negative"]
    parts = [
        _FORMAT,
        contents,
        told,
        reads,
        tokenizer.all_special_ids,
        [tokenizer.truncation_side, tokenizer.model_input_names, tokenizer.pad_token_id],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenize(
    folder: pathlib.Path,
    key: str,
    source: DataSource,
    options: DataOptions,
    tokenizer: Any,
    progress: bool,
) -> None:
    """Writes the rows into a temporary folder, and moves them to `folder` when complete."""
    problems = Problems(options.on_error)
    encoder = make_encoder(options, tokenizer, _labels(source, options), problems)
    with written_aside(folder) as aside, ArrayFiles(aside) as files:
        writer = RowWriter(files)
        with Bar("examples", about="tokenizing", shown=progress) as bar:
            for groups in _encoded(encoder, source, problems, bar):
                writer.add(groups)
        source.check_unchanged()
        if not writer.rows:
            raise ValueError(
                f"{source.name} has no rows that can be read ({problems.skipped} were skipped"
                + (f", the first of them: {problems.messages[0]})." if problems.messages else ").")
            )
        about = {
            "fingerprint": key,
            "options": dataclasses.asdict(options),
            "labels": encoder.labels,
            "skipped": problems.skipped,
            "messages": problems.messages,
            "truncated": encoder.cut.cut_texts,
            "cut": encoder.cut,
            "pad_token_id": tokenizer.pad_token_id or 0,
            "mask_token_id": -1 if tokenizer.mask_token_id is None else tokenizer.mask_token_id,
            "vocab_size": len(tokenizer),
            "special_ids": sorted(tokenizer.all_special_ids),
        }
        files.finish(about | writer.about)


def _encoded(
    encoder: ExampleEncoder, source: DataSource, problems: Problems, bar: Bar
) -> Iterator[list]:
    """Yields chunks of records with their rows."""
    examples = encoder.examples(source.rows(problems))
    while chunk := list(itertools.islice(examples, _CHUNK)):
        yield [(example and example.record, rows) for example, rows in encoder.encode(chunk)]
        bar.update(len(chunk))
    yield [(example and example.record, rows) for example, rows in encoder.rest()]


def _labels(source: DataSource, options: DataOptions) -> tuple[str, ...] | None:
    """Returns the names of the labels: given, known to the source, or found in a pass over the
    rows."""
    column = options.label_column
    if column is None:
        return None
    names = options.labels or source.label_names(column)
    if names is None:
        rows = source.rows(Problems("skip"))  # broken rows are reported when they are tokenized
        names = names_of_labels(row.values.get(column) for row in rows)
    return tuple(names)
