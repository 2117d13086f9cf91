"""Record tests/golden/ from the PyTorch reference, in its environment (see README.md).

    python tests/reference/record_golden.py

tests/golden/golden.json maps a case's name to its fields (those of worker.py), "file" (the .npz
with its arrays), "inputs" and "outputs" (array name -> key in that file) and "report" (facts that
are not arrays), where there are any. A key is "<case>/<array>" of the first case in the file with
that very array: equal arrays are stored once. "strict_reference": true marks the cases in which
the reference lets padding leak into the result.

Axes: n batch, h heads, t tokens without globals, d head size.
"""

import functools

import numpy as np
import record_local
import record_local_transformer
import record_lsh
import record_realm
import record_seq2seq
import record_squeezebert
import worker
from recorder import (
    GOLDEN,
    VOCABULARY,
    Recorder,
    blocks_of,
    leaks,
    normal,
    query_key_value,
    ragged,
    token_ids,
)

SPARSITY_TYPES = ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling")
LSG = dict(block_size=8, sparse_block_size=8, sparsity_factor=2, num_global_tokens=3)
TINY_BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=64,
)
HEADS = {
    "base": ("LSGBertModel", {}),
    "masked_lm": ("LSGBertForMaskedLM", {}),
    "causal_lm": ("LSGBertLMHeadModel", dict(is_decoder=True, pool_with_global=False)),
    "pretraining": ("LSGBertForPreTraining", {}),
    "next_sentence_prediction": ("LSGBertForNextSentencePrediction", {}),
    "sequence_classification": ("LSGBertForSequenceClassification", dict(num_labels=3)),
    "token_classification": ("LSGBertForTokenClassification", dict(num_labels=5)),
    "question_answering": ("LSGBertForQuestionAnswering", {}),
    "multiple_choice": ("LSGBertForMultipleChoice", {}),
    "plain_base": ("BertModel", {}),
    "plain_masked_lm": ("BertForMaskedLM", {}),
}
GRADIENTS_OF = (
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.global_embeddings.weight",
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.1.output.LayerNorm.weight",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.bias",
)


# ---------------------------------------------------------------------------------------------
# Attention


def record_selections(recorder):
    n, h, t, d = 2, 4, 24, 3
    holes = ragged(n, t)
    holes[1, [0, 1, 2, 3, 17]] = False
    for kind in SPARSITY_TYPES:
        sizes = [(8, 1), (8, 2), (8, 4), (8, 8), (4, 2), (4, 4), (16, 2), (16, 4)]
        extra = [dict(lsh_num_pre_rounds=rounds) for rounds in (0, 2)] if kind == "lsh" else []
        configs = [dict(sparse_block_size=s, sparsity_factor=f) for s, f in sizes]
        configs += [dict(sparse_block_size=8, sparsity_factor=4, **fields) for fields in extra]
        for config in configs:
            tag = "_".join(f"{key.split('_')[-1]}{value}" for key, value in config.items())
            config = dict(block_size=8, sparsity_type=kind, **config)
            for padding, mask in (("full", np.ones((n, t), bool)), ("padded", holes)):
                recorder.add(
                    f"selection_{kind}",
                    f"selection_{kind}_{tag}_{padding}",
                    "selection",
                    query_key_value(n, h, t, d, mask=mask),
                    config=config,
                    **leaks(config, mask),
                )


