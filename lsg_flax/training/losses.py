"""Losses of the tasks, equal to those of Hugging Face's classes, in float32.

A batch is a dict of arrays by Hugging Face's names: arguments of the model and, beside them, the
targets (the task's record says which). A loss is a weighted sum of terms; a term is a sum over the
labels that count, divided by their number. step.py keeps sum and number apart to accumulate
microbatches.

Axes: M microbatches, B batch, T tokens, Y labels or vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lsg_flax.models import (
    IGNORED,
    Batch,
    Loss,
    Model,
    ModelConfig,
    Params,
    ProblemType,
    Target,
    family_of,
    label_log_probs,
)
from lsg_flax.training.lora import merge_lora

INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    *("encoder_hidden_states", "encoder_attention_mask", "segment_ids"),
)
SEGMENT_ROWS = "segment_rows"  # [B, texts] of packed rows: the number of each text in the data

OWN: tuple[Loss, ...] = ("own_of_tokens", "own_of_rows")  # the model computes these itself

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """How labels count in training; `check` raises ValueError if a task does not allow it.

    Attributes:
        label_smoothing: share of each label that is spread evenly over all classes, its own
            included.
        class_weights: one weight for each class; None weighs all the same. A label counts with the
            weight of its class, in the loss and in the number that it is divided by; its smoothed
            share counts with the weights of the classes that get it.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def check(self, model: Model, target: Target, problem: ProblemType) -> None:
        """Raises ValueError if the labels are of another kind or the number of weights is wrong."""
        task, share, weights = model.task, self.label_smoothing, self.class_weights
        classes = smooths(target, problem)
        if not 0 <= share < 1 or (share and not classes):
            raise ValueError(
                f"label_smoothing={share} must be at least 0 and below 1, and 0 for labels that "
                f"are not classes, as with task={task!r}, problem_type={problem!r}."
            )
        if weights is None:
            return
        if not (classes and model.task_record.named_labels):
            raise ValueError(
                f"class_weights={list(weights)} need labels with names and one label per text or "
                f"word, not task={task!r} with problem_type={problem!r}; leave them out."
            )
        names = model.config.labels
        if len(weights) != len(names) or not all(0 <= w < math.inf for w in weights):
            raise ValueError(
                f"class_weights={list(weights)} must be {len(names)} numbers of at least 0, one "
                f"for each of the labels {', '.join(names)}, in this order."
            )


ALIKE = LabelOptions()


