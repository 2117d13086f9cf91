"""Folders: what belongs to a model comes along byte for byte, nothing is written where it would do
harm, and config.json names only PyTorch code that is there."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
import types
import warnings

import flax.traverse_util
import pytest
import transformers
from golden_data import GOLDEN
from tiny_tokenizers import (
    FAMILIES,
    PAIR,
    TEXT,
    config_of_tokenizer,
    contents,
    tiny_model,
    write_source,
)

import lsg_flax
from lsg_flax import cli, hub
from lsg_flax.hub import Checkpoint
from lsg_flax.hub.beside import is_document
from lsg_flax.hub.json_text import with_field
from lsg_flax.hub.sentence_files import read_modules
from lsg_flax.locks import PlaceTaken, locked
from lsg_flax.pipelines import Embedder

BERT, LSG = GOLDEN / "bert_to_convert_512", GOLDEN / "bert_to_convert_lsg"
# What a conversion writes itself.
OWN = {hub.CONFIG, hub.WEIGHTS, "tokenizer_config.json", "README.md"}
CODE = "modeling_lsg_bert.py"
CLASSES = "class LSGBertConfig: ...\nclass LSGBertForMaskedLM(X): ...\nraise SystemExit('it ran')\n"


def ids(folder: pathlib.Path) -> list[int]:
    return hub.read_tokenizer(folder)(TEXT, PAIR)["input_ids"]


@pytest.fixture
def bert(tmp_path) -> pathlib.Path:
    return shutil.copytree(BERT, tmp_path / "bert")


@pytest.fixture
def converter(tmp_path, monkeypatch) -> pathlib.Path:
    """An lsg-converter that can be found, and must not be run; the folder of BERT's code."""
    folder = tmp_path / "site" / "lsg_converter" / "bert"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('it ran')")
    (folder / CODE).write_text(CLASSES)
    monkeypatch.syspath_prepend(folder.parent.parent)
    return folder


# ------------------------------------------------------------------------------ what comes along


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_conversion_carries_what_belongs_to_the_model(model_type, tmp_path):
    source = write_source(tmp_path / "source", model_type)
    for name in ("pytorch_model.bin", "tf_model.h5", "optimizer.pt", ".hidden", "own.py"):
        (source / name).write_bytes(b"none of ours")
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").write_text("{}")
    before = contents(source)
    lsg_flax.convert_checkpoint(source, tmp_path / "long", max_sequence_length=128)
    assert contents(source) == before
    found = contents(tmp_path / "long")
    assert found.pop("README.source.md") == before["README.md"]
    dropped = {"pytorch_model.bin", "tf_model.h5", "optimizer.pt", "own.py", "onnx/config.json"}
    assert found.keys() == (before.keys() - dropped) | OWN
    assert all(found[name] == before[name] for name in found.keys() - OWN)
    # transformers tells the class from config.json, if that is one that it knows.
    named = {"tokenizer_class": "SqueezeBertTokenizer"} if model_type == "squeezebert" else {}
    assert config_of_tokenizer(tmp_path / "long") == {"model_max_length": 128} | named
    assert ids(tmp_path / "long") == ids(source)


