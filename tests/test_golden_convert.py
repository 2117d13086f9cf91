"""convert_checkpoint and to_lsg against the reference's LSGConverter: tables equal to 1e-6, config
and tokenizer alike."""

import functools
import json

import numpy as np
import pytest
from golden_data import GOLDEN, cases, load

import lsg_flax
from lsg_flax.hub import config_values
from lsg_flax.hub.to_lsg import Draws, LSGOptions, spread_positions, to_lsg
from lsg_flax.patterns.config import MAX_GLOBAL_TOKENS, LSGConfig

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
CLS, MASK = 2, 4  # ids in the recorded tokenizers
DRAWN = ("position_noise", "global_noise", "global_samples")
TASKS = {None: None, "BertModel": "base"}


@functools.cache
def checkpoint(folder: str, task):
    return lsg_flax.from_pretrained(GOLDEN / folder, task)


def tables(params) -> dict[str, np.ndarray]:
    embeddings = params["encoder"]["embeddings"]
    return {
        name: np.asarray(embeddings[name]["embedding"])
        for name in ("position_embeddings", "global_embeddings")
    }


def check(params, outputs):
    for name, table in tables(params).items():
        assert table.shape == outputs[name].shape, name
        np.testing.assert_allclose(table, outputs[name], err_msg=name, **TOLERANCE)


def with_draws(case, outputs, names):
    """The conversion in memory, with what the reference drew."""
    model, params = checkpoint(case["checkpoint"], TASKS[case["architecture"]])
    lsg = model.config.lsg or LSGConfig(**case["config"])
    draws = Draws(**{name: outputs[name] for name in names if name in outputs})
    options = LSGOptions(**case["options"])
    return to_lsg(
        params, model.config, options, lsg=lsg, bos_token_id=CLS, mask_token_id=MASK, draws=draws
    )


def drawn(name: str) -> bool:
    return any(key in load(name)[2] for key in DRAWN)


def refused(name: str) -> bool:
    """The reference ignores an option here; lsg_flax says so instead."""
    case = load(name)[0]
    return "keep_first_global_token" in case["options"] and "lsg" not in case["checkpoint"]


@pytest.mark.parametrize("name", [n for n in cases("convert") if drawn(n)])
def test_conversion_with_the_recorded_draws(name):
    case, _, outputs = load(name)
    params, config = with_draws(case, outputs, ("position_noise", "global_samples"))
    check(params, outputs)
    assert config.max_position_embeddings == case["options"]["max_sequence_length"]


@pytest.mark.parametrize("name", [n for n in cases("convert") if "global_noise" in load(n)[2]])
def test_random_globals_have_the_distribution_of_the_word_table(name):
    case, _, outputs = load(name)
    params, _ = with_draws(case, outputs, ("position_noise", "global_noise"))
    check(params, outputs)


@pytest.mark.filterwarnings("ignore:weights for task", "ignore:sparsity_type='stride' gives")
@pytest.mark.filterwarnings("ignore:max_sequence_length=100 is less", "ignore:the . global tokens")
@pytest.mark.parametrize("name", [n for n in cases("convert") if not drawn(n) and not refused(n)])
def test_conversion_of_files(name, tmp_path):
    case, _, outputs = load(name)
    model, params = lsg_flax.convert_checkpoint(
        GOLDEN / case["checkpoint"],
        tmp_path,
        task=TASKS[case["architecture"]],
        **case["options"],
        **case["config"],
    )
    check(params, outputs)
    report = case["report"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [report["class"]]
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == report["model_max_length"]
    ours = config_values(model)
    ignored = {"architectures", "torch_dtype", "transformers_version"}
    expected = {k: v for k, v in report["config"].items() if k not in ignored}
    assert {key: ours.get(key) for key in expected} == expected
    again, reloaded = lsg_flax.from_pretrained(tmp_path, TASKS[case["architecture"]])
    assert config_values(again) == ours | {"torch_dtype": "float32"}
    for table, same in zip(tables(params).values(), tables(reloaded).values(), strict=True):
        np.testing.assert_array_equal(table, same)


@pytest.mark.parametrize("name", [n for n in cases("convert") if refused(n)])
def test_options_for_lsg_sources_are_refused_for_plain_ones(name):
    case, _, outputs = load(name)
    with pytest.raises(ValueError, match="keep_first_global_token=True needs an LSG checkpoint"):
        with_draws(case, outputs, ())


def test_every_recorded_conversion_is_tested():
    names = cases("convert")
    assert len(names) == 30
    assert sum(drawn(n) for n in names) == 7 and sum(refused(n) for n in names) == 1


def test_seed_decides_the_random_globals():
    model, params = checkpoint("bert_to_convert_300", None)

    def convert(seed):
        options = LSGOptions(max_sequence_length=512, random_global_init=True, seed=seed)
        made, _ = to_lsg(
            params, model.config, options, lsg=LSGConfig(), bos_token_id=CLS, mask_token_id=None
        )
        return tables(made)["global_embeddings"]

    np.testing.assert_array_equal(convert(1), convert(1))
    assert np.abs(convert(1) - convert(2)).max() > 1e-3


@pytest.mark.parametrize("stride", [0, 3, 1024])
def test_stride_that_does_not_fit_names_those_that_do(stride):
    positions = np.zeros((512, 2), np.float32)
    with pytest.raises(ValueError, match=f"global_positional_stride={stride}.*512 positions") as e:
        spread_positions(positions, stride, np.zeros((0, 2)))
    assert "choose one of [1, 2, 4" in str(e.value) and str(MAX_GLOBAL_TOKENS) in str(e.value)


@pytest.mark.parametrize(("bos", "mask"), [(None, 4), (2, None), (31, 4), (2, -1)])
def test_token_ids_that_are_no_rows_are_refused(bos, mask):
    model, params = checkpoint("bert_to_convert_512", None)
    with pytest.raises(ValueError, match=r"token_id=.* is not a row of the word table \(0\.\.30\)"):
        to_lsg(
            params,
            model.config,
            LSGOptions(),
            lsg=LSGConfig(),
            bos_token_id=bos,
            mask_token_id=mask,
        )
