"""Distillation of embeddings: a student that reads a long text at once learns the vectors that a
dense teacher gives to short parts of it, and for the whole text their average.

The loss is the squared distance of both vectors, as in arXiv 2004.09813. The student's vectors of
parts are pooled from its states of the whole text, as in arXiv 2409.04701 (late chunking).

Axes: B batch, T tokens, X spans (the parts of a text), D model width.
"""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsg_flax.hub import SentenceSettings, Tokenizer
from lsg_flax.models import ModelConfig, pool, unit

# Vectors of the parts of each text, the whole text's last, and which of them are real.
PartVectors = tuple[Float[Array, "B _ D"], Bool[Array, "B _"]]


@dataclasses.dataclass(frozen=True)
class Frame:
    """The special tokens around a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Frame":
        """Returns the special tokens that a tokenizer puts around one text."""
        plain, framed = (
            tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]
            for special in (False, True)
        )
        at = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        return cls(tuple(framed[:at]), tuple(framed[at + len(plain) :]))

    @property
    def size(self) -> int:
        """The number of special tokens."""
        return len(self.before) + len(self.after)


def split_parts(
    ids: Int[Array, "B T"], mask: Int[Array, "B T"], frame: Frame, length: int
) -> tuple[Int[Array, "B X _"], Int[Array, "B X _"], Int[Array, "B T"]]:
    """Splits each text into consecutive parts of `length` tokens, each with its own frame; the last
    part may be shorter.

    Args:
        ids, mask: framed texts, padded on the right.
        length: tokens of a part, frame included; at most T are used.

    Returns:
        Ids and masks of the parts, and the number of the part that each token of the text is in;
        the frame of the whole text counts as part of the first and the last one.
    """
    width = min(length, ids.shape[1])
    room, start, end = width - frame.size, len(frame.before), len(frame.after)
    count = -(-(ids.shape[1] - frame.size) // room)
    content = mask.sum(axis=1) - frame.size  # [B]
    sizes = jnp.clip(content[:, None] - room * jnp.arange(count)[None], 0, room)  # [B, X]
    there = (sizes > 0) | (jnp.arange(count) == 0)[None]
    place = jnp.arange(width)[None, None]  # position in a part
    source = start + room * jnp.arange(count)[:, None] + (jnp.arange(width) - start)[None]
    taken = ids[:, jnp.clip(source, 0, ids.shape[1] - 1)]  # [B, X, T]
    behind = place - start - sizes[..., None]
    before = jnp.asarray([*frame.before, 0], ids.dtype)[jnp.minimum(place, start)]
    after = jnp.asarray([*frame.after, 0], ids.dtype)[jnp.clip(behind, 0, end)]
    parts = jnp.where(place < start, before, jnp.where(behind < 0, taken, after))
    real = (behind < end) & there[..., None] & (mask.any(axis=1)[:, None, None])
    part = (jnp.arange(ids.shape[1]) - start)[None] // room
    return parts, real.astype(mask.dtype), jnp.clip(part, 0, there.sum(axis=1)[:, None] - 1)


def teacher_vectors(
    states: Float[Array, "_ T D"], mask: Int[Array, "B X T"], how: SentenceSettings
) -> PartVectors:
    """Returns the teacher's vectors of each part and, last, of the whole text: the average of the
    parts, weighted by their numbers of tokens.

    Args:
        states: the teacher's hidden states of all parts of all texts.
        mask: the masks of the parts.
    """
    batch, count, length = mask.shape
    flat = pool(states, mask.reshape(-1, length), how.pooling, normalize=how.normalize)
    vectors = flat.reshape(batch, count, -1)
    tokens = mask.sum(axis=2)  # [B, X]
    shares = tokens / jnp.maximum(tokens.sum(axis=1, keepdims=True), 1)
    whole = jnp.einsum("BX,BXD->BD", shares, vectors, precision="highest")[:, None]
    whole = unit(whole) if how.normalize else whole
    real = jnp.concatenate([tokens > 0, tokens[:, :1] > 0], axis=1)
    return jnp.concatenate([vectors, whole], axis=1), real


def student_vectors(
    states: Float[Array, "B T D"],
    mask: Int[Array, "B T"],
    part: Int[Array, "B T"],
    parts: int,
    how: SentenceSettings,
) -> Float[Array, "B _ D"]:
    """Returns the student's vectors of each part, read within the whole text, then of the whole.

    Only mean pooling has vectors of parts; with another pooling there is only that of the whole.
    """
    whole = pool(states, mask, how.pooling, normalize=how.normalize)[:, None]
    if how.pooling != "mean":
        return whole
    own = (part[..., None] == jnp.arange(parts)[None, None]) & (mask[..., None] != 0)  # [B, T, X]
    sums = jnp.einsum("BTX,BTD->BXD", own.astype(jnp.float32), states.astype(jnp.float32))
    means = sums / jnp.maximum(own.sum(axis=1), 1)[..., None]
    return jnp.concatenate([unit(means) if how.normalize else means, whole], axis=1)


def distance_sums(
    student: Float[Array, "B _ D"], teacher: PartVectors
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "B"]]:
    """Returns the sum over real texts of the mean squared distance of their vectors, the number of
    these texts, and for each text the cosine of student and teacher of the whole."""
    wanted, real = (side[:, -student.shape[1] :] for side in teacher)
    squares = ((student - wanted) ** 2).sum(axis=2)  # [B, X]
    means = jnp.where(real, squares, 0).sum(axis=1) / jnp.maximum(real.sum(axis=1), 1)
    cosines = (unit(student[:, -1]) * unit(wanted[:, -1])).sum(axis=1)
    return means.sum(), real[:, -1].sum(dtype=jnp.float32), cosines


def check_teacher(
    teacher: tuple[str, ModelConfig, Tokenizer], student: tuple[str, ModelConfig, Tokenizer]
) -> None:
    """Raises ValueError if the teacher's vectors or tokenizer do not fit the student's.

    Args:
        teacher, student: name, config and tokenizer of each.
    """
    (name, config, tokens), (own, own_config, own_tokens) = teacher, student
    if config.hidden_size != own_config.hidden_size:
        raise ValueError(
            f"teacher={name} has embeddings of width {config.hidden_size}, but {own} has "
            f"{own_config.hidden_size}; give a teacher of the same width, such as the checkpoint "
            f"that {own} was converted from."
        )
    difference = _difference(tokens, own_tokens)
    if difference:
        raise ValueError(
            f"teacher={name} has another tokenizer than {own} ({difference}), but it reads the "
            f"student's tokens; give a teacher with the same tokenizer, such as the checkpoint "
            f"that {own} was converted from."
        )


def check_part(name: str, length: int | None, reads: int, frame: Frame) -> None:
    """Raises ValueError for a length of parts that the teacher called `name` cannot read."""
    if length is None or not frame.size < length <= reads:
        raise ValueError(
            f"teacher_length={length} must be in {frame.size + 1}..{reads}: {name} reads at most "
            f"{reads} tokens, {frame.size} special ones included."
        )


def _difference(one: Any, other: Any) -> str:
    """Returns how two tokenizers differ, in words; an empty text if they do not."""
    first, second = one.get_vocab(), other.get_vocab()
    if first != second:
        ours = sorted(token for token, number in first.items() if second.get(token) != number)
        theirs = sorted(token for token, number in second.items() if first.get(token) != number)
        shown = ", ".join(map(repr, (ours or theirs)[:3]))
        return f"{len(first)} and {len(second)} tokens; {shown} are missing or have other ids"
    if getattr(one, "is_fast", False) and getattr(other, "is_fast", False):
        parts = [json.loads(each.backend_tokenizer.to_str()) for each in (one, other)]
        for part in ("normalizer", "pre_tokenizer", "model", "post_processor"):
            if parts[0][part] != parts[1][part]:
                return f"they differ in their {part}"
    return ""
