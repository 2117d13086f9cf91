"""What files of weights may look like: other names, ties, heads of another size, what is beside the
model, other formats, and what is refused by name."""

import functools
import json
import pathlib
import shutil
import warnings

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden_data import GOLDEN
from tiny_config import OF_TRANSFORMERS, SIZES, spelled

import lsg_flax
from lsg_flax import LSGConfig, convert_from_torch, hub
from lsg_flax.convert_from_torch import params_from_torch, params_to_torch
from lsg_flax.models import FAMILIES, read_config

CLASSIFIER = GOLDEN / "bert_sequence_classification"  # 3 labels
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def flat(params) -> dict:
    return flax.traverse_util.flatten_dict(params, sep="/")


def assert_same(params, expected, *, but: tuple[str, ...] = ()):
    params, expected = flat(params), flat(expected)
    assert params.keys() == expected.keys()
    for path in expected.keys() - {*but}:
        np.testing.assert_array_equal(params[path], expected[path], err_msg=path)


@functools.cache
def made(family: str, task: str, lsg: LSGConfig | None = None, **fields):
    """A model with random parameters, and its tensors by PyTorch's names."""
    config = read_config(spelled(family, SIZES)).with_overrides(lsg=lsg, **fields)
    config = config.with_overrides(**FAMILIES[family].head(task).task.fixed)
    model, drawn = lsg_flax.Model(config, task), np.random.default_rng(0)
    params = {
        path: jnp.asarray(drawn.standard_normal(leaf.shape), jnp.float32)
        for path, leaf in flat(model.abstract_params()).items()
    }
    params = flax.traverse_util.unflatten_dict(params, sep="/")
    return model, params, params_to_torch(params, model)


@pytest.fixture(scope="module")
def classifier():
    """Model, parameters, tensors and config.json of a plain classifier."""
    model, params, tensors = made("bert", "sequence_classification", labels=("a", "b", "c"))
    return model, params, tensors, hub.config_values(model)


@pytest.fixture
def folder(tmp_path, classifier):
    """Writes the classifier but for some tensors (None: left out) and fields of its config."""

    def write(changed=None, tensors=None, **fields) -> pathlib.Path:
        tensors = (classifier[2] if tensors is None else tensors) | (changed or {})
        tensors = {name: t for name, t in tensors.items() if t is not None}
        safetensors.numpy.save_file(tensors, tmp_path / hub.WEIGHTS)
        (tmp_path / hub.CONFIG).write_text(json.dumps(classifier[3] | fields))
        return tmp_path

    return write


# ------------------------------------------------------------------------------------------- names

WRAPPERS = ("module.", "_orig_mod.", "model.", "auto_model.", "module.model.", "0.auto_model.")
WRAPPERS += ("module._orig_mod.", "state_dict.model.", "model_state_dict.")


@pytest.mark.parametrize("around", WRAPPERS)
@pytest.mark.parametrize("task", ["sequence_classification", "base"])
def test_what_training_put_around_the_model_is_left_out_and_said(around, task):
    model, params, tensors = made("bert", task)
    with pytest.warns(UserWarning, match=r"read without the beginning '.*\.' of their names") as c:
        read = params_from_torch({around + name: t for name, t in tensors.items()}, model)
    assert len(c) == 1
    assert_same(read, params)


def test_torchs_own_parts_of_names_may_stand_anywhere(classifier):
    model, params, tensors, _ = classifier
    renamed = {n.replace("bert.encoder.", "bert.encoder._orig_mod."): t for n, t in tensors.items()}
    with pytest.warns(UserWarning, match="'_orig_mod.'"):
        assert_same(params_from_torch(renamed, model), params)


def test_two_tensors_of_one_name_must_be_equal(folder, classifier):
    twice = folder({f"model.{QUERY}": classifier[2][QUERY].copy()})
    with pytest.warns(UserWarning, match="'model.'"):
        assert_same(lsg_flax.from_pretrained(twice)[1], classifier[1])
    norm = "bert.embeddings.LayerNorm."
    for name in (f"model.{QUERY}", f"{norm}gamma"):
        changed = folder({name: np.zeros(12, np.float32)})
        with pytest.raises(ValueError, match=f"{name}.* and differ|both map to {norm}weight, and"):
            lsg_flax.from_pretrained(changed)


