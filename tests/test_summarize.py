"""Pipelines that write, and `lsg-flax summarize`: what `lsg_flax.generate` says by hand, one
compilation for many texts, files that continue after a stop, and what is refused. tests/parity
compares with transformers' own pipelines."""

import json
import shutil

import numpy as np
import pytest
import transformers
from golden_data import GOLDEN
from tiny_tokenizers import write_words

import lsg_flax
from lsg_flax import cli, hub
from lsg_flax.generation import loop
from lsg_flax.models import EncoderConfig
from lsg_flax.pipelines import Summarization, predict_file
from lsg_flax.pipelines.generate import TextProgram

LIMIT = 48
generator = np.random.default_rng(0)
TEXTS = [" ".join(f"w{i}" for i in generator.integers(5, 31, n)) for n in (3, 12, 30, 46, 7, 9)]
# Without these the tiny models repeat themselves, whatever the text.
OPTIONS = {
    **{"num_beams": 3, "max_length": 12, "min_length": 4, "no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": 1,
}


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """Folders of BARTs with a tokenizer."""
    made = {"lsg": "bart_conditional_generation", "plain": "bart_plain_conditional_generation"}
    folders = {kind: tmp_path_factory.mktemp("writers") / kind for kind in made}
    for kind, name in made.items():
        shutil.copytree(GOLDEN / name, folders[kind])
        write_words(folders[kind])
    return folders


def by_hand(folder, text, prefix="", **options):
    """The text of one call of `generate`, padded as the pipeline does."""
    model, params = lsg_flax.from_pretrained(folder)
    tokenizer = hub.read_tokenizer(folder)
    encoded = tokenizer(prefix + text, padding="max_length", max_length=LIMIT)
    ids, mask = (np.array([encoded[name]]) for name in ("input_ids", "attention_mask"))
    tokens = lsg_flax.generate(model, params, ids, mask, **options)
    return [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in tokens]


def change_config(folder, target, **fields):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


@pytest.mark.parametrize(
    ("kind", "task", "key"),
    [
        ("lsg", "summarization", "summary_text"),
        ("plain", "text2text-generation", "generated_text"),
        ("plain", "translation", "translation_text"),
    ],
)
def test_the_answer_is_what_generate_writes(writers, kind, task, key):
    run = lsg_flax.pipeline(task, writers[kind], batch_size=4, **OPTIONS)
    expected = [by_hand(writers[kind], text, **OPTIONS)[0] for text in TEXTS]
    assert run(TEXTS) == [{key: text} for text in expected]
    assert len(set(expected)) > 3
    assert run(TEXTS[0]) == [{key: expected[0]}] and run([TEXTS[1]]) == [{key: expected[1]}]
    assert list(run(iter(TEXTS[:2]))) == run(TEXTS[:2]) and run([]) == []


def test_new_texts_compile_nothing(writers):
    run = lsg_flax.pipeline(
        "summarization", writers["plain"], batch_size=4, buckets=(16, LIMIT), **OPTIONS
    )
    run(TEXTS)
    compiled, counted = loop.decode._cache_size(), run.compilations
    others = [" ".join(["w9"] * n) for n in range(1, LIMIT - 2)]
    assert len(run(others)) == len(others)
    assert loop.decode._cache_size() == compiled and run.compilations == counted
    run(others[0])  # alone, which is another program
    assert loop.decode._cache_size() == compiled + 1 and run.compilations == counted + 1


def test_options_of_a_call_come_before_those_of_the_pipeline(writers):
    run, folder = lsg_flax.pipeline("summarization", writers["plain"], **OPTIONS), writers["plain"]
    two = {**OPTIONS, "num_return_sequences": 2}
    texts = by_hand(folder, TEXTS[0], **two)
    records = [{"summary_text": text} for text in texts]
    assert run(TEXTS[0], num_return_sequences=2) == records
    assert run(TEXTS[:1], num_return_sequences=2) == [records]
    fewer = {name: OPTIONS[name] for name in OPTIONS if name not in ("max_length", "min_length")}
    (text,) = by_hand(folder, TEXTS[0], **fewer, max_new_tokens=3)
    assert run(TEXTS[0], max_new_tokens=3, min_length=None) == [{"summary_text": text}]
    drawn = {"do_sample": True, "num_beams": 1, "temperature": 3.0}
    one, other = (run(TEXTS, **drawn, seed=seed) for seed in (0, 1))
    assert one == run(TEXTS, **drawn, seed=0) != other


def test_a_text_is_cut_on_request(writers):
    run = lsg_flax.pipeline("summarization", writers["plain"], **OPTIONS)
    cut = " ".join((TEXTS[3] + " w5").split()[: LIMIT - 2])
    with pytest.raises(ValueError, match=r"has 62 tokens, more than 48.*truncation=True"):
        run(TEXTS[3] + " w5" * 14)
    assert run(TEXTS[3] + " w5" * 14, truncation=True) == run(cut)


def test_spaces_are_cleaned_up_on_request(writers):
    tokenizer = hub.read_tokenizer(writers["plain"])
    given = {}
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: given.update(options) or decode(ids, **options)
    pair = lsg_flax.from_pretrained(writers["plain"])
    run = lsg_flax.pipeline("summarization", pair, tokenizer, **OPTIONS)
    run(TEXTS[0])
    assert given == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    run(TEXTS[0], clean_up_tokenization_spaces=True)
    assert given["clean_up_tokenization_spaces"] is True


def test_a_checkpoint_says_prefix_and_options_for_a_task(writers, tmp_path):
    params = {"summarization": {**OPTIONS, "length_penalty": 2.0, "prefix": "w5 w6 "}}
    folder = change_config(
        writers["plain"], tmp_path / "told", task_specific_params=params, prefix="w7 "
    )
    (text,) = by_hand(writers["plain"], TEXTS[1], "w5 w6 ", **OPTIONS, length_penalty=2.0)
    run = lsg_flax.pipeline("summarization", folder)
    assert run(TEXTS[1]) == [{"summary_text": text}]
    # The caller's one beam leaves the checkpoint's length_penalty without use, which is no error.
    rest = {name: value for name, value in OPTIONS.items() if name != "num_beams"}
    (text,) = by_hand(writers["plain"], TEXTS[1], "w5 w6 ", **rest)
    assert run(TEXTS[1], num_beams=1) == [{"summary_text": text}]
    (text,) = by_hand(writers["plain"], TEXTS[1], "w7 ", **OPTIONS)
    other = lsg_flax.pipeline("text2text-generation", folder, **OPTIONS)
    assert other(TEXTS[1]) == [{"generated_text": text}]
    folder = change_config(writers["plain"], tmp_path / "bad", task_specific_params=["prefix"])
    with pytest.raises(ValueError, match=r"task_specific_params=\['prefix'\] in config.json must"):
        lsg_flax.pipeline("summarization", folder)


def test_a_translation_has_languages_where_the_tokenizer_has():
    pair = lsg_flax.from_pretrained(GOLDEN / "mbart_conditional_generation")
    tokenizer = transformers.MBartTokenizer()
    assert len(tokenizer) <= pair[0].config.vocab_size
    run = lsg_flax.pipeline(
        "translation",
        pair,
        tokenizer,
        src_lang="de_DE",
        tgt_lang="ro_RO",
        max_length=5,
        decoder_start_token_id=2,
    )
    sequences = []
    tokenizer.decode = lambda ids, **_: sequences.append(ids) or "text"
    assert run("<mask>") == [{"translation_text": "text"}]
    assert tokenizer.src_lang == "de_DE"
    assert sequences[0][1] == tokenizer.convert_tokens_to_ids("ro_RO")
    with pytest.raises(ValueError, match=r"tgt_lang='xx' *: both must be languages.*'ro_RO'"):
        run("<mask>", tgt_lang="xx")
    with pytest.raises(ValueError, match="src_lang=None, tgt_lang=None: both must be"):
        lsg_flax.pipeline("translation", pair, tokenizer)


def test_a_checkpoint_has_settings_for_pairs_of_languages(writers, tmp_path):
    params = {"translation_en_to_ro": OPTIONS | {"prefix": "w5 "}, "summarization": {}}
    folder = change_config(writers["plain"], tmp_path / "one", task_specific_params=params)
    (text,) = by_hand(writers["plain"], TEXTS[0], "w5 ", **OPTIONS)
    for task, options in (
        ("translation", {}),
        ("translation_en_to_ro", {}),
        ("translation", {"src_lang": "en_XX", "tgt_lang": "ro_RO"}),
    ):
        assert lsg_flax.pipeline(task, folder, **options)(TEXTS[0]) == [{"translation_text": text}]
    params["translation_en_to_de"] = {}
    folder = change_config(writers["plain"], tmp_path / "two", task_specific_params=params)
    lsg_flax.pipeline("translation_en_to_de", folder)
    with pytest.raises(ValueError, match=r"settings for .*en_to_ro.*: give src_lang and tgt_lang"):
        lsg_flax.pipeline("translation", folder)
    with pytest.raises(ValueError, match=r"src_lang='en', tgt_lang='fr': .* has no languages"):
        lsg_flax.pipeline("translation_en_to_fr", folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam": 3}, r"Summarization has no options \['num_beam'\]; it has .*'num_beams'"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 is more than"),
        ({"length_penalty": 2.0}, "need num_beams > 1"),
        ({"min_length": 30}, "min_length=30 is more than the 20 tokens"),
        ({"max_length": 400}, r"max_length=400 .* this checkpoint has 48"),
        ({"max_length": 0}, "max_length=0 must be"),
        ({"max_length": 9, "max_new_tokens": 9}, "are two limits: give one of them"),
        ({"src_lang": "en_XX"}, r"no options \['src_lang'\]"),
        (
            {"task": "translation", "src_lang": "en_XX"},
            "has no languages, and .*; leave them",
        ),
        ({"task": "fill-mask"}, "fill-mask needs a model with the task masked_lm or pretraining"),
        ({"buckets": (64,)}, r"buckets=\(64,\) must be lengths in 1..48"),
    ],
)
def test_what_does_not_fit(writers, options, message):
    task = options.pop("task", "summarization")
    with pytest.raises(ValueError, match=message):
        lsg_flax.pipeline(task, writers["plain"], **options)


