"""The families: tables that are complete and unambiguous, config.json in each dialect, and what
only some of them have (positions behind the padding, narrow embeddings, shared layers)."""

import functools
import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import OF_TRANSFORMERS, SIZES, has_two_stacks, spelled

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.convert_from_torch import params_from_torch, params_to_torch
from lsg_flax.generation import generate
from lsg_flax.hub.to_lsg import LSGOptions, to_lsg
from lsg_flax.models import FAMILIES, EncoderConfig, ModelConfig, read_config
from lsg_flax.models.config_json import DIALECTS
from lsg_flax.training.losses import loss_fn

HEADS = [(family, task) for family in OF_TRANSFORMERS for task in FAMILIES[family].heads]
TABLE = pathlib.Path(__file__).parents[1] / "docs" / "families.md"


def config_of(family: str, **fields) -> ModelConfig:
    """A tiny one; fields by the names of EncoderConfig."""
    narrow = {"embedding_size": 8} if family in ("electra", "albert") else {}
    return read_config(spelled(family, SIZES | narrow | fields))


def made(family: str, task="base", lsg: LSGConfig | None = None, **fields):
    """A model with random parameters."""
    model = lsg_flax.Model(config_of(family, **fields).with_overrides(lsg=lsg), task)
    return model, jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]


@pytest.mark.parametrize("family", OF_TRANSFORMERS)
def test_every_table_is_a_bijection(family):
    for task in FAMILIES[family].heads:
        for lsg in (None, LSGConfig()):
            config = config_of(family).with_overrides(lsg=lsg)
            keys = FAMILIES[family].keys(task, config)
            names = [key.torch for key in keys]
            places = [(key.path, key.layer) for key in keys]
            assert len(set(names)) == len(names) and len(set(places)) == len(places)
            assert not set(FAMILIES[family].tied_names(task, tied=True)) & set(names)


@pytest.mark.slow
@pytest.mark.parametrize("family", OF_TRANSFORMERS)
def test_tensors_there_and_back_are_the_identity(family):
    for task in FAMILIES[family].heads:
        model = lsg_flax.Model(config_of(family), task)
        leaves = flax.traverse_util.flatten_dict(model.abstract_params(), sep="/")
        drawn = np.random.default_rng(0)
        params = flax.traverse_util.unflatten_dict(
            {k: jnp.asarray(drawn.standard_normal(v.shape), v.dtype) for k, v in leaves.items()},
            sep="/",
        )
        again = params_from_torch(params_to_torch(params, model), model)
        jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("family", OF_TRANSFORMERS)
def test_config_json_keeps_the_names_of_the_family(family):
    names = DIALECTS[family].names if family in DIALECTS else {}
    rates = {"classifier_dropout": 0.25, "hidden_dropout_prob": 0.3}
    rates = {name: rate for name, rate in rates.items() if name not in DIALECTS[family].absent}
    config = config_of(family, **rates)
    written = config.to_dict() | {"of_someone_else": [1]}
    assert set(names.values()) <= set(written) and not set(names) & set(written)
    again = read_config(written)
    assert again.other("of_someone_else", None) == [1]
    rate = again.dropout if has_two_stacks(family) else again.hidden_dropout_prob
    assert (again.classifier_dropout, rate) == (rates.get("classifier_dropout"), 0.3)
    assert again.to_dict() == written


