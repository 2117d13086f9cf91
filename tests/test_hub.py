"""Files: every format and naming of checkpoints, what is refused and how, and saves that fail."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import sys
import warnings

import flax.traverse_util
import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden_data import GOLDEN

import lsg_flax
from lsg_flax import hub
from lsg_flax.convert_from_torch import params_from_torch, params_to_torch
from lsg_flax.hub import tokenizer_files
from lsg_flax.models import EncoderConfig

MASKED_LM = GOLDEN / "bert_masked_lm"
WORDS = "bert.embeddings.word_embeddings.weight"
DECODER, BIAS = "cls.predictions.decoder.weight", "cls.predictions.bias"
DECODER_BIAS = "cls.predictions.decoder.bias"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def flat(params) -> dict[str, jax.Array]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def assert_same(params, expected):
    params, expected = flat(params), flat(expected)
    assert params.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(params[path], leaf, err_msg=path)


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def original():
    """Model, params, tensors and config.json of an LSG masked language model."""
    model, params = lsg_flax.from_pretrained(MASKED_LM)
    tensors = safetensors.numpy.load_file(MASKED_LM / hub.WEIGHTS)
    return model, params, tensors, json.loads((MASKED_LM / hub.CONFIG).read_text())


@pytest.fixture
def unchecked():
    """Without the annotation checks of conftest.py, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def checkpoint(tmp_path, original):
    """Writes a checkpoint like the original but for some tensors (None: left out) and fields."""

    def write(changed=None, **fields) -> pathlib.Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        tensors = {k: v for k, v in (original[2] | (changed or {})).items() if v is not None}
        safetensors.numpy.save_file(tensors, folder / hub.WEIGHTS)
        (folder / hub.CONFIG).write_text(json.dumps(original[3] | fields))
        return folder

    return write


# ------------------------------------------------------------------------------ opened checkpoints


@pytest.mark.parametrize(
    ("architectures", "names", "head"),
    [
        ("LSGBertForMaskedLM", ("LSGBertForMaskedLM",), "masked_lm"),
        (["BertForTokenClassification", "BertModel"], None, "token_classification"),
        ([], (), "base"),
        (None, (), "base"),
        ("BertForRanking", ("BertForRanking",), None),
    ],
)
def test_classes_are_a_list_or_one_name(checkpoint, architectures, names, head):
    opened = hub.open_checkpoint(checkpoint(architectures=architectures))
    assert opened.architectures == (tuple(architectures) if names is None else names)
    assert opened.head == head
    if head:
        assert opened.task == head
        return
    with pytest.raises(ValueError, match=r"\['BertForRanking'\] in config.json is none of"):
        _ = opened.task
    assert opened.load("masked_lm")[0].task == "masked_lm"


def test_a_config_is_opened_without_weights(checkpoint, original):
    folder = checkpoint()
    (folder / hub.WEIGHTS).unlink()
    by_folder, by_file = (hub.open_checkpoint(p) for p in (folder, folder / hub.CONFIG))
    assert by_folder.config == by_file.config and by_file.task == "masked_lm"
    assert by_folder.config_for("masked_lm") == original[0].config
    assert by_folder.tokenizer is None
    (folder / "weights").touch()
    for path in (folder / "weights", folder / "other.json"):
        with pytest.raises(FileNotFoundError, match="is not a folder; give the folder that holds"):
            hub.open_checkpoint(path)


