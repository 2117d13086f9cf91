"""From rows to batches: what is in them, that each row comes as often as it should, and that a
stream goes on as if it had never stopped."""

import collections
import functools
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lsg_flax.buckets import default_buckets
from lsg_flax.data import (
    DataOptions,
    Packing,
    TokenizedDataset,
    eval_batches,
    load_examples,
    pack_rows,
    train_batches,
)
from lsg_flax.data.cache import ArrayFiles, EncodedRow, RowWriter, Sequences
from lsg_flax.data.order import Order
from lsg_flax.models import TASKS as RECORDS
from lsg_flax.models import EncoderConfig, Model, Target, Task
from lsg_flax.training import losses

TOKENIZER = pathlib.Path(__file__).parent / "golden" / "bert_to_convert_512"  # w5 ... w30
BUCKETS = (8, 16, 32)
MASK, VOCABULARY, SPECIAL = 4, 31, 5


def text(number: int, words: int) -> str:
    """A text that tells its number: the first two words."""
    digits = [5 + number // 26, 5 + number % 26]
    return " ".join(f"w{i}" for i in [*digits, *(5 + (number + i) % 26 for i in range(words))])


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Data of a task, with the rows' lengths in all buckets."""
    folder = tmp_path_factory.mktemp("data")

    @functools.cache
    def make(task="sequence_classification", rows=50, **options) -> TokenizedDataset:
        path = folder / f"{task}-{rows}.jsonl"
        examples = [
            {
                "text": text(i, (7 * i) % 27),
                "label": i % 3,
                "tokens": text(i, i % 20).split(),
                "tags": [(i + j) % 4 for j in range(2 + i % 20)],
                "question": f"w{5 + i % 26}",
                "context": text(i, 3 * i % 70),
                "answers": {"text": [f"w{5 + i // 26}"], "answer_start": [0]},
                "choices": [text(i, i % 9), text(i, 2)],
            }
            for i in range(rows)
        ]
        if options.get("problem_type") == "regression":
            examples = [example | {"label": i / 2} for i, example in enumerate(examples)]
        if task == "multiple_choice":
            examples = [example | {"label": i % 2} for i, example in enumerate(examples)]
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        options = DataOptions(task, **{"max_length": 32, "stride": 4} | options)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        return load_examples(
            path, options, tokenizer=tokenizer, cache=folder / "cache", progress=False
        )

    return make


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def numbers(batch) -> list[int]:
    """The texts in a batch, by their first two words; those that do not count are left out."""
    ids = batch["input_ids"].reshape(-1, batch["input_ids"].shape[-1])
    return [26 * (a - 5) + b - 5 for _, a, b, *_ in ids[ids[:, 0] != 0].tolist()]


def test_default_buckets():
    assert default_buckets(4096) == (512, 1024, 2048, 4096)
    assert default_buckets(3000) == (512, 1024, 2048, 3000)
    assert default_buckets(100) == (100,)


# What is in a batch


def test_rows_are_padded_to_their_bucket_and_what_fills_up_does_not_count(make):
    data = make()
    seen = collections.Counter()
    for batch in train_batches(data, batch_size=4, seed=0, buckets=BUCKETS, epochs=1):
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        length = ids.shape[1]
        assert ids.shape == mask.shape and len(ids) == 4 and length in BUCKETS
        for row in range(4):
            real = mask[row].sum()
            assert (ids[row, real:] == 0).all() and (mask[row, :real] == 1).all()
            if not real:
                assert batch["labels"][row] == -100
                continue
            (number,) = numbers({"input_ids": ids[row : row + 1]})
            expected = data[number]
            np.testing.assert_array_equal(ids[row, :real], expected["input_ids"])
            assert batch["labels"][row] == expected["labels"] == number % 3
            assert length == min(b for b in BUCKETS if b >= real)
            seen[number] += 1
    assert seen == dict.fromkeys(range(50), 1)


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TASKS = {
    "sequence_classification": {"num_labels": 3},
    "token_classification": {"num_labels": 4},
    "question_answering": {},
    "multiple_choice": {},
    "masked_lm": {},
    "causal_lm": {},
}


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_takes_the_batch_and_ignores_what_fills_it_up(make, task):
    """5 rows in a batch of 8, against the loss of the 5 alone."""
    data = make(task, 5, pack=False)
    batch = next(iter(train_batches(data, batch_size=8, seed=0, buckets=[32], epochs=1)))
    kept = {name: array[: len(data)] for name, array in batch.items()}
    assert len(kept["input_ids"]) == 5 < len(batch["input_ids"]) == 8
    settings = dict(TASKS[task])
    names = {"labels": tuple(map(str, range(settings.pop("num_labels", 2))))}
    model = Model(EncoderConfig(**TINY | names | settings), task)
    params = jax.jit(model.init)(jax.random.key(0), batch["input_ids"])["params"]
    loss_fn = jax.jit(losses.loss_fn, static_argnums=0)
    (loss, metrics), (alone, expected) = (loss_fn(model, params, b) for b in (batch, kept))
    np.testing.assert_allclose(loss, alone, rtol=1e-5)
    assert np.isfinite(loss) and loss > 0
    assert (metrics["targets"], metrics["tokens"]) == (expected["targets"], expected["tokens"])


def test_choices_have_an_axis_of_their_own(make):
    data = make("multiple_choice", 6)
    batch = next(train_batches(data, batch_size=6, seed=0, buckets=[32], shuffle=False))
    assert batch["input_ids"].shape == (6, 2, 32) and batch["labels"].tolist() == [0, 1] * 3
    for row in range(6):
        for choice, ids in enumerate(data[row]["input_ids"]):
            np.testing.assert_array_equal(batch["input_ids"][row, choice, : len(ids)], ids)
            assert batch["attention_mask"][row, choice].sum() == len(ids)


def test_causal_labels_are_the_tokens(make):
    batch = next(train_batches(make("causal_lm"), batch_size=2, seed=0))
    expected = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    np.testing.assert_array_equal(batch["labels"], expected)


def test_microbatches_are_batches_of_one_bucket(make):
    flat = train_batches(make(), batch_size=6, seed=3, buckets=BUCKETS, epochs=2)
    parts = train_batches(make(), batch_size=2, seed=3, buckets=BUCKETS, microbatches=3, epochs=2)
    for whole, split in zip(flat, parts, strict=True):
        assert split["input_ids"].shape[:2] == (3, 2)
        assert equal(whole, {n: x.reshape(6, *x.shape[2:]) for n, x in split.items()})


# Masked tokens


def test_masked_tokens(make):
    data = make("masked_lm", 50)
    batches = train_batches(data, batch_size=4, seed=5, epochs=60)
    plain = {tuple(data[i]["input_ids"].tolist()) for i in range(len(data))}
    asked = masked = same = total = 0
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            chosen = labels != -100
            original = np.where(chosen, labels, ids)
            real = batch["attention_mask"][0].sum()
            if ids[0] == 0:  # fills up
                assert not chosen.any()
                continue
            assert tuple(original[original > 0].tolist()) in plain and real
            assert (original[chosen] >= SPECIAL).all()
            assert ((ids[chosen] == MASK) | (ids[chosen] >= SPECIAL)).all()
            total += (original >= SPECIAL).sum()
            asked += chosen.sum()
            masked += (ids[chosen] == MASK).sum()
            same += (ids[chosen] == labels[chosen]).sum()
    # Within four standard deviations of the shares of BERT's recipe.
    other = 25 / 26  # a random word is another one

    def close(count, of, share):
        return abs(count - of * share) < 4 * np.sqrt(of * share * (1 - share))

    assert total > 40_000
    assert close(asked, total, 0.15) and close(masked, asked, 0.8)
    assert close(same, asked, 0.1 + 0.1 * (1 - other))


def test_masks_change_with_the_epoch_and_the_seed_only(make):
    data = make("masked_lm", 50)

    def some(**options):
        batches = train_batches(data, batch_size=4, shuffle=False, **options)
        return [next(batches) for _ in range(batches.steps(2))]

    first = some(seed=1)
    assert all(map(equal, first, some(seed=1, prefetch=0)))
    half = len(first) // 2
    assert len({tuple(row) for row in (first[0]["labels"] != -100).tolist()}) == 4
    for a, b in ((first[0], first[half]), (first[0], some(seed=2)[0])):
        plain_a, plain_b = (np.where(x["labels"] < 0, x["input_ids"], x["labels"]) for x in (a, b))
        np.testing.assert_array_equal(plain_a, plain_b)
        assert not equal(a, b)


# How often and in which order


@pytest.mark.parametrize("problem", ["single_label_classification", "regression"])
def test_every_example_comes_once_per_epoch(make, problem):
    """With labels that cannot be ignored, the last rows of an epoch come in the next."""
    data = make(problem_type=problem)
    batches = train_batches(data, batch_size=4, seed=0, buckets=BUCKETS, epochs=4)
    count = collections.Counter(number for batch in batches for number in numbers(batch))
    if problem == "regression":  # in 4 epochs of 4 rows a batch nothing is left over
        assert batches.steps(1) < batches.steps(4) / 4 + 1
        assert batches.steps(4) == 50
    assert count == dict.fromkeys(range(50), 4)


def test_epochs_have_different_orders_and_seeds_too(make):
    def orders(seed):
        batches = train_batches(make(), batch_size=4, seed=seed, buckets=BUCKETS)
        steps = batches.steps(1)
        read = list(itertools.islice(batches, 2 * steps))
        shapes = [batch["input_ids"].shape for batch in read]
        assert len(set(shapes[:steps])) == 3 and shapes[:steps] != sorted(shapes[:steps])
        return [[numbers(b) for b in part] for part in (read[:steps], read[steps:])]

    first, second = orders(0)
    other, _ = orders(1)
    assert first != second and first != other
    assert {*map(frozenset, first)} != {*map(frozenset, second)}  # not only batches by turns
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(50))
    assert orders(0) == [first, second]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=40),
    targets=st.lists(st.integers(1, 9), min_size=40, max_size=40),
    streams=st.integers(1, 2),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
    remainder=st.sampled_from(["fill", "carry"]),
    shuffle=st.booleans(),
)
def test_any_stream_shows_its_rows_evenly(
    lengths, targets, streams, size, seed, remainder, shuffle
):
    """In buckets of the length of one stream, or of the pair of two."""
    pairs = [pair[:streams] for pair in zip(lengths, targets, strict=False)]
    ladders = (BUCKETS, (4, 9))[:streams]
    buckets = [
        tuple(min(b for b in ladder if b >= n) for ladder, n in zip(ladders, pair, strict=True))
        for pair in pairs
    ]
    order = Order(
        [np.array(lengths) for lengths in zip(*pairs, strict=True)],
        ladders=ladders,
        size=size,
        seed=seed,
        remainder=remainder,
        shuffle=shuffle,
    )
    assert order.buckets == sorted({*buckets})
    epochs, counts = 7, collections.Counter(dict.fromkeys(range(len(lengths)), 0))
    for number in range(order.start(epochs)):
        epoch = order.epoch_of(number)
        assert order.start(epoch) <= number < order.start(epoch + 1)
        bucket, rows = order.batch(number)
        assert len(rows) == size
        real = rows[rows >= 0].tolist()
        counts.update(real)
        assert all(buckets[row] == bucket for row in real)
        for_every_row = {counts[i] for i in range(len(pairs)) if buckets[i] == bucket}
        assert max(for_every_row) <= epoch + 1
    if remainder == "fill":
        assert set(counts.values()) == {epochs}
    else:  # what is missing waits for the next epoch, less than a batch in each bucket
        missing = collections.Counter()
        for row, count in counts.items():
            missing[buckets[row]] += epochs - count
        assert all(0 <= rows < size for rows in missing.values())


