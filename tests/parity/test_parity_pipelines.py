"""Pipelines beside transformers' own: the same random BERTs, tokenizers, texts and options. Scores
agree to 1e-4, everything else exactly."""

import functools
import json
import os
import pathlib
import pydoc_data.topics
import subprocess
from typing import Any

import numpy as np
import pytest

import lsg_flax

HERE = pathlib.Path(__file__).parent
LIMIT = 64  # tokens that the models read
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LIMIT,
}
MASKS = {"wordpiece": "[MASK]", "byte_level": "<mask>"}
WRITTEN = ("summary_text", "generated_text", "translation_text")
ENTITIES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
TOPIC = " ".join(pydoc_data.topics.topics["assert"].split())
SHORT = "Assertions are a convenient way, says Zoë; in Python (3.11) they can be switched off."
TEXTS = [SHORT, "An assert statement!", TOPIC[:150], "Is it 42%? naïve 東京 x"]
QUESTION = "What is an assertion?"
LONG = {"question": QUESTION, "context": TOPIC[:1500]}
PAIR = {"question": QUESTION, "context": SHORT}
WHOLE = {"truncation": True}  # transformers cuts token classification by itself


def labels(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


HEADS = {
    "mlm": ("BertForMaskedLM", {}),
    "three": ("BertForSequenceClassification", labels("a", "b", "c")),
    "one": ("BertForSequenceClassification", labels("only")),
    "multi": (
        "BertForSequenceClassification",
        {**labels("a", "b", "c"), "problem_type": "multi_label_classification"},
    ),
    "entities": ("BertForTokenClassification", labels(*ENTITIES)),
    "answers": ("BertForQuestionAnswering", {}),
    "base": ("BertModel", {}),
}
# An encoder-decoder, with the tokenizer that BART has.
WRITER = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": LIMIT},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_length": 16, "no_repeat_ngram_size": 2},
    "task_specific_params": {
        "summarization": {"num_beams": 4, "length_penalty": 2.0, "prefix": "An assert: "},
        "translation_en_to_ro": {"num_beams": 3},
    },
}


def calls_of(mask: str) -> list[tuple[str, str, Any, dict, dict]]:
    """Head, task, inputs, options, and options that only one side has to be told: theirs have
    tokenizer_kwargs, ours truncation."""
    fill, text = ("mlm", "fill-mask"), "text-classification"
    single, double = f"An assert {mask} in Python.", f"The {mask} of a {mask} is."
    cut = {"tokenizer_kwargs": {"truncation": True}}
    calls: list[tuple] = [
        (*fill, single, {}),
        (*fill, double, {"top_k": 2}),
        (*fill, [single, double, f"WHAT {mask} IS"], {"top_k": 3}),
        (*fill, single, {"targets": ["e", "s", "t"]}),
        (*fill, double, {"targets": ["e", "s"], "top_k": 1}),
        (*fill, f"{mask} {TOPIC}", {}, cut, WHOLE),
        ("three", text, [*TEXTS, TOPIC], {"truncation": True}),
    ]
    for head in ("three", "one", "multi"):
        calls += [
            (head, text, SHORT, {}),
            (head, text, TEXTS, {"top_k": None}),
            (head, text, SHORT, {"top_k": 2}),
            (head, text, {"text": SHORT, "text_pair": QUESTION}, {}),
            *(
                (head, text, TEXTS, {"function_to_apply": f})
                for f in ("softmax", "sigmoid", "none")
            ),
        ]
    for strategy in ("none", "simple", "first", "average", "max"):
        options = {"aggregation_strategy": strategy}
        calls += [
            ("entities", "token-classification", SHORT, options),
            ("entities", "token-classification", [*TEXTS, TOPIC], options, {}, WHOLE),
            ("entities", "token-classification", TEXTS, {**options, "ignore_labels": ["PER"]}),
            ("entities", "token-classification", SHORT, {**options, "ignore_labels": []}),
        ]
    for inputs in (PAIR, LONG):
        calls += [
            ("answers", "question-answering", inputs, options)
            for options in (
                {},
                {"top_k": 4},
                {"handle_impossible_answer": True, "top_k": 2, "max_answer_len": 3},
                {"align_to_words": False, "max_answer_len": 2, "top_k": 3},
                {"max_seq_len": 48, "doc_stride": 16},
            )
        ]
    two = {"question": [QUESTION, "Why?"], "context": [TOPIC[:700], SHORT]}
    calls += [("answers", "question-answering", two, {}), ("base", "feature-extraction", TEXTS, {})]
    calls += [("base", "feature-extraction", SHORT, {})]
    return [(*call, {}, {})[:6] if len(call) == 4 else call for call in calls]


