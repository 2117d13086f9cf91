"""Generated tokens, live: those of PyTorch's own `generate`, from its checkpoints and from ours."""

import jobs
import numpy as np
import pytest
from generations import LENGTHS, MODELS, generation_cases

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
