"""REALM's heads, and the scores and losses computed from their outputs and further arrays
(arXiv 2002.08909; the numbers are those of transformers 4.37's modeling_realm.py).

Axes: B batch, C choices, T tokens, D model width, F features of a projection, V vocabulary, X
spans. Choices are the candidates of a query, or the blocks that a question is answered from.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lsg_flax.checks import require
from lsg_flax.models.config import ModelConfig
from lsg_flax.models.config_realm import RealmConfig
from lsg_flax.models.heads import Head, label_log_probs
from lsg_flax.models.inputs import Inputs
from lsg_flax.models.layers import Buffer, LayerNorm
from lsg_flax.models.outputs import ModelOutput
from lsg_flax.models.task import IGNORED

HeadArrays = Mapping[str, Any]  # arrays of a task beside its inputs, by Hugging Face's names
Lead = tuple[int, ...]  # the shape of input_ids
# The pretraining head, which PyTorch's classes have but never call: tensors and their axes.
KEPT = {
    "transform.dense.weight": "DD",
    "transform.dense.bias": "D",
    "transform.LayerNorm.weight": "D",
    "transform.LayerNorm.bias": "D",
    "decoder.weight": "VD",
    "bias": "V",
}
_LOWEST = float(np.finfo(np.float32).min)  # score of an invalid span, as in the reference
_LABELS = ("start_positions", "end_positions", "has_answers")
_INTEGERS = ("labels", *_LABELS[:2])


class RealmHead(Head):
    """The base of heads that also store the pretraining head."""

    @property
    def realm(self) -> RealmConfig:
        """The config, with its type."""
        assert isinstance(self.config, RealmConfig)
        return self.config

    def keep_language_model(self) -> None:
        """Adds the tensors of `KEPT`, which are never trained."""
        sizes = {"D": self.config.hidden_size, "V": self.config.vocab_size}
        for name, axes in KEPT.items():
            first = functools.partial(jnp.zeros, [sizes[axis] for axis in axes])
            Buffer(first, self.context.param_dtype, name=name.replace(".", "_"))()


class ProjectionHead(RealmHead):
    """Projects the pooler's output to the space in which queries and candidates are compared."""

    @nn.compact
    def __call__(self, last, pooled, words):
        self.keep_language_model()
        x = self.dense(self.realm.retriever_proj_size, "dense")(pooled)
        return ModelOutput(projected_score=self.layer_norm("layer_norm")(x))


class SpanHead(RealmHead):
    """Scores every span of up to max_span_width tokens, short spans first."""

    @nn.compact
    def __call__(self, last, pooled, words):
        self.keep_language_model()
        config, context = self.realm, self.context
        x = self.dense(2 * config.span_hidden_size, "dense_intermediate")(last)
        starts, ends = jnp.split(x, 2, axis=-1)
        length = last.shape[1]
        widths = range(min(config.max_span_width, length))
        pairs = [starts[:, : length - more] + ends[:, more:] for more in widths]
        x = nn.relu(jnp.concatenate(pairs, axis=1))  # [B * C, X, F]
        norm = (config.reader_layer_norm_eps, context.dtype, context.param_dtype)
        x = LayerNorm(*norm, name="span_norm")(x)
        return ModelOutput(reader_logits=self.dense(1, "dense_output")(x)[..., 0])


def candidates_of(arrays: HeadArrays, inputs: Inputs) -> Inputs:
    """Returns the candidates as inputs, [B, C, T]. Raises ValueError if their number of queries is
    not that of `inputs`."""
    given = Inputs(**{name.removeprefix("candidate_"): array for name, array in arrays.items()})
    batch, embeds = inputs.lead[0], given.inputs_embeds
    if embeds is not None and embeds.ndim == 3 and embeds.shape[0] % batch == 0:  # PyTorch's shape
        given = given._replace(inputs_embeds=embeds.reshape(batch, -1, *embeds.shape[1:]))
    if given.rank == 3:
        require(
            given.lead[0] == batch,
            f"there are candidates for {given.lead[0]} queries, but {batch} queries: give "
            "[batch, candidates, tokens], the same number of candidates for each query.",
        )
        if inputs.position_ids is not None:  # PyTorch gives them to both
            places = jnp.asarray(inputs.position_ids)[:, None]
            require(
                places.shape[-1] == given.lead[-1],
                f"position_ids {inputs.position_ids.shape} are used for the candidates as well, "
                f"which have {given.lead[-1]} tokens: leave them out, or pad both to one length.",
            )
            places = jnp.broadcast_to(places, (*given.lead[:2], places.shape[-1]))
            given = given._replace(position_ids=places)
    return given


