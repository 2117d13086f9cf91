"""`generate` over several devices: the tokens of one device, and what the devices exchange."""

import functools
import sys

import jax
import numpy as np
import pytest
from test_seq2seq import GENERATION, made
from test_sequence import moved

import lsg_flax
from lsg_flax import sharding
from lsg_flax.generation import loop

MODULE = sys.modules["lsg_flax.generation.generate"]  # the function has its name
ROWS, BEAMS, WIDTH = 8, 3, 12
IDS = np.random.default_rng(0).integers(4, 23, (ROWS, 19))
IDS[3, 12:] = 1
SEARCH = {
    "num_beams": BEAMS,
    "num_return_sequences": 2,
    "early_stopping": True,
    "max_length": 24,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 4,
    "forced_bos_token_id": range(4, 12),  # of each row
}


def bart():
    return made("bart", GENERATION, vocab_size=24, decoder_start_token_id=2)


@pytest.fixture
def programs(monkeypatch):
    """The compiled programs of `generate`."""
    made = []

    def compiled(*arguments, how):
        made.append(loop.decode.lower(*arguments, how=how).compile())
        return made[-1](*arguments)

    monkeypatch.setattr(MODULE, "decode", compiled)
    return made


@functools.cache
def found_alone():
    return lsg_flax.generate(*bart(), IDS, **SEARCH)


@pytest.mark.parametrize(
    "axes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "sequence": 2}], ids=str
)
def test_a_mesh_writes_the_tokens_of_one_device(programs, axes, tmp_path):
    """Over `sequence` the encoder's shards exchange their edges."""
    lsg_flax.save_pretrained(tmp_path, *bart())
    mesh = sharding.make_mesh(**axes)
    model, params = lsg_flax.from_pretrained(tmp_path, mesh=mesh)
    found = lsg_flax.generate(model, params, IDS, mesh=mesh, **SEARCH)
    np.testing.assert_array_equal(found, found_alone())
    kinds = {kind for kind, _ in moved(programs[0].as_text())}
    assert "sequence" not in axes or "collective-permute" in kinds
    assert found.shape[1] > 12 and (found == 1).any()  # long, and some rows are shorter


DRAWN = {
    "do_sample": True,
    "num_return_sequences": BEAMS,
    "top_k": 5,
    "top_p": 0.9,
    "max_length": 24,
    "key": jax.random.key(0),
}


@pytest.mark.parametrize(
    "options",
    [SEARCH, DRAWN, pytest.param(DRAWN | {"num_beams": BEAMS}, marks=pytest.mark.slow)],
)
def test_nothing_but_whether_all_have_ended_leaves_a_device(programs, options):
    """Over `data` no cache and no scores of tokens are gathered, whatever picks the tokens; of the
    encoder what it picks keys by, their norms."""
    model, params = bart()
    mesh = sharding.make_mesh(data=8)
    found = lsg_flax.generate(model, sharding.shard(params, mesh), IDS, mesh=mesh, **options)
    exchanged = sorted(moved(programs[0].as_text()))
    np.testing.assert_array_equal(found, lsg_flax.generate(model, params, IDS, **options))
    norms = ROWS * 2 * 32  # of both heads
    assert exchanged == [("all-gather", norms), ("all-reduce", 1)]


@pytest.mark.parametrize(
    ("rows", "placed", "message"),
    [
        (3, True, r"3 rows, which data=8 cannot split evenly; choose .* a multiple of 8"),
        (8, False, r"params are on 1 devices, but mesh has 8: load them with from_pretrained\("),
    ],
)
def test_what_does_not_lie_on_a_mesh_is_refused(rows, placed, message):
    model, params = bart()
    mesh = sharding.make_mesh()
    params = sharding.shard(params, mesh) if placed else params
    with pytest.raises(ValueError, match=message):
        lsg_flax.generate(model, params, IDS[:rows], mesh=mesh)
