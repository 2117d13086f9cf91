"""The examples and the benchmark of summarisation on the papers of aclsum and tiny models."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from golden_data import GOLDEN
from tiny_tokenizers import write_words

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def writers(tmp_path):
    """Folders of a tiny BART and a tiny LSG-BART with tokenizers."""
    names = {"plain": "bart_plain_conditional_generation", "lsg": "bart_conditional_generation"}
    copies = {kind: shutil.copytree(GOLDEN / n, tmp_path / kind) for kind, n in names.items()}
    return {kind: write_words(folder) for kind, folder in copies.items()}


def test_papers_are_read_whole_and_apart_from_their_abstracts(script):
    read = script("aclsum_papers").read_papers
    papers = {split: read(split) for split in ("train", "validation", "test")}
    assert {split: len(of) for split, of in papers.items()} == {
        **{"train": 100, "validation": 50, "test": 100}
    }
    every = [paper for of in papers.values() for paper in of]
    assert len({paper.name for paper in every}) == 250
    assert np.median([len(paper.text.split()) for paper in every]) == 4393.5
    assert np.median([len(paper.abstract.split()) for paper in every]) == 121
    assert all(paper.title and "\n" not in paper.abstract for paper in every)
    assert not any(paper.abstract in paper.text for paper in every)
    assert read("test", 2) == papers["test"][:2]
    assert papers["test"][0].row.keys() == {"id", "text", "summary"}
    with pytest.raises(ValueError, match="split='val' must be one of train, validation, test"):
        read("val")


def test_a_package_that_is_not_there_is_named(script):
    with pytest.raises(SystemExit, match="nowhere is not installed: pip install --no-deps no-w"):
        script("at_hand").package_folder("nowhere", "no-where")


def test_sentences_end_where_they_do(script):
    baselines = script("summary_baselines")
    known = ["We follow Smith et al. (2018). As Jones et al. show, Lee et al. are right."] * 9
    split = baselines.sentence_splitter(known)
    assert split("See Poe et al. (2001). It is so.\nNew line") == [
        *("See Poe et al. (2001).", "It is so.", "New line")
    ]


def test_central_sentences_are_near_the_mean_and_in_order(script):
    baselines = script("summary_baselines")
    apart = "Bananas grow quickly in tropical rain."
    about = [f"Attention {verb} long documents with blocks." for verb in ("reads", "sees", "cuts")]
    document = [about[0], apart, about[1], "Too short.", about[2], about[0]]
    weights = baselines.word_weights(document)
    assert baselines.central(document, weights, words=18) == about
    assert len(baselines.central(document, weights, words=1)) == 1
    assert baselines.central(["Too short."], weights, words=9) == ["Too short."]
    assert baselines.up_to(7, about) == about[:2] and baselines.lead(about, 2) == about[:2]


def test_a_tokenizer_is_as_barts(script):
    made = script("small_bart").train_tokenizer(["a naïve text " * 9], vocabulary=300, length=64)
    ids = made("a naïve 東 text")["input_ids"]
    assert (ids[0], ids[-1]) == (made.bos_token_id, made.eos_token_id) == (0, 2)
    assert (made.pad_token_id, made.unk_token_id, made.mask_token_id) == (1, 3, 4)
    assert made.decode(ids, skip_special_tokens=True) == "a naïve 東 text"
    assert len(made) <= 300 and made.model_max_length == 64


def test_summarize_writes_a_line_per_document(script, writers, tmp_path, capsys):
    (tmp_path / "papers").mkdir()
    for name in "ba":
        (tmp_path / "papers" / f"{name}.txt").write_text("w5 w6 w7\nw8 " * 40)
    arguments = [
        "--model",
        writers["plain"],
        "--input",
        tmp_path / "papers",
        "--output",
        tmp_path / "out",
    ]
    arguments += ["--max-length", 8, "--num-beams", 2]
    module, arguments = script("summarize"), [str(a) for a in arguments]
    found = module.main(arguments)
    assert [line["id"] for line in found] == ["a.txt", "b.txt"] and found[0]["summary"]
    assert [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()] == found
    assert f"a.txt: {found[0]['summary']}" in capsys.readouterr().out
    options = [module.parse([*arguments, *more]) for more in ((), ("--convert", "96"))]
    assert [module.summarizer(str(writers["plain"]), o).model.max_length for o in options] == [
        48,
        96,
    ]


@pytest.mark.slow
def test_summarize_runs_without_anything_given(script, capsys):
    found = script("summarize").main(["--count", "1", "--max-length", "6", "--num-beams", "1"])
    assert len(found) == 1 and found[0]["id"] == "E09-1056"
    assert "untrained" in capsys.readouterr().out


@pytest.mark.slow
def test_fine_tuning_scores_a_model_beside_the_baselines(script, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = "--short-steps 1 --steps 2 --train 6 --validation 2 --test 3 --written 1"
    arguments += " --batch-size 2 --width 32 --max-length 256 --target-length 16"
    scores = script("finetune_summarization").main(arguments.split())
    assert next(iter(scores)) == "LSG-BART after 2 steps" and len(scores) == 5
    values = np.array([[*of.values()] for of in scores.values()])
    assert values.shape == (5, 4) and (values >= 0).all() and (values[2:, 0] > 0.1).all()
    assert "ROUGE on 3 test papers" in capsys.readouterr().out


# --------------------------------------------------------------------- beside published numbers
@pytest.fixture
def benchmark(script, writers, tmp_path, monkeypatch):
    """Runs it on six short papers and a tiny model in place of the published one; `published` are
    the scores on its card."""
    module = script("rouge_arxiv")
    words = np.random.default_rng(0).integers(5, 31, (6, 30))
    rows = [
        {"article": " ".join(f"w{i}" for i in row), "abstract": " ".join(f"w{i}" for i in row[:20])}
        for row in words
    ]
    data = tmp_path / "papers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments, published=(0.0,) * 4, model=writers["lsg"], file=data):
        row = module.Published(48, {"block_size": 8, "sparsity_type": "none"}, published)
        monkeypatch.setitem(module.PUBLISHED, "local-128", row)
        given = ["--model", model, "--data", file, "--output", tmp_path / "out", "--num-beams", 2]
        given += ["--min-length", 2, "--max-length", 12, *arguments]
        return module.main([str(a) for a in given])

    return run


@pytest.mark.slow
def test_published_scores_are_compared(benchmark, capsys, tmp_path):
    assert not benchmark(published=(99.0,) * 4)
    out = capsys.readouterr().out
    assert out.count("differs") == 4 and "6 papers" in out
    means = [float(line.split("│")[2]) for line in out.splitlines() if "rouge" in line]
    assert len(means) == 4 and means[0] > 0
    assert benchmark(published=tuple(means))
    assert capsys.readouterr().out.count("agrees") == 4
    assert len((tmp_path / "out" / "local-128.jsonl").read_text().splitlines()) == 6
    benchmark("--documents", 2)
    assert "2 papers" in capsys.readouterr().out


def test_scores_have_the_interval_of_their_mean(script):
    module, scores = script("rouge_arxiv"), np.random.default_rng(1).normal(40, 8, (400, 4))
    low, high = module.interval(scores)
    error = scores.std(axis=0) / 20
    np.testing.assert_allclose(low, scores.mean(axis=0) - 1.96 * error, rtol=0.01)
    np.testing.assert_allclose(high, scores.mean(axis=0) + 1.96 * error, rtol=0.01)


def test_published_rows_are_patterns_that_exist(script):
    from lsg_flax import LSGConfig

    module = script("rouge_arxiv")
    patterns = [LSGConfig(**dict(row.attention)) for row in module.PUBLISHED.values()]
    assert [pattern.is_sparse for pattern in patterns] == [False, False, *[True] * 5, False]


def test_what_is_missing_is_said(benchmark, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="nobody/nothing is neither a local folder nor a reposi"):
        benchmark(model="nobody/nothing")
    with pytest.raises(SystemExit):
        benchmark(file=tmp_path / "none.jsonl")
    assert "none.jsonl is no file" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text('{"article": "w5", "summary": "w6"}\n')
    with pytest.raises(SystemExit, match="has no text as 'article' and 'abstract', but "):
        benchmark(file=other)