def loss_fn(
    model: Model,
    params: Params,
    batch: Batch,
    dropout_key: PRNGKeyArray | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Returns the loss of a batch in float32, equal to that of the class for the task, such as
    transformers' BertForMaskedLM; cross-entropies are in nats.

    Labels of -100 do not count; if none counts the loss is 0 (PyTorch's is NaN). A label that is
    neither -100 nor a class gives NaN. The loss of `sequence_classification` depends on
    `problem_type`. Answer positions at or beyond the end do not count; negative ones are taken as
    position 0.

    Args:
        batch: inputs and targets by Hugging Face's names.
        dropout_key: trains with dropout and new LSH rotations; None evaluates.
        label_smoothing, class_weights: share of a label that is spread over all classes, and a
            factor for each class, as in PyTorch's CrossEntropyLoss, where the weights also count
            in the mean.

    Returns:
        The loss, and metrics: `loss`, `targets` (number of labels that counted), `tokens` (number
        of real tokens).

    Raises:
        ValueError: for a task without a loss, or a batch whose names, shapes or dtypes do not fit.
    """
    options = label_options(label_smoothing, class_weights)
    counts = target_counts(model, batch, options)
    loss = weighted_mean(model, loss_sums(model, params, batch, dropout_key, options), counts)
    return loss, batch_metrics(loss, batch, target_counts(model, batch))


def label_options(label_smoothing: float, class_weights: Sequence[float] | None) -> LabelOptions:
    """Returns the two arguments as a record."""
    weights = None if class_weights is None else tuple(float(weight) for weight in class_weights)
    return LabelOptions(label_smoothing, weights)


def smooths(target: Target, problem: ProblemType) -> bool:
    """Returns whether labels can be smoothed; `problem` matters to `sequence_classification`."""
    if target.loss == "problem_type":
        return problem == "single_label_classification"
    return target.loss in ("class", "next_token")


def cross_entropy_sum(
    logits: Float[Array, "*N Y"], labels: Int[Array, "*N"], options: LabelOptions = ALIKE
) -> Float[Array, ""]:
    """Returns the sum of -log softmax(logits)[label] in float32 over the labels other than -100;
    NaN if one of them is not a class."""
    share = options.label_smoothing
    if options.class_weights is None:
        return -jnp.sum(label_log_probs(logits, labels, share))
    weights = jnp.asarray(options.class_weights, jnp.float32)  # [Y]
    own = _weights_of(labels, options) * label_log_probs(logits, labels)
    if share:
        every = jax.nn.log_softmax(logits.astype(jnp.float32)) @ weights / len(weights)
        own = (1 - share) * own + share * jnp.where(labels == IGNORED, 0.0, every)
    return -jnp.sum(own)


def _weights_of(labels: Int[Array, "*N"], options: LabelOptions) -> Float[Array, "*N"]:
    """Returns how much each label counts; 0 for labels of -100."""
    counted = labels != IGNORED
    if options.class_weights is None:
        return counted.astype(jnp.float32)
    weights = jnp.asarray(options.class_weights, jnp.float32)
    return jnp.where(counted, weights[jnp.clip(labels, 0, len(weights) - 1)], 0.0)


def problem_type(config: ModelConfig, dtype: DTypeLike) -> ProblemType:
    """Returns the `problem_type` of `sequence_classification`.

    It is that of the config or, if None, the one that Hugging Face infers: "regression" for one
    label, otherwise "single_label_classification" for integer labels and
    "multi_label_classification" for floats.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    integers = jnp.issubdtype(dtype, jnp.integer)
    return "single_label_classification" if integers else "multi_label_classification"


def label_shape(
    model: Model, target: Target, tokens: tuple[int, ...], dtype: DTypeLike = jnp.int32
) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a target's labels.

    Args:
        tokens: the shape of the model's `input_ids`, optionally with a leading axis of
            microbatches.
        dtype: dtype of the labels; decides the `problem_type` if the config has none.

    Raises:
        ValueError: if the shape depends on other arrays than `input_ids`.
    """
    task, config = model.task_record, model.config
    if target.loss in OWN:
        raise ValueError(
            f"task={model.task!r} computes its own loss from {', '.join(task.arrays)}, whose "
            "shapes do not follow from input_ids; give a whole batch."
        )
    rows = tokens[: 1 - task.input_rank]
    if target.loss == "problem_type":
        if problem_type(config, dtype) != "single_label_classification":
            return jax.ShapeDtypeStruct((*rows, config.num_labels), jnp.float32)
    elif target.loss != "position" and target.output in task.per_token:
        return jax.ShapeDtypeStruct(tokens, jnp.int32)
    return jax.ShapeDtypeStruct(rows, jnp.int32)


def targets_of(model: Model) -> tuple[Target, ...]:
    """Returns the terms of the task's loss; raises ValueError for a task without a loss."""
    targets = model.task_record.targets
    if not targets:
        family = family_of(model.config.model_type)
        trained = [name for name in family.heads if family.head(name).task.targets]
        raise ValueError(
            f"task={model.task!r} has no loss; train one of {', '.join(trained)}, or write a loss "
            "on the model's outputs."
        )
    return targets


def loss_sums(
    model: Model, params: Params, batch: Batch, key, options: LabelOptions = ALIKE
) -> list[Float[Array, ""]]:
    """Returns, per target, the sum of the losses of the labels that count."""
    return target_sums(model, apply_model(model, params, batch, key), batch, options)


def apply_model(model: Model, params: Params, batch: Batch, key) -> Any:
    """Returns the model's output for the inputs of a batch, which may also hold targets.

    It trains with the dropout and LSH rotations of `key`; None evaluates. A decoder that generates
    gets its inputs from the labels if the batch has no others. LoRA adapters in `params` are
    applied.
    """
    rngs: Any = None
    if key is not None:
        rngs = dict(zip(("dropout", "lsh"), jax.random.split(key), strict=True))
    names = (*INPUTS, *model.task_record.arrays)
    inputs = {name: batch[name] for name in names if name in batch}
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
    if model.has_two_stacks and model.task_record.generates and not given:
        inputs["decoder_input_ids"] = model.shift_right(jnp.asarray(batch["labels"]))
    if "labels" in batch and model.config.cuts_last_token(_lead_shape(batch)[-1]):
        inputs = {name: array[:, :-1] for name, array in inputs.items()}
    inputs |= segments_of(model, batch)
    return model.apply({"params": merge_lora(params)}, **inputs, train=key is not None, rngs=rngs)


def segments_of(model: Model, batch: Batch) -> dict[str, int]:
    """Returns the model's keyword for the most texts in a packed row; empty if it needs none.

    The number comes from the shape of the labels if each text has one, otherwise from that of
    "segment_rows". Raises ValueError for a task whose labels cannot be packed.
    """
    if "segment_ids" not in batch:
        return {}
    target, task = targets_of(model)[0], model.task_record
    if target.loss == "position":
        raise ValueError(
            f"segment_ids in a batch for task={model.task!r}: no loss is defined over several "
            "texts in one row; give each text its own row."
        )
    per_text = batch[target.labels] if target.output not in task.per_token else None
    counted = batch.get(SEGMENT_ROWS) if per_text is None else per_text
    return {} if counted is None else {"num_segments": counted.shape[1]}


def target_sums(
    model: Model, output: Any, batch: Batch, options: LabelOptions = ALIKE
) -> list[Float[Array, ""]]:
    """Returns, per target, the sum of the losses of the labels that count, given the output."""
    sums = []
    for target, labels in zip(targets_of(model), _labels(model, batch), strict=True):
        logits = getattr(output, target.output).astype(jnp.float32)
        if target.loss in OWN:
            sums.append(logits * jnp.sum(labels != IGNORED))
            continue
        _check_labels(model, target, logits.shape, labels, batch)
        if target.loss == "next_token":  # the model may not have read the last one
            labels = labels[:, : logits.shape[1]]
        problem = problem_type(model.config, labels.dtype)
        options.check(model, target, problem)
        if target.loss == "yes_or_no":
            losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32))
            losses = jnp.where((labels == 0) | (labels == 1), losses, jnp.nan)
            sums.append(jnp.sum(jnp.where(labels == IGNORED, 0.0, losses)))
        elif jnp.issubdtype(labels.dtype, jnp.integer):
            sums.append(cross_entropy_sum(logits, labels, options))
        elif problem == "regression":
            sums.append(_sum_there((logits - labels) ** 2, batch))
        else:
            losses = optax.sigmoid_binary_cross_entropy(logits, labels)
            sums.append(_sum_there(losses, batch))
    return sums


