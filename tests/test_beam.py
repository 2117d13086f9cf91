"""Beam search and the rules on tokens: against transformers, as recorded, and against slow obvious
versions in Python, for models whose logits are looked up in a table.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from slow_generation import laid_out, slow_rules, slow_search
from table_model import CASES, DRAWS, EOS, FLOATS, GOLDEN, MODEL, PAD, VOCABULARY

from lsg_flax.generation import Beams, Rules, Sample, Text, generate, loop
from lsg_flax.generation.beam import highest
from lsg_flax.generation.rules import apply_rules
from lsg_flax.generation.sampling import warp

# A few of every kind in `make check`: each has a program of its own.
NUMBERS = [pytest.param(i, marks=[pytest.mark.slow] if i % 5 else []) for i in range(len(CASES))]


@pytest.mark.parametrize("number", NUMBERS)
def test_generate_gives_what_transformers_gives(number):
    """The same tokens, width and padding, and scores; with ties too."""
    table, options = CASES[number]
    beams = options.get("num_beams", 1) > 1
    found = generate(
        MODEL,
        {"table": jnp.asarray(GOLDEN[table])},
        GOLDEN["input_ids"],
        return_scores=beams,
        **{"max_length": 14} | options,
    )
    ids, scores = found if beams else (found, None)
    np.testing.assert_array_equal(ids, GOLDEN[f"ids_{number}"])
    if beams:
        np.testing.assert_allclose(scores, GOLDEN[f"scores_{number}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", range(len(DRAWS)))
def test_texts_are_drawn_as_often_as_transformers_draws_them(number):
    ids, times = GOLDEN[f"drawn_{number}"], GOLDEN[f"times_{number}"]
    rows = np.repeat(GOLDEN["input_ids"][1:2], times.sum(), axis=0)
    found = generate(MODEL, FLOATS, rows, key=jax.random.key(0), **DRAWS[number])
    drawn, count = np.unique(found, axis=0, return_counts=True)
    wanted = dict(zip(map(tuple, ids.tolist()), times / times.sum(), strict=True))
    got = dict(zip(map(tuple, drawn.tolist()), count / len(rows), strict=True))
    distance = sum(abs(wanted.get(t, 0) - got.get(t, 0)) for t in {*wanted, *got}) / 2
    assert distance < 0.08, (wanted, got)  # 0.05 between two runs of the reference


TOKENS = st.integers(0, 6)
RUNS = [(), ((3,),), ((2,), (4, 5)), ((1, 2, 3), (5, 5), (6,)), ((0, 1), (4, 4, 4, 4))]
SOME_RULES = {
    "none": st.just({}),
    "repetition_penalty": st.sampled_from([0.5, 1.3, 2.0]),
    "no_repeat_ngram_size": st.integers(1, 4),
    "encoder_no_repeat_ngram_size": st.integers(1, 4),
    "bad_words_ids": st.sampled_from(RUNS[1:]),
    "min_length": st.integers(1, 9),
    "min_new_tokens": st.integers(1, 9),
    "first": st.tuples(TOKENS, TOKENS),
    "forced_eos_token_id": st.sampled_from([(2,), (0, 5)]),
    "suppress_tokens": st.sampled_from([(3,), (0, 2, 6)]),
    "begin_suppress_tokens": st.sampled_from([(3,), (0, 2, 6)]),
}
ALL_RULES = st.fixed_dictionaries({}, optional={n: s for n, s in SOME_RULES.items() if n != "none"})


@pytest.mark.parametrize("name", [*SOME_RULES, "all"])
def test_rules_do_what_they_say(name):
    """Each alone, and all in their order: for two rows of two beams."""
    one = st.fixed_dictionaries({name: SOME_RULES.get(name, st.none())})
    width, sources = 9, 5

    @settings(max_examples=40 if name == "all" else 25, deadline=None)
    @given(
        values=ALL_RULES if name == "all" else one if name != "none" else st.just({}),
        ends=st.sampled_from([(), (2,), (3, 5)]),
        seed=st.integers(0, 2**32 - 1),
        counts=st.tuples(*[st.integers(1, width)] * 3).map(sorted),
        source_length=st.integers(1, sources),
        few=st.booleans(),
    )
    def check(values, ends, seed, counts, source_length, few):
        first, (start, length, limit) = values.pop("first", None), counts
        rules, generator = Rules(ends, **values), np.random.default_rng(seed)
        tokens = generator.integers(0, 2 if few else 7, (2, 2, width))  # few: many are repeated
        source = generator.integers(0, 2 if few else 7, (2, sources))
        scores = generator.standard_normal((2, 2, 7)).astype(np.float32)
        numbers = (jnp.asarray(n) for n in (length, start, limit))
        text = Text(jnp.asarray(tokens), *numbers, jnp.asarray(source), jnp.asarray(source_length))
        if first is not None:
            text = text._replace(first=jnp.asarray(first))
        got = apply_rules(rules, text, jnp.asarray(scores))
        for row, beam in itertools.product(range(2), range(2)):
            wanted = slow_rules(
                rules,
                tokens[row, beam, :length].tolist(),
                scores[row, beam],
                start=start,
                limit=limit,
                source=source[row, :source_length].tolist(),
                first=None if first is None else first[row],
            )
            np.testing.assert_allclose(got[row, beam], wanted, rtol=1e-6)

    check()


def log_probabilities(generator, shape, *, whole):
    """Random ones that like to end, or whole ones with many ties: one token of each row is sure."""
    if not whole:
        scores = 1.5 * generator.standard_normal(shape) + (np.arange(shape[-1]) == EOS)
        return (scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))).astype(np.float32)
    table = -24.0 - generator.integers(0, 3, shape)
    best = generator.integers(0, shape[-1], shape[:-1])
    np.put_along_axis(table, best[..., None], 0.0, axis=-1)
    return table.astype(np.float32)


def test_scores_that_are_equal_stay_so():
    """Divided by any length as in float32 division, not by a rounded reciprocal."""
    beams, scores = Beams(2, length_penalty=1.0), np.random.default_rng(0).standard_normal((9, 50))
    divide = jax.jit(lambda scores, length: beams.divide(scores, length, 20))
    for length in range(1, 21):
        got = divide(scores.astype(np.float32), jnp.asarray(length))
        np.testing.assert_array_equal(got, scores.astype(np.float32) / np.float32(length))


@pytest.mark.parametrize("sample", [Sample(top_k=1), Sample(top_p=0.01), Sample(2.0, 2, 0.01)])
def test_beams_have_tokens_left_to_draw(sample):
    """So that one goes on where another ends; without beams there is one."""
    logits = jax.random.normal(jax.random.key(0), (4, 9))
    kept = [np.isfinite(warp(logits, sample, keep)).sum(axis=1) for keep in (1, 3)]
    np.testing.assert_array_equal(kept, [[1] * 4, [3] * 4])


@pytest.mark.parametrize("values", [2, 1000])
def test_the_highest_are_those_of_top_k(values):
    """The first of equal ones first, in rows that are no whole number of runs; with -inf too."""
    rows = np.random.default_rng(0).integers(0, values, (4, 1003)).astype(np.float32)
    rows[1, 5:], rows[2, :-5] = -np.inf, -np.inf
    found, places = jax.jit(highest, static_argnums=(1, 2))(rows, 9, 16)
    wanted = np.argsort(-rows, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(places, wanted)
    np.testing.assert_array_equal(found, np.take_along_axis(rows, wanted, axis=1))


SEARCHES = [
    {"num_beams": 2, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.0, "eos_token_id": [2, 5, 7]},
    {"num_beams": 3, "length_penalty": -0.5, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": 1.0, "early_stopping": "never", "eos_token_id": [4, 2]},
    {"num_beams": 4, "length_penalty": 2.0, "forced_eos_token_id": 2, "no_repeat_ngram_size": 2},
    {"num_beams": 5, "min_length": 7, "repetition_penalty": 1.5, "early_stopping": True},
]


@pytest.mark.parametrize("options", SEARCHES)
def test_beam_search_is_the_slow_one(options):
    """Row by row, so that rows do not depend on each other; with prompts of all lengths of one
    bucket, of which the longest leave room for a single token."""
    beams, penalty = options["num_beams"], options.get("length_penalty", 1.0)
    early, limit = options.get("early_stopping", False), 9
    ends = np.atleast_1d(options.get("eos_token_id", EOS)).tolist()
    names = ("repetition_penalty", "no_repeat_ngram_size", "min_length")
    rules = {name: options[name] for name in names if name in options}
    forced = (options["forced_eos_token_id"],) if "forced_eos_token_id" in options else ()
    rules = Rules(tuple(ends), forced_eos_token_id=forced, **rules)
    compiled = loop.decode._cache_size()

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.booleans())
    @example(0, 8, True)
    @example(13, 2, False)  # with length_penalty=-0.5 and "never" the bound is that of now
    def check(seed, length, whole):
        generator = np.random.default_rng(seed)
        table = log_probabilities(generator, GOLDEN["ties"].shape, whole=whole)
        source = np.stack([generator.integers(0, VOCABULARY, 4) for _ in range(3)])
        prompt = generator.integers(0, VOCABULARY, (3, length))
        prompt[:, 0] = EOS

        def scores_of(row, tokens):
            scores = table[source[row, 0] % 3, (3 * tokens[-1] + tokens[-2]) % 17]
            return slow_rules(rules, tokens, scores, start=length, limit=limit)

        found, margins = [], []
        for row in range(3):
            found += slow_search(
                functools.partial(scores_of, row),
                prompt[row].tolist(),
                margins=margins,
                beams=beams,
                ends=ends,
                limit=limit,
                penalty=penalty,
                early=early,
            )
        assume(whole or not (np.asarray(margins) < 1e-5).any())  # no matter of rounding
        wanted, scores = laid_out(found, ends=ends, limit=limit, pad=PAD)
        ids, got = generate(
            MODEL,
            {"table": jnp.asarray(table)},
            source,
            decoder_input_ids=prompt,
            max_length=limit,
            num_return_sequences=beams,
            return_scores=True,
            **options,
        )
        np.testing.assert_array_equal(ids, wanted)
        np.testing.assert_allclose(got, scores, rtol=1e-5)

    check()
    assert loop.decode._cache_size() == compiled + 1
