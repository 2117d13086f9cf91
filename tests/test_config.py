"""Configurations: every invalid value raises with value, range and remedy; config.json survives a
round trip."""

import dataclasses
import json
import warnings

import jax
import jaxtyping
import numpy as np
import pytest
import transformers
from golden_data import GOLDEN
from tiny_config import OF_TRANSFORMERS, spelled
from unread import unread_by

from lsg_flax.hub import config_values
from lsg_flax.models import FAMILIES, EncoderConfig, Model, read_config
from lsg_flax.models.config_json import DIALECTS, is_lsg
from lsg_flax.patterns.config import SPARSITY_TYPES, LSGConfig


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Without the annotation checks of conftest.py, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


NULLABLE = ("pad_token_id", "problem_type", "classifier_dropout")  # in today's transformers
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
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob=1.0 must be in \[0, 1\)"),
        ({"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob=-0.1 must be in"),
        ({"classifier_dropout": 2.0}, "classifier_dropout=2.0 must be in"),
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


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        *(
            ({name: value}, says)
            for name in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
            for value, says in (
                ("12", f"{name}='12' must be a whole number, without quotes"),
                (12.0, f"{name}=12.0 must be a whole number"),
                (True, f"{name}=True must be a whole number"),
                (None, f"{name}=None must be a whole number"),
                ([12], rf"{name}=\[12\] must be a whole number"),
                (10**12, f"{name}=1000000000000 must be at least 1 and at most "),
            )
        ),
        ({"type_vocab_size": 0}, "type_vocab_size=0 must be at least 1: bert adds a segment"),
        ({"num_labels": 10**12}, "num_labels=1000000000000 must be at least 1 and at most 1,048"),
        ({"num_labels": None}, "num_labels=None must be a whole number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan must be a finite number"),
        ({"layer_norm_eps": -1}, r"layer_norm_eps=-1(.0)? must be in \[0, 1\]"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps='1e-5' must be a number, without quotes"),
        ({"initializer_range": 10**400}, "initializer_range=1000.*00 must be a finite number"),
        ({"initializer_range": -0.02}, "initializer_range=-0.02 must be 0 or positive"),
        ({"hidden_dropout_prob": False}, "hidden_dropout_prob=False must be a number"),
        ({"is_decoder": 1}, "is_decoder=1 must be true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None must be true or false"),
        ({"hidden_act": "gelu2"}, "hidden_act='gelu2' is not supported; supported are gelu, "),
        ({"hidden_act": ["gelu"]}, r"hidden_act=\['gelu'\] must be a text"),
        (
            {"pad_token_id": 11},
            r"pad_token_id=11 is outside -11..10, the rows of a table of vocab_size=11",
        ),
        ({"pad_token_id": -12}, "pad_token_id=-12 is outside -11..10"),
        ({"pad_token_id": [0]}, r"pad_token_id=\[0\] must be a whole number or null"),
        ({"problem_type": 3}, "problem_type=3 is unknown; choose one of single"),
        (
            {"problem_type": "single_label_classification", "num_labels": 1},
            "needs two labels or more, got num_labels=1; use problem_type='regression'",
        ),
        ({"model_type": ["bert"]}, r"model_type=\['bert'\] must be a text"),
        ({"architectures": [3]}, r"architectures=\[3\] must be a text or a list"),
        ({"architectures": {"a": 1}}, r"architectures=\{'a': 1\} must be a text or a list"),
        ({"id2label": ["a", "b"]}, r"id2label=\['a', 'b'\] must be a mapping, such as id2label="),
        ({"id2label": {"0": ["a"]}}, r"id2label=\['a'\] must be a text or a whole number"),
        ({"id2label": {"x": "a"}}, "id2label has the id 'x'; ids must be integers"),
        ({"id2label": {"0": "a", "00": "b"}}, r"ids \[0\]; they must be 0..1 without gaps"),
        ({"id2label": {}}, "num_labels=0 must be at least 1"),
        ({"label2id": ["a"]}, r"label2id=\['a'\] must be a mapping"),
        ({"eos_token_id": [[2]]}, r"eos_token_id=\[\[2\]\] must be a whole number or a list or"),
        ({"position_embedding_type": None}, "position_embedding_type=None in config.json changes"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"base_model_prefix": "lsg", "block_size": "64"}, "block_size='64' must be a whole num"),
        ({"base_model_prefix": "lsg", "block_size": 10**12}, "block_size=1000000000000 must be at"),
        ({"base_model_prefix": "lsg", "adaptive": 0}, "adaptive=0 must be true or false"),
        ({"base_model_prefix": "lsg", "sparsity_type": ["norm"]}, "sparsity_type=.* is unknown"),
        ({"base_model_prefix": "lsg", "sparsity_factor": 2.5}, "sparsity_factor=2.5 must be a w"),
    ],
)
def test_a_damaged_value_is_named_with_what_is_allowed(fields, says):
    with pytest.raises(ValueError, match=says):
        EncoderConfig.from_dict(TINY | fields)
    for record, given in ((EncoderConfig, TINY | fields), (LSGConfig, fields)):
        given = {n: v for n, v in given.items() if n != "base_model_prefix"}
        if given.keys() <= record.__dataclass_fields__.keys():
            with pytest.raises(ValueError, match=says):
                record(**given)