@pytest.mark.parametrize(
    ("family", "task"), [("distilbert", "pretraining"), ("albert", "causal_lm")]
)
def test_a_head_that_the_family_lacks(family, task):
    with pytest.raises(
        ValueError, match=f"unknown for {family}; it has base, .*question_answering"
    ):
        lsg_flax.Model(config_of(family), task).init(jax.random.key(0), np.zeros((1, 2), np.int32))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("roberta", {"position_embedding_type": "relative_key_query"}),
        ("roberta", {"position_embedding_type": None}),  # no positions at all
        ("distilbert", {"pruned_heads": {"0": [1]}}),
        ("albert", {"num_hidden_layers": 3, "num_hidden_groups": 2}),
    ],
)
def test_fields_that_change_the_computation_are_refused_by_name(family, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        config_of(family, **fields)


@pytest.mark.parametrize(
    "fields",
    [{"summary_type": "cls_index"}, {"summary_use_proj": None}, {"summary_proj_to_labels": True}],
)
def test_what_one_head_reads_is_refused_for_that_head(fields):
    config, name = config_of("electra", **fields), next(iter(fields))
    lsg_flax.Model(config, "token_classification").abstract_params()
    with pytest.raises(ValueError, match=f"{name}=.* changes what multiple choice computes"):
        lsg_flax.Model(config, "multiple_choice").abstract_params()


def test_integers_stand_for_floats():
    rate = config_of("albert", hidden_dropout_prob=0).hidden_dropout_prob
    assert rate == 0 and isinstance(rate, float)


@pytest.mark.parametrize("family", ["roberta", "camembert"])
def test_positions_are_counted_behind_the_padding(family):
    model, params = made(family)
    ids = np.array([[5, 6, 7, 8, 1, 1], [1, 1, 5, 6, 7, 8]])
    given = np.array([[2, 3, 4, 5, 1, 1], [1, 1, 2, 3, 4, 5]])
    apply = jax.jit(model.apply)
    ours = apply({"params": params}, ids, ids != 1).last_hidden_state
    explicit = apply({"params": params}, ids, ids != 1, position_ids=given).last_hidden_state
    np.testing.assert_array_equal(ours, explicit)
    np.testing.assert_allclose(ours[0, :4], ours[1, 2:], atol=1e-5)  # so padding moves nothing
    words = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    embeds = apply({"params": params}, inputs_embeds=words[ids[:1, :4]]).last_hidden_state
    np.testing.assert_allclose(embeds[0], ours[0, :4], atol=1e-5)


def test_a_text_may_not_use_the_rows_in_front_of_the_positions():
    model, params = made("roberta")
    with pytest.raises(ValueError, match="39 tokens are more than the 38 positions"):
        model.apply({"params": params}, np.full((1, 39), 5))
    lengths = {
        pad: lsg_flax.Model(config_of("roberta", pad_token_id=pad)).max_length for pad in (0, 5)
    }
    assert lengths == {0: 38, 5: 34}
    with pytest.raises(ValueError, match="pad_token_id=-2 puts the first token at position -1"):
        lsg_flax.Model(config_of("roberta", pad_token_id=-2)).abstract_params()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "electra"])
