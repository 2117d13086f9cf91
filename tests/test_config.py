"""Configurations: every invalid value raises with value, range and remedy; config.json survives a
round trip."""

import dataclasses
import json
import warnings

import jax
import jaxtyping
import pytest
from golden_data import GOLDEN

from lsg_flax.models import EncoderConfig
from lsg_flax.models.config_json import is_lsg
from lsg_flax.patterns.config import SPARSITY_TYPES, LSGConfig


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Without the annotation checks of conftest.py, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


TINY = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("fields", "value", "remedy"),
    [
        ({"sparsity_type": "nrm"}, "sparsity_type='nrm'", "choose one of none, norm, pooling, lsh"),
        ({"block_size": 0}, "block_size=0", "at least 1"),
        ({"sparse_block_size": -1}, "sparse_block_size=-1", "0 (off) or positive"),
        ({"lsh_num_pre_rounds": -1}, "lsh_num_pre_rounds=-1", "0 or positive"),
        ({"num_global_tokens": 0}, "num_global_tokens=0", "outside 1..512"),
        ({"num_global_tokens": 513}, "num_global_tokens=513", "outside 1..512"),
        (
            {"mask_first_token": True, "pool_with_global": False},
            "mask_first_token=True",
            "set pool_with_global=True",
        ),
        (
            {"block_size": 128, "sparsity_factor": 3},
            "block_size=128 is not divisible by sparsity_factor=3",
            "choose sparsity_factor from [1, 2, 4, 8, 16, 32, 64, 128], or 0",
        ),
        (
            {"block_size": 8, "sparsity_factor": 3, "sparsity_type": "none"},
            "block_size=8 is not divisible by sparsity_factor=3",
            "choose sparsity_factor from [1, 2, 4, 8], or 0",
        ),
        (
            {"block_size": 12, "sparsity_factor": 4, "sparse_block_size": 12},
            "12/4 = 3 is odd",
            "choose sparsity_factor from [1, 2, 3, 6, 12], or 0",
        ),
        (
            {"sparse_block_size": 48},
            "sparse_block_size=48",
            "at least 49: smaller windows fall inside the local window. Use sparse_block_size=128",
        ),
        (
            {"block_size": 8, "sparse_block_size": 5, "sparsity_factor": 2},
            "= 5 tokens, which sparsity_factor=2 must divide",
            "use sparse_block_size=8",
        ),
        (
            {
                "block_size": 8,
                "sparse_block_size": 16,
                "sparsity_factor": 8,
                "sparsity_type": "lsh",
            },
            "8/8",
            "lower sparsity_factor",
        ),
    ],
)
def test_an_invalid_pattern_names_value_range_and_remedy(fields, value, remedy):
    with pytest.raises(ValueError) as error:
        LSGConfig(**fields)
    assert value in str(error.value) and remedy in str(error.value)


def test_the_smallest_allowed_sparse_block_is_what_the_message_says():
    assert LSGConfig(sparse_block_size=49, sparsity_type="stride").sparse_block_size == 49


@pytest.mark.parametrize("off", [{"sparsity_factor": 0}, {"sparsity_factor": -1}])
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_the_sparse_part_can_be_switched_off(kind, off):
    assert not LSGConfig(sparsity_type=kind, **off).is_sparse
    assert not LSGConfig(sparsity_type=kind, sparse_block_size=0).is_sparse
    assert LSGConfig(sparsity_type=kind).is_sparse == (kind != "none")


def test_none_is_the_type_called_none():
    assert LSGConfig(sparsity_type=None) == LSGConfig(sparsity_type="none")


def test_only_adaptive_patterns_pad():
    padding = LSGConfig(block_size=4, sparse_block_size=4)
    assert [padding.needs_padding(n) for n in (1, 8, 9, 12, 13)] == [0, 0, 3, 0, 3]
    fixed = dataclasses.replace(padding, adaptive=False)
    assert [fixed.needs_padding(n) for n in (1, 8, 12)] == [0, 0, 0]
    with pytest.raises(ValueError, match=r"length 13 .* pad the inputs to 16 or set adaptive=True"):
        fixed.needs_padding(13)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        *(
            ({name: 0}, f"{name}=0 must be at least 1")
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
            )
        ),
        ({"hidden_size": 9}, "hidden_size=9 is not divisible by num_attention_heads=2"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob=1.0 must lie in \[0, 1\)"),
        ({"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob=-0.1 must lie"),
        ({"classifier_dropout": 2.0}, "classifier_dropout=2.0 must lie"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is unknown; choose one of single"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' in config.json changes what"),
        ({"add_cross_attention": True}, "set is_decoder=True as well"),
        ({"id2label": {"0": "a", "2": "b"}}, r"ids \[0, 2\]; they must be 0..1 without gaps"),
        ({"base_model_prefix": "lsg", "num_global_tokens": 0}, "outside 1..512"),
    ],
)
def test_an_invalid_config_json_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        EncoderConfig.from_dict(TINY | fields)


