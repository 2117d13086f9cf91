"""Several texts in one row, as a run is told by `packing: true`."""

from lsg_flax.data import Packing
from lsg_flax.models import TASKS, EncoderConfig, Model, ProblemType, block_of, check_packable
from lsg_flax.patterns import LSGConfig
from lsg_flax.training.source import SourceModel


def packed_tasks() -> tuple[str, ...]:
    """The tasks whose texts can share rows: with classes of texts or of tokens."""
    kinds = ("text", "words", "masked_text", "running_text")
    return tuple(name for name, task in TASKS.items() if task.targets and task.examples in kinds)


def check_packed(task: str, problem_type: ProblemType, sequence: int) -> None:
    """Raises ValueError for what texts cannot share rows for.

    Args:
        sequence: devices along the mesh's sequence axis.
    """
    if task not in packed_tasks() or problem_type != "single_label_classification":
        raise ValueError(
            f"packing=True is for {', '.join(packed_tasks())} with one label each, not for {task} "
            f"with problem_type={problem_type!r}; leave it out."
        )
    if sequence != 1:
        raise ValueError(
            f"packing=True with mesh.sequence={sequence}: a row of several texts is not cut over a "
            "sequence axis; lay the devices along data."
        )


def packing_for(
    source: SourceModel, lsg: LSGConfig | None, lengths: tuple[int, ...] | None
) -> Packing:
    """Rows in which each text begins at a block.

    Args:
        lengths: the one length of rows, which may be more than the model has positions; None for
            as many tokens as a text has at most.

    Raises:
        ValueError: for a model that cannot keep texts apart, and rows that no text fits in.
    """
    config = source.checkpoint.config_for(source.task)
    config = config.with_overrides(lsg=lsg) if isinstance(config, EncoderConfig) else config
    check_packable(config, Model(config, source.task).head_table)
    assert isinstance(config, EncoderConfig)
    block = block_of(config)
    least = -(-source.length // block) * block
    length, *more = lengths or (least,)
    if more or length < least or length % block:
        raise ValueError(
            f"buckets={[length, *more]} with packing=True: rows that texts share have one length, "
            f"a multiple of block_size={block} and at least {least} for texts of max_length="
            f"{source.length}."
        )
    return Packing(length, block)
