"""Model cards of conversions and runs, and both sent to the hub, which is a local one here."""

import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import yaml
from fake_hub import fake_hub
from tiny_run import PLAIN, save_tiny, write
from tiny_tokenizers import contents

import lsg_flax
from lsg_flax import cli, hub
from lsg_flax.training import Settings, finetune

SENT = {"config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def card_of(folder: pathlib.Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard.load(folder / "README.md")


@pytest.fixture
def source(tmp_path):
    """A checkpoint with a card of the hub."""
    folder = shutil.copytree(PLAIN, tmp_path / "source")
    (folder / "README.md").write_bytes(b"---\nlicense: mit\nlanguage: en\n---\r\n# BERT\n")
    return folder


def test_a_conversion_has_a_card_and_keeps_that_of_its_source(source, tmp_path):
    lsg_flax.convert_checkpoint(source, tmp_path / "long", num_global_tokens=3)
    card, data = card_of(tmp_path / "long"), card_of(tmp_path / "long").data
    assert (data.license, data.language, data.pipeline_tag) == ("mit", "en", "fill-mask")
    assert data.base_model is None and data.library_name == "lsg_flax"
    assert card.text.startswith("\n# long\n\n`source`, converted by lsg_flax to read 4,096 tokens")
    for row in ("tokens it reads | 4,096", "`num_global_tokens` | 3", "`seed` | 123"):
        assert f"| {row} |" in card.text
    assert 'lsg_flax.from_pretrained("long")' in card.text and str(tmp_path) not in card.text
    kept = tmp_path / "long" / "README.source.md"
    assert kept.read_bytes() == (source / "README.md").read_bytes() and kept.name in card.text
    again = tmp_path / "longer"  # of the conversion: its source's card goes on
    lsg_flax.convert_checkpoint(tmp_path / "long", again, max_sequence_length=5000, resize_lsg=True)
    assert (again / "README.source.md").read_bytes() == kept.read_bytes()
    assert card_of(again).data.license == "mit"


def test_the_base_model_is_a_name_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.download, "_download", lambda *_: PLAIN)
    lsg_flax.convert_checkpoint("somebody/bert", tmp_path / "long")
    assert card_of(tmp_path / "long").data.base_model == "somebody/bert"
    lsg_flax.convert_checkpoint(tmp_path / "long", tmp_path / "again", resize_lsg=True)
    assert card_of(tmp_path / "again").data.base_model == "somebody/bert"


def test_a_card_of_somebodys_own_stays(source, tmp_path):
    target = tmp_path / "long"
    for length in (600, 700):  # its own is replaced
        lsg_flax.convert_checkpoint(source, target, max_sequence_length=length)
        assert f"read {length} tokens" in (target / "README.md").read_text()
    edited = (target / "README.md").read_text().replace("700", "about 700")
    for text in (edited, "# mine\n"):
        (target / "README.md").write_text(text)
        says = r"long/README.md was written or edited by hand and is kept; move it away"
        with pytest.warns(UserWarning, match=says):
            lsg_flax.convert_checkpoint(source, target, max_sequence_length=800)
        assert (target / "README.md").read_text() == text
        assert hub.open_checkpoint(target).config.max_position_embeddings == 800