def test_a_tokenizer_of_another_model(writers, tmp_path):
    """Its ends are others, or there are none; or it has more words than the model."""
    source = writers["plain"]
    for fields, message in (
        (
            {"pad_token": "</s>"},
            r"pad_token is '</s>' with the id 2, but config.json has pad_token_i",
        ),
        (
            {"eos_token": None},
            "eos_token is None with the id None, .* do not belong together; give",
        ),
    ):
        tokenizer = hub.read_tokenizer(source)
        for name, token in fields.items():
            setattr(tokenizer, name, token)
        with pytest.raises(ValueError, match=message):
            lsg_flax.pipeline("summarization", lsg_flax.from_pretrained(source), tokenizer)
    tokenizer = hub.read_tokenizer(write_words(tmp_path, size=40))
    run = lsg_flax.pipeline("summarization", lsg_flax.from_pretrained(source), tokenizer, **OPTIONS)
    with pytest.raises(ValueError, match=r"input_ids in 0..35, but vocab_size=31 .*fit together"):
        run("w5 w35")


def test_a_model_of_another_task():
    model = lsg_flax.Model(EncoderConfig(vocab_size=31), "masked_lm")
    message = "summarization needs a model with the task conditional_generation, but this model's"
    with pytest.raises(ValueError, match=message):
        lsg_flax.pipeline("summarization", (model, {}))