def record_attention(recorder):
    n, h, d = 2, 4, 3
    base = dict(block_size=4, sparse_block_size=4, sparsity_factor=2, num_global_tokens=2)

    def add(name, t, *, padded=True, causal=False, gradients=False, **config):
        config = base | dict(sparsity_type="stride") | config
        mask = ragged(n, t) if padded else np.ones((n, t), bool)
        inputs = query_key_value(
            n, h, config["num_global_tokens"] + t, d, mask=mask, gradients=gradients
        )
        leak = leaks(config, mask) if t > 2 * config["block_size"] else {}
        recorder.add(
            "attention",
            f"attention_{name}",
            "attention",
            inputs,
            config=config,
            causal=causal,
            **leak,
        )

    for kind in (*SPARSITY_TYPES, "none"):
        for causal in (False, True):
            for padded in (False, True):
                name = f"{kind}_{'causal' if causal else 'both'}_{'padded' if padded else 'full'}"
                gradients = padded and (kind in ("norm", "stride") or not causal)
                add(name, 20, padded=padded, causal=causal, gradients=gradients, sparsity_type=kind)
    for t in (5, 8):
        add(f"short_{t}", t, gradients=True)
    for globals_ in (1, 3):
        add(f"globals_{globals_}", 20, num_global_tokens=globals_)
    add("sparse_block_0", 20, sparse_block_size=0)
    add("factor_0", 20, sparsity_factor=0)
    add("factor_1", 20, sparsity_factor=1)
    for causal in (False, True):
        name = "causal" if causal else "both"
        add(f"sparse_block_8_{name}", 20, sparse_block_size=8, causal=causal)
        add(f"step_1_{name}", 20, sparsity_factor=4, causal=causal)
        for size in (2, 3):  # at most 0.75 of a block's representatives: the windows go wrong
            add(
                f"sparse_block_{size}_of_8_{name}",
                40,
                block_size=8,
                sparse_block_size=size,
                causal=causal,
            )


def record_standalone_attention(recorder):
    n, h, d = 2, 4, 3

    def add(
        name,
        t,
        *,
        cls="LSGSelfAttention",
        mask="ragged",
        gradients=False,
        key_heads=None,
        **options,
    ):
        masks = dict(none=None, ragged=ragged(n, t), square=np.tril(np.ones((n, t, t), bool)))
        inputs = query_key_value(
            n, h, t, d, mask=masks[mask], gradients=gradients, key_heads=key_heads
        )
        leak = {}
        if "sparsity_type" in options and t > 2 * options["block_size"]:
            visible = ragged(n, t) if mask == "ragged" else np.ones((n, t), bool)
            visible[:, 0] &= not options.get("compute_global_attention", True)
            leak = leaks(
                options, blocks_of(visible, options["block_size"]), types=("pooling", "bos_pooling")
            )
        fields = {"class": cls} | dict(options=options) | leak
        name = f"standalone_attention_{name}"
        recorder.add("standalone_attention", name, "standalone_attention", inputs, **fields)

    for causal in (False, True):
        direction = "causal" if causal else "both"
        common = dict(block_size=8, is_causal=causal)
        for kind in (None, *(kind for kind in SPARSITY_TYPES if kind != "lsh")):
            fields = dict(sparsity_type=kind, sparsity_factor=4)
            for compute in (True, False):
                name = f"{kind}_{direction}_{'global' if compute else 'noglobal'}"
                gradients = kind == "norm" and compute
                add(
                    name,
                    21,
                    gradients=gradients,
                    compute_global_attention=compute,
                    **fields,
                    **common,
                )
            add(f"{kind}_{direction}_whole_blocks", 24, mask="none", **fields, **common)
            if not causal:
                wide = dict(sparsity_type=kind, sparsity_factor=8, block_size=16)
                add(f"{kind}_{direction}_factor_8", 37, mask="none", **wide)
        fields = dict(sparsity_type="stride", sparsity_factor=4)
        for t in (5, 16):
            add(f"short_{t}_{direction}", t, **fields, **common)
        add(f"factor_2_{direction}", 24, sparsity_type="stride", sparsity_factor=2, **common)
        add(
            f"one_key_head_{direction}",
            24,
            key_heads=1,
            sparsity_type="pooling",
            sparsity_factor=4,
            **common,
        )
        for compute in (True, False):
            name = f"block_local_{direction}_{'global' if compute else 'noglobal'}"
            add(name, 21, cls="BlockLocalSelfAttention", compute_global_attention=compute, **common)
    for t in (13, 24):
        add(f"square_mask_{t}", t, mask="square", block_size=8, is_causal=True, **fields)