def test_a_transformer_inside_the_folder_is_found(checkpoint, original, tmp_path):
    checkpoint().rename(tmp_path / "0_Transformer")
    listed = [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    assert hub.open_checkpoint(tmp_path).folder == tmp_path / "0_Transformer"
    assert_same(lsg_flax.from_pretrained(tmp_path)[1], original[1])


# ----------------------------------------------------------------------------- formats and names


def test_shards_are_the_same_model(checkpoint, original):
    folder = checkpoint()
    tensors = safetensors.numpy.load_file(folder / hub.WEIGHTS)
    (folder / hub.WEIGHTS).unlink()
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        part = {n: t for n, t in tensors.items() if places[n] == shard}
        safetensors.numpy.save_file(part, folder / shard)
    (folder / hub.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(lsg_flax.from_pretrained(folder)[1], original[1])
    lost = places | {"nowhere.weight": "model-0.safetensors"}
    (folder / hub.INDEX).write_text(json.dumps({"weight_map": lost}))
    with pytest.raises(ValueError, match=r"shards do not have: \['nowhere.weight'\]"):
        lsg_flax.from_pretrained(folder)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lists the shard model-1"):
        lsg_flax.from_pretrained(folder)


def test_a_pickle_without_torch_says_what_to_install(checkpoint, monkeypatch):
    folder = checkpoint()
    (folder / hub.WEIGHTS).rename(folder / hub.BIN)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs torch: pip install 'lsg-flax\[torch\]'"):
        lsg_flax.from_pretrained(folder)


def test_old_names_of_layer_norms(checkpoint, original):
    old = {
        name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )
        for name in original[2]
    }
    renamed = dict.fromkeys(old) | {old[n]: t for n, t in original[2].items()}
    folder = checkpoint(renamed)
    stored = safetensors.numpy.load_file(folder / hub.WEIGHTS)
    assert sum(name.endswith(("gamma", "beta")) for name in stored) >= 10
    assert_same(lsg_flax.from_pretrained(folder)[1], original[1])


@pytest.mark.parametrize("present", [(), (DECODER,), (DECODER, DECODER_BIAS)])
def test_tied_weights_may_be_there_or_not(checkpoint, original, present):
    tied = {DECODER: original[2][WORDS].copy(), DECODER_BIAS: original[2][BIAS].copy()}
    folder = checkpoint({name: tied[name] if name in present else None for name in tied})
    assert_same(lsg_flax.from_pretrained(folder)[1], original[1])


@pytest.mark.parametrize(("name", "source"), [(DECODER, WORDS), (DECODER_BIAS, BIAS)])
def test_tied_weights_that_differ_are_refused(checkpoint, original, name, source):
    folder = checkpoint({name: original[2][source] + 1})
    with pytest.raises(ValueError, match=f"{name} differs from {source}.*tie_word_embeddings"):
        lsg_flax.from_pretrained(folder)


def test_a_tokenizer_is_an_object_not_a_name(original, unchecked, tmp_path):
    with pytest.raises(TypeError, match="tokenizer='areas' is a name; give a tokenizer object"):
        lsg_flax.save_pretrained(tmp_path / "new", *original[:2], "areas")
    assert not list(tmp_path.iterdir())


def test_an_own_decoder_is_read_used_and_written(checkpoint, original, tmp_path):
    own = original[2][WORDS] + 1
    model, params = lsg_flax.from_pretrained(checkpoint({DECODER: own}, tie_word_embeddings=False))
    np.testing.assert_array_equal(params["head"]["kernel"], own.T)
    ids = jnp.arange(5)[None]
    tied, untied = (
        jax.jit(m.apply)({"params": p}, ids).logits for m, p in (original[:2], (model, params))
    )
    assert np.abs(tied - untied).max() > 0.1
    lsg_flax.save_pretrained(tmp_path / "again", model, params)
    assert_same(lsg_flax.from_pretrained(tmp_path / "again")[1], params)


def test_buffers_are_ignored_by_name(checkpoint, original):
    buffers = {"bert.embeddings.position_ids": np.arange(64)[None], BIAS: original[2][BIAS]}
    assert_same(lsg_flax.from_pretrained(checkpoint(buffers))[1], original[1])
    with pytest.raises(ValueError, match=r"\+ bert.embeddings.other_ids"):
        lsg_flax.from_pretrained(checkpoint({"bert.embeddings.other_ids": np.arange(3)}))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_checkpoints(checkpoint, original, dtype, tmp_path):
    folder = checkpoint({name: t.astype(dtype) for name, t in original[2].items()})
    _, params = lsg_flax.from_pretrained(folder)
    expected = {
        path: leaf.astype(dtype).astype(jnp.float32) for path, leaf in flat(original[1]).items()
    }
    assert_same(params, flax.traverse_util.unflatten_dict(expected, sep="/"))
    model, params = lsg_flax.from_pretrained(folder, param_dtype=dtype)
    assert {leaf.dtype for leaf in flat(params).values()} == {np.dtype(dtype)}
    lsg_flax.save_pretrained(tmp_path / "again", model, params)
    stored = safetensors.numpy.load_file(tmp_path / "again" / hub.WEIGHTS)
    assert {t.dtype for t in stored.values()} == {np.dtype(dtype)}
    written = json.loads((tmp_path / "again" / hub.CONFIG).read_text())
    assert written["torch_dtype"] == np.dtype(dtype).name


def test_every_key_is_written_once_and_read_back(original):
    model, params, stored, _ = original
    tensors = params_to_torch(params, model)
    assert stored.keys() == tensors.keys() - {DECODER, DECODER_BIAS}
    np.testing.assert_array_equal(tensors[DECODER], tensors[WORDS])
    assert_same(params_from_torch(tensors, model), params)
    lost = flax.traverse_util.unflatten_dict(
        {k: v for k, v in flat(params).items() if k != "head/bias"}, sep="/"
    )
    with pytest.raises(ValueError, match=r"not those of this masked_lm model.*\['head/bias'\]"):
        params_to_torch(lost, model)
    with pytest.raises(ValueError, match=r'alone: variables\["params"\]'):
        params_to_torch({"params": params}, model)
    counts = jax.tree.map(lambda x: x.astype(jnp.int32), params)
    with pytest.raises(ValueError, match="has dtype int32, and no model would load it"):
        params_to_torch(counts, model)


def test_parameters_of_numpy_need_no_jit(original, unchecked):
    model, params, _, _ = original
    ids = np.arange(1, 9)[None]
    on_host = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(
        model.apply({"params": on_host}, ids).logits,
        model.apply({"params": params}, ids).logits,
        rtol=1e-5,
        atol=1e-6,
    )


# ------------------------------------------------------------------------------------- mismatches


def test_missing_and_unexpected_tensors_are_listed_on_two_sides(checkpoint, original):
    folder = checkpoint({QUERY: None, "bert.encoder.layer.0.extra": original[2][QUERY]})
    with pytest.raises(ValueError) as error:
        lsg_flax.from_pretrained(folder)
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "missing from the file: 1",
        f"  - {QUERY}",
        "in the file but not in the model: 1",
        "  + bert.encoder.layer.0.extra",
    ]