def test_cached_decoding_of_a_family_equals_the_uncached_one(family):
    """Left padding, over two blocks: positions behind the padding, projected embeddings."""
    lsg = LSGConfig(block_size=4, sparse_block_size=4)
    model, params = made(family, "causal_lm", lsg, is_decoder=True)
    pad = model.config.pad_token_id
    ids = np.array([[pad, pad, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
    tokens = generate(model, params, ids, ids != pad, max_new_tokens=20, bucket=8)
    assert tokens.shape == (2, 26)
    mask = np.concatenate([ids != pad, np.ones((2, 20), bool)], axis=1)
    logits = jax.jit(model.apply)({"params": params}, tokens, mask).logits
    np.testing.assert_array_equal(jnp.argmax(logits, -1)[:, 5:-1], tokens[:, 6:])


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "inner"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_groups_share_parameters(groups, inner):
    layers = {"num_hidden_layers": 4, "num_hidden_groups": groups, "inner_group_num": inner}
    model, params = made("albert", **layers)
    stacked = {leaf.shape[:2] for leaf in jax.tree.leaves(params["encoder"]["layers"])}
    assert stacked == {(groups, inner)}
    ids = np.arange(5, 15)[None]
    out = jax.jit(functools.partial(model.apply, output_hidden_states=True))(
        {"params": params}, ids
    )
    assert len(out.hidden_states) == 5
    # The same model with every layer's parameters written out.
    config = model.config.with_overrides(
        num_hidden_groups=4 * inner, num_hidden_layers=4 * inner, inner_group_num=1
    )
    unrolled = jax.tree.map(lambda x: x, params)
    unrolled["encoder"]["layers"] = jax.tree.map(
        lambda leaf: leaf.repeat(4 // groups, axis=0).reshape(4 * inner, 1, *leaf.shape[2:]),
        params["encoder"]["layers"],
    )
    plain = jax.jit(lsg_flax.Model(config).apply)({"params": unrolled}, ids)
    np.testing.assert_allclose(plain.last_hidden_state, out.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("length", [513, 1024, 4100])
def test_conversion_gives_every_position_a_row(length):
    """Where the reference's tables come out two rows short (docs/design.md)."""
    model, params = made("roberta", max_position_embeddings=514)
    options = LSGOptions(max_sequence_length=length, use_token_ids=True)
    new, config = to_lsg(
        params, model.config, options, lsg=LSGConfig(), bos_token_id=0, mask_token_id=4
    )
    tables = new["encoder"]["embeddings"]
    rows = tables["position_embeddings"]["embedding"]
    assert rows.shape[0] == config.max_position_embeddings == length + 2
    old = params["encoder"]["embeddings"]["position_embeddings"]["embedding"]
    np.testing.assert_array_equal(rows[:514], old[: min(514, length + 2)])
    np.testing.assert_array_equal(rows[514:], old[2:][(np.arange(512, length)) % 512])
    words = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    got = tables["global_embeddings"]["embedding"]  # no segment, whatever use_token_ids says
    np.testing.assert_allclose(got[0], words[0] + old[2], atol=1e-6)


@pytest.mark.slow
def test_the_losses_of_pretraining():
    """ELECTRA's over real tokens only, ALBERT's two terms."""
    model, params = made("electra", "pretraining")
    ids, mask = np.full((2, 6), 5), np.array([[1] * 6, [1] * 3 + [0] * 3])
    labels = np.array([[0, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss, metrics = jax.jit(loss_fn, static_argnums=0)(model, params, batch)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, ids, mask).logits, np.float64)
    each = np.logaddexp(0, logits) - labels * logits
    np.testing.assert_allclose(loss, each[mask == 1].mean(), rtol=1e-5)
    assert metrics["targets"] == 9

    model, params = made("albert", "pretraining")
    batch = {"input_ids": ids, "labels": labels, "sentence_order_label": np.array([0, 1])}
    loss, _ = jax.jit(loss_fn, static_argnums=0)(model, params, batch)
    out = jax.jit(model.apply)({"params": params}, ids)

    def cross_entropy(logits, labels):
        logits = np.asarray(logits, np.float64)
        chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return (np.log(np.exp(logits).sum(-1)) - chosen).mean()

    expected = cross_entropy(out.prediction_logits, labels)
    expected += cross_entropy(out.sop_logits, np.array([0, 1]))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_config_files_of_published_checkpoints():
    """Fields as the hub has them, with what a reader must not trip over."""
    distilbert = json.loads(
        """{"activation": "gelu", "architectures": ["DistilBertForMaskedLM"],
        "attention_dropout": 0.1, "dim": 768, "dropout": 0.1, "hidden_dim": 3072,
        "initializer_range": 0.02, "max_position_embeddings": 512, "model_type": "distilbert",
        "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": false, "tie_weights_": true,
        "vocab_size": 30522}"""
    )
    config = EncoderConfig.from_dict(distilbert)
    assert (config.hidden_size, config.num_hidden_layers, config.type_vocab_size) == (768, 6, 0)
    albert = json.loads(
        """{"attention_probs_dropout_prob": 0, "classifier_dropout_prob": 0.1,
        "embedding_size": 128, "hidden_act": "gelu_new", "hidden_dropout_prob": 0,
        "hidden_size": 768, "initializer_range": 0.02, "inner_group_num": 1,
        "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "albert", "num_attention_heads": 12, "num_hidden_groups": 1,
        "num_hidden_layers": 12, "type_vocab_size": 2, "vocab_size": 30000}"""
    )
    config = EncoderConfig.from_dict(albert)
    assert (config.embedding_width, config.stack) == (128, (1, 1))


def test_the_table_in_docs_has_every_head():
    """`make families` measures and writes it."""
    rows = TABLE.read_text().splitlines()
    for family, task in HEADS:
        (row,) = (row for row in rows if row.startswith(f"| {family} | {task} |"))
        assert "failed" not in row, row