# ---------------------------------------------------------------------------------------------
# Models


def make_model(path, cls, config, **fields):
    case = dict(kind="make_model", out=path, config=config, **{"class": cls}, **fields)
    worker.run_case(case, {}, GOLDEN)
    (GOLDEN / path / "generation_config.json").unlink(missing_ok=True)


def add_model(
    recorder, head, name, t, *, padded=True, choices=(), config=None, inputs=None, **fields
):
    """`inputs` are those besides input_ids and attention_mask; None takes one of these away."""
    config = config or {}
    n = 2 if padded else 1
    mask = ragged(n, t) if padded else np.ones((n, t), bool)
    arguments = dict(input_ids=token_ids(n, *choices, t))
    if padded:  # [n,t], or [n,choices,t] with the same mask for all choices
        per_choice = mask.reshape(n, *(1 for _ in choices), t)
        arguments["attention_mask"] = np.broadcast_to(per_choice, (n, *choices, t)).astype(np.int32)
    arguments = {k: v for k, v in (arguments | (inputs or {})).items() if v is not None}
    leak = {}
    if t > 2 * LSG["block_size"] and not head.startswith("plain"):
        sparsity = LSG | dict(sparsity_type="norm") | config
        leak = leaks(sparsity, blocks_of(mask, LSG["block_size"]))
    fields |= {"class": HEADS[head][0]} | dict(checkpoint=f"bert_{head}", config=config) | leak
    recorder.add("model_bert", f"model_bert_{head}_{name}", "model", arguments, **fields)


def record_masked_lm(add):
    def masked_lm(name, t, **fields):
        add("masked_lm", name, t, **fields)

    for kind in SPARSITY_TYPES:
        for t in (5, 16, 17, 40, 61):
            for padded in (False, True):
                name = f"{kind}_t{t}_{'padded' if padded else 'full'}"
                masked_lm(name, t, padded=padded, config=dict(sparsity_type=kind))
    t = 21
    for name, config in {
        "no_sparsity": dict(sparsity_type="none"),
        "globals_1": dict(num_global_tokens=1),
        "no_pool_with_global": dict(pool_with_global=False),
        "mask_first_token": dict(mask_first_token=True),
        "factor_4_sparse_16": dict(sparsity_type="stride", sparsity_factor=4, sparse_block_size=16),
        "lsh_pre_rounds_2": dict(sparsity_type="lsh", lsh_num_pre_rounds=2, sparsity_factor=4),
    }.items():
        masked_lm(name, t, config=config)
    for length in (16, 40):
        masked_lm(f"not_adaptive_t{length}", length, config=dict(adaptive=False))
    masked_lm("hidden_states", t, output_hidden_states=True)
    masked_lm(
        "position_ids", t, inputs=dict(position_ids=np.arange(t, dtype=np.int32)[None, ::-1] + 7)
    )
    segments = (np.arange(t) > 8).astype(np.int32)[None].repeat(2, 0)
    masked_lm("token_type_ids", t, inputs=dict(token_type_ids=segments))
    embeds = normal(2, t, TINY_BERT["hidden_size"])
    masked_lm("inputs_embeds", t, inputs=dict(input_ids=None, inputs_embeds=embeds))
    for kind in ("norm", "stride", "pooling"):
        weights = dict(weight_logits=normal(2, t, VOCABULARY) / 8)
        masked_lm(
            f"gradients_{kind}",
            t,
            inputs=weights,
            config=dict(sparsity_type=kind),
            grad_of=GRADIENTS_OF,
        )


