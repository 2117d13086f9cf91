"""Damaged configs: each ends in an error that names the field, or is read as it was written."""

import dataclasses
import json
import time
import tracemalloc
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
from tiny_config import OF_TRANSFORMERS, spelled

from lsg_flax import LSGConfig, hub
from lsg_flax.models import (
    FAMILIES,
    EncoderConfig,
    EncoderDecoderConfig,
    Model,
    ModelConfig,
    model_type_of,
    read_config,
)
from lsg_flax.models.config_json import DIALECTS, LSG_FIELDS

SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
PATTERN = {
    "base_model_prefix": "lsg",
    "adaptive": True,
    "block_size": 8,
    "lsh_num_pre_rounds": 1,
    "mask_first_token": False,
    "num_global_tokens": 1,
    "pool_with_global": True,
    "sparse_block_size": 8,
    "sparsity_factor": 2,
    "sparsity_type": "norm",
}
BESIDE = (
    *("architectures", "model_type", "id2label", "label2id", "num_labels", "problem_type"),
    *("bos_token_id", "eos_token_id", "mask_token_id", "position_embedding_type", "pruned_heads"),
    *("qa_dropout", "summary_last_dropout", "summary_activation", "summary_type", "sparsity_kind"),
)
WHOLE = (0, 1, -1, 2, 3, 12, -5, 511, 2**31, 10**12, -(10**12), 10**30)
REAL = (0.0, 1.0, 0.5, -0.1, 12.0, 12.5, 1e-5, 1e-300, 1e300, float("nan"), float("inf"))
TEXTS = ("", "12", "1e-5", "true", "bert", "gelu", "relu", "lsh", "é\u2028\U0001f600", "\ud800")
NESTED = ([], [3], ["a"], [[]], [None], {}, {"0": "a"}, {"0": "a", "1": "b"}, {"a": {"b": [1]}})
LARGE = ("x" * 5000, [1] * 500, {str(i): f"L{i}" for i in range(100)})
ODD = st.sampled_from([None, True, False, *WHOLE, *REAL, *TEXTS, *NESTED, *LARGE])
SETTINGS = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def base_of(family: str, lsg: bool) -> dict:
    """A whole tiny config.json, as PyTorch writes it."""
    narrow = {"embedding_size": 8} if family in ("electra", "albert") else {}
    config = read_config(spelled(family, SIZES | narrow))
    named = {"architectures": [FAMILIES[family].class_name("base", lsg=lsg)]}
    return config.to_dict() | named | (PATTERN if lsg else {})


BASES = {(family, lsg): base_of(family, lsg) for family in OF_TRANSFORMERS for lsg in (False, True)}


@st.composite
def damaged(draw) -> tuple[dict, dict]:
    """A config.json and what was changed in it."""
    values = BASES[draw(st.sampled_from(sorted(BASES)))]
    names = sorted({*values, *BESIDE, *SIZES, "layer_norm_eps", "is_decoder", "embedding_size"})
    changed = draw(st.dictionaries(st.sampled_from(names), ODD, min_size=1, max_size=3))
    return values | changed, changed


def same(read, written) -> bool:
    """Equal; a number may have become a float, and the name of a label a text."""
    if isinstance(written, dict) and isinstance(read, dict):
        return read.keys() == written.keys() and all(same(read[k], written[k]) for k in read)
    if isinstance(read, bool) != isinstance(written, bool):
        return False
    return read == written or (read != read and written != written)


def assert_as_written(config: ModelConfig, values: dict) -> None:
    """Nothing was changed without a word, but what PyTorch's classes do not let count."""
    again = config.to_dict()
    dialect = config.dialect
    aliases = {name for name in dialect.also if name in values}
    unread = {"label2id", *(dialect.names[name] for name in aliases)}
    for name, value in values.items():
        if name == "num_labels":
            assert config.num_labels == (value if values["id2label"] is None else config.num_labels)
        elif name in aliases:  # the usual name wins
            assert getattr(config, name) == value
        elif name in unread:
            continue
        elif name == "id2label":
            names = {"0": "LABEL_0", "1": "LABEL_1"} if value is None else value
            if "num_labels" not in values:
                assert again[name] == {k: str(v) for k, v in names.items()}
        elif name == "sparsity_type" and value is None and config.lsg:
            assert config.lsg.sparsity_type == "none"
        elif value is None and name in dialect.names.values():
            assert again[name] == config.hidden_dropout_prob  # classifier_dropout
        else:
            assert same(again[name], value), name


