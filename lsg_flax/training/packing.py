"""Checks and rows of `packing: true`, which packs several texts into each row."""

from lsg_flax.data import Packing
from lsg_flax.models import TASKS, EncoderConfig, Model, block_of, check_packable
from lsg_flax.patterns import LSGConfig
from lsg_flax.training.source import SourceModel


def packed_tasks() -> tuple[str, ...]:
    """Returns the tasks whose texts can share rows: those with labels of texts or of tokens."""
    kinds = ("text", "words", "masked_text", "running_text")
    return tuple(name for name, task in TASKS.items() if task.targets and task.examples in kinds)


def check_packed(task: str, sequence: int) -> None:
    """Raises ValueError if texts cannot share rows.

    Args:
        sequence: number of devices along the mesh's sequence axis.
    """
    if task not in packed_tasks():
        raise ValueError(
            f"packing=True is for {', '.join(packed_tasks())}, not for {task}; leave it out."
        )
    if sequence != 1:
        raise ValueError(
            f"packing=True with mesh.sequence={sequence}: rows of several texts cannot be split "
            "over a sequence axis; put the devices along data."
        )


def packing_for(
    source: SourceModel, lsg: LSGConfig | None, lengths: tuple[int, ...] | None
) -> Packing:
    """Returns rows in which each text begins at a multiple of the block size.

    Args:
        lengths: the one length of rows, which may be more than the model has positions; by default
            `source.length`, rounded up to whole blocks.

    Raises:
        ValueError: for a model that cannot keep texts apart, and rows too short for the longest
            text.
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
            f"buckets={[length, *more]} with packing=True: give one length, a multiple of "
            f"block_size={block} and at least {least} for texts of max_length={source.length}."
        )
    return Packing(length, block)
