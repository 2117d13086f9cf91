"""`generate` with models that attend, its options and where they come from, streaming, and what it
refuses.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_generation import laid_out, slow_search
from table_model import EOS, FLOATS, MODEL, PAD, VOCABULARY, TableConfig, TableModel
from test_seq2seq import GENERATION, SEQ2SEQ, made

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.generation import ModelDecoder, generate, loop
from lsg_flax.generation.options import choose_options, decoding_of
from lsg_flax.generation.prompt import fill_for_encoder
from lsg_flax.models import EncoderConfig

WIDTH, ROOM = 8, 24


class AttentionCache(NamedTuple):
    kept: tuple[jax.Array, jax.Array]  # [rows of beams, ROOM, WIDTH]
    memory: tuple[jax.Array, ...]  # [B, S, WIDTH] and a mask, once per row
    length: jax.Array

    def take(self, parents):
        def of_beams(x):
            texts = x.reshape(len(parents), -1, *x.shape[1:])
            picked = jax.vmap(lambda beams, places: beams[places])(texts, parents)
            return picked.reshape(-1, *x.shape[1:])

        return self._replace(kept=tuple(map(of_beams, self.kept)))


class AttentionOutput(NamedTuple):
    logits: jax.Array
    cache: AttentionCache | None


def attend(query, key, value, mask):
    scores = jnp.where(mask, query @ key.swapaxes(1, 2), -1e9)
    return jax.nn.softmax(scores, axis=-1) @ value


class Attending(nn.Module):
    """An encoder-decoder of one layer with a cache, as small as it can be."""

    has_two_stacks, max_length = True, ROOM
    config = TableConfig()

    @nn.compact
    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        cache=None,
        cache_length=None,
    ):
        words = nn.Embed(VOCABULARY, WIDTH, name="words")
        dense = {
            n: nn.Dense(WIDTH, name=n) for n in ("query", "key", "value", "ask", "told", "known")
        }
        rows, length = decoder_input_ids.shape
        if cache is None:
            states = words(input_ids)
            memory = (
                dense["told"](states),
                dense["known"](states),
                jnp.asarray(attention_mask, bool),
            )
            start, room = 0, cache_length or length
            kept = (jnp.zeros((rows, room, WIDTH)),) * 2
        else:
            kept, memory, start = cache
        mask = decoder_attention_mask
        real = length if mask is None else jnp.asarray(mask).sum(axis=1)[0]
        places = start + jnp.arange(length)
        positions = self.param("positions", nn.initializers.normal(1.0), (ROOM, WIDTH))
        x = words(decoder_input_ids) + positions[places][None]
        new = dense["key"](x), dense["value"](x)
        kept = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, n, start, axis=1)
            for old, n in zip(kept, new, strict=True)
        )
        seen = jnp.arange(kept[0].shape[1])[None] <= places[:, None]
        x = x + attend(dense["query"](x), *kept, seen[None])
        batch = len(memory[0])  # beams become queries of their row
        asked = dense["ask"](x).reshape(batch, -1, WIDTH)
        x = x + attend(asked, memory[0], memory[1], memory[2][:, None]).reshape(x.shape)
        logits = 3 * nn.Dense(VOCABULARY, name="head")(x)
        if cache is None and cache_length is None:
            return AttentionOutput(logits, None)
        last = jax.lax.dynamic_slice_in_dim(logits, real - 1, 1, axis=1)
        return AttentionOutput(last, AttentionCache(kept, memory, start + real))


def drawn_params(model, *inputs):
    """Parameters all of which matter."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.5 * generator.standard_normal(x.shape), "f4"), shapes
    )


@functools.cache
def attending():
    model, ids = Attending(), jnp.zeros((1, 2), int)
    return model, drawn_params(model, ids, ids, ids)


@functools.cache
def causal(pattern: LSGConfig | None):
    fields = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    config = EncoderConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, is_decoder=True, lsg=pattern, **fields
    )
    model = lsg_flax.Model(config, "causal_lm")
    return model, drawn_params(model, jnp.zeros((1, 2), int))


