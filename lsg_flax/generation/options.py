"""The options of `generate`: their names, their defaults from the checkpoint, and the records made
from them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypedDict

import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from numpy.typing import ArrayLike

from lsg_flax.checks import Range, checked_value, require
from lsg_flax.generation.beam import Beams
from lsg_flax.generation.loop import Decoding
from lsg_flax.generation.rules import Rules, check_whole
from lsg_flax.generation.sampling import Greedy, Sample

Tokens = int | Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """transformers' options, with the same meanings and defaults. An option that is not given comes
    from the checkpoint's generation_config.json or config.json; None switches it off.
    Options that are not listed here are described in `Rules`.

    Attributes:
        max_length: largest number of tokens, the prompt included; 20 by default.
        max_new_tokens: largest number of tokens without the prompt, instead of max_length.
        num_beams, length_penalty, early_stopping: of beam search (see `Beams`).
        num_return_sequences: number of texts per row, which follow each other in the result.
        do_sample: whether tokens are drawn, with `key`.
        temperature, top_k, top_p: of sampling (see `Sample`).
        filter_thres: local-attention's form of top_k: the share of tokens that is not kept.
        eos_token_id: one or more tokens that end a row.
        pad_token_id: the token that follows the end of a row.
        decoder_start_token_id: the first token of an encoder-decoder's texts.
        forced_bos_token_id: the second token of these, one for all rows or one for each.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    num_return_sequences: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    filter_thres: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Tokens | None
    begin_suppress_tokens: Tokens | None
    forced_bos_token_id: Tokens | None
    forced_eos_token_id: Tokens | None
    eos_token_id: Tokens | None
    pad_token_id: int | None
    decoder_start_token_id: int | None


class GenerateCall(GenerateOptions, total=False):
    """The options, and further arguments of one call of `generate`.

    Attributes:
        decoder_input_ids: for an encoder-decoder the tokens [B, T] that each row begins with; the
            start token is added in front if no row has it.
        position_ids: [B, T], positions of the prompt, continued from the last one; by default the
            model's own.
        encoder_hidden_states, encoder_attention_mask: for a decoder with cross-attention.
        key: random key of sampling.
        stream: a function that is called with each new token of a single row as soon as it is
            computed.
        bucket: prompts are padded to a multiple of this number of tokens.
        use_cache: with False every step reads all tokens again. A Reformer's cache is the
            reference's approximation; other models generate the same tokens either way.
        mesh: a mesh of `sharding.make_mesh`: rows are sharded over its axes data and fsdp, an
            encoder's tokens over sequence. `params` must be on it, as `from_pretrained(mesh=mesh)`
            loads them.
    """

    decoder_input_ids: ArrayLike | None
    position_ids: ArrayLike | None
    encoder_hidden_states: ArrayLike | None
    encoder_attention_mask: ArrayLike | None
    key: PRNGKeyArray | None
    stream: Callable[[int], object] | None
    bucket: int
    use_cache: bool
    mesh: Mesh | None


OPTION_NAMES = tuple(GenerateOptions.__annotations__)
_SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": None, "filter_thres": None}
_BEAMS = {"length_penalty": 1.0, "early_stopping": False}
_ID_LISTS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
# Unsupported options of checkpoints, with the value that switches each off.
_UNSUPPORTED: dict[str, int | None] = {
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("num_beam_groups", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("sequence_bias", "force_words_ids", "constraints", "forced_decoder_ids")),
    **dict.fromkeys(("exponential_decay_length_penalty", "max_time")),
    "encoder_repetition_penalty": 1,
    "renormalize_logits": 0,
}


def checkpoint_options(config: Any) -> dict[str, Any]:
    """Returns a checkpoint's generation options. Those of generation_config.json, stored as the
    config's other field "generation_config", take precedence over those of config.json."""
    stored = config.other("generation_config", {})
    names = [name for name in (*OPTION_NAMES, *_UNSUPPORTED) if name not in stored]
    of_config = {name: getattr(config, name, config.other(name, None)) for name in names}
    found = stored | {name: value for name, value in of_config.items() if value is not None}
    return found | ({"top_k": None} if found.get("top_k") == 0 else {})  # so files write "off"