def test_of_a_tokenizers_config_one_number_changes(bert, tmp_path):
    text = '{"a" : 1e+30,\r\n"b":{"model_max_length":7},"model_max_length" :512 , "c":true}'
    (bert / "tokenizer_config.json").write_bytes(text.encode())
    (bert / "added_tokens.json").write_text("{}")
    lsg_flax.convert_checkpoint(bert, tmp_path / "long", max_sequence_length=4096)
    written = (tmp_path / "long" / "tokenizer_config.json").read_bytes().decode()
    assert written == text.replace(":512", ":4096")
    rest = contents(bert).keys() - OWN
    assert "added_tokens.json" in rest and "special_tokens_map.json" in rest
    assert all(contents(tmp_path / "long")[name] == contents(bert)[name] for name in rest)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("{}\n", '{"n": 9}\n'),
        ('{"n":1}', '{"n":9}'),
        ('{"n": 1, "n": [2, {"n": 3}]}', '{"n": 1, "n": 9}'),
        ('{"a": {"n": 1}, "ä\\"": "n"}', '{"n": 9,"a": {"n": 1}, "ä\\"": "n"}'),
        ('{\r\n  "a": 1e30\r\n}', '{\r\n  "n": 9,\r\n  "a": 1e30\r\n}'),
        ('\n{"a": [], "n"\t: null }', '\n{"a": [], "n"\t: 9 }'),
    ],
)
def test_a_field_changes_in_the_text(text, changed):
    assert with_field(text, "n", 9) == changed


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        *((n, True) for n in ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "label_map.json")),
        *((n, False) for n in ("corpus.txt", "notes.md", "train.json", "all_results.json")),
        *((n, True) for n in ("generation_config.json", "preprocessor_config.json")),
        *((n, False) for n in ("config.json", "modules.json", "sentence_bert_config.json")),
        *((n, False) for n in ("model.safetensors.index.json", "flax_model.msgpack.index.json")),
        *((n, False) for n in ("trainer_state.json", "adapter_config.json", ".gitattributes")),
        *((n, False) for n in ("training_args.bin", "a.py", "model.onnx", "data.parquet")),
        ("tokenizer.json", False),  # of the tokenizer
    ],
)
def test_which_documents_belong_to_a_model(name, belongs):
    assert is_document(name) == belongs


def test_the_readme_of_a_source_tells_of_its_conversion_only(tmp_path):
    source = write_source(tmp_path / "source", "roberta")
    opened = hub.open_checkpoint(source)
    lsg_flax.save_pretrained(tmp_path / "saved", *opened.load(), source=opened)
    assert {*contents(source)} - {*contents(tmp_path / "saved")} == {
        "README.md",
        *("vocab.json", "merges.txt"),  # no tokenizer was given
    }


def test_a_changed_tokenizer_is_written_anew(bert, tmp_path):
    tokenizer = hub.read_tokenizer(bert)
    tokenizer.add_tokens(["entirely"])
    lsg_flax.save_pretrained(tmp_path / "saved", *tiny_model("bert"), tokenizer)
    assert "entirely" in hub.read_tokenizer(tmp_path / "saved").get_vocab()


def test_a_changed_setting_is_no_other_tokenizer(bert, tmp_path):
    tokenizer = hub.read_tokenizer(bert)
    tokenizer.padding_side = "left"
    tokenizer(["w5 w6", "w7"], padding=True, truncation=True, max_length=2)  # leaves its traces
    lsg_flax.save_pretrained(tmp_path / "saved", *tiny_model("bert"), tokenizer)
    expected = config_of_tokenizer(bert) | {"padding_side": "left"}
    assert config_of_tokenizer(tmp_path / "saved") == expected
    names = ("tokenizer.json", "vocab.txt", "special_tokens_map.json")
    assert all((tmp_path / "saved" / n).read_bytes() == (bert / n).read_bytes() for n in names)


