"""Encodings of documents: checks them, sorts them into batches of a few lengths, and pads them.

Axes: B batch, C choices, T tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lsg_flax.models import Model

# Lists of T numbers by the model's input names, as a tokenizer returns them; for multiple choice C
# such lists.
Encoding = dict[str, Any]


def check_encoding(
    name: str, encoding: Encoding, like: Encoding, *, model: Model, longest: int
) -> None:
    """Implements `Predictor.check`."""
    config = model.config
    tables = {
        "input_ids": ("vocab_size", config.vocab_size),
        "attention_mask": (None, 2),
        "token_type_ids": ("type_vocab_size", config.segments),
    }
    unknown = sorted(encoding.keys() - tables.keys())
    if unknown or "input_ids" not in encoding or encoding.keys() != like.keys():
        raise ValueError(
            f"{name} has the fields {sorted(encoding)} and the first one has {sorted(like)}; "
            f"all need input_ids, and the same fields among {sorted(tables)}."
        )
    choices = choices_of(encoding["input_ids"], model)
    if len(choices) != len(choices_of(like["input_ids"], model)):
        raise ValueError(f"{name} has {len(choices)} choices, unlike the first one.")
    for field in encoding:
        rows = choices_of(encoding[field], model)
        _check_rows(name, field, rows, list(map(len, choices)), *tables[field])
    length = max(map(len, choices))
    if length > longest:
        raise ValueError(
            f"{name} has {length} tokens, more than {longest}, the longest bucket; "
            f"{config.or_convert('truncate it (truncation=True, max_length=...)', length)}."
        )


def _check_rows(
    place: str, name: str, rows, lengths: list[int], field: str | None, limit: int
) -> None:
    given = list(map(len, rows))
    if given != lengths or 0 in lengths:
        raise ValueError(
            f"{place} has {given} {name} and {lengths} input_ids; the numbers must be equal and at "
            "least 1."
        )
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= limit:
        if field is None:
            raise ValueError(f"{place} has {name} in {low}..{high}; a mask has only 0 and 1.")
        one_segment = name == "token_type_ids" and limit < 2
        advice = f"leave {name} out" if one_segment else "do tokenizer and checkpoint fit together?"
        raise ValueError(
            f"{place} has {name} in {low}..{high}, but {field}={limit} allows "
            f"{f'0..{limit - 1}' if limit else 'none'}; {advice}"
        )


def choices_of(values: Sequence, model: Model) -> Sequence[Sequence[int]]:
    """Returns one list of tokens per choice; for a task without choices just one list."""
    return values if model.task_record.input_rank == 3 else [values]


def batches_of(
    encodings: Sequence[Encoding], model: Model, batch_size: int, buckets: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yields each batch's bucket and the indices of its documents; the longest come first, so that
    a lack of memory shows at once."""
    lengths = [max(map(len, choices_of(e["input_ids"], model))) for e in encodings]
    waiting: dict[int, list[int]] = {bucket: [] for bucket in reversed(buckets)}
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        waiting[min(b for b in buckets if b >= lengths[place])].append(place)
    for bucket, places in waiting.items():
        for start in range(0, len(places), batch_size):
            yield bucket, places[start : start + batch_size]


def padded(
    encodings: Sequence[Encoding], model: Model, batch_size: int, bucket: int
) -> dict[str, np.ndarray]:
    """Returns arrays [B, T] ([B, C, T] for multiple choice) of a full batch; missing rows are
    masked."""
    fill = {"input_ids": model.config.filler}
    choices = len(choices_of(encodings[0]["input_ids"], model))
    arrays = {
        name: np.full((batch_size, choices, bucket), fill.get(name, 0), np.int32)
        for name in sorted(encodings[0].keys() | {"attention_mask"})
    }
    for row, encoding in enumerate(encodings):
        for name, array in arrays.items():
            given = encoding.get(name)  # only the mask may be missing
            for choice, ids in enumerate(choices_of(encoding["input_ids"], model)):
                tokens = 1 if given is None else choices_of(given, model)[choice]
                array[row, choice, : len(ids)] = tokens
    if model.task_record.input_rank == 3:
        return arrays
    return {name: array[:, 0] for name, array in arrays.items()}
