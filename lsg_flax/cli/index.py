"""`lsg-flax index`: makes an index of a corpus, from which questions are answered."""

import argparse

from lsg_flax.cli import shared
from lsg_flax.cli.shared import add_number, add_switch
from lsg_flax.open_qa import build_index, open_records, unpickle_records
from lsg_flax.sharding import AXES, make_mesh

_DESCRIPTION = """Embed the blocks of a corpus, for `lsg-flax ask`.

MODEL is a RealmForOpenQA, CORPUS a .txt with a block on each line, a .jsonl of objects with "text",
or a .npy of fixed-width bytes. FOLDER becomes such a model with these blocks, for transformers too.
A command that was stopped goes on when it is given again.

The published block_records.npy is a pickle, which is never read but with --unpickle-records: then
its bytes and texts are let in, any other object is refused and no code of it runs, and FOLDER gets
them as fixed-width bytes. With --keep-embeddings the published embeddings go along.

  lsg-flax index ./realm-orqa-nq-openqa ./realm-orqa-nq-openqa/block_records.npy ./realm-nq \\
      --unpickle-records --keep-embeddings"""


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "index", _DESCRIPTION, run)
    command.add_argument("model", metavar="MODEL", help="folder, or id on the Hugging Face hub")
    command.add_argument("corpus", metavar="CORPUS", help=".txt, .jsonl or .npy")
    command.add_argument("folder", metavar="FOLDER", help="what is made")
    add_switch(command, "--unpickle-records", "CORPUS is a pickle, of which bytes are let in")
    add_switch(command, "--keep-embeddings", "take those of MODEL, of the same blocks")
    add_number(command, "--batch-size", "blocks at once", 32)
    about = f"devices along {', '.join(AXES)} (default: one device)"
    command.add_argument("--mesh", type=shared.mesh_axes, metavar="AXIS=N,...", help=about)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    shared.check_positive(arguments, "batch_size")
    read = unpickle_records if arguments.unpickle_records else open_records
    records = read(arguments.corpus)
    done = build_index(
        arguments.model,
        records,
        arguments.folder,
        keep_embeddings=arguments.keep_embeddings,
        batch_size=arguments.batch_size,
        mesh=None if arguments.mesh is None else make_mesh(**arguments.mesh),
    )
    shared.console().print(
        f"wrote {arguments.folder}: {len(records):,} blocks, {done:,} of them embedded now"
    )