def test_an_lsg_checkpoint_called_plain_is_explained(checkpoint):
    folder = checkpoint(base_model_prefix="bert", architectures=["BertForMaskedLM"])
    with pytest.raises(ValueError, match='json needs "base_model_prefix": "lsg"'):
        lsg_flax.from_pretrained(folder)


def test_more_layers_than_stored_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"missing from the file: 16\n  - bert.encoder.layer.2"):
        lsg_flax.from_pretrained(checkpoint(num_hidden_layers=3))


def test_a_tensor_of_another_shape_names_both(checkpoint, original):
    folder = checkpoint({QUERY: np.zeros((12, 11), np.float32)})
    with pytest.raises(ValueError, match=rf"{QUERY} has shape \(12, 11\).*asks for \(12, 12\)"):
        lsg_flax.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"shape \(31, 12\), but config.json asks for \(32, 12\)"):
        lsg_flax.from_pretrained(MASKED_LM, vocab_size=32)


def test_a_missing_head_is_drawn_from_a_seed_with_one_warning():
    drawn = []
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            drawn.append(lsg_flax.from_pretrained(MASKED_LM, "sequence_classification")[1])
        (text,) = (str(warning.message) for warning in caught if warning.category is UserWarning)
    assert "drawn from seed 0: head/classifier/bias, head/classifier/kernel, pooler/dense" in text
    assert "of another head and not used: cls.predictions.bias" in text
    assert_same(*drawn)
    assert 0.005 < np.std(drawn[0]["head"]["classifier"]["kernel"]) < 0.05


@pytest.mark.filterwarnings("ignore:weights for task")
def test_question_answering_has_the_two_labels_that_pytorch_expects(tmp_path):
    source = GOLDEN / "bert_sequence_classification"
    assert lsg_flax.from_pretrained(source)[0].config.num_labels == 3
    model, params = lsg_flax.from_pretrained(source, "question_answering")
    lsg_flax.save_pretrained(tmp_path, model, params)
    assert len(json.loads((tmp_path / hub.CONFIG).read_text())["id2label"]) == 2


