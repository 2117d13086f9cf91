"""Files and conversions, live: formats that torch writes, LSGConverter with random options, the
environment itself."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import flax.traverse_util
import numpy as np
import pytest
from cases import COMPARED, CONVERSIONS, CONVERTED_TASK, LSG_FAMILIES
from jobs import DIFFERENCES, HERE, TABLE, ask, close
from saved import BLOCKS, CONVERTED, installed_converter
from tiny_tokenizers import FAMILIES as TOKENIZERS
from tiny_tokenizers import write_source

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.hub.to_lsg import Draws, LSGOptions, to_lsg

REQUIREMENTS = HERE.parent / "reference" / "requirements.txt"
CLS, MASK = 2, 4  # of the worker's tokenizer


def test_the_reference_environment_is_the_pinned_one():
    lines = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {"torch", "transformers", "lsg-converter"} <= pinned.keys()
    names = [re.split("[<>=]", line)[0] for line in lines if line]
    code = f"import importlib.metadata as m; print(*(m.version(n) for n in {names!r}))"
    versions = dict(zip(names, ask(code).split(), strict=True))
    plain = {name: version.split("+")[0] for name, version in versions.items()}
    assert {name: plain[name] for name in pinned} == pinned
    assert int(versions["numpy"].split(".")[0]) < 2


def embeddings(params) -> dict[str, np.ndarray]:
    tables = params["encoder"]["embeddings"]
    return {
        name: np.asarray(table["embedding"])
        for name, table in tables.items()
        if "embedding" in table
    }


def check_conversion(source, case, result, lsg: LSGConfig):
    model, params = lsg_flax.from_pretrained(source)
    draws = Draws(
        **{
            name: result.outputs[name]
            for name in ("position_noise", "global_samples")
            if name in result.outputs
        }
    )
    made, config = to_lsg(
        params,
        model.config,
        LSGOptions(**case.fields["options"]),
        lsg=lsg,
        bos_token_id=CLS,
        mask_token_id=MASK,
        draws=draws,
    )
    tables = embeddings(made)
    for name in tables.keys() & result.outputs.keys():
        expected, label = result.outputs[name], f"{name} of {case.fields}"
        close("conversion", tables[name], expected, tolerance=1e-6, label=label)
    assert "global_embeddings" in result.outputs
    return config, made


@pytest.mark.parametrize(
    "name", [*map(str, range(CONVERSIONS)), *sorted({*LSG_FAMILIES} - {"bert"})]
)
def test_random_conversion(reference, name):
    case, result = reference[f"convert_{name}"]
    source = reference.folder / case.fields["checkpoint"]
    given = lsg_flax.from_pretrained(source)[0].config.lsg
    config, made = check_conversion(
        source, case, result, given or LSGConfig(**case.fields["config"])
    )
    # What the reference saved is the model that we made.
    theirs, params = lsg_flax.from_pretrained(reference.folder / case.fields["out"])
    assert theirs.config.lsg == config.lsg
    assert theirs.config.max_position_embeddings == config.max_position_embeddings
    ours = flax.traverse_util.flatten_dict(made, sep="/")
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        close("conversion", ours[path], leaf, tolerance=1e-6, label=f"{path} of {case.fields}")
    row = TABLE.setdefault((config.model_type, CONVERTED_TASK[config.model_type]), {})
    row["converts"] = max(row.get("converts", 0.0), DIFFERENCES["conversion"])


@pytest.mark.parametrize("name", CONVERTED)
def test_the_reference_converts_our_conversion_again(saved, name):
    case, result = saved[f"again_{name}"]
    assert result.report["model_max_length"] == case.fields["options"]["max_sequence_length"]
    fields = {k: v for k, v in CONVERTED[name].items() if k in LSGConfig.__dataclass_fields__}
    lsg = LSGConfig(**fields, **BLOCKS)
    check_conversion(saved.folder / f"converted_{name}", case, result, lsg)


@pytest.mark.parametrize("name", CONVERTED)
def test_auto_classes_find_the_remote_code_beside_our_conversion(saved, name):
    """The model card's usage, AutoModel...(folder, trust_remote_code=True)."""
    _, result = saved[f"auto_{name}"]
    expected = {"class": "LSGBertForMaskedLM", "missing_keys": [], "unexpected_keys": []}
    assert result.report == expected


TOKENIZE = """
import json, sys, transformers
trust = transformers.__version__ < "5"  # the code needs PyTorch, and does not run with newer ones
for folder in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    ids = tokenizer("the quick naïve fox 東京", "some words")["input_ids"]
    long = tokenizer("words " * 300, truncation=True)["input_ids"]
    print(json.dumps([type(tokenizer).__name__, ids, tokenizer.model_max_length, len(long)]))
"""


