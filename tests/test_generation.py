"""Decoding with a cache against the model without one, generation, cross-attention, bad input.

By causality one forward pass over the final sequence holds the logits of each of its prefixes; a
few prefixes are run on their own as well.
"""

from functools import cache, partial

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.convert_from_torch import params_from_torch, params_to_torch
from lsg_flax.generation import Decoder, Greedy, ModelDecoder, Rules, Sample, Text, generate, loop
from lsg_flax.generation.loop import Decoding
from lsg_flax.generation.sampling import pick
from lsg_flax.models import EncoderConfig

VOCABULARY, STEPS, PROMPT = 23, 300, 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": STEPS + PROMPT,
    "is_decoder": True,
}


def lsg(kind: str = "norm", block: int = 8, **fields) -> LSGConfig:
    fields = {"sparse_block_size": block, "num_global_tokens": 3} | fields
    return LSGConfig(block_size=block, sparsity_type=kind, **fields)


@cache
def decoder(pattern: LSGConfig | None = None, **fields):
    """A model and parameters all of which matter."""
    model = lsg_flax.Model(EncoderConfig(**SIZES | fields, lsg=pattern), "causal_lm")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    leaves = flax.traverse_util.flatten_dict(shapes, sep="/")
    generator = np.random.default_rng(0)
    drawn = {
        path: jnp.asarray(path.endswith("/scale") + 0.3 * generator.standard_normal(x.shape), "f4")
        for path, x in leaves.items()
    }
    return model, flax.traverse_util.unflatten_dict(drawn, sep="/")


def batch(length: int, padding: int = 3):
    """Ids and mask of two rows, the second padded on the left."""
    generator = np.random.default_rng(1)
    mask = np.ones((2, length), np.int32)
    mask[1, :padding] = 0
    return generator.integers(0, VOCABULARY, (2, length)).astype(np.int32), mask


def memory():
    states = np.random.default_rng(2).standard_normal((2, 5, SIZES["hidden_size"])).astype("f4")
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


@partial(jax.jit, static_argnames=("model", "prompt"))
def by_steps(model, params, ids, mask, *, prompt: int, rngs=None, positions=None, **inputs):
    """Logits from the prompt's last token on: the prompt in one call, then all steps in a scan."""
    first = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    first = {name: x[:, :prompt] for name, x in first.items() if x is not None}
    apply = partial(model.apply, {"params": params}, rngs=rngs)
    out = apply(**first, **inputs, cache_length=ids.shape[1])

    def step(cache, token):
        out = apply(token[:, None], cache=cache)
        return out.cache, out.logits[:, 0]

    _, logits = jax.lax.scan(step, out.cache, ids[:, prompt:].T)
    return jnp.concatenate([out.logits, logits.swapaxes(0, 1)], axis=1)  # [B, 1 + steps, V]


@partial(jax.jit, static_argnames="model")
def at_once(model, params, ids, mask, *, rngs=None, positions=None, **inputs):
    out = model.apply({"params": params}, ids, mask, None, positions, rngs=rngs, **inputs)
    return out.logits


