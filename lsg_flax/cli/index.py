"""`lsg-flax index`: indexes a corpus, from which `lsg-flax ask` answers questions."""

import argparse

from lsg_flax.cli import shared
from lsg_flax.cli.shared import add_number, add_switch
from lsg_flax.open_qa import build_index, open_records, unpickle_records
from lsg_flax.progress import count_of
from lsg_flax.sharding import AXES, make_mesh

_DESCRIPTION = """Embed the blocks of a corpus, for `lsg-flax ask`.

MODEL is a RealmForOpenQA. CORPUS is a .txt with a block on each line, a .jsonl of objects with
"text", or a .npy of fixed-width bytes. FOLDER becomes such a model with these blocks, also for
transformers. Run a stopped command again to resume it.

The published block_records.npy is a pickle, which is read only with --unpickle-records: then bytes
and texts in it are accepted, any other object is refused, none of its code runs, and FOLDER gets
the blocks as fixed-width bytes. --keep-embeddings copies the published embeddings.

  lsg-flax index ./realm-orqa-nq-openqa ./realm-orqa-nq-openqa/block_records.npy ./realm-nq \\
      --unpickle-records --keep-embeddings"""


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    spelled = {"pass text_column=": 'name it "text", not '}
    command = shared.add_command(commands, "index", _DESCRIPTION, run, spelled)
    command.add_argument("model", metavar="MODEL", help="folder, or id on the Hugging Face hub")
    command.add_argument("corpus", metavar="CORPUS", help=".txt, .jsonl or .npy")
    command.add_argument("folder", metavar="FOLDER", help="folder for the result")
    add_switch(command, "--unpickle-records", "CORPUS is a pickle; only bytes and texts are read")
    add_switch(command, "--keep-embeddings", "use MODEL's embeddings; it must have these blocks")
    add_number(command, "--batch-size", "blocks at once", 32)
    about = f"devices along the axes {', '.join(AXES)} (default: one device)"
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
        f"wrote {arguments.folder}: {count_of(len(records), 'block')}, {done:,} of them "
        "embedded now"
    )