DOCUMENTS = np.random.default_rng(3).integers(3, VOCABULARY, (3, 9))
DOCUMENTS[1, 5:] = PAD
MASK = DOCUMENTS != PAD
SEARCH = {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True}


@jax.jit
def whole(params, ids, mask, written):
    """Log-probabilities behind every token, without a cache."""
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written}
    logits = attending()[0].apply({"params": params}, **inputs).logits
    return jax.nn.log_softmax(logits[0], axis=-1)


@pytest.mark.parametrize("prompt", [None, [[2, 5, 7], [2, 9, 4], [2, 8, 8]]])
def test_an_encoder_decoder_is_searched_with_its_cache_as_without(prompt):
    model, params = attending()
    limit, found = 12, []

    def scores_of(row, tokens):
        written = np.pad(np.asarray(tokens)[None], ((0, 0), (0, limit - len(tokens))))
        ids, mask = DOCUMENTS[row : row + 1], MASK[row : row + 1]
        return np.asarray(whole(params, ids, mask, written))[len(tokens) - 1]

    for row in range(3):
        begun = [EOS] if prompt is None else prompt[row]
        scores = functools.partial(scores_of, row)
        found += slow_search(scores, begun, beams=4, ends=[EOS], limit=limit, early=True)
    wanted, scores = laid_out(found, ends=[EOS], limit=limit, pad=PAD)
    call = {"max_length": limit, "return_scores": True, **SEARCH}
    ids, got = generate(model, params, DOCUMENTS, MASK, decoder_input_ids=prompt, **call)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(got, scores, rtol=1e-4)
    again = generate(model, params, DOCUMENTS, decoder_input_ids=prompt, **call)[0]
    np.testing.assert_array_equal(again, ids)  # the mask is where no padding is
    for row in range(3):
        real = DOCUMENTS[row : row + 1, : MASK[row].sum()]
        begun = None if prompt is None else prompt[row : row + 1]
        alone = generate(model, params, real, decoder_input_ids=begun, **call)[0]
        both = min(alone.shape[1], ids.shape[1])
        np.testing.assert_array_equal(alone[:, :both], ids[4 * row : 4 * row + 4, :both])
        assert (ids[4 * row : 4 * row + 4, both:] == PAD).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_family_is_searched_with_its_cache_as_without(family):
    """And each row as it is alone."""
    model, params = made(family, GENERATION, decoder_start_token_id=3)
    end, pad, limit = model.config.eos_token_id, model.config.pad_token_id, 10
    ids = np.random.default_rng(4).integers(4, 23, (3, 11))
    ids[1, 7:] = pad

    @jax.jit
    def scores_behind(ids, mask, written):
        inputs = {"attention_mask": mask, "decoder_input_ids": written}
        return jax.nn.log_softmax(model.apply({"params": params}, ids, **inputs).logits[0])

    def scores_of(row, tokens):
        written = np.pad(np.asarray(tokens)[None], ((0, 0), (0, limit - len(tokens))))
        document = ids[row : row + 1]
        return np.asarray(scores_behind(document, document != pad, written))[len(tokens) - 1]

    found = []
    for row in range(3):
        scores = functools.partial(scores_of, row)
        found += slow_search(scores, [3], beams=4, ends=[end], limit=limit, early=True)
    wanted, scores = laid_out(found, ends=[end], limit=limit, pad=pad)
    options = {"max_length": limit, "return_scores": True, "forced_eos_token_id": None, **SEARCH}
    got, of_texts = generate(model, params, ids, ids != pad, **options)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_allclose(of_texts, scores, rtol=1e-4)
    for row in range(3):
        alone = generate(model, params, ids[row : row + 1], **options)[0]
        rows, both = got[4 * row : 4 * row + 4], min(alone.shape[1], got.shape[1])
        np.testing.assert_array_equal(alone[:, :both], rows[:, :both])
        assert (rows[:, both:] == pad).all()