PATTERNS = {
    "norm": lsg(pool_with_global=False),
    "pooling": lsg("pooling"),
    "lsh": lsg("lsh"),
    "stride": lsg("stride", 4, sparse_block_size=10),
    "block_stride": lsg("block_stride"),
    "bos_pooling": lsg(
        "bos_pooling", sparsity_factor=4, sparse_block_size=5, mask_first_token=True
    ),
    "every token": lsg(sparsity_factor=1, num_global_tokens=1),
    "no sparse part": lsg("none"),
    "full attention": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_300_steps_with_a_cache_equal_the_whole_sequence(name):
    model, params = decoder(PATTERNS[name])
    ids, mask = batch(PROMPT + STEPS)
    wanted = at_once(model, params, ids, mask)[:, PROMPT - 1 :]
    got = by_steps(model, params, ids, mask, prompt=PROMPT)
    assert got.shape == (2, STEPS + 1, VOCABULARY)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(np.diff(wanted, axis=1)).max() > 0.1  # not the same at every step


@pytest.mark.parametrize("prompt", [1, 17])
def test_prompts_of_other_lengths(prompt):
    """One token, and the first length at which the prompt goes by blocks; others are above."""
    model, params = decoder(PATTERNS["norm"])
    ids, mask = batch(41, padding=0 if prompt == 1 else 7)
    wanted = at_once(model, params, ids, mask)[:, prompt - 1 :]
    got = by_steps(model, params, ids, mask, prompt=prompt)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_prefixes_with_a_forward_pass_of_their_own():
    model, params = decoder(PATTERNS["norm"])
    ids, mask = batch(41, padding=7)
    got = by_steps(model, params, ids, mask, prompt=17)
    for length in (17, 18, 32):
        wanted = at_once(model, params, ids[:, :length], mask[:, :length])[:, -1]
        np.testing.assert_allclose(got[:, length - 17], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [lsg(), None])
def test_cross_attention_and_given_positions(pattern):
    model, params = decoder(pattern, add_cross_attention=True)
    ids, mask = batch(60)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    inputs = memory() | {"positions": positions}
    wanted = at_once(model, params, ids, mask, **inputs)
    got = by_steps(model, params, ids, mask, prompt=PROMPT, **inputs)
    np.testing.assert_allclose(got, wanted[:, PROMPT - 1 :], rtol=1e-5, atol=1e-5)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].copy()
    inputs["encoder_hidden_states"][1, 4] = 100.0  # padding
    np.testing.assert_array_equal(at_once(model, params, ids, mask, **inputs), wanted)
    inputs["encoder_hidden_states"][1, 3] += 1.0
    changed = np.abs(at_once(model, params, ids, mask, **inputs) - wanted)
    assert changed[1].max() > 1e-2 and changed[0].max() == 0


def test_rotations_of_a_key_are_the_same_in_every_call():
    model, params = decoder(PATTERNS["lsh"])
    ids, mask = batch(60)
    rngs = {"lsh": jax.random.key(7)}
    wanted = at_once(model, params, ids, mask, rngs=rngs)[:, PROMPT - 1 :]
    got = by_steps(model, params, ids, mask, prompt=PROMPT, rngs=rngs)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    other = by_steps(model, params, ids, mask, prompt=PROMPT, rngs={"lsh": jax.random.key(8)})
    assert np.abs(got - other).max() > 1e-4


def test_half_precision():
    model, params = decoder(PATTERNS["pooling"])
    half = model.clone(dtype=jnp.bfloat16)
    ids, mask = batch(60)
    got = by_steps(half, params, ids, mask, prompt=PROMPT)
    assert got.dtype == jnp.bfloat16
    wanted = at_once(model, params, ids, mask)[:, PROMPT - 1 :]
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=0.15)


@pytest.mark.parametrize("pattern", [lsg(), lsg("bos_pooling")])
def test_no_gradient_from_later_tokens_or_padding(pattern):
    model, params = decoder(pattern)
    _, mask = batch(40)
    embeds = jax.random.normal(jax.random.key(3), (2, 40, SIZES["hidden_size"]))

    @jax.jit
    def gradient(embeds):
        def one(embeds):
            out = model.apply({"params": params}, None, mask, inputs_embeds=embeds)
            return (out.logits[:, 29] ** 2).sum()

        return jax.grad(one)(embeds)

    size = np.abs(gradient(embeds)).max(axis=-1)
    assert np.isfinite(size).all()
    assert (size[:, 30:] == 0).all() and (size[1, :3] == 0).all()
    assert (size[:, 16:30] > 0).all()  # its block and the previous one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm", "bos_pooling", "full attention"])