# --------------------------------------------------------------------------------------- commands

FLAGS = [
    *("--num-beams", "3", "--max-length", "12", "--min-length", "4", "--no-repeat-ngram-size", "1"),
    *("--length-penalty", "2.0", "--batch-size", "2"),
]
GIVEN = {n: v for n, v in OPTIONS.items() if n != "encoder_no_repeat_ngram_size"}


def run(capsys, *arguments):
    code = cli.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["jsonl", "txt", "folder"])
def test_a_summary_for_each_document(capsys, writers, tmp_path, kind):
    source, target, texts, flags = tmp_path / f"in.{kind}", tmp_path / "out.jsonl", TEXTS[:3], []
    names: list = [0, 1, 2]
    if kind == "jsonl":
        names, flags = ["a", 1, 7], ["--columns", "text=article"]
        rows = [{"id": n, "article": t, "text": 3} for n, t in zip(names, texts, strict=True)]
        source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "txt":
        source.write_text("".join(f"{text}\n" for text in texts))
    else:
        names = ["1.txt", "10.txt", "2.txt"]
        source.mkdir()
        (source / "notes.md").write_text("none of them")
        for name, text in zip(names, texts, strict=True):
            (source / name).write_text(text.replace(" ", "\n"))
    folder = writers["plain"]
    assert run(capsys, "summarize", folder, source, target, *FLAGS, *flags) == (
        0,
        f"wrote {target}: 3 documents\n",
        "",
    )
    if flags:
        old = ["--text-column", "article"]
        code, _, err = run(capsys, "summarize", folder, source, target, *FLAGS, *old)
        said = "warning: --text-column is deprecated: use --columns text=article"
        assert (code, err) == (0, f"lsg-flax: {said}\n")
    expected = [by_hand(folder, text, **GIVEN, length_penalty=2.0)[0] for text in texts]
    assert lines(target) == [{"id": n, "summary": t} for n, t in zip(names, expected, strict=True)]