def test_metadata_that_is_no_yaml_is_named(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: [mit\n---\n# BERT\n")
    with pytest.warns(UserWarning, match="the metadata of .*README.md cannot be read, so the new"):
        lsg_flax.convert_checkpoint(source, tmp_path / "long")
    assert card_of(tmp_path / "long").data.license is None


def test_values_stay_in_their_cells():
    assert hub.table({"a": "x|y\nz"}).splitlines()[-1] == "| a | x\\|y z |"


# ------------------------------------------------------------------------------ of a run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: somebody/bert\n---\n")
    return folder


def settings_of(folder, tiny, **values) -> Settings:
    kind = "single_label_classification"
    values = {"evaluate_every": 1, "steps": 3, "best": "eval_accuracy"} | values
    return Settings(
        model=str(tiny),
        task="sequence_classification",
        train_data=write(folder, kind),
        eval_data=write(folder, kind, rows=8, seed=1, name="eval.jsonl"),
        output=str(folder / "areas"),
        cache=str(folder / "cache"),
        learning_rate=1e-2,
        devices=1,
        **values,
    )


@pytest.mark.filterwarnings("ignore:weights for task")
def test_a_run_has_a_card_for_each_of_its_models_and_sends_the_best(tiny, tmp_path, monkeypatch):
    settings = settings_of(tmp_path, tiny, push_to_hub="me/areas")
    with fake_hub(monkeypatch) as fake:
        result = finetune(settings, progress=False)
        assert result.pushed == f"{fake.endpoint}/me/areas"
        fake.repositories["me/areas"].clear()
        (tmp_path / "areas" / "README.md").write_text("mine")
        with pytest.warns(UserWarning, match="areas/README.md was written or edited by hand"):
            assert finetune(settings, progress=False).pushed == result.pushed
        assert fake.repositories["me/areas"].keys() >= SENT  # again, where all was done before
    sent, best = fake.repositories["me/areas"], tmp_path / "areas" / "best"
    assert sent == {name: (best / name).read_bytes() for name in sent} and "LICENSE" in sent
    card = card_of(best)
    data = card.data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "somebody/bert")
    (found,) = data["model-index"]
    assert found["name"] == "me/areas"
    scores = {m["type"]: m["value"] for m in found["results"][0]["metrics"]}
    records = [record for record in result.history if record["step"] == result.best]
    assert scores == {n: records[0][f"eval_{n}"] for n in ("loss", "accuracy", "macro_f1")}
    assert f"{result.best} steps" in card.text and 'from_pretrained("me/areas")' in card.text
    assert "| rows | 24 |" in card.text and "texts were truncated to 16 tokens" in card.text
    block = card.text.split("```yaml\n")[1].split("```")[0]
    given = yaml.safe_load(block)
    assert given["train_data"] == "train.jsonl" and given["learning_rate"] == 0.01
    assert given["model"] == tiny.name and "output" not in given
    assert str(tmp_path) not in card.text and str(tiny) not in card.text


# ------------------------------------------------------------------------------ to the hub


def test_a_conversion_is_sent_with_what_belongs_to_it_alone(capsys, source, tmp_path, monkeypatch):
    target = tmp_path / "long"
    target.mkdir()
    (target / "notes.txt").write_text("mine alone")
    with fake_hub(monkeypatch) as fake:
        given = ("convert", source, target, "--push-to-hub", "bert-long")
        code, out, err = run(capsys, *given)
        assert (code, err) == (0, ""), err
        assert out.endswith(f"pushed to {fake.endpoint}/me/bert-long\n")
    sent = fake.repositories["me/bert-long"]
    written = contents(target)
    assert sent == {name: data for name, data in written.items() if name != "notes.txt"}
    assert sent.keys() >= {*SENT, "README.source.md"}


BEGIN = {
    "no token": (None, "", "--push-to-hub me/x needs a token for the hub, but there is none: log"),
    "offline": ("write", "", "needs the network, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is"),
    "another token": ("none", "", "nothing was started: --push-to-hub me/x: "),
    "read only": ("read", "", "that of me may only read: log in with `hf auth login`, or set HF_T"),
    "no network": ("write", "", "What to do: check the network; run again, or leave it out."),
    "an error": ("write", "whoami", "out of order. What to do: run again, or leave it out."),
}


@pytest.mark.parametrize("case", BEGIN)
@pytest.mark.parametrize("command", ["convert", "train"])
def test_what_the_hub_would_not_take_is_said_before_the_work(
    capsys, source, tmp_path, monkeypatch, command, case
):
    role, fails, says = BEGIN[case]
    monkeypatch.setattr(hub.Checkpoint, "load", lambda *_, **__: pytest.fail("weights are read"))
    before, target = contents(tmp_path), tmp_path / "out"
    with fake_hub(monkeypatch) as fake:
        fake.role, fake.fails = None if role == "none" else role, fails
        if role is None:
            monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        if case == "no network":
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:9")
        if case == "offline":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        given = ["--model", source, "--task", "masked_lm", "--train-data", "x", "--output", target]
        given = [source, target] if command == "convert" else given
        code, out, err = run(capsys, command, *given, "--push-to-hub", "me/x")
        assert not fake.repositories
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err
    assert contents(tmp_path) == before


def test_a_push_is_checked_where_nothing_else_has_imported_parts_of_the_hubs_client(tmp_path):
    """In a process of its own, in which nobody is logged in."""
    alone = {name: x for name, x in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", "from lsg_flax.hub import check_push; check_push('me/x')"],
        env=alone | {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert "push_to_hub='me/x' needs a token for the hub" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["a/b/c", "me/ x", "me/a--b"])
def test_a_name_of_no_repository(capsys, source, tmp_path, name):
    given = ["--model", source, "--task", "masked_lm", "--train-data", "x"]
    for command in (["convert", source], ["train", *given, "--output"]):
        code, _, err = run(capsys, *command, tmp_path / "out", "--push-to-hub", name)
        assert (
            code == 2 and "is not a valid repository name on the hub" in err and "me/areas" in err
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails", ["create", "preupload", "commit"])
def test_what_could_not_be_sent_is_kept(capsys, source, tmp_path, monkeypatch, fails):
    target = tmp_path / "long"
    with fake_hub(monkeypatch) as fake:
        fake.fails = fails
        code, out, err = run(capsys, "convert", source, target, "--push-to-hub", "me/x")
        assert code == 2 and "long was not pushed to me/x: " in err and out.startswith("wrote"), err
        assert f"{target} is complete; push it with `hf upload me/x {target}`" in err
        fake.fails = ""
        assert hub.push_folder(target, "me/x") == f"{fake.endpoint}/me/x"
        assert fake.repositories["me/x"] == contents(target)