def writing_calls() -> list[tuple[str, str, Any, dict, dict, dict]]:
    """The same for tasks that write texts."""
    pairs: list[tuple[Any, dict[str, Any]]] = [
        (SHORT, {}),
        ([SHORT], {}),
        (TEXTS, {"num_beams": 3, "max_length": 12, "min_length": 6}),
        (TEXTS, {"num_beams": 2, "num_return_sequences": 2, "clean_up_tokenization_spaces": True}),
        (SHORT, {"num_beams": 2, "num_return_sequences": 2}),
        ([*TEXTS, TOPIC], {"truncation": True, "max_length": 8}),
    ]
    tasks = ("summarization", "text2text-generation", "translation")
    calls = [("writer", task, *pair, {}, {}) for task in tasks for pair in pairs]
    return [*calls, ("writer", "translation_en_to_ro", SHORT, {}, {}, {})]


CALLS = [(kind, *call) for kind, mask in MASKS.items() for call in calls_of(mask)]
CALLS += [("byte_level", *call) for call in writing_calls()]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder of checkpoints, and the answer to every call."""
    folder = tmp_path_factory.mktemp("pipelines")
    job = {
        "texts": [TOPIC, *TEXTS, QUESTION],
        "checkpoints": {
            f"{kind}_{head}": {"class": cls, "config": {**SIZES, **fields}, "tokenizer": kind}
            for kind in MASKS
            for head, (cls, fields) in HEADS.items()
        }
        | {
            "byte_level_writer": {
                "class": "BartForConditionalGeneration",
                "config": WRITER,
                "tokenizer": "byte_level",
            }
        },
        "calls": [
            {
                "checkpoint": f"{kind}_{head}",
                "task": task,
                "inputs": inputs,
                "options": options | own,
            }
            for kind, head, task, inputs, options, own, _ in CALLS
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [os.environ["LSG_REFERENCE_PYTHON"], HERE / "worker_pipelines.py", folder]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "answers.json").read_text())


@functools.cache
def pipe(task: str, checkpoint: pathlib.Path) -> lsg_flax.pipelines.Pipeline:
    return lsg_flax.pipeline(task, checkpoint)


def assert_same(ours, expected, label: str):
    if isinstance(expected, list):
        assert isinstance(ours, list) and len(ours) == len(expected), (label, ours, expected)
        for i, (one, other) in enumerate(zip(ours, expected, strict=True)):
            assert_same(one, other, f"{label}[{i}]")
    elif isinstance(expected, dict):
        assert list(ours) == list(expected), (label, ours, expected)
        for name in expected:
            assert_same(ours[name], expected[name], f"{label}.{name}")
    elif isinstance(expected, float):
        assert isinstance(ours, float)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4, err_msg=label)
    else:
        assert ours == expected and type(ours) is type(expected), (label, ours, expected)


@pytest.mark.parametrize("number", range(len(CALLS)))
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_the_answer_of_transformers(theirs, number):
    folder, answers = theirs
    kind, head, task, inputs, options, _, own = CALLS[number]
    run = pipe(task, folder / f"{kind}_{head}")
    if task == "question-answering":
        ours = run(**inputs, **options, **own)
    else:
        ours = run(inputs, **options, **own)
    if task != "feature-extraction":
        assert_same(ours, answers[number], f"{CALLS[number]}")
        return
    arrays, expected = ([ours], [answers[number]]) if inputs == SHORT else (ours, answers[number])
    for array, (nested,) in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(array, nested, rtol=1e-4, atol=1e-4)


def test_the_comparison_sees_labels_words_and_several_windows(theirs):
    """The random models' answers differ from each other, so that agreement says something."""
    found: dict[str, set] = {}
    for (_, _, task, *_), answer in zip(CALLS, theirs[1], strict=True):
        for word in ("entity", "entity_group", "label", "token", "answer", *WRITTEN):
            texts = json.dumps(answer).split(f'"{word}": ')[1:]
            found.setdefault(f"{task} {word}", set()).update(t.split(",")[0] for t in texts)
    assert len(found["token-classification entity"]) > 2  # trained tokenizers vary from run to run
    assert len(found["token-classification entity_group"]) > 1
    assert len(found["text-classification label"]) > 3
    assert len(found["question-answering answer"]) > 8
    assert len(found["fill-mask token"]) > 8
    for task in ("summarization summary", "translation translation"):
        assert len(found[f"{task}_text"]) > 6