def _sum_there(values: Float[Array, "..."], batch: Batch) -> Float[Array, ""]:
    """Returns the sum over all rows, or over the texts that packed rows have: float labels have no
    value that means "does not count"."""
    if "segment_ids" not in batch:
        return jnp.sum(values)
    segments = jnp.asarray(batch["segment_ids"])
    texts = jnp.arange(1, values.shape[segments.ndim - 1] + 1)
    own = jnp.expand_dims(segments, -1) == texts.reshape(*[1] * segments.ndim, -1)
    there = own.any(axis=-2)  # [..., B, texts]
    there = there.reshape(*there.shape, *[1] * (values.ndim - there.ndim))
    return jnp.sum(jnp.where(there, values, 0.0))


def _check_labels(
    model: Model, target: Target, outputs: tuple[int, ...], labels: Array, batch: Batch
) -> None:
    """Raises ValueError if the shape of the labels does not fit the outputs."""
    tokens, remedy = _lead_shape(batch), ""
    if "segment_ids" in batch and target.output not in model.task_record.per_token:
        tokens = (*outputs[:2], tokens[-1])  # each text as a row
    if model.has_two_stacks and target.output in model.task_record.per_token:
        tokens = outputs[:2]  # the decoder's
        given = [name for name in ("decoder_input_ids", "decoder_inputs_embeds") if name in batch]
        remedy = f" Give labels as long as {given[0]}, or only labels." if given else ""
    expected = label_shape(model, target, tokens, labels.dtype).shape
    if labels.shape != expected:
        raise ValueError(
            f"{target.labels} for task={model.task!r} have shape {labels.shape}, but outputs of "
            f"shape {outputs} need labels of shape {expected}.{remedy}"
        )


