"""A family and a task are records: one of each, made up here in one place, goes through the whole
library."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_run import PLAIN, write

import lsg_flax
from lsg_flax import hub, training
from lsg_flax.convert_from_torch import params_to_torch
from lsg_flax.hub.to_lsg import sinusoids
from lsg_flax.inference import predict
from lsg_flax.models import FAMILIES, TASKS, EncoderConfig, Model, Target, Task, ToLSG
from lsg_flax.models.architecture import Architecture
from lsg_flax.models.config_json import ABSENT, DIALECTS, REFUSED, Dialect, Groups
from lsg_flax.models.families import HeadTable, Row, bert, register
from lsg_flax.models.families.family import Key, PositionTable
from lsg_flax.models.heads import SequenceClassificationHead
from lsg_flax.models.layers import Context, Projection, project
from lsg_flax.models.layout import DENSE, GROUPED, NORM, TABLE, TRANSPOSED, Leaf
from lsg_flax.planning import PlanSettings
from lsg_flax.planning.program import abstract_batch
from lsg_flax.sharding import make_mesh, shardings_for

# ------------------------------------------------------------------- the tenth task, all of it
MOOD = Task(
    "mood",
    targets=(Target("logits", "labels", "class"),),
    scorer="classes",
    named_labels=True,
    examples="text",
)

# ------------------------------------------------------------------ the next family, all of it
GROUPED_WITHOUT_BIAS = (Leaf(".weight", "/kernels", GROUPED),)
DENSE_WITHOUT_BIAS = (Leaf(".weight", "/kernel", TRANSPOSED),)
TABLES = "encoder/embeddings"
MADE_UP = replace(
    bert.BERT,
    model_type="made-up",
    class_prefix="MadeUp",
    prefix="body",
    encoder=(
        Row("words", f"{TABLES}/word_embeddings", TABLE),
        Row("positions", f"{TABLES}/position_embeddings", TABLE),
        Row("globals", f"{TABLES}/global_embeddings", TABLE),
        Row("block.{0}.q", "encoder/layers/attention/query", GROUPED_WITHOUT_BIAS),
        Row("block.{0}.k", "encoder/layers/attention/key", DENSE_WITHOUT_BIAS),
        Row("block.{0}.v", "encoder/layers/attention/value", DENSE_WITHOUT_BIAS),
        Row("block.{0}.o", "encoder/layers/attention/output", DENSE_WITHOUT_BIAS),
        Row("block.{0}.norm1", "encoder/layers/attention_norm", NORM),
        Row("block.{0}.up", "encoder/layers/mlp_up", DENSE_WITHOUT_BIAS),
        Row("block.{0}.down", "encoder/layers/mlp_down", DENSE_WITHOUT_BIAS),
        Row("block.{0}.norm2", "encoder/layers/mlp_norm", NORM),
        Row("norm", "encoder/final_norm", NORM),
    ),
    pooler=(Row("pool", "pooler/dense", DENSE),),
    tables=(
        bert.BASE,
        HeadTable(MOOD, "ForMood", SequenceClassificationHead, bert.CLASSIFIER, pooled=True),
    ),
    to_lsg=ToLSG(
        (PositionTable(f"{TABLES}/position_embeddings/embedding", "sinusoid"),),
        f"{TABLES}/global_embeddings/embedding",
        f"{TABLES}/word_embeddings/embedding",
    ),
    dialect=Dialect(
        names={"hidden_size": "d_model"},
        absent=ABSENT | {"type_vocab_size": 0},
        others={"q_groups": int},
        groups={"q_groups": Groups(1, ("hidden_size",))},
        refused=REFUSED | {"rotary": (False, None)},
    ),
    architecture=Architecture(
        norm="pre",
        final_norm=True,
        embedding_norm=False,
        embedding_scale=True,
        biases=False,
        groups=(("query", "q_groups"),),
    ),
)

CONFIG = {
    "model_type": "made-up",
    "vocab_size": 31,
    "d_model": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-5,
    "id2label": {"0": "calm", "1": "cross"},
    "bos_token_id": 1,
    "mask_token_id": 2,
    "q_groups": 2,
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(MADE_UP)  # and its task
    yield
    del FAMILIES["made-up"], DIALECTS["made-up"], TASKS[MOOD.name]


@functools.cache
def made_up(task="mood"):
    model = Model(EncoderConfig.from_dict(CONFIG), task)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    return model, jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params
    )


IDS = np.random.default_rng(0).integers(3, 23, (3, 11))


def test_its_config_json_is_read_refused_and_written_as_the_dialect_says():
    config = EncoderConfig.from_dict(CONFIG)
    assert (config.hidden_size, config.type_vocab_size, config.labels) == (8, 0, ("calm", "cross"))
    assert EncoderConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["d_model"] == 8 and "type_vocab_size" not in config.to_dict()
    with pytest.raises(ValueError, match=r"rotary=True in config\.json changes"):
        EncoderConfig.from_dict(CONFIG | {"rotary": True})
    EncoderConfig.from_dict({"model_type": "distilbert", "position_embedding_type": "relative_key"})
    with pytest.raises(ValueError, match="position_embedding_type='relative_key'"):
        EncoderConfig.from_dict({"model_type": "bert", "position_embedding_type": "relative_key"})


def test_its_layers_compute_what_the_architecture_says():
    """Once more in numpy: pre-norm, scaled embeddings, no biases, a grouped query, a last norm."""
    model, params = made_up("base")
    body = jax.tree.map(np.asarray, params["encoder"])

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    tables = body["embeddings"]
    x = tables["word_embeddings"]["embedding"][IDS] * 8**0.5
    x = x + tables["position_embeddings"]["embedding"][: IDS.shape[1]]
    for number in range(2):
        layer = jax.tree.map(lambda p, n=number: p[n], body["layers"])
        y, attention = norm(x, layer["attention_norm"]), layer["attention"]
        halves = [
            y[..., :4] @ attention["query"]["kernels"][0],
            y[..., 4:] @ attention["query"]["kernels"][1],
        ]
        query = np.concatenate(halves, axis=-1)
        key, value = (y @ attention[name]["kernel"] for name in ("key", "value"))
        heads = [v.reshape(*v.shape[:2], 2, 4) for v in (query, key, value)]
        scores = np.einsum("btnh,bsnh->bnts", *heads[:2]) / 2
        weights = np.asarray(jax.nn.softmax(scores))
        context = np.einsum("bnts,bsnh->btnh", weights, heads[2]).reshape(x.shape)
        x = x + context @ attention["output"]["kernel"]
        wide = norm(x, layer["mlp_norm"]) @ layer["mlp_up"]["kernel"]
        x = x + np.asarray(jax.nn.gelu(wide, approximate=False)) @ layer["mlp_down"]["kernel"]
    expected = norm(x, body["final_norm"])
    found = jax.jit(model.apply)({"params": params}, IDS).last_hidden_state
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_its_checkpoint_goes_out_and_in(tmp_path):
    model, params = made_up()
    lsg_flax.save_pretrained(tmp_path, model, params)
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert stored["body.block.1.q.weight"].shape == (8, 4, 1)
    assert stored["classifier.weight"].shape == (2, 8)
    back, again = lsg_flax.from_pretrained(tmp_path)  # architectures: MadeUpForMood
    assert back.task == "mood"
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_it_becomes_lsg_by_its_own_rule(tmp_path):
    model, params = made_up()
    lsg_flax.save_pretrained(tmp_path, model, params)
    pattern = {"block_size": 4, "sparse_block_size": 4, "num_global_tokens": 1}
    longer, made = lsg_flax.convert_checkpoint(tmp_path, max_sequence_length=64, **pattern)
    tables = made["encoder"]["embeddings"]
    np.testing.assert_array_equal(tables["position_embeddings"]["embedding"], sinusoids(64, 8))
    assert np.isclose(sinusoids(64, 8)[3, 5], np.cos(3 / 10000 ** (2 * 1 / 8)))
    ids = np.random.default_rng(1).integers(3, 23, (1, 60))
    assert np.isfinite(longer.apply({"params": made}, ids).logits).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights for task")  # the head is drawn
def test_it_is_trained_scored_predicted_planned_and_sharded(tmp_path):
    """From files, by the task's name alone."""
    model, params = made_up("base")
    lsg_flax.save_pretrained(tmp_path / "model", model, params, hub.read_tokenizer(PLAIN))
    files = [write(tmp_path, "single_label_classification", name=n) for n in ("a.jsonl", "b.jsonl")]
    settings = training.Settings(
        model=str(tmp_path / "model"),
        task="mood",
        train_data=files[0],
        eval_data=files[1],
        output=str(tmp_path / "out"),
        cache=str(tmp_path / "cache"),
        steps=2,
        devices=1,
    )
    result = training.finetune(settings, progress=False)
    assert result.scores.keys() == {"eval_loss", "eval_accuracy", "eval_macro_f1"}
    back, params = lsg_flax.from_pretrained(tmp_path / "out")
    assert (back.task, back.config.labels) == ("mood", ("high", "low"))
    (found,) = predict(back, params, [{"input_ids": [5, 6, 7]}], progress=False)
    assert found["logits"].shape == (2,)
    plan = PlanSettings("unused", "cpu:8", task="mood", max_length=16, batch_size=4)
    assert abstract_batch(back, plan)["labels"].shape == (4,)
    shardings_for(params, make_mesh(fsdp=2, tensor=2, data=2))


