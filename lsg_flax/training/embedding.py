"""Training steps of the task "embedding": with a contrastive loss, or with a teacher.

Axes: M microbatches, B batch, C choices (negatives of a row), T tokens, D model width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from lsg_flax.data import NEGATIVE, POSITIVE, READ
from lsg_flax.hub import SentenceSettings
from lsg_flax.models import Batch, Model, Params, pool
from lsg_flax.training.contrastive import Vectors, cached_gradients, other_texts, ranking_loss
from lsg_flax.training.distillation import (
    distance_sums,
    split_parts,
    student_vectors,
    teacher_vectors,
)
from lsg_flax.training.embedding_settings import SCALE
from lsg_flax.training.embedding_source import Teacher, open_teacher
from lsg_flax.training.losses import Metrics, apply_model
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel
from lsg_flax.training.step import TrainStep, accumulate_gradients, check_microbatches, make_step


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingRun:
    """How a run learns embeddings: from a teacher if there is one, otherwise from pairs.

    Attributes:
        how: how hidden states become a vector (pooling, normalization).
        scale: factor of the cosines in the contrastive loss.
    """

    model: Model
    how: SentenceSettings
    scale: float
    teacher: Teacher | None = None
    teacher_model: Model | None = None
    teacher_params: Params | None = None

    @property
    def given(self) -> tuple[Params, ...]:
        """Arguments of a step beside state and batch."""
        return () if self.teacher_params is None else (self.teacher_params,)


def make_run(
    settings: Settings, source: SourceModel, model: Model, mesh: Mesh | None
) -> EmbeddingRun:
    """Returns how the run learns; reads the teacher's weights if there is a teacher."""
    assert source.sentences is not None
    run = EmbeddingRun(model, source.sentences, settings.similarity_scale or SCALE)
    opened = open_teacher(settings)
    if opened is None:
        return run
    teacher = opened[0]
    loaded, params = teacher.load(model.dtype, mesh)
    return dataclasses.replace(run, teacher=teacher, teacher_model=loaded, teacher_params=params)


def embed_batch(
    run: EmbeddingRun, params: Params, batch: Batch, key: PRNGKeyArray | None
) -> Vectors:
    """Returns the vectors of each stream of texts, by the prefix of its arrays' names: [B, D], of
    negatives [B * C, D]. Dropout is on if `key` is given."""
    vectors = {}
    for number, prefix in enumerate(prefixes_of(batch)):
        own = None if key is None else jax.random.fold_in(key, number)
        states, mask = _states(run.model, params, batch, prefix, own)
        vectors[prefix] = pool(states, mask, run.how.pooling, normalize=run.how.normalize)
    return vectors


def prefixes_of(batch: Batch) -> list[str]:
    """Returns the prefix of the arrays' names of each stream of texts in a batch."""
    return [prefix for prefix in READ.values() if f"{prefix}input_ids" in batch]


def _texts(batch: Batch, prefix: str) -> tuple[Array, Array]:
    """Returns ids and mask of a stream; all axes before the tokens are merged into one."""
    ids, mask = (jnp.asarray(batch[f"{prefix}{name}"]) for name in ("input_ids", "attention_mask"))
    return ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, ids.shape[-1])


def _states(
    model: Model, params: Params, batch: Batch, prefix: str, key: PRNGKeyArray | None
) -> tuple[Array, Array]:
    ids, mask = _texts(batch, prefix)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return apply_model(model, params, inputs, key).last_hidden_state, mask


def contrast(run: EmbeddingRun, batch: Batch, vectors: Vectors) -> Array:
    """Returns the contrastive loss of the vectors of all microbatches together."""
    ids = {prefix: jnp.prod(jnp.stack(_texts(batch, prefix)), axis=0) for prefix in vectors}
    # JAX sorts the names of a dict: the order of streams is that of READ.
    flat = [vectors[n].reshape(-1, vectors[n].shape[-1]) for n in READ.values() if n in vectors]
    anchors, *candidates = flat
    others = other_texts(ids[""], ids[READ[POSITIVE]], ids.get(READ[NEGATIVE]))
    return ranking_loss(anchors, jnp.concatenate(candidates), others, scale=run.scale)


def distances(
    run: EmbeddingRun, params: Params, batch: Batch, teacher_params: Params
) -> dict[str, tuple[Array, Array, Array, Array]]:
    """Returns for each stream of texts, by the prefix of its arrays' names: the sum of squared
    distances to the teacher, the number of texts, their cosines, and the student's vectors.

    There is no dropout: the student learns a function that the teacher gives for any text, so
    overfitting to few examples is no concern.
    """
    teacher, model = run.teacher, run.teacher_model
    assert teacher is not None and model is not None
    found = {}
    for prefix in prefixes_of(batch):
        ids, mask = _texts(batch, prefix)
        parts, real, part = split_parts(ids, mask, teacher.frame, teacher.length)
        read = {"input_ids": parts.reshape(-1, parts.shape[-1])}
        read["attention_mask"] = real.reshape(-1, parts.shape[-1])
        states = apply_model(model, teacher_params, read, None).last_hidden_state
        wanted = jax.lax.stop_gradient(teacher_vectors(states, real, teacher.how))
        states, _ = _states(run.model, params, batch, prefix, None)
        own = student_vectors(states, mask, part, parts.shape[1], run.how)
        found[prefix] = (*distance_sums(own, wanted), own[:, -1])
    return found


def make_embedding_step(
    run: EmbeddingRun, optimizer: optax.GradientTransformation, accumulate_steps: int = 1
) -> TrainStep:
    """Returns a train step as `make_train_step` does.

    Microbatches [M, B, ...] count as one batch of pairs, in which each is a negative of all others,
    but need only the memory of one microbatch.
    """
    compute = _by_contrast if run.teacher is None else _by_teacher

    def checked(params: Params, batch: Batch, key: PRNGKeyArray, *given: Params):
        if accumulate_steps > 1:
            check_microbatches(batch, accumulate_steps)
        return compute(run, accumulate_steps, params, batch, key, *given)

    return make_step(checked, optimizer, *run.given)


def _by_contrast(
    run: EmbeddingRun, microbatches: int, params: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Params, Metrics]:
    embed, loss = functools.partial(embed_batch, run), functools.partial(contrast, run, batch)
    if microbatches > 1:
        value, gradients = cached_gradients(embed, loss, params, batch, key)
    else:
        value, gradients = jax.value_and_grad(lambda p: loss(embed(p, batch, key)))(params)
    return gradients, _metrics(value, batch)


def _by_teacher(
    run: EmbeddingRun,
    microbatches: int,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray,
    teacher_params: Params,
) -> tuple[Params, Metrics]:
    texts = sum(_texts(batch, prefix)[1].any(axis=1).sum() for prefix in prefixes_of(batch))

    def gradients(params: Params, part: Batch, _):
        def loss(params: Params) -> Array:
            found = distances(run, params, part, teacher_params).values()
            return sum(total for total, *_ in found) / jnp.maximum(texts, 1)  # type: ignore[return-value]

        return jax.value_and_grad(loss)(params)

    learn: Callable = gradients
    if microbatches > 1:
        learn = functools.partial(accumulate_gradients, gradients)
    value, found = learn(params, batch, key)
    return found, _metrics(value, batch)


def _metrics(loss: Any, batch: Batch) -> Metrics:
    masks = [_texts(batch, prefix)[1] for prefix in prefixes_of(batch)]
    rows = masks[0].any(axis=1).sum(dtype=jnp.float32)
    tokens = sum(mask.sum(dtype=jnp.float32) for mask in masks)
    return {"loss": loss, "targets": rows, "tokens": tokens}
