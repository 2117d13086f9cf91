"""Two processes train together; one of them is killed at a random moment; both start again.

    python tests/crash.py [--times 20] [--steps 30] [--seed 0]

Each time: no checkpoint is corrupt (the second run restores the last), the survivor ends by itself,
at most the steps since the last save are lost, and the losses are those of a run that nobody
disturbed, bit for bit. Prints a line per time; the exit status says whether all went well.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

WORKER = pathlib.Path(__file__).with_name("worker.py")
SAVE_EVERY = 3
MESH = {"data": 2, "fsdp": 2}
PATIENCE = 120  # seconds for anything to end by itself


def start(folder: pathlib.Path, *, steps: int, pause: float = 0.05) -> list[subprocess.Popen]:
    """Both processes; what they say goes to FOLDER/<index>.txt."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(WORKER.parent.parent)}
    given = ["--processes", 2, "--port", port, "--steps", steps, "--save-every", SAVE_EVERY]
    given += ["--pause", pause, "--mesh", json.dumps(MESH)]
    processes = []
    for index in range(2):
        command = [
            sys.executable,
            str(WORKER),
            str(folder),
            "--index",
            str(index),
            *map(str, given),
        ]
        with (folder / f"{index}.txt").open("a") as log:
            out = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
            processes.append(subprocess.Popen(command, **out))
    return processes


def finish(processes: list[subprocess.Popen]) -> list[int]:
    """The exit statuses, once both have ended by themselves.

    Raises:
        TimeoutError: if one hangs; both are killed.
    """
    try:
        return [process.wait(PATIENCE) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"a process still ran after {PATIENCE} s") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()


def losses(folder: pathlib.Path) -> dict[int, float]:
    """Step -> loss, of the log; a step that is there twice is an error."""
    file = folder / "log" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [record["step"] for record in records]
    assert steps == list(range(1, len(steps) + 1)), f"the log has the steps {steps}"
    return {record["step"]: record["loss"] for record in records}


def checkpoints(folder: pathlib.Path) -> list[int]:
    """The steps of whole checkpoints."""
    return sorted(int(p.name) for p in (folder / "state").glob("*") if p.name.isdigit())


def crash(folder: pathlib.Path, *, steps: int, generator: random.Random) -> str:
    """Disturbs one run at a random moment and continues it; says what happened.

    Raises:
        AssertionError, TimeoutError: if something is not as it should be.
    """
    processes = start(folder, steps=steps)
    victim = generator.randrange(2)
    moment = generator.randrange(1, steps)
    began = time.monotonic()
    while len(losses(folder)) < moment:  # its log says how far the run is
        assert all(p.poll() is None for p in processes), "a process ended before it was killed"
        assert time.monotonic() - began < PATIENCE, "the run does not get on"
        time.sleep(0.005)
    time.sleep(generator.random() * 0.2)  # anywhere within steps and saves
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    statuses = finish(processes)
    survived = time.monotonic() - killed
    reached, whole = len(losses(folder)), checkpoints(folder)
    done = statuses == [0, 0]  # it had been quicker
    assert done or statuses[1 - victim] != 0, f"exit statuses {statuses}"
    last = whole[-1] if whole else 0
    assert reached - last <= 2 * SAVE_EVERY, f"step {reached} was reached, {last} is saved"
    again = finish(start(folder, steps=steps, pause=0.0))
    assert again == [0, 0], f"the second run ended with {again}, see {folder}"
    return (
        f"process {victim} killed at step {reached}, saved were {whole}, the other ended after "
        f"{survived:.0f} s, went on from {last}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The number of times that something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    generator, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="lsg-crash-", ignore_cleanup_errors=True) as place:
        calm = pathlib.Path(place) / "calm"
        assert finish(start(calm, steps=options.steps, pause=0.0)) == [0, 0], "no calm run"
        for number in range(1, options.times + 1):
            folder = pathlib.Path(place) / str(number)
            try:
                story = crash(folder, steps=options.steps, generator=generator)
                assert losses(folder) == losses(calm), "other losses than undisturbed"
                print(f"{number}: {story}, same losses", flush=True)
            except (AssertionError, TimeoutError) as error:
                wrong += 1
                words = "\n".join((folder / f"{i}.txt").read_text()[-1500:] for i in range(2))
                print(f"{number}: WRONG: {error}\n{words}", flush=True)
    print(f"{options.times - wrong} of {options.times} as they should be")
    return wrong


if __name__ == "__main__":
    sys.exit(main() and 1)
