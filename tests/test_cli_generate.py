"""`lsg-flax generate`: prompts and files continued as `lsg_flax.generate` does, and bad input."""

import json
import shutil

import jax
import numpy as np
import pytest
from golden_data import GOLDEN

import lsg_flax
from lsg_flax import cli, hub

TOKENIZER, SEPARATOR = GOLDEN / "bert_to_convert_512", 3
TEXTS = ["w5 w6 w7", "w9 w8 w7 w6 w12 w11", "w13"]


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """A decoder with LSG attention and its twin with full attention."""
    made = {}
    for kind in ("lsg", "full"):
        made[kind] = folder = tmp_path_factory.mktemp("writers") / kind
        model, params = lsg_flax.from_pretrained(GOLDEN / "bert_causal_lm")
        bias = params["head"]["bias"].at[np.array([0, 1, 2, 4])].add(-50.0)  # no special token
        params = params | {"head": params["head"] | {"bias": bias}}  # but the end of a text
        if kind == "full":
            model = model.clone(config=model.config.with_overrides(lsg=None))
            embeddings = dict(params["encoder"]["embeddings"])
            del embeddings["global_embeddings"]
            params = params | {"encoder": params["encoder"] | {"embeddings": embeddings}}
        lsg_flax.save_pretrained(folder, model, params)
        for file in TOKENIZER.glob("*token*"):
            shutil.copy(file, folder)
        shutil.copy(TOKENIZER / "vocab.txt", folder)
    return made


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def by_hand(folder, text: str, **options) -> str:
    """The continuation of one prompt."""
    model, params = lsg_flax.from_pretrained(folder)
    tokenizer = hub.read_tokenizer(folder)
    ids = np.array([tokenizer(text)["input_ids"][:-1]])  # [CLS] and the words
    assert ids[0, 0] == tokenizer.cls_token_id and len(ids[0]) == 1 + len(text.split())
    tokens = lsg_flax.generate(
        model, params, ids, eos_token_id=SEPARATOR, **{"max_new_tokens": 12} | options
    )
    return tokenizer.decode(tokens[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


def test_prompts_are_continued_on_the_screen(capsys, writers):
    arguments = [writers["lsg"], "--prompt", TEXTS[0], "--max-new-tokens", 12, "--batch-size", 1]
    assert run(capsys, *arguments) == (0, by_hand(writers["lsg"], TEXTS[0]) + "\n", "")
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 9, "top_p": 0.95}
    flags = ["--do-sample", "--temperature", 1.5, "--top-k", 9, "--top-p", 0.95, "--seed", 4]
    code, out, _ = run(capsys, *arguments, "--prompt", TEXTS[1], *flags)
    # the longest first
    expected = [
        by_hand(writers["lsg"], text, key=jax.random.key(seed), **drawn)
        for text, seed in ((TEXTS[0], 5), (TEXTS[1], 4))
    ]
    assert code == 0 and out.splitlines() == expected
    assert any(expected) and run(capsys, *arguments[:-2], *flags)[1] != out


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_file_is_continued_as_each_of_its_texts(capsys, writers, tmp_path, kind):
    """In one batch, with padding on the left; with LSG attention one by one."""
    source, target = tmp_path / f"in{kind}", tmp_path / "deep" / "out.jsonl"
    names = [0, 1, 2] if kind == ".txt" else ["a", 1, 7]
    rows = [{"id": n, "text": t} for n, t in zip(names, TEXTS, strict=True)]
    lines = TEXTS if kind == ".txt" else map(json.dumps, rows)
    source.write_text("".join(f"{line}\n" for line in lines))
    folder = writers["full" if kind == ".txt" else "lsg"]
    flags = ["--max-new-tokens", 12, "--batch-size", 8 if kind == ".txt" else 1]
    code, out, err = run(capsys, folder, source, target, *flags)
    assert (code, err) == (0, "") and out == f"wrote {target}: 3 continuations\n"
    written = [json.loads(line) for line in target.read_text().splitlines()]
    expected = [by_hand(folder, text) for text in TEXTS]
    counts = [len(text.split()) for text in expected]
    assert counts == ([4, 2, 12] if kind == ".txt" else [12, 12, 11])  # where the texts end
    reasons = ["length" if count == 12 else "stop" for count in counts]
    assert written == [
        {"id": n, "text": t, "finish_reason": r}
        for n, t, r in zip(names, expected, reasons, strict=True)
    ]
    assert [p.name for p in target.parent.iterdir()] == ["out.jsonl"]
    again = run(capsys, folder, source, target, *flags)
    assert again == (0, f"replaced {target}: 3 continuations\n", "")


def test_half_precision(capsys, writers):
    code, out, _ = run(
        capsys, writers["lsg"], "--prompt", TEXTS[0], "--max-new-tokens", 3, "--dtype", "bfloat16"
    )
    assert code == 0 and out.strip()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["WRITER"], "give either --prompt TEXT, or INPUT and OUTPUT; got neither."),
        (["WRITER", "in.txt"], "or INPUT and OUTPUT; got in.txt."),
        (["WRITER", "in.txt", "o.jsonl", "--prompt", "w5"], "got in.txt o.jsonl and --prompt."),
        (
            ["WRITER", "in.pdf", "out.jsonl"],
            "in.pdf must end in .jsonl, .csv, .parquet, .txt",
        ),
        (["WRITER", "in.txt", "."], ". is a folder; give the name of a file"),
        (["WRITER", "in.txt", "out.jsonl"], "in.txt is no file"),
        (["./nowhere", "--prompt", "w5"], "./nowhere is not a folder"),
        ([GOLDEN / "bert_causal_lm", "--prompt", "w5"], "bert_causal_lm has no tokenizer; copy"),
        ([TOKENIZER, "--prompt", "w5"], "is a masked_lm checkpoint, which cannot continue texts"),
        (
            ["WRITER", "--prompt", "w5 " * 60],
            "has 61 tokens, but with --max-new-tokens 64 a prompt must have 1 to 1: this",
        ),
        (["WRITER", "--prompt", "w5", "--max-new-tokens", 0], "--max-new-tokens 0 must be at"),
        (["WRITER", "--prompt", "w5", "--batch-size", 0], "--batch-size 0 must be at least 1"),
        (
            ["WRITER", "--prompt", "w5", "--top-k", 3, "--max-new-tokens", 4],
            "need --do-sample: without",
        ),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(
    capsys, writers, tmp_path, monkeypatch, arguments, says
):
    monkeypatch.chdir(tmp_path)
    given = [writers["lsg"] if part == "WRITER" else part for part in arguments]
    code, out, err = run(capsys, *given)
    assert code == 2 and out == ""
    assert err.startswith("lsg-flax: error: ") and says in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default:1 broken lines")  # the command shows it
