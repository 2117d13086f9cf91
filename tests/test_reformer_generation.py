"""What a Reformer writes with a cache: the reference's tokens, and each row as if it were alone."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from golden_data import cases, load
from reference.reformer_numbers import drawn, rotations

import lsg_flax
from lsg_flax.generation import generate
from lsg_flax.models import Model
from lsg_flax.patterns import LSH

CASES = cases("reformer_generation")
KINDS = sorted({name.rsplit("_", 1)[0] for name in CASES})


@dataclasses.dataclass(frozen=True)
class WithRotations:
    """A model that hashes with the recorded rotations, in every layer the same."""

    model: Model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def max_length(self) -> int:
        return self.model.max_length

    def apply(self, variables, **inputs):
        config = self.config
        pattern = config.pattern("lsh", config.lsh_attn_chunk_length + 1)
        assert isinstance(pattern, LSH)
        shape = pattern.rotations_shape(config.num_attention_heads, config.head_dim)
        given = [rotations(0, shape)] * config.attn_layers.count("lsh")
        return self.model.apply(variables, **inputs, lsh_rotations=given)


@pytest.fixture(scope="module", params=KINDS)
def recorded(request, tmp_path_factory):
    """A model, its parameters, and its recorded cases' names."""
    folder = tmp_path_factory.mktemp("reformer")
    names = [name for name in CASES if name.rsplit("_", 1)[0] == request.param]
    case = load(names[0])[0]
    values = {"model_type": "reformer", "architectures": ["ReformerModelWithLMHead"]}
    (folder / "config.json").write_text(json.dumps(values | case["config"]))
    tensors = {name: drawn(name, shape) for name, shape in case["report"]["parameters"].items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    model, params = lsg_flax.from_pretrained(folder)
    return WithRotations(model), params, names


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
    count, variables = 6, {"params": params}
    options: Any = {"max_new_tokens": count, "eos_token_id": None}
    written = generate(model, params, ids, mask, use_cache=False, **options)
    run = jax.jit(lambda ids, mask: model.apply(variables, input_ids=ids, attention_mask=mask))
    for row in (0, 3, 6):
        text = list(ids[row][mask[row]])
        for token in written[row, ids.shape[1] :]:
            fill = model.config.needs_padding(len(text))
            places = np.arange(len(text) + fill)
            given = (np.pad(text, (0, fill))[None], (places < len(text))[None])
            if len(places) <= model.config.lsh_attn_chunk_length:
                out = model.model.apply(variables, input_ids=given[0], attention_mask=given[1])
            else:
                out = run(*given)
            assert int(np.argmax(out.logits[0, len(text) - 1])) == token
            text.append(token)
    if model.config.kinds == ("local",):
        np.testing.assert_array_equal(written[:, ids.shape[1] :], tokens[:, :count])


def test_what_a_cache_cannot_do_is_refused():
    config = lsg_flax.models.read_config(
        {"model_type": "reformer", "is_decoder": True, "attn_layers": ["lsh"]}
    )
    model = Model(config, "causal_lm")
    with pytest.raises(ValueError, match="num_buckets=null with a cache"):
        model.init_with_output({"params": jax.random.key(0)}, np.ones((1, 4), int), cache_length=8)
