"""Opens and checks what a run needs before it computes: checkpoint, data, batches and mesh."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
from jax.sharding import Mesh

from lsg_flax import hub
from lsg_flax.buckets import default_buckets
from lsg_flax.data import (
    INPUT,
    TARGET,
    DataOptions,
    TokenizedDataset,
    labels_for,
    load_examples,
)
from lsg_flax.models import TASKS, Model, ModelConfig
from lsg_flax.patterns import LSGConfig
from lsg_flax.sharding import check_batches, make_mesh
from lsg_flax.training.embedding_settings import EMBEDDING
from lsg_flax.training.embedding_source import (
    check_negatives,
    check_queries,
    embedding_ladders,
    with_sentences,
)
from lsg_flax.training.optimizers import layer_rates
from lsg_flax.training.packing import packing_for
from lsg_flax.training.reports import Reporting
from lsg_flax.training.scores import make_rouge_scorer
from lsg_flax.training.settings import Settings
from lsg_flax.training.source import SourceModel, open_source

Parts = tuple[TokenizedDataset, TokenizedDataset | None]  # training data, held-out data


def check_packages(settings: Settings) -> None:
    """Raises ImportError if an extra package that the run needs is not installed."""
    settings.reporting()
    if settings.tensorboard:
        Reporting(("tensorboard",))
    if settings.predict_with_generate:
        make_rouge_scorer()


def source_for(settings: Settings) -> SourceModel:
    """Opens the checkpoint to train; raises ValueError if it lacks what the settings train, or
    cannot have their attention pattern."""
    length, convert = settings.max_length, settings.convert
    source = open_source(settings.model, settings.task, length, convert=convert)
    if settings.task == EMBEDDING:
        source = with_sentences(settings, source)
    if settings.train_only == "global_tokens_and_head":
        source.check_globals()
    if settings.writes_targets:
        source.check_targets(settings.max_target_length)
    lsg = pattern_for(settings, source)
    if settings.packing:
        packing_for(source, lsg, settings.buckets)
    if settings.lora is not None or settings.layerwise_lr_decay is not None:
        task = source.model_task
        _check_tree(settings, Model(source.checkpoint.config_for(task), task))
    for name, lengths in (
        ("buckets", settings.ladder),
        ("target_buckets", settings.target_buckets),
    ):
        if lengths and max(lengths) > source.reads:
            raise ValueError(
                f"{name}={list(lengths)} must be lengths in 1..{source.reads}: "
                f"{settings.model} reads at most {source.reads} tokens."
            )
    return source


def _check_tree(settings: Settings, model: Model) -> None:
    """Raises ValueError for LoRA on modules that the model lacks, and for layer-wise decay of
    layers without an order."""
    params = model.abstract_params()
    if settings.lora is not None:
        settings.lora.kernels(params)
    if settings.layerwise_lr_decay is not None:
        layer_rates(params, settings.layerwise_lr_decay)


def pattern_for(settings: Settings, source: SourceModel) -> LSGConfig | None:
    """Returns the attention pattern to train with; raises ValueError if it is not possible."""
    if source.converts:
        return dataclasses.replace(source.config.lsg or LSGConfig(), **settings.lsg)
    return source.checkpoint.config_for(source.model_task, **settings.lsg).lsg


def options_for(settings: Settings, source: SourceModel) -> DataOptions:
    """Returns how rows are read. A head that is trained further keeps its labels if the data has no
    others; otherwise the data's labels are used."""
    segments, head = source.config.segments > 1, source.labels
    options = settings.data_options(source.length, head, token_type_ids=segments)
    if source.sentences is not None:
        lower = source.sentences.do_lower_case
        return dataclasses.replace(options, token_type_ids=False, lower_case=lower)
    options = source.with_target_length(options)
    if head is None or settings.labels or options.labels is None:
        return options
    part = {"subset": settings.subset, "split": settings.train_split}
    labels = labels_for(settings.train_data, options, head, **part)
    if labels != head and len(labels) == len(head):
        warnings.warn(
            f"{source.name} has a head for the labels {', '.join(head)}; training starts from its "
            f"weights, but its labels become those of the data: {', '.join(labels)}.",
            stacklevel=3,
        )
    return dataclasses.replace(options, labels=labels)


