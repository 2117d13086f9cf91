"""A model whose logits stand in a table, as in tests/reference/record_generation.py: all that
`generate` needs of an encoder-decoder.
"""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = dict(np.load(pathlib.Path(__file__).parent / "golden" / "generation.npz"))
CASES, DRAWS = json.loads(str(GOLDEN["cases"])), json.loads(str(GOLDEN["draws"]))
FLOATS = {"table": jnp.asarray(GOLDEN["floats"])}
VOCABULARY = GOLDEN["floats"].shape[-1]
PAD, EOS = 1, 2


class TableConfig:
    """Of the checkpoint of tests/reference/record_generation.py."""

    vocab_size = VOCABULARY
    lsg = None
    max_position_embeddings = 64

    def __init__(self, **fields):
        self.fields = {
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": EOS,
        } | fields

    def other(self, name, default):
        return self.fields.get(name, default)


class TableCache(NamedTuple):
    group: jax.Array  # [B]: the encoder's, once per row
    before: jax.Array  # [rows of beams]: the token before the last

    def take(self, parents):
        texts = self.before.reshape(len(parents), -1)
        return self._replace(before=jnp.take_along_axis(texts, parents, axis=1).ravel())


class Output(NamedTuple):
    logits: jax.Array
    cache: TableCache


class TableModel:
    """The logits behind a row are those of its group, its last token and the one before."""

    has_two_stacks, max_length = True, 64

    def __init__(self, **fields):
        self.config = TableConfig(**fields)

    def apply(
        self,
        variables,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        cache=None,
        cache_length=None,
    ):
        table = variables["params"]["table"]
        if cache is None:
            length = decoder_input_ids.shape[1]
            if decoder_attention_mask is not None:  # what fills a bucket is behind the prompt
                length = jnp.asarray(decoder_attention_mask).sum(axis=1)[0]
            padded = jnp.pad(decoder_input_ids, ((0, 0), (1, 0)))
            last, before = padded[:, length], padded[:, length - 1]
            group = input_ids[:, 0] % len(table)
        else:
            last, before, group = decoder_input_ids[:, 0], cache.before, cache.group
        group_of_beams = jnp.repeat(group, len(last) // len(group))
        logits = table[group_of_beams, (3 * last + before) % table.shape[1]]
        return Output(logits[:, None], TableCache(group, last))


MODEL = TableModel()