BESIDE = {
    "linear.weight": np.zeros((4, 12), np.float32),  # ColBERT
    "crf.transitions": np.zeros((3, 3), np.float32),
    "classifier.extra": np.zeros(3, np.int8),
    "cls.predictions.decoder.weight": np.zeros((23, 12), np.float32),
}


@pytest.mark.parametrize("task", ["base", None])
def test_what_the_task_does_not_read_is_named(folder, classifier, task):
    with pytest.warns(UserWarning) as caught:
        params = lsg_flax.from_pretrained(folder(BESIDE), task)[1]
    assert len(caught) == 1
    said = str(caught[0].message)
    assert all(name in said.split("of another head and not used: ")[1] for name in BESIDE)
    expected = {k: v for k, v in classifier[1].items() if task is None or k != "head"}
    assert_same(params, expected)


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.2.output.dense.bias",
        "bert.embeddings.global_embeddings.weight",
        "bert.embeddings.word_embedings.weight",
        "bert.other.weight",
    ],
)
@pytest.mark.parametrize("around", ["", "module."])
@pytest.mark.parametrize("task", ["sequence_classification", "base"])
def test_a_body_with_more_than_the_models_is_refused(classifier, name, around, task):
    model = classifier[0].clone(task=task)
    tensors = {around + n: t for n, t in (classifier[2] | {name: np.zeros(2)}).items()}
    with pytest.raises(ValueError, match=rf"not in the model: 1\n  \+ {around}{name}"):
        params_from_torch(tensors, model)


def test_a_body_under_another_name_is_listed_beside_the_missing(classifier):
    model, _, tensors, _ = classifier
    renamed = {n.replace("bert.", "camembert."): t for n, t in tensors.items()}
    with pytest.raises(
        ValueError, match=r"the file: 37\n  - bert(.|\n)*not in the model: 39\n  \+ came"
    ):
        params_from_torch(renamed, model)


# -------------------------------------------------------------------------------------------- ties

ENCODERS = [name for name in OF_TRANSFORMERS if "masked_lm" in FAMILIES[name].heads]
TIES = [
    (family, name, source)
    for family in ENCODERS
    for name, source in FAMILIES[family].tied_names("masked_lm", tied=True).items()
]


@pytest.mark.parametrize("lsg", [None, LSGConfig()])
@pytest.mark.parametrize(("family", "name", "source"), TIES)
def test_ties_hold_in_both_directions(family, name, source, lsg, monkeypatch):
    def pooler(model, paths, seed):  # instead of compiling one
        return {path: np.zeros((12,) * (1 + path.endswith("kernel"))) for path in paths}

    monkeypatch.setattr(convert_from_torch, "initial_leaves", pooler)
    model, params, tensors = made(family, "masked_lm", lsg)
    for stored in (name, source):
        one = {n: t for n, t in tensors.items() if n not in {name, source} - {stored}}
        assert_same(params_from_torch(one, model), params)
    if source.endswith("word_embeddings.weight"):  # also where the head is not read
        base, one = model.clone(task="base"), {n: t for n, t in tensors.items() if n != source}
        with pytest.warns(UserWarning, match="of another head"):
            read = params_from_torch(one, base)
        assert_same(read["encoder"], params["encoder"])
    differ = tensors | {name: tensors[name] + 1}
    with pytest.raises(ValueError, match=f"{name} differs from {source}"):
        params_from_torch(differ, model)


def test_an_own_decoder_is_no_word_table():
    model, params, tensors = made("roberta", "masked_lm", tie_word_embeddings=False)
    assert_same(params_from_torch(tensors, model), params)
    words = "roberta.embeddings.word_embeddings.weight"
    with pytest.raises(ValueError, match=f"missing from the file: 1\n  - {words}"):
        params_from_torch({n: t for n, t in tensors.items() if n != words}, model)


# ------------------------------------------------------------------------------ dtypes and shapes


@pytest.mark.parametrize(
    "dtype", ["int32", "int8", "uint8", "bool", "complex64", ml_dtypes.float8_e4m3fn]
)
def test_weights_are_floats(classifier, folder, dtype):
    broken = {QUERY: classifier[2][QUERY].astype(dtype)}
    says = rf"{QUERY} has dtype \w+, and weights must be plain tensors of float64, float32, float16"
    with pytest.raises(ValueError, match=says):
        params_from_torch(classifier[2] | broken, classifier[0])
    with pytest.raises(ValueError, match=says):
        lsg_flax.from_pretrained(folder(broken))