def test_evaluation_reads_every_row_once(make):
    for data in (make(), make(problem_type="regression"), make("question_answering")):
        batches = eval_batches(data, batch_size=4, buckets=BUCKETS)
        read = list(batches)
        assert len(read) == len(batches)
        rows = np.concatenate([part.rows for part in read])
        assert sorted(rows[rows >= 0].tolist()) == list(range(len(data)))
        lengths = [part.batch["input_ids"].shape[1] for part in read]
        assert lengths == sorted(lengths, reverse=True)
        for batch, places in read:
            for row, place in enumerate(places):
                real = batch["attention_mask"][row].sum()
                assert real == (0 if place < 0 else data.lengths[place])
                if place >= 0:
                    ids = batch["input_ids"][row, :real]
                    np.testing.assert_array_equal(ids, data[place]["input_ids"])
        assert all(equal(a.batch, b.batch) for a, b in zip(read, batches, strict=True))


def test_evaluation_masks_the_same_tokens_for_each_batch_size(make):
    data = make("masked_lm", 50)

    def labels(size):
        read = eval_batches(data, batch_size=size)
        return {
            r: b["labels"][i].tolist() for b, rows in read for i, r in enumerate(rows) if r >= 0
        }

    assert labels(3) == labels(8)


# Streams


PAIRS = [(1 + 7 * i % 30, 1 + 5 * i % 9) for i in range(40)]  # tokens read, and to be written


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """Data of two streams, such as texts and their summaries, as a reader would write it."""
    record = Task("summary", targets=(Target("logits", "labels", "class"),))
    monkeypatch.setitem(RECORDS, "summary", record)
    about = {"fingerprint": "f", "labels": None, "skipped": 0, "messages": [], "truncated": 0}
    about |= {"pad_token_id": 1, "mask_token_id": -1, "vocab_size": 99, "special_ids": []}
    about["options"] = {"task": "summary", "max_length": 32, "problem_type": None}
    groups = [
        (
            {"id": f"row {i}"},
            [
                EncodedRow(
                    {
                        "input": Sequences(n, {"input_ids": np.full(n, i + 2, np.int32)}),
                        "target": Sequences(m, {"labels": np.full(m, i + 50, np.int32)}),
                    },
                    {},
                )
            ],
        )
        for i, (n, m) in enumerate(PAIRS)
    ]
    with ArrayFiles(tmp_path) as files:
        writer = RowWriter(files)
        writer.add(groups[:25])
        writer.add(groups[25:])
        files.finish(about | writer.about)
    return TokenizedDataset(tmp_path)


