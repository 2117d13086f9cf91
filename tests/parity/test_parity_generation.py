"""Generated tokens, live: those of PyTorch's own `generate`, from its checkpoints and from ours."""

import jobs
import numpy as np
import pytest
from cases import VOCABULARY, generator_of, pick
from generations import LENGTHS, MODELS, generation_cases
from rotated_reformer import drawn_model

import lsg_flax
from lsg_flax.generation import loop


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    return jobs.run(generation_cases(folder), folder)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_pytorch(generated, name):
    """Of every row, with their width and padding; and the scores of beam search."""
    case, result = generated[name]
    assert not any(result.report.values()), result.report  # nothing missing, nothing left over
    model, params = lsg_flax.from_pretrained(generated.folder / name)
    compiled = loop.decode._cache_size()
    for number, call in enumerate(case.fields["calls"]):
        options, searches = call["options"], "num_beams" in call["options"]
        inputs = {
            key.split(".")[1]: array
            for key, array in case.inputs.items()
            if key.split(".")[0] in call["inputs"]
        }
        found = lsg_flax.generate(model, params, **inputs, **options, return_scores=searches)
        ids, scores = found if searches else (found, None)
        np.testing.assert_array_equal(ids, result.outputs[f"tokens_{number}"], err_msg=str(call))
        if searches:
            wanted = result.outputs[f"scores_{number}"]
            jobs.close("scores of texts", scores, wanted, tolerance=1e-4, label=str(call))
    kinds = 2 if len(case.fields["calls"]) > len(LENGTHS) else 1  # up to two blocks, and beyond
    assert loop.decode._cache_size() <= compiled + 2 * kinds + 1


def test_texts_end_at_many_places(generated):
    """So that the comparison has rows of many lengths, and padding."""
    lengths = []
    for name in MODELS:
        case, result = generated[name]
        pad = 0 if name.endswith("pegasus") else 1
        for number in range(len(case.fields["calls"])):
            lengths += (result.outputs[f"tokens_{number}"] != pad).sum(axis=1).tolist()
    counts = np.bincount(lengths)
    assert len(lengths) > 200 and (counts > 3).sum() > 6, counts


REFORMERS = [f"reformer {number}" for number in range(4)]
PROMPTS, NEW = (2, 7, 20), 12


def reformer_of(name: str) -> dict:
    """Fields of config.json. More than one chunk before of local layers is not among them: there
    the reference loses the first tokens."""
    generator = generator_of(name)
    return {
        "vocab_size": VOCABULARY,
        "attn_layers": [pick(generator, ("local", "lsh", "lsh")) for _ in range(3)],
        "hidden_size": 12,
        "axial_pos_embds_dim": [4, 8],
        "axial_pos_shape": [6, 8],
        "max_position_embeddings": 48,
        "num_attention_heads": 2,
        "attention_head_size": 6,
        "feed_forward_size": 14,
        "local_attn_chunk_length": pick(generator, (2, 3, 4)),
        "lsh_attn_chunk_length": pick(generator, (2, 3, 4)),
        "local_num_chunks_before": int(generator.integers(0, 2)),
        "lsh_num_chunks_before": int(generator.integers(0, 4)),
        "num_buckets": pick(generator, (4, 8, [2, 4])),
        "num_hashes": int(generator.integers(1, 4)),
        "is_decoder": True,
    }


@pytest.fixture(scope="module")
def reformers(tmp_path_factory):
    folder, cases = tmp_path_factory.mktemp("reformers"), {}
    for name in REFORMERS:
        generator, run = generator_of(f"{name} prompts"), {"kind": "reformer_generation"}
        for length in PROMPTS:
            prompt = {"prompt": generator.integers(1, VOCABULARY, length)}
            fields = run | {"config": reformer_of(name), "count": NEW}
            cases[f"{name} {length}"] = jobs.Case(fields, prompt)
    return jobs.run(cases, folder)


@pytest.mark.parametrize("name", REFORMERS)
def test_a_reformer_writes_with_its_cache_what_pytorch_writes(reformers, name):
    config = reformer_of(name)
    for length in PROMPTS:
        case, result = reformers[f"{name} {length}"]
        shapes = result.report["parameters"]
        model, params = drawn_model(reformers.folder / name, config, shapes)
        options = {"max_new_tokens": NEW, "eos_token_id": None}
        found = lsg_flax.generate(model, params, case.inputs["prompt"][None], **options)
        np.testing.assert_array_equal(found[0], result.outputs["tokens"], err_msg=str(config))
