"""What a Reformer writes with a cache: the reference's tokens, and each row as if it were alone."""

from typing import Any

import jax
import numpy as np
import pytest
from golden_data import cases, load
from rotated_reformer import drawn_model

import lsg_flax
from lsg_flax.generation import generate
from lsg_flax.models import Model

CASES = cases("reformer_generation")
KINDS = sorted({name.rsplit("_", 1)[0] for name in CASES})


@pytest.fixture(scope="module", params=KINDS)
def recorded(request, tmp_path_factory):
    """A model, its parameters, and its recorded cases' names."""
    folder = tmp_path_factory.mktemp("reformer")
    names = [name for name in CASES if name.rsplit("_", 1)[0] == request.param]
    case = load(names[0])[0]
    model, params = drawn_model(folder, case["config"], case["report"]["parameters"])
    return model, params, names


def together(names):
    """The prompts padded on the left, their mask, and what the reference wrote behind each."""
    prompts = [load(name)[1]["prompt"] for name in names]
    width = max(map(len, prompts))
    ids = np.stack([np.pad(x, (width - len(x), 0)) for x in prompts])
    mask = np.stack([np.arange(width) >= width - len(x) for x in prompts])
    tokens = [load(name)[2]["tokens"][len(x) :] for name, x in zip(names, prompts, strict=True)]
    return ids, mask, np.stack(tokens)


@pytest.mark.slow
def test_rows_of_a_batch_are_what_the_reference_writes_behind_each_alone(recorded):
    model, params, names = recorded
    ids, mask, tokens = together(names)
    count = tokens.shape[1]
    written = generate(model, params, ids, mask, max_new_tokens=count, eos_token_id=None)
    np.testing.assert_array_equal(written[:, ids.shape[1] :], tokens)


@pytest.mark.slow
def test_beams_of_a_row_are_its_own(recorded):
    model, params, names = recorded
    ids, mask, _ = together(names)
    options = {"max_new_tokens": 9, "num_beams": 3, "eos_token_id": None}
    both = generate(model, params, ids, mask, **options)
    for row in (0, 4):
        prompt = ids[row][mask[row]][None]
        alone = generate(model, params, prompt, **options)
        np.testing.assert_array_equal(both[row, ids.shape[1] :], alone[0, prompt.shape[1] :])


@pytest.mark.slow
def test_without_a_cache_every_step_is_the_model_itself(recorded):
    """Rows of a batch write what each model gives for the row alone and its new tokens, filled up
    to whole chunks by itself; local attention alone writes that with a cache too."""
    model, params, names = recorded
    ids, mask, tokens = together(names)
    count = 6
    options: Any = {"max_new_tokens": count, "eos_token_id": None}
    written = generate(model, params, ids, mask, use_cache=False, **options)
    for row in (0, 3, 6):
        length = mask[row].sum()
        own = model if length > model.config.lsh_attn_chunk_length else model.model
        check_alone(own, params, written[row, -length - count :], count)
    if model.config.kinds == ("local",):
        np.testing.assert_array_equal(written[:, ids.shape[1] :], tokens[:, :count])


def check_alone(model, params, text, count):
    """The last tokens of a text are each the likeliest of the uncached model behind those before,
    filled up to whole chunks."""

    @jax.jit
    def likeliest(ids, mask, place):
        logits = model.apply({"params": params}, input_ids=ids, attention_mask=mask).logits
        return logits[0, place].argmax()

    for length in range(len(text) - count, len(text)):
        places = np.arange(length + model.config.needs_padding(length))
        ids = np.where(places < length, np.resize(text, len(places)), 0)
        assert likeliest(ids[None], (places < length)[None], length - 1) == text[length]


TINY: Any = {
    "model_type": "reformer",
    "is_decoder": True,
    "vocab_size": 40,
    "hidden_size": 8,
    "feed_forward_size": 12,
    "num_attention_heads": 2,
    "attention_head_size": 4,
    "axial_pos_shape": [4, 8],
    "axial_pos_embds_dim": [4, 4],
    "max_position_embeddings": 32,
    "local_attn_chunk_length": 3,
    "lsh_attn_chunk_length": 3,
}
OTHERS: Any = {
    "as many buckets as its length has": {"attn_layers": ["local", "lsh"], "num_hashes": 2},
    "more neighbours than buckets' chunks": {
        "attn_layers": ["lsh", "lsh"],
        "lsh_num_chunks_before": 4,
        "num_buckets": 4,
    },
    "more neighbours than chunks": {
        "attn_layers": ["local", "local"],
        "local_num_chunks_before": 3,
    },
}


def tiny(name):
    """A model, and parameters by which its tokens differ."""
    model = Model(lsg_flax.models.read_config(TINY | OTHERS[name]), "causal_lm")

    @jax.jit
    def draw(ids):
        params = model.init(jax.random.key(0), ids)["params"]
        noise = lambda x: jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
        return jax.tree.map(lambda x: x + 0.5 * noise(x), params)

    return model, draw(np.ones((1, 4), int))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_each_row_of_a_batch_has_its_own_chunks(name):
    """Without a cache as many as the model gives it alone, with one as in a batch of its own."""
    model, params = tiny(name)
    generator, lengths, count = np.random.default_rng(0), (2, 5, 16), 3
    mask = np.arange(-16, 0) >= -np.array(lengths)[:, None]
    ids = np.where(mask, generator.integers(1, 40, mask.shape), 0)
    options: Any = {"max_new_tokens": count, "eos_token_id": None}
    written = generate(model, params, ids, mask, use_cache=False, **options)
    for text, length in zip(written, lengths, strict=True):
        check_alone(model, params, text[-length - count :], count)
    if model.config.num_buckets is None and "lsh" in model.config.kinds:
        return
    written = generate(model, params, ids, mask, **options)
    for row, length in enumerate(lengths):
        alone = generate(model, params, ids[row : row + 1, -length:], **options)
        np.testing.assert_array_equal(written[row, -length - count :], alone[0])


@pytest.mark.slow
def test_with_a_cache_a_token_of_few_local_chunks_counts_once():
    """So that three neighbours see all of four chunks, as one chunk would. The reference loses the
    first tokens there with a cache, and without one its ring has some chunks more than once."""
    model, params = tiny("more neighbours than chunks")
    one = model.clone(config=model.config.with_overrides(local_attn_chunk_length=12))
    prompt, options = np.array([[5, 3], [9, 7]]), {"max_new_tokens": 10, "eos_token_id": None}
    written = generate(model, params, prompt, **options)
    np.testing.assert_array_equal(written, generate(one, params, prompt, **options))
    alike = generate(one, params, prompt, use_cache=False, **options)
    np.testing.assert_array_equal(written, alike)


def test_what_a_cache_cannot_do_is_refused():
    config = lsg_flax.models.read_config(
        {"model_type": "reformer", "is_decoder": True, "attn_layers": ["lsh"]}
    )
    model = Model(config, "causal_lm")
    with pytest.raises(ValueError, match="num_buckets=null with a cache"):
        model.init_with_output({"params": jax.random.key(0)}, np.ones((1, 4), int), cache_length=8)
    with pytest.raises(ValueError, match="lsh_rotations with cache_length and num_buckets=null"):
        model.init_with_output(
            {"params": jax.random.key(0)},
            np.ones((1, 4), int),
            cache_length=0,
            lsh_rotations=[np.ones((12, 64, 1, 1))],
        )