def test_a_batch_has_one_length_for_each_stream(pairs):
    ladders = {"input": BUCKETS, "target": (4, 9)}
    batches = train_batches(pairs, batch_size=4, seed=0, buckets=ladders, epochs=2, microbatches=2)
    seen, shapes = collections.Counter(), set()
    for step, batch in enumerate(batches):
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}
        ids, labels = (batch[name].reshape(8, -1) for name in ("input_ids", "labels"))
        shapes.add((ids.shape[1], labels.shape[1]))
        assert batches.bucket_at(step) == ids.shape[1]
        for row, mask in enumerate(batch["attention_mask"].reshape(8, -1)):
            if not mask.any():  # fills the batch up
                assert (ids[row] == 1).all() and (labels[row] == -100).all()
                continue
            number = ids[row, 0] - 2
            n, m = PAIRS[number]
            assert (mask[:n] == 1).all() and not mask[n:].any()
            assert (ids[row, :n] == number + 2).all() and (ids[row, n:] == 1).all()
            assert (labels[row, :m] == number + 50).all() and (labels[row, m:] == -100).all()
            assert ids.shape[1] == min(b for b in BUCKETS if b >= n)
            assert labels.shape[1] == min(b for b in (4, 9) if b >= m)
            seen[number] += 1
    assert seen == dict.fromkeys(range(40), 2)
    assert shapes == set(itertools.product(BUCKETS, (4, 9))) and batches.buckets == BUCKETS
    read = eval_batches(pairs, batch_size=4, buckets=ladders)
    sizes = [(x.batch["input_ids"].shape[1], x.batch["labels"].shape[1]) for x in read]
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == 6