def relevance(query: ModelOutput, candidates: ModelOutput, lead: Lead) -> ModelOutput:
    """Computes the scorer's outputs from those of its embedders; `lead` is [B, C, T]."""
    one, many = query.projected_score, candidates.projected_score
    assert one is not None and many is not None
    many = many.reshape(*lead[:2], -1)  # [B, C, F]
    scores = jnp.einsum("bf,bcf->bc", one, many)
    return ModelOutput(relevance_score=scores, query_score=one, candidate_score=many)


def marginal_likelihood(
    output: ModelOutput, arrays: HeadArrays, config: ModelConfig, lead: Lead
) -> ModelOutput:
    """Adds the loss if there are labels: -log of each token's probability, marginalised over the
    candidates by their relevance, as a mean over the tokens that `mlm_mask` keeps. As in the
    reference, labels of -100 add nothing to the sum but count in the mean.

    Raises:
        ValueError: for arrays that do not fit the tokens.
    """
    del config
    if "labels" not in arrays:
        return output
    batch, choices, length = lead
    shapes = {"relevance_score": (batch, choices), "labels": (batch, length)}
    shapes |= {"mlm_mask": (batch, length)} if "mlm_mask" in arrays else {}
    _check_shapes(arrays, shapes, "the loss of the labels")
    labels, scores = jnp.asarray(arrays["labels"]), jnp.asarray(arrays["relevance_score"])
    assert output.logits is not None
    logits = output.logits.reshape(*lead, -1)
    each = label_log_probs(logits, labels[:, None])  # [B, C, T]
    prior = jax.nn.log_softmax(scores.astype(jnp.float32))[..., None]
    marginal = jax.nn.logsumexp(prior + each, axis=1)  # [B, T]
    mask = jnp.asarray(arrays.get("mlm_mask", jnp.ones_like(labels))) != 0
    total = jnp.sum(jnp.where(mask & (labels != IGNORED), marginal, 0.0))
    return replace(output, loss=-total / jnp.maximum(jnp.sum(mask), 1))


def best_spans(
    output: ModelOutput, arrays: HeadArrays, config: ModelConfig, lead: Lead
) -> ModelOutput:
    """Finds the most likely span in each question's blocks; adds the losses if there are answers.

    Args:
        output: the head's outputs.
        arrays: `relevance_score` of all retrieved blocks, of which the first C are read, and
            `block_mask`, with the tokens of all blocks or of C. Optionally `has_answers`, for all
            retrieved blocks, and `start_positions` and `end_positions`, the same with a last axis
            of answers, in which -1 means none.
        config: of the reader.
        lead: [C, T] for one question, as in the reference, or [B, C, T]: then all outputs have a
            leading axis B, except the loss, which is a mean.

    Raises:
        ValueError: for arrays that do not fit the tokens or the config. Under jit the positions of
            answers cannot be read: an answer that is not a span then counts only in `has_answers`.
    """
    assert isinstance(config, RealmConfig) and output.reader_logits is not None
    _check_blocks(arrays, config, lead)
    _check_answers(arrays, config.max_span_width, lead[-1])
    alone, (blocks, length) = len(lead) == 2, lead[-2:]
    found = {n: jnp.asarray(a)[None] if alone else jnp.asarray(a) for n, a in arrays.items()}
    widths = np.arange(config.max_span_width)
    starts = np.concatenate([np.arange(length - more) for more in widths])  # [X]
    ends = starts + np.repeat(widths, length - widths)
    scores = found["relevance_score"].astype(jnp.float32)
    inside = found["block_mask"][:, :blocks].astype(bool)
    inside = inside[..., starts] & inside[..., ends]  # [B, C, X]
    logits = output.reader_logits.astype(jnp.float32).reshape(inside.shape)
    logits = jnp.where(inside, logits, _LOWEST) + scores[:, :blocks, None]
    candidate = jnp.argmax(jnp.max(logits, axis=1), axis=-1)  # [B]
    made = {
        "reader_logits": logits,
        "retriever_logits": scores[:, :blocks, None],
        "block_idx": jnp.argmax(jnp.max(logits, axis=-1), axis=-1),
        "candidate": candidate,
        "start_pos": jnp.asarray(starts)[candidate][:, None],
        "end_pos": jnp.asarray(ends)[candidate][:, None],
    }
    if "has_answers" in found:
        gold = [found[name][:, :blocks] for name in _LABELS[:2]]
        gold = [x.reshape(*x.shape[:2], -1, 1) for x in gold]  # [B, C, answers, 1]
        spans = (places[None, None, None] for places in (starts, ends))
        right = [x == places for x, places in zip(gold, spans, strict=True)]
        made["retriever_correct"] = found["has_answers"].astype(bool)
        made["reader_correct"] = jnp.any(right[0] & right[1], axis=2)  # [B, C, X]
        made["retriever_loss"] = _marginal_loss(scores, made["retriever_correct"])
        made["reader_loss"] = _marginal_loss(logits, made["reader_correct"])
        output = replace(output, loss=jnp.mean(made["retriever_loss"] + made["reader_loss"]))
    return replace(output, **{name: x[0] if alone else x for name, x in made.items()})