def test_bad_lines_and_a_failed_write_leave_the_old_file(capsys, writers, tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    target.write_text(old := '{"id": 0, "text": "old", "finish_reason": "stop"}\n')
    source.write_text('{"text": "w5"}\n{"text": 5}\n')
    code, _, err = run(capsys, writers["lsg"], source, target)
    assert code == 2 and "in.jsonl:2: its text must be a text, got 5" in err
    source.write_text('{"id": "long", "text": "' + "w5 " * 70 + '"}\n')
    code, _, err = run(capsys, writers["lsg"], source, target)
    assert code == 2 and "in.jsonl:1 has 71 tokens" in err
    assert err.rstrip().endswith("Mend it, or pass --on-error skip.")
    long, skip = source.read_text(), ["--on-error", "skip", "--max-new-tokens", 4]
    code, _, err = run(capsys, writers["lsg"], source, target, *skip[:2], "--max-new-tokens", 900)
    assert code == 2 and "a prompt must have 1 to 0" in err and target.read_text() == old
    source.write_text('{"text": "w5"}\n' + long)
    code, _, err = run(capsys, writers["lsg"], source, tmp_path / "new.jsonl", *skip)
    assert code == 0 and f"1 broken lines of {source} were skipped: 2." in err
    lines = (tmp_path / "new.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [0]
    (tmp_path / "new.jsonl").unlink()
    source.write_text('{"text": "w5"}\n')
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28)))
    code, _, err = run(capsys, writers["lsg"], source, target, "--max-new-tokens", 4)
    assert code == 2 and "28" in err and target.read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