@pytest.mark.parametrize("model_type", TOKENIZERS)
def test_both_versions_of_transformers_read_a_converted_tokenizer(model_type, tmp_path):
    """Those that run LSG in PyTorch, and today's: the ids of the source, and its class."""
    source, target = write_source(tmp_path / "source", model_type), tmp_path / "long"
    with installed_converter(tmp_path / "installed"):
        lsg_flax.convert_checkpoint(source, target, max_sequence_length=200)
    assert len(list(target.glob("modeling_lsg_*.py"))) == (model_type in LSG_FAMILIES)
    found, environment = [], os.environ | {"HF_MODULES_CACHE": str(tmp_path / "code")}
    for python in (os.environ["LSG_REFERENCE_PYTHON"], sys.executable):
        command = [python, "-c", TOKENIZE, source, target]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        before, after = map(json.loads, done.stdout.splitlines())
        assert after[:2] == before[:2] and after[2:] == [200, 200]
        found.append(after[1])
    assert found[0] == found[1]


def test_a_length_in_tokenizer_json_cuts_nothing(tmp_path):
    """It is carried as it is, since no version of transformers goes by it."""
    source, target = tmp_path / "source", tmp_path / "long"
    write_source(source, "roberta")
    ask(
        f"import transformers; t = transformers.AutoTokenizer.from_pretrained({str(source)!r}); "
        f"t.backend_tokenizer.enable_truncation(8); t.save_pretrained({str(source)!r})"
    )
    assert json.loads((source / "tokenizer.json").read_text())["truncation"]["max_length"] == 8
    lsg_flax.convert_checkpoint(source, target, max_sequence_length=200)
    assert (source / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    for python in (os.environ["LSG_REFERENCE_PYTHON"], sys.executable):
        command = [python, "-c", TOKENIZE, target]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)[2:] == [200, 200]


def test_shards_written_by_torch_hold_the_same_model(reference):
    whole, sharded = (
        flax.traverse_util.flatten_dict(lsg_flax.from_pretrained(reference.folder / n)[1], sep="/")
        for n in ("file_whole", "file_sharded")
    )
    assert len(list((reference.folder / "file_sharded").glob("*-of-*.safetensors"))) > 1
    assert whole.keys() == sharded.keys()
    for path in whole:
        np.testing.assert_array_equal(whole[path], sharded[path], err_msg=path)


@pytest.fixture(scope="module")
def torch_facts(reference, saved, tmp_path_factory):
    """The findings of with_torch.py, and the folder with its arrays."""
    code = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_path('purelib'))"
    major, minor, site_packages = ask(code).split(maxsplit=2)
    same_python = (int(major), int(minor)) == sys.version_info[:2]
    if not same_python and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is in the reference environment only, which has another Python")
    out = tmp_path_factory.mktemp("with_torch")
    command = [sys.executable, HERE / "with_torch.py", site_packages]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(lsg_flax.__file__).parents[1])}
    done = subprocess.run(
        [*command, reference.folder, saved.folder, out],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "facts.json").read_text()), out


@pytest.mark.parametrize("name", ["bin", "bin_sharded"])
def test_pickled_weights_are_the_same_model(reference, torch_facts, name):
    reference[f"file_{name}"]
    assert list((reference.folder / f"file_{name}").glob("*.bin"))
    _, params = lsg_flax.from_pretrained(reference.folder / "file_whole")
    expected = flax.traverse_util.flatten_dict(params, sep="/")
    with np.load(torch_facts[1] / f"{name}.npz") as found:
        assert set(found) == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_bfloat16_pickles_keep_their_bits(torch_facts):
    assert torch_facts[0]["bfloat16"] == {"a": ["bfloat16", True], "b": ["bfloat16", True]}


def test_what_pytorch_users_write_is_the_same_model(torch_facts):
    """Named parameters, views, wrapped models; `safetensors.torch.save_model`, which keeps one of
    two tied tensors."""
    found = torch_facts[0]["stored_otherwise"]
    assert len(found) == 8 + len(COMPARED)
    assert set(found.values()) == {True}, found


@pytest.mark.parametrize("kind", ["float8", "quantized", "sparse", "meta", "int8"])
def test_tensors_that_are_no_weights_are_named(torch_facts, kind):
    assert "lm_head.dense.weight has dtype" in torch_facts[0]["odd_kinds"][kind]


def test_damaged_pickles_give_our_errors(torch_facts):
    assert torch_facts[0]["broken_bins"] == []


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("code", "has more than weights"),
        ("garbage", "has more than weights"),
        ("list", "is not a state dict"),
        ("number", "is not a state dict"),
        ("truncated", "is damaged or truncated"),
        ("empty", "is damaged or truncated"),
    ],
)
def test_a_pickle_that_is_not_weights_is_refused(torch_facts, file, says):
    assert says in torch_facts[0]["errors"][file]
    assert "weights_only" not in torch_facts[0]["errors"][file]


def test_the_classes_of_current_transformers_load_plain_models(torch_facts):
    for task, lists in torch_facts[0]["transformers"].items():
        assert not any(lists.values()), (task, lists)
