"""Answers to questions as texts: an evaluation scores what the pipeline answers."""

import json
import pathlib
import re
import shlex
import shutil

import jax
import pytest
from tiny_run import save_tiny, texts

import lsg_flax
from lsg_flax import cli, data, hub
from lsg_flax.training import Settings, evaluate_files, finetune
from lsg_flax.training.answers import text_scorer
from lsg_flax.training.metrics import LONGEST_ANSWER, judge
from lsg_flax.training.scores import answer_scores

LENGTH, STRIDE = 16, 4


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A model with a head whose answers differ."""
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("asked")
    with pytest.warns(UserWarning, match="weights for task"):
        model, params = lsg_flax.from_pretrained(save_tiny(plain), "question_answering")
    params = jax.tree.map(lambda x: 6 * x, params)
    lsg_flax.save_pretrained(folder, model, params, hub.read_tokenizer(plain))
    return folder


def questions(*, empty: bool) -> list[dict]:
    """Contexts of several windows, with one or two answers each, and maybe some without."""
    rows = []
    for number, words in enumerate(texts(3, 14, least=5, most=40)):
        context = " ".join(words)
        right = [" ".join(words[a : a + 5]) for a in (number % 3, len(words) // 2)]
        right = [] if empty and number % 3 == 0 else right[: 1 + number % 2]
        answers = {"text": right, "answer_start": [context.index(text) for text in right]}
        rows.append({"question": "w5 w6", "context": context, "answers": answers})
    return rows


def write(folder, rows: list[dict]) -> str:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def settings_of(model, file: str, folder, **options) -> Settings:
    options |= {"stride": STRIDE, "max_length": LENGTH, "devices": 1, "cache": str(folder / "c")}
    options |= {"batch_size": 4, "buckets": (12, LENGTH)}
    return Settings.for_data(model=str(model), task="question_answering", data=file, **options)


@pytest.mark.parametrize("empty", [False, True])
def test_an_evaluation_scores_the_answers_of_the_pipeline(asked, tmp_path, empty):
    rows = questions(empty=empty)
    report = evaluate_files(settings_of(asked, write(tmp_path, rows), tmp_path), progress=False)
    ask = lsg_flax.pipeline(
        "question-answering",
        str(asked),
        buckets=(12, LENGTH),
        max_answer_len=LONGEST_ANSWER,
        max_seq_len=LENGTH,
        doc_stride=STRIDE,
        handle_impossible_answer=empty,
    )
    given = [ask(question=row["question"], context=row["context"])["answer"] for row in rows]
    expected = answer_scores(given, [row["answers"]["text"] for row in rows])
    assert report.rows > 2 * len(rows)  # windows
    assert {name: report.scores[name] for name in expected} == pytest.approx(expected)
    assert 0 < expected["f1"] < 1 and len(set(given)) > 4


def test_a_run_scores_as_evaluate_does(asked, tmp_path):
    file = write(tmp_path, questions(empty=True))
    given = {"output": str(tmp_path / "out"), "steps": 1, "learning_rate": 1e-3}
    settings = settings_of(asked, file, tmp_path, **given)
    run = finetune(settings, progress=False)
    report = evaluate_files(settings_of(run.output, file, tmp_path), progress=False)
    assert run.scores == pytest.approx({f"eval_{n}": v for n, v in report.scores.items()})


PAGE = pathlib.Path(__file__).parent.parent / "docs" / "training.md"


def test_the_documented_command_says_what_stands_there(asked, tmp_path, monkeypatch, capsys):
    section = PAGE.read_text().partition("### Answers to questions")[2]
    command, answer = re.findall(r"```\w*\n(.*?)```", section, flags=re.DOTALL)[:2]
    write(tmp_path, questions(empty=True))
    shutil.copytree(asked, tmp_path / "asked")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main([*shlex.split(command)[1:], "--devices", "1"]) == 0
    assert capsys.readouterr().out == answer


def test_words_are_whole_and_no_answer_is_one(tmp_path, monkeypatch):
    """A model by hand: answers begin at "##like" and end at "dogs"; else there is none."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "un", "##like", "##ly", "dogs"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "sat"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = hub.read_tokenizer(tmp_path)
    assert tokenizer is not None
    right = {"text": ["sat", "Unlikely Dogs"], "answer_start": [14, 0]}
    rows = [{"question": "who", "context": "Unlikely Dogs sat", "answers": right}]
    nothing = {"text": [], "answer_start": []}
    rows += [{"question": "who", "context": "sat sat who", "answers": nothing}]
    options = data.DataOptions("question_answering", LENGTH, stride=0)
    where = {"tokenizer": tokenizer, "cache": tmp_path / "c", "progress": False}
    read = data.load_examples(write(tmp_path, rows), options, **where)

    def apply(model, variables, input_ids, **inputs):
        none = 5.0 * (input_ids == words.index("[CLS]"))
        start, end = (none + 9.0 * (input_ids == words.index(w)) for w in ("##like", "dogs"))
        return lsg_flax.ModelOutput(start_logits=start, end_logits=end)

    monkeypatch.setattr(lsg_flax.Model, "apply", apply)
    model = lsg_flax.Model(lsg_flax.EncoderConfig(), "question_answering")
    batches = data.eval_batches(read, batch_size=2, buckets=(LENGTH,))
    found = judge(model, {}, batches, scorer=text_scorer(model, read, tokenizer)).scores
    assert (found["eval_exact_match"], found["eval_f1"]) == (1.0, 1.0)
    assert read.info(0).words[3:7].tolist() == [[0, 8]] * 3 + [[9, 13]]