def test_a_grouped_projection_is_one_with_zeros_between_the_groups():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 3, 8)), jnp.ones((2, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), kernel.shape)
    whole = jnp.zeros((8, 6)).at[:4, :3].set(kernel[0]).at[4:, 3:].set(kernel[1])
    config = EncoderConfig.from_dict(CONFIG)
    for reads, writes in (("btd", "btd"), ("btd", "bdt"), ("bdt", "btd")):
        part = Projection(Context(config, MADE_UP.architecture), 6, reads, writes, name="query")
        given = x if reads == "btd" else x.swapaxes(1, 2)
        found = part.apply({"params": {"kernels": kernel}}, given)
        np.testing.assert_allclose(
            found, project(given, whole, reads, writes), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("index", [np.s_[:, :, :], np.s_[1:, :2, 1:3], np.s_[:0, :, :]])
def test_a_part_of_a_grouped_kernel_is_read(index):
    kernel = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    stored = GROUPED.to_torch(kernel)
    assert stored.shape == GROUPED.torch_shape(kernel.shape) == (6, 4, 1)
    np.testing.assert_array_equal(GROUPED.read(stored, index, kernel.shape), kernel[index])


def test_records_that_cannot_be_are_refused(unchecked):
    with pytest.raises(ValueError, match="model_type='bert' is already that of Bert; give MadeUp"):
        register(replace(MADE_UP, model_type="bert"))
    with pytest.raises(ValueError, match="two heads for one task"):
        register(replace(MADE_UP, model_type="x", tables=(*MADE_UP.tables, MADE_UP.tables[-1])))
    nowhere = HeadTable(
        replace(MOOD, targets=(Target("logitz", "labels", "class"),)), "", bert.BASE
    )
    with pytest.raises(
        ValueError, match="output='logitz' of the task 'mood' is unknown; choose one of"
    ):
        register(replace(MADE_UP, model_type="x", tables=(nowhere,)))
    for field in ({"scorer": "acuracy"}, {"examples": "texd"}, {"input_rank": 7}):
        with pytest.raises(
            ValueError, match=f"{next(iter(field))}=.* of the task 'mood' is unknown"
        ):
            replace(MOOD, **field)
    with pytest.raises(
        ValueError, match="loss='clas' of the task 'mood' is unknown; choose one of"
    ):
        replace(MOOD, targets=(Target("logits", "labels", "clas"),))
    key = Key("body.norm.weight", "encoder/final_norm/scale", TRANSPOSED, None)
    with pytest.raises(
        ValueError, match=r"transposed layout, which stores 2 axes, but .* is \[8\]"
    ):
        key.torch_shape((8,))
    wrong = replace(
        MADE_UP, encoder=(*MADE_UP.encoder[:-1], Row("norm", "encoder/final_norm", DENSE))
    )
    FAMILIES["made-up"] = wrong
    try:
        model, params = made_up()
        with pytest.raises(
            ValueError, match=r"rows of made-up do not fit .* beside .*final_norm/kernel"
        ):
            params_to_torch(params, model)
    finally:
        FAMILIES["made-up"] = MADE_UP