def test_a_stream_of_pairs_continues_and_knows_its_lengths(pairs):
    options = {"batch_size": 4, "seed": 0, "epochs": 3}
    stream = train_batches(pairs, **options, buckets={"input": BUCKETS, "target": (4, 9)})
    next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    again = train_batches(pairs, **options, buckets={"input": BUCKETS, "target": (4, 9)})
    again.set_state(state)
    assert all(map(equal, stream, again))
    other = train_batches(pairs, **options, buckets=BUCKETS)  # targets up to their longest
    assert {batch["labels"].shape[1] for batch in other} == {9}
    with pytest.raises(ValueError, match="target_buckets: "):
        other.set_state(state)
    with pytest.raises(ValueError, match="at least 9, the tokens of the longest target"):
        train_batches(pairs, **options, buckets={"target": (4, 8)})
    with pytest.raises(ValueError, match=r"no \['output'\].* some of \['input', 'target'\]"):
        train_batches(pairs, **options, buckets={"output": (4, 8)})


def test_the_first_rows_alone_are_evaluated(pairs):
    ladders = {"input": BUCKETS, "target": (4, 9)}
    read = eval_batches(pairs, batch_size=4, buckets=ladders, rows=7)
    assert sorted(row for batch in read for row in batch.rows.tolist() if row >= 0) == [*range(7)]
    more = eval_batches(pairs, batch_size=4, buckets=ladders, rows=99)
    assert len(more) == len(eval_batches(pairs, batch_size=4, buckets=ladders))
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        eval_batches(pairs, batch_size=4, rows=0)