def test_numbers_of_numpy_are_those_of_python():
    numbers = {"hidden_size": np.int64(8), "layer_norm_eps": np.float64(1e-5)}
    config = EncoderConfig(**TINY | numbers, is_decoder=np.bool_(True), labels=["a", "b"])
    plain = EncoderConfig(**TINY, layer_norm_eps=1e-5, is_decoder=True, labels=("a", "b"))
    assert config == plain and hash(config) == hash(plain)
    assert json.dumps(config.to_dict()) == json.dumps(plain.to_dict())
    assert LSGConfig(block_size=np.int32(64)) == LSGConfig(block_size=64)


def test_padding_counted_from_the_end_is_a_row_of_the_table():
    """As in PyTorch's embeddings."""
    pads = {-1: 10, -11: 0, 4: 4, None: 0}
    assert {p: EncoderConfig(**TINY, pad_token_id=p).filler for p in pads} == pads


@pytest.mark.parametrize("names", [["a", "a"], ["a", " "]])
def test_names_of_labels_that_are_not_told_apart_are_kept_and_said(names):
    with pytest.warns(UserWarning, match=rf"id2label has empty or .*'{names[1]}'"):
        config = EncoderConfig.from_dict(TINY | {"id2label": dict(enumerate(names))})
    assert config.labels == tuple(names)


def test_what_id2label_says_wins_and_is_said():
    with pytest.warns(UserWarning, match="num_labels=3 is ignored, because id2label has 2 names"):
        config = EncoderConfig.from_dict(TINY | {"id2label": {"0": "a", "1": "b"}, "num_labels": 3})
    assert config.labels == ("a", "b")


@pytest.mark.parametrize("family", OF_TRANSFORMERS)
def test_a_field_that_the_family_does_not_read_is_kept_and_changes_nothing(family):
    plain = read_config({"model_type": family})
    strange = unread_by(family)
    config = read_config({"model_type": family} | strange)
    assert dataclasses.replace(config, extra="{}") == plain
    written = config.to_dict()
    assert {name: written[name] for name in strange} == strange
    assert written.keys() == plain.to_dict().keys() | strange.keys()


def test_distilbert_reads_three_fields_under_two_names():
    """As PyTorch's attribute_map does, where the usual name wins."""
    names = {"hidden_size": 24, "dim": 36, "num_hidden_layers": 3, "n_heads": 4}
    config = EncoderConfig.from_dict({"model_type": "distilbert"} | names)
    assert (config.hidden_size, config.num_hidden_layers) == (24, 3)
    assert (config.num_attention_heads, config.to_dict()["dim"]) == (4, 24)


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("distilbert", {"type_vocab_size": 2}, "type_vocab_size=2 is not possible for distilbert"),
        ("distilbert", {"layer_norm_eps": 1e-5}, "do not read it; give layer_norm_eps=1e-12"),
        ("distilbert", {"hidden_size": "x"}, r"dim \(hidden_size\)='x' must be a whole number"),
        ("distilbert", {"hidden_size": 7}, r"dim \(hidden_size\)=7 is not divisible by n_heads"),
        ("distilbert", {"hidden_act": "x"}, r"activation \(hidden_act\)='x' is not supported"),
        ("distilbert", {"qa_dropout": "x"}, "qa_dropout='x' must be a number"),
        ("bert", {"embedding_size": 4}, "embedding_size=4 is not possible for bert"),
        ("albert", {"is_decoder": True}, "is_decoder=True is not possible for albert"),
        ("albert", {"num_hidden_groups": None}, "num_hidden_groups=None must be a number for alb"),
        (
            "albert",
            {"num_hidden_layers": 100, "num_hidden_groups": 100, "inner_group_num": 11},
            "num_hidden_groups=100 of inner_group_num=11 layers are more than 1,000",
        ),
        ("electra", {"embedding_size": None}, "embedding_size=None must be a number for electra"),
        ("electra", {"summary_last_dropout": 2}, "summary_last_dropout=2 must be in"),
    ],
)
def test_what_the_family_could_not_write_is_refused_where_it_is_given(family, fields, says):
    with pytest.raises(ValueError, match=says):
        EncoderConfig.from_dict({"model_type": family}).with_overrides(**fields)


