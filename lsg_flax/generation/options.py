"""The options of `generate`: their names, where those that are not given come from, and the records
that they make.
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
    """transformers' options, with its meanings and defaults. An option that is not given is that of
    the checkpoint's generation_config.json or config.json; None is off.

    Attributes:
        max_length: the most tokens with the prompt (20), or max_new_tokens without it.
        num_beams, length_penalty, early_stopping: of beam search (see `Beams`).
        num_return_sequences: texts of each row, which follow each other in the result.
        do_sample: draw tokens, with `key`; temperature, top_k, top_p: see `Sample`.
        filter_thres: local-attention's name for a top_k of this share less than all tokens.
        eos_token_id: one or more tokens that end a row; pad_token_id follows it.
        decoder_start_token_id: what an encoder-decoder begins with.
        forced_bos_token_id: its second token, one for all rows or one for each.
        All others: see `Rules`.
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
    """The options, and what belongs to one call alone.

    Attributes:
        decoder_input_ids: [B, T] for an encoder-decoder, what each row begins with; the start token
            comes before it if no row has it.
        position_ids: [B, T], counted on from the last; by default the model's own.
        encoder_hidden_states, encoder_attention_mask: for a decoder with cross-attention.
        key: what sampling draws with.
        stream: is called with each new token of a single row as soon as it is there.
        bucket: prompts are filled up to a multiple of so many tokens.
        use_cache: False reads all tokens anew for each one: a Reformer's cache is the reference's
            approximation. Other models write the same either way.
        mesh: of `sharding.make_mesh`: rows lie over its axes data and fsdp, an encoder's tokens
            over sequence. `params` must lie on it, as `from_pretrained(mesh=mesh)` loads them.
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
# What a checkpoint may ask for and generate does not do, with the value that asks for nothing.
_UNSUPPORTED: dict[str, int | None] = {
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("num_beam_groups", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("sequence_bias", "force_words_ids", "constraints", "forced_decoder_ids")),
    **dict.fromkeys(("exponential_decay_length_penalty", "max_time")),
    "encoder_repetition_penalty": 1,
    "renormalize_logits": 0,
}


def checkpoint_options(config: Any) -> dict[str, Any]:
    """What a checkpoint says of generation: its generation_config.json, which stands under
    "generation_config" among the config's other fields, before its config.json."""
    stored = config.other("generation_config", {})
    names = [name for name in (*OPTION_NAMES, *_UNSUPPORTED) if name not in stored]
    of_config = {name: getattr(config, name, config.other(name, None)) for name in names}
    found = stored | {name: value for name, value in of_config.items() if value is not None}
    return found | ({"top_k": None} if found.get("top_k") == 0 else {})  # so files write "off"


def choose_options(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """All that is not off: the given ones, and for the others those of the checkpoint.

    Raises:
        ValueError: for a name that there is not, options that exclude each other, and for a
            checkpoint that asks for what is not supported.
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
    """How many tokens `filter_thres` keeps, in the arithmetic of local-attention."""
    share = checked_value("filter_thres", share, float, Range(0.0, 1.0, "must lie in [0, 1]"))
    count = int((1 - share) * vocabulary)
    require(own.get("top_k") is None, "filter_thres and top_k are one thing: give one of them.")
    require(
        count >= 1,
        f"filter_thres={share} keeps none of vocab_size={vocabulary} tokens: give at most "
        f"{1 - 1 / vocabulary:.4f}, or top_k=1.",
    )
    return count


def _check_uses(chosen: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError for given options that would do nothing, and too many texts of a row."""
    beams, returned = chosen["num_beams"], chosen["num_return_sequences"]
    sampled = chosen["do_sample"]
    idle = {} if sampled else _SAMPLING
    for names, need in ((idle, "do_sample=True"), (_BEAMS if beams == 1 else {}, "num_beams > 1")):
        used = {n: own[n] for n, off in names.items() if own.get(n) not in (None, off)}
        require(not used, f"{used} need {need}; without it they do nothing. Leave them out.")
    require(
        returned <= beams or (sampled and beams == 1),
        f"num_return_sequences={returned} texts of a row are more than num_beams={beams} writes: "
        "give more beams, or do_sample=True with one.",
    )


def decoding_of(chosen: Mapping[str, Any], vocabulary: int) -> Decoding:
    """The record of the options; raises ValueError for values out of range."""
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
        "rows that end need a pad_token_id to be filled with: give one.",
    )
    for name in ("pad_token_id", "decoder_start_token_id"):
        value = chosen.get(name, 0)
        require(
            np.ndim(value) == 0,
            f"{name}={value!r} must be one token id for all rows; rows that begin differently are "
            "given in decoder_input_ids.",
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
    """Raises ValueError for rules that leave no token at some place, which would be a wrong one.

    Args:
        first: the tokens that are forced behind a single one.
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
    every = {"forced_bos_token_id": any, "forced_eos_token_id": all}  # one a row; any of them
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
    """One id or more as a tuple; raises ValueError for what is none."""
    ids = np.atleast_1d(np.asarray(value))
    whole = ids.size == 0 or (np.issubdtype(ids.dtype, np.integer) and ids.min() >= 0)
    require(
        ids.ndim == 1 and bool(whole),
        f"{name}={value!r} must be a token id or a list of them, whole numbers of at least 0.",
    )
    return tuple(ids.tolist())