def test_rows_of_two_streams_one_by_one(pairs):
    assert pairs[7]["input_ids"].tolist() == [9] * PAIRS[7][0]
    assert pairs[39]["labels"].tolist() == [89] * PAIRS[39][1]
    assert pairs.info(30).id == "row 30" and pairs.choices is None
    assert pairs.lengths.tolist() == [n for n, _ in PAIRS]


# Several processes


@pytest.mark.parametrize("task", ["sequence_classification", "masked_lm"])
def test_processes_share_the_batches_of_one(make, task):
    data = make(task)
    options = {"batch_size": 6, "seed": 7, "epochs": 2, "microbatches": 2, "buckets": BUCKETS}
    alone = train_batches(data, **options)
    shares = [train_batches(data, **options, process_index=i, process_count=3) for i in range(3)]
    assert len({share.steps(2) for share in (alone, *shares)}) == 1
    for whole, *parts in zip(alone, *shares, strict=True):
        assert parts[0]["input_ids"].shape[:2] == (2, 2)
        assert equal(whole, {n: np.concatenate([p[n] for p in parts], axis=1) for n in whole})
    whole = list(eval_batches(data, batch_size=6))
    shares = [eval_batches(data, batch_size=6, process_index=i, process_count=3) for i in range(3)]
    for one, *parts in zip(whole, *shares, strict=True):
        assert equal(one.batch, {n: np.concatenate([p.batch[n] for p in parts]) for n in one.batch})
        np.testing.assert_array_equal(one.rows, np.concatenate([p.rows for p in parts]))


# Going on


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("read", [0, 1, 17, 40])
def test_a_state_continues_bit_for_bit(make, read, prefetch):
    options = {"batch_size": 4, "seed": 11, "buckets": BUCKETS, "epochs": 3, "prefetch": prefetch}
    for data in (make("masked_lm"), make(problem_type="regression")):
        stream = train_batches(data, **options)
        for _ in range(min(read, stream.steps(3))):
            next(stream)
        state = json.loads(json.dumps(stream.get_state()))
        rest = list(stream)
        assert stream.steps(3) == read + len(rest) or read > stream.steps(3)
        fresh = train_batches(data, **options)
        next(fresh)
        fresh.set_state(state)
        again = list(fresh)
        assert len(again) == len(rest) and all(map(equal, rest, again))
        assert all(equal(stream.batch_at(stream.steps(3) - 1), batch) for batch in rest[-1:])


CONTINUE = """
import hashlib, itertools, json, sys
from lsg_flax.data import TokenizedDataset, train_batches
import pathlib
data = TokenizedDataset(pathlib.Path(sys.argv[1]))
stream = train_batches(data, **json.loads(sys.argv[2]), process_index=0, process_count=1)
stream.set_state(json.loads(sys.argv[3]))
total = hashlib.sha256()
for batch in itertools.islice(stream, 20):
    for name in sorted(batch):
        total.update(name.encode() + str(batch[name].dtype).encode() + batch[name].tobytes())
print(total.hexdigest())
"""


