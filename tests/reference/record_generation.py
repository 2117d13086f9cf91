"""Record tests/golden/generation.npz from the PyTorch reference, in its environment (see
README.md): transformers' `generate` with all options, for a model whose logits stand in a table.

    python tests/reference/record_generation.py

The model is an encoder-decoder: the logits behind a row of decoder tokens are
table[first encoder token % groups, (3 * last + last but one) % rows], 0 for what is not there.

Arrays: input_ids [b,s]; floats, ties [groups,rows,vocabulary], two tables; cases, a list of [table,
options] as JSON; ids_N and, with beams, scores_N: what case N gives. draws, a list of options as
JSON: drawn_N [texts,length] and times_N [texts], how often each text came in DRAWS draws.

The log-probabilities of `ties` are whole numbers: one logit of each row is 0 and the others are so
low that the sum of all is 1 in float32. Which of equal candidates torch.topk puts first depends on
the device and the sizes, so it is replaced by a stable sort: the first comes first.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

OUTPUT = Path(__file__).resolve().parents[1] / "golden" / "generation.npz"
GROUPS, ROWS, VOCABULARY = 3, 17, 12
BOS, PAD, EOS = 0, 1, 2


class TableConfig(PretrainedConfig):
    model_type = "table"


class Encoder(torch.nn.Module):
    main_input_name = "input_ids"

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        return BaseModelOutput(last_hidden_state=input_ids[..., None].float())


class TableModel(PreTrainedModel):
    config_class = TableConfig
    main_input_name = "input_ids"

    def __init__(self, config, table):
        super().__init__(config)
        self.table = torch.nn.Parameter(table)
        self.encoder = Encoder()

    def get_encoder(self):
        return self.encoder

    def can_generate(self):
        return True

    def prepare_inputs_for_generation(self, decoder_input_ids, encoder_outputs=None, **_):
        return {"decoder_input_ids": decoder_input_ids, "encoder_outputs": encoder_outputs}

    def forward(
        self, input_ids=None, attention_mask=None, decoder_input_ids=None, encoder_outputs=None, **_
    ):
        group = encoder_outputs.last_hidden_state[:, 0, 0].long() % len(self.table)
        last = decoder_input_ids[:, -1]
        before = decoder_input_ids[:, -2] if decoder_input_ids.shape[1] > 1 else 0 * last
        logits = self.table[group, (3 * last + before) % self.table.shape[1]]
        return Seq2SeqLMOutput(logits=logits[:, None].clone())


def tables(generator):
    """Random logits that like to end, and whole log-probabilities with many ties."""
    shape = (GROUPS, ROWS, VOCABULARY)
    floats = (1.5 * generator.standard_normal(shape)).astype(np.float32)
    floats[..., EOS] += 1
    ties = -24.0 - generator.integers(0, 3, shape).astype(np.float32)
    best = generator.integers(0, VOCABULARY, shape[:2])
    np.put_along_axis(ties, best[..., None], 0.0, axis=2)
    return {"floats": floats, "ties": ties}


def cases():
    """[table, options]"""
    rules = [
        {"min_length": 9},
        {"min_new_tokens": 5, "eos_token_id": [2, 3]},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "no_repeat_ngram_size": 1, "max_length": 9},
        {"no_repeat_ngram_size": 2, "min_length": 12},
        {"no_repeat_ngram_size": 3, "min_length": 12},
        {"encoder_no_repeat_ngram_size": 1, "min_length": 6},
        {"encoder_no_repeat_ngram_size": 2, "min_length": 9},
        {"bad_words_ids": [[3], [4, 5], [2], [6, 7, 8], [9, 9], [5, 3]], "min_length": 9},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 2, "min_length": 13},
        {"forced_eos_token_id": [4, 2], "max_length": 7},
        {"suppress_tokens": [3, 4, 5], "begin_suppress_tokens": [6, 7, 2]},
        {"forced_bos_token_id": 5, "begin_suppress_tokens": [6, 7, 8, 2]},
        {"eos_token_id": [7, 2, 4]},
        {"eos_token_id": None, "max_length": 9},
        {"max_length": None, "max_new_tokens": 6},
        {"max_length": 2, "forced_eos_token_id": 2},
        {"decoder_input_ids": [[5, 6], [7, 8], [9, 3]], "forced_bos_token_id": 4},
        {"decoder_input_ids": [[5, 6, 4], [2, 8, 9], [2, 3, 3]], "no_repeat_ngram_size": 2},
        {"decoder_input_ids": [[2, 6], [2, 8], [2, 3]], "max_new_tokens": 8, "max_length": None},
        {"decoder_start_token_id": 8, "begin_suppress_tokens": [3, 9]},
        {
            "min_length": 5,
            "no_repeat_ngram_size": 2,
            "repetition_penalty": 1.2,
            "bad_words_ids": [[4], [5, 6]],
            "forced_bos_token_id": 0,
            "forced_eos_token_id": 2,
        },
    ]
    found = [[table, options] for table in ("floats", "ties") for options in ({}, *rules)]
    found += [
        [table, {"num_beams": 4, "num_return_sequences": 2} | options]
        for table in ("floats", "ties")
        for options in rules
    ]
    found += [
        [
            table,
            {
                "num_beams": beams,
                "num_return_sequences": beams,
                "early_stopping": early,
                "length_penalty": penalty,
            },
        ]
        for table in ("floats", "ties")
        for beams, penalties in ((2, (1.0,)), (4, (-1.0, 0.0, 0.5, 1.0, 2.0)))
        for early in (True, False, "never")
        for penalty in penalties
    ]
    return found


DRAWS = 4000
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 3, "top_p": 0.9, "max_length": 4}


def draws():
    """Options of sampling, for the second row of the input."""
    rules = {"bad_words_ids": [[6]], "repetition_penalty": 1.5}
    return [
        SAMPLING | rules,
        SAMPLING | {"num_beams": 2, "top_k": 6},
        SAMPLING | {"num_beams": 3, "top_k": 1},
    ]


def run(model, input_ids, options):
    options = {"max_length": 14} | options
    prompt = options.pop("decoder_input_ids", None)
    extra = {} if prompt is None else {"decoder_input_ids": torch.tensor(prompt)}
    # A None given to `generate` alone does not reach the loop, which takes the model's again.
    model.generation_config.eos_token_id = options.get("eos_token_id", EOS)
    out = model.generate(
        input_ids, **extra, **options, return_dict_in_generate=True, output_scores=True
    )
    scores = getattr(out, "sequences_scores", None)
    return out.sequences.numpy(), None if scores is None else scores.numpy()


def stable_topk(x, k, dim=-1, largest=True, sorted=True):
    values, places = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), places.narrow(dim, 0, k)


def main():
    generator = np.random.default_rng(7)
    arrays = tables(generator)
    input_ids = generator.integers(3, VOCABULARY, (3, 6))
    input_ids[:, 0] = [3, 4, 8]  # each its own group
    input_ids[2, 4:] = PAD
    models = {}
    for name, table in arrays.items():
        ids = {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS}
        config = TableConfig(is_encoder_decoder=True, decoder_start_token_id=EOS, **ids)
        models[name] = TableModel(config, torch.tensor(table)).eval()
        models[name].generation_config = GenerationConfig(decoder_start_token_id=EOS, **ids)
    results, plain, listed, unstable = {}, torch.topk, cases(), 0
    for number, (table, options) in enumerate(listed):
        torch.topk = plain
        usual = run(models[table], torch.tensor(input_ids), options)
        torch.topk = stable_topk
        ids, scores = run(models[table], torch.tensor(input_ids), options)
        if table == "floats":
            assert np.array_equal(usual[0], ids), (number, options)
        unstable += not np.array_equal(usual[0], ids)
        results[f"ids_{number}"] = ids.astype(np.int32)
        if scores is not None:
            results[f"scores_{number}"] = scores
    for number, options in enumerate(draws()):
        torch.manual_seed(number)
        rows = torch.tensor(input_ids[1:2]).repeat(DRAWS, 1)
        ids, _ = run(models["floats"], rows, options)
        drawn, times = np.unique(ids, axis=0, return_counts=True)
        results |= {f"drawn_{number}": drawn.astype(np.int32), f"times_{number}": times}
    results["draws"] = json.dumps(draws())
    np.savez_compressed(
        OUTPUT, **arrays, input_ids=input_ids.astype(np.int32), cases=json.dumps(listed), **results
    )
    print(f"{OUTPUT}: {len(listed)} cases, {OUTPUT.stat().st_size} bytes")
    print(
        f"{unstable} of them with ties come out otherwise with torch.topk as it is on this machine"
    )


if __name__ == "__main__":
    main()