@pytest.mark.parametrize("kind", ["stride", "block_stride"])
def test_more_stride_than_heads_warns_and_runs(kind):
    with pytest.warns(UserWarning, match=rf"'{kind}'.*factor=4 over num_attention_heads=2"):
        EncoderConfig(**TINY, lsg=LSGConfig(sparsity_type=kind, sparsity_factor=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EncoderConfig(**TINY, lsg=LSGConfig(sparsity_type=kind, sparsity_factor=2))
        EncoderConfig(**TINY, lsg=LSGConfig(sparsity_type="norm", sparsity_factor=4))


FOLDERS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_config_json_survives_a_round_trip(folder):
    """Every field of the file, those lsg_flax does not know among them."""
    values = json.loads((GOLDEN / folder / "config.json").read_text())
    values |= {"task_specific_params": {"x": [1, None]}, "lsg_num_pre_rounds": 3}
    config = EncoderConfig.from_dict(values)
    written = config.to_dict()
    labels = {"id2label", "label2id"}
    assert {k: written[k] for k in values.keys() - labels} == {
        k: values[k] for k in values.keys() - labels
    }
    again = EncoderConfig.from_dict(json.loads(json.dumps(written)))
    assert again == config and hash(again) == hash(config)
    assert again.to_dict() == written
    assert is_lsg(written) == (
        "plain" not in folder and "convert_" not in folder.replace("_lsg", "x")
    )


def test_labels_keep_their_names_and_order():
    names = {"1": "no", "0": "yes", "2": "maybe"}
    config = EncoderConfig.from_dict(TINY | {"id2label": names})
    assert config.labels == ("yes", "no", "maybe") and config.num_labels == 3
    written = config.to_dict()
    assert written["id2label"] == {"0": "yes", "1": "no", "2": "maybe"}
    assert written["label2id"] == {"yes": 0, "no": 1, "maybe": 2}
    assert EncoderConfig.from_dict(TINY | {"num_labels": 5}).num_labels == 5


@pytest.mark.parametrize(
    "values",
    [
        {"base_model_prefix": "lsg"},
        {"architectures": ["LSGBertModel"]},
        {"architectures": "LSGBertModel"},
    ],
)
def test_an_lsg_checkpoint_is_known_by_prefix_or_class(values):
    assert EncoderConfig.from_dict(TINY | values | {"block_size": 64}).lsg == LSGConfig(
        block_size=64
    )
    assert EncoderConfig.from_dict(TINY | {"architectures": ["BertModel"]}).lsg is None


def test_configs_are_static_arguments_of_jit():
    traces = []

    def run(x, config):
        traces.append(config)
        return x * config.lsg.block_size

    fast = jax.jit(run, static_argnames="config")
    configs = [EncoderConfig(**TINY, lsg=LSGConfig(block_size=b)) for b in (64, 64, 128)]
    assert [int(fast(1, config=c)) for c in configs] == [64, 64, 128]
    assert len(traces) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs[0].lsg.block_size = 3


def test_overrides_are_flat_names():
    config = EncoderConfig(**TINY, lsg=LSGConfig())
    changed = config.with_overrides(
        num_labels=3, sparsity_type="lsh", hidden_dropout_prob=0.0, block_size=64
    )
    assert changed.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert changed.lsg == LSGConfig(sparsity_type="lsh", block_size=64)
    assert changed.hidden_dropout_prob == 0.0
    named = config.with_overrides(id2label={0: "a"})
    assert named.labels == ("a",) and config.with_overrides(num_labels=2) == config


@pytest.mark.parametrize(
    ("lsg", "overrides", "says"),
    [
        (True, {"hiden_size": 8}, r"unknown config fields \['hiden_size'\]; known are .*'hidden_s"),
        (True, {"num_labels": 0}, "num_labels=0 must be at least 1"),
        (True, {"num_global_tokens": 600}, "num_global_tokens=600 is outside 1..512"),
        (False, {"block_size": 64}, r"\['block_size'\] are LSG settings.*convert_checkpoint"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(lsg, overrides, says):
    config = EncoderConfig(**TINY, lsg=LSGConfig() if lsg else None)
    with pytest.raises(ValueError, match=says):
        config.with_overrides(**overrides)
