"""Makes the model that open_qa.py starts from: MiniLM as REALM's embedder and reader, untrained."""

import pathlib

import jax
import numpy as np

import lsg_flax
from lsg_flax import hub, inference
from lsg_flax.models import RealmConfig
from lsg_flax.open_qa import BlockEmbedder, OpenQA, Records, device_search

SHARPNESS = 20.0  # the score of two equal vectors, as sentence-transformers' scale
BEAMS = 64, 3  # blocks among which the retriever learns to choose, and those that are read
_OF_BERT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("intermediate_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
    *("pad_token_id", "hidden_dropout_prob", "attention_probs_dropout_prob"),
)
_BUCKETS = (32, 64, 128, 192, 256, 320, 512)


def states(folder: pathlib.Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the first token's last state, and the mean of all scaled to length 1, which is
    the vector that MiniLM was trained for; both [texts, width]."""
    model, params = lsg_flax.from_pretrained(folder, "base")
    encoded = hub.read_tokenizer(folder)(texts, truncation=True, max_length=model.max_length)
    encodings = [{"input_ids": ids} for ids in encoded["input_ids"]]
    buckets = [size for size in _BUCKETS if size <= model.max_length]
    options = {"batch_size": 16, "buckets": buckets, "fields": ("last_hidden_state",)}
    results = inference.predict(model, params, encodings, **options)
    first = np.stack([result["last_hidden_state"][0] for result in results])
    mean = np.stack([result["last_hidden_state"].mean(axis=0) for result in results])
    return first, mean / np.linalg.norm(mean, axis=1, keepdims=True)


def embedding_head(first: np.ndarray, mean: np.ndarray, ridge: float = 0.1) -> dict[str, dict]:
    """REALM embeds a text by its first token, MiniLM by the mean of all: pooler and projection by
    which the one gives the other, up to the mean of all texts, in the sense of least squares."""
    width, eye = first.shape[1], np.eye(first.shape[1], dtype=np.float32)
    seen = np.tanh(first / 2)  # of the pooler, whose weights are 1/2
    centre, wanted = seen.mean(axis=0), mean - mean.mean(axis=0)
    seen = seen - centre
    kernel = np.linalg.solve(seen.T @ seen + ridge * eye, seen.T @ wanted)
    norm = {"scale": np.full(width, np.sqrt(SHARPNESS / width)), "bias": np.zeros(width)}
    pooler = {"dense": {"kernel": eye / 2, "bias": np.zeros(width)}}
    head = {"dense": {"kernel": kernel, "bias": -centre @ kernel}, "layer_norm": norm}
    made = {"pooler": pooler, "head": head}
    return jax.tree.map(lambda array: np.asarray(array, np.float32), made)


def realm_of(folder: pathlib.Path, head: dict[str, dict], blocks: list[str]) -> OpenQA:
    """MiniLM twice, once with the head that embeds and once with a head of spans that is drawn,
    over the blocks, which are embedded."""
    bert, params = lsg_flax.from_pretrained(folder, "base")
    config = RealmConfig(
        **{name: getattr(bert.config, name) for name in _OF_BERT},
        retriever_proj_size=bert.config.hidden_size,
        span_hidden_size=128,
        max_span_width=18,
        reader_seq_len=256,
        reader_beam_size=min(BEAMS[1], len(blocks)),
        searcher_beam_size=min(BEAMS[0], len(blocks)),
    )
    embedder, reader = (lsg_flax.Model(config, task) for task in ("embedder", "reader"))
    drawn = {}
    for name, model in (("embedder", embedder), ("reader", reader)):
        inputs = model.example_inputs()
        drawn[name] = jax.jit(model.init)(jax.random.key(0), **inputs)["params"] | params
    drawn["embedder"] = drawn["embedder"] | {"pooler": head["pooler"]}
    drawn["embedder"]["head"] = drawn["embedder"]["head"] | head["head"]
    tokenizer, records = hub.read_tokenizer(folder), Records([b.encode() for b in blocks], "blocks")
    embeddings = BlockEmbedder(embedder, drawn["embedder"], tokenizer)(blocks)
    parts = tokenizer, records, embeddings, device_search(embeddings)
    return OpenQA(embedder, reader, drawn, *parts)