def test_a_tokenizer_whose_files_are_gone_is_written_anew(bert, tmp_path):
    tokenizer = hub.read_tokenizer(bert)
    shutil.rmtree(bert)
    lsg_flax.save_pretrained(tmp_path / "saved", *tiny_model("bert"), tokenizer)
    assert hub.read_tokenizer(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


def test_a_save_into_its_own_folder_keeps_the_tokenizer(bert):
    before = contents(bert)
    model, params = lsg_flax.from_pretrained(bert)
    lsg_flax.save_pretrained(bert, model, params, hub.read_tokenizer(bert))
    assert contents(bert).keys() == before.keys()
    rest = before.keys() - {hub.CONFIG, hub.WEIGHTS}
    assert all(contents(bert)[name] == before[name] for name in rest)


def test_an_embedder_carries_what_belongs_to_it(bert, tmp_path):
    (bert / "LICENSE").write_text("licence")
    (bert / "config_sentence_transformers.json").write_text('{"prompts":{"query":"q: "}}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Embedder.from_pretrained(bert, pooling="mean").save_pretrained(tmp_path / "saved")
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
    names += ("LICENSE", "config_sentence_transformers.json")
    assert all((tmp_path / "saved" / n).read_bytes() == (bert / n).read_bytes() for n in names)


DAMAGED = {
    "tokenizer.json": (
        "garbage",
        "cannot make a tokenizer \\(Expecting value.*download them again",
    ),
    "tokenizer_config.json": (
        "[]",
        "cannot make a tokenizer \\('list' object.*download them again",
    ),
    "vocab.txt": (None, "has tokenizer_config.json, but BertTokenizer also needs vocab.txt"),
}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n"
WITHOUT_WORDS = {
    "pointer": (POINTER, "vocab.txt is a git-lfs pointer, not the file itself"),
    "unknown": ("a\nb\n", "cannot make a tokenizer .*UNK.* token"),
}


@pytest.mark.parametrize("kind", WITHOUT_WORDS)
def test_a_vocabulary_that_makes_up_its_special_tokens_is_refused(bert, kind):
    """Their ids would be rows of the word table that stand for something else."""
    text, says = WITHOUT_WORDS[kind]
    (bert / "tokenizer.json").unlink()
    (bert / "vocab.txt").write_text(text)
    with pytest.raises(ValueError, match=says):
        hub.read_tokenizer(bert)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_names_its_files(bert, name):
    text, says = DAMAGED[name]
    if text is None:  # transformers 5 would make one that knows no words
        (bert / "tokenizer.json").unlink()
        (bert / name).unlink()
    else:
        (bert / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        hub.read_tokenizer(bert)


def test_a_panic_of_the_tokenizers_library_is_an_error(bert, monkeypatch):
    panic = type("PanicException", (BaseException,), {})
    for error, raised in (
        (panic("range end"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        reads = types.SimpleNamespace(from_pretrained=failing(error))
        monkeypatch.setattr(transformers, "AutoTokenizer", reads)
        with pytest.raises(raised):
            hub.read_tokenizer(bert)


def failing(error: BaseException):
    def raises(*_, **__):
        raise error

    return raises


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_a_sentencepiece_model_names_the_extra(missing, tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, missing, None)
    says = rf"spiece.model is a .* needs {missing}: pip install 'lsg-flax\[sentencepiece\]'"
    with pytest.raises(ImportError, match=says):
        hub.read_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------ PyTorch code


def converted(source, target, capsys, *flags) -> tuple[dict, str]:
    """config.json of a conversion by the command, and what it prints."""
    line = ["convert", str(source), str(target), "--max-sequence-length", "600", *flags]
    assert cli.main(line) == 0
    return json.loads((target / hub.CONFIG).read_text()), capsys.readouterr().out


def test_without_code_the_output_says_how_pytorch_loads_it(bert, tmp_path, capsys):
    values, out = converted(bert, tmp_path / "long", capsys)
    assert "auto_map" not in values
    says = f"LSGBertForMaskedLM.from_pretrained('{tmp_path / 'long'}') (pip install lsg-converter"
    assert f"from lsg_converter.bert.modeling_lsg_bert import {says.split('.')[0]}; {says}" in out


def test_the_code_of_an_lsg_source_comes_along_unrun(tmp_path, capsys, converter):
    source = shutil.copytree(LSG, tmp_path / "lsg")
    (source / CODE).write_text(CLASSES.replace("(X)", "(Y)"))
    values, out = converted(source, tmp_path / "long", capsys, "--resize-lsg")
    assert (tmp_path / "long" / CODE).read_text() == CLASSES.replace("(X)", "(Y)")
    assert values["auto_map"] == {  # the classes that the file has
        "AutoConfig": "modeling_lsg_bert.LSGBertConfig",
        "AutoModelForMaskedLM": "modeling_lsg_bert.LSGBertForMaskedLM",
    }
    assert f"AutoModelForMaskedLM.from_pretrained('{tmp_path / 'long'}', trust_remote" in out
    # and again from there, with nothing but the tokenizer to say where the code lies
    model, params = lsg_flax.from_pretrained(tmp_path / "long")
    tokenizer = hub.read_tokenizer(tmp_path / "long")
    lsg_flax.save_pretrained(tmp_path / "saved", model, params, tokenizer)
    assert (tmp_path / "saved" / CODE).exists()


def test_the_code_of_an_installed_converter_is_copied_unrun(bert, tmp_path, capsys, converter):
    values, _ = converted(bert, tmp_path / "long", capsys)
    assert (tmp_path / "long" / CODE).read_bytes() == (converter / CODE).read_bytes()
    assert values["auto_map"].keys() == {"AutoConfig", "AutoModelForMaskedLM"}
    assert values["tokenizer_class"] == "BertTokenizer"
    assert "lsg_converter" not in sys.modules


def test_only_plain_names_of_an_auto_map_are_carried(tmp_path):
    (tmp_path / "own.py").write_text("class Own: ...")
    auto_map = {"AutoModel": "own.Own", "AutoConfig": "../own.Own", "AutoTokenizer": ["own.Own"]}
    auto_map |= {"AutoModelForMaskedLM": "gone.Own", "AutoModelForPreTraining": "own.Other"}
    source = tmp_path / "source"
    lsg_flax.save_pretrained(source, *tiny_model("bert", auto_map=auto_map))
    assert "auto_map" not in json.loads((source / hub.CONFIG).read_text())
    values = json.loads((source / hub.CONFIG).read_text()) | {"auto_map": auto_map}
    (source / hub.CONFIG).write_text(json.dumps(values))
    (source / "own.py").write_text("class Own: ...")
    opened = hub.open_checkpoint(source)
    lsg_flax.save_pretrained(tmp_path / "saved", *opened.load(), source=opened)
    saved = json.loads((tmp_path / "saved" / hub.CONFIG).read_text())
    assert saved["auto_map"] == {"AutoModel": "own.Own"}
    assert (tmp_path / "saved" / "own.py").exists()


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        (BERT, "transformers.BertForMaskedLM.from_pretrained"),
        (LSG, "modeling_lsg_bert.py, which auto_map names, is not in the folder"),
    ],
)
def test_inspect_says_how_pytorch_loads_it(capsys, folder, says):
    assert cli.main(["inspect", str(folder)]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = [row for row in rows if len(row) == 2]
    start = next(i for i, row in enumerate(cells) if row[0].strip() == "in PyTorch")
    end = next(i for i, row in enumerate(cells) if i > start and row[0].strip())
    assert says in " ".join(row[1].strip() for row in cells[start:end])


# ------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("inside", ["", "new", "new/er"])
@pytest.mark.parametrize("linked", [False, True])
def test_nothing_is_written_into_the_source(bert, tmp_path, inside, linked):
    target = bert
    if linked:
        target = tmp_path / "link"
        target.symlink_to(bert, target_is_directory=True)
    before = contents(bert)
    with pytest.raises(ValueError, match="or inside it, where nothing is written"):
        lsg_flax.convert_checkpoint(bert, target / inside)
    assert contents(bert) == before and not (bert / "new").exists()


@pytest.mark.parametrize(
    "name", ["spiece.model", "added_tokens.json", "model.safetensors.index.json", "modules.json"]
)
def test_a_target_with_another_models_files_is_refused(bert, tmp_path, name):
    lsg_flax.convert_checkpoint(bert, tmp_path / "long", max_sequence_length=600)
    (tmp_path / "long" / "notes.txt").write_text("mine")
    lsg_flax.convert_checkpoint(bert, tmp_path / "long", max_sequence_length=700)
    (tmp_path / "long" / name).write_text("{}")
    before = contents(tmp_path / "long")
    with pytest.raises(ValueError, match=f"long has {name} of another model.*remove them, or"):
        lsg_flax.convert_checkpoint(bert, tmp_path / "long", max_sequence_length=800)
    assert contents(tmp_path / "long") == before


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_target_that_no_conversion_has_made_is_refused(bert, tmp_path, text):
    """Above all the source of another conversion, by a mix-up of the two folders."""
    target = shutil.copytree(bert, tmp_path / "other")
    if text is not None:
        (target / hub.CONFIG).write_text(text)
    before = contents(target)
    with pytest.raises(
        ValueError, match=r"other has a config\.json that no conversion has written"
    ):
        lsg_flax.convert_checkpoint(bert, target)
    assert contents(target) == before


@pytest.mark.parametrize("name", ["checkpoints/3/x", "best/config.json", "log/metrics.jsonl"])
def test_a_target_with_a_training_run_is_refused(bert, tmp_path, name, monkeypatch):
    """Even one whose model has LSG attention, and before weights are read."""
    target = tmp_path / "run"
    lsg_flax.convert_checkpoint(bert, target, max_sequence_length=600)
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("")
    before, found = contents(target), "log/metrics.jsonl" if "log" in name else name.split("/")[0]
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=rf"run has a training run \({found}\).*give another fold"):
        lsg_flax.convert_checkpoint(bert, target, max_sequence_length=700)
    assert contents(target) == before


@pytest.mark.parametrize("tensor", ["word_embeddings", "global_embeddings", "position_embeddings"])
def test_a_target_with_a_trained_model_is_refused(bert, tmp_path, tensor):
    """As a save from Python leaves it, even in the folder of an earlier conversion, whose card
    remains; an untrained one is replaced."""
    target = tmp_path / "long"
    model, params = lsg_flax.convert_checkpoint(bert, target, max_sequence_length=600)
    lsg_flax.save_pretrained(target, model, params)
    lsg_flax.convert_checkpoint(bert, target, max_sequence_length=1100)
    flat = flax.traverse_util.flatten_dict(params)
    changed = {k: v + 1 if any(tensor in part for part in k) else v for k, v in flat.items()}
    lsg_flax.save_pretrained(target, model, flax.traverse_util.unflatten_dict(changed))
    before = contents(target)
    says = f"long has a model that this conversion does not make.*differ, such as .*{tensor}"
    for length in (500, 600, 1100):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=says):
            warnings.simplefilter("ignore")  # 500 is shorter than the source
            lsg_flax.convert_checkpoint(bert, target, max_sequence_length=length)
        assert contents(target) == before


@pytest.mark.parametrize("name", ["README.source.md", "LICENSE", "vocab.txt", hub.WEIGHTS])
def test_a_conversion_replaces_nobodys_files(bert, tmp_path, name):
    for file in ("README.md", "LICENSE", "corpus.txt"):
        (bert / file).write_text("of the source")
    target = tmp_path / "long"
    target.mkdir()
    (target / name).write_text("mine")
    (target / "corpus.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"long has {name}, not written by a conversion of this"):
        lsg_flax.convert_checkpoint(bert, target, max_sequence_length=600)
    assert contents(target) == {name: b"mine", "corpus.txt": b"mine"}
    (target / name).unlink()
    for length in (600, 700):  # the second time what the first has written is replaced
        lsg_flax.convert_checkpoint(bert, target, max_sequence_length=length)
    assert contents(target)["corpus.txt"] == b"mine"


def test_a_save_keeps_what_somebody_has_written(bert, tmp_path):
    (bert / "LICENSE").write_text("of the source")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "LICENSE").write_text("mine")
    opened = hub.open_checkpoint(bert)
    says = pytest.warns(UserWarning, match="saved keeps its LICENSE, but the model that is saved")
    with says:
        lsg_flax.save_pretrained(tmp_path / "saved", *opened.load(), source=opened)
    with says, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="weights for task")
        Embedder.from_pretrained(bert, pooling="mean").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "LICENSE").read_text() == "mine"


def test_a_save_warns_of_another_models_files_and_loses_nothing(bert, tmp_path):
    saved, model = tmp_path / "saved", tiny_model("bert")
    lsg_flax.save_pretrained(saved, *model)
    (saved / "merges.txt").write_text("of a RoBERTa")
    lsg_flax.save_pretrained(saved, *model)  # says nothing of the tokenizer
    with pytest.warns(UserWarning, match=r"still has merges.txt of another model"):
        lsg_flax.save_pretrained(saved, *model, hub.read_tokenizer(bert))
    assert (saved / "merges.txt").read_text() == "of a RoBERTa"


def test_a_shorter_conversion_says_so(bert, tmp_path):
    with pytest.warns(UserWarning, match="length=100 is less than the 512 tokens that .*bert"):
        lsg_flax.convert_checkpoint(bert, tmp_path / "short", max_sequence_length=100)


@pytest.mark.filterwarnings("always:the 3 global tokens")  # the command shows it
def test_global_tokens_that_are_initialised_anew_are_said(tmp_path, capsys):
    """Those of an LSG source, unless they are kept, or asked for."""
    says = "3 global tokens of .* are initialised anew, .*lost: pass resize_lsg=True to keep them"
    with pytest.warns(UserWarning, match=says):
        _, anew = lsg_flax.convert_checkpoint(LSG, max_sequence_length=600, num_global_tokens=4)
    _, kept = lsg_flax.convert_checkpoint(LSG, max_sequence_length=600, resize_lsg=True)
    _, source = lsg_flax.from_pretrained(LSG)
    trees = [flax.traverse_util.flatten_dict(tree, sep="/") for tree in (anew, kept, source)]
    (name,) = (name for name in trees[0] if "global_embeddings" in name)
    assert [bool((tree[name] == trees[2][name]).all()) for tree in trees] == [False, True, True]
    for given in ({"keep_first_global_token": True}, {"random_global_init": True}):
        lsg_flax.convert_checkpoint(LSG, max_sequence_length=600, **given)
    for flags, shown in ((["--resize-lsg"], False), ([], True)):
        target = str(tmp_path / f"long{len(flags)}")
        line = ["convert", str(LSG), target, "--max-sequence-length", "600", *flags]
        assert cli.main(line) == 0
        assert ("lost: pass --resize-lsg to keep them." in capsys.readouterr().err) == shown


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "..\\x", "C:\\x", "C:/x"])
@pytest.mark.parametrize("place", [0, 1])
def test_modules_outside_the_folder_are_never_opened(tmp_path, path, place):
    modules = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    modules[place]["path"] = path
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="must have a subfolder, not"):
        read_modules(tmp_path)