def load_data(
    settings: Settings, options: DataOptions, tokenizer: hub.Tokenizer, progress: bool
) -> Parts:
    """Reads the training data and, if given, the held-out data, with the same labels."""
    load = functools.partial(
        load_examples,
        tokenizer=tokenizer,
        subset=settings.subset,
        cache=settings.cache,
        progress=progress and jax.process_index() == 0,
    )
    settings.weights_of(options.labels)  # fails before reading if the labels are already known
    learned = load(settings.train_data, options, split=settings.train_split)
    settings.weights_of(learned.labels)
    if settings.eval_data is None:
        return learned, None
    if options.label_column is not None:
        options = dataclasses.replace(options, labels=learned.labels)
    if options.problem_type == "regression":
        options = dataclasses.replace(options, width=learned.arrays["labels"].shape[1])
    return learned, load(settings.eval_data, options, split=settings.eval_split)


def head_for(data: TokenizedDataset, options: DataOptions) -> dict[str, Any]:
    """Returns the fields of the config that make a head for the labels of the data."""
    task = TASKS[options.task]
    if not task.named_labels:
        return {}
    by_problem = any(target.loss == "problem_type" for target in task.targets)
    values = {"problem_type": options.problem_type} if by_problem else {}
    if options.problem_type == "regression":
        return values | {"num_labels": data.arrays["labels"].shape[1]}
    return values | {"labels": data.labels}


def train_ladders(
    settings: Settings,
    source: SourceModel,
    model: Model,
    data: Parts,
    mesh: Mesh | None,
) -> dict[str, tuple[int, ...]]:
    """Returns the lengths that training data is padded to, by stream; a stream that is not in the
    result chooses its own. Raises ValueError for rows that cannot be trained on, or that the mesh
    cannot split evenly."""
    if source.sentences is not None:
        found = embedding_ladders(settings, source, data[0], mesh)
        check_negatives(settings, data[0], found)
        check_queries(settings, data[1])
        return found
    lengths = training_buckets(settings.ladder, source.length, source.config)
    sizes = (settings.microbatch_size, settings.eval_batch_size)
    buckets = buckets_for(lengths, settings.max_length, model, sizes, mesh)
    ladders = {INPUT: buckets, TARGET: settings.target_buckets}
    return {name: lengths for name, lengths in ladders.items() if lengths is not None}


def shapes_for(
    settings: Settings,
    source: SourceModel,
    lsg: LSGConfig | None,
    ladders: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
    """Returns arguments of `train_batches` and `eval_batches`: rows are padded to `ladders`, or
    several texts are packed into each."""
    if settings.packing:
        packing = packing_for(source, lsg, settings.buckets)
        return {"packing": packing, "seed": settings.seed}
    return {"buckets": ladders, "seed": settings.seed}


def mesh_of(devices: int | None, axes: dict[str, int]) -> Mesh | None:
    """Returns the mesh of the first `devices`, by default of all; None on a single device."""
    every = jax.devices()
    count = devices or len(every)
    if count > len(every) or (count < len(every) and jax.process_count() > 1):
        raise ValueError(
            f"devices={count}, but there are {len(every)} of {jax.process_count()} processes; give "
            "at most that many, and with several processes all of them."
        )
    mesh = make_mesh(**axes, devices=every[:count])
    return None if count == 1 and jax.process_count() == 1 else mesh


def training_buckets(
    given: tuple[int, ...] | None, longest: int, config: ModelConfig
) -> tuple[int, ...] | None:
    """Returns the lengths of batches to train a model on; by default those that it can train on, or
    None if it can train on any, so that the data chooses. Raises ValueError for given lengths that
    it cannot train on."""
    unit = config.training_unit
    if given is None and unit > 1:
        given = tuple(sorted({-(-length // unit) * unit for length in default_buckets(longest)}))
    for length in given or ():
        config.check_training_length(length)
    return given


def buckets_for(
    given: tuple[int, ...] | None,
    max_length: int | None,
    model: Model,
    rows: tuple[int, int | None],
    mesh: Mesh | None,
) -> tuple[int, ...] | None:
    """Returns the lengths of batches; raises ValueError, before anything is compiled, if the mesh
    cannot split rows or lengths evenly."""
    if mesh is None:
        return given
    length, lsg = max_length or model.max_length, model.config.lsg
    # If the mesh splits sequences, short texts are padded to what its shards need.
    usual = (length,) if mesh.shape["sequence"] > 1 else default_buckets(length)
    named = zip(("batch_size", "eval_batch_size"), rows, strict=True)
    sizes = {name: size for name, size in named if size is not None}
    check_batches(mesh, sizes, given or usual, lsg and lsg.needs_padding)
    return given or usual
