"""The random cases of the live comparison, all functions of one seed."""

import os

import numpy as np
from jobs import Case
from tiny_config import OF_TRANSFORMERS, has_two_stacks, spelled

from lsg_flax.models import FAMILIES, read_config
from lsg_flax.models.config_json import DIALECTS
from lsg_flax.patterns.config import SPARSITY_TYPES, LSGConfig
from lsg_flax.patterns.sparsity import effective_type

SEED = int(os.environ.get("LSG_PARITY_SEED", "0"))
VOCABULARY = 37
# REALM has cases of its own, cases_realm.py.
COMPARED = [family for family in OF_TRANSFORMERS if family != "realm"]
HEADS = [(family, task) for family in COMPARED for task in FAMILIES[family].heads]
PATTERNS_PER_HEAD = {"bert": 2}  # of the others one
# Families whose LSG classes PyTorch has; of the others plain ones are compared.
LSG_FAMILIES = [name for name in COMPARED if not FAMILIES[name].lsg_type]
KINDS = {family: ("lsg", "plain") if family in LSG_FAMILIES else ("plain",) for family in COMPARED}
SEQ2SEQ = [family for family in FAMILIES if has_two_stacks(family)]
GRADIENTS_OF = {"bert": "masked_lm", "electra": "pretraining", "albert": "pretraining"}
GRADIENTS_OF |= dict.fromkeys(SEQ2SEQ, "conditional_generation")  # or
GRADIENT_TASK = "sequence_classification"
CONVERSIONS = 6
CONVERTED_TASK = dict.fromkeys(FAMILIES, "masked_lm")
CONVERTED_TASK |= dict.fromkeys(SEQ2SEQ, "conditional_generation")
TRUE_OR_FALSE = (True, False)


def generator_of(name: str) -> np.random.Generator:
    return np.random.default_rng([SEED, *name.encode()])


def pick(generator, values):
    return values[int(generator.integers(len(values)))]


