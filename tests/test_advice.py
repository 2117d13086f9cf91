"""What to do about a text that is too long: every message advises a conversion of a model that
`convert_checkpoint` takes, and none of a Reformer and a LocalTransformer, which it refuses."""

import functools
import json
import shutil

import numpy as np
import pytest
from tiny_run import PLAIN

import lsg_flax
from lsg_flax import cli, hub
from lsg_flax.inference import Predictor
from lsg_flax.models import FAMILIES, Model, read_config
from lsg_flax.pipelines import Embedder
from lsg_flax.pipelines.tasks import Reader
from lsg_flax.training import Settings, survey

LAYERS = {"vocab_size": 31, "is_decoder": True, "max_position_embeddings": 8}
SHORT = {  # models that read 8 tokens
    "bert": LAYERS | {"hidden_size": 24, "intermediate_size": 8},
    "reformer": LAYERS | {"axial_pos_embds": False, "num_buckets": 2},
    "local-transformer": {
        "num_tokens": 31,
        "heads": 1,
        "dim": 8,
        "depth": 1,
        "max_seq_len": 8,
        "local_attn_window_size": 4,
    },
}
LONG, TEXT = np.full((1, 12), 5), " ".join(["w5"] * 10)
ADVICE = "or make a checkpoint that reads more: lsg_flax.convert_checkpoint(source, target, max_s"
COMMAND = "or make a checkpoint that reads more: lsg-flax convert SOURCE TARGET --max-sequence-leng"
NONE = "(no conversion of a {} model can make a checkpoint that reads more)"


def config_of(family: str):
    return read_config({"model_type": family} | SHORT[family])


@functools.cache
def model_of(family: str, task: str) -> Model:
    return Model(config_of(family), task)


def encoding(family: str) -> None:
    model = model_of(family, "base")
    predictor = Predictor(model, {}, buckets=(8,))
    predictor.check("a text", {"input_ids": [5] * 12}, like={"input_ids": [5]})


def embedder(family: str) -> None:
    tokenizer = hub.read_tokenizer(PLAIN)
    Embedder(model_of(family, "base"), {}, tokenizer, "mean", normalize=False, max_length=12)


PLACES = {
    "apply": lambda family: model_of(family, "base").apply({"params": {}}, LONG),
    "cache": lambda family: model_of(family, "causal_lm").apply(
        {"params": {}}, LONG[:, :2], cache_length=12
    ),
    "position_ids": lambda family: model_of(family, "base").apply(
        {"params": {}}, LONG[:, :2], position_ids=LONG[:, :2] + 6
    ),
    "generate": lambda family: lsg_flax.generate(
        model_of(family, "causal_lm"), {"head": np.zeros(1)}, LONG[:, :2], max_new_tokens=10
    ),
    "encoding": encoding,
    "reader": lambda family: Reader(
        hub.read_tokenizer(PLAIN), config_of(family), 8, truncation=False
    ).rows(TEXT),
    "embedder": embedder,
}
# A LocalTransformer writes on behind its last position, and counts positions itself.
WRITES_ON = {"cache", "generate", "position_ids"}
CASES = [(p, f) for p in PLACES for f in SHORT if p not in WRITES_ON or f != "local-transformer"]


@pytest.mark.parametrize(("place", "family"), CASES)
def test_a_conversion_is_advised_where_there_is_one(place, family):
    with pytest.raises(ValueError) as error:
        PLACES[place](family)
    message = str(error.value)
    assert (ADVICE in message) == (family == "bert"), message
    assert (NONE.format(family) in message) == (family != "bert"), message


def test_the_fact_is_that_of_the_families():
    for name, family in FAMILIES.items():
        assert (family.to_lsg is not None) == family.config_type.LENGTHENS, name


def written(folder, family: str):
    """Config and tokenizer of a model whose weights are not read."""
    for file in PLAIN.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(PLAIN / "vocab.txt", folder)
    values = model_of(family, "causal_lm").config.to_dict()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("family", ["bert", "reformer"])
def test_on_the_command_line_it_is_a_command(capsys, monkeypatch, tmp_path, family):
    model = model_of(family, "causal_lm")
    monkeypatch.setattr(hub.Checkpoint, "task", "causal_lm")
    monkeypatch.setattr(hub.Checkpoint, "load", lambda *_, **__: (model, {}))
    folder = str(written(tmp_path, family))
    assert cli.main(["generate", folder, "--prompt", TEXT, "--max-new-tokens", "1"]) == 2
    message = capsys.readouterr().err
    assert (COMMAND + "th 11." in message) == (family == "bert"), message
    assert (NONE.format(family) in message) == (family != "bert"), message


def test_a_model_that_is_lsg_is_advised_to_keep_its_global_tokens():
    config = config_of("bert").with_overrides(lsg=lsg_flax.LSGConfig())
    message = config.or_convert("truncate it", 12)
    assert message.endswith(f"{ADVICE}equence_length=12, resize_lsg=True)")


@pytest.mark.parametrize("family", ["bert", "reformer"])
@pytest.mark.parametrize(
    "given", [{"max_length": 12}, {"train_only": "global_tokens_and_head"}], ids=str
)
def test_training_advises_its_own_conversion_too(tmp_path, family, given):
    folder = str(written(tmp_path, family))
    named = {"task": "sequence_classification", "train_data": "x.jsonl", "output": "out"}
    with pytest.raises(ValueError) as error:
        survey(Settings(model=folder, **named, **given))
    message = str(error.value)
    assert ("set convert (--convert)" in message) == (family == "bert"), message
    assert ("lsg_flax.convert_checkpoint" in message) == (family == "bert"), message
    assert (f"no conversion of a {family} model can" in message) == (family != "bert"), message