def test_what_beams_share_is_kept_once_per_row():
    model, params = attending()
    prompt = {"input_ids": DOCUMENTS, "attention_mask": MASK}
    prompt["decoder_input_ids"] = np.full((3, 1), EOS)
    decoder = ModelDecoder(params, model)
    parents = jnp.zeros((3, 4), int)

    @jax.eval_shape
    def states():
        _, state = decoder.start(prompt, 12, 4)
        return state, decoder.take(decoder.step(state, parents)[1], parents)

    for state in states:
        assert [x.shape for x in state.kept] == [(12, 12, WIDTH)] * 2
        assert [x.shape for x in state.memory] == [(3, 9, WIDTH)] * 2 + [(3, 9)]


@pytest.mark.parametrize("pattern", [LSGConfig(block_size=4, sparse_block_size=4), None])
def test_a_causal_model_is_searched_with_its_cache_as_without(pattern):
    """Behind prompts of several tokens, one of them padded; each row as it is alone."""
    model, params = causal(pattern)
    limit, start = 16, 5
    prompts = np.random.default_rng(1).integers(3, VOCABULARY, (2, start))
    mask = np.ones((2, start), bool)
    mask[1, :2] = False

    @jax.jit
    def logits_of(ids, mask):
        return jax.nn.log_softmax(model.apply({"params": params}, ids, mask).logits[0], axis=-1)

    def scores_of(row, tokens):
        written = np.pad(np.asarray(tokens)[None], ((0, 0), (0, limit - len(tokens))))
        real = np.concatenate([mask[row], np.ones(limit - start, bool)])[None]
        return np.asarray(logits_of(written, real))[len(tokens) - 1]

    found = []
    for row in range(2):
        scores = functools.partial(scores_of, row)
        begun = prompts[row].tolist()
        found += slow_search(scores, begun, beams=4, ends=[EOS], limit=limit, early=True)
    wanted, scores = laid_out(found, ends=[EOS], limit=limit, pad=PAD)
    ids, got = generate(
        model,
        params,
        prompts,
        mask,
        max_new_tokens=limit - start,
        eos_token_id=EOS,
        pad_token_id=PAD,
        return_scores=True,
        **SEARCH,
    )
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(got, scores, rtol=1e-4)


# ---------------------------------------------------------------------------------- compilations


def test_one_compilation_serves_a_bucket_of_documents():
    """Fifty of mixed lengths, with prompts of mixed lengths, and languages of their own."""
    compiled, generator = loop.decode._cache_size(), np.random.default_rng(0)
    for length in [*range(1, 49), 64, 64]:
        ids = generator.integers(3, VOCABULARY, (2, length))
        prompt = generator.integers(3, VOCABULARY, (2, 1 + length % 7))
        forced = generator.integers(3, VOCABULARY, 2)
        options = {"num_beams": 2, "max_length": 11, "forced_bos_token_id": forced}
        generate(MODEL, FLOATS, ids, decoder_input_ids=prompt, **options)
    assert loop.decode._cache_size() == compiled + 1


@pytest.mark.slow
def test_fifty_documents_need_a_program_for_each_bucket_and_set_of_options():
    """A BART that reads up to 72 tokens: those of two blocks, 64 and all are its buckets."""
    model, params = made("bart", GENERATION, num_hidden_layers=1, max_position_embeddings=72)
    generator, compiled = np.random.default_rng(0), loop.decode._cache_size()
    lengths = [*range(1, 31, 2), *range(40, 73)]
    programs = set()
    for number, length in enumerate([*lengths, 8, 64]):
        ids = generator.integers(4, 23, (1, length))
        options = {"max_length": 8} | ({"num_beams": 2} if number % 2 else {})
        assert generate(model, params, ids, **options).shape[1] <= 8
        programs.add((next(n for n in (8, 64, 72) if length <= n), number % 2))
        assert loop.decode._cache_size() == compiled + len(programs)
    assert number == 49 and len(programs) == 6


def test_a_bucket_of_the_encoder_stays_within_its_kind_of_attention():
    model = TableModel()
    assert [fill_for_encoder(model, n, 16) for n in (1, 16, 17, 60, 64, 70)] == [15, 0, 15, 4, 0, 0]
    model.config.lsg = LSGConfig(block_size=12, sparse_block_size=12)
    filled = [n + fill_for_encoder(model, n, 16) for n in (1, 17, 24, 25, 48, 49)]
    assert filled == [16, 24, 24, 48, 48, 64]