def test_another_process_continues_bit_for_bit(make):
    data = make("masked_lm")
    options = {"batch_size": 4, "seed": 2**40}
    stream = train_batches(data, **options)
    for _ in range(9):
        next(stream)
    state, total = stream.get_state(), hashlib.sha256()
    for batch in itertools.islice(stream, 20):
        for name in sorted(batch):
            total.update(name.encode() + str(batch[name].dtype).encode() + batch[name].tobytes())
    stream.close()
    folder = pathlib.Path(data.arrays["input_ids"].filename).parent
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(folder), json.dumps(options), json.dumps(state)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == total.hexdigest()


def test_a_state_of_another_stream_is_refused_with_the_differences(make):
    state = train_batches(make(), batch_size=4, seed=0, buckets=BUCKETS).get_state()
    other = train_batches(make(), batch_size=2, seed=1, buckets=BUCKETS, epochs=3)
    with pytest.raises(ValueError, match="batch_size: 4 in the state, 2 here; seed: 0 in the st"):
        other.set_state(state)
    with pytest.raises(ValueError, match="data: "):
        train_batches(make(rows=20), batch_size=4, seed=0, buckets=BUCKETS).set_state(state)
    shares = {"process_index": 1, "process_count": 2}  # another number of processes may go on
    train_batches(make(), batch_size=4, seed=0, buckets=BUCKETS, **shares).set_state(state)


def test_the_stream_tells_what_comes(make):
    stream = train_batches(make(), batch_size=4, seed=0, buckets=(*BUCKETS, 64))
    assert stream.buckets == BUCKETS
    for number in range(2 * stream.steps(1)):
        batch = next(stream)
        assert stream.bucket_at(number) == batch["input_ids"].shape[1]
        assert stream.epoch_at(number) == number // stream.steps(1)


# Bad input


def test_one_row_is_enough(make):
    data = make(rows=1)
    (batch,) = train_batches(data, batch_size=4, seed=0, epochs=1)
    assert batch["labels"].tolist() == [0, -100, -100, -100]
    regression = make(rows=1, problem_type="regression")
    batch = next(train_batches(regression, batch_size=4, seed=0))  # the row of four epochs
    assert numbers(batch) == [0] * 4
    with pytest.raises(ValueError, match="epochs=3 of 1 rows do not fill a batch of 4 rows"):
        train_batches(regression, batch_size=4, seed=0, epochs=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size=0 and microbatches=1 must be at least 1"),
        (
            {"batch_size": 10**12},
            r"batch_size=1000000000000, in batches padded to .* at most batch_",
        ),
        ({"process_count": 3, "process_index": 0}, "must be a multiple of process_count=3"),
        ({"process_count": 2, "process_index": 2}, "process_index=2 must be in 0..1"),
        ({"buckets": (8, 16)}, "one of them at least 30"),
        ({"buckets": ()}, "must be lengths of at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"epochs": 0}, "epochs=0 at least 1"),
        ({"mask_probability": 1.0}, "mask_probability=1.0 must be above 0"),
    ],
)
def test_options_that_do_not_fit(make, options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(make(), **{"batch_size": 4, "seed": 0} | options)


def test_floats_cannot_be_filled_up(make):
    with pytest.raises(ValueError, match="remainder='fill' must be 'fill' or 'carry'; with float"):
        train_batches(make(problem_type="regression"), batch_size=4, seed=0, remainder="fill")


# Several texts in one row


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(1, 64), max_size=60),
    st.sampled_from([(64, 8, None), (64, 1, 3), (72, 24, 1), (128, 16, None)]),
    st.integers(0, 5),
)
def test_every_text_lies_whole_in_one_row(lengths, sizes, seed):
    packing, lengths = Packing(*sizes), np.array(lengths, np.int64)
    rows = pack_rows(lengths, packing, seed=seed)
    there = rows >= 0
    assert sorted(rows[there].tolist()) == list(range(len(lengths)))
    assert (np.diff(there.astype(int), axis=1) <= 0).all()  # what fills up comes last
    room = np.where(there, packing.room(lengths[rows]) if len(lengths) else 0, 0)
    assert (room.sum(axis=1) <= packing.length).all() and (room % packing.block == 0).all()
    assert there.sum(axis=1).max(initial=0) <= (packing.texts or len(lengths))
    np.testing.assert_array_equal(rows, pack_rows(lengths, packing, seed=seed))