def test_a_complete_checkpoint_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsg_flax.from_pretrained(MASKED_LM)


# ---------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("kept", [0, 5, 100, -10])
def test_a_truncated_file_is_reported(checkpoint, kept):
    folder = checkpoint()
    data = (folder / hub.WEIGHTS).read_bytes()
    (folder / hub.WEIGHTS).write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        lsg_flax.from_pretrained(folder)


@pytest.mark.parametrize("text", ['{"model_type": "bert"', "", "\x00\x01"])
def test_a_corrupt_config_is_reported(checkpoint, text):
    folder = checkpoint()
    (folder / hub.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        lsg_flax.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "3", '"bert"', "null"])
def test_a_config_that_is_no_object_is_reported(checkpoint, text):
    folder = checkpoint()
    (folder / hub.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"config.json .*must contain an object"):
        lsg_flax.from_pretrained(folder)


def test_a_corrupt_index_is_reported(checkpoint):
    folder = checkpoint()
    (folder / hub.WEIGHTS).unlink()
    for text in ("{", "[]", "{}"):
        (folder / hub.INDEX).write_text(text)
        with pytest.raises(ValueError, match=r"index.json"):
            lsg_flax.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["gpt2", ["bert"], {}, 3])
def test_an_unknown_model_type_lists_the_supported(checkpoint, model_type, unchecked):
    with pytest.raises(ValueError, match=r"model_type=.*is not supported; supported are bert"):
        lsg_flax.from_pretrained(checkpoint(model_type=model_type))


@pytest.mark.parametrize(
    ("architectures", "model_type"),
    [
        (["BertForMaskedLM"], "bert"),
        (["LSGBertForPreTraining"], "bert"),
        ("BertLMHeadModel", "bert"),
        (["BertForRanking"], "bert"),
        (["LSGXLMRobertaModel"], "xlm-roberta"),
        (["RobertaForCausalLM"], "roberta"),
        (["Unknown", "CamembertForTokenClassification"], "camembert"),
        (["DistilBertModel"], "distilbert"),
        (["LSGAlbertForMaskedLM"], "albert"),
        (["ElectraForPreTraining"], "electra"),
    ],
)
@pytest.mark.parametrize("missing", [{}, {"model_type": None}])
def test_without_a_model_type_the_classes_say_it(tmp_path, architectures, model_type, missing):
    file = tmp_path / "config.json"
    narrow = {"embedding_size": 8, "num_attention_heads": 4} if model_type == "electra" else {}
    file.write_text(json.dumps({"architectures": architectures} | narrow | missing))
    opened = hub.open_checkpoint(file)
    assert opened.config.model_type == opened.values["model_type"] == model_type
    assert opened.config == EncoderConfig.from_dict(opened.values)


@pytest.mark.parametrize(
    "values",
    [{}, {"architectures": ["BertGenerationDecoder"]}, {"architectures": ["XLMRobertaXLModel"]}],
)
def test_a_config_that_says_nothing_of_its_family_is_read_by_a_given_one(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"config.json: there is no model_type, and arch.* or pass model_ty"
    ):
        hub.open_checkpoint(tmp_path)
    opened = hub.open_checkpoint(tmp_path, model_type="roberta")
    assert (opened.config.model_type, opened.config.vocab_size) == ("roberta", 50265)


def test_a_given_model_type_reaches_the_weights(checkpoint, original, tmp_path):
    folder = checkpoint(model_type=None, architectures=None)
    assert_same(lsg_flax.from_pretrained(folder, "masked_lm", model_type="bert")[1], original[1])
    with pytest.raises(ValueError, match="model_type='gpt2' is not supported"):
        lsg_flax.convert_checkpoint(folder, model_type="gpt2")