# --------------------------------------------------------------------------- options and defaults


def chosen(given, **fields):
    return decoding_of(choose_options(TableModel(**fields).config, given), VOCABULARY)


def test_what_is_not_given_is_the_checkpoints_and_none_is_off():
    file = {
        "num_beams": 3,
        "forced_eos_token_id": 2,
        "length_penalty": 2.0,
        "suppress_tokens": None,
    }
    fields = {"num_beams": 5, "min_length": 4, "suppress_tokens": [3], "generation_config": file}
    found = chosen({}, **fields)
    assert found.picker.count == 3 and found.picker.length_penalty == 2.0
    assert found.rules.forced_eos_token_id == (2,) and found.rules.min_length == 4
    assert found.rules.suppress_tokens == () and found.rules.eos_token_id == (EOS,)
    off = {"forced_eos_token_id": None, "min_length": None, "eos_token_id": None}
    found = chosen(off | {"num_beams": 2, "length_penalty": None}, **fields)
    assert found.picker.count == 2 and found.picker.length_penalty == 1.0
    assert found.rules.forced_eos_token_id == () and found.rules.min_length == 0
    assert found.rules.eos_token_id == ()


def test_a_given_length_comes_before_the_checkpoints():
    for file in ({"max_new_tokens": 3}, {"max_length": 4}):
        model = TableModel(generation_config=file)
        for given, width in (({}, 4), ({"max_length": 6}, 6), ({"max_new_tokens": 6}, 7)):
            ids = generate(model, FLOATS, DOCUMENTS, eos_token_id=None, **given)
            assert ids.shape == (3, width)
    assert generate(MODEL, FLOATS, DOCUMENTS, eos_token_id=None).shape == (3, 20)


def test_options_of_sampling_in_a_checkpoint_wait_for_sampling():
    file = {"temperature": 0.7, "top_k": 5, "length_penalty": 2.0}
    assert chosen({}, generation_config=file) == chosen({})
    sampled = chosen({"do_sample": True, "top_k": None}, generation_config=file).picker
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.7, None, None)
    assert chosen({"do_sample": True}, top_k=0).picker.top_k is None  # "off" in a file


def test_each_row_has_its_own_second_token():
    ids = generate(MODEL, FLOATS, DOCUMENTS, forced_bos_token_id=[5, 9, 4], num_beams=2)
    assert ids[:, 1].tolist() == [5, 9, 4]
    for row, token in enumerate([5, 9, 4]):
        options = {"forced_bos_token_id": token, "num_beams": 2}
        alone = generate(MODEL, FLOATS, DOCUMENTS[row : row + 1], **options)
        np.testing.assert_array_equal(ids[row, : alone.shape[1]], alone[0][: ids.shape[1]])


def test_texts_of_a_row_are_drawn_one_by_one():
    model, params = attending()
    options = {
        "do_sample": True,
        "num_return_sequences": 3,
        "max_new_tokens": 9,
        "temperature": 4.0,
    }
    options["eos_token_id"] = None
    ids = generate(model, params, DOCUMENTS, MASK, key=jax.random.key(0), **options)
    assert ids.shape == (9, 10) and len(np.unique(ids, axis=0)) == 9
    other = generate(model, params, DOCUMENTS, MASK, key=jax.random.key(1), **options)
    assert (ids != other).any()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "key": jax.random.key(3)}])