def record_heads(add):
    labels = token_ids(2, 16)
    masked = np.where(np.arange(16) % 3 == 0, labels, -100)
    kept = labels % 5
    short = {  # the labels of each head at t = 16, which add a loss
        "base": {},
        "masked_lm": dict(labels=masked),
        "pretraining": dict(labels=masked, next_sentence_label=np.array([0, 1], np.int32)),
        "next_sentence_prediction": dict(labels=np.array([1, 0], np.int32)),
        "sequence_classification": dict(labels=np.array([2, 0], np.int32)),
        "token_classification": dict(labels=np.where(masked < 0, masked, kept)),
        "question_answering": dict(
            start_positions=np.array([1, 3], np.int32), end_positions=np.array([4, 16], np.int32)
        ),
        "multiple_choice": dict(labels=np.array([1, 2], np.int32)),
        "plain_base": {},
        "plain_masked_lm": dict(labels=masked),
    }
    for head, inputs in short.items():
        choices = (3,) if head == "multiple_choice" else ()
        add(head, "t16_padded", 16, choices=choices, inputs=inputs)
        if head != "masked_lm":  # at 61 it has been done
            add(head, "t61_padded", 61, choices=choices)
    head = "sequence_classification"
    targets = normal(2, 3)
    multi_label = dict(problem_type="multi_label_classification")
    add(
        head,
        "regression_loss",
        16,
        inputs=dict(labels=targets),
        config=dict(problem_type="regression"),
    )
    add(
        head,
        "multi_label_loss",
        16,
        inputs=dict(labels=(targets > 0).astype(np.float32)),
        config=multi_label,
    )
    add("plain_base", "hidden_states", 16, output_hidden_states=True)

    labels = dict(labels=token_ids(2, 21))  # the causal model runs only above two blocks
    for kind in SPARSITY_TYPES:
        add("causal_lm", f"{kind}_t21_padded", 21, config=dict(sparsity_type=kind), inputs=labels)
    add("causal_lm", "pool_with_global_t21", 21, config=dict(pool_with_global=True))
    for t in (40, 61):
        add("causal_lm", f"norm_t{t}_full", t, padded=False)
    add("causal_lm", "norm_t61_padded", 61)


def record_models(recorder):
    for seed, (head, (cls, config)) in enumerate(HEADS.items()):
        config = TINY_BERT | (LSG if cls.startswith("LSG") else {}) | config
        make_model(f"bert_{head}", cls, config, seed=seed, scale=0.3)
    add = functools.partial(add_model, recorder)
    record_masked_lm(add)
    record_heads(add)


# One head of every other family, with all gradients: (class behind LSG, its fields, an output).
FAMILIES = {
    "roberta": ("RobertaForSequenceClassification", dict(pad_token_id=1), "logits"),
    "xlm-roberta": ("XLMRobertaForMaskedLM", dict(pad_token_id=1), "logits"),
    "camembert": ("CamembertForTokenClassification", dict(pad_token_id=1), "logits"),
    "electra": ("ElectraForPreTraining", dict(embedding_size=10), "logits"),
    "distilbert": ("DistilBertForSequenceClassification", {}, "logits"),
    "albert": (
        "AlbertForPreTraining",
        dict(embedding_size=10, num_hidden_groups=1, inner_group_num=2, hidden_act="gelu_new"),
        "sop_logits",
    ),
}
DISTILBERT_NAMES = dict(
    hidden_size="dim",
    num_hidden_layers="n_layers",
    num_attention_heads="n_heads",
    intermediate_size="hidden_dim",
)


def record_families(recorder):
    t = 29
    mask = ragged(2, t)
    for seed, (family, (cls, fields, output)) in enumerate(FAMILIES.items()):
        sizes = TINY_BERT | dict(num_labels=3, model_type=family)
        if family == "distilbert":
            sizes = {DISTILBERT_NAMES.get(k, k): v for k, v in sizes.items()}
        folder = f"{family.replace('-', '_')}_spread"
        make_model(folder, f"LSG{cls}", sizes | LSG | fields, seed=seed, scale=0.3)
        pad = fields.get("pad_token_id", 0)
        ids = np.where(mask, token_ids(2, t), pad).astype(np.int32)
        arguments = dict(input_ids=ids, attention_mask=mask.astype(np.int32))
        run = {"class": f"LSG{cls}", "checkpoint": folder}
        plain = worker.run_case(dict(name="", kind="model", **run), arguments, GOLDEN)[0]
        weight = normal(*plain[output].shape) / 8
        if weight.shape[:2] == mask.shape:  # as a loss: padding's own embedding gets no gradient
            weight = np.where(mask.reshape(2, t, *[1] * (weight.ndim - 2)), weight, 0)
        arguments[f"weight_{output}"] = weight.astype(np.float32)
        name = f"model_{folder}"
        recorder.add("model_families", name, "model", arguments, grad_of="all", **run)