def test_a_folder_in_place_of_a_config(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config.json; it has \['config.json'\]"):
        hub.open_checkpoint(tmp_path)


# As the model cards of ccdv/lsg-* print them.
CARD_CALLS = [
    {},
    {
        "num_global_tokens": 16,
        "block_size": 64,
        "sparse_block_size": 64,
        "attention_probs_dropout_prob": 0.0,
        "sparsity_factor": 4,
        "sparsity_type": "none",
        "mask_first_token": True,
    },
    {"pass_global_tokens_to_decoder": True, "lsg_num_pre_rounds": 2},
]


@pytest.mark.parametrize("settings", CARD_CALLS)
def test_calls_of_the_model_cards_run_with_one_warning(checkpoint, settings):
    with pytest.warns(UserWarning, match=r"ignored: trust_remote_code \(") as told:
        model, _ = lsg_flax.from_pretrained(checkpoint(), trust_remote_code=True, **settings)
    (text,) = (str(warning.message) for warning in told if warning.category is UserWarning)
    for name, value in settings.items():
        if hasattr(model.config, name) or hasattr(model.config.lsg, name):
            assert getattr(model.config, name, getattr(model.config.lsg, name, None)) == value
        else:
            assert f"; {name} (" in text
    assert "lsg_num" not in settings or "called lsh_num_pre_rounds" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"torch_dtype": "auto"}, "torch_dtype='auto' is not a field of a config; write dtype=jnp"),
        ({"revision": "main"}, r"snapshot_download\(name, revision=...\), and give the folder"),
        ({"remat": "full"}, r"model = model.clone\(remat='full'\) after from_pretrained"),
        ({"implementation": "xla"}, r"model.clone\(implementation=...\)"),
        ({"gradient_checkpointing": True}, r"model.clone\(remat='full'\)"),
        ({"output_hidden_states": True}, r"model.apply\(.*, output_hidden_states=...\)"),
        ({"architecture": "BertForMaskedLM"}, "write task=, such as task='masked_lm'"),
        (
            {"num_labels": 3, "id2label": {0: "a"}},
            "num_labels=3 and id2label=.* contradict each other",
        ),
        ({"label2id": {"a": 0}}, "id2label alone, the names by their ids"),
        ({"labels": ("a",), "num_labels": 1}, "set the same thing: give one of them"),
        ({"nonsense": 1}, r"unknown config fields \['nonsense'\]"),
    ],
)
def test_habits_of_hugging_face_are_told_what_to_write(checkpoint, given, says):
    with pytest.raises(ValueError, match=says), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # num_labels beside id2label
        lsg_flax.from_pretrained(checkpoint(), **given)


def test_labels_may_be_given_as_hugging_face_does(checkpoint):
    names = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    assert lsg_flax.from_pretrained(checkpoint(), **names)[0].config.labels == ("no", "yes")


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
@pytest.mark.parametrize("dtype", [jnp.int32, bool, complex, "nope", object])
def test_types_that_are_no_real_numbers_are_refused(checkpoint, name, dtype, unchecked):
    with pytest.raises(ValueError, match=rf"^{name}=.* must be a floating-point dtype of JAX"):
        lsg_flax.from_pretrained(checkpoint(), **{name: dtype})


def test_unknown_classes_and_tasks_list_the_known(checkpoint, unchecked):
    folder = checkpoint(architectures=["LSGBertForRanking"])
    with pytest.raises(
        ValueError, match=r"LSGBertForRanking.*pass task=, one of base, .*masked_lm"
    ):
        lsg_flax.from_pretrained(folder)
    assert lsg_flax.from_pretrained(folder, "masked_lm")[0].task == "masked_lm"
    with pytest.raises(ValueError, match=r"task='ranking' is unknown for bert; it has base"):
        lsg_flax.from_pretrained(folder, "ranking")


def test_missing_files_say_what_is_there(checkpoint, tmp_path):
    folder = checkpoint()
    (folder / hub.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: none of model.safetensors"):
        lsg_flax.from_pretrained(folder)
    (folder / hub.CONFIG).rename(folder / "other.json")
    with pytest.raises(FileNotFoundError, match=r"has no config.json; it has \['other.json'\]"):
        lsg_flax.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="is not a folder; give the folder that holds"):
        lsg_flax.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_names_the_parameters_that_are_not_finite(checkpoint, original, value):
    broken = original[2][QUERY].copy()
    broken[0, 0] = value
    folder = checkpoint({QUERY: broken})
    lsg_flax.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"in 1 of \d+ param.*encoder/layers/attention/query/ker"):
        lsg_flax.from_pretrained(folder, check=True)