def _marginal_loss(logits: Float[Array, "B *X"], correct: Bool[Array, "B *X"]) -> Float[Array, "B"]:
    """-log of the total probability of all correct entries; 0 if there are none."""
    axes = tuple(range(1, logits.ndim))
    right = jax.nn.logsumexp(jnp.where(correct, logits, _LOWEST), axis=axes)
    loss = jax.nn.logsumexp(logits, axis=axes) - right
    return jnp.where(jnp.any(correct, axis=axes), loss, 0.0)


def _check_blocks(arrays: HeadArrays, config: RealmConfig, lead: Lead) -> None:
    """Raises ValueError for shapes that `best_spans` does not allow."""
    batch, (blocks, length) = lead[:-2], lead[-2:]
    beams, width = config.reader_beam_size, config.max_span_width
    count = _shape(arrays, "relevance_score")[-1:] or (blocks,)
    require(
        blocks == beams <= count[0],
        f"{blocks} blocks and {count[0]} relevance scores are given, but reader_beam_size={beams} "
        "blocks are read: give that many, and at least as many scores, or load the model with "
        f"reader_beam_size={min(blocks, count[0])}.",
    )
    require(
        length >= width,
        f"blocks of {length} tokens are shorter than max_span_width={width}: pad them to {width}.",
    )
    rows = (*batch, *count)
    read = (*batch, blocks, length)
    masked = read if _shape(arrays, "block_mask") == read else (*rows, length)
    shapes = {"relevance_score": rows, "block_mask": masked}
    if any(name in arrays for name in _LABELS):
        answers = _shape(arrays, "start_positions")[len(rows) : len(rows) + 1]
        shapes |= {"has_answers": rows, **dict.fromkeys(_LABELS[:2], (*rows, *answers))}
    _check_shapes(arrays, shapes, "a reader")


def _check_answers(arrays: HeadArrays, width: int, length: int) -> None:
    """Raises ValueError for answers that are not spans; under jit they cannot be checked."""
    places = [arrays.get(name) for name in _LABELS[:2]]
    if any(x is None or isinstance(x, jax.core.Tracer) for x in places):
        return
    start, end = (np.asarray(x) for x in places)
    none, over = (start < 0) & (end < 0), (end < start) | (end - start >= width) | (end >= length)
    wrong = np.argwhere(~none & ((start < 0) | over))
    if len(wrong):
        place = tuple(wrong[0])
        raise ValueError(
            f"{len(wrong)} answers are not spans, the first from token {start[place]} to "
            f"{end[place]} of {length}: spans have 1 to max_span_width={width} tokens. Leave the "
            "answer out (-1 for both), or load the model with a larger max_span_width, which "
            "changes no weight."
        )


def _shape(arrays: HeadArrays, name: str) -> Lead:
    return tuple(getattr(arrays.get(name), "shape", ()))


def _check_shapes(arrays: HeadArrays, shapes: Mapping[str, Lead], of: str) -> None:
    """Raises ValueError unless all arrays are given with these shapes, and labels are integers."""
    for name, shape in shapes.items():
        require(name in arrays, f"{of} needs {name}, {list(shape)}, which is missing.")
        given = tuple(arrays[name].shape)
        require(given == tuple(shape), f"{name} has shape {given}; {of} needs {tuple(shape)}.")
        kind = arrays[name].dtype
        whole = name not in _INTEGERS or jnp.issubdtype(kind, jnp.integer)
        require(whole, f"{name} has dtype {kind}; they must be integers.")