def test_decoding_after_take_is_decoding_of_those_rows(name):
    model, params = decoder(PATTERNS[name], add_cross_attention=name == "full attention")
    ids, mask = batch(60)
    inputs = memory() if name == "full attention" else {}
    rows = jnp.asarray([1, 0, 1])

    @jax.jit
    def prompt(ids, mask, inputs):
        return model.apply({"params": params}, ids, mask, **inputs, cache_length=60).cache

    @jax.jit
    def steps(cache, tokens):
        def step(cache, token):
            out = model.apply({"params": params}, token[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        return jax.lax.scan(step, cache, tokens.T)

    taken = prompt(ids[:, :31], mask[:, :31], inputs).take(rows)
    alone = {name: x[rows] for name, x in inputs.items()}
    of_rows = prompt(ids[rows, :31], mask[rows, :31], alone)
    (cache, logits), (expected, wanted) = (steps(c, ids[rows, 31:]) for c in (taken, of_rows))
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(cache) == jax.tree.structure(expected)
    assert (cache.position == expected.position).all() and cache.length == expected.length == 60
    assert np.abs(logits[:, 0] - logits[:, 1]).max() > 1e-2


# --------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("pattern", [lsg(), None])
def test_greedy_generation_takes_the_likeliest_token_at_every_step(pattern):
    model, params = decoder(pattern)
    ids, mask = batch(10)
    tokens = generate(model, params, ids, mask, max_new_tokens=40, bucket=32)
    assert tokens.shape == (2, 50)
    np.testing.assert_array_equal(tokens[:, :10], ids)
    full = np.concatenate([mask, np.ones((2, 40), np.int32)], axis=1)
    logits = at_once(model, params, tokens, full)
    np.testing.assert_array_equal(tokens[:, 10:], np.argmax(logits[:, 9:-1], axis=-1))
    exact = generate(model, params, ids, mask, max_new_tokens=40, bucket=1)
    np.testing.assert_array_equal(tokens, exact)


def test_one_compilation_serves_a_bucket():
    model, params = decoder(lsg())
    ids, mask = batch(10)
    before = loop.decode._cache_size()
    for length in (5, 7, 8):
        generate(model, params, ids[:, :length], mask[:, :length], max_new_tokens=4, bucket=8)
    assert loop.decode._cache_size() == before + 1


def test_ended_rows_are_filled_and_all_ended_stop():
    model, params = decoder(lsg())
    ids, mask = batch(10)
    free = generate(model, params, ids, mask, max_new_tokens=30)[:, 10:]
    ends = free[:, 3].tolist()
    got = generate(model, params, ids, mask, max_new_tokens=30, eos_token_id=ends, pad_token_id=22)
    places = [int(np.isin(row, ends).argmax()) for row in free]
    assert got.shape == (2, 10 + max(places) + 1) and max(places) <= 3
    for row, wanted, place in zip(got[:, 10:], free, places, strict=True):
        np.testing.assert_array_equal(row[: place + 1], wanted[: place + 1])
        assert (row[place + 1 :] == 22).all()


def test_generation_with_cross_attention_and_positions():
    model, params = decoder(add_cross_attention=True)
    ids, mask = batch(10)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    options = {"max_new_tokens": 8, **memory()}
    tokens = generate(model, params, ids, mask, position_ids=positions, **options)
    alone = generate(
        model,
        params,
        ids[1:, 3:],
        **options | {name: x[1:] for name, x in memory().items()},
    )
    np.testing.assert_array_equal(tokens[1, 3:], alone[0])  # as if it had no padding


def test_sampling_follows_its_key():
    model, params = decoder()
    ids, mask = batch(10)
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0, "top_k": 9}
    first, again, other = (
        generate(model, params, ids, mask, key=jax.random.key(seed), **options)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),  # the fewest that reach it
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_p": 1.0, "top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_frequencies_of_drawn_tokens(options, wanted):
    logits = jnp.log(jnp.asarray([0.15, 0.5, 0.05, 0.3]))[None]
    keys = jax.random.split(jax.random.key(0), 4000)
    picker = Sample(**options)
    drawn = jax.jit(jax.vmap(lambda key: pick(logits, picker, key)[0]))(keys)
    found = np.bincount(drawn, minlength=4)[[1, 3, 0, 2]] / 4000
    np.testing.assert_allclose(found, wanted, atol=0.03)
    assert (found[np.asarray(wanted) == 0] == 0).all()


@flax.struct.dataclass
class Sums:
    """A decoder of plain functions: what follows a row depends on the sum of its tokens."""

    table: jax.Array  # [V, V]

    def start(self, prompt, room, beams):
        state = prompt["input_ids"].sum(axis=1) % len(self.table)
        return self.table[state], jnp.tile(state[:, None], beams)

    def step(self, state, tokens):
        state = (state + tokens) % len(self.table)
        return self.table[state], state

    def take(self, state, parents):
        return jnp.take_along_axis(state, parents, axis=1)


def text_of(ids, steps, beams=1):
    """A text that begins with these rows and has room for so many more tokens."""
    tokens = np.pad(ids, ((0, 0), (0, steps)))[:, None].repeat(beams, axis=1)
    length, limit = jnp.asarray(ids.shape[1]), jnp.asarray(ids.shape[1] + steps)
    return Text(jnp.asarray(tokens), length, length, limit)


def test_the_loop_runs_any_decoder_of_the_protocol():
    drawn = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype("f4")
    ids, sums = batch(4)[0], Sums(jnp.asarray(drawn))
    assert isinstance(sums, Decoder)
    ends = (int(drawn[ids[1].sum() % 23].argmax()),)
    call = (sums, {"input_ids": ids}, text_of(ids, 9), jax.random.key(0))
    how = Decoding(Greedy(), Rules(ends), pad=22)
    found = loop.decode(*call, how=how)
    row, wanted = ids[0].tolist(), []
    while len(wanted) < 9 and not {*wanted} & {*ends}:
        wanted.append(int(drawn[sum(row + wanted) % VOCABULARY].argmax()))
    count = int(found.lengths[0, 0])
    tokens = found.tokens[:, 0, 4:count]
    assert tokens[0].tolist() == wanted and count - 4 == len(wanted) > 1
    assert tokens[1].tolist() == [*ends, *[22] * (len(wanted) - 1)]
    again = loop.decode.lower(*call, how=how)
    assert "while" in again.as_text()  # one program with the loop in it


def test_a_decoder_gives_the_state_of_chosen_rows():
    parents = jnp.asarray([[1, 1, 0], [0, 2, 1]])
    sums = Sums(jnp.eye(VOCABULARY))
    _, state = sums.start({"input_ids": batch(4)[0]}, 8, 3)
    _, state = sums.step(state, jnp.arange(6).reshape(2, 3))
    logits, _ = sums.step(sums.take(state, parents), jnp.asarray([[1, 2, 3], [4, 5, 6]]))
    wanted = batch(4)[0].sum(axis=1)[:, None] + [[1 + 1, 1 + 2, 0 + 3], [3 + 4, 5 + 5, 4 + 6]]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), wanted % VOCABULARY)

    class State:
        def take(self, parents):
            return parents.tolist()

    model, params = decoder()
    ours = ModelDecoder(params, model)
    assert isinstance(ours, Decoder) and ours.take(State(), parents) == [[1, 1, 0], [0, 2, 1]]