def test_doubles_are_read(classifier, folder):
    assert_same(
        lsg_flax.from_pretrained(folder({QUERY: classifier[2][QUERY].astype(np.float64)}))[1],
        classifier[1],
    )


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        (QUERY.replace("weight", "SCB"), "bitsandbytes"),
        (f"{QUERY}.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        (QUERY.replace("weight", "qweight"), "GPTQ"),
    ],
)
def test_quantised_weights_are_named(classifier, folder, name, tool):
    with pytest.raises(ValueError, match=rf"{name} belongs to weights that {tool}.* has quantised"):
        lsg_flax.from_pretrained(folder({name: np.zeros(3, np.float32)}))


HEAD = ("head/classifier/bias", "head/classifier/kernel")


def test_a_head_of_another_size_is_drawn_with_one_warning(folder, classifier):
    for path, overrides in ((folder(), {"num_labels": 5}), (CLASSIFIER, {"num_labels": 5})):
        with pytest.warns(UserWarning) as caught:
            model, params = lsg_flax.from_pretrained(path, **overrides)
        assert len(caught) == 1 and model.config.num_labels == 5
        said = str(caught[0].message)
        assert f"drawn from seed 0: {', '.join(HEAD)} (fine-tune" in said
        assert "in the file they are classifier.bias [3], wanted [5]; classifier.weight" in said
        assert params["head"]["classifier"]["kernel"].shape == (12, 5)
    wrong = folder(id2label={"0": "x", "1": "y"})
    with pytest.warns(UserWarning, match=r"classifier.weight \[3, 12\], wanted \[2, 12\]"):
        params = lsg_flax.from_pretrained(wrong)[1]
    assert_same(
        {k: v for k, v in params.items() if k != "head"},
        {k: v for k, v in classifier[1].items() if k != "head"},
    )


@pytest.mark.parametrize("shape", [(3,), (0, 12), (3, 12, 1)])
def test_a_head_without_the_right_axes_is_refused(folder, shape):
    broken = folder({"classifier.weight": np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=r"classifier.weight has shape .* asks for \(3, 12\)"):
        lsg_flax.from_pretrained(broken)


# ------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "{outside}", "", ".", "..", "a\0b", 1, None, "sub", "x" * 5000]
)
def test_an_index_names_files_of_its_own_folder_only(folder, tmp_path, place):
    path = folder()
    outside = tmp_path.parent / "x.safetensors"
    shutil.move(path / hub.WEIGHTS, outside)
    (path / "sub").mkdir()
    place = str(outside) if place == "{outside}" else place
    (path / hub.INDEX).write_text(json.dumps({"weight_map": {QUERY: place}}))
    with pytest.raises(FileNotFoundError, match=r"index.json lists the shard .*not there: shards"):
        lsg_flax.from_pretrained(path)


def test_links_of_the_hubs_cache_are_followed(folder, tmp_path, classifier):
    """The name in the index counts, not where a link of this name leads."""
    path, cache = folder(), tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1").mkdir(parents=True)
    index = {"weight_map": dict.fromkeys(classifier[2], "model-00001-of-00001.safetensors")}
    (path / hub.INDEX).write_text(json.dumps(index))
    names = {hub.WEIGHTS: "model-00001-of-00001.safetensors", hub.INDEX: None, hub.CONFIG: None}
    for number, (file, name) in enumerate(names.items()):
        shutil.move(path / file, cache / "blobs" / str(number))
        link = cache / "snapshots" / "1" / (name or file)
        link.symlink_to(f"../../blobs/{number}")
    assert_same(lsg_flax.from_pretrained(cache / "snapshots" / "1")[1], classifier[1])


