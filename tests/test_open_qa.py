"""Questions answered from a corpus: beside recorded answers of PyTorch's RealmForOpenQA, the search
beside NumPy, an index that survives interruptions, and bad input."""

import dataclasses
import functools
import json
import os
import pathlib
import pickle
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from golden_data import GOLDEN

import lsg_flax
from lsg_flax import cli, hub, open_qa
from lsg_flax.open_qa import OpenQA, Records, embeddings, folder, pairs, search
from lsg_flax.sharding import make_mesh

SOURCE = GOLDEN / "realm_plain_open_qa"
BLOCKS = 12
QUESTION = "who built the tower in paris ?"


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(SOURCE / "answers.npz") as archive:
        return dict(archive)


@functools.cache
def loaded() -> OpenQA:
    return OpenQA.from_pretrained(SOURCE)


def question_of(text: str) -> list[np.ndarray]:
    encoded = loaded().tokenizer([text], return_token_type_ids=True, return_tensors="np")
    return [encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids")]


@pytest.fixture
def copied(tmp_path):
    """A folder of the golden model that a test may change."""
    return pathlib.Path(shutil.copytree(SOURCE, tmp_path / "model"))


def with_config(folder: pathlib.Path, **fields) -> pathlib.Path:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))
    return folder


# ------------------------------------------------------------------------------- recorded answers


def assert_recorded(qa: OpenQA, found: dict[str, np.ndarray], number: int) -> None:
    """Ids of answer and blocks are equal, losses to 1e-5."""
    answers = json.loads(str(found[f"answers_{number}"]))
    given = [found[f"{name}_{number}"] for name in ("ids", "mask", "types")]
    out = qa(*given, answer_ids=answers, train=bool(found[f"train_{number}"]))
    np.testing.assert_array_equal(out.predicted_answer_ids, found[f"predicted_{number}"])
    np.testing.assert_array_equal(out.block_ids, found[f"blocks_{number}"])
    names = {n.removesuffix(f"_{number}") for n in found if n.endswith(f"_{number}")}
    names -= {"ids", "mask", "types", "answers", "train", "predicted", "blocks"}
    assert {"block_idx", "candidate", "start_pos"} < names
    for name in names:
        expected, ours = found[f"{name}_{number}"], np.asarray(getattr(out.reader_output, name))
        assert ours.shape == expected.shape, name
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("number", range(7))
def test_answers_are_those_of_pytorch(number):
    assert_recorded(loaded(), recorded(), number)


def test_candidates_are_those_of_the_reference():
    texts, others, length = json.loads(str(recorded()["candidates"]))
    found = open_qa.batch_encode_candidates(
        loaded().tokenizer, texts, text_pair=others, max_length=length
    )
    for name, array in found.items():
        np.testing.assert_array_equal(array, recorded()[f"candidates_{name}"])
    with pytest.raises(ValueError, match=r"rows have \[2, 1\] candidates"):
        open_qa.batch_encode_candidates(loaded().tokenizer, [["a", "b"], ["c"]], max_length=9)