def choose_options(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options that are on: the given ones, then those of the checkpoint.

    Raises:
        ValueError: for an unknown name, options that exclude each other, and a checkpoint with an
            unsupported option.
    """
    unknown = sorted(given.keys() - GenerateCall.__annotations__.keys())
    require(
        not unknown,
        f"generate has no options {unknown}; it has {sorted(GenerateCall.__annotations__)}.",
    )
    stored = checkpoint_options(config)
    for name, neutral in _UNSUPPORTED.items():
        require(
            stored.get(name) in (None, neutral),
            f"the checkpoint's {name}={stored.get(name)!r} is not supported; remove it from its "
            "generation_config.json or config.json.",
        )
    own = {name: value for name, value in given.items() if name in OPTION_NAMES}
    lengths = [f"{n}={own[n]}" for n in ("max_length", "max_new_tokens") if own.get(n) is not None]
    require(len(lengths) < 2, f"{' and '.join(lengths)} are two limits: give one of them.")
    if own.get("max_length") is not None:
        stored.pop("max_new_tokens", None)
    chosen = {n: v for n, v in (stored | own).items() if n in OPTION_NAMES and v is not None}
    for name in ("num_beams", "num_return_sequences"):
        check_whole(name, chosen.setdefault(name, 1), 1)
    sampled = chosen.setdefault("do_sample", False)
    require(isinstance(sampled, bool), f"do_sample={sampled!r} must be True or False.")
    _check_uses(chosen, own)
    if (share := chosen.pop("filter_thres", None)) is not None:
        chosen["top_k"] = _kept(share, own, config.vocab_size)
    return chosen


def _kept(share: Any, own: Mapping[str, Any], vocabulary: int) -> int:
    """The number of tokens that `filter_thres` keeps, computed as in local-attention."""
    share = checked_value("filter_thres", share, float, Range(0.0, 1.0, "must be in [0, 1]"))
    count = int((1 - share) * vocabulary)
    require(
        own.get("top_k") is None, "filter_thres and top_k set the same thing: give one of them."
    )
    require(
        count >= 1,
        f"filter_thres={share} keeps none of vocab_size={vocabulary} tokens: give at most "
        f"{1 - 1 / vocabulary:.4f}, or top_k=1.",
    )
    return count


def _check_uses(chosen: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError for given options without effect, and for too many texts per row."""
    beams, returned = chosen["num_beams"], chosen["num_return_sequences"]
    sampled = chosen["do_sample"]
    idle = {} if sampled else _SAMPLING
    for names, need in ((idle, "do_sample=True"), (_BEAMS if beams == 1 else {}, "num_beams > 1")):
        used = {n: own[n] for n, off in names.items() if own.get(n) not in (None, off)}
        require(not used, f"{used} need {need}; without it they do nothing. Leave them out.")
    require(
        returned <= beams or (sampled and beams == 1),
        f"num_return_sequences={returned} is more than num_beams={beams} texts per row: give more "
        "beams, or do_sample=True with one beam.",
    )


def decoding_of(chosen: Mapping[str, Any], vocabulary: int) -> Decoding:
    """Makes the record of the options; raises ValueError for values out of range."""
    rules = _rules_of(chosen)
    sample = None
    if chosen["do_sample"]:
        sample = Sample(**{name: chosen[name] for name in _SAMPLING if name in chosen})
    if chosen["num_beams"] > 1:
        values = {name: chosen[name] for name in _BEAMS if name in chosen}
        picker = Beams(chosen["num_beams"], sample=sample, **values)
    else:
        picker = sample or Greedy()
    pad = chosen.get("pad_token_id")
    require(
        not rules.eos_token_id or pad is not None,
        "rows that end are padded with pad_token_id, and there is none: give one.",
    )
    for name in ("pad_token_id", "decoder_start_token_id"):
        value = chosen.get(name, 0)
        require(
            np.ndim(value) == 0,
            f"{name}={value!r} must be one token id for all rows; to begin rows differently pass "
            "decoder_input_ids.",
        )
    named = rules.tokens | {
        name: token_ids(name, chosen.get(name, ()))
        for name in ("pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
    }
    for name, ids in named.items():
        outside = sorted({token for token in ids if token >= vocabulary})
        require(
            not outside,
            f"{name} has {outside}, but vocab_size={vocabulary} allows 0..{vocabulary - 1}.",
        )
    _check_left(rules, named["forced_bos_token_id"], vocabulary)
    return Decoding(picker, rules, chosen["num_return_sequences"], pad or 0)


def _check_left(rules: Rules, first: tuple[int, ...], vocabulary: int) -> None:
    """Raises ValueError for rules that leave no token at some position.

    Args:
        rules: the rules.
        first: the tokens that are forced at the second position.
        vocabulary: number of tokens.
    """
    suppressed, begin = set(rules.suppress_tokens), set(rules.begin_suppress_tokens)
    banned = {word[0] for word in rules.bad_words_ids if len(word) == 1}
    ends, early = set(rules.eos_token_id), max(rules.min_length, rules.min_new_tokens) > 0
    banned = (banned - ends) | (ends if early else set())
    require(
        len(suppressed | begin | banned) < vocabulary,
        f"suppress_tokens, begin_suppress_tokens and bad_words_ids leave none of vocab_size="
        f"{vocabulary} tokens to begin with{', for min_length bans the ends' if early else ''}: "
        "allow at least one.",
    )
    forced = {"forced_bos_token_id": first, "forced_eos_token_id": rules.forced_eos_token_id}
    every = {"forced_bos_token_id": any, "forced_eos_token_id": all}  # one per row; any of them
    lost = {
        n: [*ids] for n, ids in forced.items() if ids and every[n](i in suppressed for i in ids)
    }
    require(
        not lost,
        f"{lost} is suppressed by suppress_tokens, so that no token is left: take it out of one "
        "of them.",
    )


def _rules_of(chosen: Mapping[str, Any]) -> Rules:
    values = {f.name: chosen[f.name] for f in fields(Rules) if f.name in chosen}
    values |= {name: token_ids(name, values[name]) for name in _ID_LISTS if name in values}
    words = values.get("bad_words_ids", ())
    require(
        isinstance(words, list | tuple) and not any(np.ndim(word) != 1 for word in words),
        f"bad_words_ids={words!r} must be a list of words, each a list of token ids.",
    )
    values["bad_words_ids"] = tuple(token_ids("bad_words_ids", word) for word in words)
    return Rules(**values)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Returns one id or several as a tuple; raises ValueError for anything else."""
    ids = np.atleast_1d(np.asarray(value))
    whole = ids.size == 0 or (np.issubdtype(ids.dtype, np.integer) and ids.min() >= 0)
    require(
        ids.ndim == 1 and bool(whole),
        f"{name}={value!r} must be a token id or a list of them, integers of at least 0.",
    )
    return tuple(ids.tolist())