@pytest.mark.parametrize("family", ["albert", "distilbert"])
def test_a_decoder_that_only_the_lsg_classes_see_is_refused(family):
    values = {"model_type": family, "is_decoder": True}
    assert not EncoderConfig.from_dict(values).is_decoder
    with pytest.raises(ValueError, match=r"is_decoder=True in config.json changes what"):
        EncoderConfig.from_dict(values | {"base_model_prefix": "lsg"})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lsg": LSGConfig(block_size=64), "max_position_embeddings": 4098},
        {"labels": ("a",), "problem_type": "regression", "classifier_dropout": 0.25},
        {"labels": ("a", "b"), "problem_type": "single_label_classification"},
    ],
    ids=["fresh", "converted", "regression", "classes"],
)
@pytest.mark.parametrize("family", sorted({*OF_TRANSFORMERS} - {"realm"}))  # which it has not
def test_what_we_write_is_read_by_the_transformers_of_today(family, changes, tmp_path, caplog):
    """Which checks types strictly: null in place of a number would be refused."""
    made = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    made |= {"embedding_size": 4, "num_hidden_groups": 1, "inner_group_num": 1}
    dialect = DIALECTS[family]
    made = {n: v for n, v in made.items() if n not in dialect.absent | dialect.equal}
    changes = {n: v for n, v in changes.items() if n not in dialect.absent}
    config = read_config(spelled(family, made)).with_overrides(**changes)
    task = "sequence_classification"
    task = task if task in FAMILIES[family].heads else "conditional_generation"
    values = config_values(Model(config, task))
    (tmp_path / "config.json").write_text(json.dumps(values))
    if values["model_type"] != family:  # an LSG checkpoint that is ours alone is nothing to it
        with pytest.raises(ValueError, match=f"`{values['model_type']}` but Transformers does not"):
            transformers.AutoConfig.from_pretrained(tmp_path)
        assert read_config(values).to_dict() == values | {"model_type": family}
        return
    transformers.logging.enable_propagation()
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    transformers.logging.disable_propagation()
    # Old BartConfigs say of every id2label that it is not the three labels of their own default.
    logged = [record.getMessage() for record in caplog.records]
    assert not [text for text in logged if "incompatible id to label map" not in text]
    theirs = {DIALECTS[family].names.get(n, n): n for n in dataclasses.asdict(config)}
    for name in values.keys() & theirs.keys():
        assert getattr(read, name) == values[name], name
    assert None not in [values[n] for n in theirs if n not in NULLABLE and n in values]
    assert read_config(values).to_dict() == values


@pytest.mark.parametrize("kind", ["stride", "block_stride"])
def test_more_stride_than_heads_warns_and_runs(kind):
    with pytest.warns(UserWarning, match=rf"'{kind}'.*factor=4 larger than num_attention_heads=2"):
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
    config = read_config(values)
    written = config.to_dict()
    labels = {"id2label", "label2id"}
    assert {k: written[k] for k in values.keys() - labels} == {
        k: values[k] for k in values.keys() - labels
    }
    again = read_config(json.loads(json.dumps(written)))
    assert again == config and hash(again) == hash(config)
    assert again.to_dict() == written
    plain = ("plain", "realm", "convert_")
    assert is_lsg(written) == (not any(part in folder.replace("_lsg", "x") for part in plain))


def test_labels_keep_their_names_and_order():
    names = {"1": "no", "0": "yes", "2": "maybe"}
    config = EncoderConfig.from_dict(TINY | {"id2label": names})
    assert config.labels == ("yes", "no", "maybe") and config.num_labels == 3
    written = config.to_dict()
    assert written["id2label"] == {"0": "yes", "1": "no", "2": "maybe"}
    assert written["label2id"] == {"yes": 0, "no": 1, "maybe": 2}
    assert EncoderConfig.from_dict(TINY | {"num_labels": 5}).num_labels == 5
    assert EncoderConfig.from_dict(TINY | {"id2label": {0: 3, 1: 4}}).labels == ("3", "4")


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