# ---------------------------------------------------------------------------------------------
# Conversion


def record_conversions(recorder):
    small = dict(
        vocab_size=VOCABULARY,
        hidden_size=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
    )
    for rows in (300, 512, 514, 1024):
        config = small | dict(max_position_embeddings=rows)
        make_model(f"bert_to_convert_{rows}", "BertForMaskedLM", config, seed=rows, tokenizer=True)
    config = small | LSG | dict(max_position_embeddings=512)
    make_model("bert_to_convert_lsg", "LSGBertForMaskedLM", config, seed=1, tokenizer=True)

    def add(source, name, *, config=None, architecture=None, **options):
        fields = dict(options=options, config=config or {}, architecture=architecture)
        name = f"convert_bert_{source}_{name}"
        recorder.add(
            "convert_bert", name, "convert", {}, checkpoint=f"bert_to_convert_{source}", **fields
        )

    for length in (100, 512, 513, 1024, 4100):
        add(512, f"max{length}", max_sequence_length=length)
    for stride in (1, 32, 128, 512):
        add(512, f"stride{stride}", max_sequence_length=512, global_positional_stride=stride)
    add(512, "no_token_ids", max_sequence_length=512, use_token_ids=False)
    add(512, "random", max_sequence_length=512, random_global_init=True)
    add(
        512,
        "random_no_token_ids",
        max_sequence_length=512,
        random_global_init=True,
        use_token_ids=False,
    )
    add(
        512,
        "random_stride128",
        max_sequence_length=512,
        random_global_init=True,
        global_positional_stride=128,
    )
    overrides = dict(
        num_global_tokens=7,
        block_size=16,
        sparse_block_size=16,
        sparsity_type="stride",
        sparsity_factor=4,
    )
    add(512, "overrides", max_sequence_length=512, config=overrides)
    add(512, "base", max_sequence_length=512, architecture="BertModel")
    add(512, "keep_first_ignored", max_sequence_length=512, keep_first_global_token=True)
    for length in (514, 1024):
        add(514, f"max{length}", max_sequence_length=length)
    for length in (1024, 2048, 4100):
        add(1024, f"max{length}", max_sequence_length=length)
    for stride in (32, 128):
        add(1024, f"stride{stride}", max_sequence_length=1024, global_positional_stride=stride)
    for length in (512, 1024):
        add(300, f"max{length}", max_sequence_length=length)
    add(300, "random", max_sequence_length=512, random_global_init=True)
    add("lsg", "rebuilt", max_sequence_length=1024)
    add("lsg", "keep_first", max_sequence_length=1024, keep_first_global_token=True)
    add(
        "lsg",
        "keep_first_random",
        max_sequence_length=512,
        keep_first_global_token=True,
        random_global_init=True,
    )
    add("lsg", "resize", max_sequence_length=1024, resize_lsg=True)


def main():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    recorder = Recorder()
    record_selections(recorder)
    record_attention(recorder)
    record_standalone_attention(recorder)
    record_models(recorder)
    record_families(recorder)
    record_conversions(recorder)
    record_seq2seq.record(recorder)
    record_local.record(recorder)
    record_local_transformer.record(recorder)
    record_lsh.record(recorder)
    record_squeezebert.record(recorder)
    record_realm.record(recorder)
    recorder.write()


if __name__ == "__main__":
    main()