def test_one_process_converts_to_a_folder(bert, tmp_path, monkeypatch):
    """The second one says so before it reads weights."""
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("weights are read"))
    with locked(tmp_path), pytest.raises(PlaceTaken, match=f"another process writes {tmp_path}"):
        lsg_flax.convert_checkpoint(bert, tmp_path)


@pytest.mark.slow
def test_a_killed_conversion_run_again_writes_the_same_bytes(bert, tmp_path):
    """Killed anywhere, and where files are written."""
    kills = int(os.environ.get("LSG_KILLS", 2))
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(lsg_flax.__file__).parents[1])}
    command = [sys.executable, "-m", "lsg_flax.cli", "convert", bert]
    begin = time.monotonic()
    calm, target = tmp_path / "calm" / "long", tmp_path / "killed" / "long"  # the card has the name
    subprocess.run([*command, calm], env=environment, check=True, stdout=-3)
    took, before = time.monotonic() - begin, contents(bert)
    generator = random.Random(0)
    for kill in range(kills):
        running = subprocess.Popen([*command, target], env=environment, stdout=-3)
        while kill % 3 and running.poll() is None and not {*target.glob(".lsg-flax-*")}:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05 if kill % 3 else took))
        running.kill()
        running.wait()
        subprocess.run([*command, target], env=environment, check=True, stdout=-3)
        assert contents(target) == contents(calm)
        assert not {*target.glob(".lsg-flax-*"), *target.glob(".lock")}
        if generator.random() < 0.5:
            shutil.rmtree(target)
    assert contents(bert) == before