def random_pattern(generator, kind: str) -> dict:
    """Fields of LSGConfig that both sides accept."""
    while True:
        block = pick(generator, (4, 6, 8, 12))
        fields = {
            "block_size": block,
            "sparse_block_size": pick(generator, (block // 2, block, block, 2 * block, block + 3)),
            "sparsity_factor": pick(generator, (1, 2, 2, 3, 4, block)),
            "sparsity_type": kind,
            "num_global_tokens": int(generator.integers(1, 6)),
            "lsh_num_pre_rounds": int(generator.integers(0, 3)),
        }
        try:
            config = LSGConfig(**fields)
        except ValueError:
            continue
        if kind not in ("norm", "lsh") or block % config.selection_chunk == 0:
            return fields


def random_mask(generator, batch: int, length: int) -> np.ndarray:
    """True = real: each row ends in padding, some have holes; the first token is real."""
    mask = np.arange(length) < generator.integers(1, length + 1, (batch, 1))
    mask[0] &= generator.random(length) < 0.8
    mask[:, 0] = True
    mask[-1] |= generator.random() < 0.3
    return mask


def leaks(pattern: dict, mask: np.ndarray) -> bool:
    """Whether the reference lets padding into the result: a group of nothing else, with
    bos_pooling (docs/design.md)."""
    config = LSGConfig(**{k: v for k, v in pattern.items() if k in LSGConfig.__dataclass_fields__})
    length, block, factor = mask.shape[-1], config.block_size, config.sparsity_factor
    if not config.is_sparse or effective_type(config) != "bos_pooling" or factor == 1:
        return False
    if length <= 2 * block:
        return False
    rows = np.pad(mask.reshape(-1, length), ((0, 0), (0, -length % block)))
    rows[:, 0] &= not config.mask_first_token
    return not rows.reshape(len(rows), -1, factor).any(-1).all()


def random_sizes(generator, family: str = "bert") -> dict:
    """Fields of config.json, by the family's names."""
    heads = pick(generator, (2, 3, 4))
    hidden = heads * pick(generator, (4, 6))
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": int(generator.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": pick(generator, (16, 24)),
        "max_position_embeddings": FAMILIES[family].architecture.max_position_embeddings(64),
        "hidden_act": pick(generator, ("gelu", "gelu", "gelu_new", "relu")),
    }
    dialect = DIALECTS[family]
    for name, (_, of) in dialect.groups.items():
        sizes[name] = pick(
            generator, [n for n in (1, 2, 3, 4) if not any(sizes[s] % n for s in of)]
        )
    if "embedding_size" in dialect.defaults.keys() - dialect.equal:
        sizes["embedding_size"] = pick(generator, (10, hidden))
    if "num_hidden_groups" in dialect.defaults:
        groups, inner = pick(generator, (1, 2)), pick(generator, (1, 2))
        times = max(inner, pick(generator, (1, 2)))  # with fewer, the reference's indexing fails
        sizes |= {"num_hidden_groups": groups, "inner_group_num": inner}
        sizes["num_hidden_layers"] = groups * times
    sizes = spelled(family, sizes) | {"num_labels": int(generator.integers(2, 6))}
    if has_two_stacks(family):
        sizes |= {
            "decoder_layers": int(generator.integers(1, 4)),
            "decoder_attention_heads": pick(generator, (1, 2, heads)),
            "decoder_ffn_dim": pick(generator, (12, 20)),
            "scale_embedding": pick(generator, TRUE_OR_FALSE),
        }
        if hidden % sizes["decoder_attention_heads"]:
            sizes["decoder_attention_heads"] = heads
    return sizes


def random_model(generator, family: str, task: str, kind: str) -> dict:
    """The whole config of an LSG model."""
    pattern = random_pattern(generator, kind)
    pattern["pool_with_global"] = pick(generator, TRUE_OR_FALSE)
    pattern["mask_first_token"] = pattern["pool_with_global"] and pick(generator, TRUE_OR_FALSE)
    extra = {"is_decoder": True} if task == "causal_lm" else {}
    extra |= {"num_labels": 2} if task == "question_answering" else {}  # start and end
    if has_two_stacks(family):
        extra["pass_global_tokens_to_decoder"] = pick(generator, TRUE_OR_FALSE)
    return random_sizes(generator, family) | pattern | extra


def random_inputs(generator, task: str, config: dict) -> dict[str, np.ndarray]:
    """Ragged token ids and segments. The reference's causal model runs above two blocks only."""
    block = config.get("block_size", 8)
    short = task != "causal_lm" and generator.random() < 0.2
    length = int(generator.integers(3, 2 * block) if short else generator.integers(2 * block, 60))
    length += not short
    lead = (2, 3, length) if task == "multiple_choice" else (2, length)
    mask = random_mask(generator, int(np.prod(lead[:-1])), length).reshape(lead)
    ids = generator.integers(5, VOCABULARY, lead).astype(np.int32)
    read = read_config({"model_type": "bert"} | config)
    inputs = {
        "input_ids": np.where(mask, ids, read.pad_token_id).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
    }
    if read.segments:
        inputs["token_type_ids"] = generator.integers(0, 2, lead).astype(np.int32)
    if has_two_stacks(read.model_type):
        inputs |= decoder_inputs(generator, task, read, inputs, plain="block_size" not in config)
    return inputs


def decoder_inputs(generator, task: str, config, inputs, *, plain: bool) -> dict[str, np.ndarray]:
    """What an encoder-decoder is given beside the encoder's; a decoder alone gets states or not."""
    if task == "causal_lm":
        states = generator.standard_normal((2, 11, config.hidden_size)).astype(np.float32)
        return {"encoder_hidden_states": states} if plain else {}
    mask = inputs["attention_mask"]
    if task == "sequence_classification":  # its inputs are shifted; one end token a row
        ids, last = inputs["input_ids"].copy(), mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        ids[np.arange(2), last] = config.eos_token_id
        return {"input_ids": ids}
    length = int(generator.integers(3, 20))
    real = random_mask(generator, 2, length)
    ids = np.where(real, generator.integers(5, VOCABULARY, (2, length)), config.pad_token_id)
    masks = {"decoder_attention_mask": real.astype(np.int32)}
    return masks | {"decoder_input_ids": ids.astype(np.int32)}


def attention_case(name: str, kind: str, *, causal: bool) -> Case:
    generator = generator_of(name)
    pattern = random_pattern(generator, kind)
    heads, width = int(generator.integers(1, 5)), int(generator.integers(2, 6))
    blocks = int(generator.integers(2, 7))  # the reference pads in the model, not here
    if causal:
        blocks = max(blocks, 3)
    length = pattern["block_size"] * blocks
    shape = (2, heads, pattern["num_global_tokens"] + length, width)
    query, key, value, cotangent = generator.standard_normal((4, *shape)).astype(np.float32)
    arrays = {"query": query, "key": key, "value": value, "cotangent": cotangent}
    arrays["mask"] = random_mask(generator, 2, length)
    return Case({"kind": "attention", "config": pattern, "causal": causal}, arrays)


def cut_window_case() -> Case:
    """Windows of 7 representatives end inside a chunk of 2: which of the two counts."""
    generator = generator_of("cut window")
    pattern = {"block_size": 4, "sparse_block_size": 7, "sparsity_type": "norm"}
    query, key, value, cotangent = generator.standard_normal((4, 2, 3, 29, 4)).astype(np.float32)
    arrays = {"query": query, "key": key, "value": value, "cotangent": cotangent}
    arrays["mask"] = random_mask(generator, 2, 28)
    return Case({"kind": "attention", "config": pattern, "causal": False}, arrays)


def local_attention_case(name: str, *, causal: bool) -> Case:
    """Queries that see nothing, which get something in the reference, have no cotangent."""
    generator = generator_of(name)
    window, width = int(generator.integers(2, 9)), 2 * int(generator.integers(1, 5))
    back, forward = int(generator.integers(1, 3)), 0 if causal else int(generator.integers(0, 3))
    options = {"window_size": window, "dim": width, "causal": causal, "look_backward": back}
    options |= {"look_forward": forward, "exact_windowsize": bool(generator.integers(2))}
    options |= {"use_xpos": bool(generator.integers(2))}
    length, heads = int(generator.integers(3, 50)), int(generator.integers(1, 4))
    shape = (2, heads, length, width)
    query, key, value, cotangent = generator.standard_normal((4, *shape)).astype(np.float32)
    mask = np.arange(length)[None] < np.array([[length], [-(-length // 2)]])
    cotangent = np.where(mask[:, None, :, None], cotangent, 0)
    arrays = {"query": query, "key": key, "value": value, "cotangent": cotangent, "mask": mask}
    bias = generator.standard_normal((heads, window, (back + 1 + forward) * window))
    arrays["attn_bias"] = bias.astype(np.float32)
    return Case({"kind": "local_attention", "options": options}, arrays)


def selection_case(name: str, kind: str) -> Case:
    generator = generator_of(name)
    pattern = random_pattern(generator, kind)
    shape = (2, int(generator.integers(1, 5)), 3 * pattern["block_size"], 3)
    arrays = dict(
        zip(("query", "key", "value"), generator.standard_normal((3, *shape)), strict=True)
    )
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays["mask"] = random_mask(generator, 2, shape[2])
    return Case({"kind": "selection", "config": pattern}, arrays)


def model_cases() -> dict[str, Case]:
    """A random model of every family and head, LSG and plain, and a run of each."""
    cases = {}
    for i, (family, task) in enumerate(HEADS):
        for j in range(PATTERNS_PER_HEAD.get(family, 1) if family in LSG_FAMILIES else 0):
            name = f"model_{family}_{task}_{j}"
            generator = generator_of(name)
            config = random_model(generator, family, task, SPARSITY_TYPES[(2 * i + j + SEED) % 7])
            if task in ("masked_lm", "pretraining") and j == 1:
                config["tie_word_embeddings"] = False
            add_model(cases, name, family, task, config, generator, lsg=True)
        name = f"plain_{family}_{task}"
        generator = generator_of(name)
        config = random_sizes(generator, family)
        config |= {"num_labels": 2} if task == "question_answering" else {}
        config |= {"is_decoder": True} if task == "causal_lm" else {}
        add_model(cases, name, family, task, config, generator, lsg=False)
    for kind in ("model", "plain"):
        add_decoder(cases, f"{kind}_cross_attention", lsg=kind == "model")
    return cases


def add_decoder(cases, name: str, *, lsg: bool) -> None:
    """A decoder with cross-attention. The reference's LSG one takes whole blocks only, more than
    two."""
    generator = generator_of(name)
    config = random_sizes(generator) | {"is_decoder": True, "add_cross_attention": True}
    config |= {"block_size": 8, "sparse_block_size": 8, "sparsity_type": "stride"} if lsg else {}
    add_model(cases, name, "bert", "causal_lm", config, generator, lsg=lsg)
    states = generator.standard_normal((2, 11, config["hidden_size"])).astype(np.float32)
    inputs = {
        "input_ids": generator.integers(5, VOCABULARY, (2, 32)).astype(np.int32),
        "attention_mask": random_mask(generator, 2, 32).astype(np.int32),
        "token_type_ids": generator.integers(0, 2, (2, 32)).astype(np.int32),
        "encoder_hidden_states": states,
        "encoder_attention_mask": random_mask(generator, 2, 11).astype(np.int32),
    }
    cases[name] = cases[name]._replace(inputs=inputs)


def add_model(cases, name, family: str, task, config: dict, generator, *, lsg: bool) -> None:
    inputs = random_inputs(generator, task, config)
    one = f"{family}_{GRADIENTS_OF.get(family, GRADIENT_TASK)}"
    differentiated = name == (f"model_{one}_0" if family in LSG_FAMILIES else f"plain_{one}")
    if differentiated and leaks(config, inputs["attention_mask"].astype(bool)):
        # PyTorch drops the gradient of padding's own embedding, which only a leak can make.
        config = config | {"sparsity_type": "pooling"}
    made = {
        "kind": "make_model",
        "class": FAMILIES[family].class_name(task, lsg=lsg),
        "config": config,
        "out": name,
        "seed": int(generator.integers(2**31)),
    }
    run = {"kind": "model", "class": made["class"], "checkpoint": name}
    if differentiated:
        run["grad_of"] = "all"
        generator = generator_of(f"{name} weights")
        for output, shape in gradient_outputs(family, task, config, inputs).items():
            weight = generator.standard_normal(shape) / 8
            mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
            if shape[:2] == mask.shape:  # no loss on padding, as in training
                real = mask.reshape(*shape[:2], *[1] * (len(shape) - 2))
                weight = weight * real
            inputs[f"weight_{output}"] = weight.astype(np.float32)
    cases[f"make_{name}"] = Case(made)
    cases[name] = Case(run, inputs)


def gradient_outputs(family: str, task: str, config: dict, inputs) -> dict[str, tuple[int, ...]]:
    """The outputs that are differentiated, and their shapes."""
    lead = inputs["input_ids"].shape
    if task == "sequence_classification":
        return {"logits": (lead[0], config["num_labels"])}
    if task == "conditional_generation":
        return {"logits": (*inputs["decoder_input_ids"].shape, VOCABULARY)}
    if family == "albert":
        return {
            "prediction_logits": (*lead, VOCABULARY),
            "sop_logits": (lead[0], config["num_labels"]),
        }
    return {"logits": lead if task == "pretraining" else (*lead, VOCABULARY)}


def file_cases() -> dict[str, Case]:
    """One model in every format that torch writes."""
    config = random_sizes(generator_of("files"))
    common = {"kind": "make_model", "class": "BertForMaskedLM", "config": config}
    formats = {
        "whole": {},
        "sharded": {"max_shard_size": "4KB"},
        "bin": {"safe_serialization": False},
        "bin_sharded": {"safe_serialization": False, "max_shard_size": "4KB"},
    }
    return {
        f"file_{name}": Case(common | fields | {"out": f"file_{name}"})
        for name, fields in formats.items()
    }


def conversion_cases() -> dict[str, Case]:
    """Random conversions of a short, a standard, a long plain checkpoint and of an LSG one."""
    cases = {}
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    for family in LSG_FAMILIES:
        if family != "bert":
            add_family_conversion(cases, family)
    for rows in ("400", "512", "1100", "lsg"):
        lsg = rows == "lsg"
        positions = {"max_position_embeddings": 512 if lsg else int(rows)}
        pattern = random_pattern(generator_of("convert_lsg"), "norm") if lsg else {}
        cases[f"make_convert_{rows}"] = Case(
            {
                "kind": "make_model",
                "class": "LSGBertForMaskedLM" if lsg else "BertForMaskedLM",
                "config": sizes | positions | pattern,
                "out": f"convert_{rows}",
                "tokenizer": True,
            }
        )
    for i in range(CONVERSIONS):
        generator = generator_of(f"convert_{i}")
        rows = ("400", "512", "1100", "lsg")[i % 4]
        options = {
            "max_sequence_length": int(generator.integers(64, 3000)),
            "random_global_init": pick(generator, TRUE_OR_FALSE),
            "global_positional_stride": pick(generator, (2, 16, 64, 256)),
            "use_token_ids": pick(generator, TRUE_OR_FALSE),
        }
        if rows == "lsg":
            options["keep_first_global_token"] = pick(generator, TRUE_OR_FALSE)
            options["resize_lsg"] = pick(generator, TRUE_OR_FALSE)
        config = {} if rows == "lsg" else random_pattern(generator, pick(generator, SPARSITY_TYPES))
        cases[f"convert_{i}"] = Case(
            {
                "kind": "convert",
                "checkpoint": f"convert_{rows}",
                "options": options,
                "config": config,
                "out": f"converted_{i}",
                "seed": int(generator.integers(2**31)),
            }
        )
    return cases


def add_family_conversion(cases, family: str) -> None:
    """A plain checkpoint and its conversion at a length where the reference's tables are whole."""
    generator = generator_of(f"convert {family}")
    positions = FAMILIES[family].architecture.max_position_embeddings(512)
    config = random_sizes(generator, family) | {"max_position_embeddings": positions}
    cases[f"make_convert_{family}"] = Case(
        {
            "kind": "make_model",
            "class": FAMILIES[family].class_name(CONVERTED_TASK[family], lsg=False),
            "config": config,
            "out": f"convert_{family}",
            "tokenizer": True,
        }
    )
    options = {
        "max_sequence_length": pick(generator, (512, 1024, 2048)),
        "random_global_init": pick(generator, TRUE_OR_FALSE),
        "use_token_ids": pick(generator, TRUE_OR_FALSE),
        "global_positional_stride": pick(generator, (16, 64)),
    }
    cases[f"convert_{family}"] = Case(
        {
            "kind": "convert",
            "checkpoint": f"convert_{family}",
            "options": options,
            "config": random_pattern(generator, pick(generator, SPARSITY_TYPES)),
            "out": f"converted_{family}",
            "seed": int(generator.integers(2**31)),
        }
    )


CASES: dict[str, Case] = (
    {
        f"attention_{kind}_{'causal' if causal else 'both'}": attention_case(
            f"attention_{kind}_{causal}", kind, causal=causal
        )
        for kind in SPARSITY_TYPES
        for causal in (False, True)
    }
    | {"attention_norm_cut_window": cut_window_case()}
    | {
        f"local_attention_{i}": local_attention_case(f"local_attention_{i}", causal=i % 2 == 0)
        for i in range(8)
    }
    | {
        f"selection_{kind}_{i}": selection_case(f"selection_{kind}_{i}", kind)
        for kind in SPARSITY_TYPES
        if kind != "none"
        for i in range(3)
    }
    | model_cases()
    | file_cases()
    | conversion_cases()
)


def names(kind: str, prefix: str = "") -> list[str]:
    return [n for n, c in CASES.items() if c.fields["kind"] == kind and n.startswith(prefix)]
