"""Pipelines: order, batches, compilations, long documents, the answers' arithmetic, and what is
refused. tests/parity compares with transformers' own."""

import functools
import itertools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import transformers
from golden_data import GOLDEN

import lsg_flax
from lsg_flax import LSGConfig
from lsg_flax.data import best_spans
from lsg_flax.inference import predict
from lsg_flax.inference.encodings import check_encoding
from lsg_flax.models import EncoderConfig
from lsg_flax.pipelines.spans import TokenClassification
from lsg_flax.pipelines.tasks import Reader, TextClassification

WORDS = "paris is the capital of france and a small town with long roads ##s ##er . , ?"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
LIMIT = 64
BUCKETS = (16, LIMIT)
TEXTS = [
    "Paris is the capital of France.",
    "A town",
    "Small roads, longer roads and the smaller towns of France." * 2,
    "Is Paris small?",
    "The roads of the capital, a town with long roads. " * 4,
]
MASKED = ["Paris is the [MASK] of France.", "A [MASK] with [MASK] roads.", "[MASK]?" + TEXTS[4]]
QUESTION, CONTEXT = "Is Paris small?", "Paris is the capital of France,  a small town. " * 12
TASKS = {
    "fill-mask": "masked_lm",
    "text-classification": "sequence_classification",
    "token-classification": "token_classification",
    "question-answering": "question_answering",
    "feature-extraction": "base",
}