def test_a_stopped_command_goes_on_and_writes_the_same_bytes(
    capsys, writers, tmp_path, monkeypatch
):
    source, target, whole = (tmp_path / name for name in ("in.txt", "out.jsonl", "whole.jsonl"))
    source.write_text("".join(f"{text}\n" for text in TEXTS * 4))
    line = ["summarize", writers["plain"], source]
    assert run(capsys, *line, whole, *FLAGS)[0] == 0
    start, started = TextProgram.start, []

    def stop(*arguments):
        started.append(1)
        if len(started) == 9:
            raise KeyboardInterrupt
        return start(*arguments)

    monkeypatch.setattr(TextProgram, "start", stop)
    assert run(capsys, *line, target, *FLAGS)[0] == 130 and not target.exists()
    partial = target.with_name("out.jsonl.partial")
    assert len(partial.read_text().splitlines()) == 8  # the first window, of 4 batches of 2
    code, _, err = run(capsys, *line, target, *FLAGS, "--num-beams", 2)
    assert code == 2 and 'answers: it was "Summarization(' in err and "--restart" in err
    code, out, _ = run(capsys, *line, target, *FLAGS)
    assert code == 0 and out == f"wrote {target}: 24 documents, 8 done before\n"
    assert target.read_bytes() == whole.read_bytes()
    assert run(capsys, *line, target, *FLAGS)[1] == f"replaced {target}: 24 documents\n"
    assert target.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"in.txt", "out.jsonl", "whole.jsonl"}


