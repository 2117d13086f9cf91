"""Converts parameters in memory from full to LSG attention: longer position tables and the global
embeddings.

No weight is trained: positions are repeated, and a global token starts as [CLS] or [MASK] at
positions spread over the table. The numbers are those of the reference's LSGConverter
(lsg-converter 0.1.9), whose random draws can be injected; docs/design.md says where they differ on
purpose. The code is the same for all families.

Axes: P positions of a table, V vocabulary, E embedding width, G global tokens, 512 in the table.
"""

from dataclasses import dataclass
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lsg_flax.models import ModelConfig, ToLSG, family_of, sinusoids
from lsg_flax.patterns import MAX_GLOBAL_TOKENS, LSGConfig


@dataclass(frozen=True)
class LSGOptions:
    """The options of lsg_converter's LSGConverter, by its names.

    Attributes:
        max_sequence_length: number of tokens that the new model reads.
        random_global_init: whether to draw globals from the distribution of the word table instead
            of using [MASK].
        global_positional_stride: positions from one global to the next.
        keep_first_global_token: whether to keep global 0 unchanged (LSG sources only).
        resize_lsg: whether to change only the positions (LSG sources only).
        use_token_ids: whether to add the embedding of segment 0 to the globals.
        seed: seed of the random draws.
    """

    max_sequence_length: int = 4096
    random_global_init: bool = False
    global_positional_stride: int = 64
    keep_first_global_token: bool = False
    resize_lsg: bool = False
    use_token_ids: bool = True
    seed: int = 123


@dataclass(frozen=True)
class Draws:
    """Random numbers of a conversion, with which tests inject those of the reference: standard
    normal noise and, for random globals, the samples."""

    position_noise: np.ndarray | None = None  # [512 - P, D]
    global_noise: np.ndarray | None = None  # [512, E]
    global_samples: np.ndarray | None = None  # [512, E]; made from global_noise if not given


def to_lsg(
    params: dict[str, Any],
    config: ModelConfig,
    options: LSGOptions,
    *,
    lsg: LSGConfig,
    bos_token_id: int | None,
    mask_token_id: int | None,
    draws: Draws | None = None,
) -> tuple[dict[str, Any], ModelConfig]:
    """Converts parameters and config to an LSG model.

    Args:
        params, config: a model with full attention, or an LSG one to convert again or resize.
        options: the options of the conversion.
        lsg: the new attention pattern.
        bos_token_id, mask_token_id: ids whose word embeddings the globals start from ([CLS] if
            there is no bos).
        draws: random numbers to use instead of drawing them.

    Returns:
        The new parameters and config.

    Raises:
        ValueError: for options that do not fit the source, or a stride that does not fit the
            position table.
    """
    if any("encoder" in tree for tree in params.values()):  # the parts of a scorer
        ids = {"bos_token_id": bos_token_id, "mask_token_id": mask_token_id}
        parts = {
            n: to_lsg(tree, config, options, lsg=lsg, draws=draws, **ids)
            for n, tree in params.items()
        }
        return {name: made for name, (made, _) in parts.items()}, next(iter(parts.values()))[1]
    family = family_of(config.model_type)
    rule, offset = family.to_lsg, family.architecture.position_offset
    if rule is None:
        raise ValueError(
            f"a {config.model_type} model cannot become LSG: its attention is already local or "
            "hashed. Load it with lsg_flax.from_pretrained."
        )
    _check_options(options, config)
    leaves: dict[str, Any] = dict(flax.traverse_util.flatten_dict(params, sep="/"))
    tables = [table for table in rule.positions if table.path in leaves]
    has_globals = rule.positions[0].path in leaves  # a decoder on its own has none
    if not options.resize_lsg and has_globals:
        positions = np.asarray(leaves[rule.positions[0].path], np.float32)[offset:]
        made = _global_embeddings(
            leaves, rule, positions, options, bos_token_id, mask_token_id, draws or Draws()
        )
        if options.keep_first_global_token:
            made[0] = np.asarray(leaves[rule.globals][0])
        leaves[rule.globals] = jnp.asarray(made, leaves[rule.words].dtype)
    rows = options.max_sequence_length
    for table in tables:
        leaf = leaves[table.path]
        longer = _longer_table(np.asarray(leaf, np.float32), table.extended_by, offset, rows)
        leaves[table.path] = jnp.asarray(longer, leaf.dtype)
    positions = family.architecture.max_position_embeddings(rows)
    lengths = dict.fromkeys(rule.lengths, rows)
    new_config = config.with_overrides(max_position_embeddings=positions, lsg=lsg, **lengths)
    return flax.traverse_util.unflatten_dict(leaves, sep="/"), new_config


