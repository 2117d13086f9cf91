"""`generate` over several devices: the tokens of one device, and what the devices exchange."""

import functools
import sys

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


@functools.cache
def found_alone():
    return lsg_flax.generate(*bart(), IDS, **SEARCH)


@pytest.mark.parametrize(
    "axes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "sequence": 2}], ids=str
)
def test_a_mesh_writes_the_tokens_of_one_device(axes, tmp_path):
    lsg_flax.save_pretrained(tmp_path, *bart())
    mesh = sharding.make_mesh(**axes)
    model, params = lsg_flax.from_pretrained(tmp_path, mesh=mesh)
    found = lsg_flax.generate(model, params, IDS, mesh=mesh, **SEARCH)
    np.testing.assert_array_equal(found, found_alone())
    assert found.shape[1] > 12 and (found == 1).any()  # long, and some rows are shorter


def test_no_cache_leaves_its_device(monkeypatch):
    """Over `data` the devices exchange whether all have ended, and what picks the best candidates:
    the highest of every run of 128 tokens, or of a vocabulary as small as this all."""
    programs = []

    def compiled(*arguments, how):
        programs.append(loop.decode.lower(*arguments, how=how).compile())
        return programs[-1](*arguments)

    monkeypatch.setattr(MODULE, "decode", compiled)
    model, params = bart()
    mesh = sharding.make_mesh(data=8)
    found = lsg_flax.generate(model, sharding.shard(params, mesh), IDS, mesh=mesh, **SEARCH)
    np.testing.assert_array_equal(found, found_alone())
    of_texts = ROWS * WIDTH * (30 + 2)  # keys of one layer for the encoder's tokens and globals
    of_written = ROWS * BEAMS * WIDTH * (24 - 1)
    exchanged = moved(programs[0].as_text())
    assert {kind for kind, _ in exchanged} == {"all-gather", "all-reduce"}
    assert max(size for _, size in exchanged) == ROWS * BEAMS * 24 < min(of_texts, of_written)


@pytest.mark.parametrize(
    ("rows", "placed", "message"),
    [
        (3, True, r"3 rows, which data=8 cannot cut evenly; choose .* a multiple of 8"),
        (8, False, r"params lie on 1 devices, but mesh has 8: load them with from_pretrained\("),
    ],
)
def test_what_does_not_lie_on_a_mesh_is_refused(rows, placed, message):
    model, params = bart()
    mesh = sharding.make_mesh()
    params = sharding.shard(params, mesh) if placed else params
    with pytest.raises(ValueError, match=message):
        lsg_flax.generate(model, params, IDS[:rows], mesh=mesh)
