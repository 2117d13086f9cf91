"""Repositories of the hub: what is downloaded of them, and what there is without a network."""

import fnmatch
import json
import pathlib
import shutil

import huggingface_hub
import pytest
from golden_data import GOLDEN

import lsg_flax
from lsg_flax import hub
from lsg_flax.hub.download import needed_files

SOURCE = GOLDEN / "bert_to_convert_512"
SMALL = ("config.json", "README.md", "LICENSE", "generation_config.json", "tokenizer_config.json")
SMALL += ("vocab.txt", "tokenizer.json", "special_tokens_map.json", "spiece.model", "bpe.codes")
SMALL += ("modeling_lsg_bert.py", "config_sentence_transformers.json")
USELESS = (".gitattributes", "tf_model.h5", "rust_model.ot", "training_args.bin", "run.py")
USELESS += ("onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml", "a/b.safetensors")
USELESS += ("coreml/model.safetensors", "model.fp16.bin", "optimizer.pt", "trainer_state.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
FLAX = "flax_model.msgpack"


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ((hub.WEIGHTS, hub.BIN, FLAX), (hub.WEIGHTS,)),
        ((hub.WEIGHTS, hub.INDEX, *SHARDS), (hub.WEIGHTS,)),
        ((hub.INDEX, *SHARDS, hub.BIN), (hub.INDEX, *SHARDS)),
        ((hub.BIN, FLAX), (hub.BIN,)),
        (("pytorch_model.bin.index.json", *BINS), ("pytorch_model.bin.index.json", *BINS)),
        ((FLAX,), (FLAX,)),
        ((), ()),
    ],
)
def test_weights_come_in_one_format(there, taken):
    assert {*needed_files([*SMALL, *USELESS, *there])} == {*SMALL, *taken}


def test_modules_of_sentence_transformers_come_with_their_weights():
    inside = [f"0_Transformer/{name}" for name in ("config.json", "vocab.txt", hub.BIN)]
    dense = [f"2_Dense/{name}" for name in ("config.json", hub.WEIGHTS)]
    there = [*inside, *dense, f"2_Dense/{hub.BIN}", "modules.json", "2_Dense/onnx/a.json"]
    folders = ["0_Transformer", "2_Dense"]
    assert {*needed_files(there, folders)} == {*inside, *dense, "modules.json"}


class Hub:
    """A hub of one repository, whose files are those of `files`; `taken` were downloaded."""

    def __init__(self, files: pathlib.Path, local: pathlib.Path):
        self.files, self.local, self.taken, self.online = files, local, set(), True

    def list_repo_files(self, name: str) -> list[str]:
        if not self.online:
            raise RuntimeError("no network, in the words of some library")
        every = (p for p in self.files.rglob("*") if p.is_file())
        return [p.relative_to(self.files).as_posix() for p in every]

    def snapshot_download(self, name: str, *, allow_patterns=None, local_files_only=False) -> str:
        assert name == "owner/model" and not local_files_only
        for file in self.list_repo_files(name) if self.online else ():
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                self.taken.add(file)
                (self.local / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.files / file, self.local / file)
        return str(self.local)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Hub:
    files = shutil.copytree(SOURCE, tmp_path / "there")
    made = Hub(files, tmp_path / "here")
    made.local.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    for name in USELESS:
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(b"large")
    return made


def test_a_checkpoint_is_downloaded_once_and_used_offline(fake):
    (fake.files / hub.BIN).write_bytes(b"large")
    model, _ = lsg_flax.from_pretrained("owner/model")
    assert model.task == "masked_lm"
    assert fake.taken == {p.name for p in SOURCE.iterdir()}
    fake.online = False
    assert lsg_flax.from_pretrained("owner/model")[0].config == model.config


def test_a_transformer_inside_is_downloaded(fake):
    inside = fake.files / "0_Transformer"
    shutil.copytree(SOURCE, inside)
    (inside / hub.BIN).write_bytes(b"large")
    (fake.files / hub.WEIGHTS).unlink()
    listed = [{"type": "a.Transformer", "path": "0_Transformer"}]
    (fake.files / "modules.json").write_text(json.dumps(listed))
    assert hub.open_checkpoint("owner/model").load()[0].task == "masked_lm"
    assert f"0_Transformer/{hub.BIN}" not in fake.taken


def test_a_config_or_a_tokenizer_alone_needs_no_weights(fake):
    hub.open_checkpoint("owner/model", hub.CONFIG_FILES)
    hub.resolve("owner/model", hub.TOKENIZER_ALONE)
    assert not [name for name in fake.taken if name.endswith((".safetensors", ".bin"))]
    fake.online = False
    with pytest.raises(FileNotFoundError, match="its weights were not downloaded before; no netw"):
        lsg_flax.from_pretrained("owner/model")


def test_the_cache_of_the_hub_is_used_offline(tmp_path, monkeypatch):
    """As huggingface_hub itself lays it out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    revision, repository = "0" * 40, tmp_path / "models--owner--model"
    shutil.copytree(SOURCE, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    opened = hub.open_checkpoint("owner/model")
    assert opened.load()[0].task == "masked_lm"
    # a tokenizer that transformers read by its name is carried like one of a folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("owner/model", cache_dir=tmp_path)
    lsg_flax.save_pretrained(tmp_path / "saved", *opened.load(), tokenizer)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    assert all((tmp_path / "saved" / n).read_bytes() == (SOURCE / n).read_bytes() for n in names)
    with pytest.raises(FileNotFoundError, match="owner/other is neither a local folder nor a rep"):
        hub.open_checkpoint("owner/other")