def test_a_long_document_is_cut_and_said_once(capsys, writers, tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text(f"{TEXTS[0]}\n" + "w5 w6 " * 46)
    code, _, err = run(capsys, "summarize", writers["plain"], source, target, *FLAGS)
    assert code == 0 and err.count("\n") == 1, err
    assert f"lsg-flax: 1 of 2 texts were truncated to {LIMIT} tokens, which drops " in err
    cut = " ".join(["w5 w6"] * ((LIMIT - 2) // 2))
    (text,) = by_hand(writers["plain"], cut, **GIVEN, length_penalty=2.0)
    assert lines(target)[1] == {"id": 1, "summary": text}


def test_predict_answers_with_texts(capsys, writers, tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text(TEXTS[0])
    answers = ",".join(f"{name}={value}" for name, value in GIVEN.items())
    line = ["predict", writers["plain"], source, target, "--answers", answers]
    assert run(capsys, *line)[0] == 0
    (text,) = by_hand(writers["plain"], TEXTS[0], **GIVEN)
    assert lines(target) == [{"id": 0, "answer": {"generated_text": text}}]


def test_a_mesh_writes_the_same(writers, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("".join(f"{text}\n" for text in TEXTS))
    checkpoint, written = hub.open_checkpoint(writers["plain"]), []
    for mesh in (None, lsg_flax.sharding.make_mesh(data=2, fsdp=2, devices=_devices(4))):
        target = tmp_path / f"{len(written)}.jsonl"
        predict_file(
            source,
            target,
            *checkpoint.load(mesh=mesh),
            tokenizer=checkpoint.tokenizer,
            answers=Summarization().with_options(**OPTIONS),
            batch_size=4,
            mesh=mesh,
            progress=False,
        )
        written.append(target.read_bytes())
    assert written[0] == written[1]


def _devices(count):
    return lsg_flax.sharding.jax.devices()[:count]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "summarize WRITER in.jsonl",
            "in.jsonl:2: it has ['id', 'text'] and must have text, or question",
        ),
        (
            "summarize WRITER in.jsonl --columns text=body",
            "in.jsonl:1: it has ['id', 'text'] and must have 'body', a text. Mend it, or pass --on",
        ),
        ("summarize WRITER in.txt --columns text=body", "--columns text=body is for a .jsonl"),
        ("summarize WRITER empty", "empty is not a file, nor a folder or pattern with files of"),
        ("summarize WRITER no.jsonl", "no.jsonl is no file"),
        (
            "summarize WRITER in.xml",
            "in.xml must end in .jsonl, .csv, .parquet, .txt, or be a folder",
        ),
        ("summarize WRITER papers", "or a pattern of such files; nothing is there now."),
        (
            "summarize WRITER long.txt --no-truncation",
            "more than 48, which this pipeline reads: pass --truncation",
        ),
        ("summarize WRITER in.txt --num-beams 0", "--num-beams 0 must be"),
        ("summarize WRITER in.txt --batch-size 0", "--batch-size 0 must be at least 1"),
        ("summarize WRITER in.txt --min-length 30", "--min-length 30 is more than the 20 tokens"),
        ("summarize WRITER in.txt --length-penalty 2", "need num_beams > 1"),
        (
            "summarize BERT in.txt",
            "is a masked_lm checkpoint, which cannot write summaries: give a",
        ),
        ("predict WRITER in.txt --answers num_beam=3", "num_beam"),
        ("generate WRITER in.txt", "use lsg-flax summarize MODEL INPUT OUTPUT, lsg-flax predict"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(
    capsys, writers, tmp_path, monkeypatch, command, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"id": 1, "text": "w5"}\n{"id": 2, "text": 5}\n')
    if "column" not in command:
        (tmp_path / "in.jsonl").write_text('{"text": "w5"}\n{"id": 2, "texts": 5}\n')
        says = says.replace("'text'", "'texts'")
    (tmp_path / "in.txt").write_text("w5\n")
    (tmp_path / "long.txt").write_text("w5 " * 90)
    (tmp_path / "empty").mkdir()
    places = {"WRITER": writers["plain"], "BERT": GOLDEN / "bert_to_convert_512"}
    name, model, source, *flags = command.split()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, name, places[model], source, "out.jsonl", *flags)
    assert (code, out) == (2, "") and says in err, err
    assert err.startswith("lsg-flax: error: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("always:1 broken lines")
def test_broken_texts_are_passed_over_and_named(capsys, writers, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out.jsonl"
    source.mkdir()
    (source / "a.txt").write_bytes(b"w5 w6")
    (source / "b.txt").write_bytes(b"\xff")
    (source / "c.txt").mkdir()
    code, _, err = run(capsys, "summarize", writers["plain"], source, target, *FLAGS)
    assert code == 2 and "b.txt: not valid UTF-8" in err and "--on-error skip" in err
    flags = [*FLAGS, "--on-error", "skip"]
    code, _, err = run(capsys, "summarize", writers["plain"], source, target, *flags)
    assert code == 0, err
    assert [line["id"] for line in lines(target)] == ["a.txt"]
    assert f"1 broken lines of {source} were skipped: b.txt." in err
    code, _, err = run(capsys, "summarize", writers["plain"], source, source / "o.txt", *flags)
    assert code == 2 and "o.txt would be one of the texts in" in err