def test_unknown_words_of_a_question_stay():
    """The reference decodes a question without special tokens, and so without them."""
    tokenizer = loaded().tokenizer
    ids, mask, _ = question_of("who built 東 ?")
    assert tokenizer.unk_token_id in ids
    found = loaded().retrieve({"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids})
    first = found.pairs.input_ids[:, : ids.shape[1]]
    np.testing.assert_array_equal(first, np.broadcast_to(ids, first.shape))


def test_text_in_answer_out():
    answer, score, block, text = loaded().answer(QUESTION)
    assert text == loaded().records.texts([block])[0] and answer in text
    out = loaded()(*question_of(QUESTION))
    assert loaded().tokenizer.decode(out.predicted_answer_ids) == answer
    assert score == np.max(out.reader_output.reader_logits)


def test_padding_of_the_question_changes_nothing():
    ids, mask, types = question_of(QUESTION)
    wide = [np.pad(x, ((0, 0), (0, 9))) for x in (ids, mask, types)]
    one, other = loaded()(ids), loaded()(*wide)
    np.testing.assert_array_equal(one.predicted_answer_ids, other.predicted_answer_ids)
    close = {"rtol": 1e-5, "atol": 1e-5}
    logits = [x.reader_output.reader_logits for x in (one, other)]
    np.testing.assert_allclose(logits[0], logits[1], **close)


def test_one_block_is_enough(copied):
    """PyTorch's class crashes."""
    qa = OpenQA.from_pretrained(with_config(copied, reader_beam_size=1))
    out = qa(*question_of(QUESTION), answer_ids=[[26]])
    assert out.block_ids.tolist() == loaded()(*question_of(QUESTION)).block_ids[:1].tolist()
    assert np.isfinite(out.reader_output.loss)


def test_dropout_in_training_is_by_key(copied):
    qa = OpenQA.from_pretrained(with_config(copied, hidden_dropout_prob=0.3))
    losses = [
        float(qa(*question_of(QUESTION), [[26]], True, key=key).reader_output.loss)
        for key in (None, None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    ]
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert len({*losses}) == 3


def test_a_saved_folder_gives_the_same(tmp_path):
    loaded().save_pretrained(tmp_path / "saved")
    again = OpenQA.from_pretrained(tmp_path / "saved")
    assert_recorded(again, recorded(), 1)
    before, now = (hub.open_checkpoint(p).tensors for p in (SOURCE, tmp_path / "saved"))
    shared = {f"{part}.cls.predictions.decoder.bias" for part in ("embedder", "reader")}
    assert now.keys() - shared == before.keys() - shared  # which safetensors of PyTorch left out
    for name in before:
        np.testing.assert_array_equal(np.asarray(before[name]), np.asarray(now[name]))


def test_a_reader_of_long_blocks(tmp_path):
    """The reader converted to LSG, beside the embedder as it is."""
    options = {"block_size": 8, "sparse_block_size": 8, "num_global_tokens": 2}
    lsg_flax.convert_checkpoint(
        SOURCE, tmp_path / "long", task="reader", max_sequence_length=128, **options
    )
    qa = OpenQA.from_pretrained(SOURCE, reader=tmp_path / "long")
    assert qa.reader.max_length == 128 and qa.embedder.max_length == 64
    assert qa.answer(QUESTION).answer
    with pytest.raises(
        ValueError, match=r"embedder and reader differ in \[.*pass its folder to OpenQA"
    ):
        qa.save_pretrained(tmp_path / "saved")


# ----------------------------------------------------------------------------------------- records


def test_records_are_mapped_not_read(tmp_path):
    texts = ["one", "zwei Blöcke", "東京"]
    open_qa.write_records(tmp_path / "r.npy", Records([t.encode() for t in texts], "here"))
    records = open_qa.open_records(tmp_path / "r.npy")
    assert isinstance(records.values, np.memmap) and records.values.dtype == "S12"
    assert records.texts([2, 0]) == [texts[2], texts[0]]
    (tmp_path / "r.txt").write_text("".join(f"{t}\n" for t in texts))
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for kind in (".txt", ".jsonl"):
        assert open_qa.open_records(tmp_path / f"r{kind}").texts(range(3)) == texts


class Runs:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def objects(*values) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_a_pickle_is_converted_on_request_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("pickled.npy", objects(b"one", "zwei ü", np.bytes_(b"three")), allow_pickle=True)
    with pytest.raises(ValueError, match=r"pickled.npy holds pickled objects.*--unpickle-records"):
        open_qa.open_records("pickled.npy")
    assert open_qa.unpickle_records("pickled.npy").texts(range(3)) == ["one", "zwei ü", "three"]
    np.save("runs.npy", objects(b"one", Runs()), allow_pickle=True)
    with pytest.raises(ValueError, match=r"asks for posix.mkdir, which is not allowed"):
        open_qa.unpickle_records("runs.npy")
    assert not pathlib.Path("made_by_a_pickle").exists()


BAD_RECORDS = {
    "bare pickle": (lambda f: f.write_bytes(pickle.dumps([b"x"])), "pickled objects or no array"),
    "texts": (lambda f: np.save(f, np.array(["a", "bc"])), "<U2 array .*fixed-width bytes"),
    "two axes": (lambda f: np.save(f, np.array([[b"a"]])), r"\(1, 1\).*one dimension"),
    "cut": (lambda f: f.write_bytes((SOURCE / "block_records.npy").read_bytes()[:200]), "damaged"),
    "empty": (lambda f: f.write_bytes(b""), "damaged"),
    "pointer": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_records_of_another_kind_are_named(tmp_path, kind):
    make, says = BAD_RECORDS[kind]
    make(tmp_path / "r.npy")
    with pytest.raises(ValueError, match=says):
        open_qa.open_records(tmp_path / "r.npy")


def test_texts_that_are_no_blocks_are_named(tmp_path):
    (tmp_path / "r.txt").write_text("one\n \ntwo\n")
    with pytest.raises(ValueError, match=r"r.txt:2 is an empty block"):
        open_qa.open_records(tmp_path / "r.txt")
    np.save(tmp_path / "r.npy", np.array([b"a", b"\xff"]))
    with pytest.raises(ValueError, match=r"block 1 of .*r.npy is not valid UTF-8"):
        open_qa.open_records(tmp_path / "r.npy").texts([1])
    with pytest.raises(ValueError, match="block 0 of here ends in a zero byte"):
        open_qa.write_records(tmp_path / "z.npy", Records([b"a\0"], "here"))
    (tmp_path / "none.txt").touch()
    with pytest.raises(ValueError, match=r"none.txt has no blocks"):
        open_qa.open_records(tmp_path / "none.txt")
    (tmp_path / "r.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"r.jsonl:1: its text must be a text, got 3. Mend it\.$"):
        open_qa.open_records(tmp_path / "r.jsonl")
    for name in ("r.csv", "none.npy"):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            (tmp_path / "r.csv").touch()
            open_qa.open_records(tmp_path / name)


# ------------------------------------------------------------------------------------------ search

VECTORS = np.random.default_rng(0).standard_normal((1003, 16), np.float32)
QUERIES = np.random.default_rng(1).standard_normal((3, 16), np.float32)
BEST = np.argsort(-(QUERIES @ VECTORS.T), axis=1, kind="stable")


@pytest.fixture
def small_parts(monkeypatch):
    """Scores in many parts."""
    monkeypatch.setattr(search, "_SCORES", 700)
    search.best_blocks.cache_clear()
    yield
    search.best_blocks.cache_clear()


@pytest.mark.parametrize("devices", (1, 8))
@pytest.mark.parametrize("beam", (1, 5, 300, 1003))
def test_search_finds_the_largest_products(devices, beam):
    sizes = {"data": devices // 2 or 1, "tensor": min(devices, 2)}
    mesh = make_mesh(**sizes, devices=jax.devices()[:devices])
    found = open_qa.device_search(VECTORS, mesh=mesh)(QUERIES, beam)
    np.testing.assert_array_equal(found.blocks, BEST[:, :beam])
    expected = np.take_along_axis(QUERIES @ VECTORS.T, found.blocks, axis=1)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beam", (1, 5, 300))
def test_search_in_parts_finds_the_same(small_parts, beam):
    found = open_qa.device_search(VECTORS)(QUERIES, beam)
    np.testing.assert_array_equal(found.blocks, BEST[:, :beam])


def test_of_equal_blocks_the_first_is_found(small_parts):
    found = open_qa.device_search(np.ones((500, 4), np.float32))(np.ones((3, 4), np.float32), 7)
    np.testing.assert_array_equal(found.blocks, np.broadcast_to(np.arange(7), (3, 7)))


def test_search_never_holds_all_scores(small_parts):
    """The compiled program's temporaries are those of a part, however many blocks there are."""
    sizes = []
    for count in (20_000, 80_000):
        mesh = make_mesh(devices=jax.devices()[:1])
        arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((count, 16), (3, 16))]
        compiled = open_qa.best_blocks(mesh, count, 5).lower(*arguments).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert max(sizes) < 80_000 * 3 * 4  # the scores
    search.best_blocks.cache_clear()


def test_search_of_a_share_and_in_half_precision():
    some = open_qa.device_search(VECTORS, recall=0.9)(QUERIES, 20).blocks
    assert np.mean([np.isin(a, b).mean() for a, b in zip(some, BEST[:, :20], strict=True)]) > 0.7
    half = open_qa.device_search(VECTORS, dtype=jnp.bfloat16)(QUERIES, 20)
    assert half.scores.dtype == np.float32
    assert np.isin(half.blocks[0], BEST[0, :30]).all()


def test_search_by_faiss():
    pytest.importorskip("faiss")
    found = open_qa.faiss_search(VECTORS)(QUERIES, 5)
    np.testing.assert_array_equal(found.blocks, BEST[:, :5])
    with pytest.raises(ValueError, match=r"faiss refuses factory='Nothing'"):
        open_qa.faiss_search(VECTORS, factory="Nothing")


def test_faiss_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'lsg-flax[faiss]'")):
        open_qa.faiss_search(VECTORS)


def test_what_cannot_be_searched_is_named():
    found = open_qa.device_search(VECTORS)
    with pytest.raises(ValueError, match=r"queries \(3, 15\) must be \[questions, 16\]"):
        found(QUERIES[:, 1:], 5)
    with pytest.raises(ValueError, match=r"beam of 1004 blocks does not fit an index of 1003"):
        found(QUERIES, 1004)
    with pytest.raises(ValueError, match=r"embeddings \(0, 4\) must be \[blocks, width\], at"):
        open_qa.device_search(np.zeros((0, 4)))
    with pytest.raises(ValueError, match=r"recall=1.5 must be between"):
        open_qa.device_search(VECTORS, recall=1.5)


# ------------------------------------------------------------------------------------- an index

TEXTS = Records([f"block number {n}".encode() for n in range(23)], "corpus.txt")


def vectors_of(texts) -> np.ndarray:
    return np.array([[len(t), sum(t.encode()) % 97, 1.0] for t in texts], np.float32)


def embed(target, function=vectors_of, records=TEXTS, settings=None, window=5) -> int:
    settings, of_run = settings or {"seed": 1}, {"window": window, "progress": False}
    return open_qa.embed_blocks(target, records, function, width=3, settings=settings, **of_run)


@pytest.mark.parametrize("calls", range(6))
def test_an_interrupted_index_continues(tmp_path, calls):
    """After any window, and with half a window behind it; the bytes are those of one run."""
    assert embed(tmp_path / "calm.safetensors") == 23
    done = []

    def fails(texts):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(texts)
        return vectors_of(texts)

    target = tmp_path / "index.safetensors"
    try:
        embed(target, fails)
    except KeyboardInterrupt:
        assert not target.exists()
        with (tmp_path / "index.safetensors.partial").open("ab") as partial:
            partial.write(b"half")
        assert embed(target) == 23 - 5 * max(calls - 1, 0)
    assert target.read_bytes() == (tmp_path / "calm.safetensors").read_bytes()
    assert embed(target) == 0  # it is complete
    found = safetensors.numpy.load_file(target)[embeddings.BLOCK_EMBEDDINGS]
    np.testing.assert_array_equal(found, vectors_of(TEXTS.texts(range(23))))


def test_another_index_is_not_continued(tmp_path):
    target = tmp_path / "index.safetensors"

    def fails(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(target, fails)
    with pytest.raises(ValueError, match=r"belongs to another run \(seed was 1 and is 2\)"):
        embed(target, settings={"seed": 2})
    with pytest.raises(ValueError, match=r"records was '.*' and is '"):
        embed(target, records=Records([b"x"] * 23, "other.txt"))
    with pytest.raises(ValueError, match=r"to another run \(the shape of its embeddings"):
        open_qa.embed_blocks(target, TEXTS, vectors_of, width=4, settings={"seed": 1}, window=5)


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda texts: vectors_of(texts)[1:], r"embed returned \(4, 3\), but must return \(5, 3\)"),
        (lambda texts: vectors_of(texts) * np.nan, r"the embeddings of blocks \[0, 1, 2, 3, 4\]"),
    ],
)
def test_vectors_that_are_none_are_named(tmp_path, function, says):
    with pytest.raises(ValueError, match=says):
        embed(tmp_path / "index.safetensors", function)


@pytest.fixture
def corpus(tmp_path):
    texts = loaded().records.texts(range(BLOCKS)) * 3
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_from_a_corpus_to_an_answer(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr(folder, "embed_blocks", functools.partial(open_qa.embed_blocks, window=7))
    line = ["index", str(SOURCE), str(corpus), str(tmp_path / "index"), "--batch-size", "4"]
    assert cli.main(line) == 0
    assert "36 blocks, 36 of them embedded now" in capsys.readouterr().out
    assert cli.main(["ask", str(tmp_path / "index"), QUESTION, "who was homer ?"]) == 0
    lines = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in lines] == [QUESTION, "who was homer ?"]
    assert lines[0].keys() == {"question", "answer", "score", "block_id", "text"}
    qa = OpenQA.from_pretrained(tmp_path / "index")
    assert qa.embeddings.shape == (36, 6) and qa.records.values.dtype.kind == "S"
    alone = qa.embedder.apply(
        {"params": qa.params["embedder"]}, **qa.tokenizer([lines[0]["text"]], return_tensors="np")
    ).projected_score
    stored = np.asarray(qa.embeddings[lines[0]["block_id"] : lines[0]["block_id"] + 1])
    np.testing.assert_allclose(stored, alone, rtol=1e-5, atol=1e-5)


def test_an_index_is_read_by_whom_the_umask_lets(tmp_path, corpus):
    open_qa.build_index(SOURCE, open_qa.open_records(corpus), tmp_path / "index", progress=False)
    modes = {file.stat().st_mode for file in (tmp_path / "index").iterdir()}
    assert modes == {corpus.stat().st_mode}


def test_scores_that_are_no_numbers_are_no_answer():
    broken = loaded().embeddings[:] * np.where(np.arange(BLOCKS) == 4, np.nan, 1)[:, None]
    search = open_qa.device_search(broken)
    with pytest.raises(ValueError, match=r"the best score of 'who built .*' is nan: parameters or"):
        dataclasses.replace(loaded(), embeddings=broken, search=search).answer(QUESTION)


def test_training_names_answers_and_losses_that_are_none():
    for answers in ([], "homer"):
        with pytest.raises(
            ValueError, match=r"example 0, 'who .*the answers are .*a list of texts"
        ):
            open_qa.finetune(loaded(), [(QUESTION, answers)], optax.sgd(0.1), steps=1)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1; lower"):
        rate = optax.sgd(float("nan"))
        open_qa.finetune(loaded(), [(QUESTION, ["eiffel"])], rate, steps=2)
    encoder, _ = lsg_flax.from_pretrained(GOLDEN / "realm_knowledge_augmented_encoder")
    models = open_qa.Pretraining(loaded().embedder, encoder, loaded().tokenizer, loaded().records)
    with pytest.raises(ValueError, match="ids up to 67, but the model has vocab_size=31"):
        open_qa.pretrain(models, {}, ["the Eiffel Tower"], optax.sgd(0.1), steps=1)


def test_questions_and_pairs_that_do_not_fit_are_named(copied):
    ids, mask, types = question_of(QUESTION)
    for arrays in ((ids, mask[:, 1:], types), (ids + 0.5, mask, types)):
        with pytest.raises(ValueError, match="ids must be integers, and all three must have one"):
            loaded()(*arrays)
    with pytest.raises(ValueError, match="reader_seq_len=3 leaves no token of a block"):
        OpenQA.from_pretrained(with_config(copied, reader_seq_len=3)).answer(QUESTION)
    with pytest.raises(ValueError, match="max_span_width=65 is more than the 64 tokens"):
        OpenQA.from_pretrained(with_config(copied, reader_seq_len=30, max_span_width=65))


def test_published_records_and_embeddings_go_along(tmp_path, capsys):
    np.save(tmp_path / "pickled.npy", objects(*loaded().records.values), allow_pickle=True)
    line = ["index", str(SOURCE), str(tmp_path / "pickled.npy"), str(tmp_path / "index")]
    assert cli.main([*line, "--keep-embeddings"]) == 2
    assert "never unpickled" in capsys.readouterr().err
    assert cli.main([*line, "--keep-embeddings", "--unpickle-records"]) == 0
    assert_recorded(OpenQA.from_pretrained(tmp_path / "index"), recorded(), 3)


def test_what_cannot_be_indexed_is_named(tmp_path, corpus, copied):
    records = open_qa.open_records(corpus)
    with pytest.raises(ValueError, match=r"embeddings of 12 blocks, but .* 36 blocks"):
        open_qa.build_index(SOURCE, records, tmp_path / "index", keep_embeddings=True)
    with pytest.raises(ValueError, match=r"holds \['model.safetensors'\], which would be read"):
        open_qa.build_index(SOURCE, records, copied, progress=False)
    with pytest.raises(ValueError, match=r"but must have those of embedder and reader"):
        open_qa.build_index(GOLDEN / "bert_base", records, tmp_path / "index")


# ---------------------------------------------------------------------------------------- bad input


def test_parts_that_do_not_fit_are_named(copied, tmp_path):
    np.save(copied / "block_records.npy", np.array([b"one", b"two"]))
    with pytest.raises(ValueError, match=r"has 2 blocks .* \(12, 6\).*lsg-flax index"):
        OpenQA.from_pretrained(copied)
    np.save(copied / "block_records.npy", objects(b"one"), allow_pickle=True)
    with pytest.raises(ValueError, match=r"never unpickled"):
        OpenQA.from_pretrained(copied)
    (copied / "block_records.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"block_records.npy is no file"):
        OpenQA.from_pretrained(copied)
    with pytest.raises(ValueError, match=r"has no tensor 'block_emb'"):
        OpenQA.from_pretrained(GOLDEN / "bert_base")


def test_a_tokenizer_of_another_vocabulary_is_named(copied):
    with (copied / "vocab.txt").open("a") as file:
        file.write("".join(f"w{n}\n" for n in range(9)))
    (copied / "tokenizer.json").unlink()
    says = r"ids up to \d+, but the model has vocab_size=\d+.*another"
    with pytest.raises(ValueError, match=says):
        OpenQA.from_pretrained(copied)


def test_a_vocabulary_alone_is_a_tokenizer(copied):
    """As in the published folders, whose class newer versions of transformers lack."""
    (copied / "tokenizer.json").unlink()
    again = hub.read_tokenizer(copied)
    assert again([QUESTION])["input_ids"] == loaded().tokenizer([QUESTION])["input_ids"]


def test_beams_that_do_not_fit_are_named(copied):
    given = (*question_of(QUESTION), [[26]])
    qa = OpenQA.from_pretrained(with_config(copied, searcher_beam_size=13))
    qa(*given)
    with pytest.raises(ValueError, match=r"beam of 13 blocks does not fit an index of 12"):
        qa(*given, train=True)
    qa = OpenQA.from_pretrained(with_config(copied, searcher_beam_size=2))
    with pytest.raises(ValueError, match=r"searcher_beam_size=2 is less than reader_beam_size=3"):
        qa(*given, train=True)
    with pytest.raises(ValueError, match=r"reader_seq_len=99 is more than the 64 tokens"):
        OpenQA.from_pretrained(with_config(copied, reader_seq_len=99))


@pytest.mark.parametrize(
    "text, ids, answers, says",
    [
        ("", None, None, "the question has only 2 special tokens"),
        ("who ? " * 40, None, None, r"\(1, 82\) must be one question.* at most 64 tokens"),
        ("who ?", [[2, 9], [2, 9]], None, r"\(2, 2\) must be one question"),
        ("who ?", [[2, 999, 3]], None, r"input_ids are in 2..999"),
        ("who ?", None, [[5], [5, 6, 7, 8, 9, 10]], r"answers have \[1, 6\].*max_span_width=5"),
        ("who ?", None, [[5], []], r"answers have \[1, 0\] tokens; give at least one"),
        ("who ?", None, [], r"answers have \[\] tokens; give at least one"),
    ],
)
def test_questions_that_cannot_be_answered_are_named(text, ids, answers, says):
    given = question_of(text) if ids is None else [np.array(ids)]
    with pytest.raises(ValueError, match=says):
        loaded()(*given, answer_ids=answers)


def test_places_of_answers():
    """Between the first two [SEP] alone, answers in their order, -1 behind the last."""
    ids = np.array([[2, 5, 6, 3, 5, 6, 5, 6, 3, 5, 6], [2, 9, 3, 6, 9, 9, 9, 9, 3, 0, 0]])
    found = pairs.block_has_answer(ids, [[6], [5, 6], [1] * 20], sep=3)
    assert found.has_answers.tolist() == [True, True]
    assert found.start_positions.tolist() == [[5, 7, 4, 6], [3, -1, -1, -1]]
    assert found.end_positions.tolist() == [[5, 7, 5, 7], [3, -1, -1, -1]]
    none = pairs.block_has_answer(ids, [[8]], sep=3)
    assert not none.has_answers.any() and none.start_positions.shape == (2, 0)


# ---------------------------------------------------------------------------------------- training

EXAMPLES = [
    (QUESTION, ["eiffel"]),
    ("what was the song by dante ?", ["the song of florence", "king"]),
    ("who was in leipzig ?", ["bach found a king in"]),
]


def of_embedder(params) -> np.ndarray:
    """The blocks' embeddings by these parameters."""
    embedder = open_qa.BlockEmbedder(loaded().embedder, params, loaded().tokenizer)
    return embedder(loaded().records.texts(range(BLOCKS)))


def test_training_teaches_an_answer():
    """Through reader and embedder; the index stays, as in the paper's fine-tuning."""
    qa, losses = open_qa.finetune(loaded(), EXAMPLES[:1], optax.adam(1e-2), steps=18)
    first = loaded()(*question_of(QUESTION), answer_ids=[[26]], train=True)
    np.testing.assert_allclose(losses[0], first.reader_output.loss, rtol=1e-5)
    assert losses[-1] < losses[0] / 2
    assert loaded().answer(QUESTION).answer != "eiffel" == qa.answer(QUESTION).answer
    before, now = (x.params["embedder"]["head"]["dense"]["kernel"] for x in (loaded(), qa))
    assert not np.array_equal(before, now) and qa.embeddings is loaded().embeddings


def test_the_index_follows_the_embedder():
    """At step 4 it is that of step 2, at any speed of the thread."""
    options = {"refresh_every": 2}
    qa, losses = open_qa.finetune(loaded(), EXAMPLES, optax.adam(1e-2), steps=5, **options)
    until_2, _ = open_qa.finetune(loaded(), EXAMPLES, optax.adam(1e-2), steps=2, **options)
    wanted = of_embedder(until_2.params["embedder"])
    np.testing.assert_allclose(qa.embeddings, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(wanted - np.asarray(loaded().embeddings[:])).max() > 1e-2
    again = open_qa.finetune(loaded(), EXAMPLES, optax.adam(1e-2), steps=5, **options)
    assert again[1] == losses
    with pytest.raises(ValueError, match="refresh_every=0 must be at least 1"):
        open_qa.finetune(loaded(), EXAMPLES, optax.sgd(0.1), steps=1, refresh_every=0)


def test_examples_that_cannot_be_trained_on_are_named():
    wide = [(QUESTION, ["eiffel"]), ("who ?", ["the king of troy was found"])]
    with pytest.raises(ValueError, match=r"example 1, 'who \?': the answers have \[6\]"):
        open_qa.finetune(loaded(), wide, optax.sgd(0.1), steps=2)
    with pytest.raises(ValueError, match="there are no examples"):
        open_qa.finetune(loaded(), [], optax.sgd(0.1), steps=2)


def test_salient_spans_are_names_dates_and_numbers():
    text = "The song was by Homer of Troy in 1432. Dante Alighieri wrote on 12.5.1302 and It is so."
    found = [text[slice(*span)] for span in open_qa.salient_spans(text)]
    assert found == ["Homer of Troy", "1432", "Dante Alighieri", "12.5", "1302", "It"]
    assert open_qa.salient_spans("The poet wrote. He was a king.") == []


@functools.cache
def pretraining():
    qa = loaded()
    encoder = lsg_flax.Model(
        qa.config.with_overrides(num_candidates=3), "knowledge_augmented_encoder"
    )
    params = encoder.init(jax.random.key(0), **encoder.example_inputs())["params"]
    models = open_qa.Pretraining(qa.embedder, encoder, qa.tokenizer, qa.records)
    return models, {"embedder": qa.params["embedder"], "encoder": params}


def test_masked_spans_beside_candidates():
    models, params = pretraining()
    text = "the tower was built by Eiffel in Paris"
    example = models.example(text, (23, 29), ["the river", "eiffel built the tower"])
    decoded = [models.tokenizer.decode(ids) for ids in example["encoder"]["input_ids"][0]]
    assert all(
        row.startswith("[CLS] the tower was built by [MASK] in paris [SEP]") for row in decoded
    )
    labels = example["encoder"]["labels"][0]
    assert models.tokenizer.decode(labels[labels >= 0]) == "eiffel"
    np.testing.assert_array_equal(example["encoder"]["mlm_mask"][0], labels >= 0)
    gradients = jax.grad(models.loss)(params, example)
    for name in ("embedder", "encoder"):  # candidates too are embedded anew
        assert max(np.abs(g).max() for g in jax.tree.leaves(gradients[name])) > 1e-6
    with pytest.raises(ValueError, match="must fit 64 tokens beside a block"):
        models.example("the tower " * 40 + "by Eiffel", (403, 409), [])


def test_pretraining_learns_what_is_masked():
    models, params = pretraining()
    texts = ["the tower was built by Eiffel in Paris", "a king", "the song was by Homer"]
    options = {"steps": 24, "refresh_every": 8}
    found, losses = open_qa.pretrain(models, params, texts, optax.adam(1e-2), **options)
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])
    assert not np.allclose(of_embedder(found["embedder"]), of_embedder(params["embedder"]))
    with pytest.raises(ValueError, match="none of 1 texts has a name, date or number"):
        open_qa.pretrain(models, params, ["a king"], optax.sgd(0.1), steps=1)