# -------------------------------------------------------------------------------------- bad input


@pytest.fixture
def unchecked():
    """Without the annotation checks of conftest.py, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


RIGHT = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": RIGHT}, r"rows \[1\] of the prompt end in padding; pad on the left"),
        ({"attention_mask": RIGHT[:, 1:]}, r"must have the shape of input_ids \(2, 4\)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        (
            {"max_new_tokens": 304},
            "needs 307 positions, but this checkpoint has 306: at most 303 fit",
        ),
        ({"input_ids": np.zeros((2, 400), int)}, "at most 0 fit"),
        ({"input_ids": np.full((2, 4), VOCABULARY)}, "vocab_size=23 allows 0..22"),
        ({"input_ids": np.zeros((2, 0), int)}, "at least one of each"),
        ({"position_ids": np.full((2, 4), 300)}, "has 306: at most 6 fit"),
        ({"do_sample": True}, "give key="),
        ({"top_k": 3}, "need do_sample=True"),
        ({"do_sample": True, "key": 0, "temperature": 0.0}, "must be positive"),
        ({"do_sample": True, "key": 0, "top_k": 0}, "top_k=0"),
        ({"do_sample": True, "key": 0, "top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
    ],
)
def test_what_generate_refuses(unchecked, change, message):
    model, params = decoder()
    options = {"input_ids": np.ones((2, 4), int), "max_new_tokens": 10} | change
    with pytest.raises(ValueError, match=message):
        generate(model, params, **options)


@pytest.mark.parametrize(
    ("pattern", "inputs", "message"),
    [
        (None, {"attention_mask": RIGHT}, r"are at \[3, 1\].*Pad on the left"),
        (None, {"attention_mask": RIGHT * [[1], [0]]}, r"are at \[3, -1\] \(-1: none\)"),
        (None, {"cache_length": 3}, "cache_length=3 has no room for the 4 tokens"),
        (None, {"cache_length": 400}, "cache_length=400 is more than the 306 positions"),
        (None, {"train": True}, "train=False"),
        (None, {"encoder_attention_mask": RIGHT}, "without encoder_hidden_states"),
        (None, {"encoder_hidden_states": np.zeros((2, 3, 16))}, "add_cross_attention=False"),
        (lsg(adaptive=False), {"cache_length": 17}, "set adaptive=True"),
        (lsg(block=12, sparse_block_size=8), {}, "divides block_size=12, not 8"),
    ],
)
def test_what_a_cache_refuses(unchecked, pattern, inputs, message):
    model, params = decoder(pattern)
    inputs = {"input_ids": np.ones((2, 4), int), "cache_length": 8} | inputs
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, **inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "add_cross_attention=True needs encoder_hidden_states"),
        ({"encoder_hidden_states": np.zeros((2, 3, 8))}, r"\(2, 3, 8\) must be \[batch=2, tokens,"),
        (
            memory() | {"encoder_attention_mask": RIGHT},
            r"\(2, 4\) must be \[batch, tokens\] = \(2, 5",
        ),
        (
            memory() | {"encoder_attention_mask": np.zeros((2, 5))},
            "encoder_attention_mask has dtype",
        ),
    ],
)
def test_what_cross_attention_refuses(unchecked, inputs, message):
    model, params = decoder(add_cross_attention=True)
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, np.ones((2, 4), int), **inputs)


def test_only_decoders_have_caches():
    for task, fields in (("masked_lm", {}), ("causal_lm", {"is_decoder": False})):
        model = lsg_flax.Model(EncoderConfig(**SIZES | fields), task)
        with pytest.raises(ValueError, match="a cache is for decoding"):
            model.apply({"params": {}}, np.ones((2, 4), int), cache_length=8)
    with pytest.raises(ValueError, match="set is_decoder=True"):
        EncoderConfig(add_cross_attention=True)


def test_a_full_cache(unchecked):
    """Raises where its length can be read, and gives NaN under jit, where it cannot."""
    model, params = decoder()
    ids = np.ones((2, 4), int)
    cache = jax.jit(lambda: model.apply({"params": params}, ids, cache_length=5).cache)()
    step = jax.jit(lambda cache: model.apply({"params": params}, ids[:, :1], cache=cache))
    last = step(cache)
    assert np.isfinite(last.logits).all() and np.isnan(step(last.cache).logits).all()
    with pytest.raises(ValueError, match="the cache is full: all its 5 slots"):
        model.apply({"params": params}, ids[:, :1], cache=last.cache)
    with pytest.raises(
        ValueError, match=r"one token for each of its 2 rows, \[2, 1\], got \[2, 4\]"
    ):
        model.apply({"params": params}, ids, cache=cache)
    with pytest.raises(ValueError, match="either a cache, or cache_length"):
        model.apply({"params": params}, ids[:, :1], cache=cache, cache_length=9)
    with pytest.raises(ValueError, match=r"a cache is for decoding.*train=True"):
        model.apply({"params": params}, ids[:, :1], cache=cache, train=True)


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("pattern", [lsg(), None])
def test_a_decoder_with_cross_attention_survives_a_round_trip(pattern, tmp_path):
    model, params = decoder(pattern, add_cross_attention=True)
    tensors = params_to_torch(params, model)
    layer = "bert.encoder.layer.1.crossattention"
    kernel = params["encoder"]["layers"]["cross_attention"]["key"]["kernel"][1]
    np.testing.assert_array_equal(tensors[f"{layer}.self.key.weight"], kernel.T)
    assert f"{layer}.output.LayerNorm.bias" in tensors
    jax.tree.map(np.testing.assert_array_equal, params_from_torch(tensors, model), params)
    lsg_flax.save_pretrained(tmp_path, model, params)
    loaded, again = lsg_flax.from_pretrained(tmp_path)
    assert loaded.config.add_cross_attention and loaded.task == "causal_lm"
    jax.tree.map(np.testing.assert_array_equal, again, params)
    tensors.pop(f"{layer}.self.key.weight")
    with pytest.raises(ValueError, match=f"- {layer}.self.key.weight"):
        params_from_torch(tensors, model)
