"""Several texts in one row: each has the outputs and gradients that it has alone in a row."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import SIZES, spelled

import lsg_flax
from lsg_flax.attention import (
    full_attention,
    local_attention,
    local_attention_reference,
    lsg_attention,
    lsg_attention_reference,
)
from lsg_flax.models import read_config
from lsg_flax.patterns import Local
from lsg_flax.patterns.config import SPARSITY_TYPES, LSGConfig
from lsg_flax.training.losses import loss_fn

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BLOCK = 4
LENGTHS = (13, 3, 8, 22)  # of the texts: over two blocks and not, whole blocks and not
PATTERNS = [  # sparsity_type, sparse_block_size, sparsity_factor
    *(("norm", 4, 2), ("pooling", 8, 2), ("lsh", 4, 2), ("stride", 4, 2), ("block_stride", 4, 2)),
    *(("bos_pooling", 4, 2), ("none", 4, 2), ("norm", 4, 4), ("stride", 4, 1), ("lsh", 4, 4)),
]


def layout(lengths=LENGTHS, block: int = BLOCK, extra: int = BLOCK):
    """segment_ids [T] of texts that begin at blocks, with padding behind, and the places of
    each."""
    sizes = [-(-length // block) * block for length in lengths]
    begins = np.cumsum([0, *sizes[:-1]])
    places = [np.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)]
    segments = np.zeros(sum(sizes) + extra, np.int32)
    for number, own in enumerate(places, 1):
        segments[own] = number
    return segments, places


def normal(*shapes, seed: int = 0):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]


def with_gradients(function, inputs, cotangent):
    context, pullback = jax.vjp(function, *inputs)
    return context, *pullback(cotangent)


def check_alone(length, alone, places, *packed):
    """Functions of a packed row of this length give what `alone` gives for each text by itself."""
    *inputs, cotangent = normal(*[(1, length, 4, 4)] * 4)
    own = jnp.zeros(length).at[np.concatenate(places)].set(1.0)  # padding has no gradients
    cotangent = cotangent * own[None, :, None, None]

    @jax.jit
    def run(inputs, cotangent):
        whole = [with_gradients(function, inputs, cotangent) for function in packed]
        parts = [
            with_gradients(alone, [x[:, at] for x in inputs], cotangent[:, at]) for at in places
        ]
        return whole, parts

    whole, parts = run(inputs, cotangent)
    for results in whole:
        for own, expected in zip(places, parts, strict=True):
            for one, other in zip(results, expected, strict=True):
                np.testing.assert_allclose(one[:, own], other, **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kind", "sparse", "factor"), PATTERNS)
def test_packed_texts_attend_as_alone(kind, sparse, factor, causal):
    config = LSGConfig(
        block_size=BLOCK,
        sparse_block_size=sparse,
        sparsity_factor=factor,
        sparsity_type=kind,
        num_global_tokens=2,
    )
    segments, places = layout()
    texts = len(places) + 1  # one is not there
    options = {"config": config, "causal": causal}
    packing = {"segment_ids": jnp.asarray(segments)[None], "num_segments": texts}
    own = [
        np.concatenate([2 * number + np.arange(2), 2 * texts + at])
        for number, at in enumerate(places)
    ]
    packed = [
        functools.partial(function, **options, **packing)
        for function in (lsg_attention, lsg_attention_reference)
    ]
    alone = functools.partial(lsg_attention, **options)
    check_alone(2 * texts + len(segments), alone, own, *packed)


@pytest.mark.parametrize("lengths", [LENGTHS, (3, 4)])
def test_packed_texts_without_globals_attend_as_alone(lengths):
    segments, places = layout(lengths, extra=4)
    options = {"config": LSGConfig(**SMALL), "global_tokens": "none"}
    packed = functools.partial(lsg_attention, **options, segment_ids=jnp.asarray(segments)[None])
    check_alone(len(segments), functools.partial(lsg_attention, **options), places, packed)


SMALL = {"block_size": BLOCK, "sparse_block_size": 4, "num_global_tokens": 2}


@pytest.mark.parametrize("causal", [False, True])
def test_full_and_local_attention_of_packed_texts(causal):
    segments, places = layout(block=1)
    ids = jnp.asarray(segments)[None]
    full = functools.partial(full_attention, causal=causal)
    check_alone(len(segments), full, places, functools.partial(full, segment_ids=ids))

    segments, places = layout()
    ids = jnp.asarray(segments)[None]
    local = functools.partial(local_attention, window_size=BLOCK, causal=causal)
    pattern = Local(BLOCK, causal, 1, int(not causal), rotary=None)
    plain = functools.partial(local, use_rotary_pos_emb=False)
    oracle = functools.partial(local_attention_reference, pattern=pattern, segment_ids=ids)
    check_alone(len(segments), local, places, functools.partial(local, segment_ids=ids))
    packed = functools.partial(plain, segment_ids=ids)
    check_alone(len(segments), plain, places, packed, oracle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": LSGConfig(**SMALL, strict_reference=True)}, "strict_reference=True"),
        ({"config": LSGConfig(block_size=12, sparse_block_size=8)}, "sparse_block_size=8 tokens"),
        ({"global_tokens": "first_token"}, "choose 'prepended' or 'none'"),
        ({"num_segments": None}, "the most texts of a row"),
        ({"segment_ids": jnp.ones((1, 24), bool)}, "segment_ids must be integers of shape"),
        ({"segment_ids": jnp.ones((1, 8), int)}, "segment_ids must be integers of shape"),
        ({"segment_ids": None}, "num_segments=2 needs segment_ids"),
        ({"segment_ids": jnp.ones((1, 24), int).at[0, 6:].set(2)}, "start at a multiple of"),
        ({"implementation": "pallas"}, "implementation='pallas' has no kernel"),
    ],
)
def test_what_cannot_be_packed_is_named(change, says, unchecked):
    options = {
        "config": LSGConfig(**SMALL),
        "segment_ids": jnp.repeat(jnp.array([[1, 2]]), 12, axis=1),
        "num_segments": 2,
    } | change
    query = jnp.ones((1, 24 + 2 * options["config"].num_global_tokens, 1, 2))
    call = functools.partial(lsg_attention, query, query, query, **options)
    with pytest.raises(ValueError, match=says):
        call()


WIDE = {"max_position_embeddings": 24}  # a row is longer than the table, each text is not
LSG = LSGConfig(**SMALL)
MODELS = [  # family, task, LSG or full attention
    *(("bert", "masked_lm", LSG), ("bert", "causal_lm", LSG), ("bert", "pretraining", LSG)),
    *(("bert", "sequence_classification", LSG), ("bert", "base", None), ("albert", "base", LSG)),
    ("roberta", "token_classification", LSG),
    ("roberta", "sequence_classification", None),
    ("distilbert", "sequence_classification", LSG),
    ("electra", "causal_lm", None),
    ("squeezebert", "sequence_classification", LSG),
    ("bert", "sequence_classification", dataclasses.replace(LSG, mask_first_token=True)),
    ("bert", "token_classification", dataclasses.replace(LSG, pool_with_global=False)),
    *(
        ("bert", "token_classification", dataclasses.replace(LSG, sparsity_type=kind))
        for kind in SPARSITY_TYPES
        if kind != LSG.sparsity_type
    ),
]


def made(family: str, task: str, lsg: LSGConfig | None, **fields):
    narrow = {"embedding_size": 8} if family in ("electra", "albert") else {}
    sizes = SIZES | narrow | WIDE | fields
    if family == "roberta":
        sizes |= {"max_position_embeddings": 26}
    config = read_config(spelled(family, sizes)).with_overrides(lsg=lsg)
    model = lsg_flax.Model(config, task)
    params = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())["params"]
    return model, jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params
    )


def packed_inputs(seed: int = 0):
    """A row of `LENGTHS`, with segments and token types, and the places of its texts."""
    segments, places = layout()
    generator = np.random.default_rng(seed)
    ids = np.where(segments > 0, generator.integers(2, SIZES["vocab_size"], segments.shape), 1)
    return {"input_ids": ids[None], "segment_ids": segments[None]}, places


@pytest.mark.parametrize(("family", "task", "lsg"), MODELS)
def test_packed_texts_have_the_outputs_that_they_have_alone(family, task, lsg):
    model, params = made(family, task, lsg)
    inputs, places = packed_inputs()
    texts = len(places) + 1

    @jax.jit
    def run(params):
        packed = model.apply({"params": params}, **inputs, num_segments=texts)
        alone = [model.apply({"params": params}, inputs["input_ids"][:, at]) for at in places]
        return packed, alone

    packed, alone = run(params)
    per_token = model.task_record.per_token
    for name, value in vars(packed).items():
        for number, (at, other) in enumerate(zip(places, alone, strict=True)):
            if value is not None:
                found = value[:, at] if name in per_token else value[:, number]
                np.testing.assert_allclose(found, getattr(other, name), **CLOSE)


SEVERAL, NUMBERS = "multi_label_classification", "regression"


@pytest.mark.parametrize(
    ("task", "problem", "outputs"),
    [
        *(("masked_lm", None, 3), ("causal_lm", None, 3), ("sequence_classification", None, 3)),
        ("sequence_classification", SEVERAL, 3),
        *(("sequence_classification", NUMBERS, count) for count in (1, 2)),
    ],
)
def test_the_loss_of_packed_texts_is_that_of_the_same_texts(task, problem, outputs):
    model, params = made("bert", task, LSG, num_labels=outputs)
    model = model.clone(config=model.config.with_overrides(problem_type=problem))
    inputs, places = packed_inputs()
    longest = max(map(len, places))
    ids = inputs["input_ids"][0]
    rows = np.stack([np.pad(ids[at], (0, longest - len(at))) for at in places])
    mask = np.stack([np.arange(longest) < len(at) for at in places])
    if problem is not None:
        shape = (len(places), outputs) if outputs > 1 else (len(places),)
        labels = np.random.default_rng(0).integers(0, 2, shape).astype(np.float32)
        packed = np.concatenate([labels, np.full_like(labels[:1], 9.0)])[None]
    elif task == "sequence_classification":
        labels = np.array([2, 0, 1, 1])
        packed = np.append(labels, -100)[None]  # a text that is not there
    else:
        labels, packed = np.where(mask, rows, -100), np.where(inputs["segment_ids"], ids, -100)
    alone = {"input_ids": rows, "attention_mask": mask, "labels": labels}
    together = inputs | {"labels": packed, "segment_rows": np.array([[0, 1, 2, 3, -1]])}

    @jax.jit
    def both(params):
        losses = [functools.partial(loss_fn, model, batch=batch) for batch in (alone, together)]
        return [jax.value_and_grad(loss, has_aux=True)(params) for loss in losses]

    (one, gradients), (other, of_packed) = both(params)
    assert one[1]["tokens"] == other[1]["tokens"] == sum(LENGTHS)
    assert one[1]["targets"] == other[1]["targets"] > 0
    np.testing.assert_allclose(one[0], other[0], **CLOSE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), gradients, of_packed)


def test_the_documented_program_runs():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "training.md").read_text()
    section = page.split("\n## Packing\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    exec(compile(block, "training.md", "exec"), {})


LSG_BERT = ("bert", "masked_lm", LSG)


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (LSG_BERT, {"segment_ids": [[1] * 8 + [3] * 8]}, "at most num_segments=2 texts"),
        (LSG_BERT, {"segment_ids": [[2] * 8 + [1] * 8]}, "of row 0 are invalid"),
        (LSG_BERT, {"segment_ids": [[1] * 6 + [2] * 10]}, "first at a multiple of block_size=4"),
        (
            LSG_BERT,
            {"segment_ids": [[1] * 4 + [0] * 4 + [1] * 8]},
            "tokens of each must be contiguous",
        ),
        (LSG_BERT, {"segment_ids": [[1.0] * 16]}, "dtype float.*must be integers"),
        (LSG_BERT, {"segment_ids": [[1] * 8]}, "segment_ids has shape .1, 8., but the inputs"),
        (LSG_BERT, {"segment_ids": None}, "num_segments=2 needs segment_ids"),
        (LSG_BERT, {"num_segments": 0}, "num_segments=0 must be at least 1"),
        (("bert", "causal_lm", LSG), {"cache_length": 16}, "segment_ids with a cache"),
        (("bert", "multiple_choice", LSG), {}, "not supported for task='multiple_choice'"),
        (("bert", "sequence_classification", None), {"num_segments": None}, "give num_segments="),
        (("bart", "sequence_classification", None), {}, "not a bart model"),
        (("reformer", "masked_lm", None), {}, "not a reformer model"),
        (
            ("bert", "base", dataclasses.replace(LSG, strict_reference=True)),
            {},
            "strict_reference=True reproduces",
        ),
    ],
)
def test_segments_that_a_model_cannot_take_are_named(kind, given, says):
    family, task, lsg = kind
    fields = read_config(spelled(family, SIZES) if family != "reformer" else {"model_type": family})
    model = lsg_flax.Model(fields.with_overrides(lsg=lsg) if lsg else fields, task)
    values = {"segment_ids": [[1] * 8 + [2] * 8], "num_segments": 2} | given
    if values["segment_ids"] is not None:
        values["segment_ids"] = np.array(values["segment_ids"])
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda: model.apply({}, np.ones((1, 16), np.int32), **values))


def test_wrong_segments_under_jit_give_nan():
    model, params = made(*LSG_BERT)
    run = jax.jit(lambda ids, segments: model.apply({"params": params}, ids, segment_ids=segments))
    segments = np.array([[1] * 8 + [2] * 8, [1] * 6 + [2] * 10])
    finite = np.isfinite(run(np.ones((2, 16), np.int32), segments).logits).all(axis=(1, 2))
    assert finite.tolist() == [True, False]