def names_of(changed: dict) -> set[str]:
    """What a message may call a changed field."""
    theirs = {theirs for dialect in DIALECTS.values() for theirs in dialect.names.items()}
    found = {*changed}
    for ours, other in theirs:
        found |= {ours, other} if found & {ours, other} else set()
    return found | ({"num_labels", "ids"} if "id2label" in found else set())


def outcome(make, changed: dict):
    """What `make` returns, or None where it refuses by name what was changed; in little time."""
    begin = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a num_labels beside id2label, strides over heads
            return make()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert any(name in message for name in names_of(changed)), (changed, message)
        assert len(message) < 3000, message
        return None
    finally:
        assert time.process_time() - begin < 2, changed


def names_in(record: type) -> set[str]:
    """The fields of a config that a test may damage."""
    return {f.name for f in dataclasses.fields(record)} - {"extra", "model_type"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "config.json"


@hypothesis.settings(SETTINGS, max_examples=1000)
@hypothesis.given(damaged())
def test_a_damaged_config_json_is_refused_by_name_or_read_as_written(unchecked, file, drawn):
    values, changed = drawn
    file.write_text(json.dumps(values))
    opened = outcome(lambda: hub.open_checkpoint(file), changed)
    if opened is not None:
        expected = json.loads(file.read_text()) | {"model_type": opened.config.model_type}
        assert_as_written(opened.config, expected)
        assert read_config(opened.config.to_dict()).to_dict() == opened.config.to_dict()


@hypothesis.settings(SETTINGS, max_examples=300)
@hypothesis.given(st.sampled_from(sorted(BASES)), st.data())
def test_damaged_bytes_are_refused_by_the_name_of_the_file_or_read(unchecked, file, key, data):
    whole = json.dumps(BASES[key]).encode()
    begin, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 40))
    put = data.draw(st.binary(max_size=20) | st.sampled_from((b"[" * 9999, b"9" * 9999, b'""')))
    file.write_bytes(whole[:begin] + put + whole[begin + length :])
    opened = outcome(lambda: hub.open_checkpoint(file), {str(file): put})
    if opened is not None:
        assert read_config(opened.config.to_dict()).to_dict() == opened.config.to_dict()


@hypothesis.settings(SETTINGS, max_examples=300)
@hypothesis.given(st.sampled_from(sorted(BASES)), st.data())
def test_a_damaged_override_is_refused_by_name_or_taken(unchecked, key, data):
    config = read_config(BASES[key])
    fields = sorted(names_in(type(config)) - {"labels"})
    names = [*fields, *(LSG_FIELDS if key[1] else ()), "num_labels", "id2label"]
    given = data.draw(st.dictionaries(st.sampled_from(names), ODD, min_size=1, max_size=3))
    changed = outcome(lambda: config.with_overrides(**given), given)
    if changed is not None:
        for name in given.keys() & {*fields} - {"lsg"}:
            assert same(getattr(changed, name), given[name]), name


@hypothesis.settings(SETTINGS, max_examples=300)
@hypothesis.given(st.sampled_from((EncoderConfig, EncoderDecoderConfig, LSGConfig)), st.data())
def test_a_damaged_argument_is_refused_by_name_or_taken(unchecked, record, data):
    names = st.sampled_from(sorted(names_in(record)))
    given = data.draw(st.dictionaries(names, ODD, min_size=1, max_size=3))
    made = outcome(lambda: record(**given), given)
    if made is not None:
        hash(made)
        for name in given.keys() - {"labels", "sparsity_type"}:
            assert same(getattr(made, name), given[name]), name


@hypothesis.settings(SETTINGS, max_examples=40)
@hypothesis.given(damaged())
def test_a_config_that_is_read_makes_a_model_or_is_refused_by_name(unchecked, drawn):
    """Shapes only: nothing is computed."""
    values, changed = drawn
    config = outcome(lambda: read_config(values | {"model_type": model_type_of(values)}), changed)
    if config is None or sum(s.num_hidden_layers for s in config.stacks.values()) > 100:
        return
    task = "conditional_generation" if len(config.stacks) > 1 else "token_classification"
    outcome(lambda: Model(config, task).abstract_params(), changed)


def test_memory_stays_small(unchecked):
    tracemalloc.start()
    for name in ("num_labels", "num_hidden_layers", "vocab_size", "num_global_tokens"):
        for count in (10**6, 10**9, 10**12, 10**18):
            outcome(lambda: EncoderConfig.from_dict(BASES["bert", True] | {name: count}), {name: 0})  # noqa: B023
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()