def _check_options(options: LSGOptions, config: ModelConfig) -> None:
    if config.lsg is None and (options.resize_lsg or options.keep_first_global_token):
        name = "resize_lsg" if options.resize_lsg else "keep_first_global_token"
        raise ValueError(
            f"{name}=True needs an LSG checkpoint as source, but this one has full attention; "
            "leave it out."
        )
    if options.max_sequence_length < 1:
        raise ValueError(f"max_sequence_length={options.max_sequence_length} must be at least 1.")


def _longer_table(
    table: Float[np.ndarray, "P E"], extended_by: str, offset: int, rows: int
) -> Float[np.ndarray, "Q E"]:
    """Returns a position table with `rows` rows after the first `offset`."""
    if extended_by == "sinusoid":
        return sinusoids(rows + offset, table.shape[1])
    head, positions = table[:offset], table[offset:]
    tiled = np.tile(positions, (-(-rows // len(positions)), 1))[:rows]
    return np.concatenate([head, tiled])


def spread_positions(
    positions: Float[np.ndarray, "P E"], stride: int, noise: Float[np.ndarray, "M E"]
) -> Float[np.ndarray, "G E"]:
    """Returns 512 rows of a position table in the order of the globals: row k is at position stride
    * k, wrapping around.

    Tables under 512 rows are extended with `noise` scaled to each column's mean and deviation;
    longer ones are truncated to a multiple of 512.

    Raises:
        ValueError: for a stride that does not fit the table.
    """
    count = MAX_GLOBAL_TOKENS
    if len(positions) < count:
        fill = positions.mean(axis=0) + positions.std(axis=0, ddof=1) * noise
        positions = np.concatenate([positions, fill])
    factor = len(positions) // count
    step = stride // factor
    if step == 0 or count % step:
        allowed = [factor * d for d in range(1, count + 1) if count % d == 0]
        raise ValueError(
            f"global_positional_stride={stride} does not fit a table of {len(positions)} "
            f"positions; choose one of {allowed}."
        )
    every = positions[: count * factor : factor]  # [512, E]
    return np.concatenate([every[start::step] for start in range(step)])


def _global_embeddings(
    leaves,
    rule: ToLSG,
    positions,
    options: LSGOptions,
    bos: int | None,
    mask: int | None,
    draws: Draws,
) -> np.ndarray:
    words, segment = np.asarray(leaves[rule.words], np.float32), 0.0
    if options.use_token_ids and rule.segments in leaves:
        segment = np.asarray(leaves[rule.segments][0], np.float32)
    generator = np.random.default_rng(options.seed)
    needed = (
        {"bos_token_id": bos}
        if options.random_global_init
        else {"bos_token_id": bos, "mask_token_id": mask}
    )
    for name, token in needed.items():
        if token is None or not 0 <= token < len(words):
            raise ValueError(
                f"{name}={token} is not a row of the word table (0..{len(words) - 1}), but the "
                "globals start from it; the source needs a tokenizer with that token, or the id in "
                "its config.json."
            )
    samples = draws.global_samples
    if options.random_global_init and samples is None:
        samples = _word_samples(words, generator, draws.global_noise)
    noise = draws.position_noise
    if noise is None:
        noise = generator.standard_normal(
            (max(MAX_GLOBAL_TOKENS - len(positions), 0), positions.shape[1])
        )
    spread = (
        spread_positions(positions, options.global_positional_stride, noise) + segment
    )  # [G, E]
    if options.random_global_init:
        rows = np.array(samples)
        rows[0] = words[bos] + segment  # a second time, as in the reference
    else:
        rows = np.broadcast_to(words[mask], spread.shape).copy()
        rows[0] = words[bos]
    return (rows + spread).astype(np.float32)


def _word_samples(
    words: Float[np.ndarray, "V E"],
    generator: np.random.Generator,
    noise: Float[np.ndarray, "G E"] | None,
) -> Float[np.ndarray, "G E"]:
    """Draws 512 rows from the normal distribution with the word table's mean and covariance."""
    covariance = np.cov(words.T)
    if len(words) > words.shape[1]:
        root = np.linalg.cholesky(covariance)
    else:  # too few words for full rank, which the Cholesky decomposition needs
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.abs(values))
    if noise is None:
        noise = generator.standard_normal((MAX_GLOBAL_TOKENS, words.shape[1]))
    return words.mean(axis=0) + noise @ root.T
