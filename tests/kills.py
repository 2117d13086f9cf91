"""Commands are killed at random moments and given again: what they write has the bytes of a run
that nobody disturbed, and their input is as it was.

    python tests/kills.py [--times 10] [--commands train predict summarize embed index] [--seed 0]

Prints a line per time; the exit status says whether all went well.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import compiling
import numpy as np
from golden_data import GOLDEN
from tiny_tokenizers import write_words

ROOT = pathlib.Path(__file__).parent.parent
MODEL = GOLDEN / "bert_to_convert_512"
WRITER = GOLDEN / "bart_plain_conditional_generation"
REALM = GOLDEN / "realm_plain_open_qa"
COMMANDS = ("train", "predict", "summarize", "embed", "index")
PATIENCE = 300  # seconds for a command to end


class Commands:
    """The commands on data of their own; `made` is what each writes."""

    def __init__(self, folder: pathlib.Path):
        """Writes the data."""
        self.folder, self.data = folder, folder / "data.jsonl"
        shutil.copytree(WRITER, folder / "writer")
        write_words(folder / "writer")
        generator = np.random.default_rng(0)
        texts = [
            " ".join(f"w{i}" for i in generator.integers(5, 30, generator.integers(4, 200)))
            for _ in range(400)
        ]
        rows = [{"text": text, "label": "ab"[len(text) % 2]} for text in texts]
        self.data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        self.corpus = folder / "corpus.txt"  # of several windows
        self.corpus.write_text("".join(f"{text[:200]}\n" for text in 25 * texts))

    def line(self, command: str, output: pathlib.Path) -> list[str]:
        """What the user types."""
        if command == "train":
            files = ["--train-data", self.data, "--eval-data", self.data, "--output", output]
            files += ["--cache", self.folder / "cache", "--task", "sequence_classification"]
            steps = ["--steps", 40, "--save-every", 2, "--evaluate-every", 4, "--max-length", 64]
            given = ["--model", MODEL, *files, *steps, "--batch-size", 4, "--devices", 1]
        elif command == "summarize":
            beams = ["--num-beams", 2, "--max-length", 40, "--min-length", 30]
            given = [self.folder / "writer", self.data, output, "--truncation", *beams]
        elif command == "index":
            given = [REALM, self.corpus, output, "--batch-size", 64]
        else:
            given = [MODEL, self.data, output, "--max-length", 128]
            given += ["--pooling", "mean"] if command == "embed" else ["--truncation", "--outputs"]
        return [sys.executable, "-m", "lsg_flax.cli", command, *map(str, given)]

    def start(self, command: str, output: pathlib.Path) -> subprocess.Popen:
        """The command as a process of its own; what it says goes to OUTPUT.txt."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": compiling.xla_flags(devices=1),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.with_name("said.txt").open("a") as log:
            line = self.line(command, output)
            return subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment)


def place_of(command: str, folder: pathlib.Path) -> pathlib.Path:
    """Where the command writes."""
    names = {"train": "model", "embed": "vectors.npy", "index": "index"}
    return folder / names.get(command, "out.jsonl")


def signs(command: str, output: pathlib.Path) -> list[pathlib.Path]:
    """Files that say how far the command is: it has begun, and it has something to write."""
    of_folder = command in ("train", "index")
    lock = output / ".lock" if of_folder else output.with_name(f"{output.name}.lock")
    writes = {
        "train": output / "log" / "metrics.jsonl",
        "index": output / "block_emb.safetensors.partial",
        "predict": output.with_suffix(".jsonl.partial"),
        "summarize": output.with_suffix(".jsonl.partial"),
    }
    return [lock, writes.get(command, lock)]


def wait_for(sign: pathlib.Path, process: subprocess.Popen) -> float:
    """When the sign was there, or the process at its end."""
    while process.poll() is None and not (sign.exists() and sign.stat().st_size):
        time.sleep(0.002)
    return time.monotonic()


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """All files but those with times in them; of the log the losses."""
    found = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(file.relative_to(folder))
        if name == "said.txt" or "checkpoints" in name:
            continue
        found[name] = file.read_bytes()
        if file.name == "metrics.jsonl":
            records = map(json.loads, found[name].splitlines())
            found[name] = json.dumps([(r["step"], r["loss"]) for r in records]).encode()
    return found


def disturb(
    commands: Commands, command: str, folder: pathlib.Path, *, sign: int, moment: float
) -> str:
    """Kills the command `moment` seconds behind a sign, unless it has ended, and gives it again;
    says what happened."""
    output = place_of(command, folder)
    with commands.start(command, output) as process:
        wait_for(signs(command, output)[sign], process)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
    there = sorted(p.name for p in folder.iterdir() if p.name != "said.txt")
    there += sorted(f"checkpoint {p.name}" for p in output.glob("checkpoints/[0-9]*"))
    with commands.start(command, output) as process:
        status = process.wait(PATIENCE)
    assert status == 0, folder.joinpath("said.txt").read_text()[-1500:]
    return f"killed after {moment:.2f} s, which left {there}"


def run(folder: pathlib.Path, command: str, *, times: int, generator: random.Random) -> int:
    """How often the command wrote something else after a kill than undisturbed."""
    commands, wrong = Commands(folder / "input"), 0
    given = commands.data.read_bytes()
    for name in ("first", "calm"):  # the first compiles
        calm = folder / name
        with commands.start(command, place_of(command, calm)) as process:
            began = [wait_for(sign, process) for sign in signs(command, place_of(command, calm))]
            assert process.wait(PATIENCE) == 0, (calm / "said.txt").read_text()[-1500:]
        lasts = [time.monotonic() - moment for moment in began]
    whole = contents(calm)
    for number in range(1, times + 1):
        again = folder / str(number)
        try:
            sign = number % 2
            moment = generator.uniform(0, lasts[sign])
            story = disturb(commands, command, again, sign=sign, moment=moment)
            assert contents(again) == whole, f"other files: {sorted(contents(again))}"
            assert commands.data.read_bytes() == given, "the input is another"
            print(f"{command} {number}: {story}, same bytes", flush=True)
        except AssertionError as error:
            wrong += 1
            print(f"{command} {number}: WRONG: {error}", flush=True)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """The number of times that something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    generator, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="lsg-kills-", ignore_cleanup_errors=True) as place:
        for command in options.commands:
            folder = pathlib.Path(place) / command
            wrong += run(folder, command, times=options.times, generator=generator)
    print(f"{wrong} of {options.times * len(options.commands)} went wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main() and 1)