def _labels(model: Model, batch: Batch) -> list[Array]:
    """Returns, per target, the labels as the loss takes them.

    For regression and multi-label they are floats of the shape of the logits, otherwise integers
    without the last axis of the logits, -100 where a label does not count.
    """
    wanted = [target.labels for target in targets_of(model)]
    others = (*INPUTS, SEGMENT_ROWS, *model.task_record.arrays)
    missing, unknown = sorted({*wanted} - {*batch}), sorted({*batch} - {*wanted, *others})
    if missing or unknown:
        raise ValueError(
            f"a batch for task={model.task!r} needs {wanted} and may have those of {list(others)} "
            f"that the model takes; missing: {missing}, unknown: {unknown}."
        )
    return [
        _prepared(model, target.loss, batch, jnp.asarray(batch[target.labels]))
        for target in targets_of(model)
    ]


def _prepared(model: Model, loss: Loss, batch: Batch, labels: Array) -> Array:
    if loss == "own_of_rows":
        return jnp.zeros(labels.shape[:-1], jnp.int32)
    if loss == "own_of_tokens":
        return jnp.where(jnp.asarray(batch.get("mlm_mask", jnp.ones_like(labels))) != 0, 0, IGNORED)
    if loss == "problem_type":
        problem = problem_type(model.config, labels.dtype)
        if problem != "single_label_classification":
            labels = labels.astype(jnp.float32)
            alone = labels.ndim == len(_lead_shape(batch)) - ("segment_ids" not in batch)
            return labels[..., None] if alone and model.config.num_labels == 1 else labels
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels for task={model.task!r} must be integers, got {labels.dtype}; several labels "
            "per text need problem_type='multi_label_classification'."
        )
    labels = jnp.where(labels == model.config.ignored_label, IGNORED, labels)
    if loss == "next_token":  # position t answers with token t + 1
        following = labels[..., 1:]
        if "segment_ids" in batch:
            texts = jnp.asarray(batch["segment_ids"])
            following = jnp.where(texts[..., 1:] == texts[..., :-1], following, IGNORED)
        return jnp.full_like(labels, IGNORED).at[..., :-1].set(following)
    if loss == "yes_or_no" and "attention_mask" in batch:
        return jnp.where(jnp.asarray(batch["attention_mask"]) != 0, labels, IGNORED)
    if loss == "position":
        decoded = batch.get("decoder_input_ids", batch.get("decoder_inputs_embeds"))
        length = _lead_shape(batch)[-1] if decoded is None else decoded.shape[1]
        return jnp.where(labels >= length, IGNORED, jnp.maximum(labels, 0))
    return labels


def target_counts(
    model: Model, batch: Batch, options: LabelOptions = ALIKE
) -> list[Float[Array, ""]]:
    """Returns, per target, how many labels count (or the sum of their weights), in a batch or in
    all microbatches together."""
    return [
        _sum_there(jnp.ones_like(labels), batch)
        if jnp.issubdtype(labels.dtype, jnp.floating)
        else jnp.sum(_weights_of(labels, options))
        for labels in _labels(model, batch)
    ]


def weighted_mean(model: Model, sums, counts) -> Float[Array, ""]:
    """Returns the loss from each target's sum and count; a count of 0 gives 0."""
    loss = jnp.float32(0.0)
    for target, total, count in zip(targets_of(model), sums, counts, strict=True):
        loss += target.weight * total / jnp.where(count > 0, count, 1.0)
    return loss


def _lead_shape(batch: Batch) -> tuple[int, ...]:
    """Returns the shape [..., T] of the tokens, from ids or embeddings."""
    ids = batch.get("input_ids")
    return ids.shape if ids is not None else batch["inputs_embeds"].shape[:-1]


def batch_metrics(loss, batch: Batch, counts) -> Metrics:
    """Returns the loss, the number of labels that counted and the number of real tokens."""
    mask = batch.get("attention_mask", batch.get("segment_ids"))
    real = math.prod(_lead_shape(batch)) if mask is None else jnp.sum(jnp.asarray(mask) != 0)
    return {"loss": loss, "targets": sum(counts), "tokens": jnp.asarray(real, jnp.float32)}