# ------------------------------------------------------------------------------------------ saves


def failing(function, at: int, error: BaseException):
    """`function`, until its call number `at`, which raises."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise error
        return function(*args, **kwargs)

    return wrapped


FULL_DISK = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "at", "error"),
    [
        (safetensors.numpy, "save_file", 1, FULL_DISK),
        (pathlib.Path, "write_text", 1, FULL_DISK),
        (os, "replace", 1, PermissionError(13, "denied")),
        (os, "replace", 2, FULL_DISK),
        (os, "replace", 2, KeyboardInterrupt()),
        (shutil, "copy2", 1, FULL_DISK),
    ],
)
def test_a_failed_save_leaves_the_old_files(
    tmp_path, monkeypatch, original, owner, name, at, error
):
    model, params, _, _ = original
    folder = tmp_path / "saved"
    lsg_flax.save_pretrained(folder, model, params)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    other = jax.tree.map(lambda x: x + 1, params)
    if name == "copy2":  # a file system without hard links
        monkeypatch.setattr(os, "link", failing(os.link, 1, OSError(95, "not supported")))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, error))
        with pytest.raises(type(error)):
            lsg_flax.save_pretrained(folder, model.clone(task="masked_lm"), other)
    assert contents(folder) == before and not list(folder.glob(".lsg-flax*"))
    assert_same(lsg_flax.from_pretrained(folder)[1], params)
    lsg_flax.save_pretrained(folder, model, other)
    assert_same(lsg_flax.from_pretrained(folder)[1], other)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_first_save_leaves_nothing(tmp_path, monkeypatch, original):
    monkeypatch.setattr(safetensors.numpy, "save_file", failing(None, 1, FULL_DISK))
    with pytest.raises(OSError, match="No space"):
        lsg_flax.save_pretrained(tmp_path / "new", *original[:2])
    assert not (tmp_path / "new").exists()


def test_threads_import_transformers_once(tmp_path, monkeypatch):
    """Its module replaces itself at the end of its import, as this one does."""
    code = "import sys, time, types; time.sleep(0.3); new = types.ModuleType(__name__)"
    code += "; new.AutoTokenizer = 1; sys.modules[__name__] = new"
    (tmp_path / "transformers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: tokenizer_files._transformers(), range(4)))
    assert all(hasattr(module, "AutoTokenizer") for module in found)


def test_a_save_to_a_file_is_refused(tmp_path, original):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        lsg_flax.save_pretrained(tmp_path / "file", *original[:2])
    assert (tmp_path / "file").read_text() == "mine"


# ----------------------------------------------------------------------------------------- inputs

IDS = jnp.zeros((1, 6), jnp.int32)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"input_ids": IDS + 31}, r"input_ids are in 31..31, but vocab_size=31 allows 0..30"),
        ({"input_ids": IDS - 1}, r"input_ids are in -1..-1, but vocab_size=31"),
        ({"input_ids": IDS, "token_type_ids": IDS + 2}, "type_vocab_size=2 allows 0..1"),
        (
            {"input_ids": IDS, "position_ids": IDS + 64},
            r"position_ids are in 64..64, but max_position_embeddings=64.*convert_checkpoint",
        ),
        (
            {"input_ids": jnp.zeros((1, 65), jnp.int32)},
            r"65 tokens are more than the 64 positions .*=64.*convert_checkpoint\(.*=65, resi",
        ),
        ({"input_ids": IDS[0]}, r"must be \[batch, tokens\], got a leading shape \(6,\)"),
        ({"input_ids": IDS * 1.0}, "input_ids has dtype float32; they must be integers"),
        (
            {"input_ids": IDS, "attention_mask": IDS[:, :5]},
            r"attention_mask has shape \(1, 5\), but the inputs are .* = \(1, 6\)",
        ),
        ({"input_ids": IDS, "attention_mask": IDS * 1.0}, "attention_mask has dtype float32"),
        (
            {"input_ids": IDS, "attention_mask": jnp.arange(6)[None] - 2},
            "attention_mask has the values -2, -1, 2, 3; give 1 for real tokens and 0 for padding",
        ),
        ({"input_ids": IDS[:, :0]}, r"\[batch, tokens\] = \(1, 0\); there must be at least one"),
        ({"input_ids": IDS[:0]}, r"\(0, 6\); there must be at least one of each"),
        (
            {"inputs_embeds": jnp.zeros((1, 6, 12), int)},
            "inputs_embeds has dtype int32; give float",
        ),
        ({"input_ids": [[1, 2]]}, "input_ids is a list; give a numpy or JAX array"),
        ({}, "either input_ids or inputs_embeds, got 0"),
        ({"input_ids": IDS, "inputs_embeds": jnp.zeros((1, 6, 12))}, "got 2 of the two"),
        ({"inputs_embeds": jnp.zeros((1, 6, 13))}, r"\(1, 6, 13\) must end in hidden_size=12"),
        ({"input_ids": IDS, "output_attentions": True}, "output_attentions=True is not supported"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_early(original, inputs, says):
    model, params = original[:2]
    with pytest.raises(ValueError, match=says):
        model.apply({"params": params}, **inputs)


@pytest.mark.parametrize("wrong", [999, -1])
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_under_jit_an_id_outside_its_table_gives_nan(original, name, wrong):
    """Values cannot be read there; a silent last row would be worse."""
    model, params = original[:2]
    run = jax.jit(lambda x: model.apply({"params": params}, **({"input_ids": IDS} | {name: x})))
    good, bad = (
        run(jnp.full((1, 6), value, jnp.int32).at[0, 1:].set(0)).logits for value in (1, wrong)
    )
    assert bool(jnp.isfinite(good).all()) and bool(jnp.isnan(bad[0, 0]).all())


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
def test_under_jit_a_row_whose_mask_is_none_gives_nan(original, name):
    """Such as an additive one, which would hide what it should show."""
    model, params = original[:2]
    ids, embeds = jnp.tile(IDS, (2, 1)), jnp.ones((2, 6, 12))
    inputs = {name: ids if name == "input_ids" else embeds}
    run = jax.jit(lambda mask: model.apply({"params": params}, attention_mask=mask, **inputs))
    mask = jnp.array([[1] * 6, [0] * 5 + [-10000]])
    logits = run(mask).logits
    assert bool(jnp.isfinite(logits[0]).all()) and bool(jnp.isnan(logits[1]).all())
    if name == "input_ids":  # what is told by a number under 0, of ids that have none
        inputs[name] = ids.astype(jnp.uint8)
        assert bool(jnp.isnan(run(jnp.where(mask < 0, 2, mask)).logits[1]).all())
    real = run(jnp.ones((2, 6), bool)).logits
    np.testing.assert_allclose(logits[:1], real[:1], rtol=1e-5, atol=1e-5)


def test_a_tokenizer_is_saved_beside_the_model(tmp_path, original):
    tokenizer = hub.read_tokenizer(GOLDEN / "bert_to_convert_512")
    lsg_flax.save_pretrained(tmp_path, *original[:2], tokenizer=tokenizer)
    again = hub.read_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() and again.mask_token_id == 4
    assert hub.read_tokenizer(MASKED_LM) is None


def test_dense_models_may_be_built_without_files():
    config = EncoderConfig.from_dict(json.loads((MASKED_LM / hub.CONFIG).read_text()))
    values = hub.config_values(lsg_flax.Model(config, "token_classification"))
    assert values["architectures"] == ["LSGBertForTokenClassification"]
    assert "auto_map" not in values  # no code is beside it


@pytest.mark.filterwarnings("ignore:weights for task")
def test_conversion_draws_a_head_for_the_labels_it_is_given():
    labels = ("one", "two", "three")
    model, params = lsg_flax.convert_checkpoint(
        GOLDEN / "bert_to_convert_512", task="sequence_classification", labels=labels
    )
    assert model.config.labels == labels
    assert params["head"]["classifier"]["kernel"].shape[-1] == 3