@pytest.fixture
def unchecked():
    """Without the annotation checks of conftest.py, which would come before our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def make(task, **overrides):
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 8, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": LIMIT}
    model = lsg_flax.Model(EncoderConfig(**sizes | {"initializer_range": 1.0} | overrides), task)
    return model, jax.jit(model.init)(jax.random.key(1), np.zeros((1, 3), np.int32))["params"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": LIMIT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def pipe(tokenizer):
    def build(task, *, lsg=None, **options):
        pair = make(TASKS[task], lsg=lsg)
        return lsg_flax.pipeline(task, pair, tokenizer, **{"buckets": BUCKETS} | options)

    return build


def documents(task):
    if task == "question-answering":
        return [{"question": QUESTION, "context": text} for text in (*TEXTS, CONTEXT)]
    return MASKED if task == "fill-mask" else TEXTS


def assert_alike(ours, other):
    """The same but for rounding."""
    if isinstance(ours, dict):
        assert ours.keys() == other.keys()
        ours, other = list(ours.values()), list(other.values())
    if isinstance(ours, list):
        for one, two in zip(ours, other, strict=True):
            assert_alike(one, two)
    elif isinstance(ours, float | np.ndarray):
        np.testing.assert_allclose(ours, other, rtol=1e-3, atol=1e-5)
    else:
        assert ours == other


# ------------------------------------------------------------------- batches, order, compilations


@pytest.mark.parametrize("task", TASKS)
def test_a_list_gives_what_each_document_gives_alone_in_order(pipe, task):
    run, texts = pipe(task, batch_size=4), documents(task)
    together = run(texts)
    for text, answer in zip(texts, together, strict=True):
        alone = run(text)
        assert_alike(alone[0] if task == "text-classification" else alone, answer)
    assert len(
        {json.dumps(np.asarray(a).tolist() if isinstance(a, np.ndarray) else a) for a in together}
    ) == len(texts)
    assert run([]) == []


@pytest.mark.parametrize("segments", [0, 1, 2])
def test_a_model_is_given_the_segments_that_it_tells_apart(tokenizer, segments):
    """RoBERTa has one, whatever the tokenizer beside it says of pairs."""
    family = {"type_vocab_size": segments} if segments else {"model_type": "distilbert"}
    model = lsg_flax.Model(EncoderConfig(**{"type_vocab_size": 0} | family), "masked_lm")
    (row,) = Reader(tokenizer, model.config, LIMIT, False).rows("A town", "Small roads")
    assert ("token_type_ids" in row.inputs) == (segments == 2)
    check_encoding("one", row.inputs, row.inputs, model=model, longest=LIMIT)
    if segments < 2:
        given = row.inputs | {"token_type_ids": tokenizer("A town", "Small roads").token_type_ids}
        allows = f"type_vocab_size={segments} allows {('none', '0..0')[segments]}"
        with pytest.raises(ValueError, match=f"{allows}; leave token_type_ids out"):
            check_encoding("one", given, given, model=model, longest=LIMIT)


def test_an_iterator_is_read_piece_by_piece(pipe):
    run, read = pipe("text-classification", batch_size=1), []

    def endless():
        for text in itertools.cycle(TEXTS):
            read.append(text)
            yield text

    answers = run(endless())
    assert read == []
    first = list(itertools.islice(answers, 7))
    assert len(read) < 100
    assert_alike(first, [*run(TEXTS), *run(TEXTS[:2])])


def test_one_compilation_per_bucket_and_kind_of_batch(tokenizer):
    pair = make("masked_lm", num_hidden_layers=2)  # that no other test has compiled
    run = lsg_flax.pipeline("fill-mask", pair, tokenizer, batch_size=2, buckets=(16, LIMIT))
    run(["Paris is [MASK].", "A [MASK]."])
    assert run.compilations == 1
    run(["Paris is the [MASK].", "[MASK] town.", "a [MASK] small town", "[MASK]?"], top_k=2)
    assert run.compilations == 1
    run([MASKED[2], MASKED[0]])
    assert run.compilations == 2
    run("Paris is [MASK].")
    run("France is the [MASK].")
    assert run.compilations == 3


def test_the_default_buckets_begin_short_and_end_at_what_is_read(tokenizer):
    pair = make("base", max_position_embeddings=700)
    assert lsg_flax.pipeline("feature-extraction", pair, tokenizer).buckets == (64,)  # as trained
    long = lsg_flax.pipeline("feature-extraction", pair, tokenizer, max_length=700)
    assert long.buckets == (128, 512, 700)
    short = lsg_flax.pipeline("feature-extraction", pair, tokenizer, max_length=40)
    assert short.buckets == (40,)


# ---------------------------------------------------------------------------- the answers' numbers


def test_fill_mask_is_the_softmax_at_the_masks(pipe):
    lsg = LSGConfig(block_size=4, sparse_block_size=4, num_global_tokens=2)
    model, params = make("masked_lm", lsg=lsg)
    run = pipe("fill-mask", lsg=lsg)
    encoding = dict(run.reader.tokenizer(MASKED[1]))
    (result,) = predict(model, params, [encoding], buckets=(16,), progress=False)
    places = [i for i, token in enumerate(encoding["input_ids"]) if token == 4]
    answers = run(MASKED[1], top_k=len(VOCABULARY))
    assert len(answers) == len(places) == 2
    for place, words in zip(places, answers, strict=True):
        expected = np.asarray(jax.nn.softmax(result["logits"][place]))
        assert [w["token"] for w in words] == np.argsort(-expected).tolist()
        np.testing.assert_allclose(
            [w["score"] for w in words], np.sort(expected)[::-1], rtol=1e-4, atol=1e-6
        )
    best = run(MASKED[0], targets=["Town", "small"])
    assert {w["token_str"] for w in best} == {"town", "small"}
    assert [w["sequence"] for w in best] == [
        f"paris is the {w['token_str']} of france." for w in best
    ]


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        ({}, {}, [0.0900, 0.2447, 0.6652]),
        ({"problem_type": "multi_label_classification"}, {}, [0.7311, 0.8808, 0.9526]),
        ({"problem_type": "regression"}, {}, [1.0, 2.0, 3.0]),
        ({}, {"function_to_apply": "sigmoid"}, [0.7311, 0.8808, 0.9526]),
        ({"problem_type": "regression"}, {"function_to_apply": "softmax"}, [0.09, 0.2447, 0.6652]),
        ({"labels": ("x",)}, {}, [0.7311]),
    ],
)
def test_functions_of_text_classification(tokenizer, fields, options, expected):
    config = EncoderConfig(**{"labels": ("x", "y", "z")} | fields)
    logits = np.array([1.0, 2.0, 3.0], np.float32)[: config.num_labels]
    task = TextClassification(top_k=None, **options)
    answer = task.answer(Reader(tokenizer, config, LIMIT, False), "", [], [{"logits": logits}])
    assert [a["label"] for a in answer] == ["z", "y", "x"][-config.num_labels :]
    np.testing.assert_allclose([a["score"] for a in answer], expected[::-1], atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (
            "none",
            ["B-X paris 0 5", "I-X small 9 14", "O ##er 14 16", "I-X town 17 21", "B-X a 24 25"],
        ),
        ("simple", ["X paris 0 5", "X small 9 14", "X town 17 21", "X a 24 25"]),
        ("first", ["X paris 0 5", "X smaller town 9 21", "X a 24 25"]),
        ("max", ["X paris 0 5", "X town 17 21", "X a 24 25"]),
        ("average", ["X paris 0 5", "X town 17 21", "X a 24 25"]),
    ],
)
def test_tokens_become_words_and_words_entities(tokenizer, strategy, expected):
    text = "Paris is smaller town ? a"
    labels = ("O", "B-X", "I-X")
    reader = Reader(tokenizer, EncoderConfig(labels=labels), LIMIT, False)
    rows = reader.rows(text)
    #        [CLS] paris is small ##er town ? a [SEP]
    chosen = [0, 1, 0, 2, 0, 2, 0, 1, 0]
    surety = [9, 3, 3, 2, 4, 3, 3, 3, 9]
    logits = np.eye(3, dtype=np.float32)[chosen] * np.array(surety, np.float32)[:, None]
    ignored = () if strategy == "none" else ("O",)
    task = TokenClassification(aggregation_strategy=strategy, ignore_labels=ignored)
    answers = task.answer(reader, text, rows, [{"logits": logits}])
    if strategy == "none":
        assert [a["index"] for a in answers] == [1, 2, 3, 4, 5, 6, 7]
        answers = [a for a in answers if a["entity"] != "O" or a["word"].startswith("##")]
        assert answers[0]["score"] == pytest.approx(np.exp(3) / (np.exp(3) + 2))
    name = "entity" if strategy == "none" else "entity_group"
    assert [f"{a[name]} {a['word']} {a['start']} {a['end']}" for a in answers] == expected


def test_best_spans_are_those_of_all_pairs():
    generator = np.random.default_rng(0)
    start, end = generator.random((2, 12)).astype(np.float32)
    allowed = np.arange(12) > 3
    pairs = [(start[i] * end[j], i, j) for i in range(4, 12) for j in range(i, min(12, i + 3))]
    expected = [(i, j) for _, i, j in sorted(pairs, reverse=True)]
    for count in (1, 5, len(pairs), len(pairs) + 9):
        found = best_spans(start, end, allowed, count=count, longest=3)
        assert [(i, j) for i, j, _ in found] == expected[:count]


# ----------------------------------------------------------------------------------- long documents


@pytest.mark.parametrize("alias", ["ner", "sentiment-analysis"])
def test_an_alias_is_the_task_that_it_names(tokenizer, alias):
    name = {"ner": "token-classification", "sentiment-analysis": "text-classification"}[alias]
    pair = make(TASKS[name])
    aliased, run = (
        lsg_flax.pipeline(task, pair, tokenizer, buckets=BUCKETS) for task in (alias, name)
    )
    assert aliased.task == run.task and aliased(TEXTS[0]) == run(TEXTS[0])


def test_a_long_text_is_refused_or_cut(pipe):
    run = pipe("text-classification")
    long = TEXTS[4] * 3
    with pytest.raises(
        ValueError, match=r"The roads.* has 146 tokens, more than 64.*truncation=True.*convert"
    ):
        run([TEXTS[0], long])
    cut = run(long, truncation=True)
    ids = run.reader.tokenizer(long, truncation=True, max_length=LIMIT)["input_ids"]
    text = run.reader.tokenizer.decode(ids[1:-1])
    assert len(ids) == LIMIT and cut == run(text)
    assert pipe("text-classification", max_length=16, truncation=True)(long) != cut


def test_answers_lie_where_they_say_in_a_long_context(pipe):
    run = pipe("question-answering", top_k=40)
    tokens = len(run.reader.tokenizer(CONTEXT)["input_ids"])
    assert tokens > 2 * LIMIT
    answers = run(question=QUESTION, context=CONTEXT)
    assert len(answers) == 40
    for answer in answers:
        assert CONTEXT[answer["start"] : answer["end"]] == answer["answer"] != ""
        assert len(answer["answer"].split()) <= 15
    assert max(a["start"] for a in answers) > len(CONTEXT) // 2
    other = run(question=QUESTION, context=CONTEXT, max_seq_len=32, doc_stride=8)
    assert [a["start"] for a in other] != [a["start"] for a in answers]


def test_an_answer_far_beyond_the_limit_is_found(pipe, tokenizer):
    """Weights by hand: only the word france starts and ends an answer."""
    model, params = make("question_answering")
    params = jax.tree.map(jnp.zeros_like, params)
    words = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    france = VOCABULARY.index("france")
    params["encoder"]["embeddings"]["word_embeddings"]["embedding"] = words.at[france, 0].set(1)
    for part in (
        params["encoder"]["embeddings"]["layer_norm"],
        *(params["encoder"]["layers"][n] for n in ("attention_norm", "mlp_norm")),
    ):
        part["scale"] = jnp.ones_like(part["scale"])
    params["head"]["outputs"]["kernel"] = params["head"]["outputs"]["kernel"].at[0].set(9.0)
    run = lsg_flax.pipeline("question-answering", (model, params), tokenizer)
    context = "A small town. " * 100 + " Is  France a town? " + "The roads. " * 50
    answer = run(question=QUESTION, context=context)
    assert answer["answer"] == "France" and answer["start"] == context.index("France")
    assert answer["score"] > 0.99
    nothing = run(question=QUESTION, context=TEXTS[1], handle_impossible_answer=True, top_k=9)
    assert {"start": 0, "end": 0, "answer": ""}.items() <= next(
        a for a in nothing if not a["answer"]
    ).items()


# ------------------------------------------------------------------------------- checkpoints, files


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("checkpoint")
    lsg_flax.save_pretrained(folder, *make("sequence_classification"), tokenizer)
    return folder


def test_a_folder_with_a_tokenizer_is_enough(folder, pipe):
    assert_alike(
        lsg_flax.pipeline("text-classification", folder)(TEXTS), pipe("text-classification")(TEXTS)
    )
    half = lsg_flax.pipeline("text-classification", str(folder), dtype=jnp.bfloat16, top_k=None)
    scores = [label["score"] for label in half(TEXTS[0])]
    assert half.model.dtype == jnp.bfloat16 and sum(scores) == pytest.approx(1, abs=1e-3)
    features = lsg_flax.pipeline("feature-extraction", folder)(TEXTS[:2])
    assert [f.shape for f in features] == [(9, 8), (4, 8)]


def test_a_checkpoint_without_the_head_says_what_it_is(folder, tokenizer, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"fill-mask needs .* masked_lm or pretraining, but .* BertForSequenceClassification",
    ):
        lsg_flax.pipeline("fill-mask", folder)
    with pytest.raises(ValueError, match="question_answering, but this model's task is 'base'"):
        lsg_flax.pipeline("question-answering", make("base"), tokenizer)
    with pytest.raises(ValueError, match="model with its parameters needs tokenizer="):
        lsg_flax.pipeline("feature-extraction", make("base"))
    shutil.copytree(GOLDEN / "bert_sequence_classification", tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has no tokenizer; pass tokenizer="):
        lsg_flax.pipeline("text-classification", tmp_path / "bare")


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("task", "inputs", "options", "message"),
    [
        ("fill-mask", "Paris is small.", {}, r"no mask token \[MASK\] in 'Paris is small.'"),
        ("fill-mask", MASKED[0], {"targets": ["town", "xyz"]}, r"not: \{'xyz': \['\[UNK\]'\]\}"),
        ("fill-mask", MASKED[0], {"targets": ["small roads"]}, "one known token each"),
        ("fill-mask", MASKED[0], {"targets": []}, "targets is empty"),
        ("fill-mask", MASKED[0], {"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        (
            "fill-mask",
            MASKED[0],
            {"topk": 2},
            r"no options \['topk'\]; it has \['top_k', 'targets'\]",
        ),
        ("fill-mask", [MASKED[0], 3], {}, "document 1: .* must be a text, got int: 3"),
        ("fill-mask", "[MASK] \ud83d", {}, r"^a lone surrogate .half of a character, .ud83d. at"),
        ("text-classification", ["a", "\udc00"], {}, "document 1: a lone surrogate"),
        (
            "question-answering",
            [{"question": "a", "context": "\ud800"}],
            {},
            "document 0: a lone surrogate",
        ),
        ("fill-mask", None, {}, "must be a text, got NoneType"),
        ("text-classification", 3, {}, "must be a text, got int"),
        ("text-classification", b"a", {}, "must be a text, got bytes"),
        ("text-classification", [["a", "b"]], {}, "must be a text, got list"),
        ("text-classification", {"text_pair": "a"}, {}, r"has \['text_pair'\]; give 'text'"),
        ("text-classification", "a", {"function_to_apply": "tanh"}, "function_to_apply='tanh' is"),
        ("text-classification", "a", {"question": "b"}, "question= and context= are for"),
        (
            "token-classification",
            "a",
            {"aggregation_strategy": "last"},
            "'last' is unknown; .*'max'",
        ),
        ("question-answering", "a" * 999, {}, r"and 'context', got 'a{59}\.$"),
        ("question-answering", "a", {}, "must have 'question' and 'context', got 'a'"),
        ("question-answering", None, {"question": "a"}, "give question= and context="),
        ("question-answering", None, {"question": ["a"], "context": ["b", "c"]}, "different len"),
        ("question-answering", None, {"question": "a", "context": " "}, "' ' has no tokens"),
        ("question-answering", None, {"question": " ", "context": "a"}, "the question is empty"),
        (
            "question-answering",
            None,
            {"question": "a " * 70, "context": "a"},
            "question of 70, which",
        ),
        (
            "question-answering",
            None,
            {"question": "a", "context": "b", "max_seq_len": 20, "doc_stride": 16},
            "max_seq_len=20 leaves 16 tokens .* more than doc_stride=16; give a max_seq_len",
        ),
        (
            "question-answering",
            None,
            {"question": "a", "context": "b", "max_seq_len": 65},
            "max_seq_len=65 must be in 1..64",
        ),
    ],
)
def test_what_cannot_be_answered(pipe, unchecked, task, inputs, options, message):
    run = pipe(task)
    with pytest.raises(ValueError, match=message):
        run(inputs, **options)


def test_settings_that_cannot_be(pipe, tokenizer, unchecked):
    with pytest.raises(ValueError, match="'image-classification' is unknown; choose one of"):
        lsg_flax.pipeline("image-classification", make("base"), tokenizer)
    with pytest.raises(ValueError, match=r"max_length=65 must be in 1..64"):
        pipe("feature-extraction", max_length=65)
    with pytest.raises(ValueError, match="batch_size=0"):
        pipe("feature-extraction", batch_size=0)
    slow = types.SimpleNamespace(is_fast=False, model_max_length=64)
    run = lsg_flax.pipeline("token-classification", make("token_classification"), slow)
    with pytest.raises(ValueError, match="slow tokenizer SimpleNamespace does not give"):
        run("Paris")