@pytest.mark.parametrize("count", [200, 1000, 5000])
def test_packed_rows_waste_little(count):
    """Texts of 200 to 2,000 tokens, each from a block of 128 on, in rows of 4,096."""
    for seed in range(3):
        lengths = np.random.default_rng(seed).integers(200, 2001, count)
        rows = pack_rows(lengths, Packing(4096, 128), seed=seed)
        assert sorted(rows[rows >= 0].tolist()) == list(range(count))
        assert lengths.sum() >= 0.85 * len(rows) * 4096


PACKING = Packing(64, 8)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        *(("sequence_classification", {}), ("token_classification", {}), ("masked_lm", {})),
        ("sequence_classification", {"problem_type": "regression"}),
    ],
)
def test_packed_rows_hold_the_texts_of_the_data(make, task, options):
    data = make(task, pack=False, **options)
    stream = train_batches(data, batch_size=3, seed=1, epochs=2, packing=PACKING)
    found, labels = collections.Counter(), RECORDS[task].targets[0].labels
    assert stream.buckets == (64,)
    for batch in stream:
        segments, numbers = batch["segment_ids"], batch["segment_rows"]
        assert batch["input_ids"].shape == segments.shape == (3, 64)
        np.testing.assert_array_equal(batch["attention_mask"], segments > 0)
        for row, number in np.argwhere(numbers >= 0).tolist():
            places = np.flatnonzero(segments[row] == number + 1)
            text = data[numbers[row, number]]
            assert places[0] % 8 == 0 and (np.diff(places) == 1).all()
            shown, own = batch["input_ids"][row, places], text["input_ids"]
            if task == "masked_lm":
                asked = batch["labels"][row, places] != -100
                np.testing.assert_array_equal(shown[~asked], own[~asked])
                np.testing.assert_array_equal(batch["labels"][row, places][asked], own[asked])
            else:
                np.testing.assert_array_equal(shown, own)
                where = number if task == "sequence_classification" else places
                np.testing.assert_array_equal(batch[labels][row, where], text[labels])
            found[int(numbers[row, number])] += 1
        if task == "sequence_classification":
            assert (batch[labels][numbers < 0] == (0 if options else -100)).all()
        else:
            assert (batch[labels][segments == 0] == -100).all()
    assert set(found.values()) == {2} and len(found) == len(data)


def test_packed_rows_continue_and_are_shared_by_processes(make):
    data = make("masked_lm", pack=False)
    options = {"batch_size": 2, "microbatches": 2, "seed": 3, "epochs": 3, "packing": PACKING}
    stream = train_batches(data, **options)
    next(stream)
    state, rest = json.loads(json.dumps(stream.get_state())), list(stream)
    fresh = train_batches(data, **options)
    fresh.set_state(state)
    assert len(rest) > 3 and all(map(equal, rest, fresh))
    parts = [train_batches(data, **options, process_index=i, process_count=2) for i in range(2)]
    for place, whole in enumerate(rest, 1):
        halves = [part.batch_at(place) for part in parts]
        assert equal(whole, {n: np.concatenate([h[n] for h in halves], axis=1) for n in whole})
    other = train_batches(data, **options | {"packing": Packing(128, 8)})
    with pytest.raises(ValueError, match="buckets: "):
        other.set_state(state)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("sequence_classification", {"buckets": BUCKETS}, "rows that are shared have one length"),
        ("sequence_classification", {"packing": Packing(24, 8)}, "longer than a row of length=24"),
        ("question_answering", {}, "one for each text or token, not for question_answering"),
        ("multiple_choice", {}, "not for multiple_choice"),
    ],
)
def test_data_that_cannot_share_rows_is_named(make, task, options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(make(task), **{"batch_size": 2, "seed": 0, "packing": PACKING} | options)
    with pytest.raises(ValueError, match="the length a multiple of the block"):
        Packing(20, 8)