@pytest.mark.parametrize(
    "name", [hub.CONFIG, hub.WEIGHTS, hub.INDEX, hub.BIN, "flax_model.msgpack"]
)
def test_a_pointer_of_git_lfs_is_called_one(folder, name):
    path = folder()
    (path / hub.WEIGHTS).unlink()
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438007864\n"
    (path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer.*run `git lfs pull`"):
        lsg_flax.from_pretrained(path)


def test_a_folder_without_weights_says_what_it_holds(folder):
    path = folder()
    (path / hub.WEIGHTS).unlink()
    (path / "tf_model.h5").touch()
    (path / hub.BIN).symlink_to("nowhere")
    there = r"\['config.json', 'pytorch_model.bin \(a link to nothing\)', 'tf_model.h5'\]"
    with pytest.raises(FileNotFoundError, match=rf"has no weights: none of .*; it has {there}"):
        lsg_flax.from_pretrained(path)


# -------------------------------------------------------------------------------------------- Flax


def as_flax(tensors: dict[str, np.ndarray]) -> dict:
    """The tree of Hugging Face's Flax class with these tensors, by the rules of transformers'
    modeling_flax_pytorch_utils.py: names are split, a weight is a kernel, embedding or scale."""
    leaves = {}
    for name, tensor in tensors.items():
        *module, end = name.split(".")
        if end == "weight" and tensor.ndim == 2 and "embeddings" in module[-1]:
            end = "embedding"
        elif end == "weight":
            end, tensor = ("kernel", tensor.T) if tensor.ndim == 2 else ("scale", tensor)
        leaves[(*module, end)] = np.ascontiguousarray(tensor)
    return flax.traverse_util.unflatten_dict(leaves)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("task", ["masked_lm", "sequence_classification"])
def test_weights_of_flax_classes_are_read(family, task, tmp_path):
    model, params, tensors = made(family, task)
    # A tied decoder is no parameter there.
    own = {n: t for n, t in tensors.items() if n not in FAMILIES[family].head(task).tied}
    tree = as_flax(own)
    (tmp_path / hub.CONFIG).write_text(json.dumps(hub.config_values(model)))
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    loaded, read = lsg_flax.from_pretrained(tmp_path)
    assert loaded.task == task
    assert_same(read, params)


def test_a_flax_class_of_hugging_face_computes_the_same():
    """Recorded by tests/reference/record_flax.py."""
    model, params = lsg_flax.from_pretrained(GOLDEN / "albert_plain_flax")
    with np.load(GOLDEN / "albert_plain_flax" / "outputs.npz") as recorded:
        ours = jax.jit(model.apply)({"params": params}, recorded["input_ids"])
        for name in ("prediction_logits", "sop_logits"):
            np.testing.assert_allclose(getattr(ours, name), recorded[name], atol=1e-5)


def test_the_tree_of_flax_bert_in_bfloat16(tmp_path):
    """A few names as they stand in modeling_flax_bert.py."""
    model, params, tensors = made("bert", "masked_lm")
    tree = as_flax({n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()})
    assert tree["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"].keys() == {
        "kernel",
        "bias",
    }
    assert tree["bert"]["embeddings"]["word_embeddings"]["embedding"].shape == (23, 12)
    assert tree["cls"]["predictions"]["transform"]["LayerNorm"].keys() == {"scale", "bias"}
    (tmp_path / hub.CONFIG).write_text(json.dumps(hub.config_values(model)))
    (tmp_path / "flax_model.msgpack").write_bytes(
        flax.serialization.msgpack_serialize({"params": tree})
    )
    with pytest.warns(UserWarning, match="'params.'"):
        read = lsg_flax.from_pretrained(tmp_path)[1]
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(flat(read)[path], leaf.astype(jnp.bfloat16), err_msg=path)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (b"", "is damaged or truncated"),
        (b"\xc1", "is damaged or truncated"),
        (b"\x81\xa1a" * 5000 + b"\x01", "is damaged or truncated"),
        ([1, 2], "is not a tree of parameters"),
        ({"a": np.zeros(2)[0]}, "is not a tree of parameters"),
        ({"a": {"kernel": np.zeros(2), "embedding": np.zeros(2)}}, "two tensors called a.weight"),
    ],
)
def test_a_msgpack_file_that_is_not_weights_is_refused(folder, tree, says):
    path = folder()
    (path / hub.WEIGHTS).unlink()
    written = tree if isinstance(tree, bytes) else flax.serialization.msgpack_serialize(tree)
    (path / "flax_model.msgpack").write_bytes(written)
    with pytest.raises(ValueError, match=rf"flax_model.msgpack (has )?{says}"):
        lsg_flax.from_pretrained(path)


def test_formats_have_an_order_and_flax_shards_are_refused(folder, classifier):
    path = folder()
    for name in ("flax_model.msgpack", "flax_model.msgpack.index.json"):
        (path / name).write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(lsg_flax.from_pretrained(path)[1], classifier[1])
    (path / hub.WEIGHTS).unlink()
    (path / "flax_model.msgpack").unlink()
    with pytest.raises(
        ValueError, match=r"index.json is the index of a Flax checkpoint in several files"
    ):
        lsg_flax.from_pretrained(path)