def test_tokens_are_shown_as_they_come(options):
    model, params = attending()
    seen, began = [], loop._proceed._cache_size()
    for row in (0, 2):
        call = (model, params, DOCUMENTS[row : row + 1], None)
        wanted = generate(*call, max_length=9, **options)
        seen.clear()
        got = generate(*call, max_length=9, stream=seen.append, **options)
        np.testing.assert_array_equal(got, wanted)
        assert seen == wanted[0, 1:].tolist()
    assert loop._proceed._cache_size() == began + 1


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "key": jax.random.key(0), "top_k": 5},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True, "key": jax.random.key(0)},
    ],
)
def test_rows_whose_scores_are_nan_are_refused(options):
    model, params = attending()
    words = params["words"]["embedding"].at[8].set(jnp.nan)
    call = options | {"max_length": 6, "suppress_tokens": 8}
    call |= {"model": model, "params": params | {"words": {"embedding": words}}}
    assert len(generate(**call, input_ids=[[3, 4, 5], [6, 7, 9]])) == 2
    with pytest.raises(ValueError, match=r"gives NaN for rows \[1\] of input_ids, so no text"):
        generate(**call, input_ids=[[3, 4, 5], [6, 7, 8]])


NO_START = TableModel(decoder_start_token_id=None, bos_token_id=0)
BAD = [
    ({"num_beams": 2, "num_return_sequences": 3}, "=3 is more than num_beams=2"),
    (
        {"num_return_sequences": 2},
        "more than num_beams=1 texts per row: give more beams, or do_sample",
    ),
    ({"top_p": 0.5}, r"{'top_p': 0.5} need do_sample=True"),
    ({"length_penalty": 2.0}, r"{'length_penalty': 2.0} need num_beams > 1"),
    ({"return_scores": True}, "return_scores=True needs num_beams > 1"),
    (
        {"forced_bos_token_id": 12},
        r"forced_bos_token_id has \[12\], but vocab_size=12 allows 0..11",
    ),
    ({"forced_eos_token_id": [2, 99]}, r"forced_eos_token_id has \[99\]"),
    ({"bad_words_ids": [[3, 44]]}, r"bad_words_ids has \[44\]"),
    ({"forced_bos_token_id": [4, 5]}, "has 2 ids: give one, or one for each of the 3 rows"),
    ({"suppress_tokens": [2.5]}, r"suppress_tokens=\[2.5\] must be a token id or a list"),
    ({"bad_words_ids": [3, 4]}, r"bad_words_ids=\[3, 4\] must be a list of words"),
    ({"bad_words_ids": [[]]}, "has an empty word"),
    ({"eos_token_id": -1}, "eos_token_id=-1 must be a token id"),
    ({"min_length": 30}, "min_length=30 is more than the 20 tokens that max_length=20 allows"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is more than the 8 tokens"),
    ({"min_length": -1}, "min_length=-1 must be a whole number, at least 0"),
    (
        {"max_new_tokens": 65},
        "needs 65 positions, but this checkpoint has 64: at most 64 fit",
    ),
    ({"max_length": 70}, "max_length=70 after a prompt of 1 tokens needs 69 positions"),
    ({"max_length": 8, "max_new_tokens": 7}, "max_length=8 and max_new_tokens=7 are two limits"),
    ({"max_length": 2.5}, "max_length=2.5 must be a whole number"),
    ({"decoder_input_ids": np.full((3, 65), 4)}, "at most 0 fit"),
    ({"decoder_input_ids": np.full((3, 9), 4), "max_length": 10}, "leaves no room after a prompt"),
    ({"decoder_input_ids": np.full((2, 3), 4)}, r"\(2, 3\) must have the 3 rows of input_ids"),
    ({"decoder_input_ids": np.full((3, 2), 44)}, "decoder_input_ids are in 44..44, but vocab_size"),
    ({"stream": print, "num_beams": 2}, "stream shows .* num_beams=2"),
    ({"stream": print}, "stream shows .* not of 3 rows"),
    ({"model": NO_START}, "no decoder_start_token_id to begin with"),
    ({"model": NO_START, "decoder_input_ids": [[3]] * 3}, "no decoder_start_token_id"),
    ({"model": TableModel(num_beam_groups=2)}, "num_beam_groups=2 is not supported"),
    ({"num_beam": 4}, r"no options \['num_beam'\]; it has .*'num_beams'"),
    ({"num_beams": 2.0}, "num_beams=2.0 must be a whole number, at least 1"),
    ({"num_beams": 2, "early_stopping": "always"}, "'always' must be True, False or 'never'"),
    ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty=nan must be finite"),
    ({"num_beams": 2, "length_penalty": 50.0}, "length_penalty=50.0 over- or underflows for"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive and finite"),
    ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size=1.5 must be a whole number"),
    ({"do_sample": True}, "needs a random key: give key="),
    ({"do_sample": "yes"}, "do_sample='yes' must be True or False"),
    (
        {"do_sample": True, "key": 0, "temperature": 1e-38},
        "temperature=1e-38 must be at least 1e-20",
    ),
    (
        {"do_sample": True, "key": 0, "temperature": float("nan")},
        "temperature=nan must be positive",
    ),
    ({"do_sample": True, "key": 0, "top_k": 2.0}, "top_k=2.0 must be a whole number, at least 1"),
    ({"do_sample": True, "key": 0, "top_p": float("nan")}, "top_p=nan must be finite"),
    (
        {"position_ids": np.zeros((3, 9), int)},
        r"\['position_ids'\] need a model without an encoder",
    ),
    ({"pad_token_id": None}, "rows that end are padded with pad_token_id"),
    ({"decoder_start_token_id": [2, 3]}, r"=\[2, 3\] must be one token id for all rows"),
    ({"pad_token_id": [1, 2]}, r"pad_token_id=\[1, 2\] must be one token id"),
    ({"input_ids": [[3, 4], [5]]}, "input_ids has rows of different lengths; pad documents"),
    ({"input_ids": DOCUMENTS + 9}, "allows 0..11; tokenizer and checkpoint do not belong together"),
    ({"stream": True}, "stream=True must be a function of one token id"),
    ({"do_sample": True, "key": 3}, r"give key=jax.random.key\(seed\), not 3"),
    ({"do_sample": True, "key": jax.random.split(jax.random.key(0))}, "needs a random key: give"),
    ({"mesh": "data"}, r"mesh='data' must be one of lsg_flax.sharding.make_mesh"),
    ({"bucket": 0}, "bucket=0 must be a whole number, at least 1"),
    (
        {"attention_mask": MASK * [[1], [0], [1]]},
        r"rows \[1\] of input_ids are only padding: leave",
    ),
    ({"input_ids": DOCUMENTS * 0 + PAD}, r"rows \[0, 1, 2\] of input_ids are only padding"),
    ({"suppress_tokens": range(12)}, "leave none of vocab_size=12 tokens to begin with: allow at"),
    (
        {
            "begin_suppress_tokens": range(3, 12),
            "bad_words_ids": [[0], [1], [2]],
            "eos_token_id": 3,
        },
        "leave none",
    ),
    (
        {"suppress_tokens": [t for t in range(12) if t != EOS], "min_new_tokens": 1},
        "for min_length bans the ends",
    ),
    (
        {"suppress_tokens": 7, "forced_eos_token_id": 7},
        r"'forced_eos_token_id': \[7\]} is suppressed",
    ),
    ({"suppress_tokens": 7, "forced_bos_token_id": [3, 7, 4]}, r"\[3, 7, 4\]} is suppressed by"),
    ({"model": FLOATS, "params": MODEL}, r"not dict of \['table'\] and TableModel"),
    (
        {"params": None},
        "a model and its parameters, as returned by .*, not TableModel and NoneType",
    ),
    ({"params": {"params": FLOATS}}, r"not TableModel and dict of \['params'\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_generate_refuses(unchecked, change, message):
    call = {"model": MODEL, "params": FLOATS, "input_ids": DOCUMENTS} | change
    with pytest.raises(ValueError, match=message):
        generate(**call)


def test_a_prompt_begins_as_given_where_there_is_no_start_token():
    prompt = np.asarray([[3], [4], [5]])
    call = {"decoder_input_ids": prompt, "decoder_start_token_id": None, "max_length": 6}
    ids = generate(NO_START, FLOATS, DOCUMENTS, **call)
    np.testing.assert_array_equal(ids[:, :1], prompt)
    with pytest.raises(ValueError, match="decoder_input_ids are for an encoder-decoder"):
        generate(*causal(None), DOCUMENTS, decoder_input_ids=prompt, max_new_tokens=3)
