"""`lsg-flax ask`: answers questions from an indexed corpus."""

import argparse

from lsg_flax.cli import shared
from lsg_flax.hub import CONFIG
from lsg_flax.inference import json_line
from lsg_flax.open_qa import OpenQA

_DESCRIPTION = """Answer each QUESTION from the blocks of FOLDER, which `lsg-flax index` makes.

Prints one line of JSON per question: answer, score, block_id (number of the block in the corpus)
and the text of the block."""

SPELLED = {
    f"give the folder that holds {CONFIG}, or a hub id such as 'bert-base-uncased'": (
        "give a folder that `lsg-flax index` made, or a hub id of such a folder"
    )
}


def add(commands: shared.Commands) -> None:
    """Declares the command and its options."""
    command = shared.add_command(commands, "ask", _DESCRIPTION, run, SPELLED)
    command.add_argument("folder", metavar="FOLDER", help="folder, or id on the Hugging Face hub")
    command.add_argument("questions", metavar="QUESTION", nargs="+")
    about = "folder of another reader model, such as one with LSG attention"
    command.add_argument("--reader", metavar="READER", help=about)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    open_qa = OpenQA.from_pretrained(arguments.folder, reader=arguments.reader)
    for question in arguments.questions:
        print(json_line({"question": question} | open_qa.answer(question)._asdict()), flush=True)
